// clip_frames on tensors: the bands' weights and threads; the arithmetic is in frames_kernels.h.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "../common/resize.h"
#include "kernels.h"
#include "operators.h"

namespace pcmecl::cpu {
namespace {

const FramesKernels<float>& kernels_for(float) { return kernels().frames_float; }
const FramesKernels<double>& kernels_for(double) { return kernels().frames_double; }
const FramesKernels<BFloat16>& kernels_for(BFloat16) { return kernels().frames_bfloat16; }

// One side's weights, rows of new pixels over columns of old ones, as the band that is not 0.
struct Weights {
  int64_t before, after;
  std::vector<int64_t> first;                // (after,)
  std::vector<std::vector<double>> weights;  // of each new pixel, from its first old one on
};

Weights resize_weights(Filter filter, int64_t before, int64_t after) {
  Weights band = {before, after, {}, {}};
  for (int64_t pixel = 0; pixel < after; ++pixel) {
    const ResizeWindow window = resize_window(filter, pixel, before, after);
    std::vector<double> weights;
    double total = 0;
    for (int64_t old = window.first; old < window.last; ++old) {
      weights.push_back(resize_weight(window, old));
      total += weights.back();
    }
    for (double& weight : weights) weight /= total;
    band.first.push_back(window.first);
    band.weights.push_back(weights);
  }
  return band;
}

Weights transposed(const Weights& band) {
  Weights other = {band.after, band.before, std::vector<int64_t>(band.before, 0), {}};
  other.weights.resize(band.before);
  for (int64_t pixel = 0; pixel < band.after; ++pixel)
    for (size_t tap = 0; tap < band.weights[pixel].size(); ++tap) {
      const int64_t old = band.first[pixel] + int64_t(tap);
      // Windows move on with their pixel, so those that hold an old pixel follow one another.
      if (other.weights[old].empty()) other.first[old] = pixel;
      other.weights[old].push_back(band.weights[pixel][tap]);
    }
  return other;
}

// The same number of taps for every pixel, all inside the old ones.
template <typename C>
struct Table {
  std::vector<int32_t> first;
  std::vector<C> weights;
  int64_t before, after, taps = 1;

  explicit Table(const Weights& band) : before(band.before), after(band.after) {
    for (const auto& weights : band.weights) taps = std::max<int64_t>(taps, int64_t(weights.size()));
    weights.resize(taps * after, C(0));
    for (int64_t pixel = 0; pixel < after; ++pixel) {
      const int64_t start = std::min(band.first[pixel], before - taps);
      first.push_back(int32_t(start));
      for (size_t tap = 0; tap < band.weights[pixel].size(); ++tap)
        weights[(band.first[pixel] - start + int64_t(tap)) * after + pixel] = C(band.weights[pixel][tap]);
    }
  }

  Band band() const { return {before, after, taps, first.data(), weights.data()}; }
};

template <typename T>
void resize(
    const Tensor& in, const Tensor& out, const Weights& rows, const Weights& columns, const std::vector<double>& gain,
    const std::vector<double>& bias) {
  using C = typename Computing<T>::type;
  const Table<C> row_table(rows), column_table(columns);
  Frames<T> args = {};
  args.planes = in.size(0) * in.size(1), args.channels = in.size(1);
  args.in = static_cast<const T*>(in.data_ptr()), args.out = static_cast<T*>(out.data_ptr());
  args.rows = row_table.band(), args.columns = column_table.band();
  for (int64_t channel = 0; channel < 3; ++channel)
    args.gain[channel] = gain[channel], args.bias[channel] = bias[channel];
  const int64_t pixels = args.columns.before * args.rows.taps + args.columns.after * args.columns.taps;
  at::parallel_for(
      0, args.planes * args.rows.after, std::max<int64_t>(1, 65536 / pixels),
      [&](int64_t begin, int64_t end) { kernels_for(T()).resize(args, begin, end); });
}

void resize_any(
    const Tensor& in, const Tensor& out, const Weights& rows, const Weights& columns, const std::vector<double>& gain,
    const std::vector<double>& bias) {
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
  const Weights rows = resize_weights(filter, frames.size(2), size);
  const Weights columns = resize_weights(filter, frames.size(3), size);
  resize_any(frames, out, rows, columns, gains(std), bias);
  return out;
}

Gradients clip_frames_backward(
    const Tensor& grad,  // (B, 3, size, size)
    const Tensor& frames, int64_t size, const std::vector<double>&, const std::vector<double>& std,
    const std::string& interpolation, const Needs&) {
  const Filter filter = filter_named(interpolation);
  Tensor of_frames = at::empty(frames.sizes(), frames.options());
  const Weights rows = transposed(resize_weights(filter, frames.size(2), size));
  const Weights columns = transposed(resize_weights(filter, frames.size(3), size));
  resize_any(grad, of_frames, rows, columns, gains(std), {0, 0, 0});
  return {of_frames};
}

PCMECL_BIND(clip_frames)

}  // namespace pcmecl::cpu
