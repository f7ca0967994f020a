// correlation_loss with negatives="within": an individual's logits are those of its own pairs, from its own E×E block
// of S. Logits and sums are as in correlation.cu.
//
// A block owns an individual, a thread a row of its logits or a column, which is a row of the transposed block: it
// walks over the pairs of the other side. Bytes: the block of S, lengths and sums, once. Operations: both exponentials
// of a logit twice, for its row and for its column. Bound by latency: a block has little to do.
#include "emotions.h"
#include "kernels.h"
#include "scale.h"
#include "warp.h"

namespace pcmecl::cuda {
namespace {

constexpr int kThreads = 64;

// A block's individual, in shared memory.
struct Own {
  int64_t i;
  int emotions, pairs;
  float scale_of_2, K;
  float *block, *visual, *text;  // (E, E) of S; inverse lengths, (Q,) each

  __device__ __forceinline__ Own(const Correlation& args, int emotions)
      : i(blockIdx.x), emotions(emotions), pairs(int(pair_count(emotions))),
        block(reinterpret_cast<float*>(shared_memory())), visual(block + emotions * emotions), text(visual + pairs) {
    const float scale = value_of(args.scale);
    scale_of_2 = scale * kLog2e, K = offset(scale);
#pragma unroll 1
    for (int at = int(threadIdx.x); at < emotions * emotions; at += kThreads)
      block[at] = args.product[i * emotions * emotions + at];
#pragma unroll 1
    for (int pair = int(threadIdx.x); pair < pairs; pair += kThreads) {
      visual[pair] = args.inv_norm_visual[i * pairs + pair];
      text[pair] = args.inv_norm_text[pair * args.columns + i];
    }
  }
};

// A row of logits, or a column: that of the pair x < y.
template <int E>
struct Line {
  bool row;
  int pair, x, y;
  const float* others;  // the other side's inverse lengths
  float inverse;        // this side's; negative if the pair is not valid

  __device__ __forceinline__ Line(const Own& own, int number) : own(own) {
    row = number < own.pairs, pair = row ? number : number - own.pairs;
    x = 0, y = pair + 1;
    while (y >= own.emotions) ++x, y += x + 1 - own.emotions;
    others = row ? own.text : own.visual;
    inverse = (row ? own.visual : own.text)[pair];
    if constexpr (E != 0) for_emotions<E>(E, [&](int e) { held[e] = read(e); });
  }

  // Before division by the other side's length.
  __device__ __forceinline__ float difference(int e) const {
    if constexpr (E != 0) return held[e];
    return read(e);
  }

  // step(c, d, pair, logit, the other side's inverse length) for every pair of the other side.
  template <typename Step>
  __device__ __forceinline__ void for_logits(Step&& step) const {
    for_pairs<E>(own.emotions, [&](int c, int d, int cd) {
      step(c, d, cd, (difference(d) - difference(c)) * others[cd], others[cd]);
    });
  }

 private:
  const Own& own;
  float held[E ? E : 1];

  __device__ __forceinline__ float read(int e) const {
    const int along = row ? 1 : own.emotions, across = row ? own.emotions : 1;
    return (own.block[y * across + e * along] - own.block[x * across + e * along]) * (inverse * own.scale_of_2);
  }
};

template <int E>
__global__ void __launch_bounds__(kThreads)
    sums_within_kernel(const Correlation args, float* row_sum, float* column_sum) {
  const Own own(args, E ? E : args.emotions);
  __syncthreads();
#pragma unroll 1
  for (int number = int(threadIdx.x); number < 2 * own.pairs; number += kThreads) {
    const Line<E> line(own, number);
    float sum = 0;
    line.for_logits([&](int, int, int, float logit, float other) {
      const float term = exp2_fast(logit - own.K) + exp2_fast(-logit - own.K);
      sum += other < 0 ? 0.0f : term;
    });
    (line.row ? row_sum : column_sum)[own.i * own.pairs + line.pair] = line.inverse < 0 ? 0.0f : sum;
  }
}

// As correlation.cu's, without the factor that all logits share.
template <int E>
__global__ void __launch_bounds__(kThreads)
    gradients_within_kernel(const Correlation args, float* row_grad_dot, float* column_grad_dot) {
  const Own own(args, E ? E : args.emotions);
  const int emotions = own.emotions;
  float *inv_row_sums = own.text + own.pairs, *inv_column_sums = inv_row_sums + own.pairs;
  float* of_rows = inv_column_sums + own.pairs;  // (Q, E): a row's gradient of the differences of S
#pragma unroll 1
  for (int pair = int(threadIdx.x); pair < own.pairs; pair += kThreads) {
    inv_row_sums[pair] = 1 / args.row_sum[own.i * own.pairs + pair];
    inv_column_sums[pair] = 1 / args.column_sum[own.i * own.pairs + pair];
  }
  __syncthreads();
#pragma unroll 1
  for (int number = int(threadIdx.x); number < 2 * own.pairs; number += kThreads) {
    const Line<E> line(own, number);
    const float inv_sum = (line.row ? inv_row_sums : inv_column_sums)[line.pair];
    const float* other_sums = line.row ? inv_column_sums : inv_row_sums;
    float* to = of_rows + line.pair * emotions;
    float gradient[E ? E : 1] = {}, grad_dot = 0;
    if (E == 0 && line.row)
      for (int e = 0; e < emotions; ++e) to[e] = 0;
    line.for_logits([&](int c, int d, int cd, float logit, float other) {
      const float of = (exp2_fast(logit - own.K) - exp2_fast(-logit - own.K)) * (inv_sum + other_sums[cd]);
      const float of_logit = other < 0 || line.inverse < 0 ? 0.0f : of;
      grad_dot += of_logit * logit;
      const float of_difference = of_logit * other * line.inverse;
      if constexpr (E != 0) {
        gradient[d] += of_difference;
        gradient[c] -= of_difference;
      } else if (line.row) {
        to[d] += of_difference;
        to[c] -= of_difference;
      }
    });
    if (line.row) {
      if constexpr (E != 0) for_emotions<E>(E, [&](int e) { to[e] = gradient[e]; });
      row_grad_dot[own.i * own.pairs + line.pair] = grad_dot;
    } else {
      column_grad_dot[line.pair * args.columns + own.i] = grad_dot;
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int at = int(threadIdx.x); at < emotions * emotions; at += kThreads) {
    const int x = at / emotions, e = at % emotions;
    float total = 0;
    for_emotions<E>(emotions, [&](int other) {
      if (other == x) return;
      const int pair = int(other < x ? pair_index(other, x, emotions) : pair_index(x, other, emotions));
      const float of_row = of_rows[pair * emotions + e];
      total += other < x ? of_row : -of_row;
    });
    args.grad_product[own.i * emotions * emotions + at] = total;
  }
}

int64_t shared_bytes(int emotions, bool backward) {
  const int64_t pairs = pair_count(emotions);
  return (emotions * emotions + 2 * pairs + (backward ? 2 * pairs + pairs * emotions : 0)) * sizeof(float);
}

}  // namespace

void correlation_sums_within(const Correlation& args, float* row_sum, float* column_sum) {
  const auto kernel = args.emotions == 7   ? sums_within_kernel<7>
                      : args.emotions == 8 ? sums_within_kernel<8>
                                           : sums_within_kernel<0>;
  const size_t shared = shared_bytes(args.emotions, false);
  launch(kernel, {unsigned(args.columns)}, kThreads, shared, args, row_sum, column_sum);
}

void correlation_gradients_within(const Correlation& args, float* row_grad_dot, float* column_grad_dot) {
  const auto kernel = args.emotions == 7   ? gradients_within_kernel<7>
                      : args.emotions == 8 ? gradients_within_kernel<8>
                                           : gradients_within_kernel<0>;
  const size_t shared = shared_bytes(args.emotions, true);
  launch(kernel, {unsigned(args.columns)}, kThreads, shared, args, row_grad_dot, column_grad_dot);
}

}  // namespace pcmecl::cuda
