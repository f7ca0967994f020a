// What a file gives to its Python module, said beside the functions: a new operator is in no list.
//
//   PCMECL_BIND(clip_frames, 0)    in the namespace of clip_frames and clip_frames_backward
//
// binds both, and `clip_frames_differentiable`, the two under autograd. The numbers are the positions of the arguments
// that have a gradient.
//
//   PCMECL_BIND_FUNCTION(name)     binds a function that autograd does not know
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "differentiable.h"

namespace pcmecl {

using Binding = void (*)(pybind11::module_&);

// Defined by each module's bindings.cpp: two modules in one process must not share it.
__attribute__((visibility("hidden"))) std::vector<Binding>& bindings();

// A function of the forward's own arguments.
template <typename Both, typename R, typename... A>
auto named(const char* name, R (*)(A...)) {
  return [name](A... arguments) { return Both::call(name, arguments...); };
}

inline bool bind(Binding binding) {
  bindings().push_back(binding);
  return true;
}

}  // namespace pcmecl

// The interpreter's lock is released while a function runs.
#define PCMECL_BIND(operation, ...)                                                                   \
  [[maybe_unused]] static const bool operation##_is_bound = ::pcmecl::bind([](pybind11::module_& m) { \
    const auto unlocked = pybind11::call_guard<pybind11::gil_scoped_release>();                       \
    m.def(#operation, &operation, unlocked);                                                          \
    m.def(#operation "_backward", &operation##_backward, unlocked);                                   \
    using Both = ::pcmecl::Differentiable<&operation, &operation##_backward, __VA_ARGS__>;            \
    m.def(#operation "_differentiable", ::pcmecl::named<Both>(#operation, &operation), unlocked);     \
  });

#define PCMECL_BIND_FUNCTION(function)                                                               \
  [[maybe_unused]] static const bool function##_is_bound = ::pcmecl::bind([](pybind11::module_& m) { \
    m.def(#function, &function, pybind11::call_guard<pybind11::gil_scoped_release>());               \
  });
