// clip_frames and its gradient: rows mixed by one band, columns by another, then a gain and a bias per channel. The
// gradient is the same kernel with the bands transposed, so nothing is atomic.
//
// A block owns 16 × 64 new pixels of a plane. It mixes the old rows it needs, 16 bytes of neighbouring columns a load,
// into shared memory, at most 128 columns at a time, and then the columns from there; a thread owns four rows of one
// column. It reads each old pixel about once per tile from memory (again from the cache for every tap) and writes each
// new one once. Bound by memory at CLIP's sizes. The bands are small tables that stay on the device.
#include "kernels.h"
#include "warp.h"

namespace pcmecl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 16, kColumns = 64, kRowsOfThread = kRows * kColumns / kThreads;
constexpr int kChunk = 128, kStride = kChunk + 4;

// Old columns [start, start + kChunk) of the tile's rows.
template <typename T, int V>
__device__ void mix_rows(const Frames<T>& args, const T* plane, int first_row, int start, int end, float* mixed) {
  constexpr int kPacks = kChunk / V;
  for (int unit = int(threadIdx.x); unit < kRows * kPacks; unit += kThreads) {
    const int r = unit / kPacks, at = unit % kPacks * V, row = first_row + r;
    if (start + at >= end) continue;
    float sums[V] = {};  // stays 0 below the picture: the columns' pass reads these rows, too
    if (row < args.rows.after) {
      const T* from = plane + int64_t(args.rows.first[row]) * args.columns.before + start + at;
      for (int tap = 0; tap < args.rows.taps; ++tap, from += args.columns.before) {
        const float weight = args.rows.weights[tap * args.rows.after + row];
        float pixels[V];
        load(from, pixels);
#pragma unroll
        for (int v = 0; v < V; ++v) sums[v] += weight * pixels[v];
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) mixed[r * kStride + at + v] = sums[v];
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 3) resize_kernel(const Frames<T> args, int tiles_down, int tiles_across) {
  float* mixed = reinterpret_cast<float*>(shared_memory());
  const int64_t plane = blockIdx.x / unsigned(tiles_down * tiles_across);
  const int tile = int(blockIdx.x % unsigned(tiles_down * tiles_across));
  const int first_row = tile / tiles_across * kRows, first_column = tile % tiles_across * kColumns;
  const int column = first_column + int(threadIdx.x) % kColumns;
  const int own_rows = int(threadIdx.x) / kColumns * kRowsOfThread;
  const bool inside = column < args.columns.after;
  const int last_column = first_column + kColumns < args.columns.after ? first_column + kColumns : args.columns.after;
  const int begin = args.columns.first[first_column] / V * V,
            end = args.columns.first[last_column - 1] + args.columns.taps;
  const int first_old = inside ? args.columns.first[column] : 0;

  float sums[kRowsOfThread] = {};
  for (int start = begin; start < end; start += kChunk) {
    mix_rows<T, V>(args, args.in + plane * args.rows.before * args.columns.before, first_row, start, end, mixed);
    __syncthreads();
    for (int tap = 0; inside && tap < args.columns.taps; ++tap) {
      const int at = first_old + tap - start;
      if (at < 0 || at >= kChunk) continue;
      const float weight = args.columns.weights[tap * args.columns.after + column];
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r) sums[r] += weight * mixed[(own_rows + r) * kStride + at];
    }
    __syncthreads();
  }
  if (!inside) return;
  const int channel = int(plane % 3);
  const float gain = channel == 0 ? args.gain[0] : channel == 1 ? args.gain[1] : args.gain[2];
  const float bias = channel == 0 ? args.bias[0] : channel == 1 ? args.bias[1] : args.bias[2];
#pragma unroll
  for (int r = 0; r < kRowsOfThread; ++r) {
    const int row = first_row + own_rows + r;
    if (row < args.rows.after)
      args.out[(plane * args.rows.after + row) * args.columns.after + column] = T(sums[r] * gain + bias);
  }
}

}  // namespace

template <typename T>
void resize_frames(const Frames<T>& args) {
  const unsigned down = blocks(args.rows.after, kRows), across = blocks(args.columns.after, kColumns);
  const bool vector = aligned(args.columns.before, args.in);
  launch(
      vector ? resize_kernel<T, kVector<T>> : resize_kernel<T, 1>, {unsigned(args.planes * down * across)}, kThreads,
      kRows * kStride * sizeof(float), args, int(down), int(across));
}

template void resize_frames<float>(const Frames<float>&);
template void resize_frames<Half>(const Frames<Half>&);
template void resize_frames<BFloat16>(const Frames<BFloat16>&);

}  // namespace pcmecl::cuda
