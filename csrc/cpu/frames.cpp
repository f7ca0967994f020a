// clip_frames on tensors: allocation and threads; the arithmetic is in frames_kernels.h.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include "../common/bands.h"
#include "kernels.h"
#include "operators.h"

namespace pcmecl::cpu {
namespace {

const FramesKernels<float>& kernels_for(float) { return kernels().frames_float; }
const FramesKernels<double>& kernels_for(double) { return kernels().frames_double; }
const FramesKernels<BFloat16>& kernels_for(BFloat16) { return kernels().frames_bfloat16; }

template <typename C>
Band band_of(const BandTable<C>& table) {
  return {table.before, table.after, table.taps, table.first.data(), table.weights.data()};
}

template <typename T>
void resize(
    const Tensor& in, const Tensor& out, const BandWeights& rows, const BandWeights& columns,
    const std::vector<double>& gain, const std::vector<double>& bias) {
  using C = typename Computing<T>::type;
  const BandTable<C> row_table(rows), column_table(columns);
  Frames<T> args = {};
  args.planes = in.size(0) * in.size(1), args.channels = in.size(1);
  args.in = static_cast<const T*>(in.data_ptr()), args.out = static_cast<T*>(out.data_ptr());
  args.rows = band_of(row_table), args.columns = band_of(column_table);
  for (int64_t channel = 0; channel < 3; ++channel)
    args.gain[channel] = gain[channel], args.bias[channel] = bias[channel];
  const int64_t pixels = args.columns.before * args.rows.taps + args.columns.after * args.columns.taps;
  at::parallel_for(
      0, args.planes * args.rows.after, std::max<int64_t>(1, 65536 / pixels),
      [&](int64_t begin, int64_t end) { kernels_for(T()).resize(args, begin, end); });
}

void resize_any(
    const Tensor& in, const Tensor& out, const BandWeights& rows, const BandWeights& columns,
    const std::vector<double>& gain, const std::vector<double>& bias) {
  switch (in.scalar_type()) {
    case at::kFloat: return resize<float>(in, out, rows, columns, gain, bias);
    case at::kDouble: return resize<double>(in, out, rows, columns, gain, bias);
    case at::kBFloat16: return resize<BFloat16>(in, out, rows, columns, gain, bias);
    default: TORCH_CHECK_TYPE(false, "frames: got ", in.scalar_type(), "; takes float32, float64 or bfloat16");
  }
}

std::vector<double> gains(const std::vector<double>& std) { return {0.5 / std[0], 0.5 / std[1], 0.5 / std[2]}; }

}  // namespace

// Weights sum to 1, so ((x + 1) / 2 − mean) / std after the resize is a gain and a bias.
Tensor clip_frames(  // (B, 3, size, size)
    const Tensor& frames,  // (B, 3, H, W)
    int64_t size, const std::vector<double>& mean, const std::vector<double>& std, const std::string& interpolation) {
  const Filter filter = filter_named(interpolation);
  Tensor out = at::empty({frames.size(0), 3, size, size}, frames.options());
  std::vector<double> bias;
  for (int64_t channel = 0; channel < 3; ++channel) bias.push_back((0.5 - mean[channel]) / std[channel]);
  const BandWeights rows = resize_weights(filter, frames.size(2), size);
  const BandWeights columns = resize_weights(filter, frames.size(3), size);
  resize_any(frames, out, rows, columns, gains(std), bias);
  return out;
}

Gradients clip_frames_backward(
    const Tensor& grad,  // (B, 3, size, size)
    const Tensor& frames, int64_t size, const std::vector<double>&, const std::vector<double>& std,
    const std::string& interpolation, const Needs&) {
  const Filter filter = filter_named(interpolation);
  Tensor of_frames = at::empty(frames.sizes(), frames.options());
  const BandWeights rows = transposed(resize_weights(filter, frames.size(2), size));
  const BandWeights columns = transposed(resize_weights(filter, frames.size(3), size));
  resize_any(grad, of_frames, rows, columns, gains(std), {0, 0, 0});
  return {of_frames};
}

PCMECL_BIND(clip_frames, 0)

}  // namespace pcmecl::cpu
