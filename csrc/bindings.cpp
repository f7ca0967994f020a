// The Python module pcmecl_fast._C. Its functions are called by pcmecl_fast/ops alone, with checked, contiguous
// tensors.
#include "common/binding.h"
#include "cpu/kernels.h"

// Read from the file by pcmecl_fast/ops/backends/extension.py before it is loaded: with another torch it may not load.
extern "C" __attribute__((used, visibility("default"))) const char pcmecl_built_with[] =
    "pcmecl_fast built with torch " PCMECL_TORCH_VERSION ";";

std::vector<pcmecl::Binding>& pcmecl::bindings() {
  static std::vector<Binding> all;
  return all;
}

PYBIND11_MODULE(_C, m) {
  m.def("cpu_capability", [] { return pcmecl::cpu::kernels().name; });
  for (const pcmecl::Binding binding : pcmecl::bindings()) binding(m);
}
