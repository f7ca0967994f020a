// Which instruction set's kernels run.
#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace pcmecl::cpu {
namespace {

const Kernels& fastest() {
#ifdef PCMECL_X86
  const char* requested = std::getenv("PCMECL_CPU");
  if (requested && std::strcmp(requested, "portable") == 0) return portable_kernels();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && !(requested && std::strcmp(requested, "avx2") == 0)) return avx512_kernels();
  if (avx2) return avx2_kernels();
#endif
  return portable_kernels();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = fastest();
  return chosen;
}

}  // namespace pcmecl::cpu
