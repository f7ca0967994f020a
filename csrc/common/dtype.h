// The types of tensors' numbers, as Python names them to kernels (pcmecl_fast/ops/backends/native.py), and the two of
// 16 bits, which are stored alone: everything is computed in float or double.
//
// Conversions round to the nearest, ties to even; NaN, infinities and subnormal numbers stay what they are. On a GPU
// they are its own instructions.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "host_device.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace pcmecl {

enum Dtype : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

PCMECL_HD float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

PCMECL_HD uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// 5 bits of exponent, 10 of mantissa.
struct alignas(2) Half {
  uint16_t bits;

  Half() = default;

  PCMECL_HD Half(float value) {  // NOLINT: a conversion
#ifdef __CUDA_ARCH__
    bits = __half_as_ushort(__float2half(value));
#else
    const uint32_t all = bits_of(value), size = all & 0x7FFFFFFF;
    uint32_t rounded;
    if (size > 0x7F800000)  // NaN
      rounded = 0x7E00;
    else if (size >= 0x477FF000)  // halfway between the largest number and the next, or more
      rounded = 0x7C00;
    else if (size < 0x38800000)  // subnormal, of units of 2^-24, which is what 0.5 ends with
      rounded = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
    else
      rounded = (size + 0xFFF + (size >> 13 & 1) - (112u << 23)) >> 13;
    bits = uint16_t((all >> 16 & 0x8000) | rounded);
#endif
  }

  PCMECL_HD operator float() const {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t size = bits & 0x7FFF, sign = uint32_t(bits & 0x8000) << 16;
    if (size < 0x400) return float_of(bits_of(float(size) * 0x1p-24f) | sign);
    return float_of(sign | (size >= 0x7C00 ? 0x7F800000 | size << 13 : (size << 13) + (112u << 23)));
#endif
  }
};

// The upper half of a float.
struct alignas(2) BFloat16 {
  uint16_t bits;

  BFloat16() = default;

  PCMECL_HD BFloat16(float value) {  // NOLINT: a conversion
#ifdef __CUDA_ARCH__
    bits = __bfloat16_as_ushort(__float2bfloat16(value));
#else
    const uint32_t all = bits_of(value);
    bits = (all & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : uint16_t((all + 0x7FFF + (all >> 16 & 1)) >> 16);
#endif
  }

  PCMECL_HD operator float() const {
#ifdef __CUDA_ARCH__
    return __bfloat162float(__ushort_as_bfloat16(bits));
#else
    return float_of(uint32_t(bits) << 16);
#endif
  }
};

// f(value of the type), of the three that a GPU's kernels take.
template <typename F>
void for_dtype(int dtype, F&& f) {
  switch (dtype) {
    case kFloat32: return f(float());
    case kFloat16: return f(Half());
    case kBFloat16: return f(BFloat16());
    default: throw std::invalid_argument("takes float32, float16 or bfloat16");
  }
}

}  // namespace pcmecl
