"""clip_frames: antialiased resize, range and colours in one launch; its backward is the same kernel.

y = a · L x Rᵀ + b: L and R hold how much each old row and column adds to each new one, a = 1/(2 std),
b = (½ − mean)/std (the weights of a new pixel add up to one, so the range can change last). The backward is a · Lᵀ g R:
the transposed weights, no atomics. Both are banded: a program owns a tile of new pixels, loads the old rows and columns
between its first and last weight in blocks, and multiplies them by the two bands with tl.dot, columns first.

A frame of H × W becomes n × n: w·3·(H·W + n²) bytes; with tiles of 32 and blocks of K, 64·K² + 2048·K operations for
each block that a tile loads. float32 frames in 3xTF32; half frames, which TF32 holds exactly, in TF32 with weights
rounded to 2⁻¹¹.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcmecl_fast.kernels.common import Config, power_of_2, run_tuned

TILE = 32  # new pixels on a side
CONFIGS = [Config(warps=8, stages=2), Config(warps=8, stages=1)]


def clip_frames_forward(
    frames: Tensor,  # (B, 3, H, W)
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
) -> tuple[Tensor]:
    _, _, height, width = frames.shape
    rows, columns = (_bands(old, size, interpolation, False, frames.device) for old in (height, width))
    out = frames.new_empty(frames.shape[0], 3, size, size)
    _resample(
        frames, out, rows, columns, [0.5 / s for s in std], [(0.5 - m) / s for m, s in zip(mean, std, strict=True)]
    )
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
    _, _, height, width = frames.shape
    rows, columns = (_bands(old, size, interpolation, True, frames.device) for old in (height, width))
    grad_frames = torch.empty_like(frames)
    _resample(grad, grad_frames, rows, columns, [0.5 / s for s in std], [0.0] * 3)
    return (grad_frames,)


class _Bands:
    """Weights of each new pixel on a line, (new, old), and where each tile's weights begin and end."""

    def __init__(self, weights: Tensor, device: torch.device) -> None:
        old = weights.shape[1]
        used = weights.ne(0)
        first = used.float().argmax(dim=1)
        last = old - used.flip(1).float().argmax(dim=1)
        spans = [(int(a.min()), int(b.max())) for a, b in zip(first.split(TILE), last.split(TILE), strict=True)]
        self.widest = max(end - begin for begin, end in spans)
        self.weights = weights.float().to(device)
        self.spans = torch.tensor(spans, dtype=torch.int32).to(device)


def _resample(x: Tensor, out: Tensor, rows: _Bands, columns: _Bands, gain: list[float], offset: list[float]) -> None:
    """out = gain · (rows x columnsᵀ) + offset for each colour."""
    if out.numel() == 0:
        return
    block = block_for(max(rows.widest, columns.widest), half=x.dtype != torch.float32)
    run_tuned(
        "clip_frames",
        (x.shape[2:], out.shape[2:], x.dtype),
        CONFIGS,
        x,
        lambda config: resample_kernel[(len(rows.spans) * len(columns.spans), x.shape[0] * 3)](
            x,
            out,
            rows.weights,
            columns.weights,
            rows.spans,
            columns.spans,
            *x.shape[2:],
            *out.shape[2:],
            *gain,
            *offset,
            TILE=TILE,
            BLOCK=block,
            PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
            **config.options(),
        ),
    )


def block_for(span: int, *, half: bool) -> int:
    """Old pixels loaded at once: a tile's whole span, up to what spills no register."""
    return min(power_of_2(span, least=16), 64 if half else 32)


@lru_cache(maxsize=64)
def _bands(old: int, new: int, interpolation: str, transposed: bool, device: torch.device) -> _Bands:
    with torch.inference_mode(False):  # tensors made in inference mode could not serve a later backward
        weights = resize_weights(old, new, interpolation)
        return _Bands(weights.T.contiguous() if transposed else weights, device)


def resize_weights(old: int, new: int, interpolation: str) -> Tensor:  # (new, old) float64
    """`F.interpolate(mode=interpolation, antialias=True)` on a line: the filter, widened by a reduction."""
    filter_weight, radius = (_keys_cubic, 2) if interpolation == "bicubic" else (_triangle, 1)
    factor = old / new
    stretch = max(factor, 1.0)
    centre = (torch.arange(new, dtype=torch.float64)[:, None] + 0.5) * factor
    pixel = torch.arange(old, dtype=torch.float64)
    first = (centre - radius * stretch + 0.5).floor().clamp(min=0)
    last = (centre + radius * stretch + 0.5).floor().clamp(max=old)
    weights = filter_weight(((pixel + 0.5 - centre) / stretch).abs())
    weights = torch.where((pixel >= first) & (pixel < last), weights, 0.0)
    return weights / weights.sum(dim=1, keepdim=True)


def _keys_cubic(x: Tensor) -> Tensor:
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _triangle(x: Tensor) -> Tensor:
    return (1 - x).clamp(min=0)


@triton.jit
def resample_kernel(
    x,  # (planes, old_height, old_width), read
    out,  # (planes, new_height, new_width), written
    row_weights,  # (new_height, old_height) float32, read
    column_weights,  # (new_width, old_width) float32, read
    row_spans,  # (tiles down, 2) int32: first old row and end of each tile's weights, read
    column_spans,  # (tiles across, 2) int32: the same of columns, read
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
    TILE: tl.constexpr,  # new pixels on a side of a program's tile
    BLOCK: tl.constexpr,  # old pixels on a side of what is multiplied at a time
    PRECISION: tl.constexpr,  # of the products: "tf32x3" for float32 frames, "tf32" for half types
):
    """A program owns a tile of new pixels of one plane; the module's docstring says what it costs."""
    across = tl.cdiv(new_width, TILE)
    tile_row, tile_column = tl.program_id(0) // across, tl.program_id(0) % across
    picture = tl.program_id(1)
    x += tl.cast(picture, tl.int64) * old_height * old_width
    new_row = tile_row * TILE + tl.arange(0, TILE)
    new_column = tile_column * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE, TILE], tl.float32)
    for first_row in range(tl.load(row_spans + 2 * tile_row), tl.load(row_spans + 2 * tile_row + 1), BLOCK):
        row = first_row + tl.arange(0, BLOCK)
        narrowed = tl.zeros([BLOCK, TILE], tl.float32)
        for first in range(tl.load(column_spans + 2 * tile_column), tl.load(column_spans + 2 * tile_column + 1), BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = (row[:, None] < old_height) & (column[None, :] < old_width)
            old = tl.load(x + row[:, None] * old_width + column[None, :], inside, other=0.0).to(tl.float32)
            inside = (new_column[:, None] < new_width) & (column[None, :] < old_width)
            weights = tl.load(column_weights + new_column[:, None] * old_width + column[None, :], inside, other=0.0)
            narrowed = tl.dot(old, tl.trans(weights), acc=narrowed, input_precision=PRECISION)
        inside = (new_row[:, None] < new_height) & (row[None, :] < old_height)
        weights = tl.load(row_weights + new_row[:, None] * old_height + row[None, :], inside, other=0.0)
        total = tl.dot(weights, narrowed, acc=total, input_precision=PRECISION)
    colour = picture % 3
    total = total * _of_colour(colour, gain_red, gain_green, gain_blue)
    total += _of_colour(colour, offset_red, offset_green, offset_blue)
    inside = (new_row[:, None] < new_height) & (new_column[None, :] < new_width)
    to = out + tl.cast(picture, tl.int64) * new_height * new_width + new_row[:, None] * new_width + new_column[None, :]
    tl.store(to, total, inside)


@triton.jit
def _of_colour(colour, red, green, blue):
    return tl.where(colour == 0, red, tl.where(colour == 1, green, blue))
