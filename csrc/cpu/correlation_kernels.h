// correlation_loss.
//
// With directions numbered as unordered pairs (a < b), a logit is l = u[i,ab] · w[j,cd] · (S[b,d] − S[b,c] − S[a,d] +
// S[a,c]), and those of the opposite directions are l or −l. So every row, and every column, sums e^l + e^-l over a
// quarter of the logits, and b→a has the loss of a→b. Both exponentials come from one (`exponentials`), in base 2.
//
// No maximum is needed: a row holds l and −l, so its largest logit is at least 0, and |l| ≤ scale. Sums are of 2^(l-K):
// with the driver's K nothing overflows, and what underflows is below a rounding of the row's largest.
//
// Lanes are individuals j: the tile of S has columns (emotion, j), so a vector holds one emotion of some individuals,
// and differences of emotions are differences of vectors, without a shuffle. A unit owns an individual i of the tile: E
// rows of S; it loads them once for each of its pairs and writes the sums, and in the backward a block of dS.
// Operations a logit of the quarter: about 20 forward, 30 backward. Bound by arithmetic; the products with S, E²·D
// multiply-adds for Q² logits, take longer than these kernels from D = 512 on.

// Subtracts an individual's mean over its present emotions from its features.
template <typename C>
void centre_features(const C* x, const bool* present, int64_t emotions, int64_t width, C* to, int64_t stride) {
  std::vector<C> mean(width, C(0));
  C count = 0;
  for (int64_t e = 0; e < emotions; ++e) {
    if (present && !present[e]) continue;
    count += 1;
    const C* from = x + e * width;
    each<C>(
        width, [&](int64_t k) { store(&mean[k], load(&mean[k]) + load(from + k)); },
        [&](int64_t k) { mean[k] += from[k]; });
  }
  const C part = count > 0 ? 1 / count : C(0);
  for (int64_t e = 0; e < emotions; ++e) {
    C* row = to + e * stride;
    const C* from = x + e * width;
    if (present && !present[e])  // what is not present may be anything, NaN included
      std::fill(row, row + width, C(0));
    else
      each<C>(
          width, [&](int64_t k) { store(row + k, load(from + k) - load(&mean[k]) * part); },
          [&](int64_t k) { row[k] = from[k] - mean[k] * part; });
  }
}

// |x_b − x_a|².
template <typename C>
C squared_change(const C* before, const C* after, int64_t width) {
  Vector<C> sums[2] = {};
  C total = 0;
  int64_t k = 0;
  for (; k + 2 * kLanes<C> <= width; k += 2 * kLanes<C>)
    for (int64_t part = 0; part < 2; ++part) {
      const Vector<C> d = load(after + k + part * kLanes<C>) - load(before + k + part * kLanes<C>);
      sums[part] += d * d;
    }
  for (; k < width; ++k) total += (after[k] - before[k]) * (after[k] - before[k]);
  return total + sum<C>(sums[0] + sums[1]);
}

// ⟨x_b − x_a, y_b − y_a⟩.
template <typename C>
C product_of_changes(const C* x_before, const C* x_after, const C* y_before, const C* y_after, int64_t width) {
  Vector<C> sums = {};
  C total = 0;
  each<C>(
      width,
      [&](int64_t k) { sums += (load(x_after + k) - load(x_before + k)) * (load(y_after + k) - load(y_before + k)); },
      [&](int64_t k) { total += (x_after[k] - x_before[k]) * (y_after[k] - y_before[k]); });
  return total + sum<C>(sums);
}

// grad_after += by · (after − before), grad_before −= the same.
template <typename C>
void add_changes(const C* before, const C* after, C by, C* grad_before, C* grad_after, int64_t width) {
  each<C>(
      width,
      [&](int64_t k) {
        const Vector<C> of = by * (load(after + k) - load(before + k));
        store(grad_after + k, load(grad_after + k) + of);
        store(grad_before + k, load(grad_before + k) - of);
      },
      [&](int64_t k) {
        const C of = by * (after[k] - before[k]);
        grad_after[k] += of;
        grad_before[k] -= of;
      });
}

template <typename C>
void correlation_centre(const Correlation<C>& args, int64_t begin, int64_t end) {
  const int64_t emotions = args.emotions, width = args.width;
  for (int64_t i = begin; i < end; ++i) {
    const bool* present = args.mask ? args.mask + i * emotions : nullptr;
    C* centred = args.centred + i * emotions * width;
    centre_features(args.visual + i * emotions * width, present, emotions, width, centred, width);
    int64_t pair = i * args.pairs;
    for (int64_t a = 0; a < emotions; ++a)
      for (int64_t b = a + 1; b < emotions; ++b, ++pair) {
        args.valid[pair] = !present || (present[a] && present[b]);
        args.inv_norm_visual[pair] =
            args.valid[pair]
                ? args.scale * inverse_norm(squared_change(centred + a * width, centred + b * width, width))
                : C(0);
      }
  }
}

// The row of column j's individual, or -1.
template <typename C>
PCMECL_INLINE int64_t own_row(const Correlation<C>& args, int64_t j) {
  const int64_t i = j - args.first;
  return i >= 0 && i < args.rows ? i : -1;
}

// The tile's text features, and the positive logits of its individuals. Units are the tile's lanes.
template <typename C>
void correlation_pack(const Correlation<C>& args, const CorrelationTile<C>& tile, int64_t begin, int64_t end) {
  const int64_t emotions = args.emotions, width = args.width, stride = tile.lanes * width;
  for (int64_t lane = begin; lane < end; ++lane) {
    const int64_t j = tile.column + lane;
    const bool padding = lane >= tile.columns;
    const int64_t i = padding ? -1 : own_row(args, j);
    const bool* present = args.text_mask && !padding ? args.text_mask + j * emotions : nullptr;
    C* text = tile.text + lane * width;
    if (padding)
      for (int64_t e = 0; e < emotions; ++e) std::fill(text + e * stride, text + e * stride + width, C(0));
    else
      centre_features(args.text + j * emotions * width, present, emotions, width, text, stride);
    int64_t pair = 0;
    for (int64_t a = 0; a < emotions; ++a)
      for (int64_t b = a + 1; b < emotions; ++b, ++pair) {
        const bool valid = !padding && (!present || (present[a] && present[b]));
        const C* before = text + a * stride;
        const C* after = text + b * stride;
        const C inverse = valid ? inverse_norm(squared_change(before, after, width)) : C(0);
        tile.inv_norm_text[pair * tile.lanes + lane] = inverse;
        tile.text_valid[pair * tile.lanes + lane] = valid ? C(1) : C(0);
        if (tile.inv_text_sum)
          tile.inv_text_sum[pair * tile.lanes + lane] = valid ? args.inv_column_sum[j * args.pairs + pair] : C(0);
        if (valid && i >= 0) {
          const C* visual = args.centred + i * emotions * width;
          args.positive[i * args.pairs + pair] =
              args.inv_norm_visual[i * args.pairs + pair] * inverse *
              product_of_changes(visual + a * width, visual + b * width, before, after, width);
        }
      }
  }
}

// E is known to the compiler for the usual numbers of emotions, so that a block's differences stay in registers; E = 0
// serves any number up to 32.
template <int64_t E>
constexpr int64_t kCapacity = E ? E : 32;

template <int64_t E, typename Step, size_t... e>
PCMECL_INLINE void unrolled_emotions(Step&& step, std::index_sequence<e...>) {
  (step(int64_t(e)), ...);
}

// step(e)
template <int64_t E, typename Step>
PCMECL_INLINE void for_emotions(int64_t emotions, Step&& step) {
  if constexpr (E != 0)
    unrolled_emotions<E>(step, std::make_index_sequence<E>());
  else
    for (int64_t e = 0; e < emotions; ++e) step(e);
}

constexpr int64_t first_of_pair(int64_t pair, int64_t emotions) {
  int64_t a = 0;
  while (pair >= emotions - 1 - a) pair -= emotions - 1 - a++;
  return a;
}

template <int64_t E, int64_t pair, typename Step>
PCMECL_INLINE void unrolled_pair(Step&& step) {
  constexpr int64_t c = first_of_pair(pair, E);
  step(c, pair - pair_index(c, c + 1, E) + c + 1, pair);
}

template <int64_t E, typename Step, size_t... pair>
PCMECL_INLINE void unrolled_pairs(Step&& step, std::index_sequence<pair...>) {
  (unrolled_pair<E, int64_t(pair)>(step), ...);
}

// step(c, d, pair) for c < d
template <int64_t E, typename Step>
PCMECL_INLINE void for_pairs(int64_t emotions, Step&& step) {
  if constexpr (E != 0) {
    unrolled_pairs<E>(step, std::make_index_sequence<E*(E - 1) / 2>());
  } else {
    int64_t pair = 0;
    for (int64_t c = 0; c < emotions; ++c)
      for (int64_t d = c + 1; d < emotions; ++d) step(c, d, pair++);
  }
}

// 1 at the lane of individual i, else 0: "distinct" keeps the same change only there.
template <typename C>
PCMECL_INLINE Vector<C> only(int64_t lane) {
  Vector<C> value = {};
  if (lane >= 0 && lane < kLanes<C>) value[lane] = 1;
  return value;
}

template <typename C, int64_t E, bool distinct>
void forward_tile(
    const Correlation<C>& args, const CorrelationTile<C>& tile, C* column_sum, int64_t begin, int64_t end) {
  const int64_t emotions = E ? E : args.emotions, lanes = tile.lanes, stride = emotions * lanes;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t i = tile.row + unit;
    const C* block = tile.product + unit * emotions * stride;
    int64_t pair = 0;
    for (int64_t a = 0; a < emotions; ++a)
      for (int64_t b = a + 1; b < emotions; ++b, ++pair) {
        if (!args.valid[i * args.pairs + pair]) continue;
        const C inverse = args.inv_norm_visual[i * args.pairs + pair];
        Vector<C> row_sum = {};
        for (int64_t j = 0; j < lanes; j += kLanes<C>) {
          Vector<C> difference[kCapacity<E>];
          for_emotions<E>(emotions, [&](int64_t e) PCMECL_LAMBDA {
            const C* row = block + e * lanes + j;
            difference[e] = (load(row + b * stride) - load(row + a * stride)) * inverse;
          });
          for_pairs<E>(emotions, [&](int64_t c, int64_t d, int64_t other) PCMECL_LAMBDA {
            const int64_t at = other * lanes + j;
            Exponentials<C> both =
                exponentials((difference[d] - difference[c]) * load(tile.inv_norm_text + at), args.offset);
            if (distinct && other == pair) both.up *= only<C>(i + args.first - tile.column - j);
            const Vector<C> term = both.up + both.down;
            row_sum += term * load(tile.text_valid + at);
            store(column_sum + at, load(column_sum + at) + term);
          });
        }
        args.row_sum[i * args.pairs + pair] += sum<C>(row_sum);
      }
  }
}

template <typename C, int64_t E, bool distinct>
void backward_tile(
    const Correlation<C>& args, const CorrelationTile<C>& tile, C* column_grad_dot, int64_t begin, int64_t end) {
  const int64_t emotions = E ? E : args.emotions, lanes = tile.lanes, stride = emotions * lanes;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t i = tile.row + unit;
    const C* block = tile.product + unit * emotions * stride;
    C* grad = tile.grad_product + unit * emotions * stride;
    std::fill(grad, grad + emotions * stride, C(0));
    int64_t pair = 0;
    for (int64_t a = 0; a < emotions; ++a)
      for (int64_t b = a + 1; b < emotions; ++b, ++pair) {
        if (!args.valid[i * args.pairs + pair]) continue;
        const C inverse = args.inv_norm_visual[i * args.pairs + pair];
        const C inv_row_sum = args.inv_row_sum[i * args.pairs + pair];
        Vector<C> row_grad_dot = {};
        for (int64_t j = 0; j < lanes; j += kLanes<C>) {
          Vector<C> difference[kCapacity<E>], grad_difference[kCapacity<E>];
          for_emotions<E>(emotions, [&](int64_t e) PCMECL_LAMBDA {
            const C* row = block + e * lanes + j;
            difference[e] = (load(row + b * stride) - load(row + a * stride)) * inverse;
            grad_difference[e] = Vector<C>{};
          });
          for_pairs<E>(emotions, [&](int64_t c, int64_t d, int64_t other) PCMECL_LAMBDA {
            const int64_t at = other * lanes + j;
            const Vector<C> inv_norm_text = load(tile.inv_norm_text + at);
            const Vector<C> logit = (difference[d] - difference[c]) * inv_norm_text;
            Exponentials<C> both = exponentials(logit, args.offset);
            if (distinct && other == pair) both.up *= only<C>(i + args.first - tile.column - j);
            const Vector<C> g = (both.up - both.down) * (load(tile.inv_text_sum + at) + inv_row_sum);
            const Vector<C> grad_dot = g * logit, of = g * inv_norm_text;
            row_grad_dot += grad_dot;
            store(column_grad_dot + at, load(column_grad_dot + at) + grad_dot);
            grad_difference[d] += of;
            grad_difference[c] -= of;
          });
          const C by = args.grad_per_logit * inverse;
          for_emotions<E>(emotions, [&](int64_t e) PCMECL_LAMBDA {
            C* row = grad + e * lanes + j;
            const Vector<C> of = grad_difference[e] * by;
            store(row + b * stride, load(row + b * stride) + of);
            store(row + a * stride, load(row + a * stride) - of);
          });
        }
        args.row_grad_dot[i * args.pairs + pair] += sum<C>(row_grad_dot);
      }
  }
}

template <typename C, bool distinct>
void forward_any(
    const Correlation<C>& args, const CorrelationTile<C>& tile, C* column_sum, int64_t begin, int64_t end) {
  switch (args.emotions) {
    case 7: return forward_tile<C, 7, distinct>(args, tile, column_sum, begin, end);
    case 8: return forward_tile<C, 8, distinct>(args, tile, column_sum, begin, end);
    default: return forward_tile<C, 0, distinct>(args, tile, column_sum, begin, end);
  }
}

template <typename C, bool distinct>
void backward_any(const Correlation<C>& args, const CorrelationTile<C>& tile, C* grad_dot, int64_t begin, int64_t end) {
  switch (args.emotions) {
    case 7: return backward_tile<C, 7, distinct>(args, tile, grad_dot, begin, end);
    case 8: return backward_tile<C, 8, distinct>(args, tile, grad_dot, begin, end);
    default: return backward_tile<C, 0, distinct>(args, tile, grad_dot, begin, end);
  }
}

template <typename C>
void correlation_forward(
    const Correlation<C>& args, const CorrelationTile<C>& tile, C* column_sum, int64_t begin, int64_t end) {
  args.distinct ? forward_any<C, true>(args, tile, column_sum, begin, end)
                : forward_any<C, false>(args, tile, column_sum, begin, end);
}

template <typename C>
void correlation_backward(
    const Correlation<C>& args, const CorrelationTile<C>& tile, C* column_grad_dot, int64_t begin, int64_t end) {
  args.distinct ? backward_any<C, true>(args, tile, column_grad_dot, begin, end)
                : backward_any<C, false>(args, tile, column_grad_dot, begin, end);
}

// One individual's logits against its own: a row is a pair ab, lanes are pairs cd.
template <typename C>
struct OwnBlock {
  std::vector<C> rows, inverse, valid;  // rows: S[a,d] − S[a,c] of every emotion a, (E, padded Q)
  int64_t emotions, pairs, padded;

  explicit OwnBlock(const Correlation<C>& args)
      : emotions(args.emotions), pairs(args.pairs), padded((args.pairs + kLanes<C> - 1) / kLanes<C> * kLanes<C>) {
    rows.resize(emotions * padded, C(0));
    inverse.resize(padded, C(0));
    valid.resize(padded, C(0));
  }

  void open(const CorrelationTile<C>& tile, const C* block, int64_t lane) {
    for (int64_t a = 0; a < emotions; ++a) {
      int64_t pair = 0;
      for (int64_t c = 0; c < emotions; ++c)
        for (int64_t d = c + 1; d < emotions; ++d, ++pair)
          rows[a * padded + pair] = block[a * emotions + d] - block[a * emotions + c];
    }
    for (int64_t pair = 0; pair < pairs; ++pair) {
      inverse[pair] = tile.inv_norm_text[pair * tile.lanes + lane];
      valid[pair] = tile.text_valid[pair * tile.lanes + lane];
    }
  }

  Vector<C> logits(int64_t a, int64_t b, int64_t at, C of_row) const {
    return (load(&rows[b * padded + at]) - load(&rows[a * padded + at])) * of_row * load(&inverse[at]);
  }
};

template <typename C>
void correlation_forward_within(
    const Correlation<C>& args, const CorrelationTile<C>& tile, const C* blocks, int64_t begin, int64_t end) {
  OwnBlock<C> own(args);
  std::vector<C> column(own.padded);
  for (int64_t lane = begin; lane < end; ++lane) {
    const int64_t i = tile.column + lane;
    own.open(tile, blocks + i * args.emotions * args.emotions, lane);
    std::fill(column.begin(), column.end(), C(0));
    int64_t pair = i * args.pairs;
    for (int64_t a = 0; a < args.emotions; ++a)
      for (int64_t b = a + 1; b < args.emotions; ++b, ++pair) {
        if (!args.valid[pair]) continue;
        Vector<C> row = {};
        for (int64_t at = 0; at < own.padded; at += kLanes<C>) {
          const Exponentials<C> both = exponentials(own.logits(a, b, at, args.inv_norm_visual[pair]), args.offset);
          row += (both.up + both.down) * load(&own.valid[at]);
          store(&column[at], load(&column[at]) + both.up + both.down);
        }
        args.row_sum[pair] = sum<C>(row);
      }
    std::copy(column.begin(), column.begin() + args.pairs, args.column_sum + i * args.pairs);
  }
}

template <typename C>
void correlation_backward_within(
    const Correlation<C>& args, const CorrelationTile<C>& tile, const C* blocks, C* grad_blocks, C* column_grad_dot,
    int64_t begin, int64_t end) {
  OwnBlock<C> own(args);
  const int64_t emotions = args.emotions;
  std::vector<C> inv_sum(own.padded), grad_dot(own.padded), grad_rows(emotions * own.padded);
  for (int64_t lane = begin; lane < end; ++lane) {
    const int64_t i = tile.column + lane;
    own.open(tile, blocks + i * emotions * emotions, lane);
    for (int64_t pair = 0; pair < args.pairs; ++pair) inv_sum[pair] = tile.inv_text_sum[pair * tile.lanes + lane];
    std::fill(grad_dot.begin(), grad_dot.end(), C(0));
    std::fill(grad_rows.begin(), grad_rows.end(), C(0));
    int64_t pair = i * args.pairs;
    for (int64_t a = 0; a < emotions; ++a)
      for (int64_t b = a + 1; b < emotions; ++b, ++pair) {
        if (!args.valid[pair]) continue;
        Vector<C> row_grad_dot = {};
        for (int64_t at = 0; at < own.padded; at += kLanes<C>) {
          const Vector<C> logit = own.logits(a, b, at, args.inv_norm_visual[pair]);
          const Exponentials<C> both = exponentials(logit, args.offset);
          const Vector<C> g = (both.up - both.down) * (load(&inv_sum[at]) + args.inv_row_sum[pair]);
          row_grad_dot += g * logit;
          store(&grad_dot[at], load(&grad_dot[at]) + g * logit);
          const Vector<C> of = g * load(&own.inverse[at]) * (args.inv_norm_visual[pair] * args.grad_per_logit);
          C* after = &grad_rows[b * own.padded + at];
          C* before = &grad_rows[a * own.padded + at];
          store(after, load(after) + of);
          store(before, load(before) - of);
        }
        args.row_grad_dot[pair] = sum<C>(row_grad_dot);
      }
    C* grad = grad_blocks + i * emotions * emotions;
    std::fill(grad, grad + emotions * emotions, C(0));
    for (int64_t a = 0; a < emotions; ++a) {
      const C* of = &grad_rows[a * own.padded];
      for (int64_t c = 0; c < emotions; ++c)
        for (int64_t d = c + 1; d < emotions; ++d, ++of) {
          grad[a * emotions + d] += *of;
          grad[a * emotions + c] -= *of;
        }
    }
    for (int64_t at = 0; at < args.pairs; ++at) column_grad_dot[at * tile.lanes + lane] = grad_dot[at];
  }
}

// What does not go through S: the positive logits, and the lengths of the text's changes. Units are the tile's
// individuals, whose row of both gradients a unit owns; it writes the text's out of the tile.
template <typename C>
void correlation_finish(
    const Correlation<C>& args, const CorrelationTile<C>& tile, const C* column_grad_dot, int64_t begin, int64_t end) {
  const int64_t emotions = args.emotions, width = args.width, stride = tile.lanes * width;
  for (int64_t lane = begin; lane < end; ++lane) {
    const int64_t j = tile.column + lane, i = own_row(args, j);
    int64_t pair = 0;
    for (int64_t a = 0; a < emotions; ++a)
      for (int64_t b = a + 1; b < emotions; ++b, ++pair) {
        const int64_t at = i * args.pairs + pair, in_tile = pair * tile.lanes + lane;
        if (tile.text_valid[in_tile] == 0) continue;
        const C w = tile.inv_norm_text[in_tile];
        const C positive = i < 0 ? C(0) : args.positive[at];
        const C grad_dot = args.grad_per_logit * (column_grad_dot[in_tile] - 2 * positive);
        add_changes(
            tile.text + lane * width + a * stride, tile.text + lane * width + b * stride, -grad_dot * w * w,
            tile.grad_text + lane * width + a * stride, tile.grad_text + lane * width + b * stride, width);
        if (i < 0) continue;
        const C across = -2 * args.grad_per_logit * args.inv_norm_visual[at] * w;
        const int64_t before = (i * emotions + a) * width, after = (i * emotions + b) * width;
        add_changes(
            args.centred + before, args.centred + after, across, tile.grad_text + lane * width + a * stride,
            tile.grad_text + lane * width + b * stride, width);
        if (args.grad_centred)
          add_changes(
              tile.text + lane * width + a * stride, tile.text + lane * width + b * stride, across,
              args.grad_centred + before, args.grad_centred + after, width);
      }
    for (int64_t e = 0; e < emotions && args.grad_text; ++e) {
      const C* from = tile.grad_text + lane * width + e * stride;
      std::copy(from, from + width, args.grad_text + (j * emotions + e) * width);
    }
  }
}

// The lengths of the visual changes, once a row's Σ of gradient times logit is complete, which is scaled here. Units
// are individuals.
template <typename C>
void correlation_finish_visual(const Correlation<C>& args, int64_t begin, int64_t end) {
  const int64_t emotions = args.emotions, width = args.width;
  for (int64_t i = begin; i < end; ++i) {
    int64_t at = i * args.pairs;
    for (int64_t a = 0; a < emotions; ++a)
      for (int64_t b = a + 1; b < emotions; ++b, ++at) {
        if (!args.valid[at]) continue;
        args.row_grad_dot[at] = args.grad_per_logit * (args.row_grad_dot[at] - 2 * args.positive[at]);
        if (!args.grad_centred) continue;
        const C inverse = args.inv_norm_visual[at] / args.scale;
        const int64_t before = (i * emotions + a) * width, after = (i * emotions + b) * width;
        add_changes(
            args.centred + before, args.centred + after, -args.row_grad_dot[at] * inverse * inverse,
            args.grad_centred + before, args.grad_centred + after, width);
      }
  }
}
