// direction_loss and direction_logits.
//
// A sample is done at one go: its two features and the bank's rows it needs are read from memory once and stay in the
// first-level cache for the sweeps below: over the features for their norms, for δ, over each row for its cosine; backward
// once over everything for δ's gradient and the rows', once over each feature for its own. Nothing but the result is
// written. The backward recomputes the forward.
// Bytes: source, edited and E (without contrast: 2) rows of the bank a sample, and the gradients written.
// Operations: about 5·E·D a sample. Bound by memory from D = 512 on.

// x·x_inverse − y·y_inverse. Exactly 0 for equal arguments, also where the compiler fuses products into additions: an
// edit that changes nothing must not have a direction made of rounding.
template <typename V, typename C>
PCMECL_INLINE V difference_of_units(V x, C x_inverse, V y, C y_inverse) {
  return (x - y) * y_inverse + x * (x_inverse - y_inverse);
}

// N sums over [0, count) in one sweep: vector_step(k, sums) adds to Vector<C> sums[N], scalar_step(k, sums) to C sums[N].
template <typename C, size_t N, typename VectorStep, typename ScalarStep>
PCMECL_INLINE std::array<C, N> sums_of(int64_t count, VectorStep&& vector_step, ScalarStep&& scalar_step) {
  constexpr int64_t kParts = 4;  // additions that do not wait for each other
  Vector<C> parts[kParts][N] = {};
  std::array<C, N> totals = {};
  int64_t k = 0;
  for (; k + kParts * kLanes<C> <= count; k += kParts * kLanes<C>)
    for (int64_t part = 0; part < kParts; ++part) vector_step(k + part * kLanes<C>, parts[part]);
  for (; k + kLanes<C> <= count; k += kLanes<C>) vector_step(k, parts[0]);
  for (; k < count; ++k) scalar_step(k, totals.data());
  for (size_t n = 0; n < N; ++n) totals[n] += sum<C>((parts[0][n] + parts[1][n]) + (parts[2][n] + parts[3][n]));
  return totals;
}

// One sample's passes, kept between forward and backward. Their loops go by local pointers: for all the compiler knows, the
// store of a vector may change any member.
template <typename T>
struct Sample {
  using C = typename Computing<T>::type;
  // What a direction d = row − from adds to the gradients: along·d to δ's; along·δ − across·d to its row's, if not null,
  // which it takes from the source emotion's.
  struct Pull {
    const T* row;
    C along, across;
    C* grad_row;
  };
  const Direction<T>& args;
  const int64_t width, emotions;
  Aligned<C> delta, gradient;
  std::vector<C> cosine, inverse, weight;
  std::vector<Pull> pulls;
  const T *source, *edited, *rows, *from;
  int64_t a, b;
  C source_inverse, edited_inverse, delta_inverse;

  explicit Sample(const Direction<T>& args)
      : args(args), width(args.width), emotions(args.emotions), delta(width), gradient(width), cosine(emotions),
        inverse(emotions), weight(emotions) {
    pulls.reserve(emotions);
  }

  bool valid() const { return a != b; }
  bool wants(int64_t e) const { return e != a && (b < 0 || args.contrast != 0 || e == b); }

  void open(int64_t k) {
    source = args.source + k * width;
    edited = args.edited + k * width;
    rows = args.bank + args.individual[k] * emotions * width;
    a = args.source_emotion[k];
    b = args.target_emotion ? args.target_emotion[k] : -1;
    from = rows + a * width;
  }

  // A later sample's features, which the processor cannot guess where `order` says what is next.
  void prefetch(int64_t k) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t at = k * width; at < (k + 1) * width; at += kLine) {
      __builtin_prefetch(args.source + at);
      __builtin_prefetch(args.edited + at);
    }
  }

  // δ and the cosine with every direction that is wanted.
  void look() {
    source_inverse = edited_inverse = 1;
    if (args.normalize) measure_features();
    subtract();
    for (int64_t e = 0; e < emotions; ++e) {
      cosine[e] = inverse[e] = 0;
      if (wants(e)) measure(e);
    }
  }

  void measure_features() {
    const T *source = this->source, *edited = this->edited;
    const auto [of, to] = sums_of<C, 2>(
        width,
        [&](int64_t k, Vector<C>* sums) {
          const Vector<C> x = load(source + k), y = load(edited + k);
          sums[0] += x * x;
          sums[1] += y * y;
        },
        [&](int64_t k, C* sums) {
          const C x = widen(source[k]), y = widen(edited[k]);
          sums[0] += x * x;
          sums[1] += y * y;
        });
    source_inverse = inverse_length(of);
    edited_inverse = inverse_length(to);
  }

  // δ and its length.
  void subtract() {
    const T *source = this->source, *edited = this->edited;
    const C to = edited_inverse, of = source_inverse;
    C* const delta = this->delta;
    const auto [square] = sums_of<C, 1>(
        width,
        [&](int64_t k, Vector<C>* sums) {
          const Vector<C> d = difference_of_units(load(edited + k), to, load(source + k), of);
          store(delta + k, d);
          sums[0] += d * d;
        },
        [&](int64_t k, C* sums) {
          delta[k] = difference_of_units(widen(edited[k]), to, widen(source[k]), of);
          sums[0] += delta[k] * delta[k];
        });
    delta_inverse = inverse_length(square);
  }

  // |d|² and ⟨δ, d⟩ of one emotion.
  void measure(int64_t e) {
    const T *row = rows + e * width, *from = this->from;
    const C* const delta = this->delta;
    const auto [square, dot] = sums_of<C, 2>(
        width,
        [&](int64_t k, Vector<C>* sums) {
          const Vector<C> d = load(row + k) - load(from + k);
          sums[0] += d * d;
          sums[1] += d * load(delta + k);
        },
        [&](int64_t k, C* sums) {
          const C d = widen(row[k]) - widen(from[k]);
          sums[0] += d * d;
          sums[1] += d * delta[k];
        });
    inverse[e] = inverse_length(square);
    cosine[e] = dot * inverse[e] * delta_inverse;
  }

  // The loss; `weight` becomes softmax over e ≠ a of scale·cosine, where there is a contrast.
  C loss() {
    if (!valid()) return 0;
    const C matched = 1 - cosine[b];
    if (args.contrast == 0) return matched;
    C largest = -std::numeric_limits<C>::infinity(), total = 0;
    for (int64_t e = 0; e < emotions; ++e)
      if (e != a && !(args.scale * cosine[e] <= largest)) largest = args.scale * cosine[e];
    for (int64_t e = 0; e < emotions; ++e) {
      weight[e] = e == a ? C(0) : std::exp(args.scale * cosine[e] - largest);
      total += weight[e];
    }
    for (int64_t e = 0; e < emotions; ++e) weight[e] /= total;
    return matched + args.contrast * (std::log(total) + largest - args.scale * cosine[b]);
  }

  // `weight` becomes the gradient of the cosines; returns the scale's.
  C differentiate_loss(C grad) {
    loss();
    C of_scale = 0;
    for (int64_t e = 0; e < emotions; ++e) {
      const C asked = e == b ? C(1) : C(0);
      const C excess = args.contrast == 0 || e == a ? C(0) : args.contrast * (weight[e] - asked);
      of_scale += excess * cosine[e];
      weight[e] = valid() ? grad * (excess * args.scale - asked) : C(0);
    }
    return valid() ? grad * of_scale : C(0);
  }

  // From the gradients of the cosines, `weight`, those of everything that args asks for.
  void differentiate(int64_t k) {
    C back = 0;
    pulls.clear();
    for (int64_t e = 0; e < emotions; ++e) {
      if (!wants(e)) continue;
      const C pull = weight[e] * inverse[e];
      back -= weight[e] * cosine[e] * delta_inverse * delta_inverse;
      pulls.push_back({rows + e * width, pull * delta_inverse, pull * cosine[e] * inverse[e], nullptr});
      if (args.grad_rows) pulls.back().grad_row = args.grad_rows + e * width;
    }
    const auto [of, to] = args.grad_rows ? differentiate_delta<true>(back) : differentiate_delta<false>(back);
    if (args.grad_source) write_gradient(args.grad_source + k * width, source, source_inverse, C(-1), of);
    if (args.grad_edited) write_gradient(args.grad_edited + k * width, edited, edited_inverse, C(1), to);
  }

  // Gradient of δ: Σ_e g[e]·(unit(d[e]) − c[e]·unit(δ)) / |δ|. Returns its products with source and edited; in the same
  // sweep the gradients of the rows are added up, where they are asked for.
  template <bool kRows>
  std::array<C, 2> differentiate_delta(C back) {
    const T *source = this->source, *edited = this->edited, *from = this->from;
    const C* const delta = this->delta;
    C* const gradient = this->gradient;
    const Pull *first = pulls.data(), *last = first + pulls.size();
    C* const lost = kRows ? args.grad_rows + a * width : nullptr;
    Vector<C> of = {}, to = {};
    std::array<C, 2> products = {};
    each<C>(
        width,
        [&](int64_t k) {
          const Vector<C> x = load(delta + k), y = load(from + k);
          Vector<C> g = x * back, moved = {};
          for (const Pull* pull = first; pull < last; ++pull) {
            const Vector<C> d = load(pull->row + k) - y;
            g += pull->along * d;
            if (kRows) {
              const Vector<C> of_d = pull->along * x - pull->across * d;
              store(pull->grad_row + k, load(pull->grad_row + k) + of_d);
              moved += of_d;
            }
          }
          if (kRows) store(lost + k, load(lost + k) - moved);
          store(gradient + k, g);
          of += g * load(source + k);
          to += g * load(edited + k);
        },
        [&](int64_t k) {
          const C x = delta[k], y = widen(from[k]);
          C g = x * back, moved = 0;
          for (const Pull* pull = first; pull < last; ++pull) {
            const C d = widen(pull->row[k]) - y;
            g += pull->along * d;
            if (kRows) {
              const C of_d = pull->along * x - pull->across * d;
              pull->grad_row[k] += of_d;
              moved += of_d;
            }
          }
          if (kRows) lost[k] -= moved;
          gradient[k] = g;
          products[0] += g * widen(source[k]);
          products[1] += g * widen(edited[k]);
        });
    products[0] += sum<C>(of);
    products[1] += sum<C>(to);
    return products;
  }

  // Gradient of a feature x with unit(x) in δ with this sign: through the norm, or as it is. `product` is ⟨x, gradient⟩.
  void write_gradient(T* to, const T* x, C inverse, C sign, C product) {
    const C* const gradient = this->gradient;
    const C by = sign * inverse;
    const C back = args.normalize ? product * inverse * inverse * by : C(0);
    each<C>(
        width, [&](int64_t k) { store(to + k, load(gradient + k) * by - load(x + k) * back); },
        [&](int64_t k) { narrow(gradient[k] * by - widen(x[k]) * back, to + k); });
  }
};

template <typename T>
void direction_forward(const Direction<T>& args, int64_t begin, int64_t end) {
  Sample<T> sample(args);
  for (int64_t k = begin; k < end; ++k) {
    sample.open(k);
    if (args.logits) {
      sample.look();
      for (int64_t e = 0; e < args.emotions; ++e) narrow(sample.cosine[e], args.logits + k * args.emotions + e);
    } else if (sample.valid()) {
      sample.look();
      args.losses[k] = sample.loss();
    } else {
      args.losses[k] = 0;
    }
  }
}

template <typename T>
void direction_backward(const Direction<T>& args, int64_t begin, int64_t end) {
  using C = typename Computing<T>::type;
  Sample<T> sample(args);
  if (args.grad_rows) std::fill_n(args.grad_rows, args.emotions * args.width, C(0));
  for (int64_t at = begin; at < end; ++at) {
    const int64_t k = args.order ? args.order[at] : at;
    sample.open(k);
    if (args.order && at + 1 < end) sample.prefetch(args.order[at + 1]);
    C of_scale = 0;
    if (sample.valid()) {
      sample.look();
      if (args.grad_logits)
        for (int64_t e = 0; e < args.emotions; ++e)
          sample.weight[e] = e == sample.a ? C(0) : widen(args.grad_logits[k * args.emotions + e]);
      else
        of_scale = sample.differentiate_loss(args.grad_losses[k * args.grad_stride] * args.grad_factor);
      if (args.grad_source || args.grad_edited || args.grad_rows) sample.differentiate(k);
    } else {
      if (args.grad_source) std::memset(args.grad_source + k * args.width, 0, args.width * sizeof(T));
      if (args.grad_edited) std::memset(args.grad_edited + k * args.width, 0, args.width * sizeof(T));
    }
    if (args.grad_scale) args.grad_scale[k] = of_scale;
  }
}

// The bank's gradient: each individual's runs added up in their order, so that the result is the same for every number
// of threads.
template <typename T>
void direction_bank(const DirectionBank<T>& bank, int64_t begin, int64_t end) {
  using C = typename Computing<T>::type;
  for (int64_t individual = begin; individual < end; ++individual) {
    const C* first = bank.grad_rows + bank.first[individual] * bank.size;
    const C* last = bank.grad_rows + bank.first[individual + 1] * bank.size;
    T* to = bank.grad + individual * bank.size;
    each<C>(
        bank.size,
        [&](int64_t k) {
          Vector<C> total = {};
          for (const C* run = first; run < last; run += bank.size) total += load(run + k);
          store(to + k, total);
        },
        [&](int64_t k) {
          C total = 0;
          for (const C* run = first; run < last; run += bank.size) total += run[k];
          narrow(total, to + k);
        });
  }
}
