// The CPU kernels without PyTorch, for the sanitizers: odd sizes in buffers of exactly their length, every instruction
// set of this machine, against loops that spell the formulas out. `make sanitize` builds and runs it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "../common/directions.h"
#include "../common/resize.h"
#include "../cpu/kernels.h"

namespace {

using namespace pcmecl;
using namespace pcmecl::cpu;

int failures = 0;

void expect_close(double actual, double expected, double tolerance, const char* what) {
  if (std::fabs(actual - expected) <= tolerance * (1 + std::fabs(expected))) return;
  std::printf("%s: got %.9g, expected %.9g\n", what, actual, expected);
  ++failures;
}

std::mt19937 generator(0);

double uniform() { return std::uniform_real_distribution<double>(-1, 1)(generator); }

float to_type(double x, float*) { return float(x); }
double to_type(double x, double*) { return x; }
BFloat16 to_type(double x, BFloat16*) {
  const float value = float(x);
  uint32_t bits;
  static_assert(sizeof bits == sizeof value);
  __builtin_memcpy(&bits, &value, 4);
  return {uint16_t(bits >> 16)};
}
double from_type(float x) { return x; }
double from_type(double x) { return x; }
double from_type(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

template <typename T>
std::vector<T> random_numbers(int64_t count) {
  std::vector<T> numbers(count);
  for (T& number : numbers) number = to_type(uniform(), (T*)nullptr);
  return numbers;
}

template <typename T>
constexpr double tolerance() {
  return sizeof(T) == 8 ? 1e-10 : sizeof(T) == 4 ? 2e-4 : 3e-2;
}

template <typename T>
double direction_value(const Direction<T>& args, int64_t k) {
  const int64_t D = args.width, E = args.emotions, a = args.source_emotion[k], b = args.target_emotion[k];
  if (a == b) return 0;
  std::vector<double> delta(D), cosine(E, 0);
  double s = 0, e = 0, length = 0, total = 0;
  for (int64_t d = 0; d < D; ++d) {
    s += from_type(args.source[k * D + d]) * from_type(args.source[k * D + d]);
    e += from_type(args.edited[k * D + d]) * from_type(args.edited[k * D + d]);
  }
  for (int64_t d = 0; d < D; ++d) {
    delta[d] = from_type(args.edited[k * D + d]) / std::sqrt(e) - from_type(args.source[k * D + d]) / std::sqrt(s);
    length += delta[d] * delta[d];
  }
  for (int64_t other = 0; other < E; ++other) {
    if (other == a) continue;
    double dot = 0, square = 0;
    for (int64_t d = 0; d < D; ++d) {
      const T* bank = args.bank + args.individual[k] * E * D;
      const double change = from_type(bank[other * D + d]) - from_type(bank[a * D + d]);
      dot += change * delta[d], square += change * change;
    }
    cosine[other] = dot / std::sqrt(square * length);
    total += std::exp(args.scale * cosine[other]);
  }
  return 1 - cosine[b] + args.contrast * (std::log(total) - args.scale * cosine[b]);
}

template <typename T>
void test_direction(const DirectionKernels<T>& kernels, int64_t D, int64_t E, double contrast) {
  using C = typename Computing<T>::type;
  const int64_t B = 5, N = 3;
  auto source = random_numbers<T>(B * D), edited = random_numbers<T>(B * D), bank = random_numbers<T>(N * E * D);
  std::vector<int64_t> individual, from, to;
  for (int64_t k = 0; k < B; ++k) individual.push_back(k % N), from.push_back(k % E), to.push_back((k * 2 + 1) % E);
  std::vector<C> losses(B), grad(1, C(1)), scale_gradient(B), of_runs(4 * E * D);
  std::vector<T> of_source(B * D), of_edited(B * D), of_bank(N * E * D), logits(B * E);

  Direction<T> args = {};
  args.samples = B, args.emotions = E, args.width = D, args.source = source.data(), args.edited = edited.data();
  args.bank = bank.data(), args.individual = individual.data(), args.source_emotion = from.data();
  args.normalize = true, args.scale = 3, args.contrast = C(contrast);
  args.logits = logits.data();
  kernels.forward(args, 0, B);
  args.logits = nullptr, args.target_emotion = to.data(), args.losses = losses.data();
  kernels.forward(args, 0, 2);
  kernels.forward(args, 2, B);
  for (int64_t k = 0; k < B; ++k) expect_close(losses[k], direction_value(args, k), tolerance<T>(), "direction_loss");

  args.grad_losses = grad.data(), args.grad_factor = 1;
  args.grad_source = of_source.data(), args.grad_edited = of_edited.data(), args.grad_scale = scale_gradient.data();
  const std::vector<int64_t> order = {0, 3, 1, 4, 2}, begin = {0, 1, 2, 4, 5}, first = {0, 2, 3, 4};
  args.order = order.data();
  for (int64_t run = 0; run < 4; ++run) {
    args.grad_rows = of_runs.data() + run * E * D;
    kernels.backward(args, begin[run], begin[run + 1]);
  }
  kernels.bank({E * D, first.data(), of_runs.data(), of_bank.data()}, 0, N);

  if (sizeof(T) < 8) return;  // finite differences need float64
  const double step = 1e-6;
  const auto slope = [&](T& x) {
    const T kept = x;
    double up = 0, down = 0;
    x = to_type(from_type(kept) + step, (T*)nullptr);
    for (int64_t k = 0; k < B; ++k) up += direction_value(args, k);
    x = to_type(from_type(kept) - step, (T*)nullptr);
    for (int64_t k = 0; k < B; ++k) down += direction_value(args, k);
    x = kept;
    return (up - down) / (2 * step);
  };
  for (int64_t at = 0; at < B * D; at += 3) {
    expect_close(from_type(of_source[at]), slope(source[at]), 1e-6, "gradient of source");
    expect_close(from_type(of_edited[at]), slope(edited[at]), 1e-6, "gradient of edited");
  }
  for (int64_t at = 0; at < N * E * D; at += 7)
    expect_close(from_type(of_bank[at]), slope(bank[at]), 1e-6, "gradient of bank");
}

// The whole loss by the kernels, tile after tile, as the driver does it; and its gradients when asked for.
template <typename C>
struct CorrelationRun {
  int64_t N, E, D, Q = E * (E - 1) / 2;
  bool distinct, within;
  std::vector<C> visual, text, of_visual, of_text;
  std::vector<char> mask;

  double run(const CorrelationKernels<C>& kernels, bool backward) {
    const int64_t lanes = (N + kernels.width - 1) / kernels.width * kernels.width;
    std::vector<C> centred(N * E * D), inverse(N * Q), positive(N * Q), rows(N * Q), columns(N * Q), inv_row_sum(N * Q),
        inv_column_sum(N * Q), row_grad_dot(N * Q), tile_text(E * lanes * D), inv_norm_text(Q * lanes),
        text_valid(Q * lanes), inv_text_sum(Q * lanes), sums(Q * lanes), grad_dots(Q * lanes),
        product(N * E * E * lanes), of_product(product.size()), of_tile_text(E * lanes * D), blocks(N * E * E),
        of_blocks(N * E * E);
    std::vector<char> valid(N * Q);
    of_visual.assign(N * E * D, C(0)), of_text.assign(N * E * D, C(0));
    Correlation<C> args = {};
    args.rows = args.columns = N, args.emotions = E, args.width = D, args.pairs = Q, args.visual = visual.data();
    args.text = text.data(), args.mask = args.text_mask = (const bool*)mask.data(), args.distinct = distinct;
    args.scale = C(5 / std::log(2.0)), args.centred = centred.data(), args.inv_norm_visual = inverse.data();
    args.valid = (bool*)valid.data(), args.positive = positive.data(), args.row_sum = rows.data();
    args.column_sum = columns.data(), args.inv_row_sum = inv_row_sum.data(),
    args.inv_column_sum = inv_column_sum.data();
    args.row_grad_dot = row_grad_dot.data(), args.grad_centred = of_visual.data(), args.grad_text = of_text.data();
    CorrelationTile<C> tile = {
        0,
        N,
        0,
        N,
        lanes,
        tile_text.data(),
        inv_norm_text.data(),
        text_valid.data(),
        nullptr,
        product.data(),
        of_product.data(),
        of_tile_text.data()};
    kernels.centre(args, 0, N);
    kernels.pack(args, tile, 0, lanes);
    for (int64_t i = 0; i < N; ++i)
      for (int64_t a = 0; a < E; ++a)
        for (int64_t c = 0; c < E; ++c)
          for (int64_t j = 0; j < lanes; ++j) {
            C dot = 0;
            for (int64_t d = 0; d < D; ++d) dot += centred[(i * E + a) * D + d] * tile_text[(c * lanes + j) * D + d];
            product[(i * E + a) * E * lanes + c * lanes + j] = dot;
            if (j == i) blocks[(i * E + a) * E + c] = dot;
          }
    if (within) {
      kernels.forward_within(args, tile, blocks.data(), 0, N);
    } else {
      kernels.forward(args, tile, sums.data(), 0, N);
      for (int64_t i = 0; i < N; ++i)
        for (int64_t q = 0; q < Q; ++q) columns[i * Q + q] = sums[q * lanes + i];
    }
    double total = 0, count = 0;
    for (int64_t at = 0; at < N * Q; ++at) {
      inv_row_sum[at] = inv_column_sum[at] = 0;
      if (!valid[at]) continue;
      count += 1;
      inv_row_sum[at] = 1 / rows[at], inv_column_sum[at] = 1 / columns[at];
      total += 0.5 * std::log(double(rows[at]) * double(columns[at])) - std::log(2.0) * positive[at];
    }
    if (!backward) return total / count;

    tile.inv_text_sum = inv_text_sum.data();
    args.grad_per_logit = C(std::log(2.0) / (2 * count));
    kernels.pack(args, tile, 0, lanes);
    if (within) {
      kernels.backward_within(args, tile, blocks.data(), of_blocks.data(), grad_dots.data(), 0, N);
      for (int64_t at = 0; at < N * E * E; ++at) {
        const int64_t i = at / (E * E), a = at / E % E, c = at % E;
        of_product[(i * E + a) * E * lanes + c * lanes + i] = of_blocks[at];
      }
    } else {
      kernels.backward(args, tile, grad_dots.data(), 0, N);
    }
    for (int64_t row = 0; row < N * E; ++row)
      for (int64_t column = 0; column < E * lanes; ++column)
        for (int64_t d = 0; d < D; ++d) {
          of_visual[row * D + d] += of_product[row * E * lanes + column] * tile_text[column * D + d];
          of_tile_text[column * D + d] += of_product[row * E * lanes + column] * centred[row * D + d];
        }
    kernels.finish(args, tile, grad_dots.data(), 0, N);
    kernels.finish_visual(args, 0, N);
    return total / count;
  }

  double plain() const {
    std::vector<double> change[2], row, column;
    std::vector<int64_t> who, which;
    for (int64_t i = 0; i < N; ++i)
      for (int64_t a = 0; a < E; ++a)
        for (int64_t b = 0; b < E; ++b)
          if (a != b && mask[i * E + a] && mask[i * E + b]) {
            who.push_back(i), which.push_back(a * E + b);
            for (int side = 0; side < 2; ++side) {
              const C* x = (side ? text : visual).data() + i * E * D;
              double square = 0;
              for (int64_t d = 0; d < D; ++d) square += std::pow(double(x[b * D + d]) - double(x[a * D + d]), 2);
              for (int64_t d = 0; d < D; ++d)
                change[side].push_back((double(x[b * D + d]) - double(x[a * D + d])) / std::sqrt(square));
            }
          }
    const int64_t count = int64_t(who.size());
    row.resize(count), column.resize(count);
    double total = 0;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < count; ++c) {
        if (within && who[r] != who[c]) continue;
        if (distinct && who[r] != who[c] && which[r] == which[c]) continue;
        double logit = 0;
        for (int64_t d = 0; d < D; ++d) logit += 5 * change[0][r * D + d] * change[1][c * D + d];
        row[r] += std::exp(logit), column[c] += std::exp(logit);
        if (r == c) total -= logit;
      }
    for (int64_t r = 0; r < count; ++r) total += 0.5 * (std::log(row[r]) + std::log(column[r]));
    return total / count;
  }
};

template <typename C>
void test_correlation(
    const CorrelationKernels<C>& kernels, int64_t N, int64_t E, int64_t D, bool distinct, bool within) {
  CorrelationRun<C> run = {N, E, D};
  run.distinct = distinct, run.within = within;
  run.visual = random_numbers<C>(N * E * D), run.text = random_numbers<C>(N * E * D);
  for (int64_t at = 0; at < N * E; ++at) run.mask.push_back(at % 5 != 3);
  expect_close(run.run(kernels, true), run.plain(), tolerance<C>(), "correlation_loss");
  if (sizeof(C) < 8) return;
  const auto of_visual = run.of_visual, of_text = run.of_text;
  for (int side = 0; side < 2; ++side)
    for (int64_t at = 0; at < N * E * D; at += 5) {
      C& x = (side ? run.text : run.visual)[at];
      const C kept = x, step = C(1e-6);
      x = kept + step;
      const double up = run.plain();
      x = kept - step;
      const double down = run.plain();
      x = kept;
      expect_close((side ? of_text : of_visual)[at], (up - down) / (2e-6), 1e-6, "gradient of a feature");
    }
}

// A band that copies: the new pixel is the old one, and its neighbour half.
template <typename T>
void test_frames(const FramesKernels<T>& kernels, int64_t height, int64_t width) {
  using C = typename Computing<T>::type;
  auto in = random_numbers<T>(3 * height * width);
  const int64_t rows = height - 1, columns = width - 1;
  std::vector<T> out(3 * rows * columns);
  std::vector<int32_t> first_row, first_column;
  std::vector<C> row_weights(2 * rows, C(1)), column_weights(2 * columns, C(0.5));
  for (int64_t k = 0; k < rows; ++k) first_row.push_back(int32_t(k));
  for (int64_t k = 0; k < columns; ++k) first_column.push_back(int32_t(k));
  Frames<T> args = {
      3,
      3,
      in.data(),
      out.data(),
      {height, rows, 2, first_row.data(), row_weights.data()},
      {width, columns, 2, first_column.data(), column_weights.data()},
      {1, 2, 3},
      {0, 1, 2}};
  kernels.resize(args, 0, 2);
  kernels.resize(args, 2, 3 * rows);
  for (int64_t at = 0; at < 3 * rows * columns; ++at) {
    const int64_t plane = at / (rows * columns), y = at / columns % rows, x = at % columns;
    double expected = 0;
    for (int64_t dy = 0; dy < 2; ++dy)
      for (int64_t dx = 0; dx < 2; ++dx) expected += 0.5 * from_type(in[(plane * height + y + dy) * width + x + dx]);
    expect_close(from_type(out[at]), (plane + 1) * expected + plane, tolerance<T>(), "clip_frames");
  }
}

void test_windows(Filter filter) {
  for (const auto& [before, after] : {std::pair<int64_t, int64_t>{256, 224}, {7, 90}, {1, 5}, {90, 1}})
    for (int64_t pixel = 0; pixel < after; ++pixel) {
      const ResizeWindow window = resize_window(filter, pixel, before, after);
      expect_close(double(window.first >= 0 && window.last <= before && window.first < window.last), 1, 0, "window");
    }
}

void test(const Kernels& kernels) {
  const int before = failures;
  for (const int64_t D : {2, 3, 33, 127, 130})
    for (const double contrast : {0.0, 0.5}) {
      test_direction(kernels.direction_float, D, 4, contrast);
      test_direction(kernels.direction_double, D, 4, contrast);
      test_direction(kernels.direction_bfloat16, D, 4, contrast);
    }
  for (const int64_t E : {2, 5, 7, 8, 32})
    for (int kind = 0; kind < 3; ++kind) {
      const int64_t N = E == 32 ? 2 : 5;
      test_correlation(kernels.correlation_float, N, E, 19, kind == 1, kind == 2);
      if (E < 32) test_correlation(kernels.correlation_double, N, E, 11, kind == 1, kind == 2);
    }
  for (const int64_t width : {2, 9, 37, 65}) {
    test_frames(kernels.frames_float, 5, width);
    test_frames(kernels.frames_double, 5, width);
    test_frames(kernels.frames_bfloat16, 5, width);
  }
  std::printf("%s: %s\n", kernels.name, failures == before ? "right" : "wrong");
}

}  // namespace

int main() {
  test_windows(Filter::bicubic);
  test_windows(Filter::bilinear);
  test(portable_kernels());
#ifdef PCMECL_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) test(avx2_kernels());
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) test(avx512_kernels());
#endif
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
