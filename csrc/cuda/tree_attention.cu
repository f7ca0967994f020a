// tree_attention of float32; tree_attention_half.cu has that of half types.
//
// A token sees the prefix and its own description's past: with one-word names a dozen of some hundred tokens. So
// nothing is tiled and no mask is read: a warp owns one token of one head and visits only the keys that it sees,
// straight from the packed qkv. Eight lanes share a key, 16 bytes each where aligned, and a warp takes four keys at a
// time, with a running softmax per group of lanes that is merged at the end. Any number of tokens; a head's width up to
// 256.
//
// Backward, one launch: half of the warps own a token as a query and write its dQ, the other half as a key: they visit
// the queries that see it and write dK and dV. Nothing is atomic. ⟨grad, out⟩ of a query is recomputed where it is
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
// Blocks that a multiprocessor has to hold with P numbers of a row to a lane: with more the compiler spills registers.
template <int P>
constexpr int kBlocks = P == 8 ? 4 : 2;
constexpr int kGroup = 8, kGroups = kWarpSize / kGroup;
constexpr float kNoKey = -1e30f;  // finite, so that no difference is NaN

// P numbers of a row to a lane: eight lanes hold a head's width, V neighbours at a time.
template <int V, int P>
__device__ __forceinline__ void load_row(const float* row, int width, bool wanted, float (&to)[P]) {
#pragma unroll
  for (int part = 0; part < P / V; ++part) {
    const int k = (part * kGroup + lane_of_thread() % kGroup) * V;
    float values[V] = {};
    if (wanted && k < width) load(row + k, values);
#pragma unroll
    for (int v = 0; v < V; ++v) to[part * V + v] = values[v];
  }
}

// Adds the four groups' rows up and writes the sum times `by`.
template <int V, int P>
__device__ __forceinline__ void write_row(float* row, int width, float by, float (&from)[P]) {
#pragma unroll
  for (int p = 0; p < P; ++p) {
    from[p] += __shfl_xor_sync(kAllLanes, from[p], kGroup);
    from[p] += __shfl_xor_sync(kAllLanes, from[p], 2 * kGroup);
  }
#pragma unroll
  for (int part = 0; part < P / V; ++part) {
    const int k = (part * kGroup + lane_of_thread() % kGroup) * V;
    float values[V];
#pragma unroll
    for (int v = 0; v < V; ++v) values[v] = from[part * V + v] * by;
    if (lane_of_thread() < kGroup && k < width) store(row + k, values);
  }
}

template <int P>
__device__ __forceinline__ float dot(const float (&x)[P], const float (&y)[P]) {
  float total = 0;
#pragma unroll
  for (int p = 0; p < P; ++p) total += x[p] * y[p];
  return sum_over<kGroup>(total);
}

// The same with a row that is read on the way and takes no registers.
template <int V, int P>
__device__ __forceinline__ float dot_with(const float (&x)[P], const float* row, int width, bool wanted) {
  float total = 0;
#pragma unroll
  for (int part = 0; part < P / V; ++part) {
    const int k = (part * kGroup + lane_of_thread() % kGroup) * V;
    float values[V] = {};
    if (wanted && k < width) load(row + k, values);
#pragma unroll
    for (int v = 0; v < V; ++v) total += x[part * V + v] * values[v];
  }
  return sum_over<kGroup>(total);
}

template <int P>
__device__ __forceinline__ void add(float (&to)[P], float by, const float (&x)[P]) {
#pragma unroll
  for (int p = 0; p < P; ++p) to[p] += by * x[p];
}

// One token of one head.
struct Item {
  int64_t person;
  int head, token;
  const Tree<float>& args;
  const TreeLayout& layout;
  int64_t heads_width;

  __device__ Item(const Tree<float>& args, const TreeLayout& layout, int64_t number)
      : args(args), layout(layout), heads_width(int64_t(args.heads) * args.width) {
    token = int(number % layout.tokens);
    head = int(number / layout.tokens % args.heads);
    person = number / layout.tokens / args.heads;
  }

  // Row `which` of qkv: 0 query, 1 key, 2 value.
  __device__ int64_t packed(int of_token, int which) const {
    return ((person * layout.tokens + of_token) * 3 + which) * heads_width + int64_t(head) * args.width;
  }
  __device__ int64_t plain(int of_token) const {
    return (person * layout.tokens + of_token) * heads_width + int64_t(head) * args.width;
  }
  __device__ int64_t of_lse(int of_token) const { return (person * args.heads + head) * layout.tokens + of_token; }
};

// The keys that a query sees, numbered from 0.
struct Keys {
  int prefix, count, skip;

  __device__ Keys(const TreeLayout& layout, int token) {
    const Span span(layout, token);
    const bool in_prefix = token < layout.prefix;
    prefix = layout.prefix;
    count = in_prefix ? token + 1 : layout.prefix + token - span.begin + 1;
    skip = in_prefix ? 0 : span.begin - layout.prefix;
  }
  __device__ int operator[](int at) const { return at < prefix ? at : at + skip; }
};

__device__ __forceinline__ int group_of_thread() { return lane_of_thread() / kGroup; }

template <int V, int P>
__global__ void __launch_bounds__(kThreads, kBlocks<P>)
    forward_kernel(const Tree<float> args, const TreeLayout layout) {
  const int64_t number = int64_t(blockIdx.x) * kWarps + warp_of_thread();
  if (number >= args.people * args.heads * layout.tokens) return;
  const Item item(args, layout, number);
  const Keys keys(layout, item.token);
  const float scale = kLog2e / sqrtf(float(args.width));
  float query[P], sums[P] = {}, largest = kNoKey, total = 0;
  load_row<V>(args.qkv + item.packed(item.token, 0), args.width, true, query);

  for (int first = 0; first < keys.count; first += kGroups) {
    const bool seen = first + group_of_thread() < keys.count;
    const int token = seen ? keys[first + group_of_thread()] : 0;
    float key[P], value[P];
    load_row<V>(args.qkv + item.packed(token, 1), args.width, seen, key);
    load_row<V>(args.qkv + item.packed(token, 2), args.width, seen, value);
    const float logit = dot(query, key) * scale, before = largest;
    if (seen) largest = logit > largest || logit != logit ? logit : largest;  // NaN stays
    const float keep = exp2_fast(before - largest), weight = seen ? exp2_fast(logit - largest) : 0.0f;
    total = total * keep + weight;
#pragma unroll
    for (int p = 0; p < P; ++p) sums[p] = sums[p] * keep + weight * value[p];
  }

  float of_all = largest;
#pragma unroll
  for (int other = kGroup; other < kWarpSize; other *= 2) {
    const float theirs = __shfl_xor_sync(kAllLanes, of_all, other);
    of_all = theirs > of_all || theirs != theirs ? theirs : of_all;
  }
  const float rescale = exp2_fast(largest - of_all);
  total *= rescale;
#pragma unroll
  for (int p = 0; p < P; ++p) sums[p] *= rescale;
  total += __shfl_xor_sync(kAllLanes, total, kGroup);
  total += __shfl_xor_sync(kAllLanes, total, 2 * kGroup);
  write_row<V>(args.out + item.plain(item.token), args.width, 1 / total, sums);
  if (lane_of_thread() == 0) args.lse[item.of_lse(item.token)] = (of_all + log2f(total)) * kLn2;
}

template <int V, int P>
__device__ void write_query(const Item& item) {
  const Tree<float>& args = item.args;
  const Keys keys(item.layout, item.token);
  const float scale = 1 / sqrtf(float(args.width)), lse = args.lse[item.of_lse(item.token)] * kLog2e;
  float query[P], grad[P], sums[P] = {};
  load_row<V>(args.qkv + item.packed(item.token, 0), args.width, true, query);
  load_row<V>(args.grad + item.plain(item.token), args.width, true, grad);
  const float mean = dot_with<V>(grad, args.out + item.plain(item.token), args.width, true);
  for (int first = 0; first < keys.count; first += kGroups) {
    const bool seen = first + group_of_thread() < keys.count;
    const int token = seen ? keys[first + group_of_thread()] : 0;
    float key[P], value[P];
    load_row<V>(args.qkv + item.packed(token, 1), args.width, seen, key);
    load_row<V>(args.qkv + item.packed(token, 2), args.width, seen, value);
    const float weight = exp2_fast(dot(query, key) * (scale * kLog2e) - lse), of_weight = dot(grad, value) - mean;
    add(sums, seen ? weight * of_weight : 0.0f, key);
  }
  write_row<V>(args.grad_qkv + item.packed(item.token, 0), args.width, scale, sums);
}

template <int V, int P>
__device__ void write_key(const Item& item) {
  const Tree<float>& args = item.args;
  const float scale = 1 / sqrtf(float(args.width));
  const int end = item.token < item.layout.prefix ? item.layout.tokens : Span(item.layout, item.token).end;
  float key[P], value[P], to_key[P] = {}, to_value[P] = {};
  load_row<V>(args.qkv + item.packed(item.token, 1), args.width, true, key);
  load_row<V>(args.qkv + item.packed(item.token, 2), args.width, true, value);
  for (int first = item.token; first < end; first += kGroups) {
    const bool sees = first + group_of_thread() < end;
    const int token = sees ? first + group_of_thread() : item.token;
    float query[P], grad[P];
    load_row<V>(args.grad + item.plain(token), args.width, sees, grad);
    const float of_weight = dot(grad, value) - dot_with<V>(grad, args.out + item.plain(token), args.width, sees);
    load_row<V>(args.qkv + item.packed(token, 0), args.width, sees, query);
    const float lse = args.lse[item.of_lse(token)] * kLog2e;
    const float weight = exp2_fast(dot(query, key) * (scale * kLog2e) - lse);
    add(to_value, sees ? weight : 0.0f, grad);
    add(to_key, sees ? weight * of_weight : 0.0f, query);
  }
  write_row<V>(args.grad_qkv + item.packed(item.token, 1), args.width, scale, to_key);
  write_row<V>(args.grad_qkv + item.packed(item.token, 2), args.width, 1, to_value);
}

template <int V, int P>
__global__ void __launch_bounds__(kThreads, kBlocks<P>)
    backward_kernel(const Tree<float> args, const TreeLayout layout) {
  const int64_t number = int64_t(blockIdx.x) * kWarps + warp_of_thread();
  const int64_t items = args.people * args.heads * layout.tokens;
  if (number < items)
    write_key<V, P>(Item(args, layout, number));  // the longer ones, those of the prefix, begin early
  else if (number < 2 * items)
    write_query<V, P>(Item(args, layout, number - items));
}

// f(V, P), both known to the compiler.
template <typename F>
void for_shape(int width, bool vector, F&& f) {
  const auto with_vector = [&](auto v) {
    if (width <= 64) return f(v, std::integral_constant<int, 8>());
    if (width <= 128) return f(v, std::integral_constant<int, 16>());
    return f(v, std::integral_constant<int, 32>());
  };
  vector ? with_vector(std::integral_constant<int, kVector<float>>()) : with_vector(std::integral_constant<int, 1>());
}

}  // namespace

template <>
void tree_forward(const Tree<float>& args, const TreeLayout& layout) {
  const int64_t items = args.people * args.heads * layout.tokens;
  for_shape(args.width, aligned(args.width, args.qkv, args.out), [&](auto vector, auto part) {
    launch(forward_kernel<vector(), part()>, {blocks(items, kWarps)}, kThreads, 0, args, layout);
  });
}

template <>
void tree_backward(const Tree<float>& args, const TreeLayout& layout) {
  const int64_t items = args.people * args.heads * layout.tokens;
  for_shape(args.width, aligned(args.width, args.qkv, args.out, args.grad, args.grad_qkv), [&](auto vector, auto part) {
    launch(backward_kernel<vector(), part()>, {blocks(2 * items, kWarps)}, kThreads, 0, args, layout);
  });
}

}  // namespace pcmecl::cuda
