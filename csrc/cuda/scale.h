#pragma once

#include "kernels.h"
#include "warp.h"

namespace pcmecl::cuda {

__device__ __forceinline__ float value_of(const Scale& scale) {
  return scale.on_device ? *scale.on_device : scale.number;
}

}  // namespace pcmecl::cuda
