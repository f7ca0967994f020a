"""A call that nobody observes goes past the dispatcher: with the same results, and seen by whoever wants to see it."""

import operators
import pytest
import torch
from modes import Seen
from operators import make, value_and_gradients
from tolerances import assert_close_for
from torch.utils.checkpoint import checkpoint

from pcmecl_fast.ops import checks, correlation_loss
from pcmecl_fast.ops.correlation import CORRELATION_LOSS
from pcmecl_fast.ops.direction import DIRECTION_LOGITS, DIRECTION_LOSS
from pcmecl_fast.ops.frames import CLIP_FRAMES
from pcmecl_fast.ops.operator import BACKENDS
from pcmecl_fast.ops.tree_attention import TREE_ATTENTION

OPERATORS = (DIRECTION_LOGITS, DIRECTION_LOSS, CORRELATION_LOSS, TREE_ATTENTION, CLIP_FRAMES)

pytestmark = pytest.mark.usefixtures("each_backend")
each_operator = pytest.mark.parametrize("operator", operators.OPERATORS)


@pytest.fixture
def kernels(each_backend):
    if each_backend == "reference":
        pytest.skip("the reference is plain PyTorch")
    return each_backend


def skip_without_kernels(operator, backend):
    if (operator, backend) == ("tree_attention", "cpu"):
        pytest.skip("PyTorch's own attention, on a CPU")


@each_operator
def test_it_gives_what_the_dispatcher_gives(operator):
    call = make(operator)
    with Seen():
        expected, expected_gradients = value_and_gradients(call, call.floats)
    out, gradients = value_and_gradients(call, call.floats)
    assert torch.equal(out, expected)
    assert all(torch.equal(x, y) for x, y in zip(gradients, expected_gradients, strict=True))


@each_operator
def test_a_dispatch_mode_sees_both_ways(operator, kernels):
    skip_without_kernels(operator, kernels)
    call = make(operator)
    with Seen() as forward:
        out = call()
    with Seen() as backward:
        out.sum().backward()
    assert f"pcmecl_fast::{operator}" in forward.names
    with Seen() as whole:
        call().sum().backward()
    assert f"pcmecl_fast::{operator}_backward" in whole.names + backward.names


@each_operator
def test_a_profile_names_it(operator, kernels):
    skip_without_kernels(operator, kernels)
    with torch.autograd.profiler.profile() as profile:
        make(operator)()
    assert f"pcmecl_fast::{operator}" in {event.name for event in profile.function_events}


@each_operator
def test_a_transform_of_functions_sees_it(operator):
    call = make(operator)
    floats = [x.detach() for x in call.floats]
    two = torch.stack([floats[0], floats[0].flip(0)])
    out = torch.func.vmap(lambda x: call(x, *floats[1:]))(two)
    expected = torch.stack([call(x, *floats[1:]) for x in two])
    assert_close_for(torch.float32)(out, expected)


@each_operator
def test_a_forward_derivative_is_refused(operator, kernels):
    skip_without_kernels(operator, kernels)
    call = make(operator)
    first = call.floats[0].detach()
    with torch.autograd.forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        call(torch.autograd.forward_ad.make_dual(first, torch.ones_like(first)), *call.floats[1:])


@each_operator
def test_a_second_derivative_names_the_backend_that_has_one(operator, kernels):
    skip_without_kernels(operator, kernels)
    call = make(operator)
    first, *_ = torch.autograd.grad(call().square().sum(), call.floats, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{operator}: .* no second derivative; use backend='reference'"):
        first.sum().backward()


@each_operator
def test_only_what_needs_a_gradient_gets_one(operator):
    call = make(operator)
    for only in range(len(call.floats)):
        leaves = [x.detach().clone().requires_grad_(i == only) for i, x in enumerate(call.floats)]
        call(*leaves).sum().backward()
        assert [x.grad is not None for x in leaves] == [i == only for i in range(len(leaves))]
    with torch.no_grad():
        assert not call().requires_grad
    with torch.inference_mode():
        assert call(*(x.detach() for x in call.floats)).is_inference()


@each_operator
def test_a_part_of_the_gradients_can_be_asked_for(operator):
    call = make(operator)
    whole = torch.autograd.grad(call().sum(), call.floats)
    for x, gradient in zip(call.floats, whole, strict=True):
        assert torch.equal(torch.autograd.grad(call().sum(), x)[0], gradient)


@each_operator
def test_strided_inputs_and_gradients_are_taken(operator):
    call = make(operator)
    out, gradients = value_and_gradients(call, call.floats)
    leaves = [x.detach().clone().requires_grad_() for x in call.floats]
    strided = [x.mT.contiguous().mT if x.dim() > 1 else x for x in leaves]
    again = call(*strided)
    assert_close_for(torch.float32)(again, out)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape).half().to(out.dtype)
    again.backward(weights.mT.contiguous().mT if weights.dim() > 1 else weights)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert_close_for(torch.float32)(leaf.grad, gradient)


@each_operator
def test_a_result_that_is_not_used_needs_no_backward(operator):
    call = make(operator)
    leaf = torch.zeros((), requires_grad=True)
    torch.autograd.backward([leaf * 2, call().sum() * 0])
    assert leaf.grad == 2


def test_what_changed_before_the_backward_is_noticed(kernels):
    call = make("correlation_loss")
    loss = call()
    with torch.no_grad():
        call.floats[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_is_freed_by_its_backward(kernels):
    loss = make("direction_loss")()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_saved_tensors_pass_through_hooks(kernels):
    packed = []

    def pack(x):
        packed.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        make("correlation_loss")().backward()
    assert (3, 7, 33) in packed


def test_checkpointing_runs_it_again():
    call = make("correlation_loss")
    out, gradients = value_and_gradients(call, call.floats)
    again, gradients_again = value_and_gradients(
        lambda *floats, backend: checkpoint(call, *floats, use_reentrant=False), call.floats
    )
    assert torch.equal(out, again)
    assert all(torch.equal(x, y) for x, y in zip(gradients, gradients_again, strict=True))


def test_autocast_is_off_inside_both_ways(kernels):
    call = make("correlation_loss")
    loss, gradients = value_and_gradients(call, call.floats)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, gradients_again = value_and_gradients(call, call.floats)
    assert torch.equal(loss, again)
    assert all(torch.equal(x, y) for x, y in zip(gradients, gradients_again, strict=True))


def test_a_parameter_and_a_scale_that_is_a_number(kernels):
    call = make("correlation_loss")
    visual = torch.nn.Parameter(call.floats[0].detach())
    correlation_loss(visual, call.floats[1], scale=6.0).backward()
    call().backward()
    assert torch.equal(visual.grad, call.floats[0].grad)


@each_operator
def test_a_bare_call_with_tensors_on_two_devices_is_refused(operator, kernels):
    skip_without_kernels(operator, kernels)
    first, *rest = make(operator).schema_arguments
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run .*: got a tensor on cpu"):
        getattr(torch.ops.pcmecl_fast, operator)(first, *rest, "triton")
    if any(isinstance(x, torch.Tensor) for x in rest):
        # What PyTorch calls for a second GPU: for the meta device it would call the fake kernel.
        run = next(one for one in OPERATORS if one.name == operator)._run_forward
        elsewhere = [x.detach().to("meta") if isinstance(x, torch.Tensor) else x for x in rest]
        with pytest.raises(RuntimeError, match="got tensors on cpu and on meta; takes tensors on one device"):
            run(first, *elsewhere, kernels)


@pytest.mark.parametrize("operator", ["direction_logits", "direction_loss"])
def test_the_kernels_look_at_their_indices_themselves(operator, monkeypatch):
    for name, device in (("cpu", "cpu"), ("cuda", "cuda"), ("triton", "cuda")):
        implementation = BACKENDS[name].implementations.get(operator)
        assert implementation is None or implementation.checks_values_on == (device,)
    if BACKENDS["cpu"].missing() is not None:
        pytest.skip("needs the compiled extension")
    call = make(operator)
    call.rest[1][2] = -1
    with pytest.raises(IndexError) as in_python:
        call(backend="reference")
    monkeypatch.setattr(checks, "check_index_range", None)
    with pytest.raises(IndexError) as in_kernel:
        call(backend="cpu")
    assert str(in_kernel.value) == str(in_python.value)
