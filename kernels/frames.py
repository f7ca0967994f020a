"""clip_frames: antialiased resize, range and colours; its backward is the same kernel.

y = a · L x Rᵀ + b: L and R hold how much each old row and column adds to each new one, a = 1/(2 std),
b = (½ − mean)/std (the weights of a new pixel add up to one, so the range can change last). The backward is a · Lᵀ g R:
the transposed weights, no atomics. Of a row of L or R only its band of `taps` weights is kept, and where that begins. A
program owns a tile of new pixels: it adds up old rows, whole runs of them at a time, then takes each new pixel's
columns from the sums, which lie in the registers of one warp.

L and R are made by a launch of their own in every call, one for both in square frames. They are not kept from one call
to the next: a tensor made by a first call inside a CUDA graph lies in that graph's memory, which torch.compile's graphs
take back, and it cannot come from the host there.

A frame of H × W becomes n × n: w·3·(H·W + n²) bytes, which bound it; a multiply-add for each tap of rows and of columns
that a new pixel has, (2·2·max(H, n)/n for bicubic), and a shuffle or two for each of columns. All float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcmecl_fast.kernels.common import Config, power_of_2, run, run_tuned

# Of a program's tile: parts, one after the other, new rows of each, new columns, and old ones at a time, at most. The
# first whose old columns hold the tile's band is taken.
TILES = ((4, 8, 32, 64), (4, 8, 16, 128))
FEW, STEP = 8, 2  # so many taps are written out one after another; of more there is a loop over so many
CONFIGS = [Config(warps=4, stages=1), Config(warps=8, stages=1)]
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
    _resample(frames, out, RADIUS[interpolation], [0.5 / s for s in std], offset, transposed=False)
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
    _resample(grad, grad_frames, RADIUS[interpolation], [0.5 / s for s in std], [0.0] * 3, transposed=True)
    return (grad_frames,)


class Bands(NamedTuple):
    """How much pixels of one line add to those of another: of each of these the weights from its first pixel on."""

    first: Tensor  # (pixels,) int32
    weights: Tensor  # (taps, pixels) float32


def make_bands(x: Tensor, before: int, after: int, radius: int, *, transposed: bool) -> Bands:
    """`F.interpolate(antialias=True)` of a line of `before` pixels to `after`, on x's device; or a transpose, back."""
    taps = taps_of(before, after, radius)
    first = x.new_empty(after, dtype=torch.int32)
    weights = x.new_empty(taps, after, dtype=torch.float32)
    old, new = (after, before) if transposed else (before, after)
    block = max(1, 256 // power_of_2(taps))
    run(
        x,
        lambda: weights_kernel[(triton.cdiv(after, block),)](
            first,
            weights,
            before,
            after,
            old,
            new,
            taps_of(old, new, radius),
            TAPS=taps,
            BLOCK_TAPS=power_of_2(taps),
            RADIUS=radius,
            TRANSPOSED=transposed,
            BLOCK=block,
            num_warps=4,
        ),
    )
    return Bands(first, weights)


def taps_of(before: int, after: int, radius: int) -> int:
    """The most pixels of `before` that add to one of `after`."""
    return min(triton.cdiv(2 * radius * max(before, after), after), before)


def widest_band(before: int, after: int, radius: int, pixels: int) -> int:
    """The most pixels of `before` from the first to the last that add to so many neighbours of `after`."""
    return min(triton.cdiv((pixels - 1) * before + 2 * radius * max(before, after), after) + 1, before)


def _resample(x: Tensor, out: Tensor, radius: int, gain: list[float], offset: list[float], *, transposed: bool) -> None:
    """out = gain · (rows x columnsᵀ) + offset for each colour."""
    if out.numel() == 0:
        return
    (old_height, old_width), (new_height, new_width) = x.shape[2:], out.shape[2:]
    rows = make_bands(x, old_height, new_height, radius, transposed=transposed)
    columns = rows
    if (old_width, new_width) != (old_height, new_height):
        columns = make_bands(x, old_width, new_width, radius, transposed=transposed)
    aligned = 16 // x.element_size()
    for parts, new_rows, new_columns, most in TILES:  # noqa: B007 - the last where none does
        width = widest_band(old_width, new_width, radius, new_columns) + aligned - 1
        if width <= most:
            break
    few = max(len(rows.weights), len(columns.weights)) <= FEW
    tiles = triton.cdiv(new_height, parts * new_rows) * triton.cdiv(new_width, new_columns)
    run_tuned(
        "clip_frames",
        (x.shape[2:], out.shape[2:], x.dtype),
        CONFIGS,
        x,
        lambda config: resample_kernel[(x.shape[0] * 3 * tiles,)](
            x,
            out,
            *rows,
            *columns,
            old_height,
            old_width,
            new_height,
            new_width,
            *gain,
            *offset,
            ROW_TAPS=len(rows.weights),
            COLUMN_TAPS=len(columns.weights),
            STEP=FEW if few else STEP,
            PARTS=parts,
            ROWS=new_rows,
            COLUMNS=new_columns,
            OLD_COLUMNS=min(power_of_2(width, least=16), most),
            AT_ONCE=width <= most,
            ALIGNED=aligned,
            **config.options(),
        ),
    )


@triton.jit(do_not_specialize=["before", "after", "old", "new", "taps_of_new"])
def weights_kernel(
    first,  # (after,) int32: the first pixel of each band, written
    weights,  # (TAPS, after) float32, written
    before,  # pixels of the line that is read
    after,  # and of the one that is made
    old,  # pixels of the line before the resize: `before`, or `after` where TRANSPOSED
    new,  # and of the other
    taps_of_new,  # pixels of the old line, at most, that add to one of the new
    TAPS: tl.constexpr,  # the same of `before` and `after`
    BLOCK_TAPS: tl.constexpr,  # TAPS rounded up to a power of two
    RADIUS: tl.constexpr,  # of the filter: 2 is bicubic, 1 bilinear
    TRANSPOSED: tl.constexpr,  # whether gradients go back
    BLOCK: tl.constexpr,  # pixels of a program
):
    """A program owns some pixels' bands: the filter around each new pixel's centre, divided by the sum of its own band.

    A reduction widens the filter.
    """
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tap = tl.arange(0, BLOCK_TAPS)
    begin = tl.minimum(_first(pixel, before, after, RADIUS), before - TAPS)
    other = begin[:, None] + tap[None, :]
    if TRANSPOSED:
        new_pixel, old_pixel = other, pixel[:, None]
    else:
        new_pixel, old_pixel = pixel[:, None], other
    begin_of_new = _first(new_pixel, old, new, RADIUS)
    total = tl.zeros(new_pixel.shape, tl.float32)
    for i in range(taps_of_new):
        total += _filter(new_pixel, begin_of_new + i, old, new, RADIUS)
    weight = _filter(new_pixel, old_pixel, old, new, RADIUS) / tl.where(total == 0.0, 1.0, total)
    tl.store(first + pixel, begin, pixel < after)
    tl.store(weights + tap[None, :] * after + pixel[:, None], weight, (pixel < after)[:, None] & (tap < TAPS)[None, :])


@triton.jit
def _first(pixel, before, after, RADIUS: tl.constexpr):
    """The first pixel of `before` that adds to one of `after`.

    They are those with |(2·pixel + 1)·before − (2·other + 1)·after| < 2·RADIUS·max(before, after), both ways round.
    """
    reach = 2 * RADIUS * tl.cast(tl.maximum(before, after), tl.int64)
    begin = tl.maximum((2 * pixel + 1) * tl.cast(before, tl.int64) - reach + after, 0)
    return (begin // (2 * after)).to(tl.int32)


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


@triton.jit(do_not_specialize=["old_height", "new_height"])
def resample_kernel(
    x,  # (planes, old_height, old_width), read
    out,  # (planes, new_height, new_width), written
    first_rows,  # (new_height,) int32: where the band of each new row begins, read
    row_weights,  # (ROW_TAPS, new_height) float32, read
    first_columns,  # (new_width,) int32, read
    column_weights,  # (COLUMN_TAPS, new_width) float32, read
    old_height,  # rows of x
    old_width,  # columns of x
    new_height,  # rows of out
    new_width,  # columns of out
    gain_red,  # float32: factor of the resized red
    gain_green,  # float32: the same of green
    gain_blue,  # float32: the same of blue
    offset_red,  # float32: what is added to red after that
    offset_green,  # float32: the same of green
    offset_blue,  # float32: the same of blue
    ROW_TAPS: tl.constexpr,  # weights of a new row
    COLUMN_TAPS: tl.constexpr,  # and of a new column
    STEP: tl.constexpr,  # taps that are written out
    PARTS: tl.constexpr,  # of a program's tile, one after the other
    ROWS: tl.constexpr,  # new rows of one
    COLUMNS: tl.constexpr,  # its new columns
    OLD_COLUMNS: tl.constexpr,  # old columns that are held at a time
    AT_ONCE: tl.constexpr,  # whether these hold all that a tile needs
    ALIGNED: tl.constexpr,  # columns that 16 bytes hold: where rows are aligned, so many are loaded at a time
):
    """A program owns a tile of new pixels of one plane; the module's docstring says what it costs."""
    across = tl.cdiv(new_width, COLUMNS)
    tiles = tl.cdiv(new_height, PARTS * ROWS) * across
    picture, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first_column = tile % across * COLUMNS
    new_column = first_column + tl.arange(0, COLUMNS)
    column = tl.minimum(new_column, new_width - 1)  # beyond the last the last once more, which is not stored
    begin = tl.load(first_columns + first_column) // ALIGNED * ALIGNED
    end = begin + 1
    if not AT_ONCE:
        end = tl.load(first_columns + tl.minimum(first_column + COLUMNS, new_width) - 1) + COLUMN_TAPS
    column_at = tl.load(first_columns + column)
    x += tl.cast(picture, tl.int64) * old_height * old_width
    out += tl.cast(picture, tl.int64) * new_height * new_width
    colour = picture % 3
    gain = _of_colour(colour, gain_red, gain_green, gain_blue)
    offset = _of_colour(colour, offset_red, offset_green, offset_blue)
    for part in range(PARTS):
        new_row = (tile // across * PARTS + part) * ROWS + tl.arange(0, ROWS)
        row = tl.minimum(new_row, new_height - 1)
        first_row = tl.load(first_rows + row)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(begin, end, OLD_COLUMNS):
            old_column = start + tl.arange(0, OLD_COLUMNS)
            at = x + first_row[:, None] * old_width + old_column[None, :]
            sums = tl.zeros([ROWS, OLD_COLUMNS], tl.float32)
            for step in range(0, ROW_TAPS, STEP):
                for i in tl.static_range(min(STEP, ROW_TAPS)):
                    tap = step + i
                    inside = tap < ROW_TAPS
                    weight = tl.load(row_weights + tap * new_height + row, inside, other=0.0)
                    old = tl.load(at + tap * old_width, (old_column < old_width)[None, :] & inside, other=0.0)
                    sums += weight[:, None] * old.to(tl.float32)
            for step in range(0, COLUMN_TAPS, STEP):
                for i in tl.static_range(min(STEP, COLUMN_TAPS)):
                    tap = step + i
                    inside = tap < COLUMN_TAPS
                    place = column_at + (tap - start)
                    if not AT_ONCE:
                        inside &= (place >= 0) & (place < OLD_COLUMNS)
                    weight = tl.load(column_weights + tap * new_width + column, inside, other=0.0)
                    place = tl.broadcast_to(tl.where(inside, place, 0)[None, :], [ROWS, COLUMNS])
                    total += weight[None, :] * tl.gather(sums, place, 1)
        inside = (new_row < new_height)[:, None] & (new_column < new_width)[None, :]
        tl.store(out + new_row[:, None] * new_width + new_column[None, :], total * gain + offset, inside)


@triton.jit
def _of_colour(colour, red, green, blue):
    return tl.where(colour == 0, red, tl.where(colour == 1, green, blue))
