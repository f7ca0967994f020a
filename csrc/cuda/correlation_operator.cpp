// correlation_loss on tensors: the products with S in chunks of individuals, and what is kept between them.
//
// A chunk of S, in the backward its gradient too, is all that exists of anything larger than the features: memory grows
// with the individuals, time with their square. Products are in float32 for every input type and never in TF32, whose
// ten bits a logit scale of 100 would turn into wrong logits.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>

#include <algorithm>
#include <mutex>

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
  Run(const Tensor& visual, const Tensor& text, const ScaleArgument& scale, const std::optional<Tensor>& mask,
      const std::string& negatives)
      : within_(negatives == "within"), N(visual.size(0)), E(visual.size(1)), D(visual.size(2)), Q(E * (E - 1) / 2),
        options_(in_float(visual)), centred_(at::empty({N, E, D}, options_)), text_(at::empty({E, N, D}, options_)),
        inv_norm_visual_(at::empty({N, Q}, options_)), inv_norm_text_(at::empty({Q, N}, options_)),
        cosine_(at::empty({N, Q}, options_)) {
    for_dtype(visual, [&](auto zero) {
      using T = decltype(zero);
      Changes<T> args = {N, D, int(E), pointer<T>(visual), pointer<T>(text), pointer_or_null<bool>(mask)};
      args.centred_visual = pointer<float>(centred_), args.centred_text = pointer<float>(text_);
      args.inv_norm_visual = pointer<float>(inv_norm_visual_), args.inv_norm_text = pointer<float>(inv_norm_text_);
      args.cosine = pointer<float>(cosine_);
      correlation_changes(args);
    });
    args_ = {N, int(E), negatives == "distinct", scale.value()};
    args_.inv_norm_visual = pointer<float>(inv_norm_visual_), args_.inv_norm_text = pointer<float>(inv_norm_text_);
  }

  // The loss, () and the sums of rows and columns, both (N, Q).
  std::tuple<Tensor, Tensor, Tensor> forward() {
    Tensor row_sum = at::empty({N, Q}, options_), column_sum = at::empty({N, Q}, options_);
    if (within_) {
      const Tensor product = own_product();
      args_.product = pointer<float>(product);
      correlation_sums_within(args_, pointer<float>(row_sum), pointer<float>(column_sum));
    } else {
      Tensor columns = at::zeros({Q, N}, options_);
      for_chunks([&] { correlation_sums(args_); }, row_sum, columns);
      column_sum.copy_(columns.t());
    }
    Tensor loss = at::empty({}, options_);
    result(row_sum, column_sum, loss);
    return {loss, row_sum, column_sum};
  }

  Gradients backward(
      const Tensor& grad, const Tensor& like, const std::optional<Tensor>& scale, const Tensor& row_sum,
      const Tensor& column_sum, const Needs& needs) {
    args_.row_sum = pointer<float>(row_sum), args_.column_sum = pointer<float>(column_sum);
    Tensor row_grad_dot = at::empty({N, Q}, options_), column_grad_dot = at::zeros({Q, N}, options_), through_visual,
           through_text;
    if (within_)
      through_own(row_grad_dot, column_grad_dot, through_visual, through_text, needs);
    else
      through_chunks(row_grad_dot, column_grad_dot, through_visual, through_text, needs);
    pairs_ = at::empty({}, options_);
    correlation_count(args_.inv_norm_visual, N * Q, pointer<float>(pairs_));
    return finish(grad, like, scale, row_grad_dot, column_grad_dot, through_visual, through_text, needs);
  }

 private:
  // S of every chunk, f(), then its parts added up: rows into `row_sums` (N, Q), columns onto `column_sums` (Q, N).
  template <typename F>
  void for_chunks(F&& f, const Tensor& row_sums, const Tensor& column_sums) {
    const InFloat32 exact;
    const int64_t rows = std::clamp<int64_t>(kChunk / (N * E * E), 1, N);
    const CorrelationParts parts = correlation_parts(N, int(E), rows);
    product_ = at::empty({rows * E, E * N}, options_);
    const Tensor row_parts = at::empty({parts.column_blocks * rows * Q}, options_);
    const Tensor column_parts = at::empty({parts.row_blocks * Q * N}, options_);
    args_.row_parts = pointer<float>(row_parts), args_.column_parts = pointer<float>(column_parts);
    for (args_.row = 0; args_.row < N; args_.row += rows) {
      args_.rows = std::min(rows, N - args_.row);
      Tensor product = chunk(product_);
      at::mm_out(product, rows_of(centred_), flat(text_).t());
      args_.product = pointer<float>(product);
      f();
      const CorrelationParts now = correlation_parts(N, int(E), args_.rows);
      Tensor rows_out = row_sums.narrow(0, args_.row, args_.rows);
      at::sum_out(rows_out, beginning(row_parts, {now.column_blocks, args_.rows, Q}), 0);
      column_sums.add_(beginning(column_parts, {now.row_blocks, Q, N}).sum(0));
    }
  }

  void through_chunks(
      const Tensor& row_grad_dot, const Tensor& column_grad_dot, Tensor& through_visual, Tensor& through_text,
      const Needs& needs) {
    if (needs[0]) through_visual = at::empty({N, E, D}, options_);
    if (needs[1]) through_text = at::zeros({E, N, D}, options_);
    const int64_t rows = std::clamp<int64_t>(kChunk / (N * E * E), 1, N);
    const Tensor grad_product = at::empty({rows * E, E * N}, options_);
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
      const Tensor& grad, const Tensor& like, const std::optional<Tensor>& scale, const Tensor& row_grad_dot,
      const Tensor& column_grad_dot, const Tensor& through_visual, const Tensor& through_text, const Needs& needs) {
    Gradients gradients(3);
    if (needs[0]) gradients[0] = at::empty_like(like);
    if (needs[1]) gradients[1] = at::empty_like(like);
    for_dtype(like, [&](auto zero) {
      using T = decltype(zero);
      CorrelationFinish<T> args = {N, D, int(E), args_.scale, pointer<float>(grad), pointer<float>(pairs_)};
      args.centred_visual = pointer<float>(centred_), args.centred_text = pointer<float>(text_);
      args.inv_norm_visual = pointer<float>(inv_norm_visual_), args.inv_norm_text = pointer<float>(inv_norm_text_);
      args.cosine = pointer<float>(cosine_);
      args.row_grad_dot = pointer<float>(row_grad_dot), args.column_grad_dot = pointer<float>(column_grad_dot);
      args.through_visual = needs[0] ? pointer<float>(through_visual) : nullptr;
      args.through_text = needs[1] ? pointer<float>(through_text) : nullptr;
      args.grad_visual = pointer_or_null<T>(gradients[0]), args.grad_text = pointer_or_null<T>(gradients[1]);
      correlation_finish(args);
    });
    if (needs[2]) gradients[2] = (row_grad_dot.sum() / scale->to(at::kFloat)).to(scale->scalar_type());
    return gradients;
  }

  void result(const Tensor& row_sum, const Tensor& column_sum, const Tensor& loss) {
    CorrelationResult args = {N, int(E), args_.scale, args_.inv_norm_visual, pointer<float>(cosine_)};
    args.row_sum = pointer<float>(row_sum), args.column_sum = pointer<float>(column_sum);
    args.loss = pointer<float>(loss);
    correlation_result(args);
  }

  Tensor own_product() const {
    const InFloat32 exact;
    return at::bmm(centred_, text_.permute({1, 2, 0}));
  }

  Tensor rows_of(const Tensor& x) const { return x.narrow(0, args_.row, args_.rows).view({args_.rows * E, D}); }
  Tensor flat(const Tensor& x) const { return x.view({E * N, D}); }
  Tensor chunk(const Tensor& x) const { return x.narrow(0, 0, args_.rows * E); }
  static Tensor beginning(const Tensor& buffer, at::IntArrayRef shape) {
    return buffer.narrow(0, 0, shape[0] * shape[1] * shape[2]).view(shape);
  }

  const bool within_;
  const int64_t N, E, D, Q;
  const at::TensorOptions options_;
  const Tensor centred_, text_, inv_norm_visual_, inv_norm_text_, cosine_;
  Tensor product_, pairs_;
  Correlation args_ = {};
};

bool is_empty(const Tensor& x) { return x.size(0) == 0 || x.size(1) < 2; }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> correlation_loss(
    const Tensor& visual, const Tensor& text, const std::optional<Tensor>& scale, double scale_number,
    const std::optional<Tensor>& mask, const std::string& negatives) {
  const c10::DeviceGuard guard(visual.device());
  if (is_empty(visual)) {
    const Tensor sums = at::zeros({visual.size(0), visual.size(1) * (visual.size(1) - 1) / 2}, in_float(visual));
    return {at::zeros({}, in_float(visual)), sums, sums.clone()};
  }
  const ScaleArgument scale_argument(scale, scale_number);
  return Run(visual, text, scale_argument, mask, negatives).forward();
}

Gradients correlation_loss_backward(
    const Tensor& grad, const Tensor& visual, const Tensor& text, const std::optional<Tensor>& scale,
    double scale_number, const std::optional<Tensor>& mask, const std::string& negatives, const Tensor& row_sum,
    const Tensor& column_sum, const Needs& needs) {
  const c10::DeviceGuard guard(visual.device());
  if (is_empty(visual)) {
    Gradients gradients(3);
    if (needs[0]) gradients[0] = at::zeros_like(visual);
    if (needs[1]) gradients[1] = at::zeros_like(text);
    if (needs[2]) gradients[2] = at::zeros_like(*scale);
    return gradients;
  }
  const ScaleArgument scale_argument(scale, scale_number);
  return Run(visual, text, scale_argument, mask, negatives).backward(grad, visual, scale, row_sum, column_sum, needs);
}

PCMECL_BIND(correlation_loss, 0, 1, 2)

}  // namespace pcmecl::cuda
