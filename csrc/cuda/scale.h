#pragma once

#include "kernels.h"
#include "warp.h"

namespace pcmecl::cuda {

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

__device__ __forceinline__ float value_of(const Scale& scale) {
  return scale.on_device ? *scale.on_device : scale.number;
}

}  // namespace pcmecl::cuda
