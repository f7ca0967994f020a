// Products of half types on tensor cores: mma.sync.m16n8k16 with sums in float32, of sm_80 and newer.
//
// A warp multiplies 16×16 numbers A by 16×8 numbers B. A lane of `group` = lane / 4 and `pair` = lane % 4 holds
//
//   a[0]  A[group][2·pair, +1]        a[2]  A[group][2·pair + 8, +9]       two neighbours to a register, the first
//   below a[1]  A[group + 8][2·pair, +1]    a[3]  A[group + 8][2·pair + 8, +9] b[0]  B[2·pair, +1][group]        b[1]
//   B[2·pair + 8, +9][group] c[0], c[1]  C[group][2·pair, +1]  c[2], c[3]  C[group + 8][2·pair, +1]
//
// as in the PTX manual, "Matrix Fragments for mma.m16n8k16". In which order the 16 terms of a sum are numbered, and the
// columns of a result, is the caller's choice: eight neighbours in memory can be a lane's own (`Eight`), so that rows
// are read and written 16 bytes at a time and nothing goes through shared memory.
#pragma once

#include <type_traits>

#include "../common/dtype.h"
#include "warp.h"

#ifdef PCMECL_ON_HOST
#include "host/tensor_cores.h"
#endif

namespace pcmecl::cuda {

__device__ __forceinline__ int group_of_lane() { return lane_of_thread() / 4; }
__device__ __forceinline__ int pair_of_lane() { return lane_of_thread() % 4; }

#ifdef PCMECL_ON_HOST

// c += A·B, in every lane of the warp at once.
template <typename T>
inline __attribute__((always_inline)) void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::multiply_add(c, a, b, std::is_same_v<T, Half> ? host::Factors::kHalf : host::Factors::kBFloat16);
}

// Two numbers rounded to T in one register, `first` in its lower half.
template <typename T>
inline uint32_t packed(float first, float second) {
  return uint32_t(T(first).bits) | uint32_t(T(second).bits) << 16;
}

#else

template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, Half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <typename T>
__device__ __forceinline__ uint32_t packed(float first, float second) {
  uint32_t both;
  if constexpr (std::is_same_v<T, Half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

#endif

// The number in a register's lower half, and in its upper one.
template <typename T>
__device__ __forceinline__ float lower(uint32_t both) {
  if constexpr (std::is_same_v<T, BFloat16>) return float_of(both << 16);
  Half number;
  number.bits = uint16_t(both);
  return number;
}
template <typename T>
__device__ __forceinline__ float upper(uint32_t both) {
  if constexpr (std::is_same_v<T, BFloat16>) return float_of(both & 0xFFFF0000);
#ifdef __CUDA_ARCH__
  return __high2float(reinterpret_cast<const __half2&>(both));
#else
  Half number;
  number.bits = uint16_t(both >> 16);
  return number;
#endif
}

// The lower halves of two registers, and the upper ones.
__device__ __forceinline__ uint32_t lower_halves(uint32_t first, uint32_t second) {
#ifdef __CUDA_ARCH__
  return __byte_perm(first, second, 0x5410);
#else
  return (first & 0xFFFF) | second << 16;
#endif
}
__device__ __forceinline__ uint32_t upper_halves(uint32_t first, uint32_t second) {
#ifdef __CUDA_ARCH__
  return __byte_perm(first, second, 0x7632);
#else
  return first >> 16 | (second & 0xFFFF0000);
#endif
}

// Numbers of float32 as the sum of two of T, in the layout of A: a product with both keeps 16 of their bits in bfloat16
// and 22 in float16.
template <typename T>
struct Split {
  uint32_t high[4], low[4];

  // Of two results C of eight columns each: these are the 16 terms of the next product.
  __device__ __forceinline__ explicit Split(const float (&from)[2][4]) {
#pragma unroll
    for (int at = 0; at < 4; ++at) {
      const float first = from[at / 2][at % 2 * 2], second = from[at / 2][at % 2 * 2 + 1];
      high[at] = packed<T>(first, second);
      low[at] = packed<T>(first - lower<T>(high[at]), second - upper<T>(high[at]));
    }
  }
};

// Eight neighbours of a row, two to a register.
struct alignas(16) Eight {
  uint32_t values[4];
};

// From feature `at` of a row on, and zeros behind its end. With V = 8 they are read at once.
template <int V, typename T>
__device__ __forceinline__ Eight load_eight(const T* row, int at, int width) {
  Eight eight = {};
  if constexpr (V == 8) {
    if (at < width) eight = *reinterpret_cast<const Eight*>(row + at);
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (at + k < width) eight.values[k / 2] |= uint32_t(row[at + k].bits) << (k % 2 * 16);
  }
  return eight;
}

// The same where it does not matter what lies behind the end: other features of the row.
template <int V, typename T>
__device__ __forceinline__ Eight load_any(const T* row, int at, int width) {
  if constexpr (V == 8) return *reinterpret_cast<const Eight*>(row + (at < width ? at : 0));
  return load_eight<V>(row, at, width);
}

template <int V, typename T>
__device__ __forceinline__ void store_eight(T* row, int at, int width, const float (&from)[8]) {
  if constexpr (V == 8) {
    Eight eight;
#pragma unroll
    for (int k = 0; k < 4; ++k) eight.values[k] = packed<T>(from[2 * k], from[2 * k + 1]);
    if (at < width) *reinterpret_cast<Eight*>(row + at) = eight;
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (at + k < width) row[at + k] = T(from[k]);
  }
}

}  // namespace pcmecl::cuda
