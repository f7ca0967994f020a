// clip_frames: out = gain · (rows · in · columnsᵀ) + bias, both maps banded.
//
// A unit owns one row of the output: it adds up the old rows of its band (vectors along the row, `taps` loads and
// multiply-adds a pixel) into a scratch row that stays in the first-level cache, then the band of columns from there.
// Each old row is read by the few neighbouring units that need it, from cache. The backward is the same function with
// the transposed bands. Operations: 2·taps a pixel of either pass; bound by the gathers of the second.

#if defined(PCMECL_GATHER) && PCMECL_VECTOR_BYTES == 64
PCMECL_INLINE Vector<float> gather(const float* from, const int32_t* index) {
  return (Vector<float>)_mm512_i32gather_ps(_mm512_loadu_si512(index), from, 4);
}
#elif defined(PCMECL_GATHER)
PCMECL_INLINE Vector<float> gather(const float* from, const int32_t* index) {
  return (Vector<float>)_mm256_i32gather_ps(from, _mm256_loadu_si256((const __m256i*)index), 4);
}
#else
PCMECL_INLINE Vector<float> gather(const float* from, const int32_t* index) {
  Vector<float> value;
  for (int64_t k = 0; k < kLanes<float>; ++k) value[k] = from[index[k]];
  return value;
}
#endif
PCMECL_INLINE Vector<double> gather(const double* from, const int32_t* index) {
  Vector<double> value;
  for (int64_t k = 0; k < kLanes<double>; ++k) value[k] = from[index[k]];
  return value;
}

template <typename T, typename C>
void add_rows(const Frames<T>& args, const T* plane, int64_t row, C* to) {
  const int64_t width = args.columns.before;
  const T* from = plane + args.rows.first[row] * width;
  const C* weights = (const C*)args.rows.weights + row;
  const int64_t taps = args.rows.taps, stride = args.rows.after;
  each<C>(
      width,
      [&](int64_t x) {
        Vector<C> total = {};
        for (int64_t tap = 0; tap < taps; ++tap) total += weights[tap * stride] * load(from + tap * width + x);
        store(to + x, total);
      },
      [&](int64_t x) {
        C total = 0;
        for (int64_t tap = 0; tap < taps; ++tap) total += weights[tap * stride] * widen(from[tap * width + x]);
        to[x] = total;
      });
}

template <typename T, typename C>
void add_columns(const Frames<T>& args, const C* from, C gain, C bias, T* to) {
  const int64_t width = args.columns.after, taps = args.columns.taps;
  const C* weights = (const C*)args.columns.weights;
  const int32_t* first = args.columns.first;
  each<C>(
      width,
      [&](int64_t x) {
        Vector<C> total = {};
        for (int64_t tap = 0; tap < taps; ++tap)
          total += load(weights + tap * width + x) * gather(from + tap, first + x);
        store(to + x, total * gain + bias);
      },
      [&](int64_t x) {
        C total = 0;
        for (int64_t tap = 0; tap < taps; ++tap) total += weights[tap * width + x] * from[first[x] + tap];
        narrow(total * gain + bias, to + x);
      });
}

template <typename T>
void frames_resize(const Frames<T>& args, int64_t begin, int64_t end) {
  using C = typename Computing<T>::type;
  std::vector<C> scratch(args.columns.before);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t plane = unit / args.rows.after, row = unit % args.rows.after, channel = plane % args.channels;
    add_rows(args, args.in + plane * args.rows.before * args.columns.before, row, scratch.data());
    add_columns(args, scratch.data(), args.gain[channel], args.bias[channel], args.out + unit * args.columns.after);
  }
}
