// Small tables in a device's memory that are made once and kept for good.
//
// They are not PyTorch's tensors: what its allocator hands out while a CUDA graph is captured, or warmed up by
// torch.compile, belongs to that graph and must not outlive the call.
#pragma once

#include <cstddef>

#ifdef PCMECL_ON_HOST
#include <c10/core/Allocator.h>

#include <cstring>
#else
#include <c10/cuda/CUDAException.h>
#include <cuda_runtime.h>
#endif

namespace pcmecl::cuda {

#ifdef PCMECL_ON_HOST

// Where the harness knows its bounds.
inline void* keep_on_device(const void* from, size_t bytes) {
  return std::memcpy(c10::GetAllocator(c10::DeviceType::CPU)->raw_allocate(bytes), from, bytes);
}

#else

// A copy of host memory on the current device, complete when this returns. While a stream is captured, too: the copy
// has a stream of its own, which no capture knows of, and the thread permits itself what captures forbid, as PyTorch's
// allocator does.
inline void* keep_on_device(const void* from, size_t bytes) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  C10_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
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
  C10_CUDA_CHECK(error);
  return to;
}

#endif

}  // namespace pcmecl::cuda
