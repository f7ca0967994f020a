// correlation_loss on tensors: tiles, threads and the matrix products; the rest of the arithmetic is in
// correlation_kernels.h.
//
// A tile of S, its gradient and the tile's text features are all that exists of anything larger than the features:
// memory grows with the individuals, time with their square.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "operators.h"

namespace pcmecl::cpu {
namespace {

constexpr double kLn2 = 0.69314718055994530942;
constexpr int64_t kColumns = 512;  // a tile's columns and half its rows: about 4 MB of S and its gradient in float32

const CorrelationKernels<float>& kernels_for(float) { return kernels().correlation_float; }
const CorrelationKernels<double>& kernels_for(double) { return kernels().correlation_double; }

// Float32 holds the sums for |logits| up to 128: see `offset`. Beyond, float64 does.
bool needs_double(const Tensor& x, double scale) { return x.scalar_type() == at::kDouble || !(scale <= 128); }

// K of the sums of 2^(l - K): the largest term, 2^(scale·log2(e) - K), times 2^27 terms stays finite, and the least
// that a row can sum to, 2^-K, is 2^40 times the least normal number.
template <typename C>
int64_t offset(double scale) {
  return std::max<int64_t>(0, int64_t(std::ceil(scale / kLn2)) - (sizeof(C) == 4 ? 100 : 900));
}

template <typename C>
C* pointer(const Tensor& x) {
  return x.data_ptr<C>();
}

template <typename C>
class Run {
 public:
  Run(const Tensor& visual, const Tensor& text, double scale, const std::optional<Tensor>& mask,
      const std::string& negatives)
      : kernels_(kernels_for(C())), within_(negatives == "within"), scale_(scale),
        options_(visual.options().dtype(c10::CppTypeToScalarType<C>::value)), visual_(visual.to(options_)),
        text_(text.to(options_)) {
    args_.individuals = visual.size(0), args_.emotions = visual.size(1), args_.width = visual.size(2);
    args_.pairs = args_.emotions * (args_.emotions - 1) / 2;
    args_.visual = pointer<C>(visual_), args_.text = pointer<C>(text_);
    args_.mask = mask ? mask->data_ptr<bool>() : nullptr;
    args_.distinct = negatives == "distinct";
    args_.scale = C(scale / kLn2), args_.offset = offset<C>(scale);
    lanes_ = up(std::min<int64_t>(args_.individuals, std::max<int64_t>(1, kColumns / args_.emotions)));
    rows_ = 2 * lanes_;

    const int64_t N = args_.individuals, E = args_.emotions, D = args_.width, Q = args_.pairs;
    args_.centred = take(centred_, {N, E, D});
    args_.inv_norm_visual = take(inv_norm_visual_, {N, Q});
    args_.positive = take(positive_, {N, Q});
    valid_ = at::empty({N, Q}, options_.dtype(at::kBool));
    args_.valid = valid_.data_ptr<bool>();
    tile_.text = take(tile_text_, {E, lanes_, D});
    tile_.inv_norm_text = take(inv_norm_text_, {Q, lanes_});
    tile_.text_valid = take(text_valid_, {Q, lanes_});
    if (!within_) tile_.product = take(product_, {std::min(rows_, N) * E * E * lanes_});
    parallel(N, [&](int64_t begin, int64_t end) { kernels_.centre(args_, begin, end); });
    for (int64_t at = 0; at < N * Q; ++at) pairs_ += args_.valid[at];
  }

  double forward(const Tensor& row_sum, const Tensor& column_sum) {
    args_.row_sum = pointer<C>(row_sum), args_.column_sum = pointer<C>(column_sum);
    for_tiles([&] {
      if (within_) {
        const Tensor blocks = own_blocks();
        parallel(tile_.columns, [&](int64_t begin, int64_t end) {
          kernels_.forward_within(args_, tile_, blocks_from(blocks), begin, end);
        });
        return;
      }
      for_rows([&] {
        Tensor partial = at::zeros({at::get_num_threads(), args_.pairs, tile_.lanes}, options_);
        parallel(tile_.rows, [&](int64_t begin, int64_t end) {
          kernels_.forward(args_, tile_, partial[at::get_thread_num()].template data_ptr<C>(), begin, end);
        });
        add_columns(partial.sum(0), args_.column_sum);
      });
    });
    return loss();
  }

  // The gradients of visual, text and scale, in C.
  Gradients backward(double grad, const Tensor& row_sum, const Tensor& column_sum, const Needs& needs) {
    const int64_t N = args_.individuals, E = args_.emotions, D = args_.width, Q = args_.pairs;
    const bool visual = needs[0], text = needs[1];
    Tensor inv_row_sum = row_sum.reciprocal(), inv_column_sum = column_sum.reciprocal(),
           row_grad_dot = at::zeros({N, Q}, options_);
    args_.inv_row_sum = pointer<C>(inv_row_sum), args_.inv_column_sum = pointer<C>(inv_column_sum);
    args_.row_grad_dot = pointer<C>(row_grad_dot);
    args_.grad_per_logit = C(grad * kLn2 / (2 * std::max<double>(double(pairs_), 1)));
    Tensor grad_visual, grad_text, tile_inv_text_sum, tile_grad_text, grad_product;
    if (visual) grad_visual = at::zeros({N, E, D}, options_), args_.grad_centred = pointer<C>(grad_visual);
    if (text) args_.grad_text = take(grad_text, {N, E, D});
    tile_.inv_text_sum = take(tile_inv_text_sum, {Q, lanes_});
    tile_.grad_text = take(tile_grad_text, {E, lanes_, D});
    if (!within_) tile_.grad_product = take(grad_product, {product_.numel()});

    for_tiles([&] {
      const Tensor grad_text_tile = shaped(tile_grad_text, {E * tile_.lanes, D}).zero_();
      Tensor grad_dot = at::zeros({Q, tile_.lanes}, options_);
      if (within_) {
        const Tensor blocks = own_blocks();
        const Tensor grad_blocks = at::empty_like(blocks);
        parallel(tile_.columns, [&](int64_t begin, int64_t end) {
          kernels_.backward_within(
              args_, tile_, blocks_from(blocks), blocks_from(grad_blocks), pointer<C>(grad_dot), begin, end);
        });
        if (visual) own(grad_visual).copy_(at::bmm(grad_blocks, own_text(tile_text_)));
        if (text) own_text(tile_grad_text).copy_(at::bmm(grad_blocks.transpose(1, 2), own(centred_)));
      } else {
        for_rows([&] {
          Tensor partial = at::zeros({at::get_num_threads(), Q, tile_.lanes}, options_);
          parallel(tile_.rows, [&](int64_t begin, int64_t end) {
            kernels_.backward(args_, tile_, partial[at::get_thread_num()].template data_ptr<C>(), begin, end);
          });
          grad_dot += partial.sum(0);
          const Tensor grad_product_tile = shaped(grad_product, {tile_.rows * E, E * tile_.lanes});
          if (visual) rows_of(grad_visual).addmm_(grad_product_tile, shaped(tile_text_, {E * tile_.lanes, D}));
          if (text) grad_text_tile.addmm_(grad_product_tile.t(), rows_of(centred_));
        });
      }
      parallel(tile_.columns, [&](int64_t begin, int64_t end) {
        kernels_.finish(args_, tile_, pointer<C>(grad_dot), begin, end);
      });
    });
    parallel(N, [&](int64_t begin, int64_t end) { kernels_.finish_visual(args_, begin, end); });

    Gradients gradients(3);
    if (visual) gradients[0] = grad_visual;
    if (text) gradients[1] = grad_text;
    if (needs[2]) gradients[2] = row_grad_dot.sum(at::kDouble) / scale_;
    return gradients;
  }

 private:
  template <typename F>
  void for_tiles(F&& f) {
    for (tile_.column = 0; tile_.column < args_.individuals; tile_.column += lanes_) {
      tile_.columns = std::min(lanes_, args_.individuals - tile_.column);
      tile_.lanes = up(tile_.columns);
      parallel(tile_.lanes, [&](int64_t begin, int64_t end) { kernels_.pack(args_, tile_, begin, end); });
      f();
    }
  }

  template <typename F>
  void for_rows(F&& f) {
    const int64_t E = args_.emotions;
    for (tile_.row = 0; tile_.row < args_.individuals; tile_.row += rows_) {
      tile_.rows = std::min(rows_, args_.individuals - tile_.row);
      Tensor product = shaped(product_, {tile_.rows * E, E * tile_.lanes});
      at::mm_out(product, rows_of(centred_), shaped(tile_text_, {E * tile_.lanes, args_.width}).t());
      f();
    }
  }

  template <typename F>
  static void parallel(int64_t count, F&& f) {
    at::parallel_for(0, count, 1, f);
  }

  int64_t up(int64_t columns) const { return (columns + kernels_.width - 1) / kernels_.width * kernels_.width; }

  C* take(Tensor& tensor, at::IntArrayRef shape) {
    tensor = at::empty(shape, options_);
    return pointer<C>(tensor);
  }

  // The buffer's beginning, as this tile sees it.
  static Tensor shaped(const Tensor& buffer, at::IntArrayRef shape) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    return buffer.view({-1}).narrow(0, 0, count).view(shape);
  }

  // (N, E, D) -> the tile's rows, (rows·E, D).
  Tensor rows_of(const Tensor& x) const {
    return x.narrow(0, tile_.row, tile_.rows).view({tile_.rows * args_.emotions, args_.width});
  }

  // The tile's individuals against themselves.
  Tensor own(const Tensor& x) const { return x.narrow(0, tile_.column, tile_.columns); }
  Tensor own_text(const Tensor& x) const {
    return shaped(x, {args_.emotions, tile_.lanes, args_.width}).narrow(1, 0, tile_.columns).transpose(0, 1);
  }
  Tensor own_blocks() const { return at::bmm(own(centred_), own_text(tile_text_).transpose(1, 2)); }
  // Kernels index blocks by individual, the tile's tensor begins at its first.
  C* blocks_from(const Tensor& blocks) const {
    return pointer<C>(blocks) - tile_.column * args_.emotions * args_.emotions;
  }

  void add_columns(const Tensor& sums, C* to) const {  // (Q, lanes) into (N, Q)
    const C* from = pointer<C>(sums);
    for (int64_t lane = 0; lane < tile_.columns; ++lane)
      for (int64_t pair = 0; pair < args_.pairs; ++pair)
        to[(tile_.column + lane) * args_.pairs + pair] += from[pair * tile_.lanes + lane];
  }

  // What is not valid gets a sum of 1, so that its reciprocal is finite.
  double loss() {
    double total = 0;
    for (int64_t at = 0; at < args_.individuals * args_.pairs; ++at) {
      if (args_.valid[at])
        total += 0.5 * (std::log(double(args_.row_sum[at])) + std::log(double(args_.column_sum[at]))) +
                 kLn2 * (double(args_.offset) - double(args_.positive[at]));
      else
        args_.row_sum[at] = args_.column_sum[at] = 1;
    }
    return total / std::max<double>(double(pairs_), 1);
  }

  const CorrelationKernels<C>& kernels_;
  const bool within_;
  const double scale_;
  const at::TensorOptions options_;
  const Tensor visual_, text_;
  Correlation<C> args_ = {};
  CorrelationTile<C> tile_ = {};
  int64_t lanes_, rows_, pairs_ = 0;
  Tensor centred_, inv_norm_visual_, positive_, valid_, tile_text_, inv_norm_text_, text_valid_, product_;
};

double checked(double scale) {
  TORCH_CHECK_VALUE(scale <= 1000, "scale: got ", scale, "; the cpu backend supports at most 1000");
  return scale;
}

bool is_empty(const Tensor& x) { return x.size(0) == 0 || x.size(1) < 2; }

// The sums as the backward receives them: where float64 stands in for float32 they may overflow float32, and their
// logarithms do not.
Tensor stored(const Tensor& sums, const at::TensorOptions& wide) {
  return sums.dtype() == wide.dtype() ? sums : sums.log().to(wide.dtype());
}
Tensor restored(const Tensor& sums, at::ScalarType dtype) {
  return sums.scalar_type() == dtype ? sums : sums.to(dtype).exp();
}

template <typename F>
auto for_computing(bool twice, F&& f) {
  return twice ? f(double()) : f(float());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> correlation_loss(  // the loss, (), and the sums of rows and of columns, (N, Q)
    const Tensor& visual,                             // (N, E, D)
    const Tensor& text,                               // (N, E, D)
    const std::optional<Tensor>& scale, double scale_number,
    const std::optional<Tensor>& mask,  // (N, E) bool
    const std::string& negatives) {
  const double value = checked(number(scale, scale_number));
  const int64_t pairs = visual.size(1) * (visual.size(1) - 1) / 2;
  const at::TensorOptions wide = visual.options().dtype(visual.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  Tensor loss = at::zeros({}, wide), row_sum, column_sum;
  if (is_empty(visual))
    return {loss, at::zeros({visual.size(0), pairs}, wide), at::zeros({visual.size(0), pairs}, wide)};
  for_computing(needs_double(visual, value), [&](auto zero) {
    using C = decltype(zero);
    Tensor rows = at::zeros({visual.size(0), pairs}, wide.dtype(c10::CppTypeToScalarType<C>::value));
    Tensor columns = at::zeros_like(rows);
    loss.fill_(Run<C>(visual, text, value, mask, negatives).forward(rows, columns));
    row_sum = stored(rows, wide), column_sum = stored(columns, wide);
  });
  return {loss, row_sum, column_sum};
}

Gradients correlation_loss_backward(
    const Tensor& grad,  // ()
    const Tensor& visual, const Tensor& text, const std::optional<Tensor>& scale, double scale_number,
    const std::optional<Tensor>& mask, const std::string& negatives, const Tensor& row_sum, const Tensor& column_sum,
    const Needs& needs) {
  const double value = checked(number(scale, scale_number));
  Gradients gradients(3);
  if (is_empty(visual)) {
    if (needs[0]) gradients[0] = at::zeros_like(visual);
    if (needs[1]) gradients[1] = at::zeros_like(text);
    if (needs[2]) gradients[2] = at::zeros_like(*scale);
    return gradients;
  }
  for_computing(needs_double(visual, value), [&](auto zero) {
    using C = decltype(zero);
    const at::ScalarType dtype = c10::CppTypeToScalarType<C>::value;
    gradients = Run<C>(visual, text, value, mask, negatives)
                    .backward(grad.item<double>(), restored(row_sum, dtype), restored(column_sum, dtype), needs);
  });
  if (needs[0]) gradients[0] = gradients[0]->to(visual.scalar_type());
  if (needs[1]) gradients[1] = gradients[1]->to(text.scalar_type());
  if (needs[2]) gradients[2] = gradients[2]->to(scale->scalar_type());
  return gradients;
}

PCMECL_BIND(correlation_loss, 0, 1, 2)

}  // namespace pcmecl::cpu
