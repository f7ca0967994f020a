"""How an image tower wants its images: colours, resize and shape, read from what open_clip knows of its weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import open_clip
import torch.nn.functional as F
from torch import Tensor

from pcmecl_fast import ops
from pcmecl_fast.ops.frames import INTERPOLATIONS
from pcmecl_fast.wording import did_you_mean, listed, name_some

log = logging.getLogger("pcmecl_fast")

RESIZE_MODES = ("squash", "shortest", "longest")


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before the tower sees it, in open_clip's terms.

    Square frames are resized and have their colours normalised, in every mode; the mode says how others become square.

    Args:
        mean: of each colour in [0, 1].
        std: the same colours' standard deviations, above 0.
        interpolation: "bicubic" or "bilinear", both antialiased.
        resize_mode: "squash" scales the two sides independently; "shortest" cuts out the central square, as long as the
            shorter side; "longest" pads to a square as long as the longer side.
        fill: the grey that "longest" pads with, 0 to 255.

    Raises:
        ValueError: a value that it does not take.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "squash"
    fill: float = 0

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, _colours(name, getattr(self, name)))
        if min(self.std) <= 0:
            raise ValueError(f"std: got {self.std}; takes three numbers above 0")
        for name, takes in {"interpolation": INTERPOLATIONS, "resize_mode": RESIZE_MODES}.items():
            if getattr(self, name) not in takes:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; takes one of {', '.join(takes)}")

    def __call__(
        self,
        frames: Tensor,  # (B, 3, H, W) in [-1, 1]
        size: int,
        *,
        backend: str | None = None,
    ) -> Tensor:  # (B, 3, size, size)
        """What the tower takes: square, resized, with its colours; gradients reach every pixel that is in it."""
        return ops.clip_frames(
            self._square(frames), size, self.mean, self.std, interpolation=self.interpolation, backend=backend
        )

    def _square(self, frames: Tensor) -> Tensor:
        if self.resize_mode == "squash" or not isinstance(frames, Tensor) or frames.ndim != 4:
            return frames  # what is no batch of frames, the operator refuses
        height, width = frames.shape[2:]
        if height == width:
            return frames
        if self.resize_mode == "shortest":
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            return frames[:, :, top : top + side, left : left + side]
        missing = (max(height, width) - width, max(height, width) - height)
        around = [part for each in missing for part in (each // 2, each - each // 2)]  # left, right, top, bottom
        return F.pad(frames, around, value=self.fill / 127.5 - 1)


def preprocessing_of_file(
    name: str, *, like: str | None = None, given: Mapping[str, Any] | None = None
) -> Preprocessing:
    """How a weights file of an architecture of open_clip takes its images: as the architecture's weights tags say.

    Args:
        name: the architecture.
        like: the tag whose preprocessing the file follows; None where all tags agree.
        given: values that come before those of the tags: `mean`, `std`, `interpolation`, `resize_mode`.

    Raises:
        ValueError: the tags differ, and neither `like` nor `given` decides; an unknown tag; a wrong value.

    An architecture without tags is taken as open_clip takes it, with OpenAI's preprocessing, and one line in the log
    says so.
    """
    given = dict(given or {})
    if like is not None:
        return of_open_clip(tag_config(name, like), given)
    tags = {tag: open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}
    if not tags:
        if not {"mean", "std"} <= set(given):
            _say_assumed(name)
        return of_open_clip({}, given)
    choices: dict[Preprocessing, list[str]] = {}
    for tag, config in tags.items():
        choices.setdefault(of_open_clip(config, given), []).append(tag)
    if len(choices) > 1:
        raise ValueError(_which(name, choices))
    return next(iter(choices))


def of_open_clip(config: Mapping[str, Any], given: Mapping[str, Any]) -> Preprocessing:
    """From a preprocessing configuration of open_clip, or a tag's, completed by open_clip's defaults."""
    whole = {**open_clip.transform.merge_preprocess_dict(open_clip.transform.PreprocessCfg(), dict(config)), **given}
    try:
        return Preprocessing(
            whole["mean"], whole["std"], whole["interpolation"], whole["resize_mode"], whole["fill_color"]
        )
    except ValueError as error:
        wrong = str(error).partition(":")[0]
        if wrong in given:
            raise
        raise ValueError(f"{error}, and the model's own configuration says so; pass {wrong}=") from error


def tag_config(name: str, like: str) -> dict[str, Any]:
    """What open_clip has registered for a weights tag."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    if like in tags:
        return open_clip.get_pretrained_cfg(name, like)
    if not tags:
        raise ValueError(f"like: got {like!r}, and open_clip has no weights tag of {name!r}; pass mean= and std=")
    hint = did_you_mean(like, tags)
    raise ValueError(f"like: got {like!r}; takes a weights tag of {name!r}: {name_some(tags)}{hint and '; '}{hint}")


def _colours(name: str, value: Any) -> tuple[float, ...]:
    """Three numbers; one number stands for three, as in open_clip."""
    values = (value,) * 3 if isinstance(value, int | float) else value
    if not isinstance(values, Sequence) or len(values) != 3 or not all(isinstance(v, int | float) for v in values):
        raise ValueError(f"{name}: got {value!r}; takes three numbers")
    return tuple(float(each) for each in values)


@cache
def _say_assumed(name: str) -> None:
    assumed = of_open_clip({}, {})
    log.warning(
        "No weights tag of open_clip says how %s takes its images: OpenAI's preprocessing is assumed (%s). "
        "Pass mean= and std= where the file was trained with another.",
        name,
        _in_words(assumed, ("mean", "std", "interpolation", "resize_mode")),
    )


def _which(name: str, choices: Mapping[Preprocessing, Sequence[str]]) -> str:
    """The question that a file of an architecture with different tags leaves open, with the answers."""
    fields = [f for f in ("mean", "std", "interpolation", "resize_mode") if len({getattr(c, f) for c in choices}) > 1]
    answers = []
    for choice, tags in choices.items():
        others = f", as {len(tags) - 1} more" if len(tags) > 1 else ""
        answers.append(f'like="{tags[0]}" ({_in_words(choice, fields)}{others})')
    return (
        f"pretrained: the weights tags of {name!r} differ in {listed(fields)}, and a file does not say which it "
        f"follows; pass {', '.join(answers)} or {listed([f'{field}=' for field in fields])}"
    )


def _in_words(preprocessing: Preprocessing, fields: Sequence[str]) -> str:
    values = ((field, getattr(preprocessing, field)) for field in fields)
    return ", ".join(
        f"{f} {' '.join(f'{x:.3g}' for x in v)}" if isinstance(v, tuple) else f"{f} {v}" for f, v in values
    )
