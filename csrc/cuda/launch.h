// How a kernel is started, and what its threads share: on a GPU, or by the host harness that tests the same source.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "on.h"

#ifdef PCMECL_ON_HOST
#include "host/harness.h"
#endif

namespace pcmecl::cuda {

#ifdef PCMECL_ON_HOST

template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, A... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const host::Launch launch = {grid, {unsigned(threads), 1, 1}, shared, host::argument_bytes<P...>()};
  const auto bound = [&]() __attribute__((no_sanitize("thread"))) { kernel(arguments...); };
  host::run(launch, host::Kernel(bound));
}

__device__ inline char* shared_memory() { return static_cast<char*>(host::shared_memory()); }

__device__ inline float exp2_fast(float x) { return host::exp2_approximate(x); }

__device__ inline float log2_fast(float x) { return std::log2(x); }

__device__ inline float rounded_product(float x, float y) {
  volatile float product = x * y;
  return product;
}

__device__ inline float capped(float x, float most) { return x > most ? most : x; }

#else

// On the stream of the `On` that lives, without waiting.
template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, A... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > (48 << 10))  // more has to be requested
    check(cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  kernel<<<grid, threads, shared, On::stream()>>>(arguments...);
  check(cudaGetLastError());
}

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char pcmecl_shared[];
  return pcmecl_shared;
}

// One instruction, right to 2^-22; results below the least normal number become 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// One instruction, right to 2^-22 for numbers from 1/2 to 2.
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Rounded, and never fused into what is added to it.
__device__ __forceinline__ float rounded_product(float x, float y) { return __fmul_rn(x, y); }

// The smaller one; NaN stays.
__device__ __forceinline__ float capped(float x, float most) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(most));
  return y;
}

#endif

inline unsigned blocks(int64_t items, int64_t per_block) { return unsigned((items + per_block - 1) / per_block); }

}  // namespace pcmecl::cuda
