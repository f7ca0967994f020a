// The bank's gradient of direction_loss and direction_logits, bitwise the same in every run.
//
// With change δ of a sample from emotion a, its gradient of row e is along[e]·δ − across[e]·(row[e] − row[a]), and that
// of row a the negative sum. Over an individual's samples these are a product (E × samples)·(samples × D) of weights
// and changes, and an E×E matrix of sums of `across`, times differences of rows: those are left for the end.
//
// Samples are sorted by individual once a call, by counting: a warp counts a stretch of them, another adds up an
// individual's counts, a block those of all individuals, and the first puts each sample in its place, in order. The
// sorted samples are then cut into runs of equal length. A block owns a run, a thread V of its features: sums stay in
// registers and are written where the individual changes. Run r's sums of individual n are row r + n of a table, which
// no two blocks share; in the end each individual adds up its runs in order. Bytes: both features again, and two times
// the table. Operations: 2·E·D a sample. Bound by memory.
#include "kernels.h"
#include "warp.h"

namespace pcmecl::cuda {
namespace {

constexpr int kThreads = 128;       // of the bank's kernel at most
constexpr int kScanThreads = 1024;  // of the block that adds up how many samples individuals have
constexpr int kGroup = 8;           // emotions of a block, at most

// Which lanes hold the same number as this one, a bit each.
__device__ __forceinline__ unsigned lanes_with(int number) {
#ifdef __CUDA_ARCH__
  return __match_any_sync(kAllLanes, number);
#else
  unsigned lanes = 0;
  for (int lane = 0; lane < kWarpSize; ++lane)
    lanes |= unsigned(__shfl_sync(kAllLanes, number, lane) == number) << lane;
  return lanes;
#endif
}

__device__ __forceinline__ int count_bits(unsigned bits) {
#ifdef __CUDA_ARCH__
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// A warp's stretch of the samples, 32 at a time: step(sample, individual, rank, size) with the lane's place among those
// lanes that hold the same individual, and their number. Lanes behind the end have the individual −1.
template <typename Step>
__device__ void for_stretch(const BankOrder& order, Step&& step) {
  const int begin = int(blockIdx.x) * order.stretch;
  const int end = begin + order.stretch < order.samples ? begin + order.stretch : order.samples;
  for (int first = begin; first < end; first += kWarpSize) {
    const int sample = first + lane_of_thread();
    const int individual = sample < end ? int(order.individual[sample]) : -1;
    const unsigned same = lanes_with(individual), below = (1u << lane_of_thread()) - 1;
    step(sample, individual, count_bits(same & below), count_bits(same));
    __syncwarp();  // the counts are what the next ones begin from
  }
}

__device__ __forceinline__ int* count_of(const BankOrder& order, int individual) {
  return order.counts + int64_t(individual) * order.stretches + blockIdx.x;
}

__global__ void __launch_bounds__(kWarpSize) count_kernel(const BankOrder order) {
  for (int n = lane_of_thread(); n < order.individuals; n += kWarpSize) *count_of(order, n) = 0;
  __syncwarp();
  for_stretch(order, [&](int, int individual, int rank, int size) {
    if (individual >= 0 && rank == 0) *count_of(order, individual) += size;
  });
}

// The sum over this lane and those below it.
__device__ __forceinline__ int sum_up_to(int value) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int below = __shfl_sync(kAllLanes, value, (lane_of_thread() - distance) & (kWarpSize - 1));
    if (lane_of_thread() >= distance) value += below;
  }
  return value;
}

// An individual's counts become the places that they begin at, from where the individual does.
__global__ void __launch_bounds__(kThreads) stretches_kernel(const BankOrder order) {
  const int individual = int(blockIdx.x) * (kThreads / kWarpSize) + warp_of_thread();
  if (individual >= order.individuals) return;
  int* counts = order.counts + int64_t(individual) * order.stretches;
  int before = 0;
#pragma unroll 1
  for (int first = 0; first < order.stretches; first += kWarpSize) {
    const int stretch = first + lane_of_thread();
    const int count = stretch < order.stretches ? counts[stretch] : 0, up_to = sum_up_to(count);
    if (stretch < order.stretches) counts[stretch] = before + up_to - count;
    before += __shfl_sync(kAllLanes, up_to, kWarpSize - 1);
  }
  if (lane_of_thread() == 0) order.first[individual] = before;
}

// How many samples individuals have become the places that they begin at.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(const BankOrder order) {
  int* warps = reinterpret_cast<int*>(shared_memory());
  int before = 0;
#pragma unroll 1
  for (int first = 0; first < order.individuals; first += int(blockDim.x)) {
    const int individual = first + int(threadIdx.x);
    const int count = individual < order.individuals ? order.first[individual] : 0, up_to = sum_up_to(count);
    if (lane_of_thread() == kWarpSize - 1) warps[warp_of_thread()] = up_to;
    __syncthreads();
    const bool is_warp = lane_of_thread() < int(blockDim.x) / kWarpSize;
    const int up_to_warp = sum_up_to(is_warp ? warps[lane_of_thread()] : 0);
    const int of_warps_before = __shfl_sync(kAllLanes, up_to_warp, (warp_of_thread() - 1) & (kWarpSize - 1));
    if (individual < order.individuals)
      order.first[individual] = before + (warp_of_thread() == 0 ? 0 : of_warps_before) + up_to - count;
    before += __shfl_sync(kAllLanes, up_to_warp, kWarpSize - 1);
    __syncthreads();
  }
  if (threadIdx.x == 0) order.first[order.individuals] = order.samples;
}

__global__ void __launch_bounds__(kWarpSize) place_kernel(const BankOrder order) {
  for_stretch(order, [&](int sample, int individual, int rank, int size) {
    const int before = individual >= 0 ? *count_of(order, individual) : 0;
    __syncwarp();
    if (individual < 0) return;
    order.order[order.first[individual] + before + rank] = sample;
    if (rank == 0) *count_of(order, individual) = before + size;
  });
}

// Sums over samples of one individual in one run.
template <typename T, int V, int G>
struct Sums {
  const Direction<T>& args;
  const BankOrder& order;
  float* across;  // (E, E) in shared memory: row a belongs to the samples from emotion a; thread e owns column e
  int emotions, first_emotion;
  int64_t k;
  bool inside;
  float of_rows[G][V];

  __device__ Sums(const Direction<T>& args, const BankOrder& order)
      : args(args), order(order), across(reinterpret_cast<float*>(shared_memory())), emotions(args.emotions),
        first_emotion(int(blockIdx.z) * G), k((int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * V),
        inside(k < args.width) {
    clear();
  }

  __device__ void clear() {
#pragma unroll
    for (int g = 0; g < G; ++g)
#pragma unroll
      for (int v = 0; v < V; ++v) of_rows[g][v] = 0;
    if (int(threadIdx.x) < emotions)
      for (int a = 0; a < emotions; ++a) across[a * emotions + threadIdx.x] = 0;
  }

  __device__ void add(int place) {
    const float* of_sample = args.coefficients + int64_t(place) * coefficients_of(emotions);
    const float inv_norm_source = of_sample[2 * emotions], inv_norm_edited = of_sample[2 * emotions + 1];
    if (inv_norm_source < 0) return;  // it asks for no change: nothing of it counts, NaN included
    if (int(threadIdx.x) < emotions)
      across[int(of_sample[2 * emotions + 2]) * emotions + threadIdx.x] += of_sample[emotions + threadIdx.x];
    if (!inside) return;
    const int64_t at = int64_t(order.order[place]) * args.width + k;
    float source[V], delta[V];
    load(args.source + at, source);
    load(args.edited + at, delta);
#pragma unroll
    for (int v = 0; v < V; ++v) delta[v] = difference_of_units(delta[v], inv_norm_edited, source[v], inv_norm_source);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const float weight = first_emotion + g < emotions ? of_sample[first_emotion + g] : 0.0f;
      if (weight == 0) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) of_rows[g][v] += weight * delta[v];
    }
  }

  // Writes them to a row of the table, less what goes through the lengths of directions.
  __device__ void write(int individual, int64_t row) {
    __syncthreads();
    const T* bank = args.bank + int64_t(individual) * emotions * args.width + k;
    float* to = order.sums + row * emotions * args.width + k;
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const int e = first_emotion + g;
      if (!inside || e >= emotions) continue;
      float own[V];
      load(bank + int64_t(e) * args.width, own);
#pragma unroll 1
      for (int other = 0; other < emotions; ++other) {
        const float weight = across[e * emotions + other] + across[other * emotions + e];
        if (weight == 0) continue;
        float theirs[V];
        load(bank + int64_t(other) * args.width, theirs);
#pragma unroll
        for (int v = 0; v < V; ++v) of_rows[g][v] += weight * (theirs[v] - own[v]);
      }
      store(to + int64_t(e) * args.width, of_rows[g]);
    }
    __syncthreads();
  }
};

template <typename T, int V, int G>
__global__ void __launch_bounds__(kThreads, 4) run_kernel(const Direction<T> args, const BankOrder order) {
  const int run = int(blockIdx.x), begin = run * order.run;
  const int end = begin + order.run < order.samples ? begin + order.run : order.samples;
  int individual = int(order.individual[order.order[begin]]);
  Sums<T, V, G> sums(args, order);
  for (int place = begin; place < end;) {
    const int of_individual = order.first[individual + 1], until = of_individual < end ? of_individual : end;
#pragma unroll 2
    for (; place < until; ++place) sums.add(place);
    sums.write(individual, int64_t(run) + individual);
    sums.clear();
    if (place < end) individual = int(order.individual[order.order[place]]);
  }
}

// A thread adds up a number of the bank's gradient.
template <typename T>
__global__ void __launch_bounds__(kThreads) add_runs_kernel(const BankOrder order, int64_t size, T* grad_bank) {
  const int individual = int(blockIdx.x);
  const int64_t at = int64_t(blockIdx.y) * kThreads + threadIdx.x;
  if (at >= size) return;
  const int begin = order.first[individual], end = order.first[individual + 1];
  float total = 0;
  if (begin < end)
    for (int run = begin / order.run; run <= (end - 1) / order.run; ++run)
      total += order.sums[(int64_t(run) + individual) * size + at];
  grad_bank[individual * size + at] = T(total);
}

// f(V, G), both known to the compiler.
template <typename T, typename F>
void for_shape(int emotions, bool vector, F&& f) {
  const auto with_vector = [&](auto width) {
    emotions == 7 ? f(width, std::integral_constant<int, 7>()) : f(width, std::integral_constant<int, kGroup>());
  };
  vector ? with_vector(std::integral_constant<int, kVector<T>>()) : with_vector(std::integral_constant<int, 1>());
}

}  // namespace

void direction_order(const BankOrder& order) {
  launch(count_kernel, {unsigned(order.stretches)}, kWarpSize, 0, order);
  launch(stretches_kernel, {blocks(order.individuals, kThreads / kWarpSize)}, kThreads, 0, order);
  const int warps =
      order.individuals < kScanThreads ? int(blocks(order.individuals, kWarpSize)) : kScanThreads / kWarpSize;
  launch(scan_kernel, {1}, warps * kWarpSize, warps * sizeof(int), order);
  launch(place_kernel, {unsigned(order.stretches)}, kWarpSize, 0, order);
}

template <typename T>
void direction_bank(const Direction<T>& args, const BankOrder& order, T* grad_bank) {
  for_shape<T>(args.emotions, aligned(args.width, args.source, args.edited, args.bank), [&](auto vector, auto group) {
    const int64_t packs = (args.width + vector() - 1) / vector();
    const int threads = int(packs < kThreads ? (packs + kWarpSize - 1) / kWarpSize * kWarpSize : kThreads);
    const dim3 grid = {blocks(order.samples, order.run), blocks(packs, threads), blocks(args.emotions, group())};
    launch(run_kernel<T, vector(), group()>, grid, threads, args.emotions * args.emotions * sizeof(float), args, order);
  });
  const int64_t size = args.emotions * args.width;
  launch(
      add_runs_kernel<T>, {unsigned(order.individuals), blocks(size, kThreads)}, kThreads, 0, order, size, grad_bank);
}

#define PCMECL_FOR(T) template void direction_bank<T>(const Direction<T>&, const BankOrder&, T*);
PCMECL_FOR(float)
PCMECL_FOR(Half)
PCMECL_FOR(BFloat16)
#undef PCMECL_FOR

}  // namespace pcmecl::cuda
