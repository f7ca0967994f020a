// The CUDA operators on tensors: contiguous and checked by ops/*.py, float32, float16 or bfloat16. As
// csrc/cpu/operators.h has them, but that a scale's value is never read. Nothing here knows the device: under the host
// harness it is the CPU.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace pcmecl::cuda {

using at::Tensor;
using Gradients = std::vector<std::optional<Tensor>>;
using Needs = std::vector<bool>;

Tensor direction_logits(
    const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, bool normalize);

Gradients direction_logits_backward(
    const Tensor& grad, const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, bool normalize, const Needs& needs);

std::tuple<Tensor, Tensor> direction_loss(
    const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, const Tensor& target_emotion, const std::optional<Tensor>& scale, double scale_number,
    double contrast, bool normalize, const std::string& reduction);

Gradients direction_loss_backward(
    const Tensor& grad, const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, const Tensor& target_emotion, const std::optional<Tensor>& scale, double scale_number,
    double contrast, bool normalize, const std::string& reduction, const Tensor& divisor, const Needs& needs);

std::tuple<Tensor, Tensor, Tensor> correlation_loss(
    const Tensor& visual, const Tensor& text, const std::optional<Tensor>& scale, double scale_number,
    const std::optional<Tensor>& mask, const std::string& negatives);

Gradients correlation_loss_backward(
    const Tensor& grad, const Tensor& visual, const Tensor& text, const std::optional<Tensor>& scale,
    double scale_number, const std::optional<Tensor>& mask, const std::string& negatives, const Tensor& row_sum,
    const Tensor& column_sum, const Needs& needs);

std::tuple<Tensor, Tensor> tree_attention(  // out, (N, S, H, d), and the log-sum-exp, (N, H, S)
    const Tensor& qkv,                      // (N, S, 3, H, d)
    int64_t prefix, const std::vector<int64_t>& segment_lengths);

Gradients tree_attention_backward(
    const Tensor& grad, const Tensor& qkv, int64_t prefix, const std::vector<int64_t>& segment_lengths,
    const Tensor& out, const Tensor& lse, const Needs& needs);

Tensor clip_frames(const Tensor& frames, int64_t size, const std::vector<double>& mean, const std::vector<double>& std);

Gradients clip_frames_backward(
    const Tensor& grad, const Tensor& frames, int64_t size, const std::vector<double>& mean,
    const std::vector<double>& std, const Needs& needs);

template <typename T>
T* pointer(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

template <typename T>
T* pointer_or_null(const std::optional<Tensor>& x) {
  return x ? pointer<T>(*x) : nullptr;
}

inline at::TensorOptions in_float(const Tensor& x) { return x.options().dtype(at::kFloat); }

// f(value of the tensor's type)
template <typename F>
void for_dtype(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case at::kFloat: return f(float());
    case at::kHalf: return f(c10::Half());
    case at::kBFloat16: return f(c10::BFloat16());
    default: TORCH_CHECK_TYPE(false, "got ", x.scalar_type(), "; takes float32, float16 or bfloat16");
  }
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
