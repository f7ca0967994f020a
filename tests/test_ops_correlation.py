"""correlation_loss against loops that spell the formula out one pair of directions at a time."""

import math

import pytest
import torch
from operators import correlation_inputs, seed
from tolerances import DTYPES, assert_close_for
from torch import Tensor

from pcmecl_fast.ops import correlation_loss

pytestmark = pytest.mark.usefixtures("each_backend")

EPS = 1e-8
NEGATIVES = ["all", "within", "distinct"]
SIZES = [(1, 2, 3), (1, 7, 33), (3, 5, 17), (7, 3, 127)]  # N, E, D


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_its_gradients_follow_the_formula(dtype, size, missing, negatives):
    visual, text, mask = correlation_inputs(*size, dtype=dtype)
    mask = mask if missing else None
    scale = torch.tensor(20.0, requires_grad=True)
    loss = correlation_loss(visual, text, scale=scale, mask=mask, negatives=negatives)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    exact = [x.detach().double().requires_grad_() for x in (visual, text, scale)]
    expected = oracle(*exact, mask, negatives)
    assert_close_for(loss.dtype)(loss, expected)

    loss.backward()
    expected.backward()
    for x, x_exact, x_dtype in zip((visual, text, scale), exact, (dtype, dtype, torch.float32), strict=True):
        assert_close_for(x_dtype)(x.grad, x_exact.grad)


def test_the_default_is_all_negatives_everyone_present_and_clips_scale():
    visual, text, _ = correlation_inputs(3, 4, 17, dtype=torch.float64)
    everyone = torch.ones(3, 4, dtype=torch.bool)
    expected = correlation_loss(visual, text, scale=100.0, mask=everyone, negatives="all")
    assert torch.equal(correlation_loss(visual, text), expected)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_an_offset_of_one_individuals_features_changes_nothing(negatives):
    visual, text, mask = correlation_inputs(3, 5, 17, dtype=torch.float64)
    expected = correlation_loss(visual, text, mask=mask, negatives=negatives)
    offset = 1e3 * torch.randn(3, 1, 17, generator=seed(3), dtype=torch.float64)
    assert_close_for(torch.float32)(correlation_loss(visual + offset, text, mask=mask, negatives=negatives), expected)


def test_features_that_are_mostly_offset_keep_their_low_bits():
    # Real image features of one face differ in the third digit; float32 must match float64.
    visual, text, _ = correlation_inputs(4, 7, 64, dtype=torch.float64)
    offset = torch.nn.functional.normalize(torch.randn(4, 1, 64, generator=seed(4), dtype=torch.float64), dim=-1)
    visual = (offset + 1e-2 * visual.detach()).float()
    text = (offset + 1e-2 * text.detach()).float()
    expected = correlation_loss(visual.double(), text.double())
    assert_close_for(torch.float32)(correlation_loss(visual, text), expected)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_matching_changes_cost_next_to_nothing_and_opposite_ones_the_most(negatives):
    _, text, _ = correlation_inputs(2, 5, 64, dtype=torch.float64)
    assert correlation_loss(text * 3, text, negatives=negatives) < 1e-3
    assert correlation_loss(-text, text, negatives=negatives) > 100


def test_within_is_the_mean_of_the_individuals_own_losses_weighed_by_their_directions():
    visual, text, mask = correlation_inputs(4, 5, 17, dtype=torch.float64)
    whole = correlation_loss(visual, text, mask=mask, negatives="within")
    directions = mask.sum(dim=1) * (mask.sum(dim=1) - 1)
    alone = [correlation_loss(visual[n : n + 1], text[n : n + 1], mask=mask[n : n + 1]) for n in range(4)]
    assert_close_for(torch.float64)(whole, (torch.stack(alone) * directions).sum() / directions.sum())


def test_for_one_individual_the_three_kinds_of_negatives_agree():
    visual, text, _ = correlation_inputs(1, 5, 17, dtype=torch.float64)
    assert len({correlation_loss(visual, text, negatives=negatives).item() for negatives in NEGATIVES}) == 1


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_a_missing_emotion_is_equivalent_to_leaving_it_out(negatives):
    visual, text, _ = correlation_inputs(3, 5, 17, dtype=torch.float64)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[:, 1] = False
    kept = [0, 2, 3, 4]
    whole = correlation_loss(visual, text, mask=mask, negatives=negatives)
    assert_close_for(torch.float64)(whole, correlation_loss(visual[:, kept], text[:, kept], negatives=negatives))


def test_features_of_nothing_are_refused():
    nothing = torch.empty(2, 3, 0)
    with pytest.raises(ValueError, match=r"visual: got shape \(2, 3, 0\); takes \(N, E, D\) with D ≥ 1"):
        correlation_loss(nothing, nothing)


def test_a_scale_beyond_every_backends_is_refused():
    with pytest.raises(ValueError, match=r"scale: got 10000000.0; takes a number above 0"):
        correlation_loss(*correlation_inputs(2, 3, 5)[:2], scale=torch.tensor(1e7))


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_a_missing_emotions_features_are_not_read(garbage, negatives):
    visual, text, mask = correlation_inputs(3, 5, 17, dtype=torch.float32)
    expected = correlation_loss(visual, text, mask=mask, negatives=negatives)
    visual.data[~mask], text.data[~mask] = garbage, garbage
    loss = correlation_loss(visual, text, mask=mask, negatives=negatives)
    assert torch.equal(loss, expected)
    loss.backward()
    for x in (visual, text):
        assert x.grad.isfinite().all()
        assert x.grad[~mask].eq(0).all()


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_an_individual_with_one_emotion_or_none_adds_nothing(negatives):
    visual, text, _ = correlation_inputs(4, 3, 17, dtype=torch.float64)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1], mask[2] = False, torch.tensor([False, True, False])
    loss = correlation_loss(visual, text, mask=mask, negatives=negatives)
    others = [0, 3]
    assert_close_for(torch.float64)(loss, correlation_loss(visual[others], text[others], negatives=negatives))
    loss.backward()
    assert visual.grad[1:3].eq(0).all()
    assert text.grad[1:3].eq(0).all()


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize(
    ("size", "present"),
    [((0, 5, 17), True), ((3, 0, 17), True), ((3, 1, 17), True), ((3, 5, 17), False)],
    ids=["no individual", "no emotion", "one emotion", "nobody present"],
)
def test_without_two_directions_the_loss_is_zero_with_a_graph(size, present, negatives):
    visual, text, _ = correlation_inputs(*size, dtype=torch.float32)
    scale = torch.tensor(10.0, requires_grad=True)
    mask = torch.full(size[:2], present)
    loss = correlation_loss(visual, text, scale=scale, mask=mask, negatives=negatives)
    assert loss.shape == ()
    assert loss == 0
    loss.backward()
    for x in (visual, text, scale):
        assert x.grad.eq(0).all()


def test_people_with_one_emotion_each_make_no_direction():
    visual, text, _ = correlation_inputs(3, 4, 17, dtype=torch.float32)
    mask = torch.eye(4, dtype=torch.bool)[:3]
    loss = correlation_loss(visual, text, mask=mask)
    loss.backward()
    assert loss == 0
    assert visual.grad.eq(0).all()


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("side", ["visual", "text"])
def test_identical_emotions_are_finite_with_no_gradient_through_their_norm(side, negatives):
    visual, text, _ = correlation_inputs(2, 4, 17, dtype=torch.float32)
    same = visual if side == "visual" else text
    same.data[0, 2] = same.data[0, 1]
    loss = correlation_loss(visual, text, negatives=negatives)
    loss.backward()
    assert loss.isfinite()
    assert_close_for(torch.float32)(loss, oracle(visual, text, torch.tensor(100.0), None, negatives))
    for x in (visual, text):
        assert x.grad.isfinite().all()
        assert x.grad.abs().max() < 1e4  # 1e8 and more if 1/ε gets through


def test_features_without_any_change_cost_as_much_as_guessing_and_have_no_gradient():
    visual, text, _ = correlation_inputs(2, 3, 17, dtype=torch.float32)
    still = visual.detach()[:, :1].repeat(1, 3, 1).requires_grad_()
    loss = correlation_loss(still, text)
    assert_close_for(torch.float32)(loss, torch.tensor(math.log(2 * 3 * 2)))
    loss.backward()
    assert still.grad.eq(0).all()
    assert text.grad.eq(0).all()


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("missing", [False, True])
def test_gradcheck(missing, negatives):
    visual, text, mask = correlation_inputs(3, 4, 6, dtype=torch.float64)
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)

    def loss(visual, text, scale):
        return correlation_loss(visual, text, scale=scale, mask=mask if missing else None, negatives=negatives)

    assert torch.autograd.gradcheck(loss, (visual, text, scale))


def test_nan_features_are_not_hidden():
    visual, text, _ = correlation_inputs(2, 3, 5, dtype=torch.float32)
    visual.data[1, 2, 0] = torch.nan
    assert correlation_loss(visual, text).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_nothing(dtype):
    visual, text, mask = correlation_inputs(3, 5, 65, dtype=dtype)
    plain = correlation_loss(visual, text, mask=mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(correlation_loss(visual, text, mask=mask), plain)


def test_strided_inputs_are_supported():
    visual, text, mask = correlation_inputs(3, 5, 8, dtype=torch.float32)
    strided = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in (visual, text))
    loss = correlation_loss(*strided, mask=mask.mT.contiguous().mT)
    assert_close_for(torch.float32)(loss, correlation_loss(visual, text, mask=mask))


def test_compiles_into_one_graph():
    visual, text, mask = correlation_inputs(3, 5, 17, dtype=torch.float32)
    compiled = torch.compile(correlation_loss, fullgraph=True, backend="aot_eager")
    loss = compiled(visual, text, mask=mask, negatives="distinct")
    assert_close_for(torch.float32)(loss, correlation_loss(visual, text, mask=mask, negatives="distinct"))
    loss.backward()
    assert visual.grad.isfinite().all()


# Each row: the wrong arguments, the exception, and its message.
WRONG = [
    ({"visual": None}, TypeError, "visual: got NoneType; takes a tensor"),
    ({"visual": torch.zeros(3, 4, 5).long()}, TypeError, "visual: got torch.int64; takes float16, bfloat16"),
    ({"visual": torch.zeros(3, 4)}, ValueError, r"visual: got shape \(3, 4\); takes \(N, E, D\)"),
    ({"text": torch.zeros(3, 6, 5)}, ValueError, r"text: got shape \(3, 6, 5\); .* with E = 4, as in visual"),
    ({"text": torch.zeros(3, 4, 5).double()}, TypeError, "text: got torch.float64; takes torch.float32, as visual"),
    ({"text": torch.zeros(3, 4, 5, device="meta")}, ValueError, "text: got a tensor on meta; takes cpu, as visual"),
    ({"mask": torch.ones(3, 4)}, TypeError, "mask: got torch.float32; takes torch.bool"),
    ({"mask": torch.ones(4, 3).bool()}, ValueError, r"mask: got shape \(4, 3\); takes \(N, E\) with N = 3, as in vis"),
    ({"mask": torch.ones(3, 4, device="meta").bool()}, ValueError, "mask: got a tensor on meta; takes cpu, as visual"),
    ({"scale": -1.0}, ValueError, "scale: got -1.0; takes a number above 0"),
    ({"scale": torch.ones(1)}, ValueError, r"scale: got shape \(1,\); takes a number or a tensor of shape \(\)"),
    ({"scale": torch.tensor(1.0, device="meta")}, ValueError, "scale: got a tensor on meta; takes cpu, as visual"),
    ({"negatives": "some"}, ValueError, "negatives: got 'some'; takes one of all, within, distinct"),
    ({"backend": "tpu"}, ValueError, "backend: got 'tpu'; takes one of reference, cpu, triton, cuda, xformers, auto"),
]


@pytest.mark.parametrize(("wrong", "error", "says"), WRONG, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_a_wrong_argument_is_named(wrong, error, says):
    visual, text, mask = correlation_inputs(3, 4, 5, dtype=torch.float32)
    with pytest.raises(error, match=says):
        correlation_loss(**{"visual": visual, "text": text, "mask": mask} | wrong)


def oracle(visual, text, scale, mask, negatives) -> Tensor:
    people, emotions, _ = visual.shape
    directions = [
        (i, a, b)
        for i in range(people)
        for a in range(emotions)
        for b in range(emotions)
        if a != b and (mask is None or (mask[i, a] and mask[i, b]))
    ]
    kept = {
        "all": lambda i, ab, j, cd: True,
        "within": lambda i, ab, j, cd: i == j,
        "distinct": lambda i, ab, j, cd: i == j or ab != cd,
    }[negatives]
    visual_changes = [change(visual[i, a], visual[i, b]) for i, a, b in directions]
    text_changes = [change(text[i, a], text[i, b]) for i, a, b in directions]
    total = 0 * (visual.sum() + text.sum() + scale)
    for row, (i, *ab) in enumerate(directions):
        columns = [k for k, (j, *cd) in enumerate(directions) if kept(i, ab, j, cd)]
        from_visual = torch.stack([scale * (visual_changes[row] * text_changes[k]).sum() for k in columns])
        from_text = torch.stack([scale * (text_changes[row] * visual_changes[k]).sum() for k in columns])
        for logits in (from_visual, from_text):
            total = total - torch.log_softmax(logits, dim=0)[columns.index(row)]
    return total / (2 * max(len(directions), 1))


def change(before: Tensor, after: Tensor) -> Tensor:
    difference = after - before
    return difference / difference.norm() if difference.norm() > EPS else 0 * difference
