"""The critics of the adversarial losses: is each patch of a frame real, and is the frame a real one of an emotion?

`PatchDiscriminator` is not given the emotion. `EmotionCritic` scores a whole frame as one of each emotion (ours, after
matching-aware critics: Reed et al. 2016). For real frames x that show e, edits y to the emotion t, their scores, and
h(s) = max(0, 1 − s), the two losses are

    naming(s, e) = h(s_e) + mean_{f ≠ e} h(−s_f)
    patches      = mean h(patch(x)) + mean h(−patch(y))
    emotion      = naming(s(x), e) + fakes · h(−s_t(y))

and the generator's are −mean patch(y) and naming(s(y), t): an edit gains nothing beyond what real frames of the target
have. What the critics are trained on is real, labelled and unpaired. `fakes` says how far edits count against their
target's score: with 1, the critic of a run of 400 steps names 51 % of new people's real frames, and edits gain nothing;
with 0.25 it names 86 %, and they do. It has no spectral norms, with which it learns too slowly.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

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


class Scores(NamedTuple):
    """What a critic says of B frames, positive for real; None where it was not asked."""

    patches: Tensor | None  # (B, 1, H/8, W/8)
    emotion: Tensor | None  # (B, E)


class EmotionCritic(nn.Module):
    """(B, 3, H, W) in [-1, 1] to a score for each emotion, (B, E)."""

    def __init__(self, emotions: int, widths: tuple[int, ...] = (24, 48, 64, 64)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise((3, *widths)):
            layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * widths[-1], emotions))

    def forward(self, frames: Tensor) -> Tensor:
        return self.body(frames)


class Critics(nn.Module):
    """The critics that are wanted, as one."""

    def __init__(self, emotions: int, *, patches: bool, emotion: bool) -> None:
        super().__init__()
        self.patches = PatchDiscriminator() if patches else None
        self.emotion = EmotionCritic(emotions) if emotion else None

    def forward(self, frames: Tensor) -> Scores:
        return Scores(
            None if self.patches is None else self.patches(frames),
            None if self.emotion is None else self.emotion(frames),
        )


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
