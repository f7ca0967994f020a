// What a file gives to its Python module, said beside the functions: a new operator is in no list.
//
//   PCMECL_BIND(clip_frames)    in the namespace of clip_frames and clip_frames_backward
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

namespace pcmecl {

using Binding = void (*)(pybind11::module_&);

// Defined by each module's bindings.cpp: two modules in one process must not share it.
__attribute__((visibility("hidden"))) std::vector<Binding>& bindings();

inline bool bind(Binding binding) {
  bindings().push_back(binding);
  return true;
}

}  // namespace pcmecl

// The interpreter's lock is released while a function runs.
#define PCMECL_BIND(operation)                                                                        \
  [[maybe_unused]] static const bool operation##_is_bound = ::pcmecl::bind([](pybind11::module_& m) { \
    const auto unlocked = pybind11::call_guard<pybind11::gil_scoped_release>();                       \
    m.def(#operation, &operation, unlocked);                                                          \
    m.def(#operation "_backward", &operation##_backward, unlocked);                                   \
  });
