// tree_attention for Python.
#include <pybind11/stl.h>

#include "operators.h"

namespace pcmecl::cuda {
namespace {

TreeLayout layout_of(int64_t prefix, const std::vector<int64_t>& lengths) {
  if (lengths.size() > TreeLayout::kSegments)
    throw pybind11::value_error(
        "segment_lengths: got " + std::to_string(lengths.size()) + " segments; the cuda backend supports at most " +
        std::to_string(TreeLayout::kSegments));
  TreeLayout layout = {};
  layout.prefix = int(prefix), layout.segments = int(lengths.size());
  int64_t end = prefix;
  for (size_t segment = 0; segment < lengths.size(); ++segment) {
    end += lengths[segment];
    layout.end[segment] = uint16_t(end);
  }
  if (end > 0xFFFF)
    throw pybind11::value_error("qkv: got " + std::to_string(end) + " tokens; the cuda backend supports at most 65535");
  layout.tokens = int(end);
  return layout;
}

}  // namespace

void tree_attention(
    int device, Address stream, int dtype, int64_t people, int heads, int width, int64_t prefix,
    const std::vector<int64_t>& segment_lengths, Address qkv, Address out, Address lse) {
  const On on(device, stream.value);
  const TreeLayout layout = layout_of(prefix, segment_lengths);
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    tree_forward(
        Tree<T>{people, heads, width, qkv.of<T>(), out.of<T>(), lse.of<float>(), nullptr, nullptr, nullptr}, layout);
  });
}

void tree_attention_backward(
    int device, Address stream, int dtype, int64_t people, int heads, int width, int64_t prefix,
    const std::vector<int64_t>& segment_lengths, Address qkv, Address out, Address lse, Address grad, Address grad_qkv,
    Address means) {
  const On on(device, stream.value);
  const TreeLayout layout = layout_of(prefix, segment_lengths);
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    tree_backward(
        Tree<T>{
            people, heads, width, qkv.of<T>(), out.of<T>(), lse.of<float>(), grad.of<T>(), grad_qkv.of<T>(),
            means.of<float>()},
        layout);
  });
}

PCMECL_BIND(tree_attention)
PCMECL_BIND(tree_attention_backward)

}  // namespace pcmecl::cuda
