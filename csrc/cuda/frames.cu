// clip_frames and its gradient: rows mixed by one band, columns by another, then a gain and a bias per channel. The
// gradient is the same kernel with the bands transposed, so nothing is atomic.
//
// A block owns 16 × 64 new pixels of a plane. It mixes the old rows it needs, 16 bytes of neighbouring columns a load,
// into shared memory, at most 128 columns at a time, and then the columns from there; a thread owns four rows of one
// column. It reads each old pixel about once per tile from memory (again from the cache for every tap) and writes each
// new one once. Bound by memory at CLIP's sizes. The bands are small tables that a first kernel makes: no copy from the
// host is waited for.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "warp.h"

namespace pcmecl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 16, kColumns = 64, kRowsOfThread = kRows * kColumns / kThreads;
constexpr int kChunk = 128, kStride = kChunk + 4;

__device__ double sum_of_weights(const ResizeWindow& window) {
  double total = 0;
  for (int64_t pixel = window.first; pixel < window.last; ++pixel) total += resize_weight(window, pixel);
  return total;
}

__device__ void fill_pixel(const Band& band, Filter filter, int pixel) {
  const ResizeWindow window = resize_window(filter, pixel, band.before, band.after);
  const double total = sum_of_weights(window);
  const int first = int(window.first) < band.before - band.taps ? int(window.first) : band.before - band.taps;
  band.first[pixel] = first;
  for (int tap = 0; tap < band.taps; ++tap) {
    const bool inside = first + tap >= window.first && first + tap < window.last;
    band.weights[tap * band.after + pixel] = inside ? float(resize_weight(window, first + tap) / total) : 0.0f;
  }
}

// The band's pixels are the resize's old ones. Windows move on with their pixel, so those that hold an old pixel follow
// one another: the first is searched for.
__device__ void fill_pixel_transposed(const Band& band, Filter filter, int old) {
  int low = 0, high = band.before - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (resize_window(filter, middle, band.after, band.before).last > old)
      high = middle;
    else
      low = middle + 1;
  }
  const int first = low < band.before - band.taps ? low : band.before - band.taps;
  band.first[old] = first;
  for (int tap = 0; tap < band.taps; ++tap) {
    const ResizeWindow window = resize_window(filter, first + tap, band.after, band.before);
    const bool inside = old >= window.first && old < window.last;
    band.weights[tap * band.after + old] = inside ? float(resize_weight(window, old) / sum_of_weights(window)) : 0.0f;
  }
}

__device__ void fill(const Band& band, Filter filter, bool transposed) {
  const int pixel = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (pixel >= band.after) return;
  if (transposed)
    fill_pixel_transposed(band, filter, pixel);
  else
    fill_pixel(band, filter, pixel);
}

__global__ void bands_kernel(const Band rows, const Band columns, Filter filter, bool transposed) {
  if (blockIdx.y == 0)
    fill(rows, filter, transposed);
  else
    fill(columns, filter, transposed);
}

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

int resize_taps(Filter filter, int before, int after, bool transposed) {
  int64_t taps = 1;
  std::vector<int64_t> held(transposed ? before : 0, 0);
  for (int pixel = 0; pixel < after; ++pixel) {
    const ResizeWindow window = resize_window(filter, pixel, before, after);
    if (transposed)
      for (int64_t old = window.first; old < window.last; ++old) taps = std::max(taps, ++held[old]);
    else
      taps = std::max(taps, window.last - window.first);
  }
  return int(taps);
}

void fill_bands(const Band& rows, const Band& columns, Filter filter, bool transposed) {
  constexpr int threads = 64;
  launch(
      bands_kernel, {blocks(std::max(rows.after, columns.after), threads), 2}, threads, 0, rows, columns, filter,
      transposed);
}

template <typename T>
void resize_frames(const Frames<T>& args) {
  const unsigned down = blocks(args.rows.after, kRows), across = blocks(args.columns.after, kColumns);
  const bool vector = aligned(args.columns.before, args.in);
  launch(
      vector ? resize_kernel<T, kVector<T>> : resize_kernel<T, 1>, {unsigned(args.planes * down * across)}, kThreads,
      kRows * kStride * sizeof(float), args, int(down), int(across));
}

template void resize_frames<float>(const Frames<float>&);
template void resize_frames<c10::Half>(const Frames<c10::Half>&);
template void resize_frames<c10::BFloat16>(const Frames<c10::BFloat16>&);

}  // namespace pcmecl::cuda
