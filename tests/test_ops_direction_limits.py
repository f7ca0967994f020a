"""direction_logits and direction_loss at their limits: hardly any change, and numbers that float32 hardly holds."""

import float64_twin as twin
import pytest
import torch
from operators import direction_inputs, seed
from tolerances import assert_close_for
from torch import Tensor
from torch.nn.functional import normalize as unit

from pcmecl_fast.ops import direction_logits, direction_loss

pytestmark = pytest.mark.usefixtures("each_backend")

FLOAT32 = 2.0**-23


# min_change


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("contrast", [0.0, 0.4])
@pytest.mark.parametrize("min_change", [0.05, 0.7, 3.0])
def test_a_min_change_follows_the_formula(min_change, contrast, normalize):
    *floats, individual, a, b = edits_of_size(torch.tensor([1e-7, 1e-3, 0.04, 0.3, 0.6, 0.9, 1.2]), people=2)
    rows = [index.tolist() for index in (individual, a, b)]
    exact = [x.detach().double().numpy() for x in floats]
    options = {"normalize": normalize, "min_change": min_change}
    expected = twin.direction_logits(*exact, *rows[:2], **options)
    logits = direction_logits(*floats, individual, a, **options)
    assert_close_for(torch.float32)(logits, torch.from_numpy(expected.value))

    options |= {"contrast": contrast, "scale": 9.0}
    expected = twin.direction_loss(*exact, *rows, reduction="mean", **options)
    loss = direction_loss(*floats, individual, a, b, **options)
    assert_close_for(torch.float32)(loss, torch.from_numpy(expected.value))
    loss.backward()
    for x, gradient in zip(floats, expected.gradients(torch.ones(()).numpy()), strict=False):
        assert_close_for(torch.float32)(x.grad, torch.from_numpy(gradient))


def test_with_a_min_change_the_gradient_is_calm_from_nothing_to_everything():
    sizes = torch.tensor([0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.2, 0.5, 1.0])
    source, edited, bank, individual, a, b = edits_of_size(sizes)
    direction_loss(source, edited, bank, individual, a, b, min_change=0.1, reduction="sum").backward()
    norms = edited.grad.norm(dim=1)
    at_min_change = norms[8]
    assert (norms >= at_min_change / 10).all()
    assert (norms <= at_min_change * 10).all()

    edited.grad = None
    direction_loss(source, edited, bank, individual, a, b, reduction="sum").backward()
    assert edited.grad.norm(dim=1).max() > 1000 * at_min_change  # which is why it is there


def test_with_a_min_change_an_edit_that_changes_nothing_is_told_where_to_go():
    source, _, bank, individual, a, b = edits_of_size(torch.zeros(5))
    edited = source.detach().clone().requires_grad_()
    losses = direction_loss(source, edited, bank, individual, a, b, min_change=0.1, reduction="none", normalize=False)
    assert losses.eq(1).all()
    losses.sum().backward()
    wanted = unit(bank[individual, b] - bank[individual, a], dim=1)
    assert_close_for(torch.float32)(edited.grad, -wanted / 0.1)


@pytest.mark.parametrize("wrong", [-0.1, float("nan")])
def test_a_wrong_min_change_is_named(wrong):
    with pytest.raises(ValueError, match="min_change: got "):
        direction_loss(*direction_inputs(5, 3, 4, 7), min_change=wrong)


# Rounding


@pytest.mark.parametrize("ratio", [1e-6, 1e-3, 1e3, 1e6])
def test_the_change_between_features_of_any_norms_keeps_its_bits(ratio):
    *floats, individual, a, _ = direction_inputs(9, 3, 5, 512)
    floats[1].data *= ratio
    exact = twin.direction_logits(
        *(x.detach().double().numpy() for x in floats), individual.tolist(), a.tolist(), normalize=True, min_change=0.0
    )
    logits = direction_logits(*floats, individual, a)
    # Some roundings of a sum of D products; factored out the wrong way it is ratio times that.
    torch.testing.assert_close(logits, torch.from_numpy(exact.value).float(), rtol=0, atol=16 * FLOAT32)


@pytest.mark.parametrize("factor", [2.0, 3.0, 1 / 7, 1000.0])
@pytest.mark.parametrize("width", [7, 512, 4096])
def test_a_feature_and_its_multiple_have_no_direction_between_them(width, factor):
    source, _, bank, individual, a, b = direction_inputs(16, 3, 5, width)
    edited = (source.detach() * factor).requires_grad_()
    loss = direction_loss(source, edited, bank, individual, a, b, contrast=0.5)
    loss.backward()
    for x in (source, edited, bank):
        assert x.grad.eq(0).all()


@pytest.mark.parametrize("scale", [1e4, 1e6])
def test_the_contrast_is_right_at_every_scale(scale):
    *floats, individual, a, b = direction_inputs(9, 3, 5, 65)
    options = {"scale": scale, "contrast": 1.0, "reduction": "none"}
    exact = [x.detach().double().numpy() for x in floats]
    rows = [index.tolist() for index in (individual, a, b)]
    expected = twin.direction_loss(*exact, *rows, normalize=True, min_change=0.0, **options)
    losses = direction_loss(*floats, individual, a, b, **options)
    assert (losses >= 0).all()
    torch.testing.assert_close(losses, torch.from_numpy(expected.value).float(), rtol=1e-5, atol=8 * FLOAT32 * scale)


@pytest.mark.parametrize("scale", [1e7, torch.tensor(1e7)])
def test_a_scale_at_which_no_digit_is_right_is_refused(scale):
    with pytest.raises(ValueError, match=r"scale: got 10000000.0; takes a number above 0 and at most 1e\+06"):
        direction_loss(*direction_inputs(5, 3, 4, 7), scale=scale, contrast=1.0)


# Numbers that are none, or hardly


@pytest.mark.parametrize("which", ["source", "edited", "both", "both, opposite"])
def test_a_number_near_the_largest_has_finite_gradients(which):
    source, edited, *rest = direction_inputs(4, 3, 5, 33)
    if which != "edited":
        source.data[1, 3] = 3e38
    if which != "source":
        edited.data[1, 3] = -3e38 if "opposite" in which else 3e38
    loss = direction_loss(source, edited, *rest, contrast=1.0)
    loss.backward()
    for x in (loss, source.grad, edited.grad, rest[0].grad):
        assert x.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("contrast", [0.0, 0.5])
@pytest.mark.parametrize("deterministic", [False, True])
def test_what_is_in_a_sample_that_asks_for_no_change_reaches_nothing(value, contrast, deterministic):
    source, edited, bank, _, a, b = direction_inputs(4, 1, 5, 33)
    individual = torch.zeros(4, dtype=torch.int64)
    b = (a + 1) % 5
    b[2] = a[2]
    source.data[2, 5] = edited.data[2, 6] = value
    scale = torch.tensor(7.0, requires_grad=True)
    torch.use_deterministic_algorithms(deterministic)
    try:
        loss = direction_loss(source, edited, bank, individual, a, b, contrast=contrast, scale=scale)
        loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for x in (loss, source.grad, edited.grad, bank.grad, scale.grad):
        assert x.isfinite().all()
    assert source.grad[2].eq(0).all()
    assert edited.grad[2].eq(0).all()


def test_features_of_nothing_are_refused():
    with pytest.raises(ValueError, match=r"source: got shape \(5, 0\); takes \(B, D\) with D ≥ 1"):
        direction_loss(*direction_inputs(5, 3, 4, 0))


def edits_of_size(sizes: Tensor, *, people: int = 3) -> list[Tensor]:
    """Inputs with |δ| = sizes, of unit features; every sample asks for a change."""
    batch, width = len(sizes), 64
    _, _, bank, individual, a, _ = direction_inputs(batch, people, 5, width)
    generator = seed(3)
    source, across = (torch.randn(batch, width, generator=generator, dtype=torch.float64) for _ in range(2))
    source = unit(source, dim=1)
    across = unit(across - (across * source).sum(dim=1, keepdim=True) * source, dim=1)
    angle = 2 * torch.asin(sizes.double()[:, None] / 2)
    edited = angle.cos() * source + angle.sin() * across
    leaves = [x.float().requires_grad_() for x in (source, edited)]
    return [*leaves, bank, individual, a, (a + 1) % 5]
