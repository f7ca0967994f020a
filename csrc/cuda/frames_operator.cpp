// clip_frames on tensors.
#include <map>
#include <mutex>

#include "../common/bands.h"
#include "kept.h"
#include "operators.h"

namespace pcmecl::cuda {
namespace {

// A resize along one side, or its transpose. The host makes its table at the first call for its sizes and device.
struct Side {
  Filter filter;
  int64_t before, after;
  bool transposed;

  Band band(c10::DeviceIndex device) const {
    static std::mutex making;
    static std::map<std::tuple<Filter, int64_t, int64_t, bool, c10::DeviceIndex>, Band> made;
    const std::lock_guard<std::mutex> one_at_a_time(making);
    const auto key = std::tuple(filter, before, after, transposed, device);
    if (const auto found = made.find(key); found != made.end()) return found->second;
    return made[key] = make_band();
  }

 private:
  Band make_band() const {
    const BandWeights weights = resize_weights(filter, before, after);
    const BandTable<float> table(transposed ? pcmecl::transposed(weights) : weights);
    return {
        int(table.before), int(table.after), int(table.taps),
        static_cast<const int*>(keep_on_device(table.first.data(), table.first.size() * sizeof(int))),
        static_cast<const float*>(keep_on_device(table.weights.data(), table.weights.size() * sizeof(float)))};
  }
};

void resize(
    const Tensor& in, const Tensor& out, const Tensor& frames, int64_t size, Filter filter, bool transposed,
    const std::vector<double>& gain, const std::vector<double>& bias) {
  if (frames.numel() == 0) return;
  const c10::DeviceIndex device = frames.device().index();
  const Band rows = Side{filter, frames.size(2), size, transposed}.band(device);
  const Band columns = Side{filter, frames.size(3), size, transposed}.band(device);
  for_dtype(frames, [&](auto zero) {
    using T = decltype(zero);
    Frames<T> args = {in.size(0) * 3, pointer<T>(in), pointer<T>(out), rows, columns};
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

PCMECL_BIND(clip_frames, 0)

}  // namespace pcmecl::cuda
