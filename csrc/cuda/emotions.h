// Loops over emotions, unrolled where the compiler knows their number E; E = 0 serves any.
#pragma once

#include "warp.h"

namespace pcmecl::cuda {

template <int E, typename Step>
__device__ __forceinline__ void for_emotions(int emotions, Step&& step) {
  if constexpr (E != 0) {
#pragma unroll
    for (int e = 0; e < E; ++e) step(e);
  } else {
    for (int e = 0; e < emotions; ++e) step(e);
  }
}

// step(c, d, pair) for c < d.
template <int E, typename Step>
__device__ __forceinline__ void for_pairs(int emotions, Step&& step) {
  if constexpr (E != 0) {
#pragma unroll
    for (int c = 0; c < E; ++c)
#pragma unroll
      for (int d = c + 1; d < E; ++d) step(c, d, c * (2 * E - c - 1) / 2 + d - c - 1);
  } else {
    int pair = 0;
    for (int c = 0; c < emotions; ++c)
      for (int d = c + 1; d < emotions; ++d) step(c, d, pair++);
  }
}

}  // namespace pcmecl::cuda
