"""A call like an earlier one is neither checked nor chosen again, and yet refused for what is wrong in its values; a
loss's gradients are made with it, and are right for every gradient of the loss."""

import logging

import operators
import pytest
import torch
from modes import Seen
from operators import make
from tolerances import assert_close_for

from pcmecl_fast.ops import clip_frames, direction_logits, direction_loss, explain, use_backend
from pcmecl_fast.ops.direction import DIRECTION_LOGITS
from pcmecl_fast.ops.operator import BACKENDS, Backend
from pcmecl_fast.ops.signature import Remembered, signature

each_operator = pytest.mark.parametrize("operator", operators.OPERATORS)
needs_kernels = pytest.mark.skipif(BACKENDS["cpu"].missing() is not None, reason="needs the extension")


@pytest.fixture
def counted(monkeypatch):
    """How often direction_logits' arguments were checked, from nothing remembered."""
    checks = []
    check = DIRECTION_LOGITS._check
    monkeypatch.setattr(DIRECTION_LOGITS, "_choices", Remembered())
    monkeypatch.setattr(DIRECTION_LOGITS, "_check", lambda *given: checks.append(given) or check(*given))
    return checks


@pytest.fixture
def arguments():
    call = make("direction_logits")
    return [*(x.detach() for x in call.floats), *call.rest]


def test_the_same_shapes_are_checked_once(counted, arguments):
    for _ in range(3):
        direction_logits(*[x.clone() for x in arguments])
    assert len(counted) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda x: [y[:2] if y.shape[0] == 5 else y for y in x],
        lambda x: [y.double() if y.is_floating_point() else y for y in x],
        lambda x: [x[0].mT.contiguous().mT, *x[1:]],
        lambda x: [*x[:3], x[3].int(), x[4]],
    ],
    ids=["sizes", "dtype", "strides", "an index that is converted"],
)
def test_others_are_checked_anew(counted, arguments, change):
    direction_logits(*arguments)
    direction_logits(*change(arguments))
    assert len(counted) == 2


@pytest.mark.parametrize("options", [{"normalize": False}, {"min_change": 0.1}, {"backend": "reference"}])
def test_so_are_other_options(counted, arguments, options):
    direction_logits(*arguments)
    direction_logits(*arguments, **options)
    assert len(counted) == 2


@each_operator
def test_after_a_good_call_a_bad_one_is_refused_as_before(operator):
    call = make(operator)
    call()
    with pytest.raises((TypeError, ValueError)):
        call(call.floats[0].long(), *call.floats[1:])
    with pytest.raises((TypeError, ValueError)):
        call(call.floats[0][..., None], *call.floats[1:])


def test_flags_are_not_taken_for_numbers(arguments):
    direction_logits(*arguments, normalize=True)
    with pytest.raises(TypeError, match="normalize: got int"):
        direction_logits(*arguments, normalize=1)


def test_nor_are_flags_inside_a_tuple():
    frames = torch.zeros(1, 3, 8, 8)
    clip_frames(frames, 8, mean=(0.0,) * 3, std=(1.0,) * 3)
    with pytest.raises(TypeError, match="mean"):
        clip_frames(frames, 8, mean=(False,) * 3, std=(True,) * 3)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels)])
def test_a_tensor_whose_sign_is_still_to_be_applied_is_read_with_it(backend):
    call = make("direction_loss")
    source, *others = (x.detach() for x in call.floats)
    lazily = torch._neg_view(source)
    torch.testing.assert_close(call(lazily, *others, backend=backend), call(-source, *others, backend=backend))


@each_operator
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels)])
def test_gradients_in_batches_are_those_of_one_at_a_time(operator, backend):
    call = make(operator, **({"reduction": "none"} if operator == "direction_loss" else {}))
    out = call(backend=backend)
    weights = torch.randn(2, *out.shape, generator=torch.Generator().manual_seed(0))
    batched = torch.autograd.grad(out, call.floats[0], weights, retain_graph=True, is_grads_batched=True)[0]
    for weight, found in zip(weights, batched, strict=True):
        expected = torch.autograd.grad(out, call.floats[0], weight, retain_graph=True)[0]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels)])
def test_values_are_looked_at_in_every_call(arguments, backend):
    direction_logits(*arguments, backend=backend)
    arguments[3][2] = 99
    with pytest.raises(IndexError, match="individual: got 99 at position 2"):
        direction_logits(*arguments, backend=backend)


def test_a_tensor_that_stands_for_a_number_is_looked_at_in_every_call():
    call = make("direction_loss")
    call(*call.floats)
    with pytest.raises(ValueError, match="scale: got -1"):
        call(*call.floats[:3], torch.tensor(-1.0))


@needs_kernels
def test_the_backend_is_the_one_that_is_asked_for_now(arguments, monkeypatch):
    def runs_on():
        seen = []
        for name in ("cpu", "reference"):
            implementation = BACKENDS[name].implementations["direction_logits"]
            told = implementation._replace(
                forward=lambda *x, name=name, run=implementation.forward: seen.append(name) or run(*x)
            )
            monkeypatch.setitem(BACKENDS[name].implementations, "direction_logits", told)
        return seen

    seen = runs_on()
    for _ in range(2):
        direction_logits(*arguments)
        with use_backend("reference"):
            direction_logits(*arguments)
        with monkeypatch.context() as patch:
            patch.setenv("PCMECL_BACKEND", "reference")
            direction_logits(*arguments)
    assert seen == ["cpu", "reference", "reference"] * 2


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels)])
def test_an_implementation_that_was_replaced_is_not_used(arguments, backend, monkeypatch):
    before = direction_logits(*arguments, backend=backend)
    implementation = BACKENDS[backend].implementations["direction_logits"]
    other = implementation._replace(forward=lambda *x: implementation.forward(*x) + 1)
    monkeypatch.setitem(BACKENDS[backend].implementations, "direction_logits", other)
    torch.testing.assert_close(direction_logits(*arguments, backend=backend), before + 1)


@needs_kernels
def test_a_backend_that_is_gone_is_not_used(arguments, monkeypatch, caplog):
    direction_logits(*arguments)
    monkeypatch.setitem(BACKENDS, "cpu", Backend("cpu", missing=lambda: "it is not here"))
    with caplog.at_level(logging.INFO):
        direction_logits(*arguments)
    assert str(explain(direction_logits, *arguments)).startswith("direction_logits runs on reference")
    with pytest.raises(RuntimeError, match="it is not here"):
        direction_logits(*arguments, backend="cpu")


def test_what_is_remembered_has_a_bound():
    kept = Remembered()
    for number in range(5000):
        kept.keep(signature("auto", [torch.zeros(2), float(number)]), number)
    assert len(kept._found) <= 1024
    assert kept.get(signature("auto", [torch.zeros(2), 4999.0])) == 4999
    assert signature("auto", [torch.tensor(1.0)]) is None, "its value is not in it"
    assert signature("auto", [torch.zeros(2), [1.0]]) is None
    unhashable = signature("auto", [torch.zeros(2), ([1.0],)])
    kept.keep(unhashable, 1)
    assert kept.get(unhashable) is None


# ---- Gradients with the loss -----------------------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch):
    """The calls that made a loss with its gradients."""
    implementation = BACKENDS["cpu"].implementations["direction_loss"]
    if implementation.with_gradients is None:
        pytest.skip("needs the extension")
    made = []

    def run(*arguments):
        both = implementation.with_gradients(*arguments)
        made.append(both is not None)
        return both

    told = implementation._replace(with_gradients=run)
    monkeypatch.setitem(BACKENDS["cpu"].implementations, "direction_loss", told)
    return made


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight", [1.0, 0.0, -3.7, 65536.0])
def test_gradients_are_the_references_for_every_gradient_of_the_loss(at_once, reduction, dtype, weight):
    call = make("direction_loss", dtype=dtype, reduction=reduction, contrast=0.5)
    found = torch.autograd.grad(call() * weight, call.floats)
    assert at_once == [True]
    expected = torch.autograd.grad(call(backend="reference") * weight, call.floats)
    scale = max(abs(weight), 1.0)
    for x, y in zip(found, expected, strict=True):
        assert_close_for(dtype)(x / scale, y / scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_gradient_of_a_half_scale_is_rounded_once(dtype):
    call = make("direction_loss", contrast=1e-7)
    *features, _ = (x.detach() for x in call.floats)
    scales = [torch.tensor(6.0, dtype=dtype, requires_grad=True) for _ in range(2)]
    for scale, backend in zip(scales, ("cpu", "reference"), strict=True):
        (65536 * call(*features, scale, backend=backend)).backward()
    assert scales[1].grad.abs() > 0
    torch.testing.assert_close(scales[0].grad, scales[1].grad, rtol=0.02, atol=0)


def test_a_graph_that_is_kept_gives_the_same_again(at_once):
    call = make("direction_loss")
    loss = call()
    first = torch.autograd.grad(loss, call.floats, retain_graph=True)
    for x in first:
        x.zero_()  # they are the caller's own
    again = torch.autograd.grad(loss * 2, call.floats, retain_graph=True)
    for x, y in zip(again, torch.autograd.grad(loss, call.floats), strict=True):
        torch.testing.assert_close(x, 2 * y)
        assert x.abs().max() > 0


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"dtype": torch.bfloat16}])
def test_several_losses_and_half_gradients_take_two_passes(at_once, options):
    call = make("direction_loss", **options)
    call().sum().backward()
    assert at_once == [False]


def test_without_a_gradient_the_loss_is_made_alone(at_once):
    call = make("direction_loss")
    with torch.no_grad():
        alone = call()
    call(*(x.detach() for x in call.floats))
    assert at_once == []
    torch.testing.assert_close(call(), alone)


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_samples_that_request_no_change_and_empty_batches(at_once, batch):
    call = make("direction_loss", batch=batch)
    individual, shown, _ = call.rest
    loss = direction_loss(*call.floats[:3], individual, shown, shown)
    gradients = torch.autograd.grad(loss, call.floats[:3])
    assert loss == 0
    assert not any(x.any() for x in gradients)
    loss = call()
    expected = torch.autograd.grad(call(backend="reference"), call.floats)
    for x, y in zip(torch.autograd.grad(loss, call.floats), expected, strict=True):
        assert_close_for(torch.float32)(x, y)


def test_an_observer_of_the_backward_sees_it(at_once):
    call = make("direction_loss")
    loss = call()
    with Seen() as seen:
        seen_gradients = torch.autograd.grad(loss, call.floats, retain_graph=True)
    assert "pcmecl_fast::direction_loss_backward" in seen.names
    for x, y in zip(seen_gradients, torch.autograd.grad(loss, call.floats), strict=True):
        torch.testing.assert_close(x, y)
