// A grid of CUDA blocks on the CPU, for tests: kernels are compiled by the C++ compiler from the very same source.
//
// The threads of a block are fibers of one processor thread. A fiber runs until its next barrier (__syncthreads,
// __syncwarp, a shuffle), then the next one does, in ascending or descending order (PCMECL_HOST_ORDER=up|down, read at
// each launch): a kernel that lacks a barrier gives two different results. Shared memory is filled with NaN before each
// block, and writing past it, or a barrier that some threads never reach, is an exception. Blocks run one after
// another. What it cannot show: speed, memory ordering between blocks, and how a GPU rounds.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace pcmecl::host {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10, kCanary = 64;
constexpr unsigned char kPoison = 0xFF;  // floats of these bytes are NaN

struct Barrier {
  int size = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[kWarp];
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Barrier* waits_at = nullptr;
  uint64_t generation = 0;
  bool started = false, done = false;

  bool blocked() const { return waits_at && waits_at->generation == generation; }
};

class Block {
 public:
  static Block& current() {
    static Block block;
    return block;
  }

  void launch(dim3 grid, dim3 threads, size_t shared, std::function<void()> kernel) {
    const std::lock_guard<std::mutex> one_at_a_time(launching_);
    count_ = int(threads.x);
    if (count_ % kWarp != 0 || threads.y != 1 || threads.z != 1 || count_ > 1024)
      throw std::invalid_argument("harness: a block has whole warps in x, at most 1024 threads");
    kernel_ = std::move(kernel);
    const char* order = std::getenv("PCMECL_HOST_ORDER");
    descending_ = order && std::string(order) == "down";
    while (int(fibers_.size()) < count_) fibers_.push_back(std::make_unique<Fiber>());
    gridDim = grid, blockDim = threads;
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = {x, y, z};
          run(shared);
        }
  }

  void wait(Barrier& barrier) {
    if (++barrier.arrived == barrier.size) {
      barrier.arrived = 0;
      ++barrier.generation;
      return;
    }
    Fiber& fiber = *fibers_[running_];
    fiber.waits_at = &barrier;
    fiber.generation = barrier.generation;
    if (_setjmp(fiber.resume) == 0) _longjmp(scheduler_, 1);
  }

  template <typename V>
  V shuffle(V value, int from) {
    static_assert(sizeof(V) <= 8);
    Warp& warp = warps_[running_ / kWarp];
    std::memcpy(&warp.slots[running_ % kWarp], &value, sizeof(V));
    wait(warp.barrier);
    std::memcpy(&value, &warp.slots[from % kWarp], sizeof(V));
    wait(warp.barrier);
    return value;
  }

  void wait_for_warp() { wait(warps_[running_ / kWarp].barrier); }
  void wait_for_block() { wait(all_); }
  int lane() const { return running_ % kWarp; }
  void* shared() { return shared_.data(); }

 private:
  void run(size_t shared) {
    shared_.assign(shared + kCanary, kPoison);
    all_ = Barrier{count_};
    warps_.assign(count_ / kWarp, Warp{Barrier{kWarp}, {}});
    for (int i = 0; i < count_; ++i) {
      fibers_[i]->waits_at = nullptr;
      fibers_[i]->started = fibers_[i]->done = false;
    }
    for (int left = count_; left > 0;) {
      const int before = left;
      bool moved = false;
      for (int k = 0; k < count_; ++k) {
        const int i = descending_ ? count_ - 1 - k : k;
        if (fibers_[i]->done || fibers_[i]->blocked()) continue;
        resume(i);
        moved = true;
        left -= fibers_[i]->done;
      }
      if (!moved && left == before) throw std::runtime_error("harness: a barrier that some threads never reach");
    }
    for (size_t i = shared; i < shared_.size(); ++i)
      if (shared_[i] != kPoison) throw std::runtime_error("harness: a write past the shared memory");
  }

  void resume(int i) {
    Fiber& fiber = *fibers_[i];
    running_ = i;
    threadIdx = {unsigned(i), 0, 0};
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &Block::enter, 0);
    setcontext(&fiber.start);
  }

  static void enter() {
    Block& block = current();
    block.kernel_();
    block.fibers_[block.running_]->done = true;
    _longjmp(block.scheduler_, 1);
  }

  std::mutex launching_;
  std::function<void()> kernel_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  std::vector<unsigned char> shared_;
  Barrier all_;
  jmp_buf scheduler_;
  int count_ = 0, running_ = 0;
  bool descending_ = false;
};

}  // namespace pcmecl::host

inline void __syncthreads() { pcmecl::host::Block::current().wait_for_block(); }

inline void __syncwarp() { pcmecl::host::Block::current().wait_for_warp(); }

template <typename V>
V __shfl_sync(unsigned, V value, int from) {
  return pcmecl::host::Block::current().shuffle(value, from);
}

template <typename V>
V __shfl_xor_sync(unsigned, V value, int other) {
  pcmecl::host::Block& block = pcmecl::host::Block::current();
  return block.shuffle(value, block.lane() ^ other);
}

template <typename V>
V atomicAdd(V* to, V value) {
  const V before = *to;
  *to += value;
  return before;
}
