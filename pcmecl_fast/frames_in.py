"""Frames as trainers have them, made into those the criterion computes with: RGB in [-1, 1], alike where masked."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("pcmecl_fast")

TOLERANCE = 0.05
"""How far outside [-1, 1] resizing and rounding take frames."""

RANGES = ((-1, 1), (0, 1), (0, 255))
CHANNELS = ("rgb", "bgr")


@dataclass(frozen=True)
class FrameFormat:
    """What the numbers of a trainer's frames mean.

    Args:
        value_range: black and white of frames of floats, one of `RANGES`. Those of uint8 are 0 and 255 in any case.
        channels: the order of the colours, "rgb" or, as OpenCV reads pictures, "bgr".
        tolerance: how far outside the range values may be before `wrong_values` says so, in half its width.

    Raises:
        ValueError: another range or order.
    """

    value_range: tuple[float, float] = (-1, 1)
    channels: str = "rgb"
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        if not isinstance(self.value_range, Sequence) or tuple(self.value_range) not in RANGES:
            takes = ", ".join(str(each) for each in RANGES[:-1])
            raise ValueError(f"value_range: got {self.value_range!r}; takes {takes} or {RANGES[-1]}")
        object.__setattr__(self, "value_range", tuple(self.value_range))
        if self.channels not in CHANNELS:
            raise ValueError(f"channels: got {self.channels!r}; takes 'rgb' or 'bgr'")

    def __str__(self) -> str:
        low, high = self.value_range
        return f"{self.channels.upper()} in [{low:g}, {high:g}]"

    def rgb(
        self,
        frames: Tensor,  # (…, 3, H, W)
    ) -> Tensor:  # (…, 3, H, W), RGB in [-1, 1]
        """The frames the criterion computes with: the very tensor where it is that already, else float32 at least."""
        low, high = (0, 255) if frames.dtype is torch.uint8 else self.value_range
        if (low, high) != (-1, 1):
            frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
            frames = frames * (2 / (high - low)) - (high + low) / (high - low)
        return frames.flip(-3) if self.channels == "bgr" else frames

    def floats(
        self,
        frames: Tensor,  # uint8
    ) -> Tensor:
        """Frames of bytes as the same frames of floats in `value_range`."""
        low, high = self.value_range
        return frames.float() * ((high - low) / 255) + low

    def fill(self, background: float | Sequence[float] | None) -> Tensor:  # (3, 1, 1), RGB in [-1, 1]
        """A colour in the frames' own range and order, as `masked` takes it; None is black."""
        low, high = self.value_range
        values = low if background is None else background
        colour = list(values) if isinstance(values, Sequence | Tensor) else [values] * 3
        if len(colour) != 3 or not all(low <= float(value) <= high for value in colour):
            raise ValueError(
                f"background: got {background!r}; takes a number or three in [{low:g}, {high:g}], the frames' range"
            )
        fill = torch.tensor([2 * (float(value) - low) / (high - low) - 1 for value in colour])
        return (fill.flip(0) if self.channels == "bgr" else fill)[:, None, None]

    def check(self, source: Any, edited: Any, mask: Any) -> None:
        """Refuse what are no frames, or frames that do not belong together.

        Raises:
            TypeError: what is no tensor, integers other than uint8, edited frames of uint8 where gradients are wanted.
            ValueError: frames of the wrong rank or number, a mask of another shape than theirs.
        """
        for name, frames in (("source_frames", source), ("edited_frames", edited)):
            if not isinstance(frames, Tensor):
                raise TypeError(f"{name}: got {type(frames).__name__}; takes a tensor, (B, 3, H, W), {self}")
            if not frames.is_floating_point() and frames.dtype is not torch.uint8:
                raise TypeError(f"{name}: got {frames.dtype}; takes floats, {self}, or uint8")
        if edited.dtype is torch.uint8 and torch.is_grad_enabled():
            raise TypeError(
                "edited_frames: got torch.uint8, which has no gradient; takes floats as the generator returns them, "
                "or uint8 under torch.no_grad()"
            )
        if edited.ndim not in (3, 4, 5) or edited.shape[-3] != 3:
            raise ValueError(
                f"edited_frames: takes (B, 3, H, W) or (B, T, 3, H, W), or one frame, got {tuple(edited.shape)}"
            )
        count, sources = edited.shape[:-3], source.shape[:-3]
        if source.ndim < 3 or source.shape[-3] != 3 or sources not in (count, count[:1]):
            raise ValueError(
                f"source_frames: takes as many frames as edited_frames {tuple(edited.shape)}, or one for each "
                f"clip of them, got {tuple(source.shape)}"
            )
        if mask is not None:
            _check_mask(mask, source, edited)

    def wrong_values(self, least: float, most: float, *, of_bytes: bool = False) -> tuple[str, str]:
        """What kind of mistake these extremes of frames speak of, and what to do; "" where there is none."""
        if math.isnan(least) or math.isnan(most):
            return "NaN", "there are NaN among the frames, and so the loss and its gradients are NaN"
        if of_bytes:
            if most != 1:
                return "", ""
            return "range", "uint8 of 0 and 1 alone; takes 0 to 255: multiply floats in [0, 1] by 255 before the cast"
        found = f"values from {least:.3g} to {most:.3g}; takes {self}"
        meant = self._meant(least, most)
        if meant is not None:
            recipe = _RECIPES.get(meant, "") if self.value_range == (-1, 1) else ""
            return "range", f"{found}: if these are in [{meant[0]}, {meant[1]}], {recipe}pass value_range={meant}"
        low, high = self.value_range
        margin = self.tolerance * (high - low) / 2
        if least < low - margin or most > high + margin:
            why = "CLIP's mean and deviation belong to the criterion, an unbounded output wants a clamp"
            return "range", f"{found}: {why}"
        return "", ""

    def _meant(self, least: float, most: float) -> tuple[int, int] | None:
        """The range that such values rather belong to; None where that is the one they are said to be in."""
        within_1 = least >= -1 - self.tolerance and most <= 1 + self.tolerance
        if self.value_range == (0, 255):
            if within_1 and (least < 0 or most > 0):  # not black
                return (-1, 1) if least < 0 else (0, 1)
        elif most > 8:
            return 0, 255
        elif self.value_range == (-1, 1):
            return (0, 1) if within_1 and least >= 0 and most > 0.5 else None
        elif within_1 and least < -self.tolerance / 2:
            return -1, 1
        return None


_RECIPES = {(0, 255): "make frames / 127.5 - 1 or ", (0, 1): "make frames * 2 - 1 or "}


class Watch:
    """Looks at frames, and logs once what is wrong with their values: on a CPU at any call, on a GPU at the first."""

    def __init__(self, format: FrameFormat) -> None:
        self.format = format
        self._noted: set[str] = set()

    @torch.no_grad()
    def look(self, name: str, frames: Tensor) -> None:
        if torch.compiler.is_compiling() or self._noted >= {"NaN", "range"} or not frames.numel():
            return
        if frames.device.type != "cpu":
            if name in self._noted or frames.is_meta or (frames.is_cuda and torch.cuda.is_current_stream_capturing()):
                return
            self._noted.add(name)
        least, most = frames.aminmax()
        of_bytes = frames.dtype is torch.uint8
        kind, wrong = self.format.wrong_values(float(least), float(most), of_bytes=of_bytes)
        if kind and kind not in self._noted:
            self._noted.add(kind)
            log.warning("%s: %s", name, wrong)


def masked(
    frames: Tensor,  # (…, 3, H, W), RGB in [-1, 1]
    mask: Tensor,  # (…, 1, H, W), bool, or floats in [0, 1]
    fill: Tensor,  # (3, 1, 1)
) -> Tensor:  # (…, 3, H, W)
    """mask · frames + (1 − mask) · fill. No gradient reaches the mask: it says where the face is, and learns nothing.

    One frame for the T masks of a clip becomes T frames.
    """
    if mask.ndim == 5 and frames.ndim == 4:
        frames = frames[:, None]
    mask, fill = mask.detach().to(frames.device), fill.to(frames)
    if mask.dtype is torch.bool:
        return torch.where(mask, frames, fill)
    return torch.lerp(fill, frames, mask.to(frames.dtype))


def _check_mask(mask: Any, source: Tensor, edited: Tensor) -> None:
    if not isinstance(mask, Tensor) or not (mask.is_floating_point() or mask.dtype is torch.bool):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: got {got}; takes a tensor of bool, or of floats in [0, 1] such as mask / 255")
    size, counts = edited.shape[-2:], (edited.shape[:-3], edited.shape[:-3][:1])
    if mask.ndim < 3 or mask.shape[-3:] != (1, *size) or mask.shape[:-3] not in counts:
        shapes = " or ".join(str((*count, 1, *size)) for count in dict.fromkeys(counts))
        raise ValueError(f"mask: takes {shapes}, got {tuple(mask.shape)}")
    if source.shape[-2:] != size:
        raise ValueError(
            f"source_frames: a mask takes frames of the size of edited_frames {tuple(size)}, got "
            f"{tuple(source.shape[-2:])}"
        )
