// direction_loss and direction_logits for Python.
#include "operators.h"

namespace pcmecl::cuda {
namespace {

struct Inputs {
  int64_t samples, width, individuals;
  int emotions;
  Address source, edited, bank, individual, source_emotion;
  bool normalize;
  double min_change;

  template <typename T>
  Direction<T> arguments() const {
    Direction<T> args = {};
    args.samples = samples, args.width = width, args.individuals = individuals, args.emotions = emotions;
    args.source = source.of<T>(), args.edited = edited.of<T>(), args.bank = bank.of<T>();
    args.individual = individual.of<int64_t>(), args.source_emotion = source_emotion.of<int64_t>();
    args.normalize = normalize, args.min_change = float(min_change);
    return args;
  }
};

// Where gradients go; what nobody needs is missing. The bank's is the last, with what it takes on the way (kernels.h).
struct Outputs {
  Address source, edited;
  int stretches, stretch, run;
  Address counts, first, order, coefficients, sums, bank;
};

template <typename T>
void differentiate(Direction<T>& args, const Outputs& to) {
  args.grad_source = to.source.of<T>(), args.grad_edited = to.edited.of<T>();
  if (!to.bank) return direction_backward(args);
  const BankOrder order = {
      int(args.samples), int(args.individuals), to.stretches,       to.stretch,         to.run,
      args.individual,   to.counts.of<int>(),   to.first.of<int>(), to.order.of<int>(), to.sums.of<float>()};
  args.order = order.order, args.coefficients = to.coefficients.of<float>();
  direction_order(order);
  direction_backward(args);
  direction_bank(args, order, to.bank.of<T>());
}

}  // namespace

void direction_logits(
    int device, Address stream, int dtype, int64_t samples, int64_t width, int64_t individuals, int emotions,
    Address source, Address edited, Address bank, Address individual, Address source_emotion, bool normalize,
    double min_change, Address logits) {
  const On on(device, stream.value);
  const Inputs inputs = {samples, width,      individuals,    emotions,  source,    edited,
                         bank,    individual, source_emotion, normalize, min_change};
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    Direction<T> args = inputs.arguments<T>();
    args.logits = logits.of<T>();
    direction_forward(args);
  });
}

void direction_logits_backward(
    int device, Address stream, int dtype, int64_t samples, int64_t width, int64_t individuals, int emotions,
    Address source, Address edited, Address bank, Address individual, Address source_emotion, bool normalize,
    double min_change, Address grad, Address grad_source, Address grad_edited, int stretches, int stretch, int run,
    Address counts, Address first, Address order, Address coefficients, Address sums, Address grad_bank) {
  const On on(device, stream.value);
  const Inputs inputs = {samples, width,      individuals,    emotions,  source,    edited,
                         bank,    individual, source_emotion, normalize, min_change};
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    Direction<T> args = inputs.arguments<T>();
    args.grad_logits = grad.of<T>();
    differentiate(
        args, {grad_source, grad_edited, stretches, stretch, run, counts, first, order, coefficients, sums, grad_bank});
  });
}

// The losses, and where `loss` is wanted their sum over `divisor` (kernels.h).
void direction_loss(
    int device, Address stream, int dtype, int64_t samples, int64_t width, int64_t individuals, int emotions,
    Address source, Address edited, Address bank, Address individual, Address source_emotion, bool normalize,
    double min_change, Address target_emotion, Address scale, double scale_number, double contrast, Address losses,
    bool mean, Address parts, Address loss, Address divisor) {
  const On on(device, stream.value);
  const Inputs inputs = {samples, width,      individuals,    emotions,  source,    edited,
                         bank,    individual, source_emotion, normalize, min_change};
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    Direction<T> args = inputs.arguments<T>();
    args.target_emotion = target_emotion.of<int64_t>();
    args.scale = scale_of(scale, scale_number), args.contrast = float(contrast);
    args.losses = losses.of<float>();
    direction_forward(args);
  });
  if (loss)
    direction_reduce(
        {losses.of<float>(), source_emotion.of<int64_t>(), target_emotion.of<int64_t>(), samples, mean,
         parts.of<float>(), loss.of<float>(), divisor.of<float>()});
}

void direction_loss_backward(
    int device, Address stream, int dtype, int64_t samples, int64_t width, int64_t individuals, int emotions,
    Address source, Address edited, Address bank, Address individual, Address source_emotion, bool normalize,
    double min_change, Address target_emotion, Address scale, double scale_number, double contrast, Address grad,
    int64_t grad_stride, Address divisor, Address grad_scale, Address grad_source, Address grad_edited, int stretches,
    int stretch, int run, Address counts, Address first, Address order, Address coefficients, Address sums,
    Address grad_bank) {
  const On on(device, stream.value);
  const Inputs inputs = {samples, width,      individuals,    emotions,  source,    edited,
                         bank,    individual, source_emotion, normalize, min_change};
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    Direction<T> args = inputs.arguments<T>();
    args.target_emotion = target_emotion.of<int64_t>();
    args.scale = scale_of(scale, scale_number), args.contrast = float(contrast);
    args.grad_losses = grad.of<float>(), args.grad_stride = grad_stride, args.divisor = divisor.of<float>();
    args.grad_scale = grad_scale.of<float>();
    differentiate(
        args, {grad_source, grad_edited, stretches, stretch, run, counts, first, order, coefficients, sums, grad_bank});
  });
}

PCMECL_BIND(direction_logits)
PCMECL_BIND(direction_reduce_parts)
PCMECL_BIND(direction_logits_backward)
PCMECL_BIND(direction_loss)
PCMECL_BIND(direction_loss_backward)

}  // namespace pcmecl::cuda
