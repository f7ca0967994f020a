// The antialiased bicubic filter, as PyTorch's: Keys' cubic with a = -1/2, widened by the factor of a reduction.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace pcmecl {

PCMECL_HD double keys_cubic(double x) {
  x = std::fabs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0.0;
}

// The old pixels [first, last) that make the new one, and the filter's centre and stretch.
struct CubicWindow {
  double centre, stretch;
  int64_t first, last;
};

PCMECL_HD CubicWindow cubic_window(int64_t pixel, int64_t before, int64_t after) {
  const double factor = double(before) / double(after);
  CubicWindow window;
  window.stretch = factor > 1 ? factor : 1.0;
  window.centre = (double(pixel) + 0.5) * factor;
  const int64_t first = int64_t(window.centre - 2 * window.stretch + 0.5);
  const int64_t last = int64_t(window.centre + 2 * window.stretch + 0.5);
  window.first = first > 0 ? first : 0;
  window.last = last < before ? last : before;
  return window;
}

// Before division by the sum over the window.
PCMECL_HD double cubic_weight(const CubicWindow& window, int64_t pixel) {
  return keys_cubic((double(pixel) + 0.5 - window.centre) / window.stretch);
}

}  // namespace pcmecl
