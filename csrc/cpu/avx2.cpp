// AVX2, turned on for this file's kernels alone: the rest of the extension runs on any x86-64.
#include "standard.h"

#ifdef PCMECL_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define PCMECL_NAMESPACE avx2
#define PCMECL_VECTOR_BYTES 32
#define PCMECL_GATHER 1
#include "instruction_set.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const pcmecl::cpu::Kernels& pcmecl::cpu::avx2_kernels() {
  static const Kernels kernels = avx2::table("avx2");
  return kernels;
}
#endif
