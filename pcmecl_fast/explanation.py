"""What the criterion says of a batch: numbers to log, and words to choose its weight by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Explanation:
    """What `PCMECLCriterion.explain` says of a batch; as a string, in words.

    The lists have one element for each frame whose target differs from its source emotion, in the batch's order: the
    others ask for nothing. The loss is the mean of `losses`.
    """

    loss: float
    gradient: float
    """|∂loss/∂edited_frames|, the norm over the whole batch."""
    beside: dict[str, float]
    """The same of the other losses."""
    changes: list[float]
    """|δ|, how far each frame's unit features moved."""
    min_change: float
    frames: list[int] = field(default_factory=list)
    """Which frames of the batch these are; those of clips are counted through, (B · T)."""
    losses: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    """⟨δ, d⟩ / (|δ| |d|) with the change asked for, whatever the change's size; 0 of no change."""
    asked: list[str] = field(default_factory=list)
    """The target emotions."""
    nearest: list[str | None] = field(default_factory=list)
    """The emotions whose change of text the frames' change is most like; None of no change."""

    def __str__(self) -> str:
        lines = [f"PCMECL {self.loss:.4g}, gradient in the edited frames {self.gradient:.3g}"]
        lines += [
            f"{name}: gradient {norm:.3g}"
            + (f", as strong at a weight of {norm / self.gradient:.3g}" if self.gradient else "")
            for name, norm in self.beside.items()
        ]
        if self.changes:
            short = sum(change < self.min_change for change in self.changes)
            lines.append(
                f"changes of features from {min(self.changes):.2g} to {max(self.changes):.2g}; {short} of "
                f"{len(self.changes)} below min_change {self.min_change:g}, where the cosine grows with them"
            )
        if self.cosines:
            lines.append(
                f"cosine with the change asked for {_mean(self.cosines):.2f} on average, and no other emotion's is "
                f"nearer in {self._hits()} of {len(self.asked)}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and names for a log: means over the batch, None where no frame asks for a change, and each
        frame's own under "samples"."""
        samples = [
            {"frame": frame, "loss": loss, "cosine": cosine, "length": change, "asked": asked, "nearest": nearest}
            for frame, loss, cosine, change, asked, nearest in zip(
                self.frames, self.losses, self.cosines, self.changes, self.asked, self.nearest, strict=True
            )
        ]
        return {
            "loss": self.loss,
            "gradient": self.gradient,
            "beside": dict(self.beside),
            "min_change": self.min_change,
            "cosine": _mean(self.cosines) if samples else None,
            "length": _mean(self.changes) if samples else None,
            "nearest_is_asked": self._hits() / len(samples) if samples else None,
            "samples": samples,
        }

    def _hits(self) -> int:
        return sum(asked == nearest for asked, nearest in zip(self.asked, self.nearest, strict=True))


def frame_by_frame(
    losses: Tensor,  # (B,)
    cosines: Tensor,  # (B, E) of each frame's change with every change of emotion, whatever its size
    changes: Tensor,  # (B,)
    source_emotion: Tensor,  # (B,)
    target_emotion: Tensor,  # (B,)
    emotions: list[str],
) -> dict[str, Any]:
    """The lists of an `Explanation`."""
    asks = source_emotion != target_emotion
    target, shown = target_emotion.long()[:, None], source_emotion.long()[:, None]
    nearest = cosines.scatter(1, shown, -torch.inf).argmax(1)  # to stay the same is no change
    moved = (cosines != 0).any(1)
    return {
        "changes": changes[asks].tolist(),
        "frames": asks.nonzero()[:, 0].tolist(),
        "losses": losses[asks].tolist(),
        "cosines": cosines.gather(1, target)[asks, 0].tolist(),
        "asked": [emotions[e] for e in target[asks, 0].tolist()],
        "nearest": [
            emotions[e] if moves else None
            for e, moves in zip(nearest[asks].tolist(), moved[asks].tolist(), strict=True)
        ],
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
