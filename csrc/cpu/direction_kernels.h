// direction_loss and direction_logits.
//
// A sample is processed in one go: its two features and the bank's rows it needs are read from memory once and stay in
// the first-level cache for the sweeps below: over the features for their norms, for δ, over each row for its cosine;
// backward once over everything for δ's gradient and the rows', once over each feature for its own. Nothing but the
// result is written. The backward recomputes the forward. Bytes: source, edited and E (without contrast: 2) rows of the
// bank a sample, and the gradients written. Operations: about 5·E·D a sample. Bound by memory from D = 512 on.

// N sums over [0, count) in one sweep: vector_step(k, sums) adds to Vector<C> sums[N], scalar_step(k, sums) to C
// sums[N].
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

// One sample's passes, kept between forward and backward. Their loops go by local pointers: for all the compiler knows,
// the store of a vector may change any member.
template <typename T>
struct Sample {
  using C = typename Computing<T>::type;
  // What a direction d = row − from adds to the gradients: along·d to δ's; along·δ − across·d to its row's, if not
  // null, which it takes from the source emotion's.
  struct Term {
    const T* row;
    C along, across;
    C* grad_row;
  };
  const Direction<T>& args;
  const int64_t width, emotions;
  Aligned<C> delta, gradient;
  std::vector<C> cosine, inverse, weight;
  std::vector<Term> terms;
  const T *source, *edited, *rows, *from;
  int64_t a, b;
  C inv_norm_source, inv_norm_edited, inv_norm_delta, inv_square_delta;

  explicit Sample(const Direction<T>& args)
      : args(args), width(args.width), emotions(args.emotions), delta(width), gradient(width), cosine(emotions),
        inverse(emotions), weight(emotions) {
    terms.reserve(emotions);
  }

  bool valid() const { return a != b; }
  bool is_used(int64_t e) const { return e != a && (b < 0 || args.contrast != 0 || e == b); }

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
  void measure_directions() {
    inv_norm_source = inv_norm_edited = 1;
    if (args.normalize) measure_features();
    subtract();
    for (int64_t e = 0; e < emotions; ++e) {
      cosine[e] = inverse[e] = 0;
      if (is_used(e)) measure(e);
    }
  }

  void measure_features() {
    const T *source = this->source, *edited = this->edited;
    const auto [source_square, edited_square] = sums_of<C, 2>(
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
    inv_norm_source = inverse_norm(source_square);
    inv_norm_edited = inverse_norm(edited_square);
  }

  // δ and its length.
  void subtract() {
    const T *source = this->source, *edited = this->edited;
    const C inv_norm_e = inv_norm_edited, inv_norm_s = inv_norm_source;
    C* const delta = this->delta;
    const auto [square] = sums_of<C, 1>(
        width,
        [&](int64_t k, Vector<C>* sums) {
          const Vector<C> d = difference_of_units(load(edited + k), inv_norm_e, load(source + k), inv_norm_s);
          store(delta + k, d);
          sums[0] += d * d;
        },
        [&](int64_t k, C* sums) {
          delta[k] = difference_of_units(widen(edited[k]), inv_norm_e, widen(source[k]), inv_norm_s);
          sums[0] += delta[k] * delta[k];
        });
    inv_norm_delta = inverse_change(square, args.min_change, args.normalize);
    inv_square_delta = inverse_change_square(square, args.min_change, inv_norm_delta);
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
    inverse[e] = inverse_norm(square);
    cosine[e] = dot * inverse[e] * inv_norm_delta;
  }

  // The loss; `weight` becomes softmax over e ≠ a of scale·cosine, where there is a contrast.
  C loss() {
    if (!valid()) return 0;
    const C matched = 1 - cosine[b];
    if (args.contrast == 0) return matched;
    C largest = -std::numeric_limits<C>::infinity(), total = 0;
    for (int64_t e = 0; e < emotions; ++e)
      if (e != a && !(cosine[e] <= largest)) largest = cosine[e];
    for (int64_t e = 0; e < emotions; ++e) {
      weight[e] = e == a ? C(0) : std::exp(args.scale * (cosine[e] - largest));
      total += weight[e];
    }
    for (int64_t e = 0; e < emotions; ++e) weight[e] /= total;
    return matched + args.contrast * (std::log(total) + args.scale * (largest - cosine[b]));
  }

  // After `loss`: `weight` becomes the gradient of the cosines; returns the scale's.
  C differentiate_loss(C grad) {
    C scale_gradient = 0;
    for (int64_t e = 0; e < emotions; ++e) {
      const C is_target = e == b ? C(1) : C(0);
      const C excess = args.contrast == 0 || e == a ? C(0) : args.contrast * (weight[e] - is_target);
      scale_gradient += excess * cosine[e];
      weight[e] = valid() ? grad * (excess * args.scale - is_target) : C(0);
    }
    return valid() ? grad * scale_gradient : C(0);
  }

  // From the gradients of the cosines, `weight`, those of everything that args asks for.
  void differentiate(int64_t k) {
    C shrink = 0;
    terms.clear();
    for (int64_t e = 0; e < emotions; ++e) {
      if (!is_used(e)) continue;
      const C term = weight[e] * inverse[e];
      shrink -= weight[e] * cosine[e] * inv_square_delta;
      terms.push_back({rows + e * width, term * inv_norm_delta, term * cosine[e] * inverse[e], nullptr});
      if (args.grad_rows) terms.back().grad_row = args.grad_rows + e * width;
    }
    const auto [source_dot, edited_dot] =
        args.grad_rows ? differentiate_delta<true>(shrink) : differentiate_delta<false>(shrink);
    if (args.grad_source) write_gradient(args.grad_source + k * width, source, inv_norm_source, C(-1), source_dot);
    if (args.grad_edited) write_gradient(args.grad_edited + k * width, edited, inv_norm_edited, C(1), edited_dot);
  }

  // Gradient of δ: Σ_e g[e]·(unit(d[e]) − c[e]·unit(δ)) / |δ|. Returns its products with source and edited; in the same
  // sweep the gradients of the rows are added up, where they are asked for.
  template <bool kRows>
  std::array<C, 2> differentiate_delta(C shrink) {
    const T *source = this->source, *edited = this->edited, *from = this->from;
    const C* const delta = this->delta;
    C* const gradient = this->gradient;
    const Term *first = terms.data(), *last = first + terms.size();
    C* const grad_origin = kRows ? args.grad_rows + a * width : nullptr;
    Vector<C> source_dot = {}, edited_dot = {};
    std::array<C, 2> products = {};
    each<C>(
        width,
        [&](int64_t k) {
          const Vector<C> x = load(delta + k), y = load(from + k);
          Vector<C> g = x * shrink, origin_sum = {};
          for (const Term* term = first; term < last; ++term) {
            const Vector<C> d = load(term->row + k) - y;
            g += term->along * d;
            if (kRows) {
              const Vector<C> grad_d = term->along * x - term->across * d;
              store(term->grad_row + k, load(term->grad_row + k) + grad_d);
              origin_sum += grad_d;
            }
          }
          if (kRows) store(grad_origin + k, load(grad_origin + k) - origin_sum);
          store(gradient + k, g);
          source_dot += g * load(source + k);
          edited_dot += g * load(edited + k);
        },
        [&](int64_t k) {
          const C x = delta[k], y = widen(from[k]);
          C g = x * shrink, origin_sum = 0;
          for (const Term* term = first; term < last; ++term) {
            const C d = widen(term->row[k]) - y;
            g += term->along * d;
            if (kRows) {
              const C grad_d = term->along * x - term->across * d;
              term->grad_row[k] += grad_d;
              origin_sum += grad_d;
            }
          }
          if (kRows) grad_origin[k] -= origin_sum;
          gradient[k] = g;
          products[0] += g * widen(source[k]);
          products[1] += g * widen(edited[k]);
        });
    products[0] += sum<C>(source_dot);
    products[1] += sum<C>(edited_dot);
    return products;
  }

  // Gradient of a feature x with unit(x) in δ with this sign: through the norm, or as it is. `product` is ⟨x,
  // gradient⟩.
  void write_gradient(T* to, const T* x, C inverse, C sign, C product) {
    const C* const gradient = this->gradient;
    const C factor = sign * inverse;
    // A feature without a direction may have an infinite product.
    const C projection = args.normalize && inverse != 0 ? product * inverse * inverse * factor : C(0);
    each<C>(
        width, [&](int64_t k) { store(to + k, load(gradient + k) * factor - load(x + k) * projection); },
        [&](int64_t k) { narrow(gradient[k] * factor - widen(x[k]) * projection, to + k); });
  }
};

template <typename T>
void direction_forward(const Direction<T>& args, int64_t begin, int64_t end) {
  Sample<T> sample(args);
  for (int64_t k = begin; k < end; ++k) {
    sample.open(k);
    if (args.logits) {
      sample.measure_directions();
      for (int64_t e = 0; e < args.emotions; ++e) narrow(sample.cosine[e], args.logits + k * args.emotions + e);
    } else if (sample.valid()) {
      sample.measure_directions();
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
    C loss = 0, scale_gradient = 0;
    if (sample.valid()) {
      sample.measure_directions();
      if (args.grad_logits) {
        for (int64_t e = 0; e < args.emotions; ++e)
          sample.weight[e] = e == sample.a ? C(0) : widen(args.grad_logits[k * args.emotions + e]);
      } else {
        const C grad = args.grad_losses ? args.grad_losses[k * args.grad_stride] : C(1);
        loss = sample.loss();
        scale_gradient = sample.differentiate_loss(grad * args.grad_factor);
      }
      if (args.grad_source || args.grad_edited || args.grad_rows) sample.differentiate(k);
    } else {
      if (args.grad_source) std::memset(args.grad_source + k * args.width, 0, args.width * sizeof(T));
      if (args.grad_edited) std::memset(args.grad_edited + k * args.width, 0, args.width * sizeof(T));
    }
    if (args.losses) args.losses[k] = loss;
    if (args.grad_scale) args.grad_scale[k] = scale_gradient;
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
