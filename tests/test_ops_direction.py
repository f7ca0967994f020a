"""direction_logits and direction_loss against loops that spell the formulas out one sample at a time."""

import pytest
import torch
from operators import direction_inputs, seed
from tolerances import DTYPES, assert_close_for
from torch import Tensor

from pcmecl_fast.ops import direction_logits, direction_loss

pytestmark = pytest.mark.usefixtures("each_backend")

EPS = 1e-8
SIZES = [(1, 1, 2, 3), (5, 3, 7, 33), (13, 4, 8, 127), (31, 2, 3, 512)]  # B, N, E, D


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_and_their_gradients_follow_the_formula(dtype, size, normalize):
    source, edited, bank, individual, a, _ = direction_inputs(*size, dtype=dtype)
    logits = direction_logits(source, edited, bank, individual, a, normalize=normalize)
    assert logits.dtype == dtype

    exact = doubles(source, edited, bank)
    expected = torch.stack(oracle_cosines(*exact, individual, a, normalize))
    assert_close_for(dtype)(logits, expected)

    weights = torch.randn(logits.shape, generator=seed(1), dtype=torch.float64).to(dtype)
    (logits * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    assert_same_gradients(dtype, (source, edited, bank), exact)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("contrast", [0.0, 0.3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_its_gradients_follow_the_formula(dtype, size, contrast, reduction):
    inputs = direction_inputs(*size, dtype=dtype)
    scale = torch.tensor(30.0, requires_grad=True)
    loss = direction_loss(*inputs, scale=scale, contrast=contrast, reduction=reduction)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    *exact, exact_scale = doubles(*inputs[:3], scale)
    expected = oracle_loss(*exact, *inputs[3:], scale=exact_scale, contrast=contrast, reduction=reduction)
    assert_close_for(loss.dtype)(loss, expected)

    weights = torch.randn(loss.shape, generator=seed(1), dtype=loss.dtype)
    (loss * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    assert_same_gradients(dtype, inputs[:3], exact)
    assert_close_for(torch.float32)(scale.grad, exact_scale.grad if exact_scale.grad is not None else torch.tensor(0.0))


def test_the_bank_gets_gradients_from_individuals_with_many_samples_one_and_none():
    inputs = direction_inputs(300, 5, 4, 33, dtype=torch.float64)
    individual = inputs[3]
    individual %= 3
    individual[150] = 3
    exact = doubles(*inputs[:3])
    oracle_loss(*exact, *inputs[3:], scale=30.0, contrast=0.3, reduction="mean").backward()
    direction_loss(*inputs, scale=30.0, contrast=0.3).backward()
    assert_same_gradients(torch.float64, inputs[:3], exact)
    assert not inputs[2].grad[4].any()


def test_logits_are_cosines_with_zero_at_the_source_emotion():
    source, edited, bank, individual, a, _ = direction_inputs(64, 5, 7, 16, dtype=torch.float32)
    logits = direction_logits(source, edited, bank, individual, a)
    assert (logits.abs() <= 1 + 1e-6).all()
    assert (logits[torch.arange(64), a] == 0).all()


def test_moving_exactly_along_the_requested_change_costs_nothing():
    _, _, bank, individual, a, b = direction_inputs(9, 3, 5, 32, dtype=torch.float64)
    source = torch.randn(9, 32, generator=seed(2), dtype=torch.float64)
    edited = source + 0.7 * (bank[individual, b] - bank[individual, a])
    loss = direction_loss(source, edited, bank, individual, a, b, normalize=False, reduction="none")
    assert_close_for(torch.float64)(loss, torch.zeros(9))


def test_normalize_makes_the_features_lengths_irrelevant():
    source, edited, *rest = direction_inputs(6, 3, 5, 32, dtype=torch.float64)
    loss = direction_loss(source, edited, *rest)
    assert_close_for(torch.float64)(direction_loss(source * 7, edited * 0.1, *rest), loss)


def test_a_number_and_a_tensor_give_the_same_scale():
    inputs = direction_inputs(6, 3, 5, 32, dtype=torch.float32)
    number = direction_loss(*inputs, scale=12.5, contrast=1.0)
    for dtype in DTYPES:
        assert torch.equal(direction_loss(*inputs, scale=torch.tensor(12.5, dtype=dtype), contrast=1.0), number)


def test_an_edit_that_changes_nothing_is_finite_with_gradient_zero():
    source, _, bank, individual, a, b = direction_inputs(6, 3, 5, 32, dtype=torch.float32)
    b = (a + 1) % 5
    edited = source.detach().clone().requires_grad_()
    scale = torch.tensor(50.0, requires_grad=True)
    loss = direction_loss(source, edited, bank, individual, a, b, contrast=1.0, scale=scale, reduction="none")
    assert_close_for(torch.float32)(loss, torch.full((6,), 1 + torch.tensor(4.0).log().item()))  # c = 0 everywhere
    loss.sum().backward()
    for x in (source, edited, bank, scale):
        assert x.grad.eq(0).all()


def test_an_edit_that_changes_nothing_may_lie_otherwise_in_memory():
    source, _, bank, individual, a, _ = direction_inputs(64, 3, 5, 33, dtype=torch.float32)
    edited = source.detach().t().contiguous().t()
    assert direction_logits(source, edited, bank, individual, a).eq(0).all()


def test_a_change_counts_once_it_is_longer_than_epsilon():
    source, _, bank, individual, a, _ = direction_inputs(2, 3, 5, 32, dtype=torch.float64)
    b, source = (a + 1) % 5, source * 0  # starting at zero, so that such a small change is not rounded away
    change = torch.nn.functional.normalize((bank[individual, b] - bank[individual, a]).detach(), dim=1)
    edited = (change * torch.tensor([[0.9e-8], [1.1e-8]])).requires_grad_()
    loss = direction_loss(source, edited, bank, individual, a, b, normalize=False, reduction="none")
    assert_close_for(torch.float64)(loss, torch.tensor([1.0, 0.0]))
    loss.sum().backward()
    assert edited.grad[0].eq(0).all()
    assert edited.grad.isfinite().all()


@pytest.mark.parametrize("zero", ["source", "edited", "both"])
def test_zero_features_are_finite(zero):
    source, edited, *rest = direction_inputs(4, 3, 5, 32, dtype=torch.float32)
    for x, name in ((source, "source"), (edited, "edited")):
        if zero in (name, "both"):
            x.data[1] = 0
    loss = direction_loss(source, edited, *rest, contrast=1.0)
    loss.backward()
    assert loss.isfinite()
    assert_all_finite(source.grad, edited.grad, rest[0].grad)
    if zero in ("source", "both"):
        assert source.grad[1].eq(0).all()
    if zero in ("edited", "both"):
        assert edited.grad[1].eq(0).all()


def test_two_emotions_with_the_same_text_have_no_direction():
    source, edited, bank, *_ = direction_inputs(2, 1, 4, 16, dtype=torch.float32)
    bank.data[0, 2] = bank.data[0, 1]
    individual, a, b = torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([2, 2])
    logits = direction_logits(source, edited, bank, individual, a)
    assert logits[:, 2].eq(0).all()
    loss = direction_loss(source, edited, bank, individual, a, b)
    assert loss == 1
    loss.backward()
    for x in (source, edited, bank):
        assert x.grad.eq(0).all()


def test_requesting_no_change_adds_nothing_and_is_excluded_from_the_mean():
    source, edited, bank, individual, a, b = direction_inputs(8, 3, 5, 32, dtype=torch.float64)
    same, other = torch.tensor([1, 4, 5]), torch.tensor([0, 2, 3, 6, 7])
    b[same] = a[same]
    b[other] = (a[other] + 2) % 5
    kwargs = {"contrast": 0.5, "scale": 20.0}
    assert direction_loss(source, edited, bank, individual, a, b, **kwargs, reduction="none")[same].eq(0).all()
    mean = direction_loss(source, edited, bank, individual, a, b, **kwargs)
    alone = (x[other] for x in (individual, a, b))
    assert_close_for(torch.float64)(mean, direction_loss(source[other], edited[other], bank, *alone, **kwargs))
    mean.backward()
    assert source.grad[same].eq(0).all()
    assert edited.grad[same].eq(0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", ["empty batch", "no valid sample", "one emotion", "empty batch and bank"])
def test_without_a_valid_sample_the_loss_is_zero_with_a_graph(case, reduction):
    batch, people, emotions = {
        "empty batch": (0, 3, 5),
        "no valid sample": (4, 3, 5),
        "one emotion": (4, 3, 1),
        "empty batch and bank": (0, 0, 5),
    }[case]
    source, edited, bank, individual, a, _ = direction_inputs(batch, people, emotions, 16, dtype=torch.float32)
    scale = torch.tensor(10.0, requires_grad=True)
    loss = direction_loss(source, edited, bank, individual, a, a, scale=scale, contrast=1.0, reduction=reduction)
    assert loss.shape == ((batch,) if reduction == "none" else ())
    assert loss.eq(0).all()
    loss.sum().backward()
    for x in (source, edited, bank, scale):
        assert x.grad.eq(0).all()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("contrast", [0.0, 0.3])
def test_gradcheck(contrast, normalize):
    source, edited, bank, individual, a, b = direction_inputs(5, 3, 4, 7, dtype=torch.float64)
    b[0] = a[0]
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)

    def loss(source, edited, bank, scale):
        return direction_loss(
            source, edited, bank, individual, a, b, scale=scale, contrast=contrast, normalize=normalize
        )

    def logits(source, edited, bank):
        return direction_logits(source, edited, bank, individual, a, normalize=normalize)

    assert torch.autograd.gradcheck(loss, (source, edited, bank, scale))
    assert torch.autograd.gradcheck(logits, (source, edited, bank))


def test_gradcheck_beside_a_sample_without_change():
    # The cosine jumps at δ = 0: a numerical derivative there measures the jump. So row 2, whose δ is 0, is spliced in
    # as a constant, and only everything else is differentiated; a test above shows that its own gradient is 0.
    source, edited, bank, individual, a, _ = direction_inputs(5, 3, 4, 7, dtype=torch.float64)
    b = (a + 1) % 4
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    still = source.detach()[2:3]

    def loss(source, edited, bank, scale):
        source = torch.cat([source[:2], still, source[3:]])
        edited = torch.cat([edited[:2], still, edited[3:]])
        return direction_loss(source, edited, bank, individual, a, b, scale=scale, contrast=0.5)

    assert torch.autograd.gradcheck(loss, (source, edited, bank, scale))


def test_only_what_requires_a_gradient_gets_one():
    source, edited, bank, *rest = direction_inputs(5, 3, 4, 7, dtype=torch.float32)
    direction_loss(source.detach(), edited, bank.detach(), *rest).backward()
    assert edited.grad is not None
    assert not direction_loss(source.detach(), edited.detach(), bank.detach(), *rest).requires_grad


def test_nan_features_are_not_hidden():
    source, edited, bank, individual, a, _ = direction_inputs(3, 2, 4, 7, dtype=torch.float32)
    edited.data[1, 2] = torch.nan
    loss = direction_loss(source, edited, bank, individual, a, (a + 1) % 4, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_nothing(dtype):
    *inputs, individual, a, b = direction_inputs(5, 3, 4, 65, dtype=dtype)
    plain = direction_loss(*inputs, individual, a, b, contrast=0.5)
    plain_logits = direction_logits(*inputs, individual, a)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(direction_loss(*inputs, individual, a, b, contrast=0.5), plain)
        assert torch.equal(direction_logits(*inputs, individual, a), plain_logits)


def test_under_autocast_dtypes_may_differ_and_the_widest_wins():
    source, edited, bank, individual, a, b = direction_inputs(5, 3, 4, 65, dtype=torch.float32)
    half = edited.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = direction_loss(source, half, bank, individual, a, b)
    assert torch.equal(loss, direction_loss(source, half.float(), bank, individual, a, b))
    loss.backward()
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_indexes(dtype):
    *inputs, individual, a, b = direction_inputs(5, 3, 4, 7, dtype=torch.float32)
    expected = direction_loss(*inputs, individual, a, b)
    assert torch.equal(direction_loss(*inputs, individual.to(dtype), a.to(dtype), b.to(dtype)), expected)


def test_strided_inputs_are_supported():
    source, edited, bank, *rest = direction_inputs(5, 3, 4, 8, dtype=torch.float32)
    expected = direction_loss(source, edited, bank, *rest)
    strided = (x.mT.contiguous().mT for x in (source, edited, bank))
    assert_close_for(torch.float32)(direction_loss(*strided, *rest), expected)


def test_compiles_into_one_graph():
    *inputs, individual, a, b = direction_inputs(5, 3, 4, 7, dtype=torch.float32)
    compiled = torch.compile(direction_loss, fullgraph=True, backend="aot_eager")
    loss = compiled(*inputs, individual, a, b, contrast=0.5)
    assert_close_for(torch.float32)(loss, direction_loss(*inputs, individual, a, b, contrast=0.5))
    loss.backward()
    assert_all_finite(*(x.grad for x in inputs))
    # The reference asserts, as it does on a GPU; the others' kernels look themselves.
    with pytest.raises((RuntimeError, IndexError), match=r"target_emotion: .*; takes 0 to 3"):
        compiled(*inputs, individual, a, b + 4, contrast=0.5)


# Each row: the wrong arguments, the exception, and its message.
WRONG = [
    ({"source": [1.0]}, TypeError, "source: got list; takes a tensor"),
    ({"source": torch.zeros(5, 7, dtype=torch.int64)}, TypeError, "source: got torch.int64; takes float16, bfloat16"),
    ({"source": torch.zeros(5, 7, 1)}, ValueError, r"source: got shape \(5, 7, 1\); takes \(B, D\)"),
    ({"edited": torch.zeros(4, 7)}, ValueError, r"edited: got shape \(4, 7\); takes \(B, D\) with B = 5, as in source"),
    ({"edited": torch.zeros(5, 8)}, ValueError, r"edited: got shape \(5, 8\); .* with D = 7, as in source"),
    ({"edited": torch.zeros(5, 7).half()}, TypeError, "edited: got torch.float16; takes torch.float32, as source"),
    ({"edited": torch.zeros(5, 7, device="meta")}, ValueError, "edited: got a tensor on meta; takes cpu, as source"),
    ({"bank": torch.zeros(4, 7)}, ValueError, r"bank: got shape \(4, 7\); takes \(N, E, D\)"),
    ({"bank": torch.zeros(3, 4, 9)}, ValueError, r"bank: .* with D = 7, as in source"),
    ({"bank": torch.zeros(3, 4, 7).double()}, TypeError, "bank: got torch.float64; takes torch.float32, as source"),
    ({"bank": torch.zeros(3, 4, 7, device="meta")}, ValueError, "bank: got a tensor on meta; takes cpu, as source"),
    ({"individual": 1}, TypeError, "individual: got int; takes a tensor"),
    ({"individual": torch.zeros(5)}, TypeError, "individual: got torch.float32; takes an integer dtype"),
    ({"individual": torch.zeros(5).bool()}, TypeError, "individual: got torch.bool; takes an integer dtype"),
    (
        {"individual": torch.zeros(4).long()},
        ValueError,
        r"individual: got shape \(4,\); takes \(B,\) with B = 5, as in s",
    ),
    ({"individual": torch.zeros(5, 1).long()}, ValueError, r"individual: got shape \(5, 1\); takes \(B,\)"),
    ({"individual": torch.zeros(5, device="meta").long()}, ValueError, "individual: got a tensor on meta; takes cpu"),
    (
        {"individual": torch.tensor([0, 1, 3, 1, 9])},
        IndexError,
        r"individual: got 3 at position 2; takes 0 to 2 \(individuals in bank\)",
    ),
    (
        {"source_emotion": torch.tensor([0, -1, 1, 1, 1])},
        IndexError,
        r"source_emotion: got -1 at position 1; takes 0 to 3 \(emotions in bank\)",
    ),
    ({"target_emotion": torch.full((5,), 4)}, IndexError, "target_emotion: got 4 at position 0; takes 0 to 3"),
    ({"scale": "100"}, TypeError, "scale: got str; takes a number"),
    ({"scale": True}, TypeError, "scale: got bool; takes a number"),
    ({"scale": 0}, ValueError, "scale: got 0; takes a number above 0"),
    ({"scale": float("nan")}, ValueError, "scale: got nan; takes a finite number"),
    ({"scale": torch.ones(1)}, ValueError, r"scale: got shape \(1,\); takes a number or a tensor of shape \(\)"),
    ({"scale": torch.tensor(1)}, TypeError, "scale: got torch.int64; takes float16"),
    ({"scale": torch.tensor(1.0, device="meta")}, ValueError, "scale: got a tensor on meta; takes cpu, as source"),
    ({"contrast": -1}, ValueError, "contrast: got -1; takes a number of at least 0"),
    ({"contrast": None}, TypeError, "contrast: got NoneType; takes a number"),
    ({"normalize": 1}, TypeError, "normalize: got int; takes True or False"),
    ({"reduction": "max"}, ValueError, "reduction: got 'max'; takes one of mean, sum, none"),
    ({"backend": "tpu"}, ValueError, "backend: got 'tpu'; takes one of reference, cpu, triton, cuda, xformers, auto"),
]


@pytest.mark.parametrize(("wrong", "error", "says"), WRONG, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_a_wrong_argument_is_named(wrong, error, says):
    names = ("source", "edited", "bank", "individual", "source_emotion", "target_emotion")
    arguments = dict(zip(names, direction_inputs(5, 3, 4, 7, dtype=torch.float32), strict=True)) | wrong
    with pytest.raises(error, match=says):
        direction_loss(**arguments)
    if not wrong.keys() & {"target_emotion", "scale", "contrast", "reduction"}:
        del arguments["target_emotion"]
        with pytest.raises(error, match=says):
            direction_logits(**arguments)


def oracle_loss(source, edited, bank, individual, a, b, *, scale, contrast, reduction) -> Tensor:
    cosines = oracle_cosines(source, edited, bank, individual, a, normalize=True)
    losses, valid = [], 0
    for k, c in enumerate(cosines):
        if a[k] == b[k]:
            losses.append(c.sum() * 0)
            continue
        valid += 1
        loss = 1 - c[b[k]]
        if contrast:
            others = sum((scale * c[e]).exp() for e in range(bank.shape[1]) if e != a[k])
            loss = loss + contrast * -((scale * c[b[k]]).exp() / others).log()
        losses.append(loss)
    losses = torch.stack(losses)
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / max(valid, 1)}[reduction]


def oracle_cosines(source, edited, bank, individual, a, normalize) -> list[Tensor]:
    rows = []
    for k in range(len(source)):
        v, v_edited, t = source[k], edited[k], bank[individual[k]]
        if normalize:
            v, v_edited = v / v.norm(), v_edited / v_edited.norm()
        delta = v_edited - v
        row = []
        for e in range(len(t)):
            d = t[e] - t[a[k]]
            dot = (delta * d).sum()
            row.append(dot / (delta.norm() * d.norm()) if min(delta.norm(), d.norm()) > EPS else 0 * dot)
        rows.append(torch.stack(row))
    return rows


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


def assert_same_gradients(dtype: torch.dtype, tensors, exact) -> None:
    for x, x_exact in zip(tensors, exact, strict=True):
        assert_close_for(dtype)(x.grad, torch.zeros_like(x_exact) if x_exact.grad is None else x_exact.grad)


def assert_all_finite(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.isfinite().all()
