// AVX-512, turned on for this file's kernels alone: the rest of the extension runs on any x86-64.
#include "standard.h"

#ifdef PCMECL_X86
#include <immintrin.h>

#define PCMECL_NAMESPACE avx512
#define PCMECL_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define PCMECL_VECTOR_BYTES 64
#define PCMECL_GATHER 1
#include "instruction_set.h"

const pcmecl::cpu::Kernels& pcmecl::cpu::avx512_kernels() {
  static const Kernels kernels = avx512::table("avx512");
  return kernels;
}
#endif
