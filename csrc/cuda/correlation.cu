// correlation_loss: all but the products S = V·Tᵀ and those with dS, which the driver has cuBLAS do in chunks.
//
// With directions numbered as unordered pairs (a < b), a logit is l = u[i,ab]·w[j,cd]·(S[b,d] − S[b,c] − S[a,d] +
// S[a,c]), and the opposite directions have l or −l: every row and column sums e^l + e^-l over a quarter of the logits.
// A row holds l and −l, so its largest logit is at least 0 and no maximum is needed: sums are of 2^(l − K), l in base
// 2, with K = max(0, ⌈scale·log2 e⌉ − 100). 2^27 terms do not overflow, and up to a scale of 150 none that counts is
// lost.
//
// sums_kernel, gradients_kernel: a warp owns individual i, its lanes 32 individuals j: lane j expands the E×E block of
// (i, j). Text columns are ordered (emotion, j), so a warp's load is 32 neighbours. A lane's column sums stay in
// registers for E = 7 and 8 (else in shared memory, E up to 32); row sums are added over the warp once a pair. Parts
// are written per block and added by the driver in a fixed order: nothing is atomic and every run gives the same bits.
// Operations a logit of the quarter: about 10 and two exponentials forward, 16 and two backward. Bound by arithmetic.
// For E = 7 and 8 a block adds dS up in shared memory, every lane the E×E numbers of its own, and in the end writes it
// where S was.
#include <algorithm>

#include "kernels.h"
#include "scale.h"
#include "warp.h"

namespace pcmecl::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
// Of the expanding kernels: E = 0 serves any number of emotions and keeps a lane's numbers in shared memory.
template <int E>
constexpr int kRows = E ? kWarps : 1;
template <int E>
constexpr int kLanes = kRows<E> * kWarpSize;

// Blocks that a multiprocessor holds.
template <int E>
constexpr int kSumsBlocks = E ? 4 : 8;
template <int E>
constexpr int kGradientsBlocks = E ? 3 : 8;

bool known(int emotions) { return emotions == 7 || emotions == 8; }

constexpr float kMaxScale = 150;

template <int E>
constexpr int kPairs = E * (E - 1) / 2;

__device__ __forceinline__ float offset(float scale) { return fmaxf(0.0f, ceilf(scale * kLog2e) - 100); }

// `count` numbers of a lane: in registers where the count is known to the compiler, else in shared memory, where other
// lanes' lie between them.
template <int count>
struct Slots {
  float values[count];
  __device__ __forceinline__ Slots(char*&, int) {}
  __device__ __forceinline__ float& operator[](int at) { return values[at]; }
};

template <>
struct Slots<0> {
  float* values;
  __device__ __forceinline__ Slots(char*& shared, int count) {
    values = reinterpret_cast<float*>(shared) + threadIdx.x;
    shared += count * kLanes<0> * sizeof(float);
  }
  __device__ __forceinline__ float& operator[](int at) { return values[at * kLanes<0>]; }
};

// Slots per lane that the kernels take from shared memory, and room for the columns' sums over the warps.
template <int E>
int64_t shared_bytes(int emotions, bool backward) {
  const int64_t for_any = (backward ? 3 : 2) * emotions, of_gradient = backward ? E * E : 0;
  return (pair_count(emotions) + (E ? of_gradient : for_any)) * kLanes<E> * sizeof(float);
}

// Where a lane adds up its E×E numbers of dS: in shared memory where E is known, else in a second product.
template <int E>
struct Gradient {
  float *values, *product;
  int64_t stride, columns;

  __device__ __forceinline__ float& operator()(int x, int e) const {
    if constexpr (E != 0) return values[(x * E + e) * kLanes<E>];
    return product[x * stride + e * columns];
  }
};

// step(c, d, pair) for c < d; E = 0 serves any number of emotions.
template <int E, typename Step>
__device__ __forceinline__ void for_pairs(int emotions, Step&& step) {
  if constexpr (E != 0) {
#pragma unroll
    for (int c = 0; c < E; ++c)
#pragma unroll
      for (int d = c + 1; d < E; ++d) step(c, d, c * (2 * E - c - 1) / 2 + d - c - 1);
  } else {
    int pair = 0;
    for (int c = 0; c < emotions; ++c)
      for (int d = c + 1; d < emotions; ++d) step(c, d, pair++);
  }
}

template <int E, typename Step>
__device__ __forceinline__ void for_emotions(int emotions, Step&& step) {
  if constexpr (E != 0) {
#pragma unroll
    for (int e = 0; e < E; ++e) step(e);
  } else {
    for (int e = 0; e < emotions; ++e) step(e);
  }
}

// Where a thread stands: individual i of the chunk against individual j.
template <int E>
struct Place {
  int64_t i, j, row, stride;  // i: of all; row: of the chunk; stride: of a row of S
  bool inside, own;           // own: i and j are one individual

  __device__ Place(const Correlation& args) {
    row = int64_t(blockIdx.x) * kRows<E> + warp_of_thread();
    i = args.row + row;
    j = int64_t(blockIdx.y) * kWarpSize + lane_of_thread();
    stride = args.emotions * args.columns;
    inside = j < args.columns && row < args.rows;
    own = i + args.first == j;
  }
};

// Adds the lanes' column numbers over the block's warps and writes them as this block's part.
template <int E, typename Columns>
__device__ void write_columns(const Correlation& args, int64_t j, Columns& columns, float* shared, int pairs) {
  if constexpr (E != 0) for_pairs<E>(E, [&](int, int, int cd) { shared[cd * kLanes<E> + threadIdx.x] = columns[cd]; });
  __syncthreads();
  for (int cd = warp_of_thread(); cd < pairs; cd += kRows<E>) {
    float total = 0;
    for (int warp = 0; warp < kRows<E>; ++warp) total += shared[cd * kLanes<E> + warp * kWarpSize + lane_of_thread()];
    if (j < args.columns) args.column_parts[(int64_t(blockIdx.x) * pairs + cd) * args.columns + j] = total;
  }
}

template <int E, bool distinct>
__global__ void __launch_bounds__(kLanes<E>, kSumsBlocks<E>) sums_kernel(const Correlation args) {
  const int emotions = E ? E : args.emotions, pairs = int(pair_count(emotions));
  const Place<E> at(args);
  const float scale = value_of(args.scale), K = offset(scale);
  const float* block = args.product + at.row * emotions * at.stride + at.j;
  const float scale_of_2 = scale * kLog2e;
  const int stride = int(at.stride), columns_of_s = int(args.columns);  // a lane's numbers lie less than 2^31 apart
  char* shared = shared_memory();
  float* for_columns = reinterpret_cast<float*>(shared);
  Slots<kPairs<E>> columns(shared, pairs);
  Slots<E> difference(shared, emotions), before(shared, emotions);
  float inverse[E ? kPairs<E> : 1];  // the (Q, m) table's column j
  for_pairs<E>(emotions, [&](int, int, int cd) {
    if constexpr (E != 0) inverse[cd] = at.inside ? args.inv_norm_text[cd * args.columns + at.j] : -1.0f;
    columns[cd] = 0;
  });

  for (int a = 0, ab = 0; at.row < args.rows && a < emotions; ++a) {
    if (at.inside) for_emotions<E>(emotions, [&](int e) { before[e] = block[a * stride + e * columns_of_s]; });
    for (int b = a + 1; b < emotions; ++b, ++ab) {
      const float row_norm = args.inv_norm_visual[at.i * pairs + ab];
      const float factor = row_norm * scale_of_2;
      float sum = 0;
      if (!(row_norm < 0) && at.inside) {
        for_emotions<E>(
            emotions, [&](int e) { difference[e] = (block[b * stride + e * columns_of_s] - before[e]) * factor; });
        for_pairs<E>(emotions, [&](int c, int d, int cd) {
          float w;
          if constexpr (E != 0)
            w = inverse[cd];
          else
            w = args.inv_norm_text[cd * args.columns + at.j];
          const float logit = (difference[d] - difference[c]) * w;
          float up = exp2_fast(logit - K);
          const float down = exp2_fast(-logit - K);
          if (distinct && cd == ab && !at.own) up = 0;
          const float term = w < 0 ? 0.0f : up + down;
          sum += term;
          columns[cd] += term;
        });
      }
      sum = sum_over(sum);
      if (lane_of_thread() == 0) args.row_parts[(int64_t(blockIdx.y) * args.rows + at.row) * pairs + ab] = sum;
    }
  }
  write_columns<E>(args, at.j, columns, for_columns, pairs);
}

// dS and Σ of gradient times logit, both without the factor that all logits share (`CorrelationFinish`); a logit's
// gradient is (2^(l−K) − 2^(−l−K))·(1/row + 1/column).
template <int E, bool distinct>
__global__ void __launch_bounds__(kLanes<E>, kGradientsBlocks<E>) gradients_kernel(const Correlation args) {
  const int emotions = E ? E : args.emotions, pairs = int(pair_count(emotions));
  const Place<E> at(args);
  const float scale = value_of(args.scale), K = offset(scale);
  const float* block = args.product + at.row * emotions * at.stride + at.j;
  char* shared = shared_memory();
  float* for_columns = reinterpret_cast<float*>(shared);
  Slots<kPairs<E>> grad_dots(shared, pairs);
  Slots<E> difference(shared, emotions), grad_difference(shared, emotions), grad_before(shared, emotions);
  const Gradient<E> grad = {
      for_columns + (E ? pairs * kLanes<E> + int(threadIdx.x) : 0),
      args.grad_product + at.row * emotions * at.stride + at.j, at.stride, args.columns};
  float inverse[E ? kPairs<E> : 1], inv_sum[E ? kPairs<E> : 1];
  for_pairs<E>(emotions, [&](int, int, int cd) {
    if constexpr (E != 0) {
      inverse[cd] = at.inside ? args.inv_norm_text[cd * args.columns + at.j] : -1.0f;
      inv_sum[cd] = at.inside ? 1 / args.column_sum[at.j * pairs + cd] : 0.0f;
    }
    grad_dots[cd] = 0;
  });
  if (at.inside)
    for (int a = 0; a < emotions; ++a) for_emotions<E>(emotions, [&](int e) { grad(a, e) = 0; });

  for (int a = 0, ab = 0; at.row < args.rows && a < emotions; ++a) {
    for_emotions<E>(emotions, [&](int e) { grad_before[e] = 0; });
    for (int b = a + 1; b < emotions; ++b, ++ab) {
      const float row_norm = args.inv_norm_visual[at.i * pairs + ab], inv_row_sum = 1 / args.row_sum[at.i * pairs + ab];
      float grad_dot = 0;
      if (!(row_norm < 0) && at.inside) {
        for_emotions<E>(emotions, [&](int e) {
          const float* column = block + e * args.columns;
          difference[e] = (column[b * at.stride] - column[a * at.stride]) * (row_norm * scale * kLog2e);
          grad_difference[e] = 0;
        });
        for_pairs<E>(emotions, [&](int c, int d, int cd) {
          float w, inv_column_sum;
          if constexpr (E != 0) {
            w = inverse[cd], inv_column_sum = inv_sum[cd];
          } else {
            w = args.inv_norm_text[cd * args.columns + at.j];
            inv_column_sum = 1 / args.column_sum[at.j * pairs + cd];
          }
          const float logit = (difference[d] - difference[c]) * w;
          float up = exp2_fast(logit - K);
          const float down = exp2_fast(-logit - K);
          if (distinct && cd == ab && !at.own) up = 0;
          const float g = w < 0 ? 0.0f : (up - down) * (inv_row_sum + inv_column_sum);
          grad_dot += g * logit;
          grad_dots[cd] += g * logit;
          grad_difference[d] += g * w;
          grad_difference[c] -= g * w;
        });
        for_emotions<E>(emotions, [&](int e) {
          const float of = grad_difference[e] * row_norm;
          grad(b, e) += of;
          grad_before[e] -= of;
        });
      }
      grad_dot = sum_over(grad_dot);
      if (lane_of_thread() == 0) args.row_parts[(int64_t(blockIdx.y) * args.rows + at.row) * pairs + ab] = grad_dot;
    }
    if (at.inside) for_emotions<E>(emotions, [&](int e) { grad(a, e) += grad_before[e]; });
  }
  if (E != 0 && at.inside)
    for (int a = 0; a < emotions; ++a)
      for_emotions<E>(emotions, [&](int e) { grad.product[a * at.stride + e * args.columns] = grad(a, e); });
  write_columns<E>(args, at.j, grad_dots, for_columns, pairs);
}

// negatives="within": a block owns an individual and its E×E block of S.
struct Own {
  const float* block;
  int64_t i;
  int emotions, pairs;
  float scale, K;
  const Correlation& args;

  __device__ Own(const Correlation& args)
      : i(blockIdx.x), emotions(args.emotions), pairs(int(pair_count(args.emotions))), scale(value_of(args.scale)),
        K(offset(scale)), args(args) {
    block = args.product + i * emotions * emotions;
  }

  __device__ float inv_norm_visual(int ab) const { return args.inv_norm_visual[i * pairs + ab]; }
  __device__ float inv_norm_text(int cd) const { return args.inv_norm_text[cd * args.columns + i]; }

  __device__ float logit(int a, int b, int ab, int c, int d, int cd) const {
    const float* before = block + a * emotions;
    const float* after = block + b * emotions;
    return ((after[d] - after[c]) - (before[d] - before[c])) * inv_norm_visual(ab) * inv_norm_text(cd) *
           (scale * kLog2e);
  }

  // step(x, y, xy) for every valid pair of the other side.
  template <typename Valid, typename Step>
  __device__ void for_valid(Valid&& inverse, Step&& step) const {
    for (int x = 0, pair = 0; x < emotions; ++x)
      for (int y = x + 1; y < emotions; ++y, ++pair)
        if (!(inverse(pair) < 0)) step(x, y, pair);
  }

  // step(x, y, xy, along the row?) for this thread's rows and columns.
  template <typename Step>
  __device__ void for_lines(Step&& step) const {
    for (int line = int(threadIdx.x); line < 2 * pairs; line += kThreads) {
      const int pair = line % pairs;
      int x = 0, first = 0;  // pairs from emotion x on
      while (pair >= first + emotions - 1 - x) first += emotions - 1 - x++;
      step(x, x + 1 + pair - first, pair, line < pairs);
    }
  }

  // Σ over a row, or a column, of f(logit, ab, cd).
  template <typename F>
  __device__ float sum_line(int x, int y, int pair, bool row, F&& f) const {
    float sum = 0;
    if (row && !(inv_norm_visual(pair) < 0))
      for_valid(
          [&](int cd) { return inv_norm_text(cd); },
          [&](int c, int d, int cd) { sum += f(logit(x, y, pair, c, d, cd), pair, cd); });
    if (!row && !(inv_norm_text(pair) < 0))
      for_valid(
          [&](int ab) { return inv_norm_visual(ab); },
          [&](int a, int b, int ab) { sum += f(logit(a, b, ab, x, y, pair), ab, pair); });
    return sum;
  }
};

__global__ void __launch_bounds__(kThreads)
    sums_within_kernel(const Correlation args, float* row_sum, float* column_sum) {
  const Own own(args);
  own.for_lines([&](int x, int y, int pair, bool row) {
    (row ? row_sum : column_sum)[own.i * own.pairs + pair] = own.sum_line(
        x, y, pair, row, [&](float logit, int, int) { return exp2_fast(logit - own.K) + exp2_fast(-logit - own.K); });
  });
}

__global__ void __launch_bounds__(kThreads)
    gradients_within_kernel(const Correlation args, float* row_grad_dot, float* column_grad_dot) {
  const Own own(args);
  const auto gradient = [&](float logit, int ab, int cd) {
    const float inv_sum = 1 / args.row_sum[own.i * own.pairs + ab] + 1 / args.column_sum[own.i * own.pairs + cd];
    return (exp2_fast(logit - own.K) - exp2_fast(-logit - own.K)) * inv_sum;
  };
  own.for_lines([&](int x, int y, int pair, bool row) {
    const float grad_dot =
        own.sum_line(x, y, pair, row, [&](float logit, int ab, int cd) { return gradient(logit, ab, cd) * logit; });
    if (row)
      row_grad_dot[own.i * own.pairs + pair] = grad_dot;
    else
      column_grad_dot[pair * args.columns + own.i] = grad_dot;
  });
  // A thread owns dS[x, y]: it adds every pair with x against every pair with y, turned so that x and y are their ends.
  for (int at = threadIdx.x; at < own.emotions * own.emotions; at += kThreads) {
    const int x = at / own.emotions, y = at % own.emotions;
    float total = 0;
    for (int a = 0; a < own.emotions; ++a) {
      if (a == x) continue;
      const int ab = int(pair_index(a < x ? a : x, a < x ? x : a, own.emotions));
      if (own.inv_norm_visual(ab) < 0) continue;
      for (int c = 0; c < own.emotions; ++c) {
        if (c == y) continue;
        const int cd = int(pair_index(c < y ? c : y, c < y ? y : c, own.emotions));
        if (own.inv_norm_text(cd) < 0) continue;
        total += gradient(own.logit(a, x, ab, c, y, cd), ab, cd) * own.inv_norm_visual(ab) * own.inv_norm_text(cd);
      }
    }
    args.grad_product[own.i * own.emotions * own.emotions + at] = total;
  }
}

// Valid pairs, at least 1, in the first thread of a block that takes all of them.
__device__ float count_valid(const float* inv_norm_visual, int64_t pairs, float* warps) {
  float valid = 0;
  for (int64_t at = threadIdx.x; at < pairs; at += blockDim.x) valid += inv_norm_visual[at] < 0 ? 0.0f : 1.0f;
  return fmaxf(sum_over_block(valid, warps), 1.0f);
}

// A sum of all logits of a valid row or column is at least 2: the positive and its opposite. One of none is 0, and its
// logarithm −∞. Beyond the scale that float sums hold, both are NaN.
__global__ void logarithms_kernel(const CorrelationLogarithms args) {
  const float scale = value_of(args.scale), K = scale <= kMaxScale ? offset(scale) : nanf("");
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at < args.rows) {
    args.row_lse[at] = logf(args.row_sum[at]) + K * kLn2;
    args.positive[at] = scale * args.cosine[at];
  }
  if (at < args.columns) args.column_lse[at] = logf(args.column_sum[at]) + K * kLn2;
}

__global__ void exponentials_kernel(const CorrelationLogarithms args) {
  const float K = offset(value_of(args.scale));
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at < args.rows) args.row_sum[at] = expf(args.row_lse[at] - K * kLn2);
  if (at < args.columns) args.column_sum[at] = expf(args.column_lse[at] - K * kLn2);
}

__global__ void count_kernel(const float* inv_norm_visual, int64_t pairs, float* valid) {
  const float count = count_valid(inv_norm_visual, pairs, reinterpret_cast<float*>(shared_memory()));
  if (threadIdx.x == 0) *valid = count;
}

// One block adds everything up in a fixed order. Beyond the scale that float sums hold, the loss is NaN rather than
// wrong.
__global__ void result_kernel(const CorrelationResult args) {
  float* warps = reinterpret_cast<float*>(shared_memory());
  const float scale = value_of(args.scale), K = offset(scale);
  const int64_t pairs = args.individuals * pair_count(args.emotions);
  float total = 0;
  for (int64_t at = threadIdx.x; at < pairs; at += blockDim.x) {
    if (args.inv_norm_visual[at] < 0)
      args.row_sum[at] = args.column_sum[at] = 1;
    else
      total += 0.5f * (logf(args.row_sum[at]) + logf(args.column_sum[at])) + (K * kLn2 - scale * args.cosine[at]);
  }
  total = sum_over_block(total, warps);
  const float valid = count_valid(args.inv_norm_visual, pairs, warps);
  if (threadIdx.x == 0) *args.loss = scale <= kMaxScale ? total / valid : nanf("");
}

dim3 grid_of(const Correlation& args) {
  const CorrelationParts parts = correlation_parts(args.columns, args.emotions, args.rows);
  return {unsigned(parts.row_blocks), unsigned(parts.column_blocks)};
}

template <int E>
void launch_sums(const Correlation& args) {
  launch(
      args.distinct ? sums_kernel<E, true> : sums_kernel<E, false>, grid_of(args), kLanes<E>,
      shared_bytes<E>(args.emotions, false), args);
}

template <int E>
void launch_gradients(const Correlation& args) {
  launch(
      args.distinct ? gradients_kernel<E, true> : gradients_kernel<E, false>, grid_of(args), kLanes<E>,
      shared_bytes<E>(args.emotions, true), args);
}

}  // namespace

CorrelationParts correlation_parts(int64_t columns, int emotions, int64_t rows) {
  return {blocks(columns, kWarpSize), blocks(rows, known(emotions) ? kRows<8> : kRows<0>)};
}

CorrelationPlan correlation_plan(int emotions) {
  if (known(emotions)) return {kRows<8>, kSumsBlocks<8>, kGradientsBlocks<8>, true};
  return {kRows<0>, kSumsBlocks<0>, kGradientsBlocks<0>, false};
}

void correlation_sums(const Correlation& args) {
  switch (args.emotions) {
    case 7: return launch_sums<7>(args);
    case 8: return launch_sums<8>(args);
    default: return launch_sums<0>(args);
  }
}

void correlation_gradients(const Correlation& args) {
  switch (args.emotions) {
    case 7: return launch_gradients<7>(args);
    case 8: return launch_gradients<8>(args);
    default: return launch_gradients<0>(args);
  }
}

void correlation_sums_within(const Correlation& args, float* row_sum, float* column_sum) {
  launch(sums_within_kernel, {unsigned(args.columns)}, kThreads, 0, args, row_sum, column_sum);
}

void correlation_gradients_within(const Correlation& args, float* row_grad_dot, float* column_grad_dot) {
  launch(gradients_within_kernel, {unsigned(args.columns)}, kThreads, 0, args, row_grad_dot, column_grad_dot);
}

void correlation_result(const CorrelationResult& args) {
  constexpr int warps = 32;
  launch(result_kernel, {1}, warps * kWarpSize, warps * sizeof(float), args);
}

void correlation_count(const float* inv_norm_visual, int64_t pairs, float* valid) {
  constexpr int warps = 32;
  launch(count_kernel, {1}, warps * kWarpSize, warps * sizeof(float), inv_norm_visual, pairs, valid);
}

void correlation_logarithms(const CorrelationLogarithms& args) {
  launch(logarithms_kernel, {blocks(std::max(args.rows, args.columns), kThreads)}, kThreads, 0, args);
}

void correlation_exponentials(const CorrelationLogarithms& args) {
  launch(exponentials_kernel, {blocks(std::max(args.rows, args.columns), kThreads)}, kThreads, 0, args);
}

}  // namespace pcmecl::cuda
