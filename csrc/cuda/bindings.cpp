// The Python module pcmecl_fast._C_cuda: a file of its own, so that the CPU backend does not depend on CUDA's
// libraries. Under the host harness the same functions take CPU tensors.
#include "../common/binding.h"
#include "on.h"

#ifndef PCMECL_MODULE
#define PCMECL_MODULE _C_cuda
#endif

std::vector<pcmecl::Binding>& pcmecl::bindings() {
  static std::vector<Binding> all;
  return all;
}

namespace {

// The newest CUDA that the driver knows, 1000 times its major and 10 times its minor version; 0 without a driver.
int driver() {
  int version = 0;
#ifndef PCMECL_ON_HOST
  cudaDriverGetVersion(&version);
#endif
  return version;
}

}  // namespace

PYBIND11_MODULE(PCMECL_MODULE, m) {
  m.attr("interface") = pcmecl::kInterface;
#ifndef PCMECL_ON_HOST
  m.attr("toolkit") = CUDART_VERSION;
  m.attr("architectures") = PCMECL_ARCHITECTURES;  // "8.0 9.0 9.0+PTX", from setup.py
#endif
  m.def("driver", &driver);
  for (const pcmecl::Binding binding : pcmecl::bindings()) binding(m);
}
