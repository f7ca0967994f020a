// AVX2, turned on for this file's kernels alone: the rest of the extension runs on any x86-64.
#include "standard.h"

#ifdef PCMECL_X86
#include <immintrin.h>

#define PCMECL_NAMESPACE avx2
#define PCMECL_TARGET "avx2,fma,f16c"
#define PCMECL_VECTOR_BYTES 32
#define PCMECL_GATHER 1
#include "instruction_set.h"

const pcmecl::cpu::Kernels& pcmecl::cpu::avx2_kernels() {
  static const Kernels kernels = avx2::table("avx2");
  return kernels;
}
#endif
