// correlation_loss on tensors, and rectangles of its logits, of which a group of processes makes the whole: tiles,
// threads and the matrix products; the rest of the arithmetic is in correlation_kernels.h.
//
// A tile of S, its gradient and the tile's text features are all that exists of anything larger than the features:
// memory grows with the individuals, time with their square.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>

#include <algorithm>
#include <cmath>

#include "../common/rectangle.h"
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
  Run(const Rectangle& of, double scale)
      : kernels_(kernels_for(C())), within_(of.negatives == "within"), scale_(scale),
        options_(of.visual.options().dtype(c10::CppTypeToScalarType<C>::value)), visual_(of.visual.to(options_)),
        text_(of.text.to(options_)) {
    const int64_t n = of.visual.size(0), m = of.text.size(0), E = of.visual.size(1), D = of.visual.size(2),
                  Q = of.pairs();
    TORCH_INTERNAL_ASSERT(!within_ || (n == m && of.first == 0));
    args_.rows = n, args_.columns = m, args_.first = of.first, args_.emotions = E, args_.width = D, args_.pairs = Q;
    args_.visual = pointer<C>(visual_), args_.text = pointer<C>(text_);
    args_.mask = of.mask ? of.mask->data_ptr<bool>() : nullptr;
    args_.text_mask = of.text_mask ? of.text_mask->data_ptr<bool>() : nullptr;
    args_.distinct = of.negatives == "distinct";
    args_.scale = C(scale / kLn2), args_.offset = offset<C>(scale);
    const int64_t most = std::max<int64_t>(1, kColumns / E);
    lanes_ = up(std::min(m, most));
    rows_ = 2 * up(most);

    args_.centred = take(centred_, {n, E, D});
    args_.inv_norm_visual = take(inv_norm_visual_, {n, Q});
    positive_ = at::zeros({n, Q}, options_);
    args_.positive = pointer<C>(positive_);
    valid_ = at::empty({n, Q}, options_.dtype(at::kBool));
    args_.valid = valid_.data_ptr<bool>();
    tile_.text = take(tile_text_, {E, lanes_, D});
    tile_.inv_norm_text = take(inv_norm_text_, {Q, lanes_});
    tile_.text_valid = take(text_valid_, {Q, lanes_});
    if (!within_) tile_.product = take(product_, {std::min(rows_, n) * E * E * lanes_});
    parallel(n, [&](int64_t begin, int64_t end) { kernels_.centre(args_, begin, end); });
  }

  // Adds sums of 2^(l - K) to those of the rows, (n, Q), and of the columns, (m, Q).
  void forward(const Tensor& row_sum, const Tensor& column_sum) {
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
  }

  // The mean over everybody's pairs, of the sums of a forward. What is not valid gets a sum of 1, so that its
  // reciprocal is finite.
  double loss() {
    double total = 0;
    for (int64_t at = 0; at < args_.rows * args_.pairs; ++at) {
      if (args_.valid[at])
        total += 0.5 * (std::log(double(args_.row_sum[at])) + std::log(double(args_.column_sum[at]))) +
                 kLn2 * (double(args_.offset) - double(args_.positive[at]));
      else
        args_.row_sum[at] = args_.column_sum[at] = 1;
    }
    return total / valid_pairs();
  }

  // Pairs of emotions of which the rows' individuals have both, at least 1.
  double valid_pairs() const {
    const int64_t count = std::count(args_.valid, args_.valid + args_.rows * args_.pairs, true);
    return double(std::max<int64_t>(count, 1));
  }

  // Natural logarithms of what sums of 2^(l - K) stand for, and back to their reciprocals.
  Tensor lse(const Tensor& sums) const { return sums.log().add_(double(args_.offset) * kLn2); }
  Tensor inverse_sums(const Tensor& lse) const {
    return at::rsub(lse.to(options_).contiguous(), double(args_.offset) * kLn2).exp_();
  }

  // The positive logits, (n, Q), once all tiles have been seen.
  Tensor positive() const { return positive_ * kLn2; }

  // The gradients of visual, text and scale, in C, of `weight` times the loss of each pair; of the reciprocals of the
  // sums of all logits of the rows, (n, Q), and of the columns, (m, Q), inside this rectangle or not.
  Gradients backward(double weight, const Tensor& inv_row_sum, const Tensor& inv_column_sum, const Needs& needs) {
    const int64_t n = args_.rows, m = args_.columns, E = args_.emotions, D = args_.width, Q = args_.pairs;
    const bool visual = needs[0], text = needs[1];
    Tensor row_grad_dot = at::zeros({n, Q}, options_);
    args_.inv_row_sum = pointer<C>(inv_row_sum), args_.inv_column_sum = pointer<C>(inv_column_sum);
    args_.row_grad_dot = pointer<C>(row_grad_dot);
    args_.grad_per_logit = C(weight * kLn2 / 2);
    Tensor grad_visual, grad_text, tile_inv_text_sum, tile_grad_text, grad_product;
    if (visual) grad_visual = at::zeros({n, E, D}, options_), args_.grad_centred = pointer<C>(grad_visual);
    if (text) args_.grad_text = take(grad_text, {m, E, D});
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
    parallel(n, [&](int64_t begin, int64_t end) { kernels_.finish_visual(args_, begin, end); });

    Gradients gradients(3);
    if (visual) gradients[0] = grad_visual;
    if (text) gradients[1] = grad_text;
    if (needs[2]) gradients[2] = row_grad_dot.sum(at::kDouble) / scale_;
    return gradients;
  }

 private:
  template <typename F>
  void for_tiles(F&& f) {
    for (tile_.column = 0; tile_.column < args_.columns; tile_.column += lanes_) {
      tile_.columns = std::min(lanes_, args_.columns - tile_.column);
      tile_.lanes = up(tile_.columns);
      parallel(tile_.lanes, [&](int64_t begin, int64_t end) { kernels_.pack(args_, tile_, begin, end); });
      f();
    }
  }

  template <typename F>
  void for_rows(F&& f) {
    const int64_t E = args_.emotions;
    for (tile_.row = 0; tile_.row < args_.rows; tile_.row += rows_) {
      tile_.rows = std::min(rows_, args_.rows - tile_.row);
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

  // (n, E, D) -> the tile's rows, (rows·E, D).
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

  void add_columns(const Tensor& sums, C* to) const {  // (Q, lanes) into (m, Q)
    const C* from = pointer<C>(sums);
    for (int64_t lane = 0; lane < tile_.columns; ++lane)
      for (int64_t pair = 0; pair < args_.pairs; ++pair)
        to[(tile_.column + lane) * args_.pairs + pair] += from[pair * tile_.lanes + lane];
  }

  const CorrelationKernels<C>& kernels_;
  const bool within_;
  const double scale_;
  const at::TensorOptions options_;
  const Tensor visual_, text_;
  Correlation<C> args_ = {};
  CorrelationTile<C> tile_ = {};
  int64_t lanes_, rows_;
  Tensor centred_, inv_norm_visual_, positive_, valid_, tile_text_, inv_norm_text_, text_valid_, product_;
};

double checked(double scale) {
  TORCH_CHECK_VALUE(scale <= 1000, "scale: got ", scale, "; the cpu backend supports at most 1000");
  return scale;
}

at::TensorOptions wide_options(const Tensor& x) {
  return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

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
  const Rectangle all = Rectangle::square(visual, text, mask, negatives);
  const int64_t pairs = all.pairs();
  const at::TensorOptions wide = wide_options(visual);
  Tensor loss = at::zeros({}, wide), row_sum, column_sum;
  if (all.is_empty()) return {loss, at::zeros({visual.size(0), pairs}, wide), at::zeros({visual.size(0), pairs}, wide)};
  for_computing(needs_double(visual, value), [&](auto zero) {
    using C = decltype(zero);
    Tensor rows = at::zeros({visual.size(0), pairs}, wide.dtype(c10::CppTypeToScalarType<C>::value));
    Tensor columns = at::zeros_like(rows);
    Run<C> run(all, value);
    run.forward(rows, columns);
    loss.fill_(run.loss());
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
  const Rectangle all = Rectangle::square(visual, text, mask, negatives);
  Gradients gradients(3);
  if (all.is_empty()) {
    if (needs[0]) gradients[0] = at::zeros_like(visual);
    if (needs[1]) gradients[1] = at::zeros_like(text);
    if (needs[2]) gradients[2] = at::zeros_like(*scale);
    return gradients;
  }
  for_computing(needs_double(visual, value), [&](auto zero) {
    using C = decltype(zero);
    const at::ScalarType dtype = c10::CppTypeToScalarType<C>::value;
    Run<C> run(all, value);
    gradients = run.backward(
        grad.item<double>() / run.valid_pairs(), restored(row_sum, dtype).reciprocal(),
        restored(column_sum, dtype).reciprocal(), needs);
  });
  if (needs[0]) gradients[0] = gradients[0]->to(visual.scalar_type());
  if (needs[1]) gradients[1] = gradients[1]->to(text.scalar_type());
  if (needs[2]) gradients[2] = gradients[2]->to(scale->scalar_type());
  return gradients;
}

// A rectangle's part of the sums over a row or a column: natural logarithms, (n, Q) and (m, Q), -inf where nothing is
// kept, and the positive logits in it, (n, Q).
std::tuple<Tensor, Tensor, Tensor> correlation_rectangle_sums(
    const Tensor& visual,  // (n, E, D)
    const Tensor& text,    // (m, E, D)
    const std::optional<Tensor>& scale, double scale_number,
    const std::optional<Tensor>& mask,       // (n, E) bool
    const std::optional<Tensor>& text_mask,  // (m, E) bool
    const std::string& negatives, int64_t first) {
  const double value = checked(number(scale, scale_number));
  const Rectangle rectangle = {visual, text, mask, text_mask, negatives, first};
  const at::TensorOptions wide = wide_options(visual);
  if (rectangle.is_empty()) return rectangle.no_sums(wide);
  return for_computing(needs_double(visual, value), [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor> {
    using C = decltype(zero);
    Run<C> run(rectangle, value);
    const at::TensorOptions computing = wide.dtype(c10::CppTypeToScalarType<C>::value);
    const Tensor rows = at::zeros({visual.size(0), rectangle.pairs()}, computing),
                 columns = at::zeros({text.size(0), rectangle.pairs()}, computing);
    run.forward(rows, columns);
    return {run.lse(rows).to(wide), run.lse(columns).to(wide), run.positive().to(wide)};
  });
}

// Its part of the gradients of visual, text and scale, in the type of the sums, which are here those of all rectangles.
Gradients correlation_rectangle_gradients(
    const Tensor& weight,  // (): of each valid pair's loss
    const Tensor& visual, const Tensor& text, const std::optional<Tensor>& scale, double scale_number,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& text_mask, const std::string& negatives,
    int64_t first, const Tensor& row_lse, const Tensor& column_lse, const Needs& needs) {
  const double value = checked(number(scale, scale_number));
  const Rectangle rectangle = {visual, text, mask, text_mask, negatives, first};
  const at::TensorOptions wide = wide_options(visual);
  if (rectangle.is_empty()) return rectangle.no_gradients(wide, needs);
  Gradients gradients;
  for_computing(needs_double(visual, value), [&](auto zero) {
    Run<decltype(zero)> run(rectangle, value);
    gradients = run.backward(weight.item<double>(), run.inverse_sums(row_lse), run.inverse_sums(column_lse), needs);
  });
  for (auto& gradient : gradients)
    if (gradient) gradient = gradient->to(wide);
  return gradients;
}

PCMECL_BIND(correlation_loss, 0, 1, 2)
PCMECL_BIND_FUNCTION(correlation_rectangle_sums)
PCMECL_BIND_FUNCTION(correlation_rectangle_gradients)

}  // namespace pcmecl::cpu
