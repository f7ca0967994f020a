// PyTorch's antialiased resizes, widened by the factor of a reduction: "bicubic" is Keys' cubic with a = -1/2,
// "bilinear" the triangle.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "host_device.h"

namespace pcmecl {

enum class Filter { bicubic, bilinear };

inline Filter filter_named(const std::string& interpolation) {
  return interpolation == "bilinear" ? Filter::bilinear : Filter::bicubic;
}

PCMECL_HD double keys_cubic(double x) {
  x = std::fabs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0.0;
}

PCMECL_HD double triangle(double x) {
  x = std::fabs(x);
  return x < 1 ? 1 - x : 0.0;
}

// The old pixels [first, last) that make the new one, and the filter's centre and stretch.
struct ResizeWindow {
  Filter filter;
  double centre, stretch;
  int64_t first, last;
};

PCMECL_HD ResizeWindow resize_window(Filter filter, int64_t pixel, int64_t before, int64_t after) {
  const double factor = double(before) / double(after);
  const double radius = filter == Filter::bicubic ? 2 : 1;
  ResizeWindow window;
  window.filter = filter;
  window.stretch = factor > 1 ? factor : 1.0;
  window.centre = (double(pixel) + 0.5) * factor;
  const int64_t first = int64_t(window.centre - radius * window.stretch + 0.5);
  const int64_t last = int64_t(window.centre + radius * window.stretch + 0.5);
  window.first = first > 0 ? first : 0;
  window.last = last < before ? last : before;
  return window;
}

// Before division by the sum over the window.
PCMECL_HD double resize_weight(const ResizeWindow& window, int64_t pixel) {
  const double x = (double(pixel) + 0.5 - window.centre) / window.stretch;
  return window.filter == Filter::bicubic ? keys_cubic(x) : triangle(x);
}

}  // namespace pcmecl
