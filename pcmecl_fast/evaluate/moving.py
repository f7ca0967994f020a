"""Edited clips as a short loop to look at: one animated picture, which every browser and image viewer plays."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from pcmecl_fast.data.base import FrameDataset
from pcmecl_fast.evaluate.drawing import fitted, font
from pcmecl_fast.files import write_atomically

_SIDE = 192
"""Pixels of a face, at most."""
_HEADER, _GAP = 24, 4
_LEAST = 12  # frames
_SECONDS = 3
_RATE = 25.0  # frames a second, where nothing says theirs


@dataclass(frozen=True)
class MovingFaces:
    """A clip and its edits, side by side.

    Raises:
        ValueError: the number of columns is not that of the frames.
    """

    name: str
    columns: list[str]  # C words above the faces: the source's first
    frames: Tensor  # (T, C, 3, S, S) in [-1, 1]
    rate: float  # frames a second

    def __post_init__(self) -> None:
        if self.frames.dim() != 5 or self.frames.shape[1] != len(self.columns):
            raise ValueError(f"frames: takes (T, {len(self.columns)}, 3, S, S), got {tuple(self.frames.shape)}")

    @property
    def width(self) -> int:
        """Of the picture, in pixels."""
        return len(self.columns) * (self.side + _GAP) - _GAP

    @property
    def side(self) -> int:
        return min(self.frames.shape[-1], _SIDE)


@torch.no_grad()
def moving_faces(
    edit: Callable[[Tensor, Tensor], Tensor],  # (frames, target emotions) -> frames
    held: FrameDataset,
    *,
    device: torch.device | str = "cpu",
    clips: int = 2,
) -> list[MovingFaces]:
    """A few clips of different individuals, edited to every emotion but their own.

    Empty where the data set has no clips of at least twelve frames; of a longer one, three seconds are shown.
    """
    of_clip = held.clips()
    order = of_clip.index.argsort(stable=True)
    lengths = torch.bincount(of_clip.index, minlength=len(of_clip.names))
    starts = lengths.cumsum(0) - lengths
    shown: list[MovingFaces] = []
    seen: set[int] = set()
    for c in (lengths >= _LEAST).nonzero()[:, 0].tolist():
        rate = (of_clip.rates[c] if of_clip.rates else None) or _RATE
        rows = order[starts[c] : starts[c] + min(int(lengths[c]), round(_SECONDS * rate))]
        individual, emotion = int(held.individual_index[rows[0]]), int(held.emotion_index[rows[0]])
        if individual in seen:
            continue
        seen.add(individual)
        source = held.frames(rows)
        targets = [e for e in range(len(held.emotions)) if e != emotion]
        edited = [edit(source.to(device), torch.full((len(rows),), e, device=device)).cpu() for e in targets]
        columns = [f"source, {held.emotions[emotion]}", *(held.emotions[e] for e in targets)]
        shown.append(MovingFaces(of_clip.names[c], columns, torch.stack([source, *edited], dim=1), rate))
        if len(shown) == clips:
            break
    return shown


def as_webp(moving: MovingFaces) -> bytes:
    """The loop as an animated WebP."""
    pictures = [_drawn(moving, faces) for faces in moving.frames]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        format="WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=max(1, round(1000 / moving.rate)),
        loop=0,
        quality=80,
        method=3,
    )
    return buffer.getvalue()


def save_webp(path: Path, moving: MovingFaces) -> None:
    """Write the loop; OSError where the file cannot be written."""
    write_atomically(path, as_webp(moving))


def _drawn(
    moving: MovingFaces,
    faces: Tensor,  # (C, 3, S, S)
) -> Image.Image:
    side = moving.side
    picture = Image.new("RGB", (moving.width, _HEADER + side), "white")
    pen = ImageDraw.Draw(picture)
    pixels = ((faces.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for column, (word, face) in enumerate(zip(moving.columns, pixels, strict=True)):
        x = column * (side + _GAP)
        pen.text((x + side / 2, _HEADER / 2), fitted(word, font(13), side), "#1d2127", font(13), anchor="mm")
        image = Image.fromarray(np.ascontiguousarray(face))
        if image.width != side:
            image = image.resize((side, side), Image.Resampling.LANCZOS)
        picture.paste(image, (x, _HEADER))
    return picture
