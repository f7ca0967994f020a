"""The Triton kernels on rectangles of correlation_loss's logits, which `rectangles.py` specifies.

On a CUDA device if there is one, else in the interpreter, for which `test_kernels_interpreted.py` starts a process.
"""

from dataclasses import replace

import pytest
import torch
from rectangles import People, check_block, in_float64, people, put_together
from test_kernels import (  # noqa: F401 - fixtures: what the interpreter needs to be like a GPU, and quick
    DEVICE,
    DTYPES,
    _float32_is_multiplied_as_on_tensor_cores,
    _one_configuration_is_compiled,
    by_warps_of_emotions,
    whole_tiles,
)
from tolerances import assert_close_for

from pcmecl_fast.kernels.correlation import correlation_rectangle_gradients as gradients
from pcmecl_fast.kernels.correlation import correlation_rectangle_sums as sums
from pcmecl_fast.ops import correlation_loss

pytestmark = pytest.mark.usefixtures("whole_tiles")
COUNT = 7
# Rows and columns, of seven people.
RECTANGLES = {
    "first 0": (range(0, 5), range(0, 7)),
    "first 3": (range(5, 7), range(2, 7)),
    "first 4": (range(4, 7), range(0, 7)),
    "first -2": (range(1, 5), range(3, 7)),
    "one row": (range(6, 7), range(2, 7)),
    "one column": (range(2, 7), range(3, 4)),
    "own columns before": (range(0, 2), range(4, 7)),
    "own columns behind": (range(5, 7), range(0, 3)),
    "no rows": (range(3, 3), range(0, 4)),
    "no columns": (range(0, 4), range(2, 2)),
}
SIZES = [(2, 3), (3, 17), (7, 5)]  # E, D
# Rows and columns that are cut at other people than the other.
ROW_PARTS = [range(0, 2), range(2, 7)]
COLUMN_PARTS = [range(0, 4), range(4, 4), range(4, 7)]


@pytest.mark.parametrize(("rows", "columns"), RECTANGLES.values(), ids=RECTANGLES)
def test_a_rectangle(rows, columns):
    check_block(sums, gradients, everybody((4, 33), negatives="distinct"), rows, columns)


@pytest.mark.parametrize("negatives", ["all", "within", "distinct"])
@pytest.mark.parametrize("size", SIZES, ids="E, D = {}".format)
def test_any_number_of_emotions(size, negatives):
    rows, columns = (range(2, 6), range(2, 6)) if negatives == "within" else RECTANGLES["first -2"]
    check_block(sums, gradients, everybody(size, negatives=negatives), rows, columns)


def test_twelve_emotions():
    check_block(sums, gradients, everybody((12, 5), negatives="distinct"), range(2, 4), range(1, 6))


@pytest.mark.usefixtures("by_warps_of_emotions")
@pytest.mark.parametrize("block", ["first 3", "first -2", "own columns behind"])
def test_the_kernels_of_many_emotions(block):
    check_block(sums, gradients, everybody((4, 9), negatives="distinct"), *RECTANGLES[block])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("negatives", ["all", "within"])
def test_half_inputs_give_float32(dtype, negatives):
    rows, columns = (range(2, 6), range(2, 6)) if negatives == "within" else RECTANGLES["first 4"]
    check_block(sums, gradients, everybody((5, 33), negatives=negatives, dtype=dtype), rows, columns)


@pytest.mark.parametrize("emotions", [0, 1])
def test_without_a_change_there_is_nothing(emotions):
    check_block(sums, gradients, everybody((emotions, 5), missing=False), *RECTANGLES["first 3"])


@pytest.mark.parametrize("which", ["rows", "columns"])
def test_a_mask_of_one_side_alone(which):
    rows, columns = RECTANGLES["first -2"]
    block = list(everybody((5, 33)).block(rows, columns))
    block[0 if which == "columns" else 1].nan_to_num_(0.1)
    of_all = block.copy()
    of_all[4 if which == "columns" else 5] = torch.ones_like(block[4 if which == "columns" else 5])
    block[4 if which == "columns" else 5] = None
    for x, expected in zip(sums(*block), sums(*of_all), strict=True):
        assert torch.equal(x, expected)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_needed(needs):
    batch = everybody((5, 33))
    rows, columns = RECTANGLES["first 3"]
    block, lse = batch.block(rows, columns), [x.float() for x in batch.totals(rows, columns)]
    weight = torch.tensor(0.01, device=DEVICE)
    every = gradients(weight, *block, *lse, (True, True, True))
    for need, gradient, expected in zip(needs, gradients(weight, *block, *lse, needs), every, strict=True):
        assert torch.equal(gradient, expected) if need else gradient is None


@pytest.mark.parametrize("negatives", ["all", "within", "distinct"])
def test_rectangles_together_are_the_loss(negatives):
    batch = everybody((5, 33), negatives=negatives)
    column_parts = ROW_PARTS if negatives == "within" else COLUMN_PARTS
    assert_the_loss(batch, *put_together(sums, gradients, batch, ROW_PARTS, column_parts))


def test_half_inputs_without_a_mask_and_with_a_number_for_the_scale():
    batch = replace(everybody((3, 17), missing=False, dtype=torch.float16), scale=30.0)
    assert_the_loss(batch, *put_together(sums, gradients, batch, ROW_PARTS, COLUMN_PARTS))


def test_at_a_scale_of_120_no_row_is_lost():
    """Of the same change in others "distinct" keeps e^−l alone, which underflows: nothing beside the row's own e^l."""
    features = torch.eye(11, device=DEVICE).expand(4, 11, 11).clone()
    features[3, :2] = features[3, :2].flip(0)  # whose change is the opposite one
    mask = (torch.arange(11, device=DEVICE) < 2).expand(4, 11).contiguous()
    batch = People(features, features, 120.0, mask, "distinct")
    halves = [range(0, 2), range(2, 4)]
    assert sums(*batch.block(halves[0], range(2, 3)))[0][:, 0].eq(-torch.inf).all()
    assert_the_loss(batch, *put_together(sums, gradients, batch, halves, halves))


@pytest.mark.parametrize("negatives", ["all", "within"])
def test_a_rectangle_by_chunks_gives_the_same(monkeypatch, negatives):
    from pcmecl_fast.kernels import correlation as kernels

    monkeypatch.setattr(kernels, "BLOCK", 4)
    monkeypatch.setattr(kernels, "CHUNK", 4 * 25 * 8 * 2)
    monkeypatch.setattr(kernels, "COLUMN_STRIPS", 1)
    rows, columns = (range(0, 7), range(0, 7)) if negatives == "within" else (range(1, 7), range(2, 7))
    check_block(sums, gradients, everybody((5, 9), negatives=negatives), rows, columns)


def test_nan_is_not_hidden():
    rows, columns = RECTANGLES["first -2"]
    block = everybody((5, 33), missing=False).block(rows, columns)
    block[0][1, 2, 0] = torch.nan
    row_lse, column_lse, _ = sums(*block)
    assert row_lse[1].isnan().any()
    assert not row_lse[0].isnan().any()
    assert column_lse.isnan().all()


def everybody(size, *, missing=True, dtype=torch.float32, **options):
    emotions, width = size
    scale = torch.tensor(20.0, device=DEVICE)
    return people(COUNT, emotions, width, missing=missing, scale=scale, dtype=dtype, device=DEVICE, **options)


def assert_the_loss(batch, loss, gradients):
    """The reference's in float64, and its gradients."""
    exact = in_float64(batch)
    leaves = [x.requires_grad_() for x in (exact.visual, exact.text, exact.scale) if isinstance(x, torch.Tensor)]
    scale = leaves[2] if len(leaves) > 2 else exact.scale
    expected = correlation_loss(
        *leaves[:2], scale=scale, mask=exact.mask, negatives=exact.negatives, backend="reference"
    )
    close = assert_close_for(torch.float32)
    close(loss, expected)
    for gradient, exact_gradient in zip(gradients, torch.autograd.grad(expected, leaves), strict=False):
        close(gradient, exact_gradient)
