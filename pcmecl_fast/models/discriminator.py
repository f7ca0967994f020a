"""The critics of the adversarial losses: is each patch of a frame real, and is the frame a real one of an emotion?

`PatchDiscriminator` is not given the emotion. `EmotionCritic` scores a picture as one of each emotion (ours, after
matching-aware critics: Reed et al. 2016). One sees the face, another the mouth alone, as in GFPGAN (Wang et al. 2021)
some see eyes and mouths: the first is content with brows and lids, and edits grew no teeth. For real frames x that show
e, edits y to the emotion t, their scores, and h(s) = max(0, 1 − s), the losses are

    naming(s, e) = h(s_e) + mean_{f ≠ e} h(−s_f)
    patches      = mean h(patch(x)) + mean h(−patch(y))
    emotion      = naming(s(x), e) + fakes · h(−s_t(y))

and the generator's are −mean patch(y) and naming(s(y), t): an edit gains nothing beyond what real frames of the target
have. What the critics are trained on is real, labelled and unpaired. `fakes` says how far edits count against their
target's score: with 1, the critic of a run of 400 steps names 51 % of new people's real frames, and edits gain nothing;
with 0.25 it names 86 %, and they do. It has no spectral norms, with which it learns too slowly, and sees everything
slightly blurred: the gradient of convolutions that skip pixels alternates from one to the next, and edits followed it
in ripples.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """(B, 3, H, W) in [-1, 1] to a score for each overlapping patch, (B, 1, H/8, W/8); spectrally normalised."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, spectral_norm(nn.Conv2d(4 * width, 1, 3, padding=1)))

    def forward(self, frames: Tensor) -> Tensor:
        return self.body(frames)


class Views(NamedTuple):
    """What critics see of B frames; None where none wants it."""

    face: Tensor | None  # (B, 3, h, w)
    mouth: Tensor | None  # (B, 3, *MOUTH)


class Scores(NamedTuple):
    """What critics say of B frames, positive for real; None where there is no such critic."""

    patches: Tensor | None  # (B, 1, h/8, w/8)
    emotion: Tensor | None  # (B, E)
    emotion_mouth: Tensor | None  # (B, E)


class EmotionCritic(nn.Module):
    """(B, 3, H, W) in [-1, 1] to a score for each emotion, (B, E).

    Args:
        widths: channels of its layers, each of which halves the picture.
        cells: rows and columns in which it is read in the end.
    """

    def __init__(
        self, emotions: int, widths: Sequence[int] = (24, 48, 64, 64), cells: tuple[int, int] = (4, 4)
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise((3, *widths)):
            layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.LeakyReLU(0.2)]
        read = nn.Linear(cells[0] * cells[1] * widths[-1], emotions)
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(cells), nn.Flatten(), read)

    def forward(self, frames: Tensor) -> Tensor:
        return self.body(blurred(frames))


def blurred(
    frames: Tensor,  # (B, C, H, W)
) -> Tensor:
    """Weighed with their neighbours, [1, 2, 1] / 4 in both directions: what alternates between pixels is gone."""
    channels = frames.shape[1]
    row = frames.new_full((3,), 0.25)  # nothing comes from the host
    row[1] = 0.5
    kernel = (row[:, None] * row).expand(channels, 1, 3, 3)
    return F.conv2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), kernel, groups=channels)


MOUTH = (32, 48)
"""Rows and columns in which the critic of mouths sees them, whatever the frames' size."""

MOUTH_WIDTH = 2.5
"""How wide a mouth is with its corners, in widths of the box between the lips."""


def mouths_of(
    frames: Tensor,  # (B, C, H, W)
    box: Sequence[float],  # left, top, right, bottom of the strip between the lips, as fractions of the frame
) -> Tensor:  # (B, C, *MOUTH)
    """The mouths: the strip, `MOUTH_WIDTH` times as wide."""
    height, width = frames.shape[-2:]
    rows, columns = _span(box[1], box[3], height), columns_around(box, MOUTH_WIDTH, width)
    shrinks = rows.stop - rows.start > MOUTH[0] or columns.stop - columns.start > MOUTH[1]
    mouths = F.interpolate(frames[..., rows, columns], MOUTH, mode="bilinear", antialias=shrinks)
    return mouths.contiguous(memory_format=torch.channels_last) if frames.device.type == "cpu" else mouths


def columns_around(box: Sequence[float], times: float, width: int) -> slice:
    """Those of a strip around the middle of a box, so many times as wide as the box, in a frame of `width` pixels."""
    middle, reach = (box[0] + box[2]) / 2, times / 2 * (box[2] - box[0])
    return _span(middle - reach, middle + reach, width)


def _span(start: float, stop: float, side: int) -> slice:
    """At least one pixel, inside the frame."""
    first = min(max(round(start * side), 0), side - 1)
    return slice(first, max(min(round(stop * side), side), first + 1))


class Critics(nn.Module):
    """The critics that are wanted, as one."""

    def __init__(self, emotions: int, *, patches: bool, emotion: bool, emotion_mouth: bool = False) -> None:
        super().__init__()
        self.patches = PatchDiscriminator() if patches else None
        self.emotion = EmotionCritic(emotions) if emotion else None
        self.emotion_mouth = EmotionCritic(emotions, (16, 32, 48), (4, 6)) if emotion_mouth else None

    def forward(self, views: Views) -> Scores:
        return Scores(
            _asked(self.patches, views.face),
            _asked(self.emotion, views.face),
            _asked(self.emotion_mouth, views.mouth),
        )


def _asked(critic: nn.Module | None, seen: Tensor | None) -> Tensor | None:
    return None if critic is None or seen is None else critic(seen)


def realism_loss(
    real: Tensor,  # (B, 1, h, w) scores
    fake: Tensor,  # (B, 1, h, w)
) -> Tensor:
    """mean h(real) + mean h(-fake)."""
    return F.relu(1 - real).float().mean() + F.relu(1 + fake).float().mean()


def naming_loss(
    scores: Tensor,  # (B, E)
    emotion: Tensor,  # (B,) int
) -> Tensor:
    """mean over frames of h(s_e) + mean_{f ≠ e} h(-s_f)."""
    scores = scores.float()
    own = F.one_hot(emotion, scores.shape[1]).bool()
    others = F.relu(1 + scores).masked_fill(own, 0).sum(1) / max(scores.shape[1] - 1, 1)
    return (F.relu(1 - score_of(scores, emotion)) + others).mean()


def emotion_loss(
    real: Tensor,  # (B, E) scores of real frames
    shown: Tensor,  # (B,) int, the emotions that they show
    fake: Tensor,  # (B, E) scores of edits
    target: Tensor,  # (B,) int, the emotions that they should show
    *,
    fakes: float,
) -> Tensor:
    """naming_loss(real, shown) + fakes · mean h(-s_t(fake))."""
    return naming_loss(real, shown) + fakes * F.relu(1 + score_of(fake.float(), target)).mean()


def score_of(
    scores: Tensor,  # (B, E)
    emotion: Tensor,  # (B,) int
) -> Tensor:  # (B,)
    return scores.gather(1, emotion[:, None])[:, 0]
