#include "tensor_cores.h"

#include <cmath>

#include "../../common/dtype.h"

namespace pcmecl::host {
namespace {

// What a lane gives to the others.
struct Given {
  uint32_t a[4], b[2];
};

float factor(uint32_t both, bool second, Factors factors) {
  const uint16_t bits = uint16_t(second ? both >> 16 : both);
  if (factors == Factors::kHalf) {
    Half number;
    number.bits = bits;
    return number;
  }
  BFloat16 number;
  number.bits = bits;
  return number;
}

// Tensor cores cut off what a float cannot hold (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021).
float towards_zero(double exact) {
  const float nearest = float(exact);
  if (std::isinf(nearest)) return nearest;
  return std::fabs(double(nearest)) > std::fabs(exact) ? std::nextafter(nearest, 0.0f) : nearest;
}

}  // namespace

void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Factors factors) {
  Given own;
  std::memcpy(own.a, a, sizeof(a));
  std::memcpy(own.b, b, sizeof(b));
  const Given* lanes = exchange(own, __builtin_return_address(0));
  const int group = lane() / 4, pair = lane() % 4;
  float sums[4];
  for (int at = 0; at < 4; ++at) {
    const int half = at / 2, column = 2 * pair + at % 2;
    double sum = c[at];
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2;
      const Given &left = lanes[group * 4 + holder], &right = lanes[column * 4 + holder];
      sum += double(factor(left.a[k / 8 * 2 + half], k % 2, factors)) * factor(right.b[k / 8], k % 2, factors);
    }
    sums[at] = towards_zero(sum);
  }
  std::memcpy(c, sums, sizeof(sums));
}

}  // namespace pcmecl::host
