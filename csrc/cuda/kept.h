// Small tables in a device's memory that are made once and kept for good.
//
// They are not PyTorch's tensors: what its allocator hands out while a CUDA graph is captured, or warmed up by
// torch.compile, belongs to that graph and must not outlive the call.
#pragma once

#include <cstddef>
#include <cstring>

#include "on.h"

#ifdef PCMECL_ON_HOST
#include "host/harness.h"
#endif

namespace pcmecl::cuda {

#ifdef PCMECL_ON_HOST

inline void* keep_on_device(const void* from, size_t bytes) { return std::memcpy(host::allocate(bytes), from, bytes); }

#else

// A copy of host memory on the current device, complete when this returns. While a stream is captured, too: the copy
// has a stream of its own, which no capture knows of, and the thread permits itself what captures forbid, as PyTorch's
// allocator does.
inline void* keep_on_device(const void* from, size_t bytes) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode));
  void* to = nullptr;
  cudaStream_t stream = nullptr;
  const auto copy = [&] {
    if (const cudaError_t error = cudaMalloc(&to, bytes)) return error;
    if (const cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)) return error;
    if (const cudaError_t error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream)) return error;
    return cudaStreamSynchronize(stream);
  };
  const cudaError_t error = copy();
  if (stream != nullptr) cudaStreamDestroy(stream);
  cudaThreadExchangeStreamCaptureMode(&mode);
  check(error);
  return to;
}

#endif

}  // namespace pcmecl::cuda
