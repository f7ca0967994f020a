// Vectors of PCMECL_VECTOR_BYTES bytes by the compiler's vector extension: one source for every instruction set.
//
// Included inside a namespace of the instruction set, after the standard headers.

template <typename C>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(PCMECL_VECTOR_BYTES)));
  typedef int32_t bits __attribute__((vector_size(PCMECL_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(PCMECL_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(PCMECL_VECTOR_BYTES)));
  typedef int64_t bits __attribute__((vector_size(PCMECL_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(PCMECL_VECTOR_BYTES), aligned(8), may_alias));
};
template <typename C>
using Vector = typename VectorOf<C>::type;
template <typename C>
constexpr int64_t kLanes = PCMECL_VECTOR_BYTES / sizeof(C);

#define PCMECL_INLINE static inline __attribute__((always_inline))
#define PCMECL_LAMBDA __attribute__((always_inline))

PCMECL_INLINE float widen(float x) { return x; }
PCMECL_INLINE double widen(double x) { return x; }
PCMECL_INLINE float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

PCMECL_INLINE void narrow(float value, float* to) { *to = value; }
PCMECL_INLINE void narrow(double value, double* to) { *to = value; }
PCMECL_INLINE void narrow(float value, BFloat16* to) {  // to nearest, ties to even, as PyTorch
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to->bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

PCMECL_INLINE Vector<float> load(const float* p) { return *(const VectorOf<float>::unaligned*)p; }
PCMECL_INLINE Vector<double> load(const double* p) { return *(const VectorOf<double>::unaligned*)p; }
PCMECL_INLINE Vector<float> load(const BFloat16* p) {
  typedef uint16_t half __attribute__((vector_size(PCMECL_VECTOR_BYTES / 2), aligned(2), may_alias));
  typedef uint32_t whole __attribute__((vector_size(PCMECL_VECTOR_BYTES)));
  return (Vector<float>)(__builtin_convertvector(*(const half*)p, whole) << 16);
}
PCMECL_INLINE void store(float* p, Vector<float> x) { *(VectorOf<float>::unaligned*)p = x; }
PCMECL_INLINE void store(double* p, Vector<double> x) { *(VectorOf<double>::unaligned*)p = x; }
PCMECL_INLINE void store(BFloat16* p, Vector<float> x) {
  for (int64_t k = 0; k < kLanes<float>; ++k) narrow(x[k], p + k);
}

template <typename C>
PCMECL_INLINE Vector<C> all(C x) {
  return x - Vector<C>{};  // not `Vector{} + x`, which would turn -0 into 0
}

// The lanes' sum, half onto half: a chain of log2 additions, where one lane after another would be a chain of all.
template <typename C, size_t kBytes = PCMECL_VECTOR_BYTES, typename V>
PCMECL_INLINE C sum(V x) {
  if constexpr (kBytes == sizeof(C)) {
    return x[0];
  } else {
    typedef C Half __attribute__((vector_size(kBytes / 2), may_alias));
    const Half* halves = (const Half*)&x;
    return sum<C, kBytes / 2>(halves[0] + halves[1]);
  }
}

// Room for numbers that begins where a vector may: from elsewhere each would straddle two lines of the cache.
template <typename C>
class Aligned {
  struct alignas(PCMECL_VECTOR_BYTES) Lanes {
    C lane[kLanes<C>];
  };
  std::vector<Lanes> lanes_;

 public:
  explicit Aligned(int64_t count) : lanes_((count + kLanes<C> - 1) / kLanes<C>) {}
  operator C*() { return reinterpret_cast<C*>(lanes_.data()); }
};

// vector_step(k) over [0, count) in whole vectors, scalar_step(k) over the rest.
template <typename C, typename VectorStep, typename ScalarStep>
PCMECL_INLINE void each(int64_t count, VectorStep&& vector_step, ScalarStep&& scalar_step) {
  int64_t k = 0;
  for (; k + kLanes<C> <= count; k += kLanes<C>) vector_step(k);
  for (; k < count; ++k) scalar_step(k);
}

// 2^l · 2^-K and 2^-l · 2^-K for the price of one exponential: with l = n + f, |f| ≤ 1/2, and 2^f = even(f²) +
// f·odd(f²), 2^-f is even − f·odd. Results below the type's normal range are 0; NaN stays NaN (a product with it, not
// an addition to its bits). Right to 2 units in the last place.
template <typename C>
struct Exponentials {
  Vector<C> up, down;
};

PCMECL_INLINE Exponentials<float> exponentials(Vector<float> l, int64_t offset) {
  typedef VectorOf<float>::bits Bits;
  const Vector<float> magic = all(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer, kept in the low bits
  const Vector<float> shifted = l + magic;
  const Vector<float> f = l - (shifted - magic), f2 = f * f;
  const Vector<float> even = ((1.5403530e-4f * f2 + 9.6181291e-3f) * f2 + 2.4022651e-1f) * f2 + 1.0f;
  const Vector<float> odd = f * (((1.5252734e-5f * f2 + 1.3333558e-3f) * f2 + 5.5504109e-2f) * f2 + 6.9314718e-1f);
  const Bits n = (Bits)shifted - (Bits)magic;
  const Bits zero = {};
  Bits up = n + int32_t(127 - offset), down = int32_t(127 - offset) - n;
  up = up > zero ? up : zero;
  down = down > zero ? down : zero;
  return {(even + odd) * (Vector<float>)(up << 23), (even - odd) * (Vector<float>)(down << 23)};
}

PCMECL_INLINE Exponentials<double> exponentials(Vector<double> l, int64_t offset) {
  typedef VectorOf<double>::bits Bits;
  const Vector<double> magic = all(6755399441055744.0);  // 1.5 · 2^52
  const Vector<double> shifted = l + magic;
  const Vector<double> f = l - (shifted - magic), f2 = f * f;
  // ln(2)^k / k!
  // clang-format off
  const Vector<double> even =
      (((((2.5678435993488202e-11 * f2 + 7.0549116208011234e-09) * f2 + 1.3215486790144307e-06) * f2 +
         1.5403530393381606e-04) * f2 + 9.6181291076284772e-03) * f2 + 2.4022650695910072e-01) * f2 + 1.0;
  const Vector<double> odd =
      f * ((((((1.3691488853904129e-12 * f2 + 4.4455382718708116e-10) * f2 + 1.0178086009239699e-07) * f2 +
              1.5252733804059841e-05) * f2 + 1.3333558146428443e-03) * f2 + 5.5504108664821580e-02) * f2 +
           6.9314718055994531e-01);
  // clang-format on
  const Bits n = (Bits)shifted - (Bits)magic;
  const Bits zero = {};
  Bits up = n + (1023 - offset), down = (1023 - offset) - n;
  up = up > zero ? up : zero;
  down = down > zero ? down : zero;
  return {(even + odd) * (Vector<double>)(up << 52), (even - odd) * (Vector<double>)(down << 52)};
}
