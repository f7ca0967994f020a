// The CPU kernels' interface: plain functions on pointers and ranges, without PyTorch, compiled once per instruction
// set.
//
// A kernel does the range [begin, end) of its units on one thread; the drivers beside this file allocate, spread ranges
// over PyTorch's threads and add up. T is the tensors' type, C the type that is computed in.
#pragma once

#include <cstdint>

namespace pcmecl::cpu {

struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct Computing {
  using type = T;
};
template <>
struct Computing<BFloat16> {
  using type = float;
};

// direction_loss and direction_logits. Units are samples.
template <typename T>
struct Direction {
  using C = typename Computing<T>::type;
  int64_t samples, emotions, width;
  const T* source;                // (B, D)
  const T* edited;                // (B, D)
  const T* bank;                  // (N, E, D)
  const int64_t* individual;      // (B,)
  const int64_t* source_emotion;  // (B,)
  const int64_t* target_emotion;  // (B,), null for the logits
  bool normalize;
  C scale, contrast, min_change;

  // Forward: one of the two. The backward writes the losses, too, unless they are null.
  T* logits;  // (B, E)
  C* losses;  // (B,)

  // Backward. `grad` is (B, E) for the logits; for the loss (B,), or one number with stride 0, or null: 1.
  const T* grad_logits;
  const C* grad_losses;
  int64_t grad_stride;
  C grad_factor;
  T* grad_source;        // (B, D) or null
  T* grad_edited;        // (B, D) or null
  C* grad_scale;         // (B,) or null
  const int64_t* order;  // (B,): the samples in the order of the range, or null: as they are
  C* grad_rows;          // (E, D) or null: the gradient of the rows of the one individual that is all the range's
};

// The bank's gradient from those of runs, ranges of samples of one individual. Units are individuals.
template <typename T>
struct DirectionBank {
  using C = typename Computing<T>::type;
  int64_t size;          // E·D
  const int64_t* first;  // (N + 1,): where each individual's runs begin
  const C* grad_rows;    // (runs, E, D)
  T* grad;               // (N, E, D)
};

template <typename T>
struct DirectionKernels {
  void (*forward)(const Direction<T>&, int64_t begin, int64_t end);
  void (*backward)(const Direction<T>&, int64_t begin, int64_t end);
  void (*bank)(const DirectionBank<T>&, int64_t begin, int64_t end);
};

// correlation_loss. Individuals j of the text lie in lanes: a tile's columns are ordered (emotion, j).
template <typename C>
struct Correlation {
  int64_t rows, columns, first;  // n, m; row i is of the same individual as column first + i, if there is one
  int64_t emotions, width, pairs;
  const C* visual;        // (n, E, D) as given
  const C* text;          // (m, E, D)
  const bool* mask;       // (n, E) or null
  const bool* text_mask;  // (m, E) or null
  bool distinct;
  C scale;         // times log2(e): logits are exponents of 2
  int64_t offset;  // K: sums are of 2^(l - K)

  C* centred;          // (n, E, D): the visual features less each individual's mean
  C* inv_norm_visual;  // (n, Q): scale / |change|, 0 where there is none
  bool* valid;         // (n, Q)
  C* positive;         // (n, Q): the positive logits; holds zeros
  C* row_sum;          // (n, Q)
  C* column_sum;       // (m, Q)

  // Backward.
  C* inv_row_sum;     // (n, Q): 1 / row_sum
  C* inv_column_sum;  // (m, Q)
  C grad_per_logit;   // what a logit's gradient is multiplied by: grad / valid directions
  C* row_grad_dot;    // (n, Q): Σ of gradient times logit over a row
  C* grad_centred;    // (n, E, D) or null
  C* grad_text;       // (m, E, D) or null
};

// A tile: individuals [row, row + rows) against [column, column + columns), the latter padded to `lanes`.
template <typename C>
struct CorrelationTile {
  int64_t row, rows, column, columns, lanes;
  C* text;           // (E, lanes, D): centred, 0 in the padding
  C* inv_norm_text;  // (Q, lanes): 1 / |change|, 0 where there is none
  C* text_valid;     // (Q, lanes): 1 or 0
  C* inv_text_sum;   // (Q, lanes): 1 / column_sum, 0 where not valid
  const C* product;  // (rows·E, E·lanes): centred · text transposed
  C* grad_product;   // the same
  C* grad_text;      // (E, lanes, D)
};

template <typename C>
struct CorrelationKernels {
  int64_t width;  // lanes of a vector
  void (*centre)(const Correlation<C>&, int64_t begin, int64_t end);
  void (*pack)(const Correlation<C>&, const CorrelationTile<C>&, int64_t begin, int64_t end);
  void (*forward)(const Correlation<C>&, const CorrelationTile<C>&, C* column_sum, int64_t begin, int64_t end);
  void (*backward)(const Correlation<C>&, const CorrelationTile<C>&, C* column_grad_dot, int64_t begin, int64_t end);
  void (*finish)(
      const Correlation<C>&, const CorrelationTile<C>&, const C* column_grad_dot, int64_t begin, int64_t end);
  void (*finish_visual)(const Correlation<C>&, int64_t begin, int64_t end);
  // negatives="within": each individual alone, `blocks` (n, E, E) being centred · text transposed; n = m, first = 0.
  void (*forward_within)(const Correlation<C>&, const CorrelationTile<C>&, const C* blocks, int64_t, int64_t);
  void (*backward_within)(
      const Correlation<C>&, const CorrelationTile<C>&, const C* blocks, C* grad_blocks, C* column_grad_dot, int64_t,
      int64_t);
};

// clip_frames: a linear map of rows and one of columns, both banded. Units are rows of `out` over all planes.
struct Band {
  int64_t before, after, taps;
  const int32_t* first;  // (after,): the first old pixel of each new one
  const void* weights;   // (taps, after) of C; rows past a pixel's own count are 0 and stay inside `before`
};

template <typename T>
struct Frames {
  using C = typename Computing<T>::type;
  int64_t planes, channels;
  const T* in;  // (planes, rows.before, columns.before)
  T* out;       // (planes, rows.after, columns.after)
  Band rows, columns;
  C gain[3], bias[3];  // out = gain[channel] · resized + bias[channel]
};

template <typename T>
struct FramesKernels {
  void (*resize)(const Frames<T>&, int64_t begin, int64_t end);
};

struct Kernels {
  const char* name;
  DirectionKernels<float> direction_float;
  DirectionKernels<double> direction_double;
  DirectionKernels<BFloat16> direction_bfloat16;
  CorrelationKernels<float> correlation_float;
  CorrelationKernels<double> correlation_double;
  FramesKernels<float> frames_float;
  FramesKernels<double> frames_double;
  FramesKernels<BFloat16> frames_bfloat16;
};

// The fastest that this processor runs; the variable PCMECL_CPU=portable|avx2|avx512 asks for less (read once).
const Kernels& kernels();

const Kernels& portable_kernels();
#if defined(__x86_64__) && defined(__GNUC__)
#define PCMECL_X86 1
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace pcmecl::cpu
