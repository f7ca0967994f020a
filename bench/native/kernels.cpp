// Runs the core of one CPU kernel once on fixed inputs, for callgrind to count its instructions: see
// bench/instructions.py.
//
// It links the kernels' own sources, without PyTorch. Matrix products, which belong to a library, are done naively and
// not counted: only what `measured` calls is.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"

using namespace pcmecl::cpu;

extern "C" __attribute__((noinline)) void measured(const std::function<void()>& run) {
  run();
  asm volatile("");  // else the call becomes a jump, and callgrind takes it for the end of this function
}

namespace {

const Kernels& instruction_set() {
#ifdef PCMECL_X86
  if (__builtin_cpu_supports("avx2")) return avx2_kernels();  // the most that valgrind knows
#endif
  return portable_kernels();
}

std::vector<float> random_numbers(size_t count, uint32_t seed) {
  std::vector<float> numbers(count);
  uint32_t state = 2 * seed + 1;
  for (float& number : numbers) {
    state = state * 1664525u + 1013904223u;
    number = float(state >> 8) / float(1 << 23) - 1.0f;
  }
  return numbers;
}

template <typename T>
std::vector<T> zeros(size_t count) {
  return std::vector<T>(count, T(0));
}

// out (rows, columns) = a (rows, inner) · bᵀ, b (columns, inner)
void multiply(const float* a, const float* b, float* out, int64_t rows, int64_t columns, int64_t inner) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      float sum = 0;
      for (int64_t k = 0; k < inner; ++k) sum += a[i * inner + k] * b[j * inner + k];
      out[i * columns + j] = sum;
    }
}

void direction(const std::string& pass) {
  const int64_t B = 64, E = 7, D = 512, N = 16;
  std::vector<float> source = random_numbers(B * D, 1), edited = random_numbers(B * D, 2),
                     bank = random_numbers(N * E * D, 3);
  std::vector<int64_t> individual(B), shown(B), asked(B), first(N + 1), run(N + 1), order(B);
  for (int64_t k = 0; k < B; ++k) {
    individual[k] = k * N / B, shown[k] = k % E, asked[k] = (k + 1) % E, order[k] = k;
  }
  for (int64_t n = 0; n <= N; ++n) first[n] = n * B / N, run[n] = n;
  auto losses = zeros<float>(B), grad_source = zeros<float>(B * D), grad_edited = zeros<float>(B * D);
  auto grad_rows = zeros<float>(N * E * D), grad_bank = zeros<float>(N * E * D);
  const float grad = 1;

  Direction<float> args = {};
  args.samples = B, args.emotions = E, args.width = D;
  args.source = source.data(), args.edited = edited.data(), args.bank = bank.data();
  args.individual = individual.data(), args.source_emotion = shown.data(), args.target_emotion = asked.data();
  args.normalize = true, args.scale = 20, args.contrast = 0.5f;
  args.losses = losses.data(), args.grad_losses = &grad, args.grad_factor = 1;
  args.grad_source = grad_source.data(), args.grad_edited = grad_edited.data(), args.order = order.data();
  const DirectionBank<float> added = {E * D, run.data(), grad_rows.data(), grad_bank.data()};

  const auto& kernels = instruction_set().direction_float;
  if (pass == "forward") return measured([&] { kernels.forward(args, 0, B); });
  const auto backward = [&] {
    for (int64_t n = 0; n < N; ++n) {
      args.grad_rows = grad_rows.data() + n * E * D;
      kernels.backward(args, first[n], first[n + 1]);
    }
  };
  if (pass == "backward") return measured(backward);
  backward();
  measured([&] { kernels.bank(added, 0, N); });
}

void correlation(const std::string& pass) {
  const int64_t N = 32, E = 7, D = 64, Q = E * (E - 1) / 2, lanes = N;
  std::vector<float> visual = random_numbers(N * E * D, 4), text = random_numbers(N * E * D, 5);
  auto centred = zeros<float>(N * E * D), grad_centred = centred, grad_text = centred;
  auto inverse = zeros<float>(N * Q), positive = inverse, row_sum = inverse, column_sum = inverse,
       row_grad_dot = inverse;
  std::vector<uint8_t> valid(N * Q);
  auto tile_text = zeros<float>(E * lanes * D), tile_grad_text = tile_text;
  auto inv_norm_text = zeros<float>(Q * lanes), text_valid = inv_norm_text, inv_text_sum = inv_norm_text,
       columns = inv_norm_text;
  auto product = zeros<float>(N * E * E * lanes), grad_product = product;
  std::vector<float> inv_sum(N * Q, 1e-3f);

  Correlation<float> args = {};
  args.rows = args.columns = N, args.emotions = E, args.width = D, args.pairs = Q;
  args.visual = visual.data(), args.text = text.data(), args.scale = 28, args.centred = centred.data();
  args.inv_norm_visual = inverse.data(), args.valid = reinterpret_cast<bool*>(valid.data());
  args.positive = positive.data(), args.row_sum = row_sum.data(), args.column_sum = column_sum.data();
  args.inv_row_sum = inv_sum.data(), args.inv_column_sum = inv_sum.data(), args.grad_per_logit = 1,
  args.row_grad_dot = row_grad_dot.data();
  args.grad_centred = grad_centred.data(), args.grad_text = grad_text.data();
  CorrelationTile<float> tile = {};
  tile.rows = tile.columns = N, tile.lanes = lanes;
  tile.text = tile_text.data(), tile.inv_norm_text = inv_norm_text.data(), tile.text_valid = text_valid.data();
  tile.inv_text_sum = inv_text_sum.data(), tile.grad_text = tile_grad_text.data();

  const auto& kernels = instruction_set().correlation_float;
  const auto centre = [&] { kernels.centre(args, 0, N); };
  if (pass == "centre") return measured(centre);
  centre();
  kernels.pack(args, tile, 0, lanes);
  multiply(centred.data(), tile_text.data(), product.data(), N * E, E * lanes, D);
  tile.product = product.data(), tile.grad_product = grad_product.data();
  if (pass == "forward") return measured([&] { kernels.forward(args, tile, columns.data(), 0, N); });
  measured([&] { kernels.backward(args, tile, columns.data(), 0, N); });
}

void frames(const std::string&) {
  const int64_t before = 64, after = 56, taps = 6;
  std::vector<float> in = random_numbers(3 * before * before, 6), weights = random_numbers(taps * after, 7);
  auto out = zeros<float>(3 * after * after);
  std::vector<int32_t> first(after);
  for (int64_t pixel = 0; pixel < after; ++pixel)
    first[pixel] = int32_t(std::min<int64_t>(pixel * before / after, before - taps));
  const Band band = {before, after, taps, first.data(), weights.data()};
  Frames<float> args = {3, 3, in.data(), out.data(), band, band, {1, 2, 3}, {0, 1, 2}};
  measured([&] { instruction_set().frames_float.resize(args, 0, 3 * after); });
}

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  const size_t cut = name.rfind('_');
  const std::map<std::string, void (*)(const std::string&)> operators = {
      {"direction", direction}, {"correlation", correlation}, {"frames", frames}};
  operators.at(name.substr(0, cut))(name.substr(cut + 1));
}
