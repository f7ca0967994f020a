"""Who the drawn people are and what they show: everything that determines a frame before it is painted.

A frame is a function of (identity, personal style, emotion, speech, pose, light, noise). The faces are ours; the action
units of each emotion follow EMFACS.

    activation[n, e, au, side] = intensity · PROTOTYPE[e, au] · gain[n, au] · (1 ± asymmetry[n, au])

`gain` and `asymmetry` are the individual's own way of showing an emotion, which a personalized prompt can capture and
a generic one cannot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pcmecl_fast.data.emotions import EMOTIONS

ACTION_UNITS = (
    "inner_brow_raise",  # AU1
    "outer_brow_raise",  # AU2
    "brow_lower",  # AU4
    "upper_lid_raise",  # AU5
    "cheek_raise",  # AU6
    "lid_tighten",  # AU7
    "nose_wrinkle",  # AU9
    "upper_lip_raise",  # AU10
    "lip_corner_pull",  # AU12
    "lip_corner_depress",  # AU15
    "chin_raise",  # AU17
    "lip_stretch",  # AU20
    "lip_tighten",  # AU23
    "jaw_drop",  # AU26
)

PROTOTYPES: dict[str, dict[str, float]] = {
    "neutral": {},
    "angry": {"brow_lower": 1.0, "upper_lid_raise": 0.2, "lid_tighten": 0.8, "lip_tighten": 1.0},
    "disgusted": {
        "nose_wrinkle": 1.0,
        "upper_lip_raise": 1.0,
        "brow_lower": 0.4,
        "lid_tighten": 0.5,
        "chin_raise": 0.3,
    },
    "fear": {
        "inner_brow_raise": 1.0,
        "outer_brow_raise": 0.3,
        "brow_lower": 0.4,
        "upper_lid_raise": 0.9,
        "lip_stretch": 1.0,
        "jaw_drop": 0.25,
    },
    "happy": {"cheek_raise": 0.9, "lip_corner_pull": 1.0},
    "sad": {"inner_brow_raise": 0.8, "brow_lower": 0.3, "lip_corner_depress": 1.0, "chin_raise": 0.7},
    "surprised": {"inner_brow_raise": 0.9, "outer_brow_raise": 1.0, "upper_lid_raise": 1.0, "jaw_drop": 1.0},
}

HAIR_COLOURS = {
    "black": (0.07, 0.06, 0.06),
    "brown": (0.30, 0.18, 0.10),
    "blond": (0.85, 0.68, 0.38),
    "red": (0.62, 0.25, 0.10),
    "grey": (0.62, 0.62, 0.63),
}
EYE_COLOURS = {"brown": (0.30, 0.17, 0.08), "blue": (0.25, 0.48, 0.75), "green": (0.28, 0.50, 0.28)}
SKIN_TONES = {
    "light": (0.96, 0.80, 0.70),
    "tan": (0.84, 0.62, 0.46),
    "brown": (0.62, 0.41, 0.28),
    "dark": (0.38, 0.24, 0.17),
}

# Geometry that varies smoothly from person to person, each in [-1, 1].
SHAPE = (
    "face_width", "jaw_taper", "chin_height", "eye_spacing", "eye_size", "eye_height", "brow_thickness", "brow_height",
    "brow_tilt", "nose_length", "nose_width", "mouth_width", "mouth_height", "lip_thickness", "hairline", "hair_volume",
)  # fmt: skip

IDENTITY_LENGTH = len(SHAPE) + 10
"""K, the length of an identity vector: the shape, three colours and the length of the hair."""

VISEMES = {  # (openness in [0, 1], spread in [-1 round, 1 wide])
    "rest": (0.0, 0.0),
    "m": (0.0, -0.1),
    "f": (0.12, 0.3),
    "ee": (0.30, 1.0),
    "eh": (0.55, 0.5),
    "ah": (1.0, 0.0),
    "oh": (0.70, -0.7),
    "oo": (0.30, -1.0),
}

SPEECH_SPANS = (1.0, 2.0)
"""The widths of the ranges of openness and spread."""


def emotion_action_units(emotions: Sequence[str] = EMOTIONS) -> Tensor:
    """Activation of each action unit in each emotion at full intensity without personal style, (E, A) in [0, 1]."""
    return torch.tensor([[PROTOTYPES[e].get(au, 0.0) for au in ACTION_UNITS] for e in emotions])


@dataclass(frozen=True)
class Identities:
    """Who the people are: constant over all frames of an individual."""

    shape: Tensor  # (N, len(SHAPE)) in [-1, 1]
    skin: Tensor  # (N, 3) RGB in [0, 1]
    hair: Tensor  # (N, 3)
    eyes: Tensor  # (N, 3)
    shirt: Tensor  # (N, 3)
    background: Tensor  # (N, 3)
    hair_length: Tensor  # (N,) 0 short … 1 long
    gain: Tensor  # (N, A) factor on each action unit, about 0.55 … 1.5
    asymmetry: Tensor  # (N, A) in [-0.5, 0.5]: left side × (1 + a), right side × (1 − a)
    skin_name: list[str]
    hair_name: list[str]
    eye_name: list[str]

    def __len__(self) -> int:
        return len(self.skin)

    def vector(self) -> Tensor:
        """Everything that makes a face recognisable, standardised to roughly [-1, 1]: (N, K)."""
        colours = torch.cat([self.skin, self.hair, self.eyes], dim=1) * 2 - 1
        return torch.cat([self.shape, colours, self.hair_length[:, None] * 2 - 1], dim=1)


def sample_identities(n: int, generator: torch.Generator, *, style: float = 1.0) -> Identities:
    """Draw n people. `style` scales how far each one's way of showing emotions is from average (0: all alike)."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    def pick(palette: dict[str, tuple[float, float, float]], jitter: float) -> tuple[Tensor, list[str]]:
        index = torch.randint(len(palette), (n,), generator=generator)
        colours = torch.tensor(list(palette.values()))[index] * (1 + jitter * uniform(n, 1)) + 0.02 * uniform(n, 3)
        return colours.clamp(0.02, 0.98), [list(palette)[i] for i in index.tolist()]

    skin, skin_name = pick(SKIN_TONES, 0.08)
    hair, hair_name = pick(HAIR_COLOURS, 0.12)
    eyes, eye_name = pick(EYE_COLOURS, 0.12)
    return Identities(
        shape=uniform(n, len(SHAPE)),
        skin=skin,
        hair=hair,
        eyes=eyes,
        shirt=0.45 + 0.22 * uniform(n, 1) + 0.2 * uniform(n, 3),
        background=0.62 + 0.18 * uniform(n, 1) + 0.09 * uniform(n, 3),
        hair_length=torch.rand(n, generator=generator),
        gain=torch.exp(0.42 * style * uniform(n, len(ACTION_UNITS))),
        asymmetry=0.45 * style * uniform(n, len(ACTION_UNITS)),
        skin_name=skin_name,
        hair_name=hair_name,
        eye_name=eye_name,
    )


def personal_action_units(
    identities: Identities,
    individual: Tensor,  # (B,) int
    emotion: Tensor,  # (B,) int into `emotions`
    intensity: Tensor,  # (B,) in [0, 1]
    emotions: Sequence[str] = EMOTIONS,
) -> Tensor:
    """Left and right activation of every action unit, (B, A, 2), each at least 0 and about 1 at full strength."""
    base = emotion_action_units(emotions)[emotion] * intensity[:, None] * identities.gain[individual]
    asymmetry = identities.asymmetry[individual]
    return torch.stack([base * (1 + asymmetry), base * (1 - asymmetry)], dim=-1)


def speech_track(frames: int, generator: torch.Generator, *, frames_per_syllable: float = 4.0) -> Tensor:
    """A mouth that talks: random visemes joined by cosine easing, (frames, 2) = (openness, spread)."""
    targets = torch.tensor(list(VISEMES.values()))
    count = int(frames / frames_per_syllable) + 3
    chosen = targets[torch.randint(len(targets), (count,), generator=generator)]
    chosen = chosen * (0.75 + 0.25 * torch.rand(count, 1, generator=generator))
    time = torch.arange(frames) / frames_per_syllable + torch.rand(1, generator=generator)
    left = time.floor().long()
    ease = (0.5 - 0.5 * torch.cos(math.pi * (time - left)))[:, None]
    return chosen[left] * (1 - ease) + chosen[left + 1] * ease


def speech_difference(
    speech: Tensor,  # (..., 2): openness and spread
    other: Tensor,  # (..., 2)
) -> Tensor:
    """How far apart two mouths are, each measure as a fraction of its range: (..., 2) in [0, 1]."""
    return (speech - other).abs() / torch.tensor(SPEECH_SPANS, device=speech.device)


@dataclass(frozen=True)
class FrameParameters:
    """Everything a frame shows besides the identity; one row per frame."""

    individual: Tensor  # (B,) int
    action_units: Tensor  # (B, A, 2)
    speech: Tensor  # (B, 2): openness in [0, 1], spread in [-1, 1]
    pose: Tensor  # (B, 5): shift x, shift y, roll (rad), log scale, yaw in [-1, 1]
    light: Tensor  # (B, 3): direction x, direction y, gain − 1
    blink: Tensor  # (B,) in [0, 1]: 0 open, 1 shut
    noise: Tensor  # (B,) int, which noise image

    @classmethod
    def concatenated(cls, parts: Sequence[FrameParameters]) -> FrameParameters:
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    def __getitem__(self, index: Tensor | slice) -> FrameParameters:
        return FrameParameters(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def __len__(self) -> int:
        return len(self.individual)
