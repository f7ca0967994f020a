"""A backend adds any pair of functions on tensors, and the operator gives them all that an operator needs.

The pairs here are the reference and its own derivative, so that what is shown is the seam, not a kernel.
"""

import pytest
import torch
from tolerances import assert_close_for
from torch import Tensor

from pcmecl_fast.ops import (
    PromptTree,
    clip_frames,
    correlation_loss,
    direction_logits,
    direction_loss,
    reference,
    tree_attention,
)
from pcmecl_fast.ops.correlation import CORRELATION_LOSS
from pcmecl_fast.ops.direction import DIRECTION_LOGITS, DIRECTION_LOSS
from pcmecl_fast.ops.frames import CLIP_FRAMES
from pcmecl_fast.ops.operator import BACKENDS, Backend
from pcmecl_fast.ops.tree_attention import TREE_ATTENTION

TREE = PromptTree(3, (2, 1))
INDICES = torch.tensor([[0, 1, 2, 2, 0], [3, 1, 0, 2, 1], [3, 2, 1, 0, 3]])  # individual, source, target
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def loss_of_direction(source, edited, bank, individual, a, b, scale, number, contrast, normalize, reduction):
    value = reference.direction_loss(
        source,
        edited,
        bank,
        individual,
        a,
        b,
        scale=number if scale is None else scale,
        contrast=contrast,
        normalize=normalize,
        reduction=reduction,
    )
    return value, (a != b).sum().clamp(min=1).to(value.dtype)


def loss_of_correlation(visual, text, scale, number, mask, negatives):
    value = reference.correlation_loss(
        visual, text, scale=number if scale is None else scale, mask=mask, negatives=negatives
    )
    sums = visual.new_zeros(visual.shape[0], visual.shape[1] * (visual.shape[1] - 1) // 2)
    return value, sums, sums.clone()


def attention(qkv, prefix, lengths):
    out = reference.tree_attention(qkv, PromptTree(prefix, tuple(lengths)))
    return out, qkv.new_zeros(qkv.shape[0], qkv.shape[3], qkv.shape[1])


FORWARDS = {
    "direction_logits": lambda *x: (reference.direction_logits(*x[:5], normalize=x[5]),),
    "direction_loss": loss_of_direction,
    "correlation_loss": loss_of_correlation,
    "tree_attention": attention,
    "clip_frames": lambda *x: (reference.clip_frames(*x),),
}
DIFFERENTIABLE = {
    "direction_logits": [0, 1, 2],
    "direction_loss": [0, 1, 2, 6],
    "correlation_loss": [0, 1, 2],
    "tree_attention": [0],
    "clip_frames": [0],
}
ARGUMENTS = {"direction_logits": 6, "direction_loss": 11, "correlation_loss": 6, "tree_attention": 3, "clip_frames": 4}
operators = pytest.mark.parametrize("operator", FORWARDS)


@pytest.fixture(autouse=True)
def _twin_as_triton(monkeypatch):
    """The reference's twin, under the name of a backend that is not tested here."""
    twin = Backend("triton", missing=lambda: None)
    for operator in (DIRECTION_LOGITS, DIRECTION_LOSS, CORRELATION_LOSS, TREE_ATTENTION, CLIP_FRAMES):
        twin.add(operator, forward_of(operator.name), backward_of(operator.name))
    monkeypatch.setitem(BACKENDS, "triton", twin)


def forward_of(operator):
    def forward(*arguments):
        assert not torch.is_autocast_enabled("cpu")
        assert all(x.is_contiguous() for x in arguments if isinstance(x, Tensor))
        return [x.contiguous() for x in FORWARDS[operator](*arguments)]

    return forward


def backward_of(operator):
    def backward(grad, *rest):
        *rest, needs = rest
        arguments = list(rest[: ARGUMENTS[operator]])
        inputs = [i for i, need in zip(DIFFERENTIABLE[operator], needs, strict=True) if need]

        def value(*floats):
            for i, x in zip(inputs, floats, strict=True):
                arguments[i] = x
            return FORWARDS[operator](*arguments)[0]

        _, derivative = torch.func.vjp(value, *(arguments[i] for i in inputs))
        gradients = iter(derivative(grad))
        return [next(gradients).contiguous() if need else None for need in needs]

    return backward


@operators
def test_it_gives_what_its_kernels_give(operator):
    ours, theirs = make(operator), make(operator)
    out, expected = call(operator, ours, "triton"), call(operator, theirs, "reference")
    assert_close_for(torch.float64)(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for x, x_expected in zip(ours, theirs, strict=True):
        assert_close_for(torch.float64)(x.grad, x_expected.grad)


@operators
def test_opcheck(operator):
    torch.library.opcheck(getattr(torch.ops.pcmecl_fast, operator).default, schema_arguments(operator))


@operators
def test_gradcheck(operator):
    assert torch.autograd.gradcheck(lambda *floats: call(operator, floats, "triton"), make(operator), fast_mode=True)


@operators
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_into_one_graph(operator, dynamic):
    ours, theirs = make(operator), make(operator)
    torch._dynamo.reset()  # `call` is compiled for ten cases, and the limit for one function is eight
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    out, expected = compiled(operator, ours, "triton"), call(operator, theirs, "triton")
    assert_close_for(torch.float64)(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for x, x_expected in zip(ours, theirs, strict=True):
        assert_close_for(torch.float64)(x.grad, x_expected.grad)


@operators
def test_only_what_needs_a_gradient_is_computed(operator):
    for only in range(len(make(operator))):
        floats = [x.requires_grad_(i == only) for i, x in enumerate(x.detach() for x in make(operator))]
        call(operator, floats, "triton").sum().backward()
        assert [x.grad is not None for x in floats] == [i == only for i in range(len(floats))]
    assert not call(operator, [x.detach() for x in make(operator)], "triton").requires_grad


@operators
def test_kernels_run_outside_autocast(operator):
    floats = make(operator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call(operator, floats, "triton").sum().backward()


@operators
def test_a_second_derivative_says_who_has_one(operator):
    floats = make(operator)
    gradient, *_ = torch.autograd.grad(call(operator, floats, "triton").square().sum(), floats, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{operator}: .* no second derivative; take backend='reference'"):
        gradient.sum().backward()


def call(operator: str, floats: list[Tensor], backend: str) -> Tensor:
    return {
        "direction_logits": lambda: direction_logits(*floats, *INDICES[:2], backend=backend),
        "direction_loss": lambda: direction_loss(*floats[:3], *INDICES, scale=floats[3], contrast=0.5, backend=backend),
        "correlation_loss": lambda: correlation_loss(*floats[:2], scale=floats[2], backend=backend),
        "tree_attention": lambda: tree_attention(*floats, TREE, backend=backend),
        "clip_frames": lambda: clip_frames(*floats, 5, MEAN, STD, backend=backend),
    }[operator]()


def schema_arguments(operator: str) -> tuple:
    floats = make(operator)
    rest = {
        "direction_logits": (*INDICES[:2], True),
        "direction_loss": (*INDICES, *floats[3:], 0.0, 0.5, True, "mean"),
        "correlation_loss": (*floats[2:], 0.0, None, "all"),
        "tree_attention": (TREE.prefix, TREE.segment_lengths),
        "clip_frames": (5, MEAN, STD),
    }[operator]
    return *[x for x in floats if x.dim()], *rest, "triton"


def make(operator: str) -> list[Tensor]:
    """The operator's float inputs, some of them strided, that require gradients."""
    shapes = {
        "direction_logits": [(5, 6), (5, 6), (3, 4, 6)],
        "direction_loss": [(5, 6), (5, 6), (3, 4, 6), ()],
        "correlation_loss": [(3, 4, 6), (3, 4, 6), ()],
        "tree_attention": [(2, TREE.length, 3, 2, 4)],
        "clip_frames": [(2, 3, 7, 8)],
    }[operator]
    generator = torch.Generator().manual_seed(0)
    floats = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    floats = [x.abs() if x.dim() == 0 else x for x in floats]
    return [(x.mT.contiguous().mT if x.dim() > 1 else x).requires_grad_() for x in floats]
