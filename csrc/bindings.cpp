// The Python module pcmecl_fast._C. Its functions are called by pcmecl_fast/ops alone, with checked, contiguous
// tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/kernels.h"
#include "cpu/operators.h"

// Read from the file by pcmecl_fast/extension.py before it is loaded: with another torch it may not load at all.
extern "C" __attribute__((used, visibility("default"))) const char pcmecl_built_with[] =
    "pcmecl_fast built with torch " PCMECL_TORCH_VERSION ";";

PYBIND11_MODULE(_C, m) {
  namespace cpu = pcmecl::cpu;
  const auto unlocked = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("cpu_capability", [] { return cpu::kernels().name; });
  m.def("direction_logits", &cpu::direction_logits, unlocked);
  m.def("direction_logits_backward", &cpu::direction_logits_backward, unlocked);
  m.def("direction_loss", &cpu::direction_loss, unlocked);
  m.def("direction_loss_backward", &cpu::direction_loss_backward, unlocked);
  m.def("correlation_loss", &cpu::correlation_loss, unlocked);
  m.def("correlation_loss_backward", &cpu::correlation_loss_backward, unlocked);
  m.def("clip_frames", &cpu::clip_frames, unlocked);
  m.def("clip_frames_backward", &cpu::clip_frames_backward, unlocked);
}
