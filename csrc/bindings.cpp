// The Python module pcmecl_fast._C, the CPU's kernels. Its functions are called by pcmecl_fast/ops/backends/cpu alone.
#include "common/binding.h"
#include "cpu/kernels.h"

std::vector<pcmecl::Binding>& pcmecl::bindings() {
  static std::vector<Binding> all;
  return all;
}

PYBIND11_MODULE(_C, m) {
  m.attr("interface") = pcmecl::kInterface;
#ifdef PCMECL_X86
  m.attr("instruction_sets") = "portable, avx2, avx512";
#else
  m.attr("instruction_sets") = "portable";
#endif
  m.def("cpu_capability", [] { return pcmecl::cpu::kernels().name; });
  for (const pcmecl::Binding binding : pcmecl::bindings()) binding(m);
}
