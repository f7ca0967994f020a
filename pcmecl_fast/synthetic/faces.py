"""`SyntheticFaces`: a data set of drawn talking faces, with the paired truth that real recordings never have.

Any frame can be redrawn with another emotion and the same speech: for evaluation, never for training.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from pcmecl_fast.data.base import FrameDataset, Indices, as_indices
from pcmecl_fast.data.emotions import EMOTIONS
from pcmecl_fast.synthetic.painter import NOISE_IMAGES, draw, noise_images
from pcmecl_fast.synthetic.people import (
    PROTOTYPES,
    FrameParameters,
    Identities,
    personal_action_units,
    sample_identities,
    speech_track,
)

SOURCES = tuple(Path(__file__).with_name(name) for name in ("people.py", "painter.py", "faces.py"))
"""The files that determine the pixels: if they change, so do the frames."""

_KEPT_VALUES = 100_000_000
"""The most frame values that a data set caches, 400 MB."""
_BLOCK_PIXELS = 16 * 64**2
"""Of the frames that are drawn at a time: a painter's layer of them stays in a processor's cache."""


class SyntheticFaces(FrameDataset):
    """A data set of drawn talking faces: for every individual and emotion, `clips` clips of `frames_per_clip` frames.

    Args:
        individuals: how many people, at least 1.
        emotions: names from `EMOTIONS`, in the order of their indices.
        clips: clips for each individual and emotion.
        frames_per_clip: consecutive frames of one speech track.
        size: side of a frame in pixels.
        seed: the same seed gives the same people and frames.
        style: strength of personal expression styles (0: everyone alike).
        missing: (individual, emotion) index pairs to leave out, as in incomplete real recordings.
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
        _check(individuals, emotions, clips, frames_per_clip, size)
        self.size = size
        self.individuals = [f"person-{seed}-{i:03d}" for i in range(individuals)]
        self.emotions = list(emotions)
        generator = torch.Generator().manual_seed(seed)
        self.identities = sample_identities(individuals, generator, style=style)
        self._noise = noise_images(size, seed)
        self._block = max(1, _BLOCK_PIXELS // size**2)
        self._sample_clips(clips, frames_per_clip, set(missing), intensity, generator)
        # Drawing takes longer than most uses of a frame: a small enough set is drawn only once.
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
        # In whole blocks, so that a frame's last bits never depend on which frames are requested together.
        for block in (rows[~self._is_kept[rows]] // self._block).unique().tolist():
            span = slice(block * self._block, (block + 1) * self._block)
            self._kept[span] = self._draw(self.parameters[span])
            self._is_kept[span] = True
        return self._kept[rows]

    def stamps(self) -> list[str]:
        # Frames change only with the code that draws them and the parameters they are drawn from.
        digest = hashlib.blake2b(b"".join(path.read_bytes() for path in SOURCES), digest_size=16)
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
        return self._draw(replace(self.parameters[index], action_units=self.true_action_units(index, emotion)))

    def true_action_units(
        self,
        indices: Tensor,  # (B,) int
        emotion: Tensor,  # (B,) int
    ) -> Tensor:
        """The action units these frames' individuals would show for `emotion` at the frames' intensity, (B, A, 2)."""
        individual = self.individual_index[indices]
        return personal_action_units(self.identities, individual, emotion, self.intensity[indices], self.emotions)

    def _sample_clips(
        self,
        clips: int,
        frames_per_clip: int,
        left_out: set[tuple[int, int]],
        intensity: tuple[float, float],
        generator: torch.Generator,
    ) -> None:
        """Set the labels and parameters of every frame, ordered by person, then emotion, then clip."""
        shown, self.keys, emotion_index, intensities = [], [], [], []
        least, most = intensity
        for n, e, clip in itertools.product(range(len(self.individuals)), range(len(self.emotions)), range(clips)):
            # Sampled even when left out, so that leaving one out changes no other frame.
            strength = least + (most - least) * torch.rand(1, generator=generator)
            parameters = _clip_parameters(self.identities, n, e, strength, frames_per_clip, self.emotions, generator)
            if (n, e) in left_out:
                continue
            shown.append(parameters)
            emotion_index += [e] * frames_per_clip
            intensities += [strength.item()] * frames_per_clip
            name = f"{self.individuals[n]}/{self.emotions[e]}/clip-{clip:02d}"
            self.keys += [f"{name}#{t}" for t in range(frames_per_clip)]
        if not shown:
            raise ValueError("missing: leaves out every (individual, emotion); nothing remains to draw")
        self.parameters = FrameParameters.concatenated(shown)
        self.individual_index = self.parameters.individual
        self.emotion_index = torch.tensor(emotion_index)
        self.intensity = torch.tensor(intensities)

    def _draw(self, parameters: FrameParameters) -> Tensor:
        chunks = torch.arange(len(parameters)).split(self._block)
        drawn = [draw(self.identities, parameters[chunk], self.size) for chunk in chunks]
        frames = torch.cat(drawn) if drawn else torch.empty(0, 3, self.size, self.size)
        return (frames + self._noise[parameters.noise]).clamp(-1, 1)


def _check(individuals: int, emotions: Sequence[str], clips: int, frames_per_clip: int, size: int) -> None:
    # A string is itself a sequence of strings, its letters.
    if isinstance(emotions, str) or not emotions or len(set(emotions)) != len(emotions):
        raise ValueError(f"emotions: takes a sequence of different names, at least one, got {emotions!r}")
    unknown = [e for e in emotions if e not in PROTOTYPES]
    if unknown:
        raise ValueError(f"emotions: {unknown} cannot be drawn; takes names from {list(PROTOTYPES)}")
    if min(individuals, clips, frames_per_clip, size) < 1:
        raise ValueError("individuals, clips, frames_per_clip and size: each must be at least 1")


def _clip_parameters(
    identities: Identities,
    individual: int,
    emotion: int,
    intensity: Tensor,  # (1,)
    frames: int,
    emotions: Sequence[str],
    generator: torch.Generator,
) -> FrameParameters:
    """One clip of `frames` frames: a person showing one emotion, talking and swaying under constant light."""

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
        noise=torch.randint(NOISE_IMAGES, (frames,), generator=generator),
    )
