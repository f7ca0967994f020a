// What the operators on changes of features share: when a change counts, and how pairs of emotions are numbered. The
// numbers are those of ops/reference.py.
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

// The same for a change of image features, δ, from its square: 1 / max(|δ|, least).
template <typename C>
PCMECL_HD C inverse_change(C square, C least, bool of_units) {
  const C bounded = square <= least * least ? least * least : square;
  // A difference of unit vectors is rounding up to 1e-6 in float.
  return of_units && sizeof(C) == 4 && bounded <= C(1e-12) ? C(0) : inverse_norm(bounded);
}

// What the part of its gradient along δ has as a factor: 1 / |δ|², or 0 where δ is divided by `least`, a constant.
template <typename C>
PCMECL_HD C inverse_change_square(C square, C least, C inverse) {
  return square <= least * least ? C(0) : inverse * inverse;
}

// x·x_inverse − y·y_inverse, with inverse norms. The smaller of them is factored out, or rounding grows with the ratio
// of the norms. Exactly 0 for equal arguments, also where the compiler fuses products into additions: an edit that
// changes nothing must not have a direction made of rounding. Halved, so that the difference of two finite numbers is
// finite.
template <typename V, typename C>
PCMECL_HD V difference_of_units(V x, C x_inverse, V y, C y_inverse) {
  const C common = x_inverse < y_inverse ? x_inverse : y_inverse;
  return (x * C(0.5) - y * C(0.5)) * (common * C(2)) + x * (x_inverse - common) - y * (y_inverse - common);
}

// Unordered pairs of E emotions: (0,1), (0,2), …, (0,E-1), (1,2), …
PCMECL_HD int64_t pair_count(int64_t emotions) { return emotions * (emotions - 1) / 2; }

PCMECL_HD int64_t pair_index(int64_t a, int64_t b, int64_t emotions) {  // a < b
  return a * (2 * emotions - a - 1) / 2 + b - a - 1;
}

}  // namespace pcmecl
