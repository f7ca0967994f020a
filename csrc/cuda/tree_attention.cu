// tree_attention of float32; tree_attention_half.cu has that of half types.
//
// A token sees the prefix and its own description's past: with one-word names a dozen of some hundred tokens. So
// nothing is tiled and no mask is read: a warp owns one token of one head and visits only the keys that it sees,
// straight from the packed qkv. Eight lanes share a key, 16 bytes each where aligned, and a warp takes four keys at a
// time, with a running softmax per group of lanes that is merged at the end. A group without a key repeats the last one
// and gives it no weight. Any number of tokens; a head's width up to 256.
//
// Backward, one launch: half of the blocks own tokens as queries and write their dQ, the other half as keys: they visit
// the queries that see them and write dK and dV. Nothing is atomic. ⟨grad, out⟩ of a query is recomputed where it is
// needed. Bytes: q, k, v once from memory (the keys again from the cache), out. Operations: 4·d a pair of tokens that
// see each other forward, 14·d backward, on the ordinary units: a tensor core's TF32 has too few bits for float32.
// Bound by the latency of the cache.
#include "kernels.h"
#include "scale.h"
#include "tree.h"
#include "warp.h"

namespace pcmecl::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPeople = 65535;  // of one launch: what a grid's last axis takes
// Blocks that a multiprocessor has to hold with P numbers of a row to a lane: with more the compiler spills registers.
template <int P>
constexpr int kBlocks = P == 8 ? 4 : 2;
constexpr int kGroup = 8, kGroups = kWarpSize / kGroup;
constexpr float kNoKey = -1e30f;  // finite, so that no difference is NaN

__device__ __forceinline__ int group_of_thread() { return lane_of_thread() / kGroup; }

// A row's numbers to a lane: eight lanes hold a head's width, V neighbours at a time. What lies behind it is 0; a width
// of P·8 is `whole`.
template <int V, int P, bool whole>
struct Shape {
  static constexpr int kParts = P / V, kStride = kGroup * V;
  int width;

  __device__ __forceinline__ static int first() { return lane_of_thread() % kGroup * V; }
  __device__ __forceinline__ bool has(int part) const { return whole || first() + part * kStride < width; }

  // step(p, number p of this lane); `row` is where the lane's first one lies.
  template <typename Step>
  __device__ __forceinline__ void for_row(const float* row, Step&& step) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float values[V] = {};
      if (has(part)) load(row + part * kStride, values);
#pragma unroll
      for (int v = 0; v < V; ++v) step(part * V + v, values[v]);
    }
  }

  __device__ __forceinline__ void read(const float* row, float (&to)[P]) const {
    for_row(row, [&](int p, float number) { to[p] = number; });
  }

  // Adds the four groups' rows up and writes the sum times `by`.
  __device__ __forceinline__ void write(float* row, float by, float (&from)[P]) const {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      from[p] += __shfl_xor_sync(kAllLanes, from[p], kGroup);
      from[p] += __shfl_xor_sync(kAllLanes, from[p], 2 * kGroup);
    }
    if (group_of_thread() != 0) return;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float values[V];
#pragma unroll
      for (int v = 0; v < V; ++v) values[v] = from[part * V + v] * by;
      if (has(part)) store(row + part * kStride, values);
    }
  }
};

template <int P>
__device__ __forceinline__ float dot(const float (&x)[P], const float (&y)[P]) {
  float total = 0;
#pragma unroll
  for (int p = 0; p < P; ++p) total += x[p] * y[p];
  return sum_over<kGroup>(total);
}

// In units of log 2, rounded before anything is subtracted, and the same whichever of the two is the row: the backward
// finds the forward's logits to the last bit. Else a huge one might exceed its log-sum-exp by any number.
template <int P>
__device__ __forceinline__ float logit_of(const float (&x)[P], const float (&y)[P], float scale) {
  return rounded_product(dot(x, y), scale * kLog2e);
}

template <int P>
__device__ __forceinline__ void add(float (&to)[P], float by, const float (&x)[P]) {
#pragma unroll
  for (int p = 0; p < P; ++p) to[p] += by * x[p];
}

// The head of a person that a block is of, and where this lane's numbers of its first token lie.
struct Head {
  int stride, packed_stride;  // from token to token
  int64_t packed, plain, lse;

  __device__ __forceinline__ Head(const Tree<float>& args, const TreeLayout& layout, int first)
      : stride(args.heads * args.width), packed_stride(3 * stride) {
    const int64_t person = blockIdx.z, head = blockIdx.y;
    plain = person * layout.tokens * stride + head * args.width + first;
    packed = plain + 2 * (person * layout.tokens) * stride;
    lse = (person * args.heads + head) * layout.tokens;
  }

  // Row `which` of qkv: 0 query, 1 key, 2 value.
  template <typename U>
  __device__ __forceinline__ U* packed_row(U* qkv, int which, int token) const {
    return qkv + packed + which * stride + int64_t(token) * packed_stride;
  }
  template <typename U>
  __device__ __forceinline__ U* plain_row(U* from, int token) const {
    return from + plain + int64_t(token) * stride;
  }
};

// The keys that a query sees, numbered from 0.
struct Keys {
  int prefix, count, skip;

  __device__ __forceinline__ Keys(const TreeLayout& layout, int token) {
    const Span span(layout, token);
    const bool in_prefix = token < layout.prefix;
    prefix = layout.prefix;
    skip = in_prefix ? 0 : span.begin - layout.prefix;
    count = token + 1 - skip;
  }
  __device__ __forceinline__ int operator[](int at) const {
    const int existing = at < count ? at : count - 1;
    return existing < prefix ? existing : existing + skip;
  }
};

// The larger one; NaN stays in what it is subtracted from.
__device__ __forceinline__ float larger(float x, float y) { return !(y <= x) ? y : x; }

__device__ __forceinline__ float log2_of(float x) {
  const uint32_t bits = bits_of(x), one = 127u << 23;
  if (!(x < kInfinity)) return x;
  return float(int(bits >> 23) - 127) + log2_fast(float_of((bits & 0x7FFFFF) | one));
}

template <int V, int P, bool whole>
__global__ void __launch_bounds__(kThreads, kBlocks<P>)
    forward_kernel(const Tree<float> args, const TreeLayout layout, float scale) {
  const int token = int(blockIdx.x) * kWarps + warp_of_thread();
  if (token >= layout.tokens) return;
  const Shape<V, P, whole> shape = {args.width};
  const Head head(args, layout, shape.first());
  const Keys keys(layout, token);
  const float *key_rows = head.packed_row(args.qkv, 1, 0), *value_rows = head.packed_row(args.qkv, 2, 0);
  float query[P], sums[P] = {}, largest = kNoKey, total = 0;
  shape.read(head.packed_row(args.qkv, 0, token), query);

#pragma unroll 1
  for (int first = 0; first < keys.count; first += kGroups) {
    const int at = first + group_of_thread();
    const int64_t row = int64_t(keys[at]) * head.packed_stride;
    float key[P], value[P];
    shape.read(key_rows + row, key);
    shape.read(value_rows + row, value);
    const float seen = logit_of(query, key, scale), logit = at < keys.count ? seen : kNoKey, before = largest;
    largest = larger(largest, logit);
    const float keep = exp2_fast(before - largest), weight = at < keys.count ? exp2_fast(logit - largest) : 0.0f;
    total = total * keep + weight;
#pragma unroll
    for (int p = 0; p < P; ++p) sums[p] = sums[p] * keep + weight * value[p];
  }

  float of_all = largest;
#pragma unroll
  for (int other = kGroup; other < kWarpSize; other *= 2)
    of_all = larger(of_all, __shfl_xor_sync(kAllLanes, of_all, other));
  const float rescale = exp2_fast(largest - of_all);
  total *= rescale;
#pragma unroll
  for (int p = 0; p < P; ++p) sums[p] *= rescale;
  total += __shfl_xor_sync(kAllLanes, total, kGroup);
  total += __shfl_xor_sync(kAllLanes, total, 2 * kGroup);
  shape.write(head.plain_row(args.out, token), 1 / total, sums);
  if (lane_of_thread() == 0) args.lse[head.lse + token] = of_all + log2_of(total);
}

template <int V, int P, bool whole>
__device__ __forceinline__ void write_query(
    const Tree<float>& args, const TreeLayout& layout, float scale, const Head& head, int token) {
  const Shape<V, P, whole> shape = {args.width};
  const Keys keys(layout, token);
  const float *key_rows = head.packed_row(args.qkv, 1, 0), *value_rows = head.packed_row(args.qkv, 2, 0);
  const float lse = args.lse[head.lse + token];
  float query[P], grad[P], sums[P] = {}, mean = 0;
  shape.read(head.packed_row(args.qkv, 0, token), query);
  shape.read(head.plain_row(args.grad, token), grad);
  shape.for_row(head.plain_row(args.out, token), [&](int p, float x) { mean += grad[p] * x; });
  mean = sum_over<kGroup>(mean);
#pragma unroll 1
  for (int first = 0; first < keys.count; first += kGroups) {
    const int at = first + group_of_thread();
    const int64_t row = int64_t(keys[at]) * head.packed_stride;
    float key[P], of_weight = 0;
    shape.read(key_rows + row, key);
    shape.for_row(value_rows + row, [&](int p, float x) { of_weight += grad[p] * x; });
    const float weight = exp2_fast(logit_of(query, key, scale) - lse) * (sum_over<kGroup>(of_weight) - mean);
    add(sums, at < keys.count ? weight : 0.0f, key);
  }
  shape.write(head.packed_row(args.grad_qkv, 0, token), scale, sums);
}

template <int V, int P, bool whole>
__device__ __forceinline__ void write_key(
    const Tree<float>& args, const TreeLayout& layout, float scale, const Head& head, int token) {
  const Shape<V, P, whole> shape = {args.width};
  const int end = token < layout.prefix ? layout.tokens : Span(layout, token).end;
  const float *query_rows = head.packed_row(args.qkv, 0, 0), *lse_of = args.lse + head.lse;
  const float *grad_rows = head.plain_row(args.grad, 0), *out_rows = head.plain_row(args.out, 0);
  float key[P], value[P], to_key[P] = {}, to_value[P] = {};
  shape.read(head.packed_row(args.qkv, 1, token), key);
  shape.read(head.packed_row(args.qkv, 2, token), value);
#pragma unroll 1
  for (int first = token; first < end; first += kGroups) {
    const int at = first + group_of_thread(), query_token = at < end ? at : end - 1;
    const int64_t row = int64_t(query_token) * head.stride;
    float query[P], grad[P], of_weight = 0;
    shape.read(grad_rows + row, grad);
    shape.for_row(out_rows + row, [&](int p, float x) { of_weight += grad[p] * (value[p] - x); });
    shape.read(query_rows + 3 * row, query);
    const float logit = logit_of(query, key, scale) - lse_of[query_token];
    const float weight = at < end ? exp2_fast(logit) : 0.0f;
    add(to_value, weight, grad);
    add(to_key, weight * sum_over<kGroup>(of_weight), query);
  }
  shape.write(head.packed_row(args.grad_qkv, 1, token), scale, to_key);
  shape.write(head.packed_row(args.grad_qkv, 2, token), 1, to_value);
}

template <int V, int P, bool whole>
__global__ void __launch_bounds__(kThreads, kBlocks<P>)
    backward_kernel(const Tree<float> args, const TreeLayout layout, float scale) {
  const unsigned half = gridDim.x / 2;
  const bool of_keys = blockIdx.x < half;
  const int token = int(of_keys ? blockIdx.x : blockIdx.x - half) * kWarps + warp_of_thread();
  if (token >= layout.tokens) return;
  const Head head(args, layout, Shape<V, P, whole>::first());
  if (of_keys)
    write_key<V, P, whole>(args, layout, scale, head, token);
  else
    write_query<V, P, whole>(args, layout, scale, head, token);
}

// f(V, P, whole), all known to the compiler.
template <typename F>
void for_shape(int width, bool vector, F&& f) {
  const auto with_vector = [&](auto v) {
    if (width <= 64) return f(v, std::integral_constant<int, 8>(), std::false_type());
    if (width <= 128) return f(v, std::integral_constant<int, 16>(), std::false_type());
    return f(v, std::integral_constant<int, 32>(), std::false_type());
  };
  if (!vector) return with_vector(std::integral_constant<int, 1>());
  const std::integral_constant<int, kVector<float>> v;
  width == 64 ? f(v, std::integral_constant<int, 8>(), std::true_type()) : with_vector(v);
}

// f(arguments of some people, their number), of as many people as one launch takes.
template <typename F>
void for_people(Tree<float> args, const TreeLayout& layout, F&& f) {
  const int64_t tokens = int64_t(kPeople) * layout.tokens, numbers = tokens * args.heads * args.width;
  for (int64_t left = args.people; left > 0; left -= kPeople) {
    f(args, unsigned(left < kPeople ? left : kPeople));
    args.qkv += 3 * numbers, args.out += numbers, args.lse += tokens * args.heads;
    if (args.grad) args.grad += numbers, args.grad_qkv += 3 * numbers;
  }
}

float scale_of_logits(const Tree<float>& args) { return 1 / std::sqrt(float(args.width)); }

}  // namespace

template <>
void tree_forward(const Tree<float>& args, const TreeLayout& layout) {
  const unsigned of_tokens = blocks(layout.tokens, kWarps);
  for_shape(args.width, aligned(args.width, args.qkv, args.out), [&](auto vector, auto part, auto whole) {
    for_people(args, layout, [&](const Tree<float>& some, unsigned people) {
      const dim3 grid = {of_tokens, unsigned(args.heads), people};
      launch(forward_kernel<vector(), part(), whole()>, grid, kThreads, 0, some, layout, scale_of_logits(args));
    });
  });
}

template <>
void tree_backward(const Tree<float>& args, const TreeLayout& layout) {
  const unsigned of_tokens = 2 * blocks(layout.tokens, kWarps);
  const bool vector = aligned(args.width, args.qkv, args.out, args.grad, args.grad_qkv);
  for_shape(args.width, vector, [&](auto vector, auto part, auto whole) {
    for_people(args, layout, [&](const Tree<float>& some, unsigned people) {
      const dim3 grid = {of_tokens, unsigned(args.heads), people};
      launch(backward_kernel<vector(), part(), whole()>, grid, kThreads, 0, some, layout, scale_of_logits(args));
    });
  });
}

}  // namespace pcmecl::cuda
