// The CPU operators on tensors: contiguous and checked by ops/*.py. A gradient that `needs` does not ask for is
// nullopt.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace pcmecl::cpu {

using at::Tensor;
using Gradients = std::vector<std::optional<Tensor>>;
using Needs = std::vector<bool>;

Tensor direction_logits(
    const Tensor& source,          // (B, D)
    const Tensor& edited,          // (B, D)
    const Tensor& bank,            // (N, E, D)
    const Tensor& individual,      // (B,) int64
    const Tensor& source_emotion,  // (B,) int64
    bool normalize);

Gradients direction_logits_backward(
    const Tensor& grad,  // (B, E)
    const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, bool normalize, const Needs& needs);

std::tuple<Tensor, Tensor> direction_loss(  // the loss, () or (B,), and the number it is divided by, ()
    const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion,
    const Tensor& target_emotion,        // (B,) int64
    const std::optional<Tensor>& scale,  // ()
    double scale_number, double contrast, bool normalize, const std::string& reduction);

Gradients direction_loss_backward(
    const Tensor& grad,  // () or (B,)
    const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, const Tensor& target_emotion, const std::optional<Tensor>& scale, double scale_number,
    double contrast, bool normalize, const std::string& reduction, const Tensor& divisor, const Needs& needs);

std::tuple<Tensor, Tensor, Tensor> correlation_loss(  // the loss, (), and the sums of rows and of columns, (N, Q)
    const Tensor& visual,                             // (N, E, D)
    const Tensor& text,                               // (N, E, D)
    const std::optional<Tensor>& scale, double scale_number,
    const std::optional<Tensor>& mask,  // (N, E) bool
    const std::string& negatives);

Gradients correlation_loss_backward(
    const Tensor& grad,  // ()
    const Tensor& visual, const Tensor& text, const std::optional<Tensor>& scale, double scale_number,
    const std::optional<Tensor>& mask, const std::string& negatives, const Tensor& row_sum, const Tensor& column_sum,
    const Needs& needs);

Tensor clip_frames(  // (B, 3, size, size)
    const Tensor& frames,  // (B, 3, H, W)
    int64_t size, const std::vector<double>& mean, const std::vector<double>& std);

Gradients clip_frames_backward(
    const Tensor& grad,  // (B, 3, size, size)
    const Tensor& frames, int64_t size, const std::vector<double>& mean, const std::vector<double>& std,
    const Needs& needs);

inline double number(const std::optional<Tensor>& scale, double scale_number) {
  return scale ? scale->item<double>() : scale_number;
}

}  // namespace pcmecl::cpu
