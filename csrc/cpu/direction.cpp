// direction_loss and direction_logits; the arithmetic is in direction_kernels.h.
#include <algorithm>

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

// The gradients with the bank's: a run's rows stay in the cache from sample to sample, and so do their gradients.
template <typename T>
void differentiate_with_bank(
    const Call& call, const Direction<T>& args, typename Direction<T>::C* sums, int64_t longest, T* grad_bank) {
  const int64_t size = call.emotions * call.width;
  const Runs runs(args.individual, call.samples, call.individuals, longest);
  parallel(call.threads, runs.count(), 1, [&](int64_t begin, int64_t end, int) {
    Direction<T> own = args;
    own.order = runs.order.data();
    for (int64_t run = begin; run < end; ++run) {
      own.grad_rows = sums + run * size;
      kernels_for(T()).backward(own, runs.begin[run], runs.begin[run + 1]);
    }
  });
  const DirectionBank<T> added = {size, runs.first.data(), sums, grad_bank};
  parallel(call.threads, call.individuals, 4, [&](int64_t begin, int64_t end, int) {
    kernels_for(T()).bank(added, begin, end);
  });
}

}  // namespace

// `logits` (B, E), or, where there are target emotions, `losses` (B,), and of them `loss` () and its `divisor` ().
void direction_forward(
    int threads, int dtype, int64_t samples, int64_t individuals, int64_t emotions, int64_t width, Address source,
    Address edited, Address bank, Address individual, Address source_emotion, Address target_emotion, double scale,
    double contrast, bool normalize, double min_change, Address logits, Address losses, Address loss, Address divisor,
    bool mean) {
  const Call call = {threads,    samples,        individuals,    emotions, width,    source,    edited,    bank,
                     individual, source_emotion, target_emotion, scale,    contrast, normalize, min_change};
  call.check();
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using C = typename Direction<T>::C;
    Direction<T> args = call.arguments<T>();
    args.logits = logits.of<T>(), args.losses = losses.of<C>();
    parallel(threads, samples, call.grain(), [&](int64_t begin, int64_t end, int) {
      kernels_for(zero).forward(args, begin, end);
    });
    if (!loss) return;
    int64_t valid = 0;
    double total = 0;
    for (int64_t k = 0; k < samples; ++k) {
      valid += args.source_emotion[k] != args.target_emotion[k];
      total += args.losses[k];
    }
    const C by = mean ? C(std::max<int64_t>(valid, 1)) : C(1);
    *divisor.of<C>() = by;
    *loss.of<C>() = C(total / by);
  });
}

// Of a `grad` of the logits (B, E), or of the losses: (B,), or with stride 0 one number. A gradient that is not asked
// for has no address; `sums` holds (runs, E, D) numbers for the bank's, with runs of at most `longest` samples, and
// `grad_scales` (B,). Returns the gradient of scale.
double direction_backward(
    int threads, int dtype, int64_t samples, int64_t individuals, int64_t emotions, int64_t width, Address source,
    Address edited, Address bank, Address individual, Address source_emotion, Address target_emotion, double scale,
    double contrast, bool normalize, double min_change, Address grad, int64_t grad_stride, Address divisor,
    Address grad_source, Address grad_edited, Address grad_bank, Address grad_scales, Address sums, int64_t longest) {
  const Call call = {threads,    samples,        individuals,    emotions, width,    source,    edited,    bank,
                     individual, source_emotion, target_emotion, scale,    contrast, normalize, min_change};
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using C = typename Direction<T>::C;
    Direction<T> args = call.arguments<T>();
    if (target_emotion) {
      args.grad_losses = grad.of<const C>(), args.grad_stride = grad_stride;
      args.grad_factor = C(1) / *divisor.of<const C>();
    } else {
      args.grad_logits = grad.of<const T>();
    }
    args.grad_source = grad_source.of<T>(), args.grad_edited = grad_edited.of<T>();
    args.grad_scale = grad_scales.of<C>();
    if (grad_bank)
      differentiate_with_bank(call, args, sums.of<C>(), longest, grad_bank.of<T>());
    else
      parallel(threads, samples, call.grain(), [&](int64_t begin, int64_t end, int) {
        kernels_for(zero).backward(args, begin, end);
      });
    double total = 0;
    if (grad_scales)
      for (int64_t k = 0; k < samples; ++k) total += args.grad_scale[k];
    return total;
  });
}

PCMECL_BIND(direction_forward)
PCMECL_BIND(direction_backward)

}  // namespace pcmecl::cpu
