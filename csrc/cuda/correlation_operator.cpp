// The steps of correlation_loss for Python, which has the products between them made and walks over the chunks.
//
// n individuals are S's rows and m its columns; row i is of the same individual as column first + i, if there is one.
#include <tuple>
#include <utility>

#include "../common/directions.h"
#include "operators.h"

namespace pcmecl::cuda {

// Centred features, inverse lengths of changes and cosines of positives.
void correlation_prepare(
    int device, Address stream, int dtype, int64_t n, int64_t m, int64_t first, int64_t width, int emotions,
    Address visual, Address text, Address mask, Address text_mask, Address centred_visual, Address centred_text,
    Address inv_norm_visual, Address inv_norm_text, Address cosine) {
  const On on(device, stream.value);
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    Changes<T> args = {{n, m, first}, width, emotions, visual.of<T>(), text.of<T>()};
    args.mask = mask.of<bool>(), args.text_mask = text_mask.of<bool>();
    args.centred_visual = centred_visual.of<float>(), args.centred_text = centred_text.of<float>();
    args.inv_norm_visual = inv_norm_visual.of<float>(), args.inv_norm_text = inv_norm_text.of<float>();
    args.cosine = cosine.of<float>();
    correlation_changes(args);
  });
}

// How many parts the columns' blocks and the rows' make of a chunk's sums.
std::pair<int64_t, int64_t> correlation_part_counts(int64_t m, int emotions, int64_t rows) {
  const CorrelationParts parts = correlation_parts(m, emotions, rows);
  return {parts.column_blocks, parts.row_blocks};
}

// CorrelationPlan's numbers.
std::tuple<int, int, int, bool> correlation_plan_of(int emotions) {
  const CorrelationPlan plan = correlation_plan(emotions);
  return {plan.rows, plan.sums_blocks, plan.gradients_blocks, plan.in_place};
}

namespace {

Correlation chunk_of(
    int64_t m, int64_t first, int emotions, bool distinct, Scale scale, Address inv_norm_visual, Address inv_norm_text,
    Address product, int64_t row, int64_t rows) {
  Correlation args = {m, first, emotions, distinct, scale};
  args.inv_norm_visual = inv_norm_visual.of<float>(), args.inv_norm_text = inv_norm_text.of<float>();
  args.product = product.of<float>(), args.row = row, args.rows = rows;
  return args;
}

}  // namespace

// Sums over the logits of a chunk of rows, from `row` on, in parts.
void correlation_chunk(
    int device, Address stream, int64_t m, int64_t first, int emotions, bool distinct, Address scale,
    double scale_number, Address inv_norm_visual, Address inv_norm_text, Address product, int64_t row, int64_t rows,
    Address row_parts, Address column_parts) {
  const On on(device, stream.value);
  Correlation args = chunk_of(
      m, first, emotions, distinct, scale_of(scale, scale_number), inv_norm_visual, inv_norm_text, product, row, rows);
  args.row_parts = row_parts.of<float>(), args.column_parts = column_parts.of<float>();
  correlation_sums(args);
}

// The gradient of a chunk's product, and sums of gradient times logit in parts.
void correlation_chunk_backward(
    int device, Address stream, int64_t m, int64_t first, int emotions, bool distinct, Address scale,
    double scale_number, Address inv_norm_visual, Address inv_norm_text, Address product, int64_t row, int64_t rows,
    Address row_parts, Address column_parts, Address row_sum, Address column_sum, Address grad_product) {
  const On on(device, stream.value);
  Correlation args = chunk_of(
      m, first, emotions, distinct, scale_of(scale, scale_number), inv_norm_visual, inv_norm_text, product, row, rows);
  args.row_parts = row_parts.of<float>(), args.column_parts = column_parts.of<float>();
  args.row_sum = row_sum.of<float>(), args.column_sum = column_sum.of<float>();
  args.grad_product = grad_product.of<float>();
  correlation_gradients(args);
}

void correlation_within(
    int device, Address stream, int64_t n, int emotions, Address scale, double scale_number, Address inv_norm_visual,
    Address inv_norm_text, Address product, Address row_sum, Address column_sum) {
  const On on(device, stream.value);
  const Correlation args =
      chunk_of(n, 0, emotions, false, scale_of(scale, scale_number), inv_norm_visual, inv_norm_text, product, 0, n);
  correlation_sums_within(args, row_sum.of<float>(), column_sum.of<float>());
}

void correlation_within_backward(
    int device, Address stream, int64_t n, int emotions, Address scale, double scale_number, Address inv_norm_visual,
    Address inv_norm_text, Address product, Address row_sum, Address column_sum, Address grad_product,
    Address row_grad_dot, Address column_grad_dot) {
  const On on(device, stream.value);
  Correlation args =
      chunk_of(n, 0, emotions, false, scale_of(scale, scale_number), inv_norm_visual, inv_norm_text, product, 0, n);
  args.row_sum = row_sum.of<float>(), args.column_sum = column_sum.of<float>();
  args.grad_product = grad_product.of<float>();
  correlation_gradients_within(args, row_grad_dot.of<float>(), column_grad_dot.of<float>());
}

// The loss from everybody's sums.
void correlation_end(
    int device, Address stream, int64_t individuals, int emotions, Address scale, double scale_number,
    Address inv_norm_visual, Address cosine, Address row_sum, Address column_sum, Address loss) {
  const On on(device, stream.value);
  CorrelationResult args = {individuals, emotions, scale_of(scale, scale_number)};
  args.inv_norm_visual = inv_norm_visual.of<float>(), args.cosine = cosine.of<float>();
  args.row_sum = row_sum.of<float>(), args.column_sum = column_sum.of<float>(), args.loss = loss.of<float>();
  correlation_result(args);
}

// A rectangle's logarithms from its sums, and its positive logits; or without `positive` back to the sums.
void correlation_convert(
    int device, Address stream, int64_t rows, int64_t columns, Address scale, double scale_number, Address cosine,
    Address row_sum, Address column_sum, Address row_lse, Address column_lse, Address positive) {
  const On on(device, stream.value);
  CorrelationLogarithms args = {rows, columns, scale_of(scale, scale_number)};
  args.cosine = cosine.of<float>(), args.positive = positive.of<float>();
  args.row_sum = row_sum.of<float>(), args.column_sum = column_sum.of<float>();
  args.row_lse = row_lse.of<float>(), args.column_lse = column_lse.of<float>();
  positive ? correlation_logarithms(args) : correlation_exponentials(args);
}

// The gradients, of type `dtype`; `pairs` is a number's place where `grad` is of the mean over everybody's pairs.
void correlation_end_backward(
    int device, Address stream, int dtype, int64_t n, int64_t m, int64_t first, int64_t width, int emotions,
    Address scale, double scale_number, Address grad, Address pairs, Address centred_visual, Address centred_text,
    Address inv_norm_visual, Address inv_norm_text, Address cosine, Address row_grad_dot, Address column_grad_dot,
    Address through_visual, Address through_text, Address grad_visual, Address grad_text) {
  const On on(device, stream.value);
  if (pairs) correlation_count(inv_norm_visual.of<float>(), n * pair_count(emotions), pairs.of<float>());
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    CorrelationFinish<T> args = {{n, m, first}, width, emotions, scale_of(scale, scale_number), grad.of<float>()};
    args.pairs = pairs.of<float>();
    args.centred_visual = centred_visual.of<float>(), args.centred_text = centred_text.of<float>();
    args.inv_norm_visual = inv_norm_visual.of<float>(), args.inv_norm_text = inv_norm_text.of<float>();
    args.cosine = cosine.of<float>();
    args.row_grad_dot = row_grad_dot.of<float>(), args.column_grad_dot = column_grad_dot.of<float>();
    args.through_visual = through_visual.of<float>(), args.through_text = through_text.of<float>();
    args.grad_visual = grad_visual.of<T>(), args.grad_text = grad_text.of<T>();
    correlation_finish(args);
  });
}

PCMECL_BIND(correlation_prepare)
PCMECL_BIND(correlation_part_counts)
PCMECL_BIND(correlation_plan_of)
PCMECL_BIND(correlation_chunk)
PCMECL_BIND(correlation_chunk_backward)
PCMECL_BIND(correlation_within)
PCMECL_BIND(correlation_within_backward)
PCMECL_BIND(correlation_end)
PCMECL_BIND(correlation_convert)
PCMECL_BIND(correlation_end_backward)

}  // namespace pcmecl::cuda
