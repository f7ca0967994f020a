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

#include "emotions.h"
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

// Valid pairs, at least 1.
__global__ void count_kernel(const float* inv_norm_visual, int64_t pairs, float* valid) {
  float count[1] = {};
#pragma unroll 4
  for (int64_t at = threadIdx.x; at < pairs; at += blockDim.x) count[0] += inv_norm_visual[at] < 0 ? 0.0f : 1.0f;
  sum_over_block(count, reinterpret_cast<float*>(shared_memory()));
  if (threadIdx.x == 0) *valid = fmaxf(count[0], 1.0f);
}

// A product of positive numbers that may lie beyond float: exponents are added up as integers.
struct Product {
  float mantissa = 1;
  int exponent = 0;

  __device__ __forceinline__ void take(float x) {
    exponent += int(bits_of(x) >> 23) - 127;
    mantissa *= mantissa_of(x);
  }
  // log2 of 2^exponents · the product, of at most 2^7 numbers.
  __device__ __forceinline__ float log2(int exponents) const {
    const int of_mantissa = int(bits_of(mantissa) >> 23) - 127;
    return float(exponent + of_mantissa + exponents) + log2_fast(mantissa_of(mantissa));
  }
  __device__ static float mantissa_of(float x) { return float_of((bits_of(x) & 0x7FFFFF) | 127u << 23); }
};

// The sums of V pairs' parts of the loss, and how many are valid.
template <int V>
__device__ __forceinline__ void add_pairs(
    const CorrelationResult& args, int64_t at, float scale, int of_pair, float& total, int& valid) {
  float inverse[V], rows[V], columns[V], cosines[V], cosine = 0;
  load(args.inv_norm_visual + at, inverse);
  load(args.row_sum + at, rows);
  load(args.column_sum + at, columns);
  load(args.cosine + at, cosines);
  Product product;
  int count = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (inverse[v] < 0)
      rows[v] = columns[v] = 1;
    else
      ++count;
    product.take(rows[v]);
    product.take(columns[v]);
    cosine += cosines[v];  // of a pair that is not valid 0
  }
  total += 0.5f * kLn2 * product.log2(count * of_pair) - scale * cosine;
  valid += count;
  if (count == V) return;
  store(args.row_sum + at, rows);
  store(args.column_sum + at, columns);
}

// One block adds everything up in a fixed order. Beyond the scale that float sums hold, the loss is NaN rather than
// wrong. It is NaN with features that are no numbers, too: the cosine is, even if the product of sums is not.
template <int V>
__global__ void result_kernel(const CorrelationResult args) {
  const float scale = value_of(args.scale);
  const int of_pair = scale <= kMaxScale ? 2 * int(offset(scale)) : 0;
  const int64_t pairs = args.individuals * pair_count(args.emotions), packs = pairs / V;
  float total = 0;
  int valid = 0;
#pragma unroll 1
  for (int64_t pack = threadIdx.x; pack < packs; pack += blockDim.x)
    add_pairs<V>(args, pack * V, scale, of_pair, total, valid);
#pragma unroll 1
  for (int64_t at = packs * V + threadIdx.x; at < pairs; at += blockDim.x)
    add_pairs<1>(args, at, scale, of_pair, total, valid);
  float sums[2] = {total, float(valid)};
  sum_over_block(sums, reinterpret_cast<float*>(shared_memory()));
  if (threadIdx.x == 0) *args.loss = scale <= kMaxScale ? sums[0] / fmaxf(sums[1], 1.0f) : nanf("");
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

void correlation_result(const CorrelationResult& args) {
  constexpr int warps = 32;
  const bool vector = aligned(4, args.inv_norm_visual, args.cosine, args.row_sum, args.column_sum);
  launch(vector ? result_kernel<4> : result_kernel<1>, {1}, warps * kWarpSize, 2 * warps * sizeof(float), args);
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
