// The kernels of one instruction set. The including file defines PCMECL_NAMESPACE, PCMECL_VECTOR_BYTES and, where the
// set is not the compiler's baseline, PCMECL_TARGET, which is turned on for what follows; the standard headers came
// before, so that nothing of theirs is compiled twice.

#define PCMECL_PRAGMA_OF(...) _Pragma(#__VA_ARGS__)
#define PCMECL_PRAGMA(...) PCMECL_PRAGMA_OF(__VA_ARGS__)
#ifdef PCMECL_TARGET
#if defined(__clang__)
PCMECL_PRAGMA(clang attribute push(__attribute__((target(PCMECL_TARGET))), apply_to = function))
#else
_Pragma("GCC push_options") PCMECL_PRAGMA(GCC target(PCMECL_TARGET))
#endif
#endif

namespace pcmecl::cpu::PCMECL_NAMESPACE {
namespace {

#include "simd.h"

#include "correlation_kernels.h"
#include "direction_kernels.h"
#include "frames_kernels.h"

template <typename T>
DirectionKernels<T> direction_kernels() {
  return {direction_forward<T>, direction_backward<T>, direction_bank<T>};
}

template <typename C>
CorrelationKernels<C> correlation_kernels() {
  return {
      kLanes<C>,
      correlation_centre<C>,
      correlation_pack<C>,
      correlation_forward<C>,
      correlation_backward<C>,
      correlation_finish<C>,
      correlation_finish_visual<C>,
      correlation_forward_within<C>,
      correlation_backward_within<C>,
  };
}

Kernels table(const char* name) {
  return {
      name,
      direction_kernels<float>(),
      direction_kernels<double>(),
      direction_kernels<BFloat16>(),
      correlation_kernels<float>(),
      correlation_kernels<double>(),
      {frames_resize<float>},
      {frames_resize<double>},
      {frames_resize<BFloat16>},
  };
}

}  // namespace
}  // namespace pcmecl::cpu::PCMECL_NAMESPACE

#ifdef PCMECL_TARGET
#if defined(__clang__)
_Pragma("clang attribute pop")
#else
_Pragma("GCC pop_options")
#endif
#endif
