// correlation_loss: what is made of an individual's features before the products S = V·Tᵀ, and the gradients of
// lengths and positives, which do not go through S, after them. Time and memory are linear in the individuals.
//
// changes_kernel, finish_kernel: a block owns an individual, its row of S, its column or both (`Individual`). Bound by
// memory: about 30·D bytes an emotion each.
#include "emotions.h"
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

// V neighbouring features of an individual's emotions: in registers where the compiler knows their number E, else read
// again each time.
template <int E, int V, typename T>
struct Features {
  const T* from;
  int64_t stride;
  float held[E ? E : 1][V];

  __device__ __forceinline__ Features(const T* from, int64_t stride) : from(from), stride(stride) {
    if constexpr (E != 0) for_emotions<E>(E, [&](int e) { load(from + e * stride, held[e]); });
  }

  __device__ __forceinline__ void get(int e, float (&to)[V]) const {
    if constexpr (E != 0) {
#pragma unroll
      for (int v = 0; v < V; ++v) to[v] = held[e][v];
    } else {
      load(from + e * stride, to);
    }
  }
};

// Which emotions an individual has, a bit each.
__device__ __forceinline__ unsigned present_of(const bool* mask, int64_t i, int emotions) {
  if (!mask) return kAllLanes;
  unsigned present = 0;
#pragma unroll 1
  for (int e = 0; e < emotions; ++e) present |= unsigned(mask[i * emotions + e]) << e;
  return present;
}

// An individual's features less their mean over its emotions. What is not present may be anything, NaN included.
template <int V, int E, typename T>
__device__ __forceinline__ void centre_features(
    const T* from, unsigned present, int emotions, int64_t width, float* to, int64_t stride) {
  for (int64_t k = int(threadIdx.x) * V; k < width; k += kThreads * V) {
    const Features<E, V, T> features(from + k, width);
    float mean[V] = {}, count = 0;
    for_emotions<E>(emotions, [&](int e) {
      float x[V];
      features.get(e, x);
      const bool counts = present >> e & 1;
#pragma unroll
      for (int v = 0; v < V; ++v) mean[v] += counts ? x[v] : 0.0f;
      count += counts ? 1.0f : 0.0f;
    });
#pragma unroll
    for (int v = 0; v < V; ++v) mean[v] /= fmaxf(count, 1.0f);
    for_emotions<E>(emotions, [&](int e) {
      float x[V];
      features.get(e, x);
#pragma unroll
      for (int v = 0; v < V; ++v) x[v] = present >> e & 1 ? x[v] - mean[v] : 0.0f;
      store(to + e * stride + k, x);
    });
  }
}

// First an individual's features less their mean over its emotions, then its pairs, a warp each.
template <typename T, int V, int E>
__global__ void __launch_bounds__(kThreads) changes_kernel(const Changes<T> args) {
  const int64_t m = args.extent.columns, D = args.width;
  const int emotions = E ? E : args.emotions, pairs = int(pair_count(emotions));
  const Individual at(args.extent);
  float *visual = args.centred_visual + at.i * emotions * D, *text = args.centred_text + at.j * D;
  int64_t visual_stride = D, text_stride = m * D;
  unsigned present = 0, text_present = 0;
  if (at.i >= 0) {
    present = present_of(args.mask, at.i, emotions);
    centre_features<V, E>(args.visual + at.i * emotions * D, present, emotions, D, visual, visual_stride);
  }
  if (at.j >= 0) {
    text_present = present_of(args.text_mask, at.j, emotions);
    centre_features<V, E>(args.text + at.j * emotions * D, text_present, emotions, D, text, text_stride);
  }
  __syncthreads();
  if (at.i < 0) visual = text, visual_stride = text_stride;
  if (at.j < 0) text = visual, text_stride = visual_stride;

  int a = 0, b = 1 + warp_of_thread();
#pragma unroll 1
  for (int pair = warp_of_thread(); pair < pairs; pair += kWarps, b += kWarps) {
    while (b >= emotions) ++a, b += a + 1 - emotions;
    const float *x_before = visual + a * visual_stride, *x_after = visual + b * visual_stride;
    const float *y_before = text + a * text_stride, *y_after = text + b * text_stride;
    float visual_square = 0, text_square = 0, product = 0;
#pragma unroll 1
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
    if (lane_of_thread() != 0) continue;
    const bool valid = present >> a & present >> b & 1, text_valid = text_present >> a & text_present >> b & 1;
    if (at.j >= 0) args.inv_norm_text[pair * m + at.j] = text_valid ? w : -1.0f;
    if (at.i < 0) continue;
    args.inv_norm_visual[at.i * pairs + pair] = valid ? u : -1.0f;
    args.cosine[at.i * pairs + pair] = valid && text_valid ? cosine : 0.0f;
  }
}

// What a pair of emotions gives: to the gradient of each of the two, times their difference, of visual features and of
// text; and times the other's difference.
struct alignas(16) PairFactors {
  float visual, text, positive, unused;
};

// A block owns an individual. Lengths and positives are E×E matrices times its features: with M a pair's number,
// grad[b] += M·(x_b − x_a) and grad[a] −= the same.
template <typename T, int V, int E>
__global__ void __launch_bounds__(kThreads, 3) finish_kernel(const CorrelationFinish<T> args) {
  const int64_t m = args.extent.columns, D = args.width;
  const Individual at(args.extent);
  const int emotions = E ? E : args.emotions, pairs = int(pair_count(emotions));
  const float scale = value_of(args.scale), grad_per_logit = *args.grad / (args.pairs ? 2 * *args.pairs : 2);
  PairFactors* factors = reinterpret_cast<PairFactors*>(shared_memory());  // (E, E), symmetric; no diagonal
#pragma unroll 1
  for (int pair = int(threadIdx.x); pair < pairs; pair += kThreads) {
    int a = 0, b = 1 + pair;
    while (b >= emotions) ++a, b += a + 1 - emotions;
    const float u = at.i < 0 ? -1.0f : args.inv_norm_visual[at.i * pairs + pair];
    const float w = at.j < 0 ? -1.0f : args.inv_norm_text[pair * m + at.j];
    const bool row_valid = !(u < 0), column_valid = !(w < 0);
    const float positive = at.i < 0 ? 0.0f : 2 * grad_per_logit * scale * args.cosine[at.i * pairs + pair];
    // Moments are of logits in base 2.
    const float row = row_valid ? grad_per_logit * kLn2 * args.row_grad_dot[at.i * pairs + pair] - positive : 0.0f;
    const float column = column_valid ? grad_per_logit * kLn2 * args.column_grad_dot[pair * m + at.j] - positive : 0.0f;
    if (at.i >= 0) args.row_grad_dot[at.i * pairs + pair] = row;
    factors[a * emotions + b] = factors[b * emotions + a] = {
        row_valid ? -row * u * u : 0.0f, column_valid ? -column * w * w : 0.0f,
        row_valid && column_valid ? -2 * grad_per_logit * scale * u * w : 0.0f, 0.0f};
  }
  __syncthreads();

  const float through = grad_per_logit * scale;
  const float *visual = args.centred_visual + at.i * emotions * D, *text = args.centred_text + at.j * D;
  int64_t visual_stride = D, text_stride = m * D;
  if (at.i < 0) visual = text, visual_stride = text_stride;
  if (at.j < 0) text = visual, text_stride = visual_stride;
  const float *through_visual = args.through_visual + at.i * emotions * D, *through_text = args.through_text + at.j * D;
  T* grad_visual = at.i >= 0 && args.grad_visual ? args.grad_visual + at.i * emotions * D : nullptr;
  T* grad_text = at.j >= 0 && args.grad_text ? args.grad_text + at.j * emotions * D : nullptr;
#pragma unroll 1
  for (int k = int(threadIdx.x) * V; k < int(D); k += kThreads * V) {
    const Features<E, V, float> x(visual + k, visual_stride), y(text + k, text_stride);
    for_emotions<E>(emotions, [&](int b) {
      float x_after[V], y_after[V], to_visual[V] = {}, to_text[V] = {};
      x.get(b, x_after);
      y.get(b, y_after);
      for_emotions<E>(emotions, [&](int a) {
        if (a == b) return;
        const PairFactors of = factors[a * emotions + b];
        float x_before[V], y_before[V];
        x.get(a, x_before);
        y.get(a, y_before);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float dx = x_after[v] - x_before[v], dy = y_after[v] - y_before[v];
          to_visual[v] += of.visual * dx + of.positive * dy;
          to_text[v] += of.text * dy + of.positive * dx;
        }
      });
      const auto write = [&](T* to, const float* of_product, const float (&others)[V]) {
        float gradient[V];
        load(of_product, gradient);
#pragma unroll
        for (int v = 0; v < V; ++v) gradient[v] = others[v] + through * gradient[v];
        store(to, gradient);
      };
      const int64_t row = b * int(D) + k;
      if (grad_visual) write(grad_visual + row, through_visual + row, to_visual);
      if (grad_text) write(grad_text + row, through_text + b * text_stride + k, to_text);
    });
  }
}

// f(V, E), both known to the compiler. What the driver allocates is aligned; features may begin anywhere.
template <typename F>
void for_shape(int64_t width, int emotions, bool vector, F&& f) {
  using std::integral_constant;
  if (!vector || width % 4 != 0) return f(integral_constant<int, 1>(), integral_constant<int, 0>());
  switch (emotions) {
    case 7: return f(integral_constant<int, 4>(), integral_constant<int, 7>());
    case 8: return f(integral_constant<int, 4>(), integral_constant<int, 8>());
    default: return f(integral_constant<int, 4>(), integral_constant<int, 0>());
  }
}

}  // namespace

template <typename T>
void correlation_changes(const Changes<T>& args) {
  const auto whole = [](const T* features) { return reinterpret_cast<uintptr_t>(features) % (4 * sizeof(T)) == 0; };
  for_shape(args.width, args.emotions, whole(args.visual) && whole(args.text), [&](auto vector, auto emotions) {
    launch(changes_kernel<T, vector(), emotions()>, {unsigned(args.extent.individuals())}, kThreads, 0, args);
  });
}

template <typename T>
void correlation_finish(const CorrelationFinish<T>& args) {
  const size_t shared = sizeof(PairFactors) * args.emotions * args.emotions;
  for_shape(args.width, args.emotions, true, [&](auto vector, auto emotions) {
    launch(finish_kernel<T, vector(), emotions()>, {unsigned(args.extent.individuals())}, kThreads, shared, args);
  });
}

#define PCMECL_FOR(T)                                      \
  template void correlation_changes<T>(const Changes<T>&); \
  template void correlation_finish<T>(const CorrelationFinish<T>&);
PCMECL_FOR(float)
PCMECL_FOR(Half)
PCMECL_FOR(BFloat16)
#undef PCMECL_FOR

}  // namespace pcmecl::cuda
