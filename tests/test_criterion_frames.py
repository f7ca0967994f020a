"""Frames as trainers have them: ranges, orders of colours, bytes, masks, single frames."""

import logging

import numpy as np
import pytest
import torch
from criteria import bank_for, sample

from pcmecl_fast import PCMECLCriterion
from pcmecl_fast.frames_in import FrameFormat

# Of floats in [-1, 1], the same frames in each range, and how much wider that is.
RANGES = {
    (-1, 1): (lambda x: x, 1.0),
    (0, 1): (lambda x: (x + 1) / 2, 0.5),
    (0, 255): (lambda x: (x + 1) * 127.5, 127.5),
}


def of_bytes(*shape):
    """Frames that uint8 holds exactly, as uint8 and in [-1, 1], edited ones of floats, and labels."""
    source, edited, *labels = sample(*shape)
    source = ((source + 1) * 127.5).round().to(torch.uint8)
    return source, source.float() / 127.5 - 1, edited.detach(), labels


def gradient_of(criterion, source, edited, labels, **options):
    edited = edited.clone().requires_grad_()
    loss = criterion(source, edited, *labels, **options)
    loss.backward()
    return loss.detach(), edited.grad


@pytest.fixture(scope="module")
def criterion(clip):
    return PCMECLCriterion(clip, bank_for(clip), contrast=0.3)


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
@pytest.mark.parametrize("value_range", RANGES)
@pytest.mark.parametrize("source_of", ["floats", "bytes"])
def test_the_same_batch_in_any_format_is_the_same_loss(clip, criterion, value_range, channels, source_of):
    convert, width = RANGES[value_range]
    raw, source, edited, labels = of_bytes(5, 3, 40, 32)
    expected, gradient = gradient_of(criterion, source, edited, labels)
    flip = (lambda x: x.flip(1)) if channels == "bgr" else (lambda x: x)
    theirs = PCMECLCriterion(clip, bank_for(clip), contrast=0.3, value_range=value_range, channels=channels)
    given = raw if source_of == "bytes" else convert(source)
    loss, their_gradient = gradient_of(theirs, flip(given), flip(convert(edited)), labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(width * flip(their_gradient), gradient, rtol=1e-3, atol=1e-6)


def test_frames_that_are_what_clip_takes_are_not_touched(criterion):
    frames = torch.zeros(2, 3, 8, 8)
    assert criterion.format.rgb(frames) is frames


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_frames_are_converted_in_float32(dtype):
    frames = torch.rand(1, 3, 8, 8).mul(255).to(dtype)
    seen = FrameFormat((0, 255)).rgb(frames)
    assert seen.dtype == torch.float32
    torch.testing.assert_close(seen, frames.float() / 127.5 - 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"value_range": (0, 2)}, r"value_range: got \(0, 2\); takes \(-1, 1\), \(0, 1\) or \(0, 255\)"),
        ({"value_range": 255}, "value_range: got 255; takes"),
        ({"channels": "gbr"}, "channels: got 'gbr'; takes 'rgb' or 'bgr'"),
        ({"background": 1.5}, r"background: got 1.5; takes a number or three in \[-1, 1\], the frames' range"),
        ({"background": (0, 0), "value_range": (0, 255)}, r"background: got \(0, 0\); takes .* in \[0, 255\]"),
    ],
)
def test_a_format_that_no_frames_have_is_refused(clip, options, says):
    with pytest.raises(ValueError, match=says):
        PCMECLCriterion(clip, bank_for(clip), **options)


# Bytes


def test_edited_bytes_are_for_evaluation_only(criterion):
    raw, source, edited, labels = of_bytes(2, 3, 16, 16)
    with pytest.raises(TypeError, match=r"edited_frames: got torch.uint8, which has no gradient; .*torch.no_grad\(\)"):
        criterion(source, raw, *labels)
    with torch.no_grad():
        bytes_of = ((edited + 1) * 127.5).round().to(torch.uint8)
        expected = criterion(source, bytes_of.float() / 127.5 - 1, *labels)
        torch.testing.assert_close(criterion(raw, bytes_of, *labels), expected, rtol=1e-6, atol=1e-6)
    assert criterion.explain(raw, bytes_of, *labels).loss == pytest.approx(float(expected), abs=1e-6)


# One frame


def test_one_frame_is_a_batch_of_one(criterion):
    source, edited, individual, a, b = sample(1, 3, 24, 32)
    expected, gradient = gradient_of(criterion, source, edited.detach(), (individual, a, b))
    scalars = individual[0], a[0], b[0]
    for labels in (scalars, (individual, a, b), [int(x) for x in scalars]):
        loss, one = gradient_of(criterion, source[0], edited.detach()[0], labels)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(one, gradient[0])
    known = criterion.clip.encode_image(source)
    torch.testing.assert_close(criterion(source[0], edited[0], *scalars, source_features=known[0]), expected)


# Masks


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (2, 3, 3, 32, 32)])
def test_what_lies_outside_the_mask_does_not_count(criterion, kind, shape):
    source, edited, *labels = sample(*shape)
    mask = (torch.rand(*shape[:-3], 1, 32, 32, generator=torch.Generator().manual_seed(1)) < 0.5).to(kind)
    inside = mask.bool().expand(shape)
    loss, gradient = gradient_of(criterion, source, edited.detach(), labels, mask=mask)
    assert gradient[~inside].eq(0).all()
    assert gradient[inside].ne(0).any()
    # The same fill on both sides, whatever either had there.
    other = torch.where(inside, source, torch.rand(shape) * 2 - 1)
    torch.testing.assert_close(criterion(other, edited, *labels, mask=mask), loss)
    by_hand = [torch.where(inside, x, -torch.ones(())) for x in (source, edited)]
    torch.testing.assert_close(criterion(*by_hand, *labels), loss)


def test_a_soft_mask_mixes_and_gets_no_gradient(criterion):
    source, edited, *labels = sample(3, 3, 16, 16)
    mask = torch.rand(3, 1, 16, 16).requires_grad_()
    loss = criterion(source, edited, *labels, mask=mask)
    loss.backward()
    assert mask.grad is None
    by_hand = [x * mask.detach() - (1 - mask.detach()) for x in (source, edited)]
    torch.testing.assert_close(criterion(*by_hand, *labels), loss, rtol=1e-5, atol=1e-6)


def test_a_mask_of_a_clip_is_for_all_its_frames_and_of_a_frame_for_its_source_too(criterion):
    source, edited, *labels = sample(2, 3, 3, 16, 16)
    mask = torch.rand(2, 1, 16, 16) < 0.5
    each = mask[:, None].expand(2, 3, 1, 16, 16)
    expected = criterion(source[:, :1].expand_as(source), edited, *labels, mask=each)
    torch.testing.assert_close(criterion(source[:, 0], edited, *labels, mask=mask), expected)
    torch.testing.assert_close(criterion(source[:, 0], edited, *labels, mask=each), expected)
    differing = torch.rand(2, 3, 1, 16, 16) < 0.5
    repeated = criterion(source[:, :1].expand_as(source), edited, *labels, mask=differing)
    torch.testing.assert_close(criterion(source[:, 0], edited, *labels, mask=differing), repeated)


def test_the_background_is_in_the_frames_range_and_order(clip):
    source, edited, *labels = sample(2, 3, 16, 16)
    mask = torch.rand(2, 1, 16, 16) < 0.5
    fill = torch.tensor([0.2, -0.4, 0.6])
    by_hand = [torch.where(mask, x, fill[:, None, None]) for x in (source, edited)]
    expected = PCMECLCriterion(clip, bank_for(clip))(*by_hand, *labels)
    theirs = PCMECLCriterion(
        clip, bank_for(clip), value_range=(0, 255), channels="bgr", background=((fill + 1) * 127.5).flip(0).tolist()
    )
    frames = ((x.flip(1) + 1) * 127.5 for x in (source, edited))
    torch.testing.assert_close(theirs(*frames, *labels, mask=mask), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mask", "error", "says"),
    [
        (np.ones((2, 1, 16, 16)), TypeError, "mask: got ndarray; takes a tensor of bool, or of floats"),
        (torch.full((2, 1, 16, 16), 255, dtype=torch.uint8), TypeError, "mask: got torch.uint8; .* such as mask / 255"),
        (torch.ones(2, 16, 16), ValueError, r"mask: takes \(2, 1, 16, 16\), got \(2, 16, 16\)"),
        (torch.ones(2, 3, 16, 16), ValueError, r"mask: takes \(2, 1, 16, 16\), got \(2, 3, 16, 16\)"),
        (torch.ones(2, 1, 8, 8), ValueError, r"mask: takes \(2, 1, 16, 16\), got \(2, 1, 8, 8\)"),
    ],
)
def test_a_wrong_mask_is_named(criterion, mask, error, says):
    with pytest.raises(error, match=says):
        criterion(*sample(2, 3, 16, 16), mask=mask)


def test_a_mask_takes_sources_of_the_edits_size(criterion):
    source, edited, *labels = sample(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"source_frames: a mask takes frames of the size .* got \(8, 8\)"):
        criterion(source[..., :8, :8], edited, *labels, mask=torch.ones(2, 1, 16, 16))


# Frames that are not what they claim to be


@pytest.mark.parametrize(
    ("value_range", "low", "high", "says"),
    [
        ((-1, 1), 0, 255, "if these are in [0, 255], make frames / 127.5 - 1 or pass value_range=(0, 255)"),
        ((-1, 1), 0, 1, "if these are in [0, 1], make frames * 2 - 1 or pass value_range=(0, 1)"),
        ((-1, 1), -2, 2, "an unbounded output wants a clamp"),
        ((0, 1), 0, 255, "takes RGB in [0, 1]: if these are in [0, 255], pass value_range=(0, 255)"),
        ((0, 1), -1, 1, "if these are in [-1, 1], pass value_range=(-1, 1)"),
        ((0, 1), 0, 2, "an unbounded output wants a clamp"),
        ((0, 255), 0, 1, "takes RGB in [0, 255]: if these are in [0, 1], pass value_range=(0, 1)"),
        ((0, 255), -1, 1, "if these are in [-1, 1], pass value_range=(-1, 1)"),
        ((0, 255), -60, 300, "an unbounded output wants a clamp"),
        ((-1, 1), -1.02, 1.02, ""),
        ((0, 1), -0.02, 1.02, ""),
        ((0, 255), -4, 259, ""),
        ((0, 255), 0, 0, ""),
    ],
)
def test_values_that_cannot_be_of_the_range_are_pointed_out_with_the_way_out(value_range, low, high, says):
    kind, wrong = FrameFormat(value_range).wrong_values(low, high)
    assert says in wrong
    assert bool(kind) == bool(says)


def test_floats_cast_to_bytes_are_pointed_out_once(criterion, clip, caplog):
    criterion = PCMECLCriterion(clip, bank_for(clip))
    _, source, edited, labels = of_bytes(2, 3, 16, 16)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            criterion((source > 0).to(torch.uint8), edited, *labels)
    (record,) = caplog.records
    assert "source_frames: uint8 of 0 and 1 alone; takes 0 to 255" in record.getMessage()
