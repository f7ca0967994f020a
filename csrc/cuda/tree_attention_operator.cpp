// tree_attention on tensors.
#include "operators.h"

namespace pcmecl::cuda {
namespace {

TreeLayout layout_of(int64_t prefix, const std::vector<int64_t>& lengths) {
  TORCH_CHECK_VALUE(
      int64_t(lengths.size()) <= TreeLayout::kSegments, "segment_lengths: got ", lengths.size(),
      " segments; the cuda backend supports at most ", TreeLayout::kSegments);
  TreeLayout layout = {};
  layout.prefix = int(prefix), layout.segments = int(lengths.size());
  int64_t end = prefix;
  for (size_t segment = 0; segment < lengths.size(); ++segment) {
    end += lengths[segment];
    layout.end[segment] = uint16_t(end);
  }
  TORCH_CHECK_VALUE(end <= 0xFFFF, "qkv: got ", end, " tokens; the cuda backend supports at most 65535");
  layout.tokens = int(end);
  return layout;
}

template <typename T>
Tree<T> open(const Tensor& qkv, const Tensor& out, const Tensor& lse) {
  return {qkv.size(0), int(qkv.size(3)), int(qkv.size(4)), pointer<T>(qkv), pointer<T>(out), pointer<float>(lse)};
}

}  // namespace

std::tuple<Tensor, Tensor> tree_attention(
    const Tensor& qkv, int64_t prefix, const std::vector<int64_t>& segment_lengths) {
  const c10::DeviceGuard guard(qkv.device());
  const int64_t N = qkv.size(0), S = qkv.size(1), H = qkv.size(3), d = qkv.size(4);
  Tensor out = at::empty({N, S, H, d}, qkv.options()), lse = at::empty({N, H, S}, in_float(qkv));
  for_dtype(
      qkv, [&](auto zero) { tree_forward(open<decltype(zero)>(qkv, out, lse), layout_of(prefix, segment_lengths)); });
  return {out, lse};
}

Gradients tree_attention_backward(
    const Tensor& grad, const Tensor& qkv, int64_t prefix, const std::vector<int64_t>& segment_lengths,
    const Tensor& out, const Tensor& lse, const Needs&) {
  const c10::DeviceGuard guard(qkv.device());
  Tensor of_qkv = at::empty_like(qkv);
  for_dtype(qkv, [&](auto zero) {
    using T = decltype(zero);
    Tree<T> args = open<T>(qkv, out, lse);
    args.grad = pointer<T>(grad), args.grad_qkv = pointer<T>(of_qkv);
    tree_backward(args, layout_of(prefix, segment_lengths));
  });
  return {of_qkv};
}

PCMECL_BIND(tree_attention, 0)

}  // namespace pcmecl::cuda
