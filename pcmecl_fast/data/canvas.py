"""Parts of a picture or video frame taken as colours and changed where they are: all other pixels stay as decoded.

Of a frame, its own planes are changed. A change of colours d(R, G, B) is, under a matrix with the weights Kr, Kg, Kb of
red, green and blue,

    dY = Kr dR + Kg dG + Kb dB,    dU = (dB - dY) / (2 - 2 Kb),    dV = (dR - dY) / (2 - 2 Kr)

without any offset: where nothing changes, not even a rounding does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pcmecl_fast.data.video import colours_of

if TYPE_CHECKING:
    from av import VideoFrame

# Kr and Kb of the matrices of ITU-T H.273, as FFmpeg numbers them.
_WEIGHTS = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 7: (0.212, 0.087), 9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}
_BT601 = (0.299, 0.114)  # 5 and 6


class Box(NamedTuple):
    """A part of an upright picture in whole pixels, the last ones not included."""

    left: int
    top: int
    right: int
    bottom: int


class Layout(NamedTuple):
    """Of a planar format: luma samples a chroma sample, across and down, and bits a sample."""

    across: int
    down: int
    bits: int


LAYOUTS = {
    f"yuv{name}{suffix}": Layout(across, down, bits)
    for name, across, down in (("420p", 2, 2), ("422p", 2, 1), ("444p", 1, 1))
    for suffix, bits in (("", 8), ("10le", 10))
}
"""The formats that are changed in place; others are converted to one of them."""


def changeable(raw: VideoFrame, name: str) -> VideoFrame:
    """A copy of a frame in one of the `LAYOUTS`, without a loss where it is its own."""
    import av

    if name != _planar_name(raw):
        return raw.reformat(format=name, threads=1)
    copy = av.VideoFrame(raw.width, raw.height, name)
    for ours, its in zip(planes(copy), planes(raw), strict=True):
        ours[:] = its
    copy.duration = raw.duration
    copy.colorspace, copy.color_range = raw.colorspace, 2 if colours_of(raw).full else raw.color_range
    return copy


def closest_layout(raw: VideoFrame, *, even: bool) -> str:
    """The name of the layout that `changeable` is best asked for.

    Args:
        raw: a frame.
        even: whether the encoder takes no picture whose last chroma samples stand for fewer pixels than the others.
    """
    bits = max(part.bits for part in raw.format.components)
    name = _planar_name(raw)
    if name not in LAYOUTS:
        name = "yuv420p10le" if bits > 8 else "yuv420p"
    if even and (raw.width % LAYOUTS[name].across or raw.height % LAYOUTS[name].down):
        return "yuv444p10le" if bits > 8 else "yuv444p"
    return name


def _planar_name(raw: VideoFrame) -> str:
    return raw.format.name.replace("yuvj", "yuv")  # which says only that the range is full


def planes(raw: VideoFrame) -> list[np.ndarray]:
    """Views of a frame's three planes, (H, W) and (h, w) twice, uint8 or uint16."""
    kind = np.dtype(np.uint8 if LAYOUTS[_planar_name(raw)].bits == 8 else np.uint16)
    rows = (np.frombuffer(plane, kind).reshape(plane.height, plane.line_size // kind.itemsize) for plane in raw.planes)  # type: ignore[call-overload]
    return [row[:, : plane.width] for row, plane in zip(rows, raw.planes, strict=True)]


class Canvas(Protocol):
    """What faces are edited on, upright."""

    def aligned(self, box: Box) -> Box:
        """The smallest box around the part of a box that is in the picture, of those that `colours` and `add` take."""

    def colours(self, box: Box) -> Tensor:  # (3, h, w) float32 in [-1, 1]
        """The colours of an aligned box."""

    def add(
        self,
        box: Box,
        change: Tensor,  # (3, h, w) float32, the difference of colours in [-1, 1]
    ) -> None:
        """Change the colours of an aligned box."""


class PictureCanvas:
    """A picture, (H, W, 3) uint8, changed in place."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def aligned(self, box: Box) -> Box:
        height, width = self.pixels.shape[:2]
        return Box(max(box.left, 0), max(box.top, 0), min(box.right, width), min(box.bottom, height))

    def colours(self, box: Box) -> Tensor:
        part = self.pixels[box.top : box.bottom, box.left : box.right]
        return torch.from_numpy(part.astype(np.float32)).movedim(2, 0) / 127.5 - 1

    def add(self, box: Box, change: Tensor) -> None:
        part = self.pixels[box.top : box.bottom, box.left : box.right]
        part[:] = (part + change.movedim(0, 2).numpy() * 127.5).round().clip(0, 255)


class FrameCanvas:
    """A frame of one of the `LAYOUTS`, seen upright.

    Args:
        raw: changed in place.
        rotation: degrees counterclockwise that bring it upright.
    """

    def __init__(self, raw: VideoFrame, rotation: int = 0) -> None:
        self.raw, self.turns = raw, rotation // 90
        self.planes = planes(raw)
        self.layout = LAYOUTS[_planar_name(raw)]
        matrix, full = colours_of(raw)
        self.red, self.blue = _WEIGHTS.get(matrix, _BT601)
        unit = 2 ** (self.layout.bits - 8)
        # Levels of luma and chroma from one end of their range to the other, black, and no colour.
        most = 256 * unit - 1
        self.luma, self.chroma = (most, most) if full else (219 * unit, 224 * unit)
        self.black = 0 if full else 16 * unit
        self.grey, self.most = 128 * unit, most

    def aligned(self, box: Box) -> Box:
        # None cuts a chroma sample.
        return self._upright(*self._stored(box))

    def colours(self, box: Box) -> Tensor:
        rows, columns = self._stored(box)
        y, u, v = (
            torch.from_numpy(plane[part].astype(np.float32))
            for plane, part in zip(self.planes, self._parts(rows, columns), strict=True)
        )
        y = (y - self.black) / self.luma
        u, v = (
            ((F.interpolate(c[None, None], y.shape, mode="bilinear", align_corners=False)[0, 0]) - self.grey)
            / self.chroma
            for c in (u, v)
        )
        red, blue = y + (2 - 2 * self.red) * v, y + (2 - 2 * self.blue) * u
        green = (y - self.red * red - self.blue * blue) / (1 - self.red - self.blue)
        return torch.rot90(torch.stack([red, green, blue]) * 2 - 1, self.turns, (1, 2)).clamp(-1, 1)

    def add(self, box: Box, change: Tensor) -> None:
        rows, columns = self._stored(box)
        red, green, blue = torch.rot90(change, -self.turns, (1, 2)) / 2
        y = self.red * red + (1 - self.red - self.blue) * green + self.blue * blue
        down, across = self.layout.down, self.layout.across
        u, v = (
            F.avg_pool2d(c[None, None], (down, across), ceil_mode=True)[0, 0] * self.chroma
            for c in ((blue - y) / (2 - 2 * self.blue), (red - y) / (2 - 2 * self.red))
        )
        changes = (y * self.luma, u, v)
        for plane, part, by in zip(self.planes, self._parts(rows, columns), changes, strict=True):
            before = plane[part]
            before[:] = (before + by.numpy()).round().clip(0, self.most)

    def _stored(self, box: Box) -> tuple[slice, slice]:
        """Rows and columns as stored, widened to whole chroma samples."""
        height, width = self.planes[0].shape
        left, top, right, bottom = box
        if self.turns % 2:
            rows, columns = (left, right), (top, bottom)
        else:
            rows, columns = (top, bottom), (left, right)
        if self.turns in (2, 3):
            rows = (height - rows[1], height - rows[0])
        if self.turns in (1, 2):
            columns = (width - columns[1], width - columns[0])
        return _widened(*rows, self.layout.down, height), _widened(*columns, self.layout.across, width)

    def _upright(self, rows: slice, columns: slice) -> Box:
        height, width = self.planes[0].shape
        across, down = (columns.start, columns.stop), (rows.start, rows.stop)
        if self.turns in (1, 2):
            across = (width - across[1], width - across[0])
        if self.turns in (2, 3):
            down = (height - down[1], height - down[0])
        if self.turns % 2:
            across, down = down, across
        return Box(across[0], down[0], across[1], down[1])

    def _parts(self, rows: slice, columns: slice) -> list[tuple[slice, slice]]:
        down, across = self.layout.down, self.layout.across
        chroma = (
            slice(rows.start // down, -(-rows.stop // down)),
            slice(columns.start // across, -(-columns.stop // across)),
        )
        return [(rows, columns), chroma, chroma]


def _widened(start: int, stop: int, step: int, size: int) -> slice:
    start, stop = max(start, 0), min(stop, size)
    return slice(start - start % step, min(stop + -stop % step, size))
