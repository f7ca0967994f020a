// The CUDA kernels' interface: what a launch takes, on pointers, without tensors. The drivers in
// pcmecl_fast/ops/backends/cuda allocate.
//
// T is float, Half or BFloat16; everything is computed in float. Nothing here waits for the device or reads from it. A
// scale is a float on the device, or where that is null a number.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/host_device.h"

namespace pcmecl::cuda {

struct Scale {
  const float* on_device;
  float number;
};

// direction_loss and direction_logits.
template <typename T>
struct Direction {
  int64_t samples, individuals, width;
  int emotions;                   // at most 32
  const T* source;                // (B, D)
  const T* edited;                // (B, D)
  const T* bank;                  // (N, E, D)
  const int64_t* individual;      // (B,)
  const int64_t* source_emotion;  // (B,)
  const int64_t* target_emotion;  // (B,), null for the logits
  Scale scale;
  float contrast, min_change;
  bool normalize;

  // Forward: one of the two.
  T* logits;      // (B, E)
  float* losses;  // (B,)

  // Backward.
  const T* grad_logits;      // (B, E), or
  const float* grad_losses;  // (B,), or one number with stride 0
  int64_t grad_stride;
  const float* divisor;  // ()
  T* grad_source;        // (B, D) or null
  T* grad_edited;        // (B, D) or null
  float* grad_scale;     // (B,) or null
  // Where the bank's gradient is wanted: samples in the order that they are taken, those of an individual together,
  // and what is stored of each in that order.
  const int* order;     // (B,) or null
  float* coefficients;  // (B, coefficients_of(E)) or null
};

// along[E], across[E], 1/|source|, 1/|edited|, a, with grad d[e] = along[e]·δ − across[e]·d[e], and along[a] the
// negative sum of the others. A sample that asks for no change has −1 for 1/|source|.
PCMECL_HD int coefficients_of(int emotions) { return 2 * emotions + 3; }

template <typename T>
void direction_forward(const Direction<T>& args);
template <typename T>
void direction_backward(const Direction<T>& args);

// Samples sorted by individual, and how their gradients of the bank are added up (direction_bank.cu).
struct BankOrder {
  int samples, individuals;
  int stretches, stretch;     // stretches of so many samples, a multiple of 32, are counted at once
  int run;                    // samples that a block adds up
  const int64_t* individual;  // (B,)
  int* counts;                // (N, stretches)
  int* first;                 // (N + 1,): where each individual begins
  int* order;                 // (B,)
  float* sums;                // (⌈B / run⌉ + N, E, D)
};

void direction_order(const BankOrder& order);
template <typename T>
void direction_bank(const Direction<T>& args, const BankOrder& order, T* grad_bank);

// The sum of the losses over `divisor`, which becomes max(1, samples with target ≠ source) for a mean, else 1.
struct DirectionResult {
  const float* losses;            // (B,)
  const int64_t* source_emotion;  // (B,)
  const int64_t* target_emotion;  // (B,)
  int64_t samples;
  bool mean;
  float* parts;    // (2, direction_reduce_parts(B))
  float* loss;     // ()
  float* divisor;  // ()
};

int64_t direction_reduce_parts(int64_t samples);
void direction_reduce(const DirectionResult& args);

// correlation_loss, or a rectangle of its logits: S = visual · textᵀ has n individuals as rows and m as columns. The
// text's features lie as (E, m, D), so that columns are ordered (emotion, j) and neighbouring lanes are neighbouring
// individuals.
struct Extent {
  int64_t rows, columns, first;  // n, m; row i is of the same individual as column first + i, if there is one

  PCMECL_HD int64_t own() const {  // rows that have such a column
    const int64_t begin = first > 0 ? first : 0, end = first + rows < columns ? first + rows : columns;
    return end > begin ? end - begin : 0;
  }
  PCMECL_HD int64_t individuals() const { return rows + columns - own(); }
};

template <typename T>
struct Changes {
  Extent extent;
  int64_t width;
  int emotions;            // at most 32
  const T* visual;         // (n, E, D)
  const T* text;           // (m, E, D)
  const bool* mask;        // (n, E) or null
  const bool* text_mask;   // (m, E) or null
  float* centred_visual;   // (n, E, D), less each individual's mean
  float* centred_text;     // (E, m, D)
  float* inv_norm_visual;  // (n, Q): 1/|change| of the visual features; 0: no direction, -1: a pair that is not valid
  float* inv_norm_text;    // (Q, m): of the text features
  float* cosine;           // (n, Q): of the positive, 0 where it is not valid or not among the columns
};

struct Correlation {
  int64_t columns, first;
  int emotions;
  bool distinct;
  Scale scale;
  const float* inv_norm_visual;  // (n, Q)
  const float* inv_norm_text;    // (Q, m)
  const float* product;          // S of the chunk: (rows·E, E·m); "within", where n = m and first = 0: (n, E, E)
  int64_t row, rows;             // the chunk's individuals

  // Forward: sums of 2^(l − K), in parts. Backward: Σ of gradient times logit, in parts, and the gradient of S.
  float* row_parts;         // (column blocks, rows, Q)
  float* column_parts;      // (row blocks, Q, m)
  const float* row_sum;     // (n, Q)
  const float* column_sum;  // (m, Q)
  float* grad_product;      // as product, which it may be (CorrelationPlan)
};

struct CorrelationParts {
  int64_t column_blocks, row_blocks;
};

// How the kernels over chunks run: rows of a block, blocks that a multiprocessor holds, and whether the gradient of S
// is written where S was.
struct CorrelationPlan {
  int rows, sums_blocks, gradients_blocks;
  bool in_place;
};

struct CorrelationResult {
  int64_t individuals;
  int emotions;
  Scale scale;
  const float* inv_norm_visual;  // (N, Q)
  const float* cosine;           // (N, Q)
  float* row_sum;                // (N, Q): what is not valid becomes 1
  float* column_sum;             // (N, Q)
  float* loss;                   // ()
};

// Sums of 2^(l − K), the natural logarithms of what they stand for, and the positive logits.
struct CorrelationLogarithms {
  int64_t rows, columns;  // n·Q, m·Q
  Scale scale;
  const float* cosine;  // (n, Q)
  float* row_sum;       // (n, Q)
  float* column_sum;    // (m, Q)
  float* row_lse;       // (n, Q)
  float* column_lse;    // (m, Q)
  float* positive;      // (n, Q)
};

// Ends the backward: lengths and positives, which do not go through S.
template <typename T>
struct CorrelationFinish {
  Extent extent;
  int64_t width;
  int emotions;
  Scale scale;
  const float* grad;   // ()
  const float* pairs;  // (): how many are valid, at least 1; null where `grad` is of each pair already
  const float *centred_visual, *centred_text, *inv_norm_visual, *inv_norm_text, *cosine;  // as in Changes
  float* row_grad_dot;           // (n, Q): becomes Σ of gradient times logit, positives included
  const float* column_grad_dot;  // (Q, m)
  const float* through_visual;   // (n, E, D): dS · text, or null
  const float* through_text;     // (E, m, D): dSᵀ · visual, or null
  T* grad_visual;                // (n, E, D) or null
  T* grad_text;                  // (m, E, D) or null
};

template <typename T>
void correlation_changes(const Changes<T>& args);
CorrelationParts correlation_parts(int64_t columns, int emotions, int64_t rows);
CorrelationPlan correlation_plan(int emotions);
void correlation_sums(const Correlation& args);
void correlation_gradients(const Correlation& args);
void correlation_sums_within(const Correlation& args, float* row_sum, float* column_sum);  // both (n, Q)
void correlation_gradients_within(
    const Correlation& args, float* row_grad_dot, float* column_grad_dot);  // (n, Q), (Q, n)
void correlation_result(const CorrelationResult& args);
void correlation_count(const float* inv_norm_visual, int64_t pairs, float* valid);
void correlation_logarithms(const CorrelationLogarithms& args);    // from the sums
void correlation_exponentials(const CorrelationLogarithms& args);  // back to the sums
template <typename T>
void correlation_finish(const CorrelationFinish<T>& args);

// tree_attention. The layout travels with the launch, so that no table has to be kept on the device.
struct TreeLayout {
  static constexpr int kSegments = 1024;
  int prefix, tokens, segments;
  uint16_t end[kSegments];  // one past each segment's last token
};

template <typename T>
struct Tree {
  int64_t people;
  int heads, width;  // width at most 256
  const T* qkv;      // (N, S, 3, H, d)
  T* out;            // (N, S, H, d), in the backward an input, of float32 alone
  float* lse;        // (N, H, S), likewise: log2 of the sum of each query's exponentials
  const T* grad;     // (N, S, H, d)
  T* grad_qkv;       // (N, S, 3, H, d)
  float* means;      // (N, H, S): ⟨grad, out⟩ of each query, made on the way; half types only, else null
};

template <typename T>
void tree_forward(const Tree<T>& args, const TreeLayout& layout);
template <typename T>
void tree_backward(const Tree<T>& args, const TreeLayout& layout);

// clip_frames: a linear map of rows and one of columns, both banded.
struct Band {
  int before, after, taps;
  const int* first;      // (after,): the first old pixel of each new one; first + taps stays inside `before`
  const float* weights;  // (taps, after), 0 where a pixel needs fewer
};

template <typename T>
struct Frames {
  int64_t planes;
  const T* in;  // (planes, rows.before, columns.before)
  T* out;       // (planes, rows.after, columns.after)
  Band rows, columns;
  float gain[3], bias[3];  // out = gain[plane % 3] · resized + bias[plane % 3]
};

template <typename T>
void resize_frames(const Frames<T>& args);

}  // namespace pcmecl::cuda
