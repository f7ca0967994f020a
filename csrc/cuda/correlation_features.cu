// correlation_loss: what is made of an individual's features before the products S = V·Tᵀ, and the gradients of
// lengths and positives, which do not go through S, after them. Time and memory are linear in the individuals.
//
// changes_kernel, finish_kernel: a block owns an individual, its row of S, its column or both (`Individual`). Bound by
// memory: about 30·D bytes an emotion each.
#include "kernels.h"
#include "scale.h"
#include "warp.h"

namespace pcmecl::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;

// A block's individual: its row and its column of S, -1 where it has none. The rows' come first, then those of the
// columns that are left. Kernels let what is missing point to the other, rather than branch where they load.
struct Individual {
  int64_t i, j;

  __device__ explicit Individual(const Extent& of) : i(blockIdx.x), j(of.first + i) {
    if (i < of.rows) {
      if (j < 0 || j >= of.columns) j = -1;
    } else {
      const int64_t other = i - of.rows;
      j = other < of.first ? other : other + of.own();
      i = -1;
    }
  }
};

// First an individual's features less their mean over its emotions, then its pairs, a warp each.
template <typename T>
__device__ void centre_features(
    const Changes<T>& args, const T* x, const bool* mask, int64_t i, float* to, int64_t row, int64_t stride) {
  const bool* present = mask ? mask + i * args.emotions : nullptr;
  for (int64_t k = threadIdx.x; k < args.width; k += blockDim.x) {
    const T* from = x + i * args.emotions * args.width + k;
    float total = 0, count = 0;
    for (int e = 0; e < args.emotions; ++e) {
      if (present && !present[e]) continue;  // what is not present may be anything, NaN included
      total += float(from[e * args.width]);
      count += 1;
    }
    const float mean = total / fmaxf(count, 1.0f);
    for (int e = 0; e < args.emotions; ++e)
      to[row + e * stride + k] = present && !present[e] ? 0.0f : float(from[e * args.width]) - mean;
  }
}

__device__ __forceinline__ bool has_both(const bool* mask, int64_t i, int emotions, int a, int b) {
  return !mask || (mask[i * emotions + a] && mask[i * emotions + b]);
}

template <int V, typename T>
__device__ void measure_pair(const Changes<T>& args, const Individual& at, int a, int b, int pair) {
  const int64_t m = args.extent.columns, D = args.width;
  const float* visual = args.centred_visual + at.i * args.emotions * D;
  const float *x_before = visual + a * D, *x_after = visual + b * D;
  const float *y_before = args.centred_text + (a * m + at.j) * D, *y_after = args.centred_text + (b * m + at.j) * D;
  if (at.i < 0) x_before = y_before, x_after = y_after;
  if (at.j < 0) y_before = x_before, y_after = x_after;
  float visual_square = 0, text_square = 0, product = 0;
  for (int64_t k = lane_of_thread() * V; k < D; k += kWarpSize * V) {
    float x[V], y[V], from_x[V], from_y[V];
    load(x_after + k, x);
    load(x_before + k, from_x);
    load(y_after + k, y);
    load(y_before + k, from_y);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float dx = x[v] - from_x[v], dy = y[v] - from_y[v];
      visual_square += dx * dx;
      text_square += dy * dy;
      product += dx * dy;
    }
  }
  const float u = inverse_norm(sum_over(visual_square)), w = inverse_norm(sum_over(text_square));
  const float cosine = sum_over(product) * u * w;
  if (lane_of_thread() != 0) return;
  const int64_t Q = pair_count(args.emotions);
  const bool valid = at.j >= 0 && has_both(args.text_mask, at.j, args.emotions, a, b);
  if (at.j >= 0) args.inv_norm_text[pair * m + at.j] = valid ? w : -1.0f;
  if (at.i < 0) return;
  const bool row_valid = has_both(args.mask, at.i, args.emotions, a, b);
  args.inv_norm_visual[at.i * Q + pair] = row_valid ? u : -1.0f;
  args.cosine[at.i * Q + pair] = row_valid && valid ? cosine : 0.0f;
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) changes_kernel(const Changes<T> args) {
  const int64_t D = args.width;
  const Individual at(args.extent);
  if (at.i >= 0) centre_features(args, args.visual, args.mask, at.i, args.centred_visual, at.i * args.emotions * D, D);
  if (at.j >= 0)
    centre_features(args, args.text, args.text_mask, at.j, args.centred_text, at.j * D, args.extent.columns * D);
  __syncthreads();
  for (int a = 0, pair = 0; a < args.emotions; ++a)
    for (int b = a + 1; b < args.emotions; ++b, ++pair)
      if (pair % kWarps == warp_of_thread()) measure_pair<V>(args, at, a, b, pair);
}

// A block owns an individual. Lengths and positives are E×E matrices times its features: with M a pair's number,
// grad[b] += M·(x_b − x_a) and grad[a] −= the same.
template <typename T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const CorrelationFinish<T> args) {
  const int64_t m = args.extent.columns, D = args.width;
  const Individual at(args.extent);
  const int E = args.emotions, Q = int(pair_count(E));
  const float scale = value_of(args.scale), grad_per_logit = *args.grad / (args.pairs ? 2 * *args.pairs : 2);
  float* visual_lengths = reinterpret_cast<float*>(shared_memory());  // (E, E), symmetric; no diagonal
  float* text_lengths = visual_lengths + E * E;
  float* positives = text_lengths + E * E;
  for (int a = 0, pair = 0; a < E; ++a)
    for (int b = a + 1; b < E; ++b, ++pair) {
      if (pair % kThreads != int(threadIdx.x)) continue;
      const float u = at.i < 0 ? -1.0f : args.inv_norm_visual[at.i * Q + pair];
      const float w = at.j < 0 ? -1.0f : args.inv_norm_text[pair * m + at.j];
      const bool row_valid = !(u < 0), column_valid = !(w < 0);
      const float positive = at.i < 0 ? 0.0f : 2 * grad_per_logit * scale * args.cosine[at.i * Q + pair];
      // Moments are of logits in base 2.
      const float row = row_valid ? grad_per_logit * kLn2 * args.row_grad_dot[at.i * Q + pair] - positive : 0.0f;
      const float column =
          column_valid ? grad_per_logit * kLn2 * args.column_grad_dot[pair * m + at.j] - positive : 0.0f;
      if (at.i >= 0) args.row_grad_dot[at.i * Q + pair] = row;
      visual_lengths[a * E + b] = visual_lengths[b * E + a] = row_valid ? -row * u * u : 0.0f;
      text_lengths[a * E + b] = text_lengths[b * E + a] = column_valid ? -column * w * w : 0.0f;
      positives[a * E + b] = positives[b * E + a] =
          row_valid && column_valid ? -2 * grad_per_logit * scale * u * w : 0.0f;
    }
  __syncthreads();

  const float through = grad_per_logit * scale;
  const float *visual = args.centred_visual + at.i * E * D, *text = args.centred_text + at.j * D;
  int64_t visual_stride = D, text_stride = m * D;
  if (at.i < 0) visual = text, visual_stride = text_stride;
  if (at.j < 0) text = visual, text_stride = visual_stride;
  for (int64_t k = threadIdx.x; k < D; k += blockDim.x)
    for (int b = 0; b < E; ++b) {
      float to_visual = 0, to_text = 0;
      for (int a = 0; a < E; ++a) {
        if (a == b) continue;
        const float dx = visual[b * visual_stride + k] - visual[a * visual_stride + k];
        const float dy = text[b * text_stride + k] - text[a * text_stride + k];
        to_visual += visual_lengths[a * E + b] * dx + positives[a * E + b] * dy;
        to_text += text_lengths[a * E + b] * dy + positives[a * E + b] * dx;
      }
      const int64_t of_visual = (at.i * E + b) * D + k, of_text = (at.j * E + b) * D + k;
      if (at.i >= 0 && args.grad_visual)
        args.grad_visual[of_visual] = T(to_visual + through * args.through_visual[of_visual]);
      if (at.j >= 0 && args.grad_text)
        args.grad_text[of_text] = T(to_text + through * args.through_text[(b * m + at.j) * D + k]);
    }
}

}  // namespace

template <typename T>
void correlation_changes(const Changes<T>& args) {
  const bool vector = args.width % 4 == 0;
  const unsigned individuals = unsigned(args.extent.individuals());
  launch(vector ? changes_kernel<T, 4> : changes_kernel<T, 1>, {individuals}, kThreads, 0, args);
}

template <typename T>
void correlation_finish(const CorrelationFinish<T>& args) {
  const size_t shared = 3 * sizeof(float) * args.emotions * args.emotions;
  launch(finish_kernel<T>, {unsigned(args.extent.individuals())}, kThreads, shared, args);
}

#define PCMECL_FOR(T)                                      \
  template void correlation_changes<T>(const Changes<T>&); \
  template void correlation_finish<T>(const CorrelationFinish<T>&);
PCMECL_FOR(float)
PCMECL_FOR(Half)
PCMECL_FOR(BFloat16)
#undef PCMECL_FOR

}  // namespace pcmecl::cuda
