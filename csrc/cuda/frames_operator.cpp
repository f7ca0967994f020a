// clip_frames for Python.
#include <map>
#include <mutex>
#include <tuple>

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

  Band band(int device) const {
    static std::mutex making;
    static std::map<std::tuple<Filter, int64_t, int64_t, bool, int>, Band> made;
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

}  // namespace

// Frames (B, 3, height, width) to (B, 3, size, size), `transposed` the other way; then each colour's gain and bias.
void clip_frames(
    int device, Address stream, int dtype, int64_t frames, int64_t height, int64_t width, int64_t size,
    const std::string& interpolation, bool transposed, Address in, Address out, double red_gain, double green_gain,
    double blue_gain, double red_bias, double green_bias, double blue_bias) {
  const On on(device, stream.value);
  const Filter filter = filter_named(interpolation);
  const Band rows = Side{filter, height, size, transposed}.band(device);
  const Band columns = Side{filter, width, size, transposed}.band(device);
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    resize_frames(
        Frames<T>{
            frames * 3,
            in.of<T>(),
            out.of<T>(),
            rows,
            columns,
            {float(red_gain), float(green_gain), float(blue_gain)},
            {float(red_bias), float(green_bias), float(blue_bias)}});
  });
}

PCMECL_BIND(clip_frames)

}  // namespace pcmecl::cuda
