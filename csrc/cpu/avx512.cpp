// AVX-512, turned on for this file's kernels alone: the rest of the extension runs on any x86-64.
#include "standard.h"

#ifdef PCMECL_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define PCMECL_NAMESPACE avx512
#define PCMECL_VECTOR_BYTES 64
#define PCMECL_GATHER 1
#include "instruction_set.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const pcmecl::cpu::Kernels& pcmecl::cpu::avx512_kernels() {
  static const Kernels kernels = avx512::table("avx512");
  return kernels;
}
#endif
