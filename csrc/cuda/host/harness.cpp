#include "harness.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

namespace pcmecl::host {
namespace {

constexpr size_t kCanary = 64;
constexpr unsigned char kPoison = 0xFF;  // floats of these bytes are NaN

// What every GPU since sm_80 can launch.
constexpr unsigned kMaxGridX = 0x7FFFFFFF, kMaxGridYZ = 65535, kMaxThreads = 1024;
constexpr size_t kMaxShared = 99 << 10, kMaxArguments = 4096;

void check_limits(const Launch& launch) {
  const auto at_most = [](size_t value, size_t limit, const char* of_what) {
    if (value > limit)
      fail("launch limit: " + std::to_string(value) + " " + of_what + ", at most " + std::to_string(limit));
  };
  at_most(launch.grid.x, kMaxGridX, "blocks in x");
  at_most(launch.grid.y, kMaxGridYZ, "blocks in y");
  at_most(launch.grid.z, kMaxGridYZ, "blocks in z");
  at_most(launch.block.x, kMaxThreads, "threads in a block");
  at_most(launch.shared, kMaxShared, "bytes of shared memory");
  at_most(launch.arguments, kMaxArguments, "bytes of arguments");
  if (launch.block.x % kWarp != 0 || launch.block.y != 1 || launch.block.z != 1)
    fail("launch limit: the harness takes blocks of whole warps in x");
}

const char* environment(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? value : otherwise;
}

// In which order blocks run, and the threads of one between two barriers.
class Order {
 public:
  explicit Order(const std::string& named = "up")
      : name_(named), random_(named == "up" || named == "down" ? 0 : std::stoul(named)) {}

  template <typename Items>
  void arrange(Items& items) {
    std::iota(items.begin(), items.end(), 0);
    if (name_ == "up") return;
    if (name_ == "down")
      std::reverse(items.begin(), items.end());
    else
      std::shuffle(items.begin(), items.end(), random_);
  }

  std::string name() const { return name_; }

 private:
  std::string name_;
  std::mt19937 random_;
};

struct Barrier {
  int size = 0, arrived = 0;
  uint64_t generation = 0;
};

// Lanes of a warp that wait for each other: those of `mask`.
struct Meeting {
  Barrier barrier;
  unsigned arrived = 0;
  const void* site = nullptr;                          // of the shuffle; null for __syncwarp, whose sites may differ
  alignas(16) unsigned char given[2][kWarp * kGiven];  // now and before, which some lanes may not have read yet
};

using Warp = std::map<unsigned, Meeting>;  // by mask; lanes that have parted may meet with masks of their own

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[kStack]};
  const Barrier* waits_at = nullptr;
  uint64_t generation = 0;
  bool started = false, done = false;

  bool blocked() const { return waits_at && waits_at->generation == generation; }
};

std::string lines_of(const void* site) {
  if (!site) return "__syncwarp";
  return observer ? observer->lines_of(site) : "a shuffle";
}

std::string lanes_of(unsigned mask) {
  std::string lanes;
  for (int lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1) lanes += (lanes.empty() ? "" : ", ") + std::to_string(lane);
  return lanes;
}

class Grid {
 public:
  void run(const Launch& launch, const Kernel& kernel) {
    const std::lock_guard<std::mutex> one_at_a_time(launching_);
    order_ = Order(environment("PCMECL_HOST_ORDER", "up"));
    check_limits(launch);
    kernel_ = &kernel;
    exp2_seed_ = std::strtoul(environment("PCMECL_HOST_EXP2", "0"), nullptr, 10);
    turns_.resize(launch.block.x);
    while (fibers_.size() < turns_.size()) fibers_.push_back(std::make_unique<Fiber>());
    gridDim = launch.grid, blockDim = launch.block;
    if (observer) observer->launch_begins();
    std::vector<uint64_t> blocks(uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z);
    order_.arrange(blocks);
    for (const uint64_t block : blocks) {
      const uint64_t row = block / launch.grid.x;
      blockIdx = {unsigned(block % launch.grid.x), unsigned(row % launch.grid.y), unsigned(row / launch.grid.y)};
      run_block(launch.shared);
    }
  }

  void wait_for_block() {
    if (wait(all_) && observer) observer->block_met();
  }

  void wait_for_warp(unsigned mask) {
    Meeting& meeting = meet(mask, nullptr);
    if (!wait(meeting.barrier)) return;
    meeting.arrived = 0;
    if (observer && mask == ~0u) observer->warp_met();  // fewer lanes order nothing: no kernel relies on it
  }

  uint64_t shuffle(unsigned mask, uint64_t value, int from, const void* site) {
    Meeting& meeting = meet(mask, site);
    if (!(mask >> (from % kWarp) & 1))
      fail(
          "shuffle mask: lane " + std::to_string(lane()) + " reads lane " + std::to_string(from % kWarp) +
          ", which the mask does not name, at " + lines_of(site));
    return static_cast<const uint64_t*>(give(meeting, &value, sizeof(value)))[from % kWarp];
  }

  const void* exchange(const void* given, size_t bytes, const void* site) {
    return give(meet(~0u, site), given, bytes);
  }

  float exp2(float x) const {
    const float exact = std::exp2(x);
    if (exact < std::numeric_limits<float>::min()) return 0;
    if (exp2_seed_ == 0 || x == 0) return exact;
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const uint32_t drawn = (bits ^ exp2_seed_) * 0x9E3779B1u;
    // At most 3/4 of the bound, rounding included all of it.
    return float(double(exact) * (1 + (double(drawn) / 0x7FFFFFFF - 1) * 0x0.Cp-22));
  }

  [[noreturn]] void fail(const std::string& report) {
    failure_ = "host harness: " + report + " [PCMECL_HOST_ORDER=" + order_.name() + "]";
    if (running_stack) _longjmp(scheduler_, 1);
    throw_failure();
  }

  void* shared() { return shared_.data(); }
  int lane() const { return running_ % kWarp; }

 private:
  void run_block(size_t shared) {
    shared_.assign(shared + kCanary, kPoison);
    if (observer) observer->block_begins(shared_.data(), shared);
    const int threads = int(turns_.size());
    all_ = Barrier{threads};
    warps_.assign(threads / kWarp, {});
    for (int i = 0; i < threads; ++i) {
      fibers_[i]->waits_at = nullptr;
      fibers_[i]->started = fibers_[i]->done = false;
    }
    for (int left = threads; left > 0;) {
      bool moved = false;
      order_.arrange(turns_);
      for (const int i : turns_) {
        if (fibers_[i]->done || fibers_[i]->blocked()) continue;
        resume(i);
        moved = true;
        left -= fibers_[i]->done;
      }
      if (!moved) fail("never arrive: " + who_never_arrives());
    }
    for (size_t i = shared; i < shared_.size(); ++i)
      if (shared_[i] != kPoison) fail("access outside: a write behind the end of shared memory");
  }

  std::string who_never_arrives() const {
    for (size_t warp = 0; warp < warps_.size(); ++warp)
      for (const auto& [mask, meeting] : warps_[warp])
        if (meeting.arrived)
          return "lanes " + lanes_of(mask & ~meeting.arrived) + " of warp " + std::to_string(warp) + " at " +
                 lines_of(meeting.site);
    return std::to_string(all_.size - all_.arrived) + " threads at __syncthreads";
  }

  void resume(int i) {
    Fiber& fiber = *fibers_[i];
    running_ = i;
    threadIdx = {unsigned(i), 0, 0};
    running_stack = fiber.stack.get();
    if (_setjmp(scheduler_) != 0) {
      running_stack = nullptr;
      if (!failure_.empty()) throw_failure();
      return;
    }
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &Grid::enter, 0);
    setcontext(&fiber.start);
  }

  static void enter();

  [[noreturn]] void throw_failure() {
    const std::string report = std::move(failure_);
    failure_.clear();
    throw std::runtime_error(report);
  }

  // Whether this thread was the last, and has not waited.
  bool wait(Barrier& barrier) {
    if (++barrier.arrived == barrier.size) {
      barrier.arrived = 0;
      ++barrier.generation;
      return true;
    }
    Fiber& fiber = *fibers_[running_];
    fiber.waits_at = &barrier;
    fiber.generation = barrier.generation;
    if (_setjmp(fiber.resume) == 0) _longjmp(scheduler_, 1);
    return false;
  }

  const void* give(Meeting& meeting, const void* given, size_t bytes) {
    unsigned char* const of_all = meeting.given[meeting.barrier.generation % 2];
    std::memcpy(of_all + lane() * bytes, given, bytes);
    if (wait(meeting.barrier)) meeting.arrived = 0;
    return of_all;
  }

  Meeting& meet(unsigned mask, const void* site) {
    const unsigned own = 1u << lane();
    const auto here = [&] { return "lane " + std::to_string(lane()) + " at " + lines_of(site); };
    if (!(mask & own)) fail("shuffle mask: " + here() + " is not in its own mask");
    Warp& warp = warps_[running_ / kWarp];
    for (const auto& [other, meeting] : warp)
      if (other != mask && (meeting.arrived & mask))
        fail("shuffle mask: " + here() + " names lanes that wait with another mask");
    Meeting& meeting = warp[mask];
    meeting.barrier.size = __builtin_popcount(mask);
    if (meeting.arrived == 0) meeting.site = site;
    if (!is_same_site(meeting.site, site))
      fail("shuffle sites: " + here() + ", but lanes " + lanes_of(meeting.arrived) + " at " + lines_of(meeting.site));
    meeting.arrived |= own;
    return meeting;
  }

  // The compiler may have made two copies of one place in the source.
  bool is_same_site(const void* a, const void* b) {
    if (a == b || !a || !b || !observer) return !a == !b;
    const auto pair = std::minmax(a, b);
    const auto known = same_sites_.find(pair);
    if (known != same_sites_.end()) return known->second;
    return same_sites_[pair] = observer->lines_of(a) == observer->lines_of(b);
  }

  std::mutex launching_;
  const Kernel* kernel_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<int> turns_;
  std::vector<Warp> warps_;
  std::vector<unsigned char> shared_;
  std::map<std::pair<const void*, const void*>, bool> same_sites_;
  Barrier all_;
  Order order_;
  std::string failure_;
  jmp_buf scheduler_;
  uint32_t exp2_seed_ = 0;
  int running_ = 0;
};

Grid& grid() {
  static Grid grid;
  return grid;
}

void Grid::enter() {
  Grid& here = grid();
  here.kernel_->call(here.kernel_->bound);
  here.fibers_[here.running_]->done = true;
  _longjmp(here.scheduler_, 1);
}

}  // namespace

void run(const Launch& launch, const Kernel& kernel) { grid().run(launch, kernel); }
void* shared_memory() { return grid().shared(); }
int lane() { return grid().lane(); }
float exp2_approximate(float x) { return grid().exp2(x); }
void* allocate(size_t bytes) { return observer ? observer->allocate(bytes) : std::malloc(bytes); }
void wait_for_block() { grid().wait_for_block(); }
void wait_for_warp(unsigned mask) { grid().wait_for_warp(mask); }
uint64_t shuffle(unsigned mask, uint64_t value, int from) {
  return grid().shuffle(mask, value, from, __builtin_return_address(0));
}
const void* exchange(const void* given, size_t bytes, const void* site) { return grid().exchange(given, bytes, site); }
void announce_atomic(void* address, size_t bytes, const void* site) {
  if (observer) observer->atomic(address, bytes, site);
}
void fail(const std::string& report) { grid().fail(report); }

}  // namespace pcmecl::host
