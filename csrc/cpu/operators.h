// What the CPU operators' functions share. They take the addresses of contiguous, checked tensors
// (pcmecl_fast/ops/backends/cpu), spread ranges over threads and add up; the arithmetic is in *_kernels.h.
#pragma once

#include "../common/binding.h"
#include "../common/dtype.h"
#include "kernels.h"
#include "threads.h"

namespace pcmecl::cpu {

// f(value of the type)
template <typename F>
auto for_dtype(int dtype, F&& f) {
  switch (dtype) {
    case kFloat32: return f(float());
    case kFloat64: return f(double());
    case kBFloat16: return f(BFloat16());
    default: throw std::invalid_argument("takes float32, float64 or bfloat16");
  }
}

}  // namespace pcmecl::cpu
