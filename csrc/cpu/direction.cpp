// direction_loss and direction_logits on tensors: allocation and threads; the arithmetic is in direction_kernels.h.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>

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

const DirectionKernels<float>& of(float) { return kernels().direction_float; }
const DirectionKernels<double>& of(double) { return kernels().direction_double; }
const DirectionKernels<BFloat16>& of(BFloat16) { return kernels().direction_bfloat16; }

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

// Samples a thread takes at least: about 100k multiply-adds.
int64_t grain(const Tensor& bank) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, bank.size(1) * bank.size(2))) * 4; }

template <typename T>
Direction<T> open(
    const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, bool normalize) {
  Direction<T> args = {};
  args.samples = source.size(0), args.width = source.size(1), args.emotions = bank.size(1);
  args.source = pointer<T>(source), args.edited = pointer<T>(edited), args.bank = pointer<T>(bank);
  args.individual = pointer<int64_t>(individual), args.source_emotion = pointer<int64_t>(source_emotion);
  args.normalize = normalize;
  return args;
}

// The bank's gradient from what the backward wrote down of each sample.
template <typename T>
Tensor bank_gradient(const Direction<T>& args, const Tensor& bank) {
  const int64_t individuals = bank.size(0);
  std::vector<int64_t> first(individuals + 1, 0), order(args.samples);
  for (int64_t k = 0; k < args.samples; ++k) ++first[args.individual[k] + 1];
  for (int64_t n = 0; n < individuals; ++n) first[n + 1] += first[n];
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t k = 0; k < args.samples; ++k) order[next[args.individual[k]]++] = k;

  Tensor grad = at::empty_like(bank);
  DirectionBank<T> units = {&args, first.data(), order.data(), 256, (args.width + 255) / 256, pointer<T>(grad)};
  at::parallel_for(0, individuals * units.columns_blocks, 1, [&](int64_t begin, int64_t end) {
    of(T()).bank(units, begin, end);
  });
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
  Tensor coefficients;
  if (needs[2]) {
    coefficients = at::empty({args.samples, 2 * args.emotions + 2}, computing(source));
    args.coefficients = pointer<typename Direction<T>::C>(coefficients);
  }
  at::parallel_for(0, args.samples, grain(bank), [&](int64_t begin, int64_t end) {
    of(T()).backward(args, begin, end);
  });
  if (needs[2]) gradients[2] = bank_gradient(args, bank);
  return gradients;
}

template <typename T>
Direction<T> open_loss(
    const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, const Tensor& target_emotion, double scale, double contrast, bool normalize) {
  Direction<T> args = open<T>(source, edited, bank, individual, source_emotion, normalize);
  args.target_emotion = pointer<int64_t>(target_emotion);
  args.scale = scale, args.contrast = contrast;
  return args;
}

}  // namespace

Tensor direction_logits(
    const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, bool normalize) {
  Tensor logits = at::empty({source.size(0), bank.size(1)}, source.options());
  for_dtype(source, [&](auto zero) {
    using T = decltype(zero);
    Direction<T> args = open<T>(source, edited, bank, individual, source_emotion, normalize);
    args.logits = pointer<T>(logits);
    at::parallel_for(0, args.samples, grain(bank), [&](int64_t begin, int64_t end) {
      of(zero).forward(args, begin, end);
    });
  });
  return logits;
}

Gradients direction_logits_backward(
    const Tensor& grad, const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, bool normalize, const Needs& needs) {
  Gradients gradients;
  for_dtype(source, [&](auto zero) {
    using T = decltype(zero);
    Direction<T> args = open<T>(source, edited, bank, individual, source_emotion, normalize);
    args.grad_logits = pointer<T>(grad);
    gradients = differentiate(args, source, edited, bank, needs);
  });
  return gradients;
}

std::tuple<Tensor, Tensor> direction_loss(
    const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, const Tensor& target_emotion, const std::optional<Tensor>& scale, double scale_number,
    double contrast, bool normalize, const std::string& reduction) {
  const at::TensorOptions wide = computing(source);
  Tensor losses = at::empty({source.size(0)}, wide), divisor = at::empty({}, wide), loss = losses;
  for_dtype(source, [&](auto zero) {
    using T = decltype(zero);
    using C = typename Direction<T>::C;
    Direction<T> args = open_loss<T>(
        source, edited, bank, individual, source_emotion, target_emotion, number(scale, scale_number), contrast,
        normalize);
    args.losses = pointer<C>(losses);
    at::parallel_for(0, args.samples, grain(bank), [&](int64_t begin, int64_t end) {
      of(zero).forward(args, begin, end);
    });
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
    const Tensor& grad, const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, const Tensor& target_emotion, const std::optional<Tensor>& scale, double scale_number,
    double contrast, bool normalize, const std::string& reduction, const Tensor& divisor, const Needs& needs) {
  Gradients gradients;
  for_dtype(source, [&](auto zero) {
    using T = decltype(zero);
    using C = typename Direction<T>::C;
    Direction<T> args = open_loss<T>(
        source, edited, bank, individual, source_emotion, target_emotion, number(scale, scale_number), contrast,
        normalize);
    args.grad_losses = pointer<C>(grad);
    args.grad_stride = reduction == "none" ? 1 : 0;
    args.grad_factor = C(1) / *pointer<C>(divisor);
    Tensor of_scale;
    if (needs[3]) {
      of_scale = at::empty({args.samples}, computing(source));
      args.grad_scale = pointer<C>(of_scale);
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

}  // namespace pcmecl::cpu
