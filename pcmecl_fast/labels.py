"""Individuals and emotions as trainers have them, indices or names, made into one index for each frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pcmecl_fast.ops import checks
from pcmecl_fast.wording import did_you_mean, name_some

Labels: TypeAlias = Tensor | str | Sequence[str] | int
"""Indices, (B,) or (B, T); a name for each sample or clip; one name for all; of one frame, a number."""


class Names:
    """The names of a bank's rows or columns, and the indices behind them.

    Args:
        names: different names, in order.
        what: what they name, for messages.
    """

    def __init__(self, names: Sequence[str], what: str) -> None:
        self.names, self.what = list(names), what
        self._index: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name()

    def add(self, name: str) -> None:
        self._by_name()[name] = len(self.names)
        self.names.append(name)

    def indices(self, argument: str, names: Sequence[str], *, way_out: str = "") -> list[int]:
        """Raises ValueError for unknown ones: a line that begins with `argument` and has the closest known names."""
        index = self._by_name()
        unknown = [name for name in dict.fromkeys(names) if name not in index]
        if unknown:
            asked = [f"{name!r} ({did_you_mean(name, self.names)})".removesuffix(" ()") for name in unknown]
            way_out = way_out or f"it has {name_some(self.names)}"
            raise ValueError(f"{argument}: the bank has no {self.what} {name_some(asked, 3)}; {way_out}")
        return [index[name] for name in names]

    def _by_name(self) -> dict[str, int]:
        # Made for the first name: trainers that give indices need none, and a bank may have a million rows.
        if len(self._index) != len(self.names):
            self._index = {name: i for i, name in enumerate(self.names)}
        return self._index


def per_frame(
    argument: str,
    labels: Labels,
    names: Names,
    frames: torch.Size,  # (B,) or (B, T); () of one frame
    device: torch.device,
    *,
    way_out: str = "",
) -> Tensor:  # (frames.numel(),) int, on the device
    """One index for each frame: from one for each, for each clip of them, or one name for all.

    Raises:
        TypeError: labels that are neither indices nor names.
        ValueError: an unknown name, with `way_out`; labels of another number than frames or clips.
    """
    if isinstance(labels, Tensor):
        checks.check_integer(argument, labels)
        index = labels
    elif isinstance(labels, str):
        (of_all,) = names.indices(argument, [labels], way_out=way_out)
        return torch.full((frames.numel(),), of_all, device=device)
    elif isinstance(labels, list | tuple) and all(isinstance(name, str) for name in labels):
        known = names.indices(argument, labels, way_out=way_out)
        # Without waiting for the device: what a copy from ordinary memory needs, it has read before it returns.
        index = torch.tensor(known, dtype=torch.int64).to(device, non_blocking=True)
    elif isinstance(labels, int) and not isinstance(labels, bool) and not frames:
        index = torch.tensor(labels)
    else:
        raise TypeError(f"{argument}: got {_kind(labels)}; takes a tensor of integers, a name, or a list of names")
    if index.shape == frames or (not frames and index.numel() == 1):
        return index.flatten().to(device)
    per_clip = index.shape == frames[:1]
    in_a_row = len(frames) == index.ndim == 1 and len(index) > 0 and frames[0] % len(index) == 0
    if not (per_clip or in_a_row):
        kind = "index" if isinstance(labels, Tensor) else "name"
        raise ValueError(f"{argument}: takes one {kind} per clip or frame of {tuple(frames)}, got {tuple(index.shape)}")
    return index.to(device).repeat_interleave(frames.numel() // max(len(index), 1))


def _kind(labels: object) -> str:
    if isinstance(labels, list | tuple):
        inner = sorted({type(each).__name__ for each in labels})
        return f"a {type(labels).__name__} of {' and '.join(inner)}"
    return type(labels).__name__
