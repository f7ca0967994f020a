// direction_loss and direction_logits on tensors: allocation and threads; the arithmetic is in direction_kernels.h.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <sstream>

#include "kernels.h"
#include "operators.h"

namespace pcmecl::cpu {
namespace {

template <typename T>
struct Native {
  using type = T;
};
template <>
struct Native<at::BFloat16> {
  using type = BFloat16;
};

const DirectionKernels<float>& kernels_for(float) { return kernels().direction_float; }
const DirectionKernels<double>& kernels_for(double) { return kernels().direction_double; }
const DirectionKernels<BFloat16>& kernels_for(BFloat16) { return kernels().direction_bfloat16; }

// f(value of the native type) for the tensor's dtype.
template <typename F>
void for_dtype(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case at::kFloat: return f(float());
    case at::kDouble: return f(double());
    case at::kBFloat16: return f(BFloat16());
    default: TORCH_CHECK_TYPE(false, "got ", x.scalar_type(), "; takes float32, float64 or bfloat16");
  }
}

at::TensorOptions computing(const Tensor& x) {
  return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

template <typename T>
T* pointer(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

template <typename T>
T* pointer_or_null(const std::optional<Tensor>& x) {
  return x ? pointer<T>(*x) : nullptr;
}

// Samples that a thread gets at least: about 100k multiply-adds.
int64_t grain(const Tensor& bank) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, bank.size(1) * bank.size(2))) * 4;
}

// In the words of pcmecl_fast/ops/checks.py.
void check_range(const char* name, const Tensor& index, int64_t size, const char* of) {
  const int64_t* values = pointer<int64_t>(index);
  for (int64_t k = 0; k < index.numel(); ++k)
    if (values[k] < 0 || values[k] >= size) {
      std::ostringstream message;
      message << name << ": got " << values[k] << " at position " << k << "; takes 0 to " << size - 1 << " (" << of
              << ")";
      throw pybind11::index_error(message.str());
    }
}

void check_samples(const Tensor& bank, const Tensor& individual, const Tensor& source_emotion) {
  check_range("individual", individual, bank.size(0), "individuals in bank");
  check_range("source_emotion", source_emotion, bank.size(1), "emotions in bank");
}

template <typename T>
Direction<T> make_arguments(
    const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, bool normalize, double min_change) {
  Direction<T> args = {};
  args.samples = source.size(0), args.width = source.size(1), args.emotions = bank.size(1);
  args.source = pointer<T>(source), args.edited = pointer<T>(edited), args.bank = pointer<T>(bank);
  args.individual = pointer<int64_t>(individual), args.source_emotion = pointer<int64_t>(source_emotion);
  args.normalize = normalize, args.min_change = min_change;
  return args;
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

// The gradients with the bank's: a run's rows stay in the cache from sample to sample, and so do their gradients.
template <typename T>
Tensor differentiate_with_bank(Direction<T>& args, const Tensor& bank) {
  const int64_t size = args.emotions * args.width;
  // So long that the runs' gradients need at most an eighth of the features' gradient, beside one for each individual.
  const Runs runs(args.individual, args.samples, bank.size(0), std::max<int64_t>(64, 8 * args.emotions));
  args.order = runs.order.data();
  const Tensor sums = at::empty({runs.count(), size}, computing(bank));
  auto* grad_rows = pointer<typename Direction<T>::C>(sums);
  at::parallel_for(0, runs.count(), 1, [&](int64_t begin, int64_t end) {
    Direction<T> own = args;
    for (int64_t run = begin; run < end; ++run) {
      own.grad_rows = grad_rows + run * size;
      kernels_for(T()).backward(own, runs.begin[run], runs.begin[run + 1]);
    }
  });
  Tensor grad = at::empty_like(bank);
  const DirectionBank<T> added = {size, runs.first.data(), grad_rows, pointer<T>(grad)};
  at::parallel_for(0, bank.size(0), 4, [&](int64_t begin, int64_t end) { kernels_for(T()).bank(added, begin, end); });
  return grad;
}

// The gradients of source, edited and bank, for logits and loss alike.
template <typename T>
Gradients differentiate(
    Direction<T>& args, const Tensor& source, const Tensor& edited, const Tensor& bank, const Needs& needs) {
  Gradients gradients(needs.size());
  if (needs[0]) gradients[0] = at::empty_like(source);
  if (needs[1]) gradients[1] = at::empty_like(edited);
  args.grad_source = pointer_or_null<T>(gradients[0]);
  args.grad_edited = pointer_or_null<T>(gradients[1]);
  if (needs[2])
    gradients[2] = differentiate_with_bank(args, bank);
  else
    at::parallel_for(
        0, args.samples, grain(bank), [&](int64_t begin, int64_t end) { kernels_for(T()).backward(args, begin, end); });
  return gradients;
}

template <typename T>
Direction<T> make_loss_arguments(
    const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, const Tensor& target_emotion, double scale, double contrast, bool normalize,
    double min_change) {
  Direction<T> args = make_arguments<T>(source, edited, bank, individual, source_emotion, normalize, min_change);
  args.target_emotion = pointer<int64_t>(target_emotion);
  args.scale = scale, args.contrast = contrast;
  return args;
}

}  // namespace

Tensor direction_logits(
    const Tensor& source,          // (B, D)
    const Tensor& edited,          // (B, D)
    const Tensor& bank,            // (N, E, D)
    const Tensor& individual,      // (B,) int64
    const Tensor& source_emotion,  // (B,) int64
    bool normalize, double min_change) {
  check_samples(bank, individual, source_emotion);
  Tensor logits = at::empty({source.size(0), bank.size(1)}, source.options());
  for_dtype(source, [&](auto zero) {
    using T = decltype(zero);
    Direction<T> args = make_arguments<T>(source, edited, bank, individual, source_emotion, normalize, min_change);
    args.logits = pointer<T>(logits);
    at::parallel_for(
        0, args.samples, grain(bank), [&](int64_t begin, int64_t end) { kernels_for(zero).forward(args, begin, end); });
  });
  return logits;
}

Gradients direction_logits_backward(
    const Tensor& grad,  // (B, E)
    const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, bool normalize, double min_change, const Needs& needs) {
  Gradients gradients;
  for_dtype(source, [&](auto zero) {
    using T = decltype(zero);
    Direction<T> args = make_arguments<T>(source, edited, bank, individual, source_emotion, normalize, min_change);
    args.grad_logits = pointer<T>(grad);
    gradients = differentiate(args, source, edited, bank, needs);
  });
  return gradients;
}

std::tuple<Tensor, Tensor> direction_loss(  // the loss, () or (B,), and the number it is divided by, ()
    const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion,
    const Tensor& target_emotion,        // (B,) int64
    const std::optional<Tensor>& scale,  // ()
    double scale_number, double contrast, bool normalize, double min_change,
    const std::string& reduction) {
  check_samples(bank, individual, source_emotion);
  check_range("target_emotion", target_emotion, bank.size(1), "emotions in bank");
  const at::TensorOptions wide = computing(source);
  Tensor losses = at::empty({source.size(0)}, wide), divisor = at::empty({}, wide), loss = losses;
  for_dtype(source, [&](auto zero) {
    using T = decltype(zero);
    using C = typename Direction<T>::C;
    Direction<T> args = make_loss_arguments<T>(
        source, edited, bank, individual, source_emotion, target_emotion, number(scale, scale_number), contrast,
        normalize, min_change);
    args.losses = pointer<C>(losses);
    at::parallel_for(
        0, args.samples, grain(bank), [&](int64_t begin, int64_t end) { kernels_for(zero).forward(args, begin, end); });
    int64_t valid = 0;
    double total = 0;
    for (int64_t k = 0; k < args.samples; ++k) {
      valid += args.source_emotion[k] != args.target_emotion[k];
      total += args.losses[k];
    }
    const C by = reduction == "mean" ? C(std::max<int64_t>(valid, 1)) : C(1);
    *pointer<C>(divisor) = by;
    if (reduction != "none") {
      loss = at::empty({}, wide);
      *pointer<C>(loss) = C(total / by);
    }
  });
  return {loss, divisor};
}

Gradients direction_loss_backward(
    const Tensor& grad,  // () or (B,)
    const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, const Tensor& target_emotion, const std::optional<Tensor>& scale, double scale_number,
    double contrast, bool normalize, double min_change, const std::string& reduction, const Tensor& divisor,
    const Needs& needs) {
  Gradients gradients;
  for_dtype(source, [&](auto zero) {
    using T = decltype(zero);
    using C = typename Direction<T>::C;
    Direction<T> args = make_loss_arguments<T>(
        source, edited, bank, individual, source_emotion, target_emotion, number(scale, scale_number), contrast,
        normalize, min_change);
    args.grad_losses = pointer<C>(grad);
    args.grad_stride = reduction == "none" ? 1 : 0;
    args.grad_factor = C(1) / *pointer<C>(divisor);
    Tensor scale_gradient;
    if (needs[3]) {
      scale_gradient = at::empty({args.samples}, computing(source));
      args.grad_scale = pointer<C>(scale_gradient);
    }
    gradients = differentiate(args, source, edited, bank, needs);
    if (needs[3]) {
      double total = 0;
      for (int64_t k = 0; k < args.samples; ++k) total += args.grad_scale[k];
      gradients[3] = at::full({}, total, scale->options());
    }
  });
  return gradients;
}

PCMECL_BIND(direction_logits, 0, 1, 2)
PCMECL_BIND(direction_loss, 0, 1, 2, 6)

}  // namespace pcmecl::cpu
