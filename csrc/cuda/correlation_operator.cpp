// correlation_loss on tensors, and rectangles of its logits, of which a group of processes makes the whole: the
// products with S in chunks of individuals, and what is kept between them.
//
// A chunk of S, in the backward its gradient too, is all that exists of anything larger than the features: memory grows
// with the individuals, time with their square. Products are in float32 for every input type and never in TF32, whose
// ten bits a logit scale of 100 would turn into wrong logits.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>

#include <algorithm>
#include <mutex>

#include "../common/rectangle.h"
#include "operators.h"

namespace pcmecl::cuda {
namespace {

#ifdef PCMECL_ON_HOST
constexpr int64_t kChunk = 1 << 12;  // so that a test has several chunks
#else
constexpr int64_t kChunk = 3 << 20;  // numbers of S at once: 12 MB
#endif

// While it lives, products are in float32 whatever the user allows. NoTF32Guard does it for cuBLAS; cuBLASLt does not
// ask it, so where that is preferred cuBLAS takes its place, for all threads: exact is never wrong for another.
class InFloat32 {
#ifndef PCMECL_ON_HOST
 public:
  InFloat32() : one_at_a_time_(changing()), preferred_(at::globalContext().blasPreferredBackend()) {
    if (preferred_ == at::BlasBackend::Cublaslt) at::globalContext().setBlasPreferredBackend(at::BlasBackend::Cublas);
  }
  ~InFloat32() {
    if (preferred_ == at::BlasBackend::Cublaslt) at::globalContext().setBlasPreferredBackend(preferred_);
  }

 private:
  static std::recursive_mutex& changing() {
    static std::recursive_mutex mutex;
    return mutex;
  }

  const std::lock_guard<std::recursive_mutex> one_at_a_time_;
  const at::BlasBackend preferred_;
#endif
  const at::NoTF32Guard exact_;
};

class Run {
 public:
  Run(const Rectangle& of, const ScaleArgument& scale)
      : within_(of.negatives == "within"), extent_{of.visual.size(0), of.text.size(0), of.first}, n(extent_.rows),
        m(extent_.columns), E(of.visual.size(1)), D(of.visual.size(2)), Q(of.pairs()), options_(in_float(of.visual)),
        scale_(scale.in_float), centred_(at::empty({n, E, D}, options_)), text_(at::empty({E, m, D}, options_)),
        inv_norm_visual_(at::empty({n, Q}, options_)), inv_norm_text_(at::empty({Q, m}, options_)),
        cosine_(at::empty({n, Q}, options_)) {
    TORCH_INTERNAL_ASSERT(!within_ || (n == m && of.first == 0));
    for_dtype(of.visual, [&](auto zero) {
      using T = decltype(zero);
      Changes<T> args = {extent_, D, int(E), pointer<T>(of.visual), pointer<T>(of.text)};
      args.mask = pointer_or_null<bool>(of.mask), args.text_mask = pointer_or_null<bool>(of.text_mask);
      args.centred_visual = pointer<float>(centred_), args.centred_text = pointer<float>(text_);
      args.inv_norm_visual = pointer<float>(inv_norm_visual_), args.inv_norm_text = pointer<float>(inv_norm_text_);
      args.cosine = pointer<float>(cosine_);
      correlation_changes(args);
    });
    args_ = {m, of.first, int(E), of.negatives == "distinct", scale.value()};
    args_.inv_norm_visual = pointer<float>(inv_norm_visual_), args_.inv_norm_text = pointer<float>(inv_norm_text_);
  }

  // Of everybody: the loss, () and the sums of rows and columns, both (n, Q).
  std::tuple<Tensor, Tensor, Tensor> forward() {
    const auto [row_sum, column_sum] = sums();
    const Tensor loss = at::empty({}, options_);
    CorrelationResult args = {n, int(E), args_.scale, args_.inv_norm_visual, pointer<float>(cosine_)};
    args.row_sum = pointer<float>(row_sum), args.column_sum = pointer<float>(column_sum);
    args.loss = pointer<float>(loss);
    correlation_result(args);
    return {loss, row_sum, column_sum};
  }

  // Of a rectangle: logarithms of the sums of rows and columns, (n, Q) and (m, Q), and the positive logits, (n, Q).
  std::tuple<Tensor, Tensor, Tensor> logarithms() {
    const auto [row_sum, column_sum] = sums();
    const Tensor row_lse = at::empty_like(row_sum), column_lse = at::empty_like(column_sum),
                 positive = at::empty_like(row_sum);
    CorrelationLogarithms args = logarithms_of(row_sum, column_sum, row_lse, column_lse);
    args.cosine = pointer<float>(cosine_), args.positive = pointer<float>(positive);
    correlation_logarithms(args);
    return {row_lse, column_lse, positive};
  }

  // The sums of rows and columns, from their logarithms.
  std::tuple<Tensor, Tensor> exponentials(const Tensor& row_lse, const Tensor& column_lse) const {
    const Tensor row_sum = at::empty({n, Q}, options_), column_sum = at::empty({m, Q}, options_);
    correlation_exponentials(logarithms_of(row_sum, column_sum, row_lse, column_lse));
    return {row_sum, column_sum};
  }

  // The gradients of visual and text, in `dtype`, and of scale; of a `grad` of the mean over everybody's pairs, or of
  // each pair. Sums are of all logits of the rows, (n, Q), and of the columns, (m, Q), inside this rectangle or not.
  Gradients backward(
      const Tensor& grad, bool of_mean, at::ScalarType dtype, const Tensor& row_sum, const Tensor& column_sum,
      const Needs& needs) {
    args_.row_sum = pointer<float>(row_sum), args_.column_sum = pointer<float>(column_sum);
    Tensor row_grad_dot = at::empty({n, Q}, options_), column_grad_dot = at::zeros({Q, m}, options_), through_visual,
           through_text;
    if (within_)
      through_own(row_grad_dot, column_grad_dot, through_visual, through_text, needs);
    else
      through_chunks(row_grad_dot, column_grad_dot, through_visual, through_text, needs);
    if (of_mean) {
      pairs_ = at::empty({}, options_);
      correlation_count(args_.inv_norm_visual, n * Q, pointer<float>(*pairs_));
    }
    return finish(grad, dtype, row_grad_dot, column_grad_dot, through_visual, through_text, needs);
  }

 private:
  // Of 2^(l − K), (n, Q) and (m, Q).
  std::tuple<Tensor, Tensor> sums() {
    Tensor row_sum = at::empty({n, Q}, options_), column_sum = at::empty({m, Q}, options_);
    if (within_) {
      const Tensor product = own_product();
      args_.product = pointer<float>(product);
      correlation_sums_within(args_, pointer<float>(row_sum), pointer<float>(column_sum));
    } else {
      Tensor columns = at::zeros({Q, m}, options_);
      for_chunks([&] { correlation_sums(args_); }, row_sum, columns);
      column_sum.copy_(columns.t());
    }
    return {row_sum, column_sum};
  }

  CorrelationLogarithms logarithms_of(
      const Tensor& row_sum, const Tensor& column_sum, const Tensor& row_lse, const Tensor& column_lse) const {
    CorrelationLogarithms args = {n * Q, m * Q, args_.scale};
    args.row_sum = pointer<float>(row_sum), args.column_sum = pointer<float>(column_sum);
    args.row_lse = pointer<float>(row_lse), args.column_lse = pointer<float>(column_lse);
    return args;
  }

  // S of every chunk, f(), then its parts added up: rows into `row_sums` (n, Q), columns onto `column_sums` (Q, m).
  template <typename F>
  void for_chunks(F&& f, const Tensor& row_sums, const Tensor& column_sums) {
    const InFloat32 exact;
    const int64_t rows = rows_at_once();
    const CorrelationParts parts = correlation_parts(m, int(E), rows);
    product_ = at::empty({rows * E, E * m}, options_);
    const Tensor row_parts = at::empty({parts.column_blocks * rows * Q}, options_);
    const Tensor column_parts = at::empty({parts.row_blocks * Q * m}, options_);
    args_.row_parts = pointer<float>(row_parts), args_.column_parts = pointer<float>(column_parts);
    for (args_.row = 0; args_.row < n; args_.row += rows) {
      args_.rows = std::min(rows, n - args_.row);
      Tensor product = chunk(product_);
      at::mm_out(product, rows_of(centred_), flat(text_).t());
      args_.product = pointer<float>(product);
      f();
      const CorrelationParts now = correlation_parts(m, int(E), args_.rows);
      Tensor rows_out = row_sums.narrow(0, args_.row, args_.rows);
      at::sum_out(rows_out, beginning(row_parts, {now.column_blocks, args_.rows, Q}), 0);
      column_sums.add_(beginning(column_parts, {now.row_blocks, Q, m}).sum(0));
    }
  }

  void through_chunks(
      const Tensor& row_grad_dot, const Tensor& column_grad_dot, Tensor& through_visual, Tensor& through_text,
      const Needs& needs) {
    if (needs[0]) through_visual = at::empty({n, E, D}, options_);
    if (needs[1]) through_text = at::zeros({E, m, D}, options_);
    const Tensor grad_product = at::empty({rows_at_once() * E, E * m}, options_);
    args_.grad_product = pointer<float>(grad_product);
    for_chunks(
        [&] {
          correlation_gradients(args_);
          const Tensor grad = chunk(grad_product);
          if (needs[0]) {
            Tensor out = rows_of(through_visual);
            at::mm_out(out, grad, flat(text_));
          }
          if (needs[1]) flat(through_text).addmm_(grad.t(), rows_of(centred_));
        },
        row_grad_dot, column_grad_dot);
  }

  void through_own(
      const Tensor& row_grad_dot, const Tensor& column_grad_dot, Tensor& through_visual, Tensor& through_text,
      const Needs& needs) {
    const InFloat32 exact;
    const Tensor product = own_product(), grad = at::empty_like(product);
    args_.product = pointer<float>(product), args_.grad_product = pointer<float>(grad);
    correlation_gradients_within(args_, pointer<float>(row_grad_dot), pointer<float>(column_grad_dot));
    if (needs[0]) through_visual = at::bmm(grad, text_.transpose(0, 1));
    if (needs[1]) through_text = at::bmm(grad.transpose(1, 2), centred_).transpose(0, 1).contiguous();
  }

  Gradients finish(
      const Tensor& grad, at::ScalarType dtype, const Tensor& row_grad_dot, const Tensor& column_grad_dot,
      const Tensor& through_visual, const Tensor& through_text, const Needs& needs) {
    Gradients gradients(3);
    if (needs[0]) gradients[0] = at::empty({n, E, D}, options_.dtype(dtype));
    if (needs[1]) gradients[1] = at::empty({m, E, D}, options_.dtype(dtype));
    for_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      CorrelationFinish<T> args = {extent_, D, int(E), args_.scale, pointer<float>(grad)};
      args.pairs = pointer_or_null<float>(pairs_);
      args.centred_visual = pointer<float>(centred_), args.centred_text = pointer<float>(text_);
      args.inv_norm_visual = pointer<float>(inv_norm_visual_), args.inv_norm_text = pointer<float>(inv_norm_text_);
      args.cosine = pointer<float>(cosine_);
      args.row_grad_dot = pointer<float>(row_grad_dot), args.column_grad_dot = pointer<float>(column_grad_dot);
      args.through_visual = needs[0] ? pointer<float>(through_visual) : nullptr;
      args.through_text = needs[1] ? pointer<float>(through_text) : nullptr;
      args.grad_visual = pointer_or_null<T>(gradients[0]), args.grad_text = pointer_or_null<T>(gradients[1]);
      correlation_finish(args);
    });
    if (needs[2]) gradients[2] = row_grad_dot.sum() / *scale_;
    return gradients;
  }

  Tensor own_product() const {
    const InFloat32 exact;
    return at::bmm(centred_, text_.permute({1, 2, 0}));
  }

  int64_t rows_at_once() const { return std::clamp<int64_t>(kChunk / (m * E * E), 1, n); }
  Tensor rows_of(const Tensor& x) const { return x.narrow(0, args_.row, args_.rows).view({args_.rows * E, D}); }
  Tensor flat(const Tensor& x) const { return x.view({E * m, D}); }
  Tensor chunk(const Tensor& x) const { return x.narrow(0, 0, args_.rows * E); }
  static Tensor beginning(const Tensor& buffer, at::IntArrayRef shape) {
    return buffer.narrow(0, 0, shape[0] * shape[1] * shape[2]).view(shape);
  }

  const bool within_;
  const Extent extent_;
  const int64_t n, m, E, D, Q;
  const at::TensorOptions options_;
  const std::optional<Tensor> scale_;
  const Tensor centred_, text_, inv_norm_visual_, inv_norm_text_, cosine_;
  Tensor product_;
  std::optional<Tensor> pairs_;
  Correlation args_ = {};
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> correlation_loss(
    const Tensor& visual, const Tensor& text, const std::optional<Tensor>& scale, double scale_number,
    const std::optional<Tensor>& mask, const std::string& negatives) {
  const c10::DeviceGuard guard(visual.device());
  const Rectangle all = Rectangle::square(visual, text, mask, negatives);
  if (all.is_empty()) {
    const Tensor sums = at::zeros({visual.size(0), all.pairs()}, in_float(visual));
    return {at::zeros({}, in_float(visual)), sums, sums.clone()};
  }
  const ScaleArgument scale_argument(scale, scale_number);
  return Run(all, scale_argument).forward();
}

Gradients correlation_loss_backward(
    const Tensor& grad, const Tensor& visual, const Tensor& text, const std::optional<Tensor>& scale,
    double scale_number, const std::optional<Tensor>& mask, const std::string& negatives, const Tensor& row_sum,
    const Tensor& column_sum, const Needs& needs) {
  const c10::DeviceGuard guard(visual.device());
  const Rectangle all = Rectangle::square(visual, text, mask, negatives);
  Gradients gradients(3);
  if (all.is_empty()) {
    if (needs[0]) gradients[0] = at::zeros_like(visual);
    if (needs[1]) gradients[1] = at::zeros_like(text);
    if (needs[2]) gradients[2] = at::zeros_like(*scale);
    return gradients;
  }
  const ScaleArgument scale_argument(scale, scale_number);
  gradients = Run(all, scale_argument).backward(grad, true, visual.scalar_type(), row_sum, column_sum, needs);
  if (needs[2]) gradients[2] = gradients[2]->to(scale->scalar_type());
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor> correlation_rectangle_sums(
    const Tensor& visual, const Tensor& text, const std::optional<Tensor>& scale, double scale_number,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& text_mask, const std::string& negatives,
    int64_t first) {
  const c10::DeviceGuard guard(visual.device());
  const Rectangle rectangle = {visual, text, mask, text_mask, negatives, first};
  if (rectangle.is_empty()) return rectangle.no_sums(in_float(visual));
  const ScaleArgument scale_argument(scale, scale_number);
  return Run(rectangle, scale_argument).logarithms();
}

Gradients correlation_rectangle_gradients(
    const Tensor& weight, const Tensor& visual, const Tensor& text, const std::optional<Tensor>& scale,
    double scale_number, const std::optional<Tensor>& mask, const std::optional<Tensor>& text_mask,
    const std::string& negatives, int64_t first, const Tensor& row_lse, const Tensor& column_lse, const Needs& needs) {
  const c10::DeviceGuard guard(visual.device());
  const Rectangle rectangle = {visual, text, mask, text_mask, negatives, first};
  if (rectangle.is_empty()) return rectangle.no_gradients(in_float(visual), needs);
  const ScaleArgument scale_argument(scale, scale_number);
  Run run(rectangle, scale_argument);
  const auto [row_sum, column_sum] = run.exponentials(row_lse.contiguous(), column_lse.contiguous());
  return run.backward(weight, false, at::kFloat, row_sum, column_sum, needs);
}

PCMECL_BIND(correlation_loss, 0, 1, 2)
PCMECL_BIND_FUNCTION(correlation_rectangle_sums)
PCMECL_BIND_FUNCTION(correlation_rectangle_gradients)

}  // namespace pcmecl::cuda
