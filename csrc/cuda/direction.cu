// direction_loss and direction_logits.
//
// A warp owns a sample: lanes split the features, 16 bytes each where they are aligned, and lane e keeps what belongs
// to emotion e. It reads source, edited and E rows of the bank (without contrast: 2), twice through the cache, and
// writes the result; the backward recomputes and reads them a third time. Operations: about 6·E·D a sample. Bound by
// memory. Where the bank's gradient is wanted (direction_bank.cu), samples of an individual are taken one after
// another, so that a multiprocessor finds its rows of the bank in its own cache.
#undef NDEBUG  // kernels check indices in every build
#include <cassert>

#include "kernels.h"
#include "scale.h"
#include "warp.h"

namespace pcmecl::cuda {
namespace {

constexpr int kReduceThreads = 256, kReduced = 4 * kReduceThreads;  // threads and samples of a block
constexpr int kWarps = 4;  // and below, blocks a multiprocessor has to hold: with more the compiler spills registers

// G: emotions measured in one pass over the features; 1 where the target's is all that counts.
template <typename T, int V, int G>
struct Sample {
  const Direction<T>& args;
  const T *source, *edited, *rows, *from;
  int lane, a, b;
  float inv_norm_source, inv_norm_edited;
  float delta_square, inv_norm_delta, source_delta;  // |δ|², 1/max(|δ|, min_change), ⟨ŝ, δ⟩
  float cosine, inverse, dot_source, dot_delta;      // of emotion `lane`: c, 1/|d|, ⟨ŝ, d⟩, ⟨δ, d⟩

  __device__ Sample(const Direction<T>& args, int64_t sample)
      : args(args), source(args.source + sample * args.width), edited(args.edited + sample * args.width),
        rows(args.bank + args.individual[sample] * args.emotions * args.width), lane(lane_of_thread()),
        a(int(args.source_emotion[sample])), b(args.target_emotion ? int(args.target_emotion[sample]) : -1) {
    from = rows + int64_t(a) * args.width;
    inv_norm_source = inv_norm_edited = 1;
    delta_square = inv_norm_delta = source_delta = 0;
    cosine = inverse = dot_source = dot_delta = 0;
  }

  __device__ bool valid() const { return a != b; }

  template <typename F>
  __device__ __forceinline__ void for_strips(F&& f) const {
    for (int64_t k = lane * V; k < args.width; k += kWarpSize * V) f(k);
  }

  // ŝ and δ at k; with normalize = false ŝ is the source as it is.
  __device__ __forceinline__ void changes(int64_t k, float (&unit)[V], float (&delta)[V]) const {
    load(source + k, unit);
    load(edited + k, delta);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      delta[v] = difference_of_units(delta[v], inv_norm_edited, unit[v], inv_norm_source);
      unit[v] *= inv_norm_source;
    }
  }

  template <bool backward>
  __device__ void measure_directions() {
    if (args.normalize) normalise();
    if constexpr (G == 1) {
      measure<backward>(b, true);
    } else {
      for (int first = 0; first < args.emotions; first += G) measure<backward>(first, first == 0);
    }
    inverse = inverse_norm(inverse);
    cosine = dot_delta * inverse * inv_norm_delta;
  }

  __device__ void normalise() {
    float source_square = 0, edited_square = 0;
    for_strips([&](int64_t k) {
      float x[V], y[V];
      load(source + k, x);
      load(edited + k, y);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        source_square += x[v] * x[v];
        edited_square += y[v] * y[v];
      }
    });
    inv_norm_source = inverse_norm(sum_over(source_square));
    inv_norm_edited = inverse_norm(sum_over(edited_square));
  }

  // Emotions [first, first + G): |d|² into `inverse`, ⟨δ, d⟩ and ⟨ŝ, d⟩.
  template <bool backward>
  __device__ void measure(int first, bool with_delta) {
    float square[G] = {}, dot[G] = {}, own[G] = {}, of_delta = 0, of_both = 0;
    for_strips([&](int64_t k) {
      float unit[V], delta[V], start[V];
      changes(k, unit, delta);
      load(from + k, start);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        of_delta += delta[v] * delta[v];
        of_both += delta[v] * unit[v];
      }
#pragma unroll
      for (int g = 0; g < G; ++g) {
        if (first + g >= args.emotions || first + g == a) continue;
        float row[V];
        load(rows + int64_t(first + g) * args.width + k, row);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float d = row[v] - start[v];
          square[g] += d * d;
          dot[g] += d * delta[v];
          if (backward) own[g] += d * unit[v];
        }
      }
    });
    if (with_delta) {
      delta_square = sum_over(of_delta);
      inv_norm_delta = inverse_change(delta_square, args.min_change, args.normalize);
      if (backward) source_delta = sum_over(of_both);
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const float whole_square = sum_over(square[g]), whole_dot = sum_over(dot[g]);
      const float whole_own = backward ? sum_over(own[g]) : 0.0f;
      if (lane == first + g) inverse = whole_square, dot_delta = whole_dot, dot_source = whole_own;
    }
  }

  __device__ bool counts() const { return lane < args.emotions && lane != a; }

  // The loss; `weight` becomes softmax over e ≠ a of scale · c, where there is a contrast.
  __device__ float loss(float& weight) const {
    const float target_cosine = from_lane(cosine, b), matched = 1 - target_cosine;
    weight = 0;
    if (args.contrast == 0) return matched;
    const float scale = value_of(args.scale), largest = max_over_warp(counts() ? cosine : -kInfinity);
    const float term = counts() ? expf(scale * (cosine - largest)) : 0.0f, total = sum_over(term);
    weight = term / total;
    return matched + args.contrast * (logf(total) + scale * (largest - target_cosine));
  }

  // The gradient of this lane's cosine under the loss; `scale_gradient` becomes the scale's.
  __device__ float differentiate_loss(float grad, float& scale_gradient) const {
    float weight;
    loss(weight);
    const float is_target = lane == b ? 1.0f : 0.0f;
    const float excess = counts() ? args.contrast * (weight - is_target) : 0.0f;
    scale_gradient = grad * sum_over(args.contrast == 0 ? 0.0f : excess * cosine);
    return counts() ? grad * (args.contrast == 0 ? -is_target : excess * value_of(args.scale) - is_target) : 0.0f;
  }

  // From the gradient of this lane's cosine: those of source and edited, and what the bank's needs.
  __device__ void write(int64_t sample, int64_t place, float weight) {
    const float along = weight * inverse * inv_norm_delta, across = weight * cosine * inverse * inverse;
    const float shrink =
        -sum_over(weight * cosine) * inverse_change_square(delta_square, args.min_change, inv_norm_delta);
    const float source_dot = shrink * source_delta + sum_over(along * dot_source);  // ⟨ŝ, g⟩, g the gradient of δ
    const float edited_dot = source_dot + shrink * delta_square + sum_over(along * dot_delta);
    if (args.coefficients) {
      const float opposite = -sum_over(along);
      write_coefficients(place, lane == a ? opposite : along, across, inv_norm_source);
    }
    if (!args.grad_source && !args.grad_edited) return;

    for (int64_t start = 0; start < args.width; start += kWarpSize * V) {  // the same for all lanes: they shuffle
      const int64_t k = start + lane * V;
      const bool inside = k < args.width;
      float unit[V] = {}, delta[V] = {}, origin[V] = {}, gradient[V];
      if (inside) {
        changes(k, unit, delta);
        load(from + k, origin);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) gradient[v] = shrink * delta[v];
#pragma unroll 4
      for (int e = 0; e < args.emotions; ++e) {
        const float of_row = from_lane(along, e);
        if (!inside || of_row == 0) continue;
        float row[V];
        load(rows + int64_t(e) * args.width + k, row);
#pragma unroll
        for (int v = 0; v < V; ++v) gradient[v] += of_row * (row[v] - origin[v]);
      }
      if (!inside) continue;
      write_strip(sample * args.width + k, gradient, unit, delta, source_dot, edited_dot);
    }
  }

  __device__ void write_coefficients(int64_t place, float along, float across, float of_source) const {
    float* to = args.coefficients + place * coefficients_of(args.emotions);
    if (lane < args.emotions) {
      to[lane] = along;
      to[args.emotions + lane] = across;
    }
    if (lane == 0) {
      to[2 * args.emotions] = of_source;
      to[2 * args.emotions + 1] = inv_norm_edited;
      to[2 * args.emotions + 2] = float(a);
    }
  }

  // Through the norms, or as they are: ê = ŝ + δ.
  __device__ __forceinline__ void write_strip(
      int64_t at, const float (&gradient)[V], const float (&unit)[V], const float (&delta)[V], float source_dot,
      float edited_dot) const {
    float grad_source[V], grad_edited[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float project = args.normalize ? 1.0f : 0.0f;
      grad_source[v] = (project * unit[v] * source_dot - gradient[v]) * inv_norm_source;
      grad_edited[v] = (gradient[v] - project * (unit[v] + delta[v]) * edited_dot) * inv_norm_edited;
    }
    if (args.grad_source) store(args.grad_source + at, grad_source);
    if (args.grad_edited) store(args.grad_edited + at, grad_edited);
  }

  __device__ void write_zeros(int64_t sample, int64_t place) const {
    const float zeros[V] = {};
    for_strips([&](int64_t k) {
      if (args.grad_source) store(args.grad_source + sample * args.width + k, zeros);
      if (args.grad_edited) store(args.grad_edited + sample * args.width + k, zeros);
    });
    if (args.coefficients) write_coefficients(place, 0, 0, -1);
  }
};

__device__ __forceinline__ bool in_range(int64_t index, int64_t size) { return uint64_t(index) < uint64_t(size); }

// Fails at the next synchronisation; the backward reads the same indices.
template <typename T>
__device__ __forceinline__ void check_indices(const Direction<T>& args, int64_t sample) {
  assert(in_range(args.individual[sample], args.individuals) && "individual: an index is out of range");
  assert(in_range(args.source_emotion[sample], args.emotions) && "source_emotion: an index is out of range");
  if (args.target_emotion)
    assert(in_range(args.target_emotion[sample], args.emotions) && "target_emotion: an index is out of range");
}

template <typename T, int V, int G>
__global__ void __launch_bounds__(kWarps* kWarpSize, 6) forward_kernel(const Direction<T> args) {
  const int64_t k = int64_t(blockIdx.x) * kWarps + warp_of_thread();
  if (k >= args.samples) return;
  check_indices(args, k);
  Sample<T, V, G> sample(args, k);
  float result = 0, weight;
  if (sample.valid()) {
    sample.template measure_directions<false>();
    if (args.losses) result = sample.loss(weight);
  }
  if (args.losses) {
    if (sample.lane == 0) args.losses[k] = result;
  } else if (sample.lane < args.emotions) {
    args.logits[k * args.emotions + sample.lane] = T(sample.cosine);
  }
}

template <typename T, int V, int G>
__global__ void __launch_bounds__(kWarps* kWarpSize, 4) backward_kernel(const Direction<T> args) {
  const int64_t place = int64_t(blockIdx.x) * kWarps + warp_of_thread();
  if (place >= args.samples) return;
  const int64_t k = args.order ? args.order[place] : place;
  Sample<T, V, G> sample(args, k);
  float scale_gradient = 0;
  if (sample.valid()) {
    sample.template measure_directions<true>();
    float weight;
    if (args.grad_logits)
      weight = sample.counts() ? float(args.grad_logits[k * args.emotions + sample.lane]) : 0.0f;
    else
      weight = sample.differentiate_loss(args.grad_losses[k * args.grad_stride] / *args.divisor, scale_gradient);
    sample.write(k, place, weight);
  } else {
    sample.write_zeros(k, place);
  }
  if (args.grad_scale && sample.lane == 0) args.grad_scale[k] = scale_gradient;
}

__global__ void __launch_bounds__(kReduceThreads) parts_kernel(const DirectionResult args) {
  float sums[2] = {};  // losses, and how many count
#pragma unroll
  for (int own = 0; own < kReduced / kReduceThreads; ++own) {
    const int64_t k = int64_t(blockIdx.x) * kReduced + own * kReduceThreads + threadIdx.x;
    if (k >= args.samples) continue;
    sums[0] += args.losses[k];
    sums[1] += args.source_emotion[k] != args.target_emotion[k] ? 1.0f : 0.0f;
  }
  sum_over_block(sums, reinterpret_cast<float*>(shared_memory()));
  if (threadIdx.x != 0) return;
  args.parts[blockIdx.x] = sums[0];
  args.parts[gridDim.x + blockIdx.x] = sums[1];
}

__global__ void __launch_bounds__(kReduceThreads) result_kernel(const DirectionResult args, int64_t parts) {
  float sums[2] = {};  // losses, and how many count
#pragma unroll 1
  for (int64_t part = threadIdx.x; part < parts; part += kReduceThreads) {
    sums[0] += args.parts[part];
    sums[1] += args.parts[parts + part];
  }
  sum_over_block(sums, reinterpret_cast<float*>(shared_memory()));
  if (threadIdx.x != 0) return;
  const float count = args.mean ? fmaxf(sums[1], 1.0f) : 1.0f;
  *args.divisor = count;
  *args.loss = sums[0] / count;
}

// f(V, G), both known to the compiler.
template <typename T, typename F>
void for_shape(const Direction<T>& args, bool vector, F&& f) {
  const auto with_vector = [&](auto width) {
    if (args.target_emotion && args.contrast == 0) return f(width, std::integral_constant<int, 1>());
    if (args.emotions == 7) return f(width, std::integral_constant<int, 7>());
    return f(width, std::integral_constant<int, 8>());
  };
  vector ? with_vector(std::integral_constant<int, kVector<T>>()) : with_vector(std::integral_constant<int, 1>());
}

}  // namespace

template <typename T>
void direction_forward(const Direction<T>& args) {
  for_shape(args, aligned(args.width, args.source, args.edited, args.bank), [&](auto vector, auto group) {
    launch(forward_kernel<T, vector(), group()>, {blocks(args.samples, kWarps)}, kWarps * kWarpSize, 0, args);
  });
}

template <typename T>
void direction_backward(const Direction<T>& args) {
  const bool vector = aligned(args.width, args.source, args.edited, args.bank, args.grad_source, args.grad_edited);
  for_shape(args, vector, [&](auto vector, auto group) {
    launch(backward_kernel<T, vector(), group()>, {blocks(args.samples, kWarps)}, kWarps * kWarpSize, 0, args);
  });
}

int64_t direction_reduce_parts(int64_t samples) { return blocks(samples, kReduced); }

void direction_reduce(const DirectionResult& args) {
  constexpr size_t shared = 2 * kWarpSize * sizeof(float);
  const int64_t parts = direction_reduce_parts(args.samples);
  launch(parts_kernel, {unsigned(parts)}, kReduceThreads, shared, args);
  launch(result_kernel, {1}, kReduceThreads, shared, args, parts);
}

#define PCMECL_FOR(T)                                      \
  template void direction_forward<T>(const Direction<T>&); \
  template void direction_backward<T>(const Direction<T>&);
PCMECL_FOR(float)
PCMECL_FOR(Half)
PCMECL_FOR(BFloat16)
#undef PCMECL_FOR

}  // namespace pcmecl::cuda
