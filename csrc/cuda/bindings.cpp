// The Python module pcmecl_fast._C_cuda: a file of its own, so that the CPU backend does not depend on CUDA's
// libraries. Under the host harness the same functions take CPU tensors.
#include "../common/binding.h"

// Read from the file by pcmecl_fast/ops/backends/extension.py before it is loaded: with another torch it may not load.
extern "C" __attribute__((used, visibility("default"))) const char pcmecl_built_with[] =
    "pcmecl_fast built with torch " PCMECL_TORCH_VERSION ";";

std::vector<pcmecl::Binding>& pcmecl::bindings() {
  static std::vector<Binding> all;
  return all;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  for (const pcmecl::Binding binding : pcmecl::bindings()) binding(m);
}
