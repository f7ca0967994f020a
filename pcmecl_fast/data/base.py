"""What all data sets of labelled faces share: labels and frames."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pcmecl_fast.wording import name_some

Indices = Tensor | Sequence[int]

logger = logging.getLogger(__name__)


class Sample(TypedDict):
    """One item of a `FrameDataset`; the default collation turns the two indices into (B,) int64."""

    frame: Tensor  # (3, S, S) float32 in [-1, 1]
    individual: int
    emotion: int


@dataclass(frozen=True)
class Clips:
    """The C clips that L frames are from; a picture is a clip of its own."""

    names: list[str]  # C unique names, as stable as keys
    index: Tensor  # (L,) int64 in [0, C)
    numbers: list[int | None] | None = None  # C numbers that the data set itself gives them, where it does
    rates: list[float | None] | None = None  # C rates in frames a second, where they are known


class FrameDataset(Dataset[Sample], ABC):
    """L square frames, each of one individual showing one emotion.

    A data set sets the five attributes below in its constructor and implements `frames`; the rest follows. Names appear
    only in `individuals` and `emotions`: everywhere else an individual or an emotion is its index there.
    """

    individuals: list[str]  # N names
    emotions: list[str]  # E names
    individual_index: Tensor  # (L,) int64 in [0, N)
    emotion_index: Tensor  # (L,) int64 in [0, E)
    keys: list[str]  # L stable, unique names: a relative path, "video.mp4#12" for frame 12 of a video

    @abstractmethod
    def frames(self, indices: Indices) -> Tensor:
        """The frames at `indices`, in that order: (len(indices), 3, S, S) float32 in [-1, 1].

        `indices` are parsed by `as_indices`, which documents what it accepts and raises.
        """

    def pixels(self, indices: Indices) -> Tensor:
        """The same as they are at hand: bytes, (len(indices), S, S, 3) uint8, or what `frames` returns.

        A worker process sends these, and `as_frames` makes frames of them.
        """
        return self.frames(indices)

    def clips(self) -> Clips:
        """Which clip each frame is from. This default takes a key up to its "#" for the clip's name."""
        index: dict[str, int] = {}
        rows = [index.setdefault(key.partition("#")[0], len(index)) for key in self.keys]
        return Clips(list(index), torch.tensor(rows, dtype=torch.int64))

    def stamps(self) -> list[str]:
        """What each frame is made from, L strings: an unchanged stamp guarantees unchanged pixels.

        This default reads every frame. Data sets with a cheaper way to identify their frames override it.
        """
        return [
            hashlib.blake2b(frame.numpy().tobytes(), digest_size=16).hexdigest()
            for chunk in torch.arange(len(self)).split(256)
            for frame in self.frames(chunk)
        ]

    def labels_hash(self) -> str:
        """Which frames there are and how they are labelled, in 16 letters."""
        digest = hashlib.blake2b(repr((self.individuals, self.emotions, self.keys)).encode(), digest_size=8)
        digest.update(self.individual_index.numpy().tobytes() + self.emotion_index.numpy().tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.individual_index)

    def __getitem__(self, index: int) -> Sample:
        return {
            "frame": self.frames([index])[0],
            "individual": int(self.individual_index[index]),
            "emotion": int(self.emotion_index[index]),
        }

    def available(self) -> Tensor:
        """Whether individual n has a frame of emotion e: (N, E) bool."""
        present = torch.zeros(len(self.individuals), len(self.emotions), dtype=torch.bool)
        present[self.individual_index, self.emotion_index] = True
        return present

    def subset(self, indices: Indices) -> FrameDataset:
        """A view of the frames at `indices` that shares this set's pixels and keeps its individuals and emotions.

        An individual or emotion without frames in the view stays in the lists, so indices mean the same in both.
        """
        return FrameSubset(self, as_indices(indices, len(self)))

    def __repr__(self) -> str:
        shape = f"{len(self)} frames, {len(self.individuals)} individuals, {len(self.emotions)} emotions"
        return f"{type(self).__name__}({shape})"


class FrameSubset(FrameDataset):
    """What `FrameDataset.subset` returns: chosen frames of `parent`."""

    def __init__(
        self,
        parent: FrameDataset,
        indices: Tensor,  # (L,) int64 into parent
    ) -> None:
        self.parent = parent
        self.indices = indices
        self.individuals = parent.individuals
        self.emotions = parent.emotions
        self.individual_index = parent.individual_index[indices]
        self.emotion_index = parent.emotion_index[indices]

    @cached_property
    def keys(self) -> list[str]:  # type: ignore[override]  # made when somebody asks: there may be millions
        of_parent = self.parent.keys
        return [of_parent[i] for i in self.indices.tolist()]

    def frames(self, indices: Indices) -> Tensor:
        return self.parent.frames(self.indices[as_indices(indices, len(self))])

    def labels_hash(self) -> str:
        digest = hashlib.blake2b(self.parent.labels_hash().encode(), digest_size=8)
        digest.update(self.indices.numpy().tobytes())
        return digest.hexdigest()

    def pixels(self, indices: Indices) -> Tensor:
        return self.parent.pixels(self.indices[as_indices(indices, len(self))])

    def clips(self) -> Clips:
        of_parent = self.parent.clips()
        return replace(of_parent, index=of_parent.index[self.indices])

    def stamps(self) -> list[str]:
        of_parent = self.parent.stamps()
        return [of_parent[i] for i in self.indices.tolist()]


def check_trainable(dataset: FrameDataset) -> None:
    """Reject a data set that nothing can be learned from, and log what in it will not contribute (ours).

    Learning compares changes between two emotions of one person, so somebody must show two. People who show only one
    are kept, since their frames still teach which prompt matches, but logged by name: they contribute no differences.
    Training also works with a single individual; the log then notes that no other person's changes serve as negatives.
    Individuals without frames, as in a subset, are not counted.

    Raises:
        ValueError: there are no frames, or no individual shows two emotions.
    """
    shown = dataset.available().sum(dim=1)  # (N,) emotions of each individual
    single = [name for name, count in zip(dataset.individuals, shown.tolist(), strict=True) if count == 1]
    present = int((shown > 0).sum())
    if not present:
        raise ValueError("dataset: holds no frames")
    if len(single) == present:
        raise ValueError(
            "dataset: training needs at least one individual with two emotions, to learn from the change between "
            f"them; each of its {present} shows one: {name_some(single)}"
        )
    if single:
        logger.warning("only one emotion, so no change to learn from: %s", name_some(single))
    if present == 1:
        logger.warning("only one individual: changes are not contrasted with another person's")


def as_frames(
    pixels: Tensor,  # (B, S, S, 3) uint8, or frames
) -> Tensor:
    """What `FrameDataset.pixels` returns as frames, (B, 3, S, S) float32 in [-1, 1]."""
    if pixels.dtype != torch.uint8:
        return pixels
    return pixels.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)


def as_indices(indices: Indices, length: int) -> Tensor:
    """Indices as (len(indices),) int64 on the CPU, within [0, length).

    Accepts integers (negative ones count from the end) or a (length,) bool mask.

    Raises:
        TypeError: neither integers nor bool.
        ValueError: not one-dimensional, or a mask of another length.
        IndexError: an index out of range.
    """
    rows = torch.as_tensor(indices, device="cpu")
    if rows.dim() != 1:
        raise ValueError(f"indices: takes one dimension, got shape {tuple(rows.shape)}")
    if rows.dtype == torch.bool:
        if len(rows) != length:
            raise ValueError(f"indices: a mask has one entry for each of the {length} frames, got {len(rows)}")
        return rows.nonzero().squeeze(1)
    if len(rows) == 0:
        # An empty list has no element type, and torch defaults to float.
        return rows.long()
    if rows.is_floating_point() or rows.is_complex():
        raise TypeError(f"indices: takes integers or a bool mask, got {rows.dtype}")
    rows = rows.long()
    outside = rows[(rows < -length) | (rows >= length)]
    if len(outside):
        raise IndexError(f"indices: {int(outside[0])} is out of range for {length} frames")
    return torch.where(rows < 0, rows + length, rows)
