"""What a step of stage 2 trains on: frames and target emotions drawn for the whole batch, and a rank's part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pcmecl_fast.data.base import FrameDataset
from pcmecl_fast.distributed import share
from pcmecl_fast.prompts import PromptBank
from pcmecl_fast.train.views import draw_views


@dataclass(frozen=True)
class Plan:
    """What a step trains on, before its frames are read: the whole batch, or a rank's share of it."""

    index: Tensor  # (B,) frames of the data set
    reference: Tensor | None  # (B,) frames that show the targets, for a generator driven by them
    row: Tensor  # (B,) rows of the bank
    source: Tensor  # (B,) emotions shown
    target: Tensor  # (B,) target emotions
    view: Tensor  # (B,) numbers of the views that CLIP sees
    frames: int  # in the whole batch
    changed: int  # of these, whose target is another emotion

    def own(self) -> Plan:
        """This rank's share."""
        own = share(len(self.index))
        return replace(self, **{name: x[own] for name, x in _tensors(self).items()})

    def wanted(self) -> Tensor:
        """All frames to read, (B,) or (2 B,)."""
        return self.index if self.reference is None else torch.cat([self.index, self.reference])


@dataclass(frozen=True)
class Batch:
    """A part of a step's batch; `of_…` say which part of it all, of the changed and of the unchanged samples it has."""

    index: Tensor  # (B,) frames of the data set
    frames: Tensor  # (B, 3, S, S)
    drive: Tensor  # (B,) the target emotions, or (B, 3, S, S) frames that show them
    back: Tensor  # of the same kind: leads back to the source
    row: Tensor  # (B,) rows of the bank
    source: Tensor  # (B,) emotions shown
    target: Tensor  # (B,) target emotions
    view: Tensor  # (B,) numbers of the views that CLIP sees
    of_all: float = 1.0
    of_changed: float = 1.0
    of_kept: float = 1.0
    whole: tuple[int, int] = (0, 0)  # frames of the whole batch, and how many are changed

    @classmethod
    def of(cls, plan: Plan, frames: Tensor) -> Batch:
        drive, back = plan.target, plan.source
        if plan.reference is not None:
            frames, drive = frames.split(len(plan.index))
            back = frames
        whole = plan.frames, plan.changed
        return cls(plan.index, frames, drive, back, plan.row, plan.source, plan.target, plan.view, whole=whole)

    def parts(self, count: int) -> list[Batch]:
        """The same in equal parts."""
        frames, changed = self.whole
        found = []
        for k in range(count):
            part = replace(self, **{name: x[share(len(x), of=count, at=k)] for name, x in _tensors(self).items()})
            size, different = len(part.index), int((part.source != part.target).sum())
            found.append(
                replace(
                    part,
                    of_all=size / frames,
                    of_changed=different / max(changed, 1),
                    of_kept=(size - different) / max(frames - changed, 1),
                )
            )
        return found

    def to(self, device: torch.device) -> Batch:
        """On the device, except what is used on the host: `index`, to read features from disk, and `view`."""
        moved = {name: x.to(device) for name, x in _tensors(self).items() if name not in ("index", "view")}
        return replace(self, **moved)


class Plans:
    """Draws frames, target emotions and views; emotions are drawn evenly, so that rare ones are seen as often."""

    def __init__(self, dataset: FrameDataset, bank: PromptBank, *, with_reference: bool, views: int = 0) -> None:
        self.dataset = dataset
        self.with_reference, self.views = with_reference, views
        counts = torch.bincount(dataset.emotion_index, minlength=len(dataset.emotions))
        self.shown = (counts > 0).nonzero()[:, 0]
        # PyTorch adds weights up in float32, in which some of millions would never be drawn: of many frames, first the
        # emotion is drawn and then the frame.
        self.weight = 1.0 / counts[dataset.emotion_index] if len(dataset) <= 2**18 else None
        self.by_emotion = FramesByEmotion(dataset.emotion_index)
        check_emotions(bank, dataset.emotions)
        if bank.condition == "frame":
            self.rows = bank.rows(dataset.keys)
        else:
            self.rows = bank.rows(dataset.individuals)[dataset.individual_index]

    def __call__(self, count: int, generator: torch.Generator) -> Plan:
        if self.weight is None:
            shown = self.shown[torch.randint(len(self.shown), (count,), generator=generator)]
            index = self.by_emotion.draw(shown, generator)
        else:
            index = torch.multinomial(self.weight, count, replacement=True, generator=generator)
        source = self.dataset.emotion_index[index]
        target = self.shown[torch.randint(len(self.shown), (count,), generator=generator)]
        keep = torch.arange(count) % 8 == 7
        target = torch.where(keep, source, target)
        reference = self.by_emotion.draw(target, generator) if self.with_reference else None
        changed = int((source != target).sum())
        view = draw_views(index, self.views, generator)
        return Plan(index, reference, self.rows[index], source, target, view, count, changed)


class FramesByEmotion:
    """Draws frames of given emotions, of anybody who shows them."""

    def __init__(
        self,
        emotion_index: Tensor,  # (L,) int
    ) -> None:
        self.order = emotion_index.argsort(stable=True)
        self.counts = torch.bincount(emotion_index)
        self.starts = self.counts.cumsum(0) - self.counts

    def draw(
        self,
        emotion: Tensor,  # (B,) int, each shown by some frame
        generator: torch.Generator,
    ) -> Tensor:  # (B,) int
        # In float64: of many frames, float32 would never draw some.
        place = torch.rand(len(emotion), generator=generator, dtype=torch.float64) * self.counts[emotion]
        return self.order[self.starts[emotion] + place.long()]


def _tensors(of: Plan | Batch) -> dict[str, Any]:
    return {f.name: x for f in fields(of) if isinstance(x := getattr(of, f.name), Tensor)}


def check_emotions(bank: PromptBank, emotions: Sequence[str]) -> None:
    """Refuse a bank for other emotions than the data's: its columns would mean something else."""
    if bank.emotions != list(emotions):
        raise ValueError(f"bank: has the emotions {bank.emotions}, the data set has {emotions}")
