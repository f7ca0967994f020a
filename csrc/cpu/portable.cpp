// What the compiler's baseline has: SSE2 on x86-64, NEON on ARM.
#include "standard.h"

#define PCMECL_NAMESPACE portable
#define PCMECL_VECTOR_BYTES 16
#include "instruction_set.h"

const pcmecl::cpu::Kernels& pcmecl::cpu::portable_kernels() {
  static const Kernels kernels = portable::table("portable");
  return kernels;
}
