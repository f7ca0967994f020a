// clip_frames; the arithmetic is in frames_kernels.h.
#include "../common/bands.h"
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

}  // namespace

// out = gain[channel] · resized + bias[channel], of frames of height × width to size × size; or the transpose of the
// resize, from size × size to height × width.
void resize_frames(
    int threads, int dtype, Address in, Address out, int64_t images, int64_t height, int64_t width, int64_t size,
    const std::string& interpolation, bool transpose, double gain_0, double gain_1, double gain_2, double bias_0,
    double bias_1, double bias_2) {
  const Filter filter = filter_named(interpolation);
  BandWeights rows = resize_weights(filter, height, size), columns = resize_weights(filter, width, size);
  if (transpose) rows = transposed(rows), columns = transposed(columns);
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using C = typename Computing<T>::type;
    const BandTable<C> row_table(rows), column_table(columns);
    Frames<T> args = {};
    args.planes = images * 3, args.channels = 3;
    args.in = in.of<const T>(), args.out = out.of<T>();
    args.rows = band_of(row_table), args.columns = band_of(column_table);
    args.gain[0] = C(gain_0), args.gain[1] = C(gain_1), args.gain[2] = C(gain_2);
    args.bias[0] = C(bias_0), args.bias[1] = C(bias_1), args.bias[2] = C(bias_2);
    const int64_t pixels = args.columns.before * args.rows.taps + args.columns.after * args.columns.taps;
    const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, pixels));
    parallel(threads, args.planes * args.rows.after, grain, [&](int64_t begin, int64_t end, int) {
      kernels_for(zero).resize(args, begin, end);
    });
  });
}

PCMECL_BIND(resize_frames)

}  // namespace pcmecl::cpu
