// What all kernels are made of: 16-byte loads and stores, and sums over the lanes of a warp.
#pragma once

#include <cmath>
#include <limits>

#include "../common/directions.h"
#include "../common/dtype.h"
#include "launch.h"

namespace pcmecl::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// V neighbours of storage type T, loaded and stored at once.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T values[V];
};

template <typename T>
constexpr int kVector = 16 / int(sizeof(T));

template <int V, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[V]) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = float(pack.values[v]);
}

template <int V, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.values[v] = T(from[v]);
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// Whether rows of `width` that begin here can be read 16 bytes at a time.
template <typename T>
bool aligned(int64_t width, const T* pointer) {
  return width % kVector<T> == 0 && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <typename T, typename... Rest>
bool aligned(int64_t width, const T* pointer, Rest... rest) {
  return aligned(width, pointer) && aligned(width, rest...);
}

__device__ __forceinline__ int lane_of_thread() { return int(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_of_thread() { return int(threadIdx.x) / kWarpSize; }

// The sum over groups of `lanes` neighbouring lanes (a power of 2), in every lane.
template <int lanes = kWarpSize>
__device__ __forceinline__ float sum_over(float value) {
#pragma unroll
  for (int other = lanes / 2; other > 0; other /= 2) value += __shfl_xor_sync(kAllLanes, value, other);
  return value;
}

__device__ __forceinline__ float max_over_warp(float value) {
#pragma unroll
  for (int other = kWarpSize / 2; other > 0; other /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, other));
  return value;
}

// Each number's sum over a block, in its first warp; `warps` is shared memory for 32 times as many.
template <int count>
__device__ __forceinline__ void sum_over_block(float (&values)[count], float* warps) {
#pragma unroll
  for (int at = 0; at < count; ++at) {
    values[at] = sum_over(values[at]);
    if (lane_of_thread() == 0) warps[at * kWarpSize + warp_of_thread()] = values[at];
  }
  __syncthreads();
  if (warp_of_thread() != 0) return;
#pragma unroll
  for (int at = 0; at < count; ++at)
    values[at] = sum_over(threadIdx.x < blockDim.x / kWarpSize ? warps[at * kWarpSize + threadIdx.x] : 0.0f);
}

__device__ __forceinline__ float from_lane(float value, int lane) { return __shfl_sync(kAllLanes, value, lane); }

}  // namespace pcmecl::cuda
