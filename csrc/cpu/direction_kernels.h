// direction_loss and direction_logits.
//
// A sample is done at one go: its two features and the bank's rows it needs are read from memory once and stay in the
// first-level cache for the passes below; nothing but the result is written. The backward recomputes all of it.
// Bytes: source, edited and E (without contrast: 2) rows of the bank a sample, and the gradients written.
// Operations: about 5·E·D a sample. Bound by memory from D = 512 on.

// x·x_inverse − y·y_inverse. Exactly 0 for equal arguments, also where the compiler fuses products into additions: an
// edit that changes nothing must not have a direction made of rounding.
template <typename V, typename C>
PCMECL_INLINE V difference_of_units(V x, C x_inverse, V y, C y_inverse) {
  return (x - y) * y_inverse + x * (x_inverse - y_inverse);
}

// One sample's passes, kept between forward and backward.
template <typename T>
struct Sample {
  using C = typename Computing<T>::type;
  const Direction<T>& args;
  const int64_t width, emotions;
  std::vector<C> delta, gradient, cosine, inverse, weight;
  const T *source, *edited, *rows, *from;
  int64_t a, b;
  C source_inverse, edited_inverse, delta_inverse;

  explicit Sample(const Direction<T>& args)
      : args(args), width(args.width), emotions(args.emotions), delta(width), gradient(width), cosine(emotions),
        inverse(emotions), weight(emotions) {}

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

  // δ and the cosine with every direction that is wanted.
  void look() {
    source_inverse = edited_inverse = 1;
    if (args.normalize) {
      source_inverse = inverse_length(dot(source, source));
      edited_inverse = inverse_length(dot(edited, edited));
    }
    subtract();
    delta_inverse = inverse_length(dot(delta.data(), delta.data()));
    for (int64_t e = 0; e < emotions; ++e) {
      cosine[e] = inverse[e] = 0;
      if (wants(e)) measure(e);
    }
  }

  template <typename A, typename B>
  C dot(const A* x, const B* y) const {
    Vector<C> sums[4] = {};
    int64_t k = 0;
    for (; k + 4 * kLanes<C> <= width; k += 4 * kLanes<C>)
      for (int64_t part = 0; part < 4; ++part)
        sums[part] += load(x + k + part * kLanes<C>) * load(y + k + part * kLanes<C>);
    C total = 0;
    for (; k + kLanes<C> <= width; k += kLanes<C>) sums[0] += load(x + k) * load(y + k);
    for (; k < width; ++k) total += widen(x[k]) * widen(y[k]);
    return total + sum<C>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }

  void subtract() {
    const C to = edited_inverse, of = source_inverse;
    each<C>(
        width,
        [&](int64_t k) { store(&delta[k], difference_of_units(load(edited + k), to, load(source + k), of)); },
        [&](int64_t k) { delta[k] = difference_of_units(widen(edited[k]), to, widen(source[k]), of); });
  }

  // |d|² and ⟨δ, d⟩ of one emotion in one pass.
  void measure(int64_t e) {
    const T* to = rows + e * width;
    Vector<C> squares[2] = {}, dots[2] = {};
    C square = 0, along = 0;
    int64_t k = 0;
    for (; k + 2 * kLanes<C> <= width; k += 2 * kLanes<C>)
      for (int64_t part = 0; part < 2; ++part) {
        const int64_t at = k + part * kLanes<C>;
        const Vector<C> d = load(to + at) - load(from + at);
        squares[part] += d * d;
        dots[part] += d * load(&delta[at]);
      }
    for (; k < width; ++k) {
      const C d = widen(to[k]) - widen(from[k]);
      square += d * d;
      along += d * delta[k];
    }
    inverse[e] = inverse_length(square + sum<C>(squares[0] + squares[1]));
    cosine[e] = (along + sum<C>(dots[0] + dots[1])) * inverse[e] * delta_inverse;
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

  // Gradient of δ: Σ_e g[e]·(unit(d[e]) − c[e]·unit(δ)) / |δ|.
  void differentiate_delta() {
    C back = 0;
    for (int64_t e = 0; e < emotions; ++e)
      if (wants(e)) back -= weight[e] * cosine[e] * delta_inverse * delta_inverse;
    scale_into(gradient.data(), delta.data(), back);
    for (int64_t e = 0; e < emotions; ++e)
      if (wants(e)) add_direction(e, weight[e] * inverse[e] * delta_inverse);
  }

  void scale_into(C* to, const C* x, C by) const {
    each<C>(width, [&](int64_t k) { store(to + k, load(x + k) * by); }, [&](int64_t k) { to[k] = x[k] * by; });
  }

  void add_direction(int64_t e, C by) {
    const T* to = rows + e * width;
    each<C>(
        width,
        [&](int64_t k) { store(&gradient[k], load(&gradient[k]) + by * (load(to + k) - load(from + k))); },
        [&](int64_t k) { gradient[k] += by * (widen(to[k]) - widen(from[k])); });
  }

  // Gradient of a feature x with unit(x) in δ with this sign: through the norm, or as it is.
  void write_gradient(T* to, const T* x, C inverse, C sign) const {
    const C by = sign * inverse;
    const C back = args.normalize ? dot(x, gradient.data()) * inverse * inverse * by : C(0);
    each<C>(
        width, [&](int64_t k) { store(to + k, load(&gradient[k]) * by - load(x + k) * back); },
        [&](int64_t k) { narrow(gradient[k] * by - widen(x[k]) * back, to + k); });
  }

  void write_coefficients(C* to) const {
    for (int64_t e = 0; e < emotions; ++e) {
      to[e] = wants(e) ? weight[e] * inverse[e] * delta_inverse : C(0);
      to[emotions + e] = wants(e) ? weight[e] * cosine[e] * inverse[e] * inverse[e] : C(0);
    }
    to[2 * emotions] = source_inverse;
    to[2 * emotions + 1] = edited_inverse;
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
  for (int64_t k = begin; k < end; ++k) {
    sample.open(k);
    C of_scale = 0;
    if (sample.valid()) {
      sample.look();
      if (args.grad_logits)
        for (int64_t e = 0; e < args.emotions; ++e)
          sample.weight[e] = e == sample.a ? C(0) : widen(args.grad_logits[k * args.emotions + e]);
      else
        of_scale = sample.differentiate_loss(args.grad_losses[k * args.grad_stride] * args.grad_factor);
      if (args.grad_source || args.grad_edited) sample.differentiate_delta();
      if (args.grad_source)
        sample.write_gradient(args.grad_source + k * args.width, sample.source, sample.source_inverse, C(-1));
      if (args.grad_edited)
        sample.write_gradient(args.grad_edited + k * args.width, sample.edited, sample.edited_inverse, C(1));
      if (args.coefficients) sample.write_coefficients(args.coefficients + k * (2 * args.emotions + 2));
    } else {
      if (args.grad_source) std::memset(args.grad_source + k * args.width, 0, args.width * sizeof(T));
      if (args.grad_edited) std::memset(args.grad_edited + k * args.width, 0, args.width * sizeof(T));
      if (args.coefficients)
        std::memset(args.coefficients + k * (2 * args.emotions + 2), 0, (2 * args.emotions + 2) * sizeof(C));
    }
    if (args.grad_scale) args.grad_scale[k] = of_scale;
  }
}

// The bank's gradient. A unit owns a block of features of one individual and adds its samples up in their order, so the
// result is the same in every run and for every number of threads; source and edited are read a second time.
template <typename T>
void direction_bank(const DirectionBank<T>& bank, int64_t begin, int64_t end) {
  using C = typename Computing<T>::type;
  const Direction<T>& args = *bank.direction;
  const int64_t emotions = args.emotions, width = args.width;
  std::vector<C> sums(emotions * bank.columns), delta(bank.columns);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t individual = unit / bank.columns_blocks, column = unit % bank.columns_blocks * bank.columns;
    const int64_t columns = std::min(bank.columns, width - column);
    const T* rows = args.bank + individual * emotions * width + column;
    std::fill(sums.begin(), sums.end(), C(0));

    for (int64_t at = bank.first[individual]; at < bank.first[individual + 1]; ++at) {
      const int64_t k = bank.order[at], a = args.source_emotion[k];
      const C* coefficients = args.coefficients + k * (2 * emotions + 2);
      const C of = coefficients[2 * emotions], to = coefficients[2 * emotions + 1];
      const T* source = args.source + k * width + column;
      const T* edited = args.edited + k * width + column;
      each<C>(
          columns,
          [&](int64_t c) { store(&delta[c], difference_of_units(load(edited + c), to, load(source + c), of)); },
          [&](int64_t c) { delta[c] = difference_of_units(widen(edited[c]), to, widen(source[c]), of); });
      const T* from = rows + a * width;
      C* lost = &sums[a * bank.columns];
      for (int64_t e = 0; e < emotions; ++e) {
        const C along = coefficients[e], across = coefficients[emotions + e];
        if (along == 0 && across == 0) continue;
        const T* row = rows + e * width;
        C* won = &sums[e * bank.columns];
        each<C>(
            columns,
            [&](int64_t c) {
              const Vector<C> g = along * load(&delta[c]) - across * (load(row + c) - load(from + c));
              store(won + c, load(won + c) + g);
              store(lost + c, load(lost + c) - g);
            },
            [&](int64_t c) {
              const C g = along * delta[c] - across * (widen(row[c]) - widen(from[c]));
              won[c] += g;
              lost[c] -= g;
            });
      }
    }
    for (int64_t e = 0; e < emotions; ++e) {
      T* to = bank.grad + (individual * emotions + e) * width + column;
      const C* from = &sums[e * bank.columns];
      each<C>(columns, [&](int64_t c) { store(to + c, load(from + c)); }, [&](int64_t c) { narrow(from[c], to + c); });
    }
  }
}
