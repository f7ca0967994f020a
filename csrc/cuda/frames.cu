// clip_frames and its gradient: rows mixed by one band, columns by another, then a gain and a bias per channel. The
// gradient is the same kernel with the bands transposed, so nothing is atomic.
//
// A block owns 16 × 64 new pixels of a plane. It mixes the old rows it needs, 16 bytes of neighbouring columns a load,
// into shared memory, and then the columns from there; a thread owns four rows of one column. It reads each old pixel
// about once per tile from memory (again from the cache for every tap) and writes each new one once. Bound by memory at
// CLIP's sizes. The bands are small tables that stay on the device. Up to six taps are known to the compiler, and a
// tile's old columns then lie in shared memory at once; with more, 128 of them at a time.
#include "kernels.h"
#include "warp.h"

namespace pcmecl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 16, kColumns = 64, kRowsOfThread = kRows * kColumns / kThreads;
constexpr int kChunk = 128, kStride = kChunk + 4;
constexpr int kPlanes = 3 * 21845;  // whole frames, of one launch: what a grid's last axis takes

// Old columns [start, start + kChunk) of the tile's rows. A row below the picture is a copy of its last.
template <int Taps, int V, typename T>
__device__ __forceinline__ void mix_rows(
    const Frames<T>& args, const T* plane, int first_row, int start, int end, float* mixed) {
  constexpr int kPacks = kChunk / V, kAtOnce = kThreads / kPacks;  // rows
  const int at = int(threadIdx.x) % kPacks * V, taps = Taps ? Taps : args.rows.taps;
  if (start + at >= end) return;
#pragma unroll(Taps ? kRows / kAtOnce : 1)
  for (int step = 0; step < kRows / kAtOnce; ++step) {
    const int r = step * kAtOnce + int(threadIdx.x) / kPacks;
    const int row = first_row + r < args.rows.after ? first_row + r : args.rows.after - 1;
    const T* from = plane + int64_t(args.rows.first[row]) * args.columns.before + start + at;
    const float* weights = args.rows.weights + row;
    float sums[V] = {};
#pragma unroll(Taps ? Taps : 4)
    for (int tap = 0; tap < taps; ++tap) {
      float pixels[V];
      load(from + int64_t(tap) * args.columns.before, pixels);
      const float weight = weights[tap * args.rows.after];
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] += weight * pixels[v];
    }
    constexpr int kWide = V < 4 ? V : 4;
#pragma unroll
    for (int v = 0; v < V; v += kWide) {
      float part[kWide];
#pragma unroll
      for (int k = 0; k < kWide; ++k) part[k] = sums[v + k];
      store(mixed + r * kStride + at + v, part);
    }
  }
}

template <typename T, int V, int Taps>
__global__ void __launch_bounds__(kThreads, 3) resize_kernel(const Frames<T> args) {
  float* mixed = reinterpret_cast<float*>(shared_memory());
  const int first_row = int(blockIdx.y) * kRows, first_column = int(blockIdx.x) * kColumns;
  const T* plane = args.in + int64_t(blockIdx.z) * args.rows.before * args.columns.before;
  const int last = first_column + kColumns - 1, last_column = last < args.columns.after ? last : args.columns.after - 1;
  const int begin = args.columns.first[first_column] / V * V,
            end = args.columns.first[last_column] + (Taps ? Taps : args.columns.taps);
  const int own = first_column + int(threadIdx.x) % kColumns, column = own < last_column ? own : last_column;
  const int own_rows = int(threadIdx.x) / kColumns * kRowsOfThread;
  const int first_old = args.columns.first[column];
  const float* weights = args.columns.weights + column;

  float sums[kRowsOfThread] = {};
  if constexpr (Taps != 0) {
    float own_weights[Taps];
#pragma unroll
    for (int tap = 0; tap < Taps; ++tap) own_weights[tap] = weights[tap * args.columns.after];
    mix_rows<Taps, V>(args, plane, first_row, begin, end, mixed);
    __syncthreads();
    const float* from = mixed + own_rows * kStride + first_old - begin;
#pragma unroll
    for (int tap = 0; tap < Taps; ++tap)
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r) sums[r] += own_weights[tap] * from[r * kStride + tap];
  } else {
    for (int start = begin; start < end; start += kChunk) {
      mix_rows<Taps, V>(args, plane, first_row, start, end, mixed);
      __syncthreads();
      for (int tap = 0; tap < args.columns.taps; ++tap) {
        const int at = first_old + tap - start;
        if (at < 0 || at >= kChunk) continue;
        const float weight = weights[tap * args.columns.after];
#pragma unroll
        for (int r = 0; r < kRowsOfThread; ++r) sums[r] += weight * mixed[(own_rows + r) * kStride + at];
      }
      __syncthreads();
    }
  }
  if (own > last_column) return;
  const int channel = int(blockIdx.z % 3);
  const float gain = channel == 0 ? args.gain[0] : channel == 1 ? args.gain[1] : args.gain[2];
  const float bias = channel == 0 ? args.bias[0] : channel == 1 ? args.bias[1] : args.bias[2];
  const int first_own = first_row + own_rows;
  T* to = args.out + (int64_t(blockIdx.z) * args.rows.after + first_own) * args.columns.after + column;
#pragma unroll
  for (int r = 0; r < kRowsOfThread; ++r)
    if (first_own + r < args.rows.after) to[int64_t(r) * args.columns.after] = T(sums[r] * gain + bias);
}

// f(the taps of both sides), if the compiler knows them and a tile's old columns lie in shared memory at once, whose
// windows move on by the resize's factor, rounded; else f(0).
template <int V, typename F>
void for_taps(const Band& rows, const Band& columns, F&& f) {
  if constexpr (V > 1) {
    const int64_t move = (int64_t(kColumns - 1) * columns.before + columns.after - 1) / columns.after + 1;
    const bool at_once = move + columns.taps + V - 1 <= kChunk;
    switch (at_once && rows.taps == columns.taps ? columns.taps : 0) {
      case 2: return f(std::integral_constant<int, 2>());
      case 3: return f(std::integral_constant<int, 3>());
      case 4: return f(std::integral_constant<int, 4>());
      case 5: return f(std::integral_constant<int, 5>());
      case 6: return f(std::integral_constant<int, 6>());
    }
  }
  f(std::integral_constant<int, 0>());
}

template <typename T, int V>
void launch_resize(Frames<T> args) {
  const unsigned down = blocks(args.rows.after, kRows), across = blocks(args.columns.after, kColumns);
  const size_t shared = kRows * kStride * sizeof(float);
  for_taps<V>(args.rows, args.columns, [&](auto taps) {
    for (int64_t left = args.planes; left > 0; left -= kPlanes) {
      const int64_t planes = left < kPlanes ? left : kPlanes;
      launch(resize_kernel<T, V, taps()>, {across, down, unsigned(planes)}, kThreads, shared, args);
      args.in += int64_t(kPlanes) * args.rows.before * args.columns.before;
      args.out += int64_t(kPlanes) * args.rows.after * args.columns.after;
    }
  });
}

}  // namespace

template <typename T>
void resize_frames(const Frames<T>& args) {
  aligned(args.columns.before, args.in) ? launch_resize<T, kVector<T>>(args) : launch_resize<T, 1>(args);
}

template void resize_frames<float>(const Frames<float>&);
template void resize_frames<Half>(const Frames<Half>&);
template void resize_frames<BFloat16>(const Frames<BFloat16>&);

}  // namespace pcmecl::cuda
