// direction_loss and direction_logits on tensors: allocation, and how the bank's gradient is added up.
#include <ATen/Context.h>

#include "operators.h"

namespace pcmecl::cuda {
namespace {

template <typename T>
Direction<T> make_arguments(
    const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, bool normalize, double min_change) {
  Direction<T> args = {};
  args.samples = source.size(0), args.width = source.size(1);
  args.individuals = bank.size(0), args.emotions = int(bank.size(1));
  args.source = pointer<T>(source), args.edited = pointer<T>(edited), args.bank = pointer<T>(bank);
  args.individual = pointer<int64_t>(individual), args.source_emotion = pointer<int64_t>(source_emotion);
  args.normalize = normalize, args.min_change = float(min_change);
  return args;
}

// Bitwise the same in every run.
template <typename T>
Tensor ordered_bank(const Direction<T>& args, const Tensor& bank, const Tensor& individual) {
  const auto [sorted, order] = at::sort(individual, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const Tensor first = at::searchsorted(sorted, at::arange(bank.size(0) + 1, individual.options()));
  Tensor grad = at::empty_like(bank);
  direction_bank(args, pointer<int64_t>(first), pointer<int64_t>(order), bank.size(0), pointer<T>(grad));
  return grad;
}

template <typename T>
Gradients differentiate(
    Direction<T>& args, const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Needs& needs) {
  Gradients gradients(needs.size());
  if (needs[0]) gradients[0] = at::empty_like(source);
  if (needs[1]) gradients[1] = at::empty_like(edited);
  args.grad_source = pointer_or_null<T>(gradients[0]);
  args.grad_edited = pointer_or_null<T>(gradients[1]);
  const bool ordered = at::globalContext().deterministicAlgorithms();
  Tensor coefficients, bank_sum;
  if (needs[2] && ordered) {
    coefficients = at::empty({args.samples, 2 * args.emotions + 2}, in_float(source));
    args.coefficients = pointer<float>(coefficients);
  } else if (needs[2]) {
    bank_sum = at::zeros(bank.sizes(), in_float(bank));
    args.grad_bank = pointer<float>(bank_sum);
  }
  direction_backward(args);
  if (needs[2]) gradients[2] = ordered ? ordered_bank(args, bank, individual) : bank_sum.to(bank.scalar_type());
  return gradients;
}

}  // namespace

Tensor direction_logits(
    const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, bool normalize, double min_change) {
  const c10::DeviceGuard guard(source.device());
  Tensor logits = at::empty({source.size(0), bank.size(1)}, source.options());
  for_dtype(source, [&](auto zero) {
    using T = decltype(zero);
    Direction<T> args = make_arguments<T>(source, edited, bank, individual, source_emotion, normalize, min_change);
    args.logits = pointer<T>(logits);
    direction_forward(args);
  });
  return logits;
}

Gradients direction_logits_backward(
    const Tensor& grad, const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, bool normalize, double min_change, const Needs& needs) {
  const c10::DeviceGuard guard(source.device());
  Gradients gradients;
  for_dtype(source, [&](auto zero) {
    using T = decltype(zero);
    Direction<T> args = make_arguments<T>(source, edited, bank, individual, source_emotion, normalize, min_change);
    args.grad_logits = pointer<T>(grad);
    gradients = differentiate(args, source, edited, bank, individual, needs);
  });
  return gradients;
}

std::tuple<Tensor, Tensor> direction_loss(
    const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, const Tensor& target_emotion, const std::optional<Tensor>& scale, double scale_number,
    double contrast, bool normalize, double min_change, const std::string& reduction) {
  const c10::DeviceGuard guard(source.device());
  const ScaleArgument scale_argument(scale, scale_number);
  Tensor losses = at::empty({source.size(0)}, in_float(source));
  for_dtype(source, [&](auto zero) {
    using T = decltype(zero);
    Direction<T> args = make_arguments<T>(source, edited, bank, individual, source_emotion, normalize, min_change);
    args.target_emotion = pointer<int64_t>(target_emotion);
    args.scale = scale_argument.value(), args.contrast = float(contrast);
    args.losses = pointer<float>(losses);
    direction_forward(args);
  });
  if (reduction == "none") return {losses, at::ones({}, losses.options())};
  Tensor loss = at::empty({}, losses.options()), divisor = at::empty({}, losses.options());
  direction_reduce(
      pointer<float>(losses), pointer<int64_t>(source_emotion), pointer<int64_t>(target_emotion), source.size(0),
      reduction == "mean", pointer<float>(loss), pointer<float>(divisor));
  return {loss, divisor};
}

Gradients direction_loss_backward(
    const Tensor& grad, const Tensor& source, const Tensor& edited, const Tensor& bank, const Tensor& individual,
    const Tensor& source_emotion, const Tensor& target_emotion, const std::optional<Tensor>& scale, double scale_number,
    double contrast, bool normalize, double min_change, const std::string& reduction, const Tensor& divisor,
    const Needs& needs) {
  const c10::DeviceGuard guard(source.device());
  const ScaleArgument scale_argument(scale, scale_number);
  Tensor scale_gradient;
  if (needs[3]) scale_gradient = at::empty({source.size(0)}, in_float(source));
  Gradients gradients;
  for_dtype(source, [&](auto zero) {
    using T = decltype(zero);
    Direction<T> args = make_arguments<T>(source, edited, bank, individual, source_emotion, normalize, min_change);
    args.target_emotion = pointer<int64_t>(target_emotion);
    args.scale = scale_argument.value(), args.contrast = float(contrast);
    args.grad_losses = pointer<float>(grad), args.grad_stride = reduction == "none" ? 1 : 0;
    args.divisor = pointer<float>(divisor);
    args.grad_scale = needs[3] ? pointer<float>(scale_gradient) : nullptr;
    gradients = differentiate(args, source, edited, bank, individual, needs);
  });
  if (needs[3]) gradients[3] = scale_gradient.sum().to(scale->scalar_type());
  return gradients;
}

PCMECL_BIND(direction_logits, 0, 1, 2)
PCMECL_BIND(direction_loss, 0, 1, 2, 6)

}  // namespace pcmecl::cuda
