// What a file gives to its Python module, said beside the functions: a new one is in no list.
//
//   PCMECL_BIND(direction_forward)     binds a function of plain numbers; pointers are the numbers of their addresses
//
// Tensors stay in Python (pcmecl_fast/ops/backends): it allocates, and hands over addresses and sizes. So one build
// fits every PyTorch. The interpreter's lock is released while a function runs; what it throws is raised in Python with
// the function's name in front.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace pcmecl {

// A tensor's memory, as Python's data_ptr() has it; 0 where there is none.
struct Address {
  std::uintptr_t value = 0;

  template <typename T>
  T* of() const {
    return reinterpret_cast<T*>(value);
  }
  explicit operator bool() const { return value != 0; }
};

// What Python and a module agree on, said again by pcmecl_fast/ops/backends/extension.py: counted up where a function's
// arguments change, so that a module that was left from another version is known.
constexpr int kInterface = 4;

using Binding = void (*)(pybind11::module_&);

// Defined by each module's bindings.cpp: two modules in one process must not share it.
__attribute__((visibility("hidden"))) std::vector<Binding>& bindings();

inline bool bind(Binding binding) {
  bindings().push_back(binding);
  return true;
}

// The function with its name in its errors; an index error keeps its own words, which are the user's.
template <typename R, typename... A>
auto named(const char* name, R (*function)(A...)) {
  return [name, function](A... arguments) -> R {
    try {
      return function(arguments...);
    } catch (const pybind11::builtin_exception&) {
      throw;
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string(name) + ": " + error.what());
    }
  };
}

}  // namespace pcmecl

namespace pybind11::detail {

template <>
struct type_caster<pcmecl::Address> {
  PYBIND11_TYPE_CASTER(pcmecl::Address, const_name("int"));

  bool load(handle from, bool) {
    if (!PyLong_Check(from.ptr())) return false;
    value.value = std::uintptr_t(PyLong_AsUnsignedLongLong(from.ptr()));
    return !PyErr_Occurred() || (PyErr_Clear(), false);
  }
};

}  // namespace pybind11::detail

#define PCMECL_BIND(function)                                                                                      \
  [[maybe_unused]] static const bool function##_is_bound = ::pcmecl::bind([](pybind11::module_& m) {               \
    m.def(#function, ::pcmecl::named(#function, &function), pybind11::call_guard<pybind11::gil_scoped_release>()); \
  });
