"""What all data sets of labelled faces share: labels, frames, and how they are split."""

from __future__ import annotations

import hashlib
import logging
import math
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Literal, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pcmecl_fast.wording import name_some

EMOTIONS = ("neutral", "angry", "disgusted", "fear", "happy", "sad", "surprised")
"""The seven emotions of MEAD, in the order that data sets and reports use."""

KNOWN_EMOTIONS = (*EMOTIONS, "contempt", "calm")
"""`EMOTIONS`, MEAD's eighth (contempt) and the one found only in RAVDESS (calm)."""

Indices = Tensor | Sequence[int]

logger = logging.getLogger(__name__)


class Sample(TypedDict):
    """One item of a `FrameDataset`; the default collation turns the two indices into (B,) int64."""

    frame: Tensor  # (3, S, S) float32 in [-1, 1]
    individual: int
    emotion: int


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
        return len(self.keys)

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
        self.keys = [parent.keys[i] for i in indices.tolist()]

    def frames(self, indices: Indices) -> Tensor:
        return self.parent.frames(self.indices[as_indices(indices, len(self))])

    def stamps(self) -> list[str]:
        of_parent = self.parent.stamps()
        return [of_parent[i] for i in self.indices.tolist()]


def split(
    dataset: FrameDataset,
    *,
    by: Literal["individual", "frame"] = "individual",
    fraction: float = 0.2,
    seed: int = 0,
) -> tuple[FrameDataset, FrameDataset]:
    """Split a data set in two, the same way on every machine and for any order of its frames (ours).

    Each individual or frame gets a number in [0, 1) from a hash of the seed and its name or key; low numbers are held
    out.

    - ``by="individual"``: the `fraction` of the individuals with the lowest numbers, rounded, at least one and never
      all. Measures generalization to new people. Adding frames moves nobody; adding an individual moves at most one
      other, the price of an exact count when people are few.
    - ``by="frame"``: every frame whose number is below `fraction`, so the count is approximate, and a frame's side
      does not depend on the others. One exception keeps every (individual, emotion) in the training part: if all its
      frames would be held out, the one with the highest number stays; so does an only frame. Neighbouring frames of a
      video are near copies, so this measures how well known people are fitted.

    Args:
        dataset: any data set of frames, subsets included.
        by: the unit that is held out as a whole.
        fraction: the fraction to hold out, in (0, 1).
        seed: each seed gives another split.

    Returns:
        (train, held_out): views with the data set's individuals and emotions, frames in their original order.

    Raises:
        ValueError: `by` or `fraction` out of range, or nothing to hold out: one individual, or no frame to spare.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: takes a number between 0 and 1, the part to hold out, got {fraction}")
    if by == "individual":
        held = _held_individuals(dataset, fraction, seed)
    elif by == "frame":
        held = _held_frames(dataset, fraction, seed)
    else:
        raise ValueError(f'by: takes "individual" or "frame", got {by!r}')
    return dataset.subset(~held), dataset.subset(held)


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


def _held_individuals(dataset: FrameDataset, fraction: float, seed: int) -> Tensor:
    """Which frames are held out with their individual: (L,) bool."""
    present = dataset.individual_index.unique().tolist()
    if len(present) < 2:
        raise ValueError(f'dataset: by="individual" needs at least two individuals with frames, got {len(present)}')
    rank = sorted(present, key=lambda n: _number(seed, dataset.individuals[n]))
    count = min(max(int(fraction * len(present) + 0.5), 1), len(present) - 1)
    return torch.isin(dataset.individual_index, torch.tensor(rank[:count]))


def _held_frames(dataset: FrameDataset, fraction: float, seed: int) -> Tensor:
    """Which frames are held out one by one: (L,) bool."""
    numbers = [_number(seed, key) for key in dataset.keys]
    last: dict[tuple[int, int], int] = {}  # the frame with the highest number of each individual and emotion
    for i, group in enumerate(_groups(dataset)):
        if group not in last or numbers[i] > numbers[last[group]]:
            last[group] = i
    held = torch.tensor([number < fraction for number in numbers], dtype=torch.bool)
    held[list(last.values())] = False
    if not held.any():
        raise ValueError(f"fraction: {fraction} of {len(dataset)} frames holds out none, {_why_none(numbers, last)}")
    return held


def _why_none(numbers: list[float], kept: dict[tuple[int, int], int]) -> str:
    """Why no frame is held out, and what helps: a larger fraction does only where there is a frame to spare."""
    rule = "training keeps one of each (individual, emotion) group, so that a group needs two or more to spare one"
    spare = [number for i, number in enumerate(numbers) if i not in kept.values()]
    enough = math.floor(100 * min(spare, default=1.0) + 1) / 100
    advice = "add frames" if enough >= 1 else f"take fraction={enough:g} or more, or add frames"
    return f"since {rule}{'' if spare else f', and each of the {len(kept)} has one'}; {advice}"


def _groups(dataset: FrameDataset) -> Iterable[tuple[int, int]]:
    return zip(dataset.individual_index.tolist(), dataset.emotion_index.tolist(), strict=True)


def _number(seed: int, name: str) -> float:
    """A number in [0, 1) that depends only on the seed and the name."""
    # Systems differ in how they compose accents in file names; `random` guarantees no sequence across versions.
    text = f"{seed}/{unicodedata.normalize('NFC', name)}"
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48
