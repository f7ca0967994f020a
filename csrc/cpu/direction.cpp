// direction_loss and direction_logits; the arithmetic is in direction_kernels.h.
#include <algorithm>
#include <memory>
#include <new>
#include <numeric>

#include "operators.h"

namespace pcmecl::cpu {
namespace {

const DirectionKernels<float>& kernels_for(float) { return kernels().direction_float; }
const DirectionKernels<double>& kernels_for(double) { return kernels().direction_double; }
const DirectionKernels<BFloat16>& kernels_for(BFloat16) { return kernels().direction_bfloat16; }

// In the words of pcmecl_fast/ops/checks.py.
void check_range(const char* name, const int64_t* values, int64_t samples, int64_t size, const char* of) {
  for (int64_t k = 0; k < samples; ++k)
    if (values[k] < 0 || values[k] >= size)
      throw pybind11::index_error(
          std::string(name) + ": got " + std::to_string(values[k]) + " at position " + std::to_string(k) +
          "; takes 0 to " + std::to_string(size - 1) + " (" + of + ")");
}

// The samples sorted by individual, cut into runs of one individual each: what a thread adds up of the bank's gradient.
// They depend on the samples alone, so the sums are the same for every number of threads.
struct Runs {
  std::vector<int64_t> order;  // (B,)
  std::vector<int64_t> begin;  // (runs + 1,): where each begins in `order`
  std::vector<int64_t> first;  // (N + 1,): each individual's first run

  Runs(const int64_t* individual, int64_t samples, int64_t individuals, int64_t longest) : order(samples) {
    std::vector<int64_t> next(individuals + 1, 0);
    for (int64_t k = 0; k < samples; ++k) ++next[individual[k] + 1];
    for (int64_t n = 0; n < individuals; ++n) {
      first.push_back(begin.size());
      for (int64_t at = 0; at < next[n + 1]; at += longest) begin.push_back(next[n] + at);
      next[n + 1] += next[n];
    }
    first.push_back(begin.size());
    begin.push_back(samples);
    for (int64_t k = 0; k < samples; ++k) order[next[individual[k]]++] = k;
  }

  int64_t count() const { return begin.size() - 1; }
};

// Everything but the results.
struct Call {
  int threads;
  int64_t samples, individuals, emotions, width;
  Address source, edited, bank, individual, source_emotion, target_emotion;
  double scale, contrast;
  bool normalize;
  double min_change;

  template <typename T>
  Direction<T> arguments() const {
    Direction<T> args = {};
    args.samples = samples, args.width = width, args.emotions = emotions;
    args.source = source.of<const T>(), args.edited = edited.of<const T>(), args.bank = bank.of<const T>();
    args.individual = individual.of<const int64_t>(), args.source_emotion = source_emotion.of<const int64_t>();
    args.target_emotion = target_emotion.of<const int64_t>();
    args.scale = scale, args.contrast = contrast, args.normalize = normalize, args.min_change = min_change;
    return args;
  }

  // Samples that a thread gets at least: about 100k multiply-adds.
  int64_t grain() const { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, emotions * width)) * 4; }

  void check() const {
    check_range("individual", individual.of<const int64_t>(), samples, individuals, "individuals in bank");
    check_range("source_emotion", source_emotion.of<const int64_t>(), samples, emotions, "emotions in bank");
    if (target_emotion)
      check_range("target_emotion", target_emotion.of<const int64_t>(), samples, emotions, "emotions in bank");
  }
};

constexpr std::align_val_t kCacheLine = std::align_val_t(64);

struct Release {
  void operator()(void* memory) const { ::operator delete(memory, kCacheLine); }
};

// Memory for a call's own use, not initialised.
template <typename C>
std::unique_ptr<C[], Release> scratch(int64_t numbers) {
  return std::unique_ptr<C[], Release>(static_cast<C*>(::operator new(numbers * sizeof(C), kCacheLine)));
}

// The gradients with the bank's: a run's rows stay in the cache from sample to sample, and so do their gradients.
template <typename T>
void differentiate_with_bank(const Call& call, const Direction<T>& args, T* grad_bank) {
  using C = typename Direction<T>::C;
  const int64_t size = call.emotions * call.width;
  // So long that the runs' gradients need at most an eighth of the features' gradient, beside one for each individual.
  const Runs runs(args.individual, call.samples, call.individuals, std::max<int64_t>(64, 8 * call.emotions));
  const auto sums = scratch<C>(runs.count() * size);
  parallel(call.threads, runs.count(), 1, [&](int64_t begin, int64_t end, int) {
    Direction<T> own = args;
    own.order = runs.order.data();
    for (int64_t run = begin; run < end; ++run) {
      own.grad_rows = sums.get() + run * size;
      kernels_for(T()).backward(own, runs.begin[run], runs.begin[run + 1]);
    }
  });
  const DirectionBank<T> added = {size, runs.first.data(), sums.get(), grad_bank};
  parallel(call.threads, call.individuals, 4, [&](int64_t begin, int64_t end, int) {
    kernels_for(T()).bank(added, begin, end);
  });
}

// Every gradient that `args` and `grad_bank` ask for; returns the scale's, 0 unless it is.
template <typename T>
double differentiate(const Call& call, Direction<T>& args, T* grad_bank, bool of_scale) {
  using C = typename Direction<T>::C;
  const auto of_scales = scratch<C>(of_scale ? call.samples : 0);
  args.grad_scale = of_scale ? of_scales.get() : nullptr;
  if (grad_bank)
    differentiate_with_bank(call, args, grad_bank);
  else
    parallel(call.threads, call.samples, call.grain(), [&](int64_t begin, int64_t end, int) {
      kernels_for(T()).backward(args, begin, end);
    });
  return of_scale ? std::accumulate(of_scales.get(), of_scales.get() + call.samples, 0.0) : 0.0;
}

// What the sum of the losses is divided by: for the mean the samples that request a change.
template <typename T>
typename Direction<T>::C divisor_of(const Direction<T>& args, bool mean) {
  if (!mean) return 1;
  int64_t valid = 0;
  for (int64_t k = 0; k < args.samples; ++k) valid += args.source_emotion[k] != args.target_emotion[k];
  return std::max<int64_t>(valid, 1);
}

template <typename C>
C reduced(const C* losses, int64_t samples, C divisor) {
  return C(std::accumulate(losses, losses + samples, 0.0) / divisor);
}

}  // namespace

void direction_logits(
    int threads, int dtype, int64_t samples, int64_t individuals, int64_t emotions, int64_t width, Address source,
    Address edited, Address bank, Address individual, Address source_emotion, bool normalize, double min_change,
    Address logits) {
  const Call call = {threads,    samples,        individuals, emotions, width, source,    edited,    bank,
                     individual, source_emotion, Address(),   1,        0,     normalize, min_change};
  call.check();
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    Direction<T> args = call.arguments<T>();
    args.logits = logits.of<T>();
    parallel(threads, samples, call.grain(), [&](int64_t begin, int64_t end, int) {
      kernels_for(zero).forward(args, begin, end);
    });
  });
}

// Of a `grad` of the logits, (B, E). A gradient that is not asked for has no address, here and below.
void direction_logits_backward(
    int threads, int dtype, int64_t samples, int64_t individuals, int64_t emotions, int64_t width, Address source,
    Address edited, Address bank, Address individual, Address source_emotion, bool normalize, double min_change,
    Address grad, Address grad_source, Address grad_edited, Address grad_bank) {
  const Call call = {threads,    samples,        individuals, emotions, width, source,    edited,    bank,
                     individual, source_emotion, Address(),   1,        0,     normalize, min_change};
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    Direction<T> args = call.arguments<T>();
    args.grad_logits = grad.of<const T>();
    args.grad_source = grad_source.of<T>(), args.grad_edited = grad_edited.of<T>();
    differentiate(call, args, grad_bank.of<T>(), false);
  });
}

// `losses` (B,), unless there is no place for them, and `loss`, their sum or mean, with its `divisor`.
void direction_loss(
    int threads, int dtype, int64_t samples, int64_t individuals, int64_t emotions, int64_t width, Address source,
    Address edited, Address bank, Address individual, Address source_emotion, Address target_emotion, double scale,
    double contrast, bool normalize, double min_change, Address losses, Address loss, Address divisor, bool mean) {
  const Call call = {threads,    samples,        individuals,    emotions, width,    source,    edited,    bank,
                     individual, source_emotion, target_emotion, scale,    contrast, normalize, min_change};
  call.check();
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using C = typename Direction<T>::C;
    Direction<T> args = call.arguments<T>();
    const auto own = scratch<C>(losses ? 0 : samples);
    args.losses = losses ? losses.of<C>() : own.get();
    parallel(threads, samples, call.grain(), [&](int64_t begin, int64_t end, int) {
      kernels_for(zero).forward(args, begin, end);
    });
    const C by = *divisor.of<C>() = divisor_of(args, mean);
    *loss.of<C>() = reduced(args.losses, samples, by);
  });
}

// Of a `grad` of the losses, (B,), or with stride 0 of their sum or mean. Returns the gradient of scale.
double direction_loss_backward(
    int threads, int dtype, int64_t samples, int64_t individuals, int64_t emotions, int64_t width, Address source,
    Address edited, Address bank, Address individual, Address source_emotion, Address target_emotion, double scale,
    double contrast, bool normalize, double min_change, Address grad, int64_t grad_stride, Address divisor,
    Address grad_source, Address grad_edited, Address grad_bank, bool of_scale) {
  const Call call = {threads,    samples,        individuals,    emotions, width,    source,    edited,    bank,
                     individual, source_emotion, target_emotion, scale,    contrast, normalize, min_change};
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using C = typename Direction<T>::C;
    Direction<T> args = call.arguments<T>();
    args.grad_losses = grad.of<const C>(), args.grad_stride = grad_stride;
    args.grad_factor = C(1) / *divisor.of<const C>();
    args.grad_source = grad_source.of<T>(), args.grad_edited = grad_edited.of<T>();
    return differentiate(call, args, grad_bank.of<T>(), of_scale);
  });
}

// The sum or mean and its gradients in one pass. Returns the gradient of scale.
double direction_loss_and_gradients(
    int threads, int dtype, int64_t samples, int64_t individuals, int64_t emotions, int64_t width, Address source,
    Address edited, Address bank, Address individual, Address source_emotion, Address target_emotion, double scale,
    double contrast, bool normalize, double min_change, Address loss, bool mean, Address grad_source,
    Address grad_edited, Address grad_bank, bool of_scale) {
  const Call call = {threads,    samples,        individuals,    emotions, width,    source,    edited,    bank,
                     individual, source_emotion, target_emotion, scale,    contrast, normalize, min_change};
  call.check();
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using C = typename Direction<T>::C;
    Direction<T> args = call.arguments<T>();
    const auto losses = scratch<C>(samples);
    const C by = divisor_of(args, mean);
    args.losses = losses.get(), args.grad_factor = C(1) / by;
    args.grad_source = grad_source.of<T>(), args.grad_edited = grad_edited.of<T>();
    const double gradient = differentiate(call, args, grad_bank.of<T>(), of_scale);
    *loss.of<C>() = reduced(args.losses, samples, by);
    return gradient;
  });
}

PCMECL_BIND(direction_logits)
PCMECL_BIND(direction_logits_backward)
PCMECL_BIND(direction_loss)
PCMECL_BIND(direction_loss_backward)
PCMECL_BIND(direction_loss_and_gradients)

}  // namespace pcmecl::cpu
