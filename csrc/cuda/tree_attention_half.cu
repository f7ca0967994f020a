// tree_attention of float16 and bfloat16, on tensor cores.
//
// A warp owns sixteen tokens of a head, and of a head wider than 64 also 64 features of the result. As queries they see
// the prefix and what lies between the beginning of the first one's segment and the last one: sixteen keys at a time,
// with a running softmax. Logits are a product along the features, whose order is free, so that a lane's terms are
// eight neighbours of a row; the result is one along the keys, whose columns are free, so that they are again. Every
// row is read and written 16 bytes at a time, straight from and to memory: nothing is shared, nothing waits.
//
// Backward, two launches. The first writes each query's ⟨grad, out⟩ as Σ weight · ⟨grad, value⟩: by the result that was
// rounded, a query's gradients of logits would not add up to 0, and what they err by adds up over the queries of a key.
// In the second, half of the warps own tokens as queries and write their dQ, half own them as keys: they visit the
// queries that see them, and write dK and dV. Nothing is atomic. Softmax and sums are in float32; weights and their
// gradients enter products as two numbers of the type, in float16 times a power of two (`Range`).
//
// Bytes: q, k, v once from memory (the keys again from the cache), out. Of 16 queries against 16 keys, 64 features
// wide: 32 products of 16×8×16 forward, 16 + 32 + 48 backward. Bound by the latency of the cache at a prompt tree's
// size.
#include "kernels.h"
#include "scale.h"
#include "tensor_cores.h"
#include "tree.h"
#include "warp.h"

namespace pcmecl::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTokens = 16;       // of a warp
constexpr int kFeatures = 64;     // of a warp's result
constexpr int kStep = 32;         // features that a load by a warp takes of each row
constexpr float kNoKey = -1e30f;  // finite, so that no difference is NaN

__host__ __device__ inline unsigned parts_of(int width) { return unsigned(width + kFeatures - 1) / kFeatures; }

int tiles_of(int tokens) { return (tokens + kTokens - 1) / kTokens; }

// Rows of one head, a token each.
template <typename T>
struct Rows {
  T* first;
  int stride;

  __device__ T* operator[](int token) const { return first + int64_t(token) * stride; }
};

__device__ __forceinline__ int at_most(int x, int limit) { return x < limit ? x : limit; }

// Where a warp stands. Blocks are numbered through from `block` on, those of a person one after another.
template <typename T>
struct Tile {
  const Tree<T>& args;
  const TreeLayout& layout;
  unsigned person;
  int head, token, column;  // the first of its tokens and of its features
  bool inside;

  __device__ Tile(
      const Tree<T>& args, const TreeLayout& layout, unsigned block, unsigned blocks_of_person, unsigned parts)
      : args(args), layout(layout), person(block / blocks_of_person) {
    const unsigned tiles = unsigned(layout.tokens + kTokens - 1) / kTokens;
    const unsigned number = (block - person * blocks_of_person) * kWarps + warp_of_thread();
    const unsigned rest = number / parts;
    head = int(rest / tiles);
    token = int(rest - head * tiles) * kTokens;
    column = int(number - rest * parts) * kFeatures;
    inside = head < args.heads;
  }

  // Of qkv, or of its gradient: 0 queries, 1 keys, 2 values.
  template <typename U>
  __device__ Rows<U> packed(U* from, int which) const {
    const int64_t heads_width = int64_t(args.heads) * args.width;
    return {
        from + (int64_t(person) * layout.tokens * 3 + which) * heads_width + head * args.width, int(3 * heads_width)};
  }
  template <typename U>
  __device__ Rows<U> plain(U* from) const {
    const int64_t heads_width = int64_t(args.heads) * args.width;
    return {from + int64_t(person) * layout.tokens * heads_width + head * args.width, int(heads_width)};
  }
  __device__ int64_t of_lse(int of_token) const {
    return (int64_t(person) * args.heads + head) * layout.tokens + of_token;
  }
};

// Sixteen rows as the left side of products along the features: held, or in wide heads read again for each. Behind the
// last token there are copies of its row, here and below: what they give is nobody's.
template <typename T, int V, bool wide>
struct Left {
  const T *above, *below;  // this lane's two rows
  int width;
  Eight held[wide ? 1 : kFeatures / kStep][2];

  __device__ __forceinline__ Left(const Rows<const T>& rows, int token, int tokens, int width) : width(width) {
    above = rows[at_most(token + group_of_lane(), tokens - 1)];
    below = rows[at_most(token + group_of_lane() + 8, tokens - 1)];
    if constexpr (!wide) {
#pragma unroll
      for (int step = 0; step < kFeatures / kStep; ++step) read(step, held[step]);
    }
  }

  __device__ __forceinline__ void read(int step, Eight (&to)[2]) const {
    const int at = step * kStep + 8 * pair_of_lane();
    to[0] = load_eight<V>(above, at, width);
    to[1] = load_eight<V>(below, at, width);
  }

  // f(step, this lane's part of both rows)
  template <typename F>
  __device__ __forceinline__ void for_steps(F&& f) const {
    if constexpr (wide) {
      for (int step = 0; step * kStep < width; ++step) {
        Eight rows[2];
        read(step, rows);
        f(step, rows);
      }
    } else {
#pragma unroll
      for (int step = 0; step < kFeatures / kStep; ++step) f(step, held[step]);
    }
  }

  // to += these rows times eight others, of which `row` is this group's.
  __device__ __forceinline__ void times(const T* row, float (&to)[4]) const {
    for_steps([&](int step, const Eight(&own)[2]) {
      const Eight other = load_any<V>(row, step * kStep + 8 * pair_of_lane(), width);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t a[4] = {
            own[0].values[2 * half], own[1].values[2 * half], own[0].values[2 * half + 1], own[1].values[2 * half + 1]};
        const uint32_t b[2] = {other.values[2 * half], other.values[2 * half + 1]};
        multiply_add<T>(to, a, b);
      }
    });
  }
};

// The four rows that a lane holds of sixteen, as the right side of products along the tokens.
template <typename T, int V>
struct Right {
  Eight held[4];

  // find(k): the row of token k of the sixteen.
  template <typename Find>
  __device__ __forceinline__ Right(int column, int width, Find&& find) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      held[k] = load_any<V>(find(k / 2 * 8 + pair_of_lane() * 2 + k % 2), column + 8 * group_of_lane(), width);
  }

  // Column n of result t is feature 8·n + t of the warp's.
  __device__ __forceinline__ void add_to(float (&to)[8][4], const Split<T>& weights) const {
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      uint32_t b[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t first = held[2 * k].values[t / 2], second = held[2 * k + 1].values[t / 2];
        b[k] = t % 2 ? upper_halves(first, second) : lower_halves(first, second);
      }
      multiply_add<T>(to[t], weights.high, b);
      multiply_add<T>(to[t], weights.low, b);
    }
  }
};

// Writes what `Right::add_to` added up, each row times its factor.
template <int V, typename T>
__device__ __forceinline__ void write(
    const Rows<T>& rows, const Tile<T>& tile, const float (&from)[8][4], const float (&by)[2]) {
#pragma unroll
  for (int lower_row = 0; lower_row < 2; ++lower_row) {
    const int token = tile.token + group_of_lane() + 8 * lower_row;
    if (token >= tile.layout.tokens) continue;
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      float values[8];
#pragma unroll
      for (int t = 0; t < 8; ++t) values[t] = from[t][2 * lower_row + second] * by[lower_row];
      store_eight<V>(rows[token], tile.column + 16 * pair_of_lane() + 8 * second, tile.args.width, values);
    }
  }
}

// The keys that a warp's queries see, numbered from 0: the prefix, then from the first query's segment on.
struct Keys {
  int prefix, count, skip;
  int first_own[2], last[2];  // of this lane's two queries: the first key of their own segments, and the last they see

  __device__ Keys(const TreeLayout& layout, int token) : prefix(layout.prefix) {
    const int end = token + kTokens < layout.tokens ? token + kTokens : layout.tokens;
    const int of_lane = token + lane_of_thread() % kTokens;
    const int begin = of_lane < layout.tokens ? Span(layout, of_lane).begin : 0;  // 0 in the prefix
    skip = token < prefix ? 0 : __shfl_sync(kAllLanes, begin, 0) - prefix;
    count = end - skip;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int query = group_of_lane() + 8 * row;
      first_own[row] = __shfl_sync(kAllLanes, begin, query) - skip;
      last[row] = token + query - skip;
    }
  }

  __device__ bool sees(int row, int key) const { return key <= last[row] && (key < prefix || key >= first_own[row]); }
  __device__ int token(int key) const {
    const int existing = at_most(key, count - 1);
    return existing < prefix ? existing : existing + skip;
  }
};

template <typename T, int V, bool wide>
__global__ void __launch_bounds__(kThreads, V == 8 ? 4 : 3)
    forward_kernel(const Tree<T> args, const TreeLayout layout, unsigned blocks_of_person) {
  const Tile<T> tile(args, layout, blockIdx.x, blocks_of_person, parts_of(args.width));
  if (!tile.inside) return;
  const Left<T, V, wide> queries(tile.packed(args.qkv, 0), tile.token, layout.tokens, args.width);
  const Rows<const T> key_rows = tile.packed(args.qkv, 1), value_rows = tile.packed(args.qkv, 2);
  const Keys keys(layout, tile.token);
  const float scale = kLog2e / sqrtf(float(args.width));
  float sums[8][4] = {}, largest[2] = {kNoKey, kNoKey}, total[2] = {};

  for (int first = 0; first < keys.count; first += kTokens) {
    const Right<T, V> values(tile.column, args.width, [&](int k) { return value_rows[keys.token(first + k)]; });
    float logits[2][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (first + 8 * half < keys.count)
        queries.times(key_rows[keys.token(first + 8 * half + group_of_lane())], logits[half]);
    }
    float keep[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float most = largest[row];
#pragma unroll
      for (int at = 0; at < 4; ++at) {
        float& logit = logits[at / 2][2 * row + at % 2];
        logit = keys.sees(row, first + at / 2 * 8 + 2 * pair_of_lane() + at % 2) ? logit * scale : kNoKey;
        most = fmaxf(most, logit);
      }
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      keep[row] = exp2_fast(largest[row] - most);
      largest[row] = most;
      total[row] *= keep[row];
#pragma unroll
      for (int at = 0; at < 4; ++at) {
        float& weight = logits[at / 2][2 * row + at % 2];
        weight = weight == kNoKey ? 0.0f : exp2_fast(weight - most);
        total[row] += weight;
      }
    }
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
      for (int at = 0; at < 4; ++at) sums[t][at] *= keep[at / 2];
    values.add_to(sums, Split<T>(logits));
  }

  float inverse[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    total[row] = sum_over<4>(total[row]);
    inverse[row] = 1 / total[row];
    const int token = tile.token + group_of_lane() + 8 * row;
    if (pair_of_lane() == 0 && tile.column == 0 && token < layout.tokens)
      args.lse[tile.of_lse(token)] = largest[row] + log2f(total[row]);
  }
  write<V>(tile.plain(args.out), tile, sums, inverse);
}

// Sixteen queries with their gradients, as both launches of the backward know them.
template <typename T, int V, bool wide>
struct Queries {
  Left<T, V, wide> rows, grads;
  Rows<const T> key_rows, value_rows;
  Keys keys;
  float scale, lse[2];

  __device__ __forceinline__ explicit Queries(const Tile<T>& tile)
      : rows(tile.packed(tile.args.qkv, 0), tile.token, tile.layout.tokens, tile.args.width),
        grads(tile.plain(tile.args.grad), tile.token, tile.layout.tokens, tile.args.width),
        key_rows(tile.packed(tile.args.qkv, 1)), value_rows(tile.packed(tile.args.qkv, 2)),
        keys(tile.layout, tile.token), scale(kLog2e / sqrtf(float(tile.args.width))) {
#pragma unroll
    for (int row = 0; row < 2; ++row) lse[row] = tile.args.lse[of_lse(tile, row)];
  }

  __device__ static int64_t of_lse(const Tile<T>& tile, int row) {
    return tile.of_lse(at_most(tile.token + group_of_lane() + 8 * row, tile.layout.tokens - 1));
  }

  // Of the eight keys from `first` on: their weights, 0 where a query does not see them, and the weights' gradients.
  __device__ __forceinline__ void measure(int first, float (&weights)[4], float (&grad_weights)[4]) const {
    const int token = keys.token(first + group_of_lane());
    rows.times(key_rows[token], weights);
    grads.times(value_rows[token], grad_weights);
#pragma unroll
    for (int at = 0; at < 4; ++at) {
      const float weight = exp2_fast(capped(weights[at] * scale - lse[at / 2], 0.0f));
      weights[at] = keys.sees(at / 2, first + 2 * pair_of_lane() + at % 2) ? weight : 0.0f;
    }
  }
};

template <typename T, int V, bool wide>
__global__ void __launch_bounds__(kThreads, V == 8 ? 4 : 3)
    means_kernel(const Tree<T> args, const TreeLayout layout, unsigned blocks_of_person) {
  const Tile<T> tile(args, layout, blockIdx.x, blocks_of_person, 1);
  if (!tile.inside) return;
  const Queries<T, V, wide> queries(tile);
  float mean[2] = {}, total[2] = {};
  for (int first = 0; first < queries.keys.count; first += kTokens / 2) {
    float weights[4] = {}, grad_weights[4] = {};
    queries.measure(first, weights, grad_weights);
#pragma unroll
    for (int at = 0; at < 4; ++at) {
      if (weights[at] == 0) continue;  // what is not seen may be anything
      mean[at / 2] += weights[at] * grad_weights[at];
      total[at / 2] += weights[at];
    }
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    mean[row] = sum_over<4>(mean[row]) / sum_over<4>(total[row]);  // the weights' sum is 1 but for the rounding of lse
    if (pair_of_lane() == 0 && tile.token + group_of_lane() + 8 * row < layout.tokens)
      args.means[Queries<T, V, wide>::of_lse(tile, row)] = mean[row];
  }
}

// Float16 ends at 65504 and has few bits near 0, where gradients of logits may lie: they enter products times a power
// of two for each row, which follows the largest so far, and so do the sums. Other types have float's exponents.
template <typename T>
struct Range {
  static constexpr bool kNeeded = std::is_same_v<T, Half>;
  int exponent[2] = {253, 253};  // as float has it, 127 for 1; of this lane's two rows

  __device__ __forceinline__ void fit(float (&numbers)[2][4], float (&sums)[8][4]) {
    if constexpr (!kNeeded) return;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float most = 0;
#pragma unroll
      for (int at = 0; at < 4; ++at) most = fmaxf(most, fabsf(numbers[at / 2][2 * row + at % 2]));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      const int fitting = 127 + 14 - (int(bits_of(most) >> 23) - 127), before = exponent[row];
      exponent[row] = at_most(before, fitting);
      const float by = power(exponent[row]), change = power(exponent[row] - before + 127);
#pragma unroll
      for (int at = 0; at < 4; ++at) numbers[at / 2][2 * row + at % 2] *= by;
#pragma unroll
      for (int t = 0; t < 8; ++t) sums[t][2 * row] *= change, sums[t][2 * row + 1] *= change;
    }
  }

  // What the sums of a row have to be multiplied with.
  __device__ __forceinline__ float inverse(int row) const { return kNeeded ? power(254 - exponent[row]) : 1.0f; }

  __device__ static float power(int exponent) { return float_of(uint32_t(exponent > 0 ? exponent : 0) << 23); }
};

// dQ of sixteen queries.
template <typename T, int V, bool wide>
__device__ __forceinline__ void write_queries(const Tile<T>& tile) {
  const Tree<T>& args = tile.args;
  const Queries<T, V, wide> queries(tile);
  const Keys& keys = queries.keys;
  const float scale = 1 / sqrtf(float(args.width));
  float mean[2], sums[8][4] = {};
  Range<T> range;
#pragma unroll
  for (int row = 0; row < 2; ++row) mean[row] = args.means[Queries<T, V, wide>::of_lse(tile, row)];

  for (int first = 0; first < keys.count; first += kTokens) {
    const Right<T, V> of_keys(tile.column, args.width, [&](int k) { return queries.key_rows[keys.token(first + k)]; });
    float grad_logits[2][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (first + 8 * half >= keys.count) continue;
      float grad_weights[4] = {};
      queries.measure(first + 8 * half, grad_logits[half], grad_weights);
#pragma unroll
      for (int at = 0; at < 4; ++at) {
        float& number = grad_logits[half][at];
        number = number == 0 ? 0.0f : number * (grad_weights[at] - mean[at / 2]);
      }
    }
    range.fit(grad_logits, sums);
    of_keys.add_to(sums, Split<T>(grad_logits));
  }
  write<V>(tile.packed(args.grad_qkv, 0), tile, sums, {scale * range.inverse(0), scale * range.inverse(1)});
}

// dK and dV of sixteen keys. Products are the other way round: their rows are keys, their columns queries.
template <typename T, int V, bool wide>
__device__ __forceinline__ void write_keys(const Tile<T>& tile) {
  const Tree<T>& args = tile.args;
  const TreeLayout& layout = tile.layout;
  const int tokens = layout.tokens;
  const Left<T, V, wide> keys(tile.packed(args.qkv, 1), tile.token, tokens, args.width);
  const Left<T, V, wide> values(tile.packed(args.qkv, 2), tile.token, tokens, args.width);
  const Rows<const T> query_rows = tile.packed(args.qkv, 0), grad_rows = tile.plain(args.grad);
  // Weights enter their product times 2^14, so that small ones keep their bits in float16, too.
  constexpr float kLift = Range<T>::kNeeded ? 14.0f : 0.0f, kLower = Range<T>::kNeeded ? 1.0f / (1 << 14) : 1.0f;
  const float scale = 1 / sqrtf(float(args.width));
  float to_key[8][4] = {}, to_value[8][4] = {};
  Range<T> range;

  // One past the last query that sees a key, which is the first.
  const int of_lane = tile.token + lane_of_thread() % kTokens;
  const int end_of_lane = of_lane >= tokens ? 0 : of_lane < layout.prefix ? tokens : Span(layout, of_lane).end;
  int end = end_of_lane;
#pragma unroll
  for (int other = kTokens / 2; other > 0; other /= 2) {
    const int theirs = __shfl_xor_sync(kAllLanes, end, other);
    end = theirs > end ? theirs : end;
  }
  const int own[2] = {tile.token + group_of_lane(), tile.token + group_of_lane() + 8};
  const int end_of[2] = {
      __shfl_sync(kAllLanes, end_of_lane, group_of_lane()), __shfl_sync(kAllLanes, end_of_lane, group_of_lane() + 8)};

  for (int first = tile.token; first < end; first += kTokens) {
    const auto token = [&](int k) { return at_most(first + k, end - 1); };
    const Right<T, V> of_grads(tile.column, args.width, [&](int k) { return grad_rows[token(k)]; });
    const Right<T, V> of_queries(tile.column, args.width, [&](int k) { return query_rows[token(k)]; });
    float weights[2][4] = {}, grad_logits[2][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (first + 8 * half >= end) continue;
      const int of_group = token(8 * half + group_of_lane());
      float logits[4] = {}, grad_weights[4] = {};
      keys.times(query_rows[of_group], logits);
      values.times(grad_rows[of_group], grad_weights);
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int query = first + 8 * half + 2 * pair_of_lane() + column;
        const int64_t of_query = tile.of_lse(at_most(query, end - 1));
        const float mean = args.means[of_query], lse = args.lse[of_query] - kLift;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int at = 2 * row + column;
          const bool seen = query >= own[row] && query < end_of[row];
          const float weight = seen ? exp2_fast(capped(logits[at] * (scale * kLog2e) - lse, kLift)) : 0.0f;
          weights[half][at] = weight;
          grad_logits[half][at] = seen ? weight * (grad_weights[at] - mean) : 0.0f;
        }
      }
    }
    range.fit(grad_logits, to_key);
    of_grads.add_to(to_value, Split<T>(weights));
    of_queries.add_to(to_key, Split<T>(grad_logits));
  }
  const float of_keys = scale * kLower;
  write<V>(tile.packed(args.grad_qkv, 1), tile, to_key, {of_keys * range.inverse(0), of_keys * range.inverse(1)});
  write<V>(tile.packed(args.grad_qkv, 2), tile, to_value, {kLower, kLower});
}

template <typename T, int V, bool wide>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const Tree<T> args, const TreeLayout layout, unsigned blocks_of_person) {
  const unsigned half = gridDim.x / 2;  // the longer ones, those of the prefix as keys, begin early
  const bool of_keys = blockIdx.x < half;
  const Tile<T> tile(args, layout, of_keys ? blockIdx.x : blockIdx.x - half, blocks_of_person, parts_of(args.width));
  if (!tile.inside) return;
  if (of_keys)
    write_keys<T, V, wide>(tile);
  else
    write_queries<T, V, wide>(tile);
}

unsigned blocks_of_person(const TreeLayout& layout, int heads, unsigned parts) {
  return blocks(int64_t(heads) * tiles_of(layout.tokens) * parts, kWarps);
}

// f(V, wide), both known to the compiler. Rows that are not aligned take registers: none are held.
template <typename F>
void for_shape(int width, bool vector, F&& f) {
  if (!vector) return f(std::integral_constant<int, 1>(), std::true_type());
  width <= kFeatures ? f(std::integral_constant<int, 8>(), std::false_type())
                     : f(std::integral_constant<int, 8>(), std::true_type());
}

}  // namespace

template <typename T>
void tree_forward(const Tree<T>& args, const TreeLayout& layout) {
  const unsigned of_person = blocks_of_person(layout, args.heads, parts_of(args.width));
  for_shape(args.width, aligned(args.width, args.qkv, args.out), [&](auto vector, auto wide) {
    launch(
        forward_kernel<T, vector(), wide()>, {unsigned(args.people * of_person)}, kThreads, 0, args, layout, of_person);
  });
}

template <typename T>
void tree_backward(const Tree<T>& args, const TreeLayout& layout) {
  const unsigned of_person = blocks_of_person(layout, args.heads, parts_of(args.width));
  const unsigned whole_of_person = blocks_of_person(layout, args.heads, 1);
  const bool vector = aligned(args.width, args.qkv, args.grad, args.grad_qkv);
  for_shape(args.width, vector, [&](auto vector, auto wide) {
    launch(
        means_kernel<T, vector(), wide()>, {unsigned(args.people * whole_of_person)}, kThreads, 0, args, layout,
        whole_of_person);
    launch(
        backward_kernel<T, vector(), wide()>, {unsigned(2 * args.people * of_person)}, kThreads, 0, args, layout,
        of_person);
  });
}

#define PCMECL_FOR(T)                                               \
  template void tree_forward<T>(const Tree<T>&, const TreeLayout&); \
  template void tree_backward<T>(const Tree<T>&, const TreeLayout&);
PCMECL_FOR(Half)
PCMECL_FOR(BFloat16)
#undef PCMECL_FOR

}  // namespace pcmecl::cuda
