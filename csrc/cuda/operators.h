// What the CUDA operators share. Their tensors arrive contiguous and checked by ops/*.py, in float32, float16 or
// bfloat16; arguments as in csrc/cpu, but a scale's value is never read. Nothing here knows the device: under the host
// harness it is the CPU.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/binding.h"
#include "kernels.h"

namespace pcmecl::cuda {

using at::Tensor;
using Gradients = std::vector<std::optional<Tensor>>;
using Needs = std::vector<bool>;

template <typename T>
T* pointer(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

template <typename T>
T* pointer_or_null(const std::optional<Tensor>& x) {
  return x ? pointer<T>(*x) : nullptr;
}

inline at::TensorOptions in_float(const Tensor& x) { return x.options().dtype(at::kFloat); }

// f(value of the type)
template <typename F>
void for_dtype(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kFloat: return f(float());
    case at::kHalf: return f(c10::Half());
    case at::kBFloat16: return f(c10::BFloat16());
    default: TORCH_CHECK_TYPE(false, "got ", dtype, "; takes float32, float16 or bfloat16");
  }
}
template <typename F>
void for_dtype(const Tensor& x, F&& f) {
  for_dtype(x.scalar_type(), f);
}

// A scale as kernels take it, and the float that it points to.
struct ScaleArgument {
  std::optional<Tensor> in_float;
  float number;

  ScaleArgument(const std::optional<Tensor>& scale, double number) : number(float(number)) {
    if (scale) in_float = scale->to(at::kFloat);
  }
  Scale value() const { return {pointer_or_null<float>(in_float), number}; }
};

}  // namespace pcmecl::cuda
