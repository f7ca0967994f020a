#pragma once

#include "kernels.h"
#include "warp.h"

namespace pcmecl::cuda {

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

__device__ __forceinline__ float value_of(const Scale& scale) {
  return scale.on_device ? *scale.on_device : scale.number;
}

// K of correlation_loss's sums of 2^(l − K) (correlation.cu).
__device__ __forceinline__ float offset(float scale) { return fmaxf(0.0f, ceilf(scale * kLog2e) - 100); }

}  // namespace pcmecl::cuda
