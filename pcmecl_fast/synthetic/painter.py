"""Talking faces drawn from parameters by batched tensor operations.

Every frame is a function of (identity, personal style, emotion, speech, pose, light, noise), so any frame can be
drawn again with another emotion and the same speech. That paired truth is what real recordings never have; it is for
evaluation, never for training. The faces are ours; the action units per emotion follow EMFACS.

    activation[n, e, au, side] = intensity · PROTOTYPE[e, au] · gain[n, au] · (1 ± asymmetry[n, au])

`gain` and `asymmetry` are the individual's own way of showing an emotion: what a personalized prompt can know and a
generic one cannot.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from pcmecl_fast.data.base import EMOTIONS, FrameDataset, Indices, as_indices

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

_PROTOTYPES: dict[str, dict[str, float]] = {
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


def emotion_action_units(emotions: Sequence[str] = EMOTIONS) -> Tensor:
    """Activation of each action unit in each emotion at full intensity and with no personal style, (E, A) in [0, 1]."""
    return torch.tensor([[_PROTOTYPES[e].get(au, 0.0) for au in ACTION_UNITS] for e in emotions])


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
        """Everything that makes a face recognisable, standardised to roughly [-1, 1]: (N, len(SHAPE) + 10)."""
        colours = torch.cat([self.skin, self.hair, self.eyes], dim=1) * 2 - 1
        return torch.cat([self.shape, colours, self.hair_length[:, None] * 2 - 1], dim=1)


def sample_identities(n: int, generator: torch.Generator, *, style: float = 1.0) -> Identities:
    """Draw n people. `style` scales how far each one's way of showing emotions is from the average (0: all alike)."""

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


@dataclass(frozen=True)
class FrameParameters:
    """All that a frame shows beside who it is; one row a frame."""

    individual: Tensor  # (B,) int
    action_units: Tensor  # (B, A, 2)
    speech: Tensor  # (B, 2): openness in [0, 1], spread in [-1, 1]
    pose: Tensor  # (B, 5): shift x, shift y, roll (rad), log scale, yaw in [-1, 1]
    light: Tensor  # (B, 3): direction x, direction y, gain − 1
    blink: Tensor  # (B,) in [0, 1]: 0 open, 1 shut
    noise: Tensor  # (B,) int, which noise image

    def __getitem__(self, index: Tensor | slice) -> FrameParameters:
        return FrameParameters(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def __len__(self) -> int:
        return len(self.individual)


_KEPT_VALUES = 100_000_000
"""The most values of frames that a data set keeps, 400 MB."""
_BLOCK = 64


class SyntheticFaces(FrameDataset):
    """A data set of drawn talking faces: for every individual and emotion, `clips` clips of `frames_per_clip` frames.

    Args:
        individuals: how many people, at least 1.
        emotions: names out of `EMOTIONS`, in the order of their indices.
        clips: clips for each individual and emotion.
        frames_per_clip: consecutive frames of one speech track.
        size: side of a frame in pixels.
        seed: the same seed gives the same people and frames.
        style: strength of personal expression styles (0: everyone alike).
        missing: (individual, emotion) index pairs that are left out, as real recordings leave some out.
        intensity: range from which each clip's emotion intensity is drawn.
    """

    def __init__(
        self,
        individuals: int = 12,
        *,
        emotions: Sequence[str] = EMOTIONS,
        clips: int = 2,
        frames_per_clip: int = 8,
        size: int = 64,
        seed: int = 0,
        style: float = 1.0,
        missing: Sequence[tuple[int, int]] = (),
        intensity: tuple[float, float] = (0.75, 1.0),
    ) -> None:
        # A string is a sequence of strings too: its letters.
        if isinstance(emotions, str) or not emotions or len(set(emotions)) != len(emotions):
            raise ValueError(f"emotions: takes a sequence of different names, at least one, got {emotions!r}")
        unknown = [e for e in emotions if e not in _PROTOTYPES]
        if unknown:
            raise ValueError(f"emotions: {unknown} cannot be drawn; takes names out of {list(_PROTOTYPES)}")
        if min(individuals, clips, frames_per_clip, size) < 1:
            raise ValueError("individuals, clips, frames_per_clip and size: each must be at least 1")
        self.size = size
        self.individuals = [f"person-{seed}-{i:03d}" for i in range(individuals)]
        self.emotions = list(emotions)
        generator = torch.Generator().manual_seed(seed)
        self.identities = sample_identities(individuals, generator, style=style)
        self._noise = _noise_images(size, seed)
        left_out = set(missing)
        blocks, self.keys, emotion_index, intensities = [], [], [], []
        for n in range(individuals):
            for e in range(len(self.emotions)):
                for clip in range(clips):
                    # Drawn even when left out, so that leaving one out changes no other frame.
                    strength = intensity[0] + (intensity[1] - intensity[0]) * torch.rand(1, generator=generator)
                    block = _clip_parameters(self.identities, n, e, strength, frames_per_clip, self.emotions, generator)
                    if (n, e) in left_out:
                        continue
                    blocks.append(block)
                    emotion_index += [e] * frames_per_clip
                    intensities += [strength.item()] * frames_per_clip
                    name = f"{self.individuals[n]}/{self.emotions[e]}/clip-{clip:02d}"
                    self.keys += [f"{name}#{t}" for t in range(frames_per_clip)]
        if not blocks:
            raise ValueError("missing: every (individual, emotion) is left out; nothing remains to draw")
        self.parameters = FrameParameters(
            **{f.name: torch.cat([getattr(b, f.name) for b in blocks]) for f in fields(FrameParameters)}
        )
        self.individual_index = self.parameters.individual
        self.emotion_index = torch.tensor(emotion_index)
        self.intensity = torch.tensor(intensities)
        # Drawing takes longer than most of what is done with a frame: a set that is small enough is drawn once.
        small = len(self.keys) * 3 * size**2 <= _KEPT_VALUES
        self._kept = torch.empty(len(self.keys), 3, size, size) if small else None
        self._is_kept = torch.zeros(len(self.keys), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.keys)

    def frames(self, indices: Indices) -> Tensor:
        """Frames in [-1, 1], (len(indices), 3, size, size)."""
        rows = as_indices(indices, len(self))
        if self._kept is None:
            return self._draw(self.parameters[rows])
        # By whole blocks, so that a frame's last bits never depend on what was asked for together with it.
        for block in (rows[~self._is_kept[rows]] // _BLOCK).unique().tolist():
            span = slice(block * _BLOCK, (block + 1) * _BLOCK)
            self._kept[span] = self._draw(self.parameters[span])
            self._is_kept[span] = True
        return self._kept[rows]

    def stamps(self) -> list[str]:
        # The frames are as old as this file and the parameters that they are drawn from.
        digest = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=16)
        for part in (self.identities, self.parameters):
            for f in fields(part):
                value = getattr(part, f.name)
                digest.update(value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
        return [f"{digest.hexdigest()} {self.size}"] * len(self)

    def truth(
        self,
        indices: Indices,
        emotion: Tensor,  # (len(indices),) int
    ) -> Tensor:
        """The same frames with another emotion: same person, speech, pose, light and noise. For evaluation only."""
        index = as_indices(indices, len(self))
        parameters = self.parameters[index]
        swapped = {f.name: getattr(parameters, f.name) for f in fields(parameters)}
        swapped["action_units"] = self.true_action_units(index, emotion)
        return self._draw(FrameParameters(**swapped))

    def true_action_units(self, indices: Tensor, emotion: Tensor) -> Tensor:
        """Action units that these frames' individuals would show for `emotion` at the frames' intensity, (B, A, 2)."""
        individual = self.individual_index[indices]
        return personal_action_units(self.identities, individual, emotion, self.intensity[indices], self.emotions)

    def _draw(self, parameters: FrameParameters) -> Tensor:
        drawn = [
            draw(self.identities, parameters[chunk], self.size) for chunk in torch.arange(len(parameters)).split(128)
        ]
        frames = torch.cat(drawn) if drawn else torch.empty(0, 3, self.size, self.size)
        return (frames + self._noise[parameters.noise]).clamp(-1, 1)


def _clip_parameters(
    identities: Identities,
    individual: int,
    emotion: int,
    intensity: Tensor,
    frames: int,
    emotions: Sequence[str],
    generator: torch.Generator,
) -> FrameParameters:
    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    who = torch.full((frames,), individual)
    units = personal_action_units(identities, who, torch.full((frames,), emotion), intensity.expand(frames), emotions)
    # A head that sways slowly: one sinusoid for each degree of freedom around a random rest pose.
    phase = torch.arange(frames)[:, None] * 0.35 + math.pi * uniform(1, 5)
    reach = torch.tensor([0.04, 0.03, 0.05, 0.03, 0.55])
    pose = reach * (0.7 * uniform(1, 5) + 0.3 * torch.sin(phase))
    light = torch.tensor([0.16, 0.10, 0.12]) * uniform(1, 3)
    blink = torch.zeros(frames)
    if frames >= 6:
        at = int(torch.randint(frames * 3, (1,), generator=generator))
        if at < frames:
            blink[at] = 0.9
    return FrameParameters(
        individual=who,
        action_units=units,
        speech=speech_track(frames, generator),
        pose=pose,
        light=light.expand(frames, 3).contiguous(),
        blink=blink,
        noise=torch.randint(_NOISE_IMAGES, (frames,), generator=generator),
    )


_NOISE_IMAGES = 64


def _noise_images(size: int, seed: int) -> Tensor:
    """A fixed set of sensor-noise images: a frame drawn again gets the very same noise."""
    generator = torch.Generator().manual_seed(seed + 7919)
    return 0.02 * torch.randn(_NOISE_IMAGES, 3, size, size, generator=generator)


def draw(identities: Identities, parameters: FrameParameters, size: int) -> Tensor:
    """Draw frames without noise, (B, 3, size, size) in [-1, 1].

    Layers are painted back to front; each is a signed distance in face units, turned into coverage over one pixel.
    """
    canvas = _Canvas(identities, parameters, size)
    canvas.backdrop()
    canvas.back_hair()
    canvas.neck_and_shirt()
    canvas.head()
    canvas.folds()
    canvas.eyes()
    canvas.brows()
    canvas.nose()
    canvas.mouth()
    canvas.front_hair()
    return canvas.finish()


class _Canvas:
    """The picture being painted and the coordinates of the face: x to the right, y down, the head about 1.4 high."""

    def __init__(self, identities: Identities, parameters: FrameParameters, size: int) -> None:
        who = parameters.individual
        self.shape = {name: identities.shape[who, i][:, None, None] for i, name in enumerate(SHAPE)}
        self.skin, self.hair = identities.skin[who], identities.hair[who]
        self.iris, self.shirt = identities.eyes[who], identities.shirt[who]
        self.background = identities.background[who]
        self.hair_length = identities.hair_length[who][:, None, None]
        units = parameters.action_units.clamp(0, 1.8)
        # unit[name] = (activation on the face's own left = +x, on its right = −x), each (B, 1, 1)
        self.unit = {
            name: (units[:, i, 0][:, None, None], units[:, i, 1][:, None, None]) for i, name in enumerate(ACTION_UNITS)
        }
        self.open = parameters.speech[:, 0][:, None, None]
        self.spread = parameters.speech[:, 1][:, None, None]
        self.blink = parameters.blink[:, None, None]
        self.light = parameters.light
        shift_x, shift_y, roll, log_scale, yaw = (parameters.pose[:, i][:, None, None] for i in range(5))
        steps = (torch.arange(size) + 0.5) * (2 / size) - 1
        self.grid_y, self.grid_x = torch.meshgrid(steps, steps, indexing="ij")
        scale = torch.exp(log_scale) * 0.98
        x, y = self.grid_x - shift_x, self.grid_y - shift_y - 0.06
        self.x = (torch.cos(roll) * x + torch.sin(roll) * y) / scale
        self.y = (-torch.sin(roll) * x + torch.cos(roll) * y) / scale
        self.pixel = 2 / size / scale
        # Turning the head moves the features across the outline, the nose most.
        self.feature_x = self.x - 0.07 * yaw
        self.nose_x = self.x - 0.11 * yaw
        self.picture = self.background[:, :, None, None] * torch.ones(len(who), 3, size, size)
        self.half_width = 0.55 * (1 + 0.10 * self.shape["face_width"])
        self.eye_y = -0.09 + 0.03 * self.shape["eye_height"]
        self.mouth_y = 0.40 + 0.025 * self.shape["mouth_height"]

    def paint(self, colour: Tensor, distance: Tensor, opacity: Tensor | float = 1.0, soft: float = 1.0) -> Tensor:
        """Blend `colour` (B, 3) where `distance` (B, S, S) is negative; returns the coverage."""
        coverage = (0.5 - distance / (self.pixel * soft)).clamp(0, 1) * opacity
        self.picture = self.picture + coverage[:, None] * (colour[:, :, None, None] - self.picture)
        return coverage

    def both(self, name: str) -> Tensor:
        left, right = self.unit[name]
        return (left + right) / 2

    def sides(self) -> list[tuple[int, float]]:
        """(index into the pair of activations, sign of x): the face's left is at +x."""
        return [(0, 1.0), (1, -1.0)]

    def backdrop(self) -> None:
        shade = 1 + 0.12 * self.grid_y
        self.picture = self.picture * (2 - shade)

    def back_hair(self) -> None:
        length = 0.15 + 0.85 * self.hair_length
        radius = self.half_width + 0.10 + 0.04 * self.shape["hair_volume"]
        y = self.y + 0.16
        top = torch.sqrt(self.x**2 / radius**2 + y**2 / 0.70**2) - 1
        sides = torch.maximum(self.x.abs() - radius * (1 - 0.06 * self.y), self.y - length)
        drop = torch.maximum(sides, -0.16 - self.y)
        self.paint(self.hair * 0.75, torch.minimum(top * 0.6, drop), soft=2.0)

    def neck_and_shirt(self) -> None:
        neck = torch.maximum(self.x.abs() - 0.25, 0.3 - self.y)
        self.paint(self.skin * 0.78, neck, soft=1.5)
        shoulders = 0.93 + 0.35 * self.x**2 - self.y
        neckline = 0.20 - torch.sqrt(self.x**2 + (self.y - 0.86) ** 2 + 1e-6)
        self.paint(self.shirt, torch.maximum(shoulders, neckline), soft=1.5)

    def head(self) -> None:
        for _, sign in self.sides():
            ear = torch.sqrt((sign * self.x - self.half_width) ** 2 / 0.35 + (self.y - 0.02) ** 2) - 0.13
            self.paint(self.skin * 0.86, ear)
        chin = 0.74 + 0.05 * self.shape["chin_height"] + 0.085 * self.both("jaw_drop") + 0.035 * self.open
        below = (self.y / chin).clamp(0, 1.2)
        width = self.half_width * (1 - (0.26 + 0.10 * self.shape["jaw_taper"]) * below**2)
        height = torch.where(self.y > 0, chin, torch.full_like(chin, 0.72))
        radius = torch.sqrt((self.x / width) ** 2 + (self.y / height) ** 2 + 1e-9)
        self.face = (radius - 1) * 0.55
        face = self.paint(self.skin, self.face)
        rim = face * (radius.clamp(0, 1) ** 4) * 0.22
        self.picture = self.picture * (1 - rim[:, None])
        blush = self.skin * torch.tensor([1.02, 0.84, 0.82])
        for side, sign in self.sides():
            lift = self.unit["cheek_raise"][side]
            cheek = torch.sqrt((sign * self.feature_x - 0.31) ** 2 + ((self.y - 0.22 + 0.05 * lift) * 1.25) ** 2)
            glow = (1 - cheek / 0.22).clamp(0, 1)
            self.paint(blush, torch.full_like(self.x, -1.0), opacity=glow * (0.35 + 0.4 * lift))

    def folds(self) -> None:
        """Creases that come with the muscles: nasolabial, forehead, frown, nose bridge, chin."""
        dark = self.skin * 0.62
        for side, sign in self.sides():
            u = sign * self.feature_x
            pull = 0.7 * self.unit["lip_corner_pull"][side] + 0.9 * self.unit["upper_lip_raise"][side]
            t = ((self.y - 0.20) / 0.24).clamp(0, 1)
            fold = (u - (0.13 + 0.14 * t**0.8)).abs() - 0.010
            ends = torch.maximum(0.20 - self.y, self.y - 0.44)
            self.paint(dark, torch.maximum(fold, ends), opacity=(0.75 * pull).clamp(0, 0.8), soft=1.4)
            raised = 0.5 * (self.unit["inner_brow_raise"][side] + self.unit["outer_brow_raise"][side])
            for row in (0.0, 0.075):
                line = (self.y + 0.36 + row - 0.04 * u + 0.05 * (u - 0.2) ** 2).abs() - 0.007
                span = torch.maximum(0.02 - u, u - 0.32)
                self.paint(dark, torch.maximum(line, span), opacity=(0.55 * raised).clamp(0, 0.7), soft=1.4)
            frown = self.unit["brow_lower"][side]
            crease = torch.maximum((u - 0.045 - 0.08 * (self.y + 0.25)).abs() - 0.008, (self.y + 0.24).abs() - 0.075)
            self.paint(dark, crease, opacity=(0.75 * frown).clamp(0, 0.85), soft=1.4)
            wrinkle = self.unit["nose_wrinkle"][side]
            for row in (0.0, 0.055, 0.11):
                line = (self.y + 0.08 - row + 0.5 * u).abs() - 0.008
                span = torch.maximum(-u, u - 0.085)
                self.paint(dark, torch.maximum(line, span), opacity=(0.8 * wrinkle).clamp(0, 0.85), soft=1.4)
            crow = self.unit["cheek_raise"][side]
            for slope in (-0.5, 0.0, 0.5):
                line = (self.y - self.eye_y - 0.03 - slope * (u - 0.36)).abs() - 0.006
                span = torch.maximum(0.38 - u, u - 0.46)
                self.paint(dark, torch.maximum(line, span), opacity=(0.6 * crow).clamp(0, 0.7), soft=1.4)

    def eyes(self) -> None:
        white, black = torch.tensor([[0.97, 0.97, 0.96]]), torch.tensor([[0.05, 0.04, 0.04]])
        centre_x = 0.235 * (1 + 0.09 * self.shape["eye_spacing"])
        width = 0.125 * (1 + 0.12 * self.shape["eye_size"])
        for side, sign in self.sides():
            u = sign * self.feature_x - centre_x
            v = self.y - self.eye_y
            wide, tight = self.unit["upper_lid_raise"][side], self.unit["lid_tighten"][side]
            cheek = self.unit["cheek_raise"][side]
            upper = 0.062 * (1 + 0.2 * self.shape["eye_size"]) + 0.034 * wide - 0.026 * tight - 0.010 * cheek
            lower = 0.042 + 0.012 * wide - 0.018 * tight - 0.030 * cheek
            upper = (upper.clamp(min=0.012) * (1 - self.blink)) + 0.004
            lower = lower.clamp(min=0.008) * (1 - 0.6 * self.blink)
            arch = (1 - (u / width) ** 2).clamp(min=0)
            top, bottom = -upper * arch**0.8, lower * arch
            eye = torch.maximum(torch.maximum(top - v, v - bottom), u.abs() - width)
            opened = self.paint(white, eye)
            for radius, colour in ((0.052, self.iris), (0.026, black)):
                disc = torch.sqrt(u**2 + (v + 0.006) ** 2 + 1e-9) - radius
                inside = ((0.5 - disc / self.pixel).clamp(0, 1)) * opened
                self.picture = self.picture + inside[:, None] * (colour[:, :, None, None] - self.picture)
            glint = (0.5 - (torch.sqrt((u - 0.016) ** 2 + (v + 0.024) ** 2 + 1e-9) - 0.013) / self.pixel).clamp(0, 1)
            self.picture = self.picture + (glint * opened)[:, None] * (1 - self.picture)
            edge = u.abs() - width * 1.04
            self.paint(self.hair * 0.25, torch.maximum((v - top + 0.006).abs() - 0.014, edge), opacity=0.95)
            self.paint(self.skin * 0.55, torch.maximum((v - bottom).abs() - 0.005, edge), opacity=0.6)
            bag = torch.maximum((v - bottom - 0.035 + 0.1 * (u / width) ** 2 * 0.2).abs() - 0.006, edge)
            self.paint(self.skin * 0.62, bag, opacity=(0.5 * (cheek + 0.6 * tight)).clamp(0, 0.7), soft=1.4)

    def brows(self) -> None:
        thickness = 0.026 * (1 + 0.35 * self.shape["brow_thickness"])
        rest = self.eye_y - 0.150 - 0.018 * self.shape["brow_height"]
        for side, sign in self.sides():
            u = sign * self.feature_x
            inner, outer = self.unit["inner_brow_raise"][side], self.unit["outer_brow_raise"][side]
            lower = self.unit["brow_lower"][side]
            start = 0.095 - 0.028 * lower
            t = ((u - start) / (0.40 - start)).clamp(0, 1)
            lift = 0.085 * inner * (1 - t) ** 1.2 + 0.085 * outer * (0.35 + 0.65 * t) * (1 - 0.3 * t)
            drop = lower * (0.085 * (1 - t) + 0.015)
            squeeze = 0.03 * self.unit["nose_wrinkle"][side] * (1 - t)
            line = rest - 0.035 * torch.sin(math.pi * (0.15 + 0.75 * t)) - lift + drop + squeeze
            line = line + 0.02 * self.shape["brow_tilt"] * (t - 0.5)
            body = (self.y - line).abs() - thickness * (1.05 - 0.6 * t**2)
            ends = torch.maximum(start - u, u - 0.40)
            self.paint(self.hair * 0.62, torch.maximum(body, ends), soft=1.2)

    def nose(self) -> None:
        tip = 0.19 + 0.03 * self.shape["nose_length"]
        width = 0.082 * (1 + 0.2 * self.shape["nose_width"])
        for side, sign in self.sides():
            u = sign * self.nose_x
            lift = 0.03 * self.unit["nose_wrinkle"][side] + 0.012 * self.unit["upper_lip_raise"][side]
            flare = width * (1 + 0.25 * self.unit["nose_wrinkle"][side])
            nostril = torch.sqrt(((u - flare * 0.52) / 1.5) ** 2 + (self.y - tip + lift) ** 2 + 1e-9) - 0.017
            self.paint(self.skin * 0.38, nostril)
            wing = (
                torch.sqrt((u - flare * 0.55) ** 2 + (self.y - tip + 0.022 + lift) ** 2 + 1e-9) - 0.052
            ).abs() - 0.006
            self.paint(self.skin * 0.66, torch.maximum(wing, flare * 0.8 - u), opacity=0.85)
        bridge = torch.maximum((self.nose_x - 0.055).abs() - 0.013, (self.y - 0.02).abs() - 0.13)
        self.paint(self.skin * 0.80, bridge, opacity=0.55, soft=2.5)
        shine = torch.sqrt(self.nose_x**2 + ((self.y - tip + 0.065) * 0.8) ** 2 + 1e-9) - 0.030
        self.paint((self.skin * 1.12).clamp(0, 1), shine, opacity=0.55, soft=2.5)

    def mouth(self) -> None:
        lip = self.skin * torch.tensor([0.86, 0.52, 0.52])
        dark, teeth = torch.tensor([[0.20, 0.05, 0.06]]), torch.tensor([[0.95, 0.94, 0.90]])
        tongue = torch.tensor([[0.72, 0.33, 0.34]])
        drop = self.both("jaw_drop")
        opening = 0.150 * self.open + 0.050 * drop
        tight, chin = self.both("lip_tighten"), self.both("chin_raise")
        thick = 0.036 * (1 + 0.3 * self.shape["lip_thickness"]) * (1 - 0.55 * tight.clamp(0, 1.4))
        thick = thick * (1 - 0.16 * self.spread)
        half = 0.205 * (1 + 0.10 * self.shape["mouth_width"]) * (1 + 0.20 * self.spread - 0.08 * drop - 0.08 * tight)
        u = self.feature_x
        on_left = torch.sigmoid(u / 0.03)

        def by_side(name: str) -> Tensor:
            left, right = self.unit[name]
            return left * on_left + right * (1 - on_left)

        pull, depress, stretch = by_side("lip_corner_pull"), by_side("lip_corner_depress"), by_side("lip_stretch")
        half = half * (1 + 0.20 * pull + 0.26 * stretch + 0.03 * depress)
        t = (u / half).clamp(-1, 1)
        arch = (1 - t**2).clamp(min=0)
        corner = (-0.095 * pull + 0.080 * depress + 0.030 * stretch) * t.abs() ** 2.2
        middle = self.mouth_y + corner + 0.030 * pull * arch - 0.028 * chin * arch + 0.035 * drop
        raised = by_side("upper_lip_raise") * 0.058 * torch.exp(-(((t.abs() - 0.40) / 0.33) ** 2))
        inner_top = middle - 0.30 * opening * arch - raised
        inner_bottom = middle + 0.70 * opening * arch - 0.006 * stretch
        bow = 1 - 0.25 * torch.exp(-((t / 0.16) ** 2))
        outer_top = inner_top - thick * arch**0.7 * bow
        outer_bottom = inner_bottom + thick * 1.25 * arch**0.7
        span = u.abs() - half
        lips = torch.maximum(torch.maximum(outer_top - self.y, self.y - outer_bottom), span)
        self.paint(self.skin * 0.72, lips - 0.012, opacity=0.35, soft=2.0)
        self.paint(lip, lips)
        cavity = torch.maximum(torch.maximum(inner_top - self.y, self.y - inner_bottom), span)
        inside = self.paint(dark, cavity)
        band = self.y - (inner_top + 0.042)
        upper_teeth = (0.5 - band / self.pixel).clamp(0, 1) * inside
        self.picture = self.picture + upper_teeth[:, None] * (teeth[:, :, None, None] - self.picture)
        low = (
            ((self.y - (inner_bottom - 0.045)) / self.pixel + 0.5).clamp(0, 1)
            * inside
            * (self.open * 1.4).clamp(0, 0.8)
        )
        self.picture = self.picture + low[:, None] * (tongue[:, :, None, None] - self.picture)
        seam = torch.maximum((self.y - (inner_top + inner_bottom) / 2).abs() - 0.007, span)
        self.paint(dark, seam, opacity=(1 - opening * 18).clamp(0.0, 0.9))
        for _, sign in self.sides():
            end = torch.sqrt((sign * u - half) ** 2 + (self.y - self._at_corner(middle, u, sign, half)) ** 2 + 1e-9)
            self.paint(self.skin * 0.45, end - 0.013, opacity=0.7)
        dimple = torch.sqrt((u / 1.6) ** 2 + (self.y - self.mouth_y - 0.19) ** 2 + 1e-9) - 0.035
        self.paint(self.skin * 0.72, dimple, opacity=(0.15 + 0.55 * chin).clamp(0, 0.8), soft=3.0)
        below = torch.maximum((self.y - outer_bottom - 0.022).abs() - 0.008, u.abs() - half * 0.5)
        self.paint(self.skin * 0.70, below, opacity=(0.30 + 0.4 * tight).clamp(0, 0.8), soft=2.0)

    def _at_corner(self, middle: Tensor, u: Tensor, sign: float, half: Tensor) -> Tensor:
        """Height of the mouth's centre line at a corner: its value where |u| ≥ half, constant over rows."""
        outside = (sign * u >= half * 0.98).to(middle.dtype)
        weight = outside.sum((1, 2), keepdim=True).clamp(min=1)
        return (middle * outside).sum((1, 2), keepdim=True) / weight

    def front_hair(self) -> None:
        radius = self.half_width + 0.05 + 0.03 * self.shape["hair_volume"]
        cap = torch.sqrt((self.x / radius) ** 2 + ((self.y + 0.05) / 0.76) ** 2 + 1e-9) - 1
        hairline = -0.47 + 0.06 * self.shape["hairline"] + 0.55 * self.x**2 + 0.05 * torch.sin(9 * self.x)
        fringe = torch.maximum(cap * 0.6, self.y - hairline)
        covered = self.paint(self.hair, fringe, soft=1.5)
        strands = covered * (0.06 * torch.sin(38 * self.x + 9 * self.y) + 0.12 * (self.y + 0.6))
        self.picture = self.picture * (1 - strands[:, None])

    def finish(self) -> Tensor:
        toward = self.light[:, 0, None, None] * self.grid_x + self.light[:, 1, None, None] * self.grid_y
        gain = 1 + self.light[:, 2, None, None] + toward
        return (self.picture * gain[:, None]).clamp(0, 1) * 2 - 1
