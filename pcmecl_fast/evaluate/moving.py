"""Edited clips as a short loop to look at: one animated picture, which every browser and image viewer plays."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from pcmecl_fast.data.base import FrameDataset
from pcmecl_fast.evaluate.drawing import fitted, font, write_upwards
from pcmecl_fast.files import write_atomically
from pcmecl_fast.synthetic import SyntheticFaces

_SIDE = 192
"""Pixels of a face, at most."""
_MAGNIFIED = 128
"""Up to which small faces are shown at a whole multiple of their size."""
_HEADER, _GAP, _LABEL = 24, 4, 20
_INK, _PALE = "#1d2127", "#6a717c"
_LEAST = 12  # frames
_SECONDS = 3
_RATE = 25.0  # frames a second, where nothing says theirs


@dataclass(frozen=True)
class MovingFaces:
    """A clip and its edits, side by side, above the true edits where they are known.

    Raises:
        ValueError: the number of columns is not that of the frames, or the truth's shape is not that of the edits.
    """

    name: str
    columns: list[str]  # C words above the faces: the source's first
    frames: Tensor  # (T, C, 3, S, S) in [-1, 1]
    rate: float  # frames a second
    truth: Tensor | None = None  # (T, C − 1, 3, S, S) in [-1, 1]

    def __post_init__(self) -> None:
        if self.frames.dim() != 5 or self.frames.shape[1] != len(self.columns):
            raise ValueError(f"frames: takes (T, {len(self.columns)}, 3, S, S), got {tuple(self.frames.shape)}")
        edits = self.frames[:, 1:].shape
        if self.truth is not None and self.truth.shape != edits:
            raise ValueError(f"truth: takes {tuple(edits)}, got {tuple(self.truth.shape)}")

    @cached_property
    def webp(self) -> bytes:
        """The loop as an animated WebP."""
        truth = repeat(None) if self.truth is None else self.truth
        pictures = [_drawn(self, *faces) for faces in zip(self.frames, truth, strict=False)]
        buffer = io.BytesIO()
        pictures[0].save(
            buffer,
            format="WEBP",
            save_all=True,
            append_images=pictures[1:],
            duration=max(1, round(1000 / self.rate)),
            loop=0,
            quality=80,
            method=1,
        )
        return buffer.getvalue()

    @property
    def width(self) -> int:
        """Of the picture, in pixels."""
        return self.label + len(self.columns) * (self.side + _GAP) - _GAP

    @property
    def side(self) -> int:
        """Of a face in the picture."""
        size = self.frames.shape[-1]
        return min(size * max(1, _MAGNIFIED // size), _SIDE)

    @property
    def label(self) -> int:
        """Width of the words that tell edits from truth."""
        return 0 if self.truth is None else _LABEL


@torch.no_grad()
def moving_faces(
    edit: Callable[[Tensor, Tensor], Tensor],  # (frames, target emotions) -> frames
    held: FrameDataset,
    *,
    device: torch.device | str = "cpu",
    clips: int = 2,
) -> list[MovingFaces]:
    """A few clips of different individuals, and of different emotions where there are, edited to every other emotion.

    Empty where the data set has no clips of at least twelve frames; of a longer one, three seconds are shown. Drawn
    faces come with the truth.
    """
    of_clip = held.clips()
    order = of_clip.index.argsort(stable=True)
    lengths = torch.bincount(of_clip.index, minlength=len(of_clip.names))
    starts = lengths.cumsum(0) - lengths
    long_enough = [c for c in range(len(lengths)) if lengths[c] >= _LEAST]
    firsts = held.individual_index[order[starts[long_enough]]], held.emotion_index[order[starts[long_enough]]]
    shown = list[MovingFaces]()
    for k in _various(*(labels.tolist() for labels in firsts), most=clips):
        c, emotion = long_enough[k], int(firsts[1][k])
        rate = (of_clip.rates[c] if of_clip.rates else None) or _RATE
        rows = order[starts[c] : starts[c] + min(int(lengths[c]), round(_SECONDS * rate))]
        source = held.frames(rows)
        targets = [(torch.full((len(rows),), e), name) for e, name in enumerate(held.emotions) if e != emotion]
        edited = [edit(source.to(device), target.to(device)).cpu() for target, _ in targets]
        truth = None
        if isinstance(held, SyntheticFaces) and targets:
            truth = torch.stack([held.truth(rows, target) for target, _ in targets], dim=1)
        columns = [f"source, {held.emotions[emotion]}", *(name for _, name in targets)]
        shown.append(MovingFaces(of_clip.names[c], columns, torch.stack([source, *edited], dim=1), rate, truth))
    return shown


def _various(individuals: list[int], emotions: list[int], *, most: int) -> list[int]:
    """Places of different individuals, with emotions that none before had as long as there are such."""
    chosen = list[int]()
    for repeat_emotions in (False, True):
        for k, (individual, emotion) in enumerate(zip(individuals, emotions, strict=True)):
            taken = individual in (individuals[c] for c in chosen)
            seen = emotion in (emotions[c] for c in chosen)
            if len(chosen) < most and not taken and (repeat_emotions or not seen):
                chosen.append(k)
    return chosen


def save_webp(path: Path, moving: MovingFaces) -> None:
    """Write the loop; OSError where the file cannot be written."""
    write_atomically(path, moving.webp)


def _drawn(
    moving: MovingFaces,
    faces: Tensor,  # (C, 3, S, S)
    truth: Tensor | None,  # (C − 1, 3, S, S)
) -> Image.Image:
    side, small = moving.side, font(13)
    rows = [("edited", 0, faces)] if truth is None else [("edited", 0, faces), ("truth", 1, truth)]
    picture = Image.new("RGB", (moving.width, _HEADER + len(rows) * (side + _GAP) - _GAP), "white")
    pen = ImageDraw.Draw(picture)
    for column, word in enumerate(moving.columns):
        x = moving.label + column * (side + _GAP)
        pen.text((x + side / 2, _HEADER / 2), fitted(word, small, side), _INK, small, anchor="mm")
    for row, (kind, first, shown) in enumerate(rows):
        y = _HEADER + row * (side + _GAP)
        if moving.label:
            write_upwards(picture, kind, moving.label // 2 - 2, y + side // 2, ink=_PALE)
        pixels = ((shown.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for column, face in enumerate(pixels, first):
            image = Image.fromarray(np.ascontiguousarray(face))
            if image.width != side:
                image = image.resize((side, side), Image.Resampling.LANCZOS)
            picture.paste(image, (moving.label + column * (side + _GAP), y))
    return picture
