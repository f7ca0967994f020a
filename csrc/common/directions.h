// What the operators on changes of features share: when a change counts, and how pairs of emotions are numbered.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace pcmecl {

// One over the length of a vector, from its square; 0 for a vector no longer than 1e-8, which is no direction and has
// no gradient. NaN stays NaN.
template <typename C>
PCMECL_HD C inverse_norm(C square) {
  return square <= C(1e-16) ? C(0) : C(1) / std::sqrt(square);
}

// Unordered pairs of E emotions: (0,1), (0,2), …, (0,E-1), (1,2), …
PCMECL_HD int64_t pair_count(int64_t emotions) { return emotions * (emotions - 1) / 2; }

PCMECL_HD int64_t pair_index(int64_t a, int64_t b, int64_t emotions) {  // a < b
  return a * (2 * emotions - a - 1) / 2 + b - a - 1;
}

}  // namespace pcmecl
