// The kernels of one instruction set. The including file defines PCMECL_NAMESPACE and PCMECL_VECTOR_BYTES and has turned
// the instruction set on for what follows; the standard headers came before, so that nothing of theirs is compiled twice.

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
