"""clip_frames: antialiased resize, range and colours; its backward is the same kernel.

y = a · L x Rᵀ + b: L and R hold how much each old row and column adds to each new one, a = 1/(2 std),
b = (½ − mean)/std (the weights of a new pixel add up to one, so the range can change last). The backward is a · Lᵀ g R:
the transposed weights, no atomics. Both are banded: a program owns a tile of new pixels, loads the old rows and columns
that have weights there in blocks, and multiplies them by the two bands with tl.dot, columns first.

L and R are made by a launch of their own in every call, one for both in square frames, and where a tile's band begins
and ends the kernel works out. They are not kept from one call to the next: a tensor made by a first call inside a CUDA
graph lies in that graph's memory, which torch.compile's graphs take back, and it cannot come from the host there.

A frame of H × W becomes n × n: w·3·(H·W + n²) bytes; with tiles of 32 and blocks of K, 64·K² + 2048·K operations for
each block that a tile loads, in 3xTF32 for every dtype: a half frame is exact in TF32, but the weights are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcmecl_fast.kernels.common import Config, power_of_2, run, run_tuned

TILE = 32  # new pixels on a side
BLOCK = 32  # most old pixels on a side of what is multiplied at a time: 64 would spill registers
CONFIGS = [Config(warps=8, stages=2), Config(warps=8, stages=1)]
RADIUS = {"bicubic": 2, "bilinear": 1}  # of the filters, in new pixels, or old ones where those are larger


def clip_frames_forward(
    frames: Tensor,  # (B, 3, H, W)
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
) -> tuple[Tensor]:
    out = frames.new_empty(frames.shape[0], 3, size, size)
    offset = [(0.5 - m) / s for m, s in zip(mean, std, strict=True)]
    _resample(frames, out, _weights(frames, size, interpolation), interpolation, [0.5 / s for s in std], offset)
    return (out,)


def clip_frames_backward(
    grad: Tensor,  # (B, 3, size, size)
    frames: Tensor,  # (B, 3, H, W)
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    needs: Sequence[bool],
) -> tuple[Tensor | None]:
    if not needs[0]:
        return (None,)
    grad_frames = torch.empty_like(frames)
    transposed = _Weights(*(x.mT for x in _weights(frames, size, interpolation)))
    _resample(grad, grad_frames, transposed, interpolation, [0.5 / s for s in std], [0.0] * 3)
    return (grad_frames,)


class _Weights(NamedTuple):
    """How much each row and column of `x` adds to each of `out`."""

    rows: Tensor  # (rows of out, rows of x) float32, any strides
    columns: Tensor  # (columns of out, columns of x) float32, any strides


def _weights(frames: Tensor, size: int, interpolation: str) -> _Weights:
    _, _, height, width = frames.shape
    rows = resize_weights(frames, height, size, interpolation)
    return _Weights(rows, rows if width == height else resize_weights(frames, width, size, interpolation))


def resize_weights(x: Tensor, old: int, new: int, interpolation: str) -> Tensor:  # (new, old) float32
    """`F.interpolate(mode=interpolation, antialias=True)` on a line of pixels, on x's device."""
    weights = x.new_empty(new, old, dtype=torch.float32)
    if weights.numel() > 0:
        block = min(power_of_2(old), 1024)
        run(
            x, lambda: weights_kernel[(new,)](weights, old, new, RADIUS=RADIUS[interpolation], BLOCK=block, num_warps=4)
        )
    return weights


def _resample(
    x: Tensor, out: Tensor, weights: _Weights, interpolation: str, gain: list[float], offset: list[float]
) -> None:
    """out = gain · (rows x columnsᵀ) + offset for each colour."""
    if out.numel() == 0:
        return
    radius = RADIUS[interpolation]
    sizes = list(zip(x.shape[2:], out.shape[2:], strict=True))
    block = min(power_of_2(max(widest_band(*pair, radius) for pair in sizes), least=16), BLOCK)
    tiles = triton.cdiv(out.shape[2], TILE) * triton.cdiv(out.shape[3], TILE)
    run_tuned(
        "clip_frames",
        (x.shape[2:], out.shape[2:], x.dtype),
        CONFIGS,
        x,
        lambda config: resample_kernel[(x.shape[0] * 3 * tiles,)](
            x,
            out,
            *weights,
            *x.shape[2:],
            *out.shape[2:],
            *weights.rows.stride(),
            *weights.columns.stride(),
            radius,
            *gain,
            *offset,
            TILE=TILE,
            BLOCK=block,
            **config.options(),
        ),
    )


def widest_band(old: int, new: int, radius: int) -> int:
    """The most old pixels that a tile of new ones has weights for."""
    return min(triton.cdiv((TILE - 1) * old + 2 * radius * max(old, new), new) + 1, old)


@triton.jit(do_not_specialize=["old", "new"])
def weights_kernel(
    weights,  # (new, old) float32, written
    old,  # pixels of the line before
    new,  # and after
    RADIUS: tl.constexpr,  # of the filter: 2 is bicubic, 1 bilinear
    BLOCK: tl.constexpr,  # old pixels that are worked on at a time
):
    """A program owns a new pixel: the filter around its centre, widened by a reduction, divided by its sum."""
    pixel = tl.program_id(0)
    total = 0.0
    for start in range(0, old, BLOCK):
        total += tl.sum(_filter(pixel, start + tl.arange(0, BLOCK), old, new, RADIUS))
    for start in range(0, old, BLOCK):
        column = start + tl.arange(0, BLOCK)
        weight = _filter(pixel, column, old, new, RADIUS) / total
        tl.store(weights + tl.cast(pixel, tl.int64) * old + column, weight, column < old)


@triton.jit
def _filter(pixel, column, old, new, RADIUS: tl.constexpr):
    """The filter at old pixels, 0 beyond the last, around a new one's centre.

    Their distance is (2·column + 1)/(2·old) − (2·pixel + 1)/(2·new) of the line: a fraction, so rounded only once.
    """
    apart = (2 * column + 1).to(tl.int64) * new - (2 * pixel + 1).to(tl.int64) * old
    x = tl.abs(apart).to(tl.float32) / (2.0 * tl.maximum(old, new))
    if RADIUS == 2:
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        weight = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    else:
        weight = tl.maximum(1.0 - x, 0.0)
    return tl.where(column < old, weight, 0.0)


@triton.jit(do_not_specialize=["old_height", "new_height", "radius"])
def resample_kernel(
    x,  # (planes, old_height, old_width), read
    out,  # (planes, new_height, new_width), written
    row_weights,  # (new_height, old_height) float32, read
    column_weights,  # (new_width, old_width) float32, read
    old_height,  # rows of x
    old_width,  # columns of x
    new_height,  # rows of out
    new_width,  # columns of out
    row_weights_new,  # stride of row_weights along new rows, in elements
    row_weights_old,  # along old rows
    column_weights_new,  # stride of column_weights along new columns
    column_weights_old,  # along old columns
    radius,  # of the filter, in new or old pixels, whichever are larger
    gain_red,  # float32: factor of the resized red
    gain_green,  # float32: the same of green
    gain_blue,  # float32: the same of blue
    offset_red,  # float32: what is added to red after that
    offset_green,  # float32: the same of green
    offset_blue,  # float32: the same of blue
    TILE: tl.constexpr,  # new pixels on a side of a program's tile
    BLOCK: tl.constexpr,  # old pixels on a side of what is multiplied at a time
):
    """A program owns a tile of new pixels of one plane; the module's docstring says what it costs."""
    across = tl.cdiv(new_width, TILE)
    tiles = tl.cdiv(new_height, TILE) * across
    picture, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first_new_row, first_new_column = tile // across * TILE, tile % across * TILE
    new_row = first_new_row + tl.arange(0, TILE)
    new_column = first_new_column + tl.arange(0, TILE)
    first_row, end_row = _band(first_new_row, old_height, new_height, radius, TILE)
    first_column, end_column = _band(first_new_column, old_width, new_width, radius, TILE)
    first_column = first_column // 8 * 8  # where rows are aligned, 16 bytes are loaded at a time
    x += tl.cast(picture, tl.int64) * old_height * old_width
    total = tl.zeros([TILE, TILE], tl.float32)
    for begin_row in range(first_row, end_row, BLOCK):
        row = begin_row + tl.arange(0, BLOCK)
        narrowed = tl.zeros([BLOCK, TILE], tl.float32)
        for begin_column in range(first_column, end_column, BLOCK):
            column = begin_column + tl.arange(0, BLOCK)
            inside = (row[:, None] < old_height) & (column[None, :] < old_width)
            old = tl.load(x + row[:, None] * old_width + column[None, :], inside, other=0.0).to(tl.float32)
            at = column_weights + new_column[:, None] * column_weights_new + column[None, :] * column_weights_old
            weights = tl.load(at, (new_column[:, None] < new_width) & (column[None, :] < old_width), other=0.0)
            narrowed = tl.dot(old, tl.trans(weights), acc=narrowed, input_precision="tf32x3")
        at = row_weights + new_row[:, None] * row_weights_new + row[None, :] * row_weights_old
        weights = tl.load(at, (new_row[:, None] < new_height) & (row[None, :] < old_height), other=0.0)
        total = tl.dot(weights, narrowed, acc=total, input_precision="tf32x3")
    colour = picture % 3
    total = total * _of_colour(colour, gain_red, gain_green, gain_blue)
    total += _of_colour(colour, offset_red, offset_green, offset_blue)
    inside = (new_row[:, None] < new_height) & (new_column[None, :] < new_width)
    to = out + tl.cast(picture, tl.int64) * new_height * new_width + new_row[:, None] * new_width + new_column[None, :]
    tl.store(to, total, inside)


@triton.jit
def _band(first, old, new, radius, TILE: tl.constexpr):
    """The first old pixel that a tile of new ones has weights for, and the end of these.

    They are those with |(2·pixel + 1)·new − (2·own + 1)·old| < 2·radius·max(old, new): the same both ways round.
    """
    reach = 2 * radius * tl.cast(tl.maximum(old, new), tl.int64)
    last = tl.minimum(first + TILE, new) - 1
    before = tl.maximum((2 * first + 1) * tl.cast(old, tl.int64) - reach + new, 0)
    after = (2 * last + 1) * tl.cast(old, tl.int64) + reach + new - 1
    return (before // (2 * new)).to(tl.int32), tl.minimum(after // (2 * new), old).to(tl.int32)


@triton.jit
def _of_colour(colour, red, green, blue):
    return tl.where(colour == 0, red, tl.where(colour == 1, green, blue))
