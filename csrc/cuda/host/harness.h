// A grid of CUDA blocks on the CPU, for tests: kernels are compiled by the C++ compiler from the very same source.
//
// The threads of a block are fibers of one processor thread. A fiber runs until its next barrier (__syncthreads,
// __syncwarp, a shuffle), then the next one does; blocks run one after another. Shared memory is filled with NaN before
// each block. Exceptions: a write past the shared memory, threads that never arrive at a barrier, shuffles with lanes
// or masks that do not match, and launches beyond a GPU's limits. Read from the environment at each launch:
//
//   PCMECL_HOST_ORDER   up (default), down, or a number that seeds a random order of blocks and of threads: a kernel
//                       that lacks a barrier gives different results
//   PCMECL_HOST_EXP2    a number that seeds errors of exp2, as large as a GPU's may be
//
// shadow.cpp, where it is linked, watches every access to memory. What remains unseen: speed, and how a GPU rounds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace pcmecl::host {

constexpr int kWarp = 32;
constexpr size_t kGiven = 32;  // bytes that a lane can give to others at once
constexpr size_t kStack = 128 << 10;

inline dim3 coordinates[4];
inline char* running_stack = nullptr;  // kStack bytes, of the fiber that runs; null outside kernels

struct Launch {
  dim3 grid, block;
  size_t shared, arguments;  // bytes
};

// A kernel with its arguments. They lie outside what kernels may access: neither function here is watched.
struct Kernel {
  const void* bound;
  void (*call)(const void* bound);

  template <typename F>
  explicit Kernel(const F& f)
      : bound(&f), call([](const void* f) __attribute__((no_sanitize("thread"))) { (*static_cast<const F*>(f))(); }) {}
};

void run(const Launch& launch, const Kernel& kernel);
void* shared_memory();
int lane();
float exp2_approximate(float x);
void* allocate(size_t bytes);  // a table that is kept, whose bounds whoever watches knows

void wait_for_block();
void wait_for_warp(unsigned mask);
uint64_t shuffle(unsigned mask, uint64_t value, int from);
// What every lane of the warp gives, a place after the other, until the next two times that they meet.
const void* exchange(const void* given, size_t bytes, const void* site);
void announce_atomic(void* address, size_t bytes, const void* site);

// By lane.
template <typename V>
const V* exchange(const V& given, const void* site) {
  static_assert(sizeof(V) <= kGiven);
  return static_cast<const V*>(exchange(&given, sizeof(V), site));
}

// Ends the launch with an exception.
[[noreturn]] void fail(const std::string& report);

// What watches a launch. A site is an address in a kernel's code.
class Observer {
 public:
  virtual void launch_begins() = 0;
  virtual void block_begins(void* shared, size_t bytes) = 0;
  virtual void block_met() = 0;  // at __syncthreads
  virtual void warp_met() = 0;   // the running thread's warp, at __syncwarp
  virtual void atomic(void* address, size_t bytes, const void* site) = 0;
  virtual std::string lines_of(const void* site) = 0;  // of the source
  virtual void* allocate(size_t bytes) = 0;

 protected:
  ~Observer() = default;
};

inline Observer* observer = nullptr;

// The bytes that a kernel's arguments take.
template <typename... P>
constexpr size_t argument_bytes() {
  size_t bytes = 0;
  ((bytes = (bytes + alignof(P) - 1) / alignof(P) * alignof(P) + sizeof(P)), ...);
  return bytes;
}

}  // namespace pcmecl::host

inline dim3 &threadIdx = pcmecl::host::coordinates[0], &blockIdx = pcmecl::host::coordinates[1],
            &blockDim = pcmecl::host::coordinates[2], &gridDim = pcmecl::host::coordinates[3];

// Inlined into the kernel, so that the harness returns to the place that it names in a report.
#define PCMECL_INTO_KERNEL inline __attribute__((always_inline))

PCMECL_INTO_KERNEL void __syncthreads() { pcmecl::host::wait_for_block(); }

PCMECL_INTO_KERNEL void __syncwarp(unsigned mask = 0xFFFFFFFFu) { pcmecl::host::wait_for_warp(mask); }

template <typename V>
PCMECL_INTO_KERNEL V __shfl_sync(unsigned mask, V value, int from) {
  static_assert(sizeof(V) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  bits = pcmecl::host::shuffle(mask, bits, from);
  std::memcpy(&value, &bits, sizeof(V));
  return value;
}

template <typename V>
PCMECL_INTO_KERNEL V __shfl_xor_sync(unsigned mask, V value, int other) {
  return __shfl_sync(mask, value, pcmecl::host::lane() ^ other);
}

#undef PCMECL_INTO_KERNEL

// A function of its own, whose accesses are not watched as ordinary ones.
template <typename V>
__attribute__((noinline, no_sanitize("thread"))) V atomicAdd(V* to, V value) {
  pcmecl::host::announce_atomic(to, sizeof(V), __builtin_return_address(0));
  const V before = *to;
  *to += value;
  return before;
}
