"""A backend adds any pair of functions on tensors, and the operator supplies everything else.

The pairs here are the reference and its own derivative, so that what is shown is the seam, not a kernel.
"""

import operators
import pytest
import torch
from tolerances import assert_close_for
from torch import Tensor

from pcmecl_fast.ops import PromptTree, operator
from pcmecl_fast.ops.correlation import CORRELATION_LOSS
from pcmecl_fast.ops.direction import DIRECTION_LOGITS, DIRECTION_LOSS
from pcmecl_fast.ops.frames import CLIP_FRAMES
from pcmecl_fast.ops.operator import BACKENDS, REFERENCE, Backend
from pcmecl_fast.ops.tree_attention import TREE_ATTENTION

SIZES = {
    "direction_logits": {"emotions": 4, "width": 6},
    "direction_loss": {"emotions": 4, "width": 6},
    "correlation_loss": {"emotions": 4, "width": 6},
    "tree_attention": {"width": 4},
    "clip_frames": {"height": 7, "width": 8, "size": 5},
}
each_operator = pytest.mark.parametrize("name", operators.OPERATORS)


@pytest.fixture(autouse=True)
def _twin_as_triton(monkeypatch):
    """A copy of the reference, under the name of a backend that is not tested here."""
    twin = Backend("triton", missing=lambda: None)
    for one in (DIRECTION_LOGITS, DIRECTION_LOSS, CORRELATION_LOSS, TREE_ATTENTION, CLIP_FRAMES):
        twin.add(one, forward_of(one), backward_of(one))
    monkeypatch.setitem(BACKENDS, "triton", twin)


def forward_of(one):
    def forward(*flat):
        assert not torch.is_autocast_enabled("cpu")
        assert all(x.is_contiguous() for x in flat if isinstance(x, Tensor))
        result = one.reference(*put_together(one, flat)).contiguous()
        return result, *(torch.zeros_like(x) for x in one._outputs(*flat)[1:])

    return forward


def backward_of(one):
    def backward(grad, *rest):
        *rest, needs = rest
        flat = list(rest[: len(one._forward._schema.arguments) - 1])
        inputs = [i for i, need in zip(one._gradients, needs, strict=True) if need]

        def value(*floats):
            for i, x in zip(inputs, floats, strict=True):
                flat[i] = x
            return one.reference(*put_together(one, flat))

        _, derivative = torch.func.vjp(value, *(flat[i] for i in inputs))
        gradients = iter(derivative(grad))
        return [next(gradients).contiguous() if need else None for need in needs]

    return backward


def put_together(one, flat):
    """The reference's arguments from the schema's."""
    values = iter(flat)
    for take_apart in one._composite:
        value = next(values)
        if take_apart is operator._split:
            number = next(values)
            value = number if value is None else value
        elif take_apart is not None:
            value = PromptTree(value, tuple(next(values)))
        yield value


def make(name):
    """A float64 call of the operator with some strided inputs."""
    call = operators.make(name, dtype=torch.float64, **SIZES[name])
    strided = [x.detach().mT.contiguous().mT if x.dim() > 1 else x.detach() for x in call.floats]
    return call, [x.requires_grad_() for x in strided]


def assert_same(out, ours, expected, theirs):
    """The results, and the gradients of the inputs that they were computed from."""
    assert_close_for(torch.float64)(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for x, x_expected in zip(ours, theirs, strict=True):
        assert_close_for(torch.float64)(x.grad, x_expected.grad)


def test_every_operator_has_its_row_in_the_tests_table():
    assert {name for name in REFERENCE.implementations if not name.startswith("_")} == set(operators.OPERATORS)


@each_operator
def test_it_returns_what_its_kernels_return(name):
    (call, ours), (_, theirs) = make(name), make(name)
    out, expected = call(*ours, backend="triton"), call(*theirs, backend="reference")
    assert_same(out, ours, expected, theirs)


@each_operator
def test_opcheck(name):
    call, _ = make(name)
    torch.library.opcheck(getattr(torch.ops.pcmecl_fast, name).default, (*call.schema_arguments, "triton"))


@each_operator
def test_gradcheck(name):
    call, floats = make(name)
    assert torch.autograd.gradcheck(lambda *floats: call(*floats, backend="triton"), floats, fast_mode=True)


@each_operator
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_into_one_graph(name, dynamic):
    (call, ours), (_, theirs) = make(name), make(name)
    torch._dynamo.reset()  # ten cases, and the limit for one function is eight
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    out, expected = compiled(*ours, *call.rest, backend="triton"), call(*theirs, backend="triton")
    assert_same(out, ours, expected, theirs)


@each_operator
def test_only_what_needs_a_gradient_is_computed(name):
    call, floats = make(name)
    for only in range(len(floats)):
        leaves = [x.detach().clone().requires_grad_(i == only) for i, x in enumerate(floats)]
        call(*leaves, backend="triton").sum().backward()
        assert [x.grad is not None for x in leaves] == [i == only for i in range(len(floats))]
    assert not call(*(x.detach() for x in floats), backend="triton").requires_grad


@each_operator
def test_kernels_run_outside_autocast(name):
    call, floats = make(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call(*floats, backend="triton").sum().backward()


@each_operator
def test_a_second_derivative_names_the_backend_that_has_one(name):
    call, floats = make(name)
    result = call(*floats, backend="triton").square().sum()
    gradient, *_ = torch.autograd.grad(result, floats, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{name}: .* no second derivative; use backend='reference'"):
        gradient.sum().backward()
