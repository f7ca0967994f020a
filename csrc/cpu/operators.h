// What the CPU operators share. Their tensors arrive contiguous and checked by ops/*.py; a gradient that `needs` does
// not ask for is nullopt.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/binding.h"

namespace pcmecl::cpu {

using at::Tensor;
using Gradients = std::vector<std::optional<Tensor>>;
using Needs = std::vector<bool>;

inline double number(const std::optional<Tensor>& scale, double scale_number) {
  return scale ? scale->item<double>() : scale_number;
}

}  // namespace pcmecl::cpu
