"""How frames are split into those for training and those that are held out."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from pcmecl_fast.data.base import FrameDataset

Unit = Literal["individual", "clip", "frame", "mead"]

_MEAD_HELD_FROM = 25  # of the clips 1 to 30 of an emotion and level
_MEAD_HELD_FROM_NEUTRAL = 31  # of 1 to 40


def split(
    dataset: FrameDataset,
    *,
    by: Unit = "individual",
    fraction: float = 0.2,
    seed: int = 0,
) -> tuple[FrameDataset, FrameDataset]:
    """Split a data set in two, the same way on every machine and for any order of its frames (ours).

    Each individual, clip or frame gets a number in [0, 1) from a hash of the seed and its name or key; low numbers are
    held out.

    - ``by="individual"``: the `fraction` of the individuals with the lowest numbers, rounded, at least one and never
      all. Measures generalization to new people. Adding frames moves nobody; adding an individual moves at most one
      other, the price of an exact count when people are few.
    - ``by="clip"``: every clip whose number is below `fraction`, so the count is approximate, and a clip's side does
      not depend on the others. One exception keeps every (individual, emotion) in the training part: if all its clips
      would be held out, the one with the highest number stays; so does an only clip. A picture is a clip of its own.
    - ``by="frame"``: the same with frames. Neighbouring frames of a video are near copies, so this measures how well
      known clips are fitted, where there is but one for each individual and emotion.
    - ``by="mead"``: MEAD's own test clips, the last 10 neutral ones (31 to 40) and the last 6 (25 to 30) of each other
      emotion and level; `fraction` and `seed` do not count. By their numbers, so that a clip is on the same side in
      every incomplete copy.

    Args:
        dataset: any data set of frames, subsets included.
        by: the unit that is held out as a whole.
        fraction: the fraction to hold out, in (0, 1).
        seed: each seed gives another split.

    Returns:
        (train, held_out): views with the data set's individuals and emotions, frames in their original order.

    Raises:
        ValueError: `by` or `fraction` out of range, or nothing to hold out: one individual, no clip or frame to spare,
            clips without MEAD's numbers.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: takes a number between 0 and 1, the part to hold out, got {fraction}")
    if by == "individual":
        held = _held_individuals(dataset, fraction, seed)
    elif by in ("clip", "frame"):
        held = _held_units(dataset, by, fraction, seed)
    elif by == "mead":
        held = _held_by_mead(dataset)
    else:
        raise ValueError(f"by: takes {', '.join(get_args(Unit))}, got {by!r}")
    return dataset.subset(~held), dataset.subset(held)


def _held_individuals(dataset: FrameDataset, fraction: float, seed: int) -> Tensor:
    """Which frames are held out with their individual: (L,) bool."""
    present = dataset.individual_index.unique().tolist()
    if len(present) < 2:
        raise ValueError(f'dataset: by="individual" needs at least two individuals with frames, got {len(present)}')
    rank = sorted(present, key=lambda n: _number(seed, dataset.individuals[n]))
    count = min(max(int(fraction * len(present) + 0.5), 1), len(present) - 1)
    return torch.isin(dataset.individual_index, torch.tensor(rank[:count]))


def _held_units(dataset: FrameDataset, by: str, fraction: float, seed: int) -> Tensor:
    """Which frames are held out with their clip, or one by one: (L,) bool."""
    if by == "clip":
        clips = dataset.clips()
        units, of_frame = clips.index.unique(return_inverse=True)
        names: Sequence[str] = [clips.names[i] for i in units.tolist()]
    else:
        names, of_frame = dataset.keys, torch.arange(len(dataset))
    first = torch.zeros(len(names), dtype=torch.int64)  # a frame of each unit, whose labels are the unit's
    first[of_frame] = torch.arange(len(dataset))
    numbers = [_number(seed, name) for name in names]
    groups = zip(dataset.individual_index[first].tolist(), dataset.emotion_index[first].tolist(), strict=True)
    last: dict[tuple[int, int], int] = {}  # the unit with the highest number of each individual and emotion
    for i, group in enumerate(groups):
        if group not in last or numbers[i] > numbers[last[group]]:
            last[group] = i
    held = torch.tensor([number < fraction for number in numbers], dtype=torch.bool)
    held[list(last.values())] = False
    if not held.any():
        raise ValueError(f"fraction: {fraction} of {len(names)} {by}s holds out none, {_why_none(by, numbers, last)}")
    return held[of_frame]


def _why_none(by: str, numbers: list[float], kept: dict[tuple[int, int], int]) -> str:
    """Why nothing is held out, and what helps: a larger fraction does only where there is one to spare."""
    rule = f"training keeps one of each (individual, emotion) group, so that a group needs two {by}s to spare one"
    left = set(kept.values())
    spare = [number for i, number in enumerate(numbers) if i not in left]
    enough = math.floor(100 * min(spare, default=1.0) + 1) / 100
    more = " or split by frame" if by == "clip" else ""
    advice = f"add {by}s{more}" if enough >= 1 else f"take fraction={enough:g} or more, or add {by}s"
    return f"since {rule}{'' if spare else f', and each of the {len(kept)} has one'}; {advice}"


def _held_by_mead(dataset: FrameDataset) -> Tensor:
    clips = dataset.clips()
    if clips.numbers is None or all(number is None for number in clips.numbers):
        raise ValueError(
            "by: mead takes clips with MEAD's numbers: a folder that `pcmecl-fast prepare` made of MEAD; clip holds "
            "out clips of any data set"
        )
    numbers = torch.tensor([-1 if number is None else number for number in clips.numbers])[clips.index]
    neutral = dataset.emotions.index("neutral") if "neutral" in dataset.emotions else -1
    least = torch.where(dataset.emotion_index == neutral, _MEAD_HELD_FROM_NEUTRAL, _MEAD_HELD_FROM)
    held = numbers >= least
    if not held.any() or held.all():
        which = "none" if not held.any() else "all"
        raise ValueError(
            "by: mead holds out the clips numbered 31 and more of neutral, and 25 and more of other emotions, which "
            f"are {which} of these; clip holds out clips of any data set"
        )
    return held


def _number(seed: int, name: str) -> float:
    """A number in [0, 1) that depends only on the seed and the name."""
    # Systems differ in how they compose accents in file names; `random` guarantees no sequence across versions.
    text = f"{seed}/{unicodedata.normalize('NFC', name)}"
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48
