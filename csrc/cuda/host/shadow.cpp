// Watches every access to memory that a kernel makes under the host harness.
//
// Kernels are compiled with -fsanitize=thread, which calls a function before each access; those functions are here, and
// the sanitizer's own library is not linked. Beside every two bytes of shared memory, and of each tensor, a cell keeps
// who accessed them last. A report ends the launch. It is one of:
//
//   race within a warp        two lanes, one of them writing, and no __syncwarp between; a shuffle is no fence
//   race within a block       two warps, and no __syncthreads between
//   conflict between blocks   of one launch; atomic operations on the same numbers are none
//   misaligned access         n bytes at an address that n does not divide
//   access outside            all tensors that the operator was given or made, and the block's shared memory
//   uninitialised             a read of shared memory or of a tensor where nothing has been written
//
// Tensors are known from the functions at the end, which tests/cuda_on_host.py calls: between them every tensor is
// allocated here, filled with 0xFF, and far from the next one.
#include <c10/core/Allocator.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "harness.h"

namespace pcmecl::host {
namespace {

constexpr size_t kUnit = 2;  // bytes that share a cell: nothing narrower is written by a kernel
constexpr size_t kWord = 4;  // of a tensor: half a float of 0xFF may well have been written, by ATen unseen
constexpr size_t kMargin = 64 << 10;
constexpr unsigned char kPoison = 0xFF;

// A moment: epochs are numbered over all launches and begin with every block and every __syncthreads.
struct Access {
  uint32_t epoch = 0;
  uint32_t thread : 10 = 0;
  uint32_t meetings : 22 = 0;  // of the thread's warp in this epoch
  const void* site = nullptr;
};

struct Cell {
  Access write, atomic;
  Access reads[2];            // two that are not ordered, of two warps if there are
  uint32_t earlier_read = 0;  // the epoch of a read by a block before the last one that read
};

struct FreeCells {
  void operator()(Cell* cells) const { std::free(cells); }
};

struct Buffer {
  uintptr_t begin = 0;
  size_t bytes = 0;
  std::string name;
  std::unique_ptr<Cell, FreeCells> cells;  // zeros, which the system makes as they are touched

  Buffer() = default;
  Buffer(void* begin, size_t bytes, std::string name)
      : begin(uintptr_t(begin)), bytes(bytes), name(std::move(name)),
        cells(static_cast<Cell*>(std::calloc(bytes / kUnit + 2, sizeof(Cell)))) {}

  bool holds(uintptr_t address) const { return address - begin < bytes; }
  Cell* cell(uintptr_t address) const { return cells.get() + (address / kUnit - begin / kUnit); }
};

enum class Kind { read, write, atomic };

const char* name_of(Kind kind) {
  return kind == Kind::read ? "a read" : kind == Kind::write ? "a write" : "an atomic operation";
}

class Shadow final : public Observer {
 public:
  Shadow() { observer = this; }

  void launch_begins() override { launch_epoch_ = ++epoch_; }

  void block_begins(void* shared, size_t bytes) override {
    if (bytes > shared_.bytes || uintptr_t(shared) != shared_.begin) shared_ = Buffer(shared, bytes, "shared memory");
    shared_.bytes = bytes;
    block_epoch_ = epoch_ + 1;
    begin_epoch();
  }

  void block_met() override { begin_epoch(); }
  void warp_met() override { ++meetings_[threadIdx.x / kWarp]; }

  void atomic(void* address, size_t bytes, const void* site) override {
    access(uintptr_t(address), bytes, Kind::atomic, site, bytes);
  }

  // Where the place lies in the source, with the places that it is inlined into.
  std::string lines_of(const void* site) override;

  void access(uintptr_t address, size_t bytes, Kind kind, const void* site, size_t alignment) {
    if (!running_stack || address - uintptr_t(running_stack) < kStack) return;
    if (address - uintptr_t(coordinates) < sizeof(coordinates)) return;
    const std::lock_guard<std::mutex> lock(buffers_lock_);
    const Buffer* buffer = shared_.holds(address) ? &shared_ : tensor_at(address);
    if (!buffer || !buffer->holds(address + bytes - 1)) report_outside(address, bytes, kind, site);
    const Place place = {*buffer, address, bytes, kind, site};
    if (address % alignment != 0) report("misaligned access", place, "");
    if (kind != Kind::write) require_initialised(place);
    const Access now = {epoch_, uint32_t(threadIdx.x), meetings_[threadIdx.x / kWarp], site};
    for (Cell *cell = buffer->cell(address), *end = buffer->cell(address + bytes - 1) + 1; cell != end; ++cell)
      note(*cell, now, place);
  }

  void* allocate(size_t bytes) override {
    if (bytes == 0) return nullptr;
    const std::lock_guard<std::mutex> lock(buffers_lock_);
    char* const block = static_cast<char*>(std::aligned_alloc(64, (bytes + 2 * kMargin + 127) / 64 * 64));
    char* const begin = block + kMargin + next_residue_;
    std::memset(begin, kPoison, bytes);
    const std::string name = next_name_.empty() ? "buffer " + std::to_string(++count_) : next_name_;
    buffers_[uintptr_t(begin)] = {Buffer(begin, bytes, name), block};
    next_residue_ = 0, next_name_.clear();
    return begin;
  }

  void release(void* begin) {
    const std::lock_guard<std::mutex> lock(buffers_lock_);
    const auto found = buffers_.find(uintptr_t(begin));
    std::free(found->second.block);
    buffers_.erase(found);
    recent_ = nullptr;
  }

  void name_next(const char* name, size_t residue) {
    const std::lock_guard<std::mutex> lock(buffers_lock_);
    next_name_ = name, next_residue_ = residue, count_ = 0;
  }

 private:
  struct Place {
    const Buffer& buffer;
    uintptr_t address;
    size_t bytes;
    Kind kind;
    const void* site;
  };

  struct Tensor {
    Buffer buffer;
    char* block;
  };

  void begin_epoch() {
    ++epoch_;
    std::fill(std::begin(meetings_), std::end(meetings_), 0);
  }

  const Buffer* tensor_at(uintptr_t address) {
    if (recent_ && recent_->holds(address)) return recent_;
    const auto after = buffers_.upper_bound(address);
    if (after == buffers_.begin()) return nullptr;
    const Buffer& buffer = std::prev(after)->second.buffer;
    return buffer.holds(address) ? recent_ = &buffer : nullptr;
  }

  void require_initialised(const Place& place) {
    const bool in_shared = &place.buffer == &shared_;
    const size_t step = std::min(place.bytes, in_shared ? kUnit : kWord);
    for (uintptr_t at = place.address; at < place.address + place.bytes; at += step) {
      const Cell* cell = place.buffer.cell(at);
      const bool written = in_shared ? std::max(cell->write.epoch, cell->atomic.epoch) >= block_epoch_
                                     : cell->write.epoch || !is_poison(at, step);
      if (!written) report("uninitialised", place, ", where nothing has been written");
    }
  }

  static bool is_poison(uintptr_t begin, size_t bytes) {
    const auto* at = reinterpret_cast<const unsigned char*>(begin);
    return std::all_of(at, at + bytes, [](unsigned char byte) { return byte == kPoison; });
  }

  // Remembers the access, and reports one before it that it should have waited for.
  void note(Cell& cell, const Access& now, const Place& place) {
    require_ordered(cell.write, "a write", place);
    if (place.kind != Kind::atomic) require_ordered(cell.atomic, "an atomic operation", place);
    if (place.kind == Kind::read) return note_read(cell, now, place);
    for (const Access& read : cell.reads) require_ordered(read, "a read", place);
    if (cell.earlier_read >= launch_epoch_ && cell.earlier_read < block_epoch_)
      report("conflict between blocks", place, ", which another block reads");
    (place.kind == Kind::write ? cell.write : cell.atomic) = now;
  }

  void note_read(Cell& cell, const Access& now, const Place& place) {
    Access &a = cell.reads[0], &b = cell.reads[1];
    if (a.epoch != epoch_) {
      if (&place.buffer != &shared_ && a.epoch < block_epoch_) cell.earlier_read = a.epoch;
      a = now;
      b = {};
    } else if (is_ordered(a, place)) {
      a = now;
    } else if (b.epoch != epoch_ || is_ordered(b, place) || a.thread / kWarp == b.thread / kWarp) {
      b = now;
    }
  }

  bool is_ordered(const Access& before, const Place& place) const {
    if (before.epoch < (&place.buffer == &shared_ ? block_epoch_ : launch_epoch_)) return true;
    if (before.epoch != epoch_) return before.epoch >= block_epoch_;
    const bool same_warp = before.thread / kWarp == threadIdx.x / kWarp;
    return before.thread == threadIdx.x || (same_warp && before.meetings != meetings_[threadIdx.x / kWarp]);
  }

  void require_ordered(const Access& before, const char* what, const Place& place) {
    if (is_ordered(before, place)) return;
    const bool same_warp = before.thread / kWarp == threadIdx.x / kWarp;
    const char* kind = before.epoch < block_epoch_ ? "conflict between blocks"
                       : same_warp                 ? "race within a warp"
                                                   : "race within a block";
    report(
        kind, place,
        std::string(", after ") + what + " by thread " + std::to_string(before.thread) +
            (before.epoch < block_epoch_ ? " of another block" : "") + " at " + lines_of(before.site));
  }

  [[noreturn]] void report(const char* kind, const Place& place, const std::string& more) {
    const std::string where = " at byte " + std::to_string(place.address - place.buffer.begin) + " of " +
                              place.buffer.name + " (" + std::to_string(place.buffer.bytes) + " bytes)";
    finish(kind, place.bytes, place.kind, place.site, where, more);
  }

  [[noreturn]] void report_outside(uintptr_t address, size_t bytes, Kind kind, const void* site) {
    const Buffer* nearest = &shared_;
    const auto distance = [&](const Buffer& buffer) {
      return address < buffer.begin ? buffer.begin - address : address - buffer.begin - buffer.bytes;
    };
    for (const auto& [begin, tensor] : buffers_)
      if (distance(tensor.buffer) < distance(*nearest)) nearest = &tensor.buffer;
    const bool before = address < nearest->begin, across = nearest->holds(address);
    const std::string where =
        across ? " across the end of "
               : " " + std::to_string(distance(*nearest)) + (before ? " bytes before " : " bytes behind the end of ");
    finish("access outside", bytes, kind, site, where + nearest->name, "");
  }

  [[noreturn]] void finish(
      const char* kind, size_t bytes, Kind access, const void* site, const std::string& where,
      const std::string& more) {
    const std::string thread = std::to_string(threadIdx.x) + " of block (" + std::to_string(blockIdx.x) + ", " +
                               std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
    buffers_lock_.unlock();  // nothing is unwound
    fail(
        std::string(kind) + ": " + name_of(access) + " of " + std::to_string(bytes) + " bytes" + where + " by thread " +
        thread + " at " + lines_of(site) + more);
  }

  uint32_t epoch_ = 0, launch_epoch_ = 0, block_epoch_ = 0;
  uint32_t meetings_[32] = {};  // of each warp, at __syncwarp, in this epoch
  Buffer shared_;
  std::mutex buffers_lock_;
  std::map<uintptr_t, Tensor> buffers_;  // by where they begin
  const Buffer* recent_ = nullptr;
  std::string next_name_;
  size_t next_residue_ = 0;
  int count_ = 0;
};

Shadow shadow;

std::string Shadow::lines_of(const void* site) {
  Dl_info module;
  dladdr(site, &module);
  const size_t offset = uintptr_t(site) - uintptr_t(module.dli_fbase) - 1;  // it is where the call returns to
  char command[4096];
  std::snprintf(command, sizeof(command), "addr2line -i -e '%s' %#zx", module.dli_fname, offset);
  std::unique_ptr<FILE, int (*)(FILE*)> lines(popen(command, "r"), pclose);
  std::string places;
  char line[4096];
  while (lines && std::fgets(line, sizeof(line), lines.get())) {
    const char* slash = std::strrchr(line, '/');
    std::string place = slash ? slash + 1 : line;
    place.resize(place.find_first_of(" \n"));
    if (place.rfind("harness.h", 0) != 0) places += (places.empty() ? "" : " < ") + place;
  }
  return places.empty() ? "an unknown line" : places;
}

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* const begin = shadow.allocate(bytes);
    return {begin, begin, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  static void release(void* begin) {
    if (begin) shadow.release(begin);
  }
};

Allocator allocator;
c10::Allocator* replaced = nullptr;

}  // namespace
}  // namespace pcmecl::host

#define PCMECL_EXPORT extern "C" __attribute__((visibility("default")))

PCMECL_EXPORT void pcmecl_begin_checks() {
  pcmecl::host::replaced = c10::GetAllocator(c10::DeviceType::CPU);
  c10::SetAllocator(c10::DeviceType::CPU, &pcmecl::host::allocator);
}

PCMECL_EXPORT void pcmecl_end_checks() { c10::SetAllocator(c10::DeviceType::CPU, pcmecl::host::replaced); }

// The next tensor's name in reports, and where it begins: `residue` bytes after a multiple of 64.
PCMECL_EXPORT void pcmecl_name_next(const char* name, size_t residue) { pcmecl::host::shadow.name_next(name, residue); }

// What the compiler calls. A type that is less aligned than its size is loaded in parts on a GPU: any address will do.
// A range is an object of another size.
#define PCMECL_ACCESS(name, kind, bytes, alignment)                                                       \
  extern "C" void __tsan_##name(void* x) {                                                                \
    using pcmecl::host::Kind;                                                                             \
    pcmecl::host::shadow.access(uintptr_t(x), bytes, Kind::kind, __builtin_return_address(0), alignment); \
  }
#define PCMECL_ACCESSES(bytes)                         \
  PCMECL_ACCESS(read##bytes, read, bytes, bytes)       \
  PCMECL_ACCESS(write##bytes, write, bytes, bytes)     \
  PCMECL_ACCESS(unaligned_read##bytes, read, bytes, 1) \
  PCMECL_ACCESS(unaligned_write##bytes, write, bytes, 1)
PCMECL_ACCESSES(1)
PCMECL_ACCESSES(2)
PCMECL_ACCESSES(4)
PCMECL_ACCESSES(8)
PCMECL_ACCESSES(16)

extern "C" void __tsan_read_range(void* x, size_t bytes) {
  pcmecl::host::shadow.access(uintptr_t(x), bytes, pcmecl::host::Kind::read, __builtin_return_address(0), 1);
}
extern "C" void __tsan_write_range(void* x, size_t bytes) {
  pcmecl::host::shadow.access(uintptr_t(x), bytes, pcmecl::host::Kind::write, __builtin_return_address(0), 1);
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
