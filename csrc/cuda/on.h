// Where this thread launches: a device and its stream. Errors of CUDA's runtime are exceptions in its words.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifndef PCMECL_ON_HOST
#include <cuda_runtime.h>
#endif

namespace pcmecl::cuda {

#ifdef PCMECL_ON_HOST

class On {
 public:
  On(int, std::uintptr_t) {}
};

#else

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
}

// While it lives, this thread launches on a device's stream.
class On {
 public:
  On(int device, std::uintptr_t stream) : stream_before_(stream_) {
    check(cudaGetDevice(&device_before_));
    if (device != device_before_) check(cudaSetDevice(device));
    switched_ = device != device_before_;
    stream_ = reinterpret_cast<cudaStream_t>(stream);
  }
  ~On() {
    stream_ = stream_before_;
    if (switched_) cudaSetDevice(device_before_);
  }
  On(const On&) = delete;
  On& operator=(const On&) = delete;

  static cudaStream_t stream() { return stream_; }

 private:
  static inline thread_local cudaStream_t stream_ = nullptr;
  cudaStream_t stream_before_;
  int device_before_ = 0;
  bool switched_ = false;
};

#endif

}  // namespace pcmecl::cuda
