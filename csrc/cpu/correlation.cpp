// correlation_loss, and rectangles of its logits, of which a group of processes makes the whole: one object for a call,
// whose methods Python calls between its matrix products (pcmecl_fast/ops/backends/cpu/correlation.py); the rest of the
// arithmetic is in correlation_kernels.h.
//
// A tile of S, its gradient and the tile's text features are all that exists of anything larger than the features:
// memory grows with the individuals, time with their square.
#include <algorithm>
#include <cmath>

#include "operators.h"

namespace pcmecl::cpu {
namespace {

constexpr double kLn2 = 0.69314718055994530942;
constexpr int64_t kColumns = 512;  // a tile's columns and half its rows: about 4 MB of S and its gradient in float32

const CorrelationKernels<float>& kernels_for(float) { return kernels().correlation_float; }
const CorrelationKernels<double>& kernels_for(double) { return kernels().correlation_double; }

// K of the sums of 2^(l - K): the largest term, 2^(scale·log2(e) - K), times 2^27 terms stays finite, and the least
// that a row can sum to, 2^-K, is 2^40 times the least normal number.
template <typename C>
int64_t offset(double scale) {
  return std::max<int64_t>(0, int64_t(std::ceil(scale / kLn2)) - (sizeof(C) == 4 ? 100 : 900));
}

// Parts of a workspace, one after the other, each where a cache line begins if the first does. Without a workspace it
// counts alone.
template <typename C>
class Space {
 public:
  explicit Space(C* begin) : begin_(begin) {}

  C* take(int64_t count) {
    C* const part = begin_ ? begin_ + used_ : nullptr;
    used_ += (count + kLine - 1) / kLine * kLine;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kLine = 64 / sizeof(C);
  C* const begin_;
  int64_t used_ = 0;
};

template <typename C>
class CorrelationRun {
 public:
  CorrelationRun(
      int threads, int64_t n, int64_t m, int64_t emotions, int64_t width, int64_t first, double scale, bool distinct,
      bool within, Address visual, Address text, Address mask, Address text_mask)
      : threads_(threads), within_(within), scale_(scale), kernels_(kernels_for(C())) {
    const int64_t most = std::max<int64_t>(1, kColumns / emotions);
    lanes_ = up(std::min(m, most));
    rows_ = std::min(n, 2 * up(most));
    args_.rows = n, args_.columns = m, args_.first = first;
    args_.emotions = emotions, args_.width = width, args_.pairs = emotions * (emotions - 1) / 2;
    args_.visual = visual.of<const C>(), args_.text = text.of<const C>();
    args_.mask = mask.of<const bool>(), args_.text_mask = text_mask.of<const bool>();
    args_.distinct = distinct, args_.scale = C(scale / kLn2), args_.offset = offset<C>(scale);
    forward_numbers_ = place_forward(nullptr), backward_numbers_ = place_backward(nullptr);
  }

  // Numbers of workspace, and where in it, as numbers from its beginning, the products' operands lie.
  int64_t forward_numbers() const { return forward_numbers_; }
  int64_t backward_numbers() const { return backward_numbers_; }
  int64_t text_at() const { return text_at_; }                  // (E, lanes, D) of a tile; the visual's (n, E, D) at 0
  int64_t product_at() const { return product_at_; }            // (rows·E, E·lanes)
  int64_t grad_product_at() const { return grad_product_at_; }  // the same, in the backward's
  int64_t grad_text_at() const { return grad_text_at_; }        // (E, lanes, D) of a tile
  // A full tile's individuals: rows, and columns with their padding.
  int64_t rows() const { return rows_; }
  int64_t lanes() const { return lanes_; }

  // Centres the visual features, and begins sums of 2^(l - K): of rows, (n, Q), and columns, (m, Q).
  void begin(Address workspace, Address row_sum, Address column_sum) {
    place_forward(workspace.of<C>());
    std::fill_n(args_.positive, args_.rows * args_.pairs, C(0));
    args_.row_sum = row_sum.of<C>(), args_.column_sum = column_sum.of<C>();
    if (row_sum) std::fill_n(args_.row_sum, args_.rows * args_.pairs, C(0));
    if (column_sum) std::fill_n(args_.column_sum, args_.columns * args_.pairs, C(0));
    spread(args_.rows, [&](int64_t begin, int64_t end, int) { kernels_.centre(args_, begin, end); });
  }

  // Begins a tile at a column: its text features. Returns its lanes.
  int64_t begin_tile(int64_t column) {
    tile_.column = column;
    tile_.columns = std::min(lanes_, args_.columns - column);
    tile_.lanes = up(tile_.columns);
    spread(tile_.lanes, [&](int64_t begin, int64_t end, int) { kernels_.pack(args_, tile_, begin, end); });
    if (args_.row_grad_dot) {
      std::fill_n(column_grad_dot_, args_.pairs * tile_.lanes, C(0));
      if (!args_.grad_text) std::fill_n(tile_.grad_text, args_.emotions * tile_.lanes * args_.width, C(0));
    }
    return tile_.lanes;
  }

  // Adds the sums of the rows from `row` on, whose product is there.
  void forward(int64_t row) {
    begin_rows(row);
    spread(tile_.rows, [&](int64_t begin, int64_t end, int thread) {
      kernels_.forward(args_, tile_, partial(thread), begin, end);
    });
    add_partials([&](int64_t pair, int64_t lane, C sum) {
      if (lane < tile_.columns) args_.column_sum[(tile_.column + lane) * args_.pairs + pair] += sum;
    });
  }

  // The same within individuals, of their blocks (columns of the tile, E, E).
  void forward_within(Address blocks) {
    spread(tile_.columns, [&](int64_t begin, int64_t end, int) {
      kernels_.forward_within(args_, tile_, from_first(blocks), begin, end);
    });
  }

  // The mean over everybody's pairs. What is not valid gets a sum of 1, so that its reciprocal is finite.
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

  // Replaces sums of 2^(l - K) by natural logarithms of what they stand for, and writes the positive logits, (n, Q).
  void logarithms(Address positive) {
    const double shift = double(args_.offset) * kLn2;
    const auto replace = [&](C* sums, int64_t count) {
      for (int64_t k = 0; k < count; ++k) sums[k] = C(std::log(double(sums[k])) + shift);
    };
    replace(args_.row_sum, args_.rows * args_.pairs), replace(args_.column_sum, args_.columns * args_.pairs);
    for (int64_t k = 0; k < args_.rows * args_.pairs; ++k) positive.of<C>()[k] = args_.positive[k] * C(kLn2);
  }

  // Begins the gradients, of `weight` times the loss of each pair, in C; gradients that are not asked for have no
  // address. Of the sums of all logits of the rows, (n, Q), and of the columns, (m, Q), inside this rectangle or not:
  // as sums of 2^(l - K) or, `logarithmic`, as natural logarithms.
  void begin_backward(
      Address workspace, double weight, Address row_sum, Address column_sum, bool logarithmic, Address grad_visual,
      Address grad_text) {
    place_backward(workspace.of<C>());
    inverse(row_sum.of<const C>(), args_.rows * args_.pairs, logarithmic, args_.inv_row_sum);
    inverse(column_sum.of<const C>(), args_.columns * args_.pairs, logarithmic, args_.inv_column_sum);
    std::fill_n(args_.row_grad_dot, args_.rows * args_.pairs, C(0));
    args_.grad_per_logit = C(weight * kLn2 / 2);
    args_.grad_centred = grad_visual.of<C>(), args_.grad_text = grad_text.of<C>();
  }

  // Turns the product of the rows from `row` on into its gradient.
  void backward(int64_t row) {
    begin_rows(row);
    spread(tile_.rows, [&](int64_t begin, int64_t end, int thread) {
      kernels_.backward(args_, tile_, partial(thread), begin, end);
    });
    add_partials([&](int64_t pair, int64_t lane, C sum) { column_grad_dot_[pair * tile_.lanes + lane] += sum; });
  }

  void backward_within(Address blocks, Address grad_blocks) {
    spread(tile_.columns, [&](int64_t begin, int64_t end, int) {
      kernels_.backward_within(args_, tile_, from_first(blocks), from_first(grad_blocks), column_grad_dot_, begin, end);
    });
  }

  // Ends a tile: completes the gradient of its text features, and copies it to that of the text's.
  void finish_tile() {
    spread(tile_.columns, [&](int64_t begin, int64_t end, int) {
      kernels_.finish(args_, tile_, column_grad_dot_, begin, end);
    });
  }

  // Ends all: the gradient of the visual features, which hold that of the centred ones. Returns the gradient of scale.
  double finish() {
    spread(args_.rows, [&](int64_t begin, int64_t end, int) { kernels_.finish_visual(args_, begin, end); });
    double total = 0;
    for (int64_t k = 0; k < args_.rows * args_.pairs; ++k) total += double(args_.row_grad_dot[k]);
    return total / scale_;
  }

 private:
  int64_t place_forward(C* begin) {
    const int64_t n = args_.rows, E = args_.emotions, D = args_.width, Q = args_.pairs;
    Space<C> space(begin);
    args_.centred = space.take(n * E * D);
    text_at_ = space.used();
    tile_.text = space.take(E * lanes_ * D);
    product_at_ = space.used();
    tile_.product = space.take(within_ ? 0 : rows_ * E * E * lanes_);
    args_.inv_norm_visual = space.take(n * Q);
    args_.positive = space.take(n * Q);
    tile_.inv_norm_text = space.take(Q * lanes_);
    tile_.text_valid = space.take(Q * lanes_);
    partials_ = space.take(within_ ? 0 : threads_ * Q * lanes_);
    args_.valid = reinterpret_cast<bool*>(space.take((n * Q + int64_t(sizeof(C)) - 1) / int64_t(sizeof(C))));
    return space.used();
  }

  int64_t place_backward(C* begin) {
    const int64_t n = args_.rows, m = args_.columns, E = args_.emotions, Q = args_.pairs;
    Space<C> space(begin);
    grad_product_at_ = space.used();
    tile_.grad_product = space.take(within_ ? 0 : rows_ * E * E * lanes_);
    grad_text_at_ = space.used();
    tile_.grad_text = space.take(E * lanes_ * args_.width);
    tile_.inv_text_sum = space.take(Q * lanes_);
    column_grad_dot_ = space.take(Q * lanes_);
    args_.inv_row_sum = space.take(n * Q);
    args_.inv_column_sum = space.take(m * Q);
    args_.row_grad_dot = space.take(n * Q);
    return space.used();
  }

  void inverse(const C* sums, int64_t count, bool logarithmic, C* to) const {
    const double shift = double(args_.offset) * kLn2;
    for (int64_t k = 0; k < count; ++k) to[k] = logarithmic ? C(std::exp(shift - double(sums[k]))) : 1 / sums[k];
  }

  void begin_rows(int64_t row) {
    tile_.row = row, tile_.rows = std::min(rows_, args_.rows - row);
    std::fill_n(partials_, threads_ * args_.pairs * tile_.lanes, C(0));
  }

  C* partial(int thread) const { return partials_ + thread * args_.pairs * tile_.lanes; }

  // add(pair, lane, the threads' sum)
  template <typename F>
  void add_partials(const F& add) const {
    for (int64_t pair = 0; pair < args_.pairs; ++pair)
      for (int64_t lane = 0; lane < tile_.lanes; ++lane) {
        C sum = 0;
        for (int thread = 0; thread < threads_; ++thread) sum += partial(thread)[pair * tile_.lanes + lane];
        add(pair, lane, sum);
      }
  }

  template <typename F>
  void spread(int64_t count, const F& f) const {
    parallel(threads_, count, 1, f);
  }

  int64_t up(int64_t columns) const { return (columns + kernels_.width - 1) / kernels_.width * kernels_.width; }

  // Kernels index blocks by individual, the tile's tensor begins at its first.
  C* from_first(Address blocks) const { return blocks.of<C>() - tile_.column * args_.emotions * args_.emotions; }

  const int threads_;
  const bool within_;
  const double scale_;
  const CorrelationKernels<C>& kernels_;
  int64_t lanes_, rows_;
  Correlation<C> args_ = {};
  CorrelationTile<C> tile_ = {};
  C* partials_ = nullptr;         // (threads, Q, lanes)
  C* column_grad_dot_ = nullptr;  // (Q, lanes)
  int64_t text_at_ = 0, product_at_ = 0, grad_product_at_ = 0, grad_text_at_ = 0;
  int64_t forward_numbers_ = 0, backward_numbers_ = 0;
};

template <typename C>
void bind_run(pybind11::module_& m, const char* name) {
  namespace py = pybind11;
  using Run = CorrelationRun<C>;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<Run>(m, name)
      .def(
          py::init<
              int, int64_t, int64_t, int64_t, int64_t, int64_t, double, bool, bool, Address, Address, Address,
              Address>())
      .def_property_readonly("forward_numbers", &Run::forward_numbers)
      .def_property_readonly("backward_numbers", &Run::backward_numbers)
      .def_property_readonly("text_at", &Run::text_at)
      .def_property_readonly("product_at", &Run::product_at)
      .def_property_readonly("grad_product_at", &Run::grad_product_at)
      .def_property_readonly("grad_text_at", &Run::grad_text_at)
      .def_property_readonly("rows", &Run::rows)
      .def_property_readonly("lanes", &Run::lanes)
      .def("begin", &Run::begin, unlocked)
      .def("begin_tile", &Run::begin_tile, unlocked)
      .def("forward", &Run::forward, unlocked)
      .def("forward_within", &Run::forward_within, unlocked)
      .def("loss", &Run::loss, unlocked)
      .def("valid_pairs", &Run::valid_pairs)
      .def("logarithms", &Run::logarithms, unlocked)
      .def("begin_backward", &Run::begin_backward, unlocked)
      .def("backward", &Run::backward, unlocked)
      .def("backward_within", &Run::backward_within, unlocked)
      .def("finish_tile", &Run::finish_tile, unlocked)
      .def("finish", &Run::finish, unlocked);
}

[[maybe_unused]] const bool bound = bind([](pybind11::module_& m) {
  bind_run<float>(m, "CorrelationFloat32");
  bind_run<double>(m, "CorrelationFloat64");
});

}  // namespace
}  // namespace pcmecl::cpu
