// A rectangle of correlation_loss's logits: some individuals' changes of visual features against others' of text
// features. The whole is the square of everybody against everybody; a group of processes makes it of rectangles.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace pcmecl {

struct Rectangle {
  const at::Tensor& visual;                    // (n, E, D)
  const at::Tensor& text;                      // (m, E, D)
  const std::optional<at::Tensor>& mask;       // (n, E) bool
  const std::optional<at::Tensor>& text_mask;  // (m, E) bool
  const std::string& negatives;
  int64_t first;  // row i is of the same individual as column first + i, if there is one; "within": 0, and n = m

  static Rectangle square(
      const at::Tensor& visual, const at::Tensor& text, const std::optional<at::Tensor>& mask,
      const std::string& negatives) {
    return {visual, text, mask, mask, negatives, 0};
  }

  int64_t pairs() const { return visual.size(1) * (visual.size(1) - 1) / 2; }  // Q
  bool is_empty() const { return visual.size(0) == 0 || text.size(0) == 0 || visual.size(1) < 2; }

  // What an empty one gives: no sum, so that its logarithm is −∞, and no positive; and gradients of 0.
  std::tuple<at::Tensor, at::Tensor, at::Tensor> no_sums(const at::TensorOptions& wide) const {
    const int64_t n = visual.size(0), m = text.size(0), Q = pairs();
    return {at::full({n, Q}, -INFINITY, wide), at::full({m, Q}, -INFINITY, wide), at::zeros({n, Q}, wide)};
  }
  std::vector<std::optional<at::Tensor>> no_gradients(
      const at::TensorOptions& wide, const std::vector<bool>& needs) const {
    std::vector<std::optional<at::Tensor>> gradients(3);
    if (needs[0]) gradients[0] = at::zeros(visual.sizes(), wide);
    if (needs[1]) gradients[1] = at::zeros(text.sizes(), wide);
    if (needs[2]) gradients[2] = at::zeros({}, wide);
    return gradients;
  }
};

}  // namespace pcmecl
