"""How the prompts of one individual are packed as a tree: a shared prefix, then one segment per description.

    [prefix: SOS, context]  [segment 0: description, EOS]  [segment 1: description, EOS]  …

A token sees the prefix and its own segment, up to itself: just what it sees in a causal tower in the separate, padded
sequence [prefix, segment]. Positions restart after the prefix in every segment, so the features are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptTree:
    """How E prompts are packed into one sequence; hashable, so that kernels can be cached per layout.

    Attributes:
        prefix: tokens that every prompt begins with, at least 1: SOS and the shared context, or SOS alone where each
            emotion has its own context, which then belongs to the segments.
        segment_lengths: tokens of each prompt after the prefix, EOS included, each at least 1.

    Raises:
        TypeError: lengths that are not integers.
        ValueError: a length below 1, or no segment.
    """

    prefix: int
    segment_lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if isinstance(self.segment_lengths, (str, bytes)) or not isinstance(self.segment_lengths, Sequence):
            raise TypeError(f"segment_lengths: got {type(self.segment_lengths).__name__}; takes a tuple of integers")
        object.__setattr__(self, "segment_lengths", tuple(self.segment_lengths))
        if not self.segment_lengths:
            raise ValueError("segment_lengths: got none; takes at least one segment")
        _check_length("prefix", self.prefix)
        for position, length in enumerate(self.segment_lengths):
            _check_length(f"segment_lengths[{position}]", length)

    @property
    def length(self) -> int:
        """S, the number of tokens in the packed sequence."""
        return self.prefix + sum(self.segment_lengths)

    @property
    def segments(self) -> Tensor:  # (S,) int64, on the CPU
        """The segment of each token, -1 for the prefix."""
        ids = [-1] * self.prefix
        for segment, length in enumerate(self.segment_lengths):
            ids += [segment] * length
        return torch.tensor(ids)

    @property
    def positions(self) -> Tensor:  # (S,) int64, on the CPU
        """The position of each token in its own prompt: 0 to prefix-1, then from prefix in every segment."""
        positions = list(range(self.prefix))
        for length in self.segment_lengths:
            positions += range(self.prefix, self.prefix + length)
        return torch.tensor(positions)

    @property
    def eos(self) -> Tensor:  # (segments,) int64, on the CPU
        """Where each segment ends: the index of its EOS token."""
        return torch.tensor([self.prefix + end - 1 for end in accumulate(self.segment_lengths)])

    def mask(self, device: torch.device | str | None = None) -> Tensor:  # (S, S) bool
        """True where token q (row) may attend to token k (column). Cached per device: do not write to it."""
        if torch.compiler.is_compiling():  # a tensor made while tracing is fake: it must not be cached for real calls
            return _build_mask(self, torch.device(device or "cpu"))
        return _kept_mask(self, torch.empty(0, device=device or "cpu").device)  # "cuda" becomes the current "cuda:0"


@lru_cache(maxsize=64)
def _kept_mask(layout: PromptTree, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used in a later backward
        return _build_mask(layout, device)


def _build_mask(layout: PromptTree, device: torch.device) -> Tensor:
    segments = layout.segments.to(device)
    index = torch.arange(layout.length, device=device)
    query, key = segments[:, None], segments[None, :]
    return (index[None, :] <= index[:, None]) & ((key == -1) | (key == query))


def _check_length(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}; takes an int")
    if value < 1:
        raise ValueError(f"{name}: got {value}; takes at least 1")
