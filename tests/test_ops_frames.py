"""clip_frames against its filters written out, and against properties that any resize must have."""

import itertools
import math
from functools import partial

import pytest
import torch
from operators import CLIP_MEAN, CLIP_STD, frames_input, seed
from tolerances import DTYPES, assert_close_for
from torch import Tensor

from pcmecl_fast.ops import clip_frames

pytestmark = pytest.mark.usefixtures("each_backend")

INTERPOLATIONS = ["bicubic", "bilinear"]
SIZES = [(1, 32, 32, 32), (2, 61, 47, 33), (1, 20, 27, 41), (3, 7, 90, 16), (1, 1, 1, 5)]  # B, H, W, size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_frames_and_their_gradient_follow_the_formula(dtype, size, interpolation):
    batch, height, width, side = size
    frames = frames_input(batch, height, width, dtype=dtype)
    out = clip_frames(frames, side, CLIP_MEAN, CLIP_STD, interpolation=interpolation)
    assert out.dtype == dtype
    assert out.shape == (batch, 3, side, side)

    exact = frames.detach().double().requires_grad_()
    expected = oracle(exact, side, interpolation)
    assert_close_for(dtype)(out, expected)
    weights = torch.randn(out.shape, generator=seed(1), dtype=torch.float64).to(dtype)
    (out * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    assert_close_for(dtype)(frames.grad, exact.grad)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_a_flat_frame_stays_flat(value):
    out = clip_frames(torch.full((1, 3, 45, 31), value, dtype=torch.float64), 32, CLIP_MEAN, CLIP_STD)
    for channel in range(3):
        expected = torch.full((32, 32), ((value + 1) / 2 - CLIP_MEAN[channel]) / CLIP_STD[channel], dtype=torch.float64)
        assert_close_for(torch.float64)(out[0, channel], expected)


def test_frames_of_clips_own_size_are_only_normalised():
    frames = frames_input(2, 32, 32, dtype=torch.float64)
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    assert_close_for(torch.float64)(clip_frames(frames, 32, CLIP_MEAN, CLIP_STD), ((frames + 1) / 2 - mean) / std)


def test_nothing_is_clamped_so_every_pixel_has_a_gradient():
    frames = (3 * frames_input(1, 45, 31, dtype=torch.float32)).detach().requires_grad_()  # far out of range
    out = clip_frames(frames, 16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert out.min() < 0
    assert out.max() > 1
    out.sum().backward()
    assert frames.grad.ne(0).all()


def test_gradcheck():
    frames = frames_input(2, 7, 5, dtype=torch.float64)
    for size, interpolation in itertools.product((4, 9), INTERPOLATIONS):
        resized = partial(clip_frames, size=size, mean=CLIP_MEAN, std=CLIP_STD, interpolation=interpolation)
        assert torch.autograd.gradcheck(resized, (frames,))


def test_an_empty_batch_is_empty_with_a_graph():
    frames = frames_input(0, 20, 20, dtype=torch.float32)
    out = clip_frames(frames, 16, CLIP_MEAN, CLIP_STD)
    assert out.shape == (0, 3, 16, 16)
    out.sum().backward()
    assert frames.grad.shape == frames.shape


def test_colours_may_be_lists_and_integers():
    frames = frames_input(1, 9, 9, dtype=torch.float32)
    expected = clip_frames(frames, 4, (0.0, 0.5, 1.0), (1.0, 1.0, 2.0))
    assert torch.equal(clip_frames(frames, 4, [0, 0.5, 1], [1, 1, 2]), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_nothing(dtype):
    frames = frames_input(1, 45, 31, dtype=dtype)
    plain = clip_frames(frames, 16, CLIP_MEAN, CLIP_STD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(clip_frames(frames, 16, CLIP_MEAN, CLIP_STD), plain)


def test_strided_frames_are_supported():
    frames = frames_input(2, 45, 31, dtype=torch.float32)
    expected = clip_frames(frames, 16, CLIP_MEAN, CLIP_STD)
    channels_last = frames.to(memory_format=torch.channels_last)
    assert_close_for(torch.float32)(clip_frames(channels_last, 16, CLIP_MEAN, CLIP_STD), expected)


def test_compiles_into_one_graph():
    frames = frames_input(2, 45, 31, dtype=torch.float32)
    compiled = torch.compile(lambda x: clip_frames(x, 16, CLIP_MEAN, CLIP_STD), fullgraph=True, backend="aot_eager")
    out = compiled(frames)
    assert_close_for(torch.float32)(out, clip_frames(frames, 16, CLIP_MEAN, CLIP_STD))
    out.sum().backward()
    assert frames.grad.isfinite().all()


# Each row: the wrong arguments, the exception, and its message.
WRONG = [
    ({"frames": "face.png"}, TypeError, "frames: got str; takes a tensor"),
    ({"frames": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, TypeError, "frames: got torch.uint8; takes float16, bfl"),
    ({"frames": torch.zeros(3, 8, 8)}, ValueError, r"frames: got shape \(3, 8, 8\); takes \(B, 3, H, W\)"),
    ({"frames": torch.zeros(1, 8, 8, 3)}, ValueError, r"frames: got shape \(1, 8, 8, 3\); takes \(B, 3, H, W\)"),
    ({"frames": torch.zeros(1, 3, 0, 8)}, ValueError, r"frames: got shape \(1, 3, 0, 8\); .* H and W of at least 1"),
    ({"size": 8.0}, TypeError, "size: got float; takes an int"),
    ({"size": 0}, ValueError, "size: got 0; takes at least 1"),
    ({"mean": 0.5}, TypeError, "mean: got float; takes a sequence of three numbers"),
    ({"mean": (0.5, 0.5)}, ValueError, "mean: got 2 values; takes three numbers"),
    ({"mean": (0.5, 0.5, None)}, TypeError, r"mean\[2\]: got NoneType; takes a number"),
    ({"std": (0.5, float("inf"), 0.5)}, ValueError, r"std\[1\]: got inf; takes a finite number"),
    ({"std": (0.5, 0, 0.5)}, ValueError, r"std: got \(0.5, 0.0, 0.5\); takes three numbers above 0"),
    ({"interpolation": "random"}, ValueError, "interpolation: got 'random'; takes one of bicubic, bilinear"),
    ({"backend": "tpu"}, ValueError, "backend: got 'tpu'; takes one of reference, cpu, triton, cuda, xformers, auto"),
]


@pytest.mark.parametrize(("wrong", "error", "says"), WRONG, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_a_wrong_argument_is_named(wrong, error, says):
    right = {"frames": torch.zeros(1, 3, 8, 8), "size": 4, "mean": CLIP_MEAN, "std": CLIP_STD}
    with pytest.raises(error, match=says):
        clip_frames(**right | wrong)


def oracle(frames: Tensor, side: int, interpolation: str) -> Tensor:
    tables = (resize_weights(n, side, interpolation) for n in frames.shape[2:])
    rows, columns = (torch.tensor(table, dtype=torch.float64) for table in tables)
    resized = rows @ ((frames + 1) / 2) @ columns.mT
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    return (resized - mean) / std


def resize_weights(before: int, after: int, interpolation: str) -> list[list[float]]:
    """The weight of each old pixel in each new one: the filter, widened by the reduction factor."""
    weight, radius = (cubic, 2) if interpolation == "bicubic" else (triangle, 1)
    factor = before / after
    stretch = max(factor, 1.0)
    table = []
    for new in range(after):
        centre = (new + 0.5) * factor
        first = max(int(centre - radius * stretch + 0.5), 0)
        last = min(int(centre + radius * stretch + 0.5), before)
        weights = [weight((old + 0.5 - centre) / stretch) if first <= old < last else 0.0 for old in range(before)]
        table.append([weight / math.fsum(weights) for weight in weights])
    return table


def triangle(x: float) -> float:
    return max(0.0, 1 - abs(x))


def cubic(x: float) -> float:
    """Keys', with a = −1/2."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0
