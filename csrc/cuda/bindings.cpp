// The Python module pcmecl_fast._C_cuda: a file of its own, so that the CPU backend does not depend on CUDA's
// libraries. Under the host harness the same functions take CPU tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "operators.h"

// Read from the file by pcmecl_fast/extension.py before it is loaded: with another torch it may not load at all.
extern "C" __attribute__((used, visibility("default"))) const char pcmecl_built_with[] =
    "pcmecl_fast built with torch " PCMECL_TORCH_VERSION ";";

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace cuda = pcmecl::cuda;
  const auto unlocked = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("direction_logits", &cuda::direction_logits, unlocked);
  m.def("direction_logits_backward", &cuda::direction_logits_backward, unlocked);
  m.def("direction_loss", &cuda::direction_loss, unlocked);
  m.def("direction_loss_backward", &cuda::direction_loss_backward, unlocked);
  m.def("correlation_loss", &cuda::correlation_loss, unlocked);
  m.def("correlation_loss_backward", &cuda::correlation_loss_backward, unlocked);
  m.def("tree_attention", &cuda::tree_attention, unlocked);
  m.def("tree_attention_backward", &cuda::tree_attention_backward, unlocked);
  m.def("clip_frames", &cuda::clip_frames, unlocked);
  m.def("clip_frames_backward", &cuda::clip_frames_backward, unlocked);
}
