// clip_frames on tensors.
#include "operators.h"

namespace pcmecl::cuda {
namespace {

// A band's tables, allocated; filled by `fill_bands`. `before` and `after` are the resize's, also for its transpose.
struct Table {
  Tensor first, weights;
  Band band;

  Table(Filter filter, int64_t before, int64_t after, bool transposed, const Tensor& like) {
    band.before = int(transposed ? after : before), band.after = int(transposed ? before : after);
    band.taps = resize_taps(filter, int(before), int(after), transposed);
    first = at::empty({band.after}, like.options().dtype(at::kInt));
    weights = at::empty({band.taps, band.after}, in_float(like));
    band.first = pointer<int>(first), band.weights = pointer<float>(weights);
  }
};

void resize(
    const Tensor& in, const Tensor& out, const Tensor& frames, int64_t size, Filter filter, bool transposed,
    const std::vector<double>& gain, const std::vector<double>& bias) {
  const Table rows(filter, frames.size(2), size, transposed, frames);
  const Table columns(filter, frames.size(3), size, transposed, frames);
  if (frames.numel() == 0) return;
  fill_bands(rows.band, columns.band, filter, transposed);
  for_dtype(frames, [&](auto zero) {
    using T = decltype(zero);
    Frames<T> args = {in.size(0) * 3, pointer<T>(in), pointer<T>(out), rows.band, columns.band};
    for (int channel = 0; channel < 3; ++channel)
      args.gain[channel] = float(gain[channel]), args.bias[channel] = float(bias[channel]);
    resize_frames(args);
  });
}

std::vector<double> gains(const std::vector<double>& std) { return {0.5 / std[0], 0.5 / std[1], 0.5 / std[2]}; }

}  // namespace

// Weights sum to 1, so ((x + 1) / 2 − mean) / std after the resize is a gain and a bias.
Tensor clip_frames(
    const Tensor& frames, int64_t size, const std::vector<double>& mean, const std::vector<double>& std,
    const std::string& interpolation) {
  const c10::DeviceGuard guard(frames.device());
  Tensor out = at::empty({frames.size(0), 3, size, size}, frames.options());
  std::vector<double> bias;
  for (int channel = 0; channel < 3; ++channel) bias.push_back((0.5 - mean[channel]) / std[channel]);
  resize(frames, out, frames, size, filter_named(interpolation), false, gains(std), bias);
  return out;
}

Gradients clip_frames_backward(
    const Tensor& grad, const Tensor& frames, int64_t size, const std::vector<double>&, const std::vector<double>& std,
    const std::string& interpolation, const Needs&) {
  const c10::DeviceGuard guard(frames.device());
  Tensor of_frames = at::empty(frames.sizes(), frames.options());
  resize(grad, of_frames, frames, size, filter_named(interpolation), true, gains(std), {0, 0, 0});
  return {of_frames};
}

PCMECL_BIND(clip_frames)

}  // namespace pcmecl::cuda
