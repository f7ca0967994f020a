"""Faces edited on the pictures that they are part of: planned small, calmed in time, and carried out at full size.

editor = FaceEditor(generator, targets, schedule, strength=1)
for canvas in canvases:
    planned = editor.plan(canvas, squares, time)     # looks, changes nothing
...
    editor.carry_out(canvas, planned)                # perhaps with plans averaged over the neighbouring frames
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pcmecl_fast.data.canvas import Box, Canvas
from pcmecl_fast.data.tracks import Square
from pcmecl_fast.models import Generator

FADE = 0.3
"""Seconds in which one emotion goes over into the next."""
FEATHER = 0.08
"""Part of a square's side in which the edit fades out towards its border."""
LARGEST = 1024
"""Pixels of side up to which a face is edited at its own resolution; of a larger one, the change is enlarged."""


@dataclass(frozen=True)
class Schedule:
    """Which emotion is to be shown when.

    Attributes:
        changes: (seconds, emotion), in order: from then on. Before the first of them, nothing is edited.
        fade: seconds that each change takes, half before its time and half after.
    """

    changes: tuple[tuple[float, str], ...]
    fade: float = FADE

    @classmethod
    def always(cls, emotion: str) -> Schedule:
        return cls(((-math.inf, emotion),))

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """`0:02=happy,0:07=neutral`: minutes and seconds, or seconds, or hours too, with decimals.

        Raises:
            ValueError: something else, or times that do not ascend.
        """
        changes = []
        for entry in filter(None, re.split(r"[,\s]+", text)):
            found = re.fullmatch(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)=(\S+)", entry)
            if not found:
                raise ValueError(f"at: takes times and emotions as 0:02=happy,0:07=neutral; got {entry!r}")
            hours, minutes, seconds, emotion = found.groups()
            changes.append((3600 * int(hours or 0) + 60 * int(minutes or 0) + float(seconds), emotion))
        if not changes:
            raise ValueError("at: takes times and emotions as 0:02=happy,0:07=neutral; got none")
        if any(after[0] <= before[0] for before, after in itertools.pairwise(changes)):
            raise ValueError(f"at: takes times that ascend; got {text!r}")
        return cls(tuple(changes))

    @property
    def emotions(self) -> list[str]:
        """The emotions, each once."""
        return list(dict.fromkeys(emotion for _, emotion in self.changes))

    def weights(self, time: float) -> dict[str, float]:
        """How much of each emotion is shown at a time, at most 1 together; those that are not shown are left out."""
        weights: dict[str, float] = {}
        for begin, emotion in self.changes:
            new = min(max((time - begin) / self.fade + 0.5, 0), 1)
            weights = {name: weight * (1 - new) for name, weight in weights.items()}
            weights[emotion] = weights.get(emotion, 0) + new
        return {name: weight for name, weight in weights.items() if weight > 0}


@dataclass(frozen=True)
class Planned:
    """What is to be done to one face of one picture.

    Attributes:
        square: where it is.
        face: (1, 3, L, L) in [-1, 1], as it is.
        plan: (1, C, S, S), the generator's; None changes nothing.
    """

    square: Square
    face: Tensor
    plan: Tensor | None


class FaceEditor:
    """Plans and carries out edits of faces.

    Args:
        generator: in eval mode.
        targets: what drives the generator to each emotion, for one frame.
        schedule: which emotion is shown when; each has its target.
        strength: 0 changes nothing, 1 is the generator's own edit, more exaggerates it.
    """

    def __init__(
        self, generator: Generator, targets: Mapping[str, Tensor], schedule: Schedule, *, strength: float = 1
    ) -> None:
        self.generator, self.targets, self.schedule, self.strength = generator, targets, schedule, strength
        self.device = next(iter(targets.values())).device

    @torch.inference_mode()
    def plan(self, canvas: Canvas, square: Square, time: float) -> Planned:
        """What would be done to a face at a time in seconds; the canvas stays as it is."""
        square = _on_pixels(square)
        face = take(canvas, square).to(self.device)
        plan = None
        weights = self.schedule.weights(time) if self.strength else {}
        if weights:
            size = (self.generator.size, self.generator.size)
            small = F.interpolate(face, size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
            parts = (w * self.generator.plan(small, self.targets[name]) for name, w in weights.items())
            plan = self.strength * torch.stack(list(parts)).sum(0)
        return Planned(square, face, plan)

    @torch.inference_mode()
    def carry_out(self, canvas: Canvas, planned: Planned) -> None:
        """Edit a face on its canvas, fading out towards the border of its square."""
        if planned.plan is None:
            return
        change = self.generator.carry_out(planned.face, planned.plan) - planned.face
        lay(canvas, planned.square, (change * feather(change.shape[-1]).to(change)).cpu())


def take(canvas: Canvas, square: Square) -> Tensor:  # (1, 3, L, L) in [-1, 1]
    """A square of a picture at its own resolution; beyond the picture, its border is repeated."""
    box = canvas.aligned(_around(square))
    colours = canvas.colours(box)[None]
    if _is_on_pixels(square):
        beyond = _beyond(box, _around(square))  # below zero, what is there too much is cut off
        cropped = F.pad(colours, [min(side, 0) for side in beyond])
        return F.pad(cropped, [max(side, 0) for side in beyond], mode="replicate")
    side = max(1, min(round(square[2]), LARGEST))
    x, y = _positions(side) * square[2] / 2
    cos, sin = math.cos(square[3]), math.sin(square[3])
    grid = _in_box(square[0] + cos * x - sin * y, square[1] + sin * x + cos * y, box)
    return F.grid_sample(colours, grid, padding_mode="border", align_corners=False)


def lay(
    canvas: Canvas,
    square: Square,
    change: Tensor,  # (1, 3, L, L)
) -> None:
    """Add a change of colours to a square of a picture; what lies beyond the picture is left out."""
    box = canvas.aligned(_around(square))
    if _is_on_pixels(square):
        canvas.add(box, F.pad(change, _beyond(_around(square), box))[0])
        return
    columns = torch.arange(box.left, box.right) + 0.5 - square[0]
    rows = (torch.arange(box.top, box.bottom) + 0.5 - square[1])[:, None]
    cos, sin = math.cos(square[3]), math.sin(square[3])
    grid = torch.stack([cos * columns + sin * rows, cos * rows - sin * columns], dim=-1)[None] / (square[2] / 2)
    canvas.add(box, F.grid_sample(change, grid, padding_mode="zeros", align_corners=False)[0])


@functools.lru_cache(maxsize=64)
def feather(side: int) -> Tensor:  # (side, side) in [0, 1]
    """1 inside, falling smoothly to 0 at the border."""
    inside = ((1 - _positions(side).abs()) / (2 * FEATHER)).clamp(0, 1).amin(0)
    return inside * inside * (3 - 2 * inside)


_NOTHING = torch.empty(0)

Item = TypeVar("Item")
Plans = dict[Hashable, Planned]


def calmed(
    frames: Iterable[tuple[float, Item, Plans]],  # (seconds, anything, plans by face), in order
    seconds: float,
) -> Iterator[tuple[Item, Plans]]:
    """Plans averaged in time under a Hann window, each frame given back once those around it are known.

    A face that is not there in a neighbouring frame, or not edited, counts as one with a plan of zero, so edits come
    and go softly. No more frames are looked ahead than fit in half of the window.

    Args:
        frames: in order of time.
        seconds: length of the window; 0 changes nothing.
    """
    reach = seconds / 2
    before: deque[tuple[float, Plans]] = deque()
    ahead: deque[tuple[float, Item, Plans]] = deque()

    def calm() -> tuple[Item, Plans]:
        now, item, plans = ahead.popleft()
        while before and now - before[0][0] >= reach:
            before.popleft()
        near = [*before, (now, plans), *((time, planned) for time, _, planned in ahead)]
        weights = [0.5 + 0.5 * math.cos(math.pi * min(abs(time - now) / reach, 1)) if reach else 1 for time, _ in near]
        before.append((now, {face: replace(planned, face=_NOTHING) for face, planned in plans.items()}))
        return item, {
            face: replace(planned, plan=_mean([others.get(face) for _, others in near], weights))
            for face, planned in plans.items()
        }

    for time, item, plans in frames:
        ahead.append((time, item, plans))
        while time - ahead[0][0] >= reach:
            yield calm()
            if not ahead:
                break
    while ahead:
        yield calm()


def _mean(planned: list[Planned | None], weights: list[float]) -> Tensor | None:
    known = [w * one.plan for w, one in zip(weights, planned, strict=True) if one is not None and one.plan is not None]
    return torch.stack(known).sum(0) / sum(weights) if known else None


def _beyond(inner: Box, outer: Box) -> list[int]:
    """How far one box lies beyond another on the left, right, top and bottom, as `F.pad` takes it."""
    return [inner.left - outer.left, outer.right - inner.right, inner.top - outer.top, outer.bottom - inner.bottom]


def _is_on_pixels(square: Square) -> bool:
    x, y, side, angle = square
    return angle == 0 and side <= LARGEST and (x - side / 2) % 1 == (y - side / 2) % 1 == side % 1 == 0


def _on_pixels(square: Square) -> Square:
    """An upright square moved onto whole pixels, so that taking it interpolates nothing."""
    x, y, side, angle = square
    if abs(angle) > 1e-4 or side > LARGEST:
        return square
    whole = max(1, round(side))
    return round(x - whole / 2) + whole / 2, round(y - whole / 2) + whole / 2, float(whole), 0.0


def _positions(side: int) -> Tensor:  # (2, side, side): x, y
    """Pixels' centres in a square from -1 to 1."""
    at = (torch.arange(side) + 0.5) * (2 / side) - 1
    return torch.stack(torch.meshgrid(at, at, indexing="xy"))


def _around(square: Square) -> Box:
    x, y, side, angle = square
    reach = side / 2 * (abs(math.cos(angle)) + abs(math.sin(angle)))
    return Box(*map(math.floor, (x - reach, y - reach)), *map(math.ceil, (x + reach, y + reach)))


def _in_box(x: Tensor, y: Tensor, box: Box) -> Tensor:  # (1, h, w, 2)
    """Positions in a picture as `grid_sample` takes them for a part of it."""
    across, down = box.right - box.left, box.bottom - box.top
    return torch.stack([2 * (x - box.left) / across - 1, 2 * (y - box.top) / down - 1], dim=-1)[None]
