r"""The reader: small frozen networks that read speech and identity from drawn faces, as a loss for stage 2 (ours).

    speech = mean |speech(edited) − speech(source)| / range
    person = 1 − mean cos(identity(edited), identity(source))

It is to drawn faces what a lip reader and a face recogniser are to real ones: it notices when the lips say something
else or the face becomes another person's, whatever the emotion. It reads neither emotions nor action units, so it
teaches no expression, and it shares no people, weights, seed or layers with the judge that evaluates the edits.

What a loss needs is that two frames of one person are read alike, whatever each shows. So it learns from pairs,

    loss = (error of each frame's speech) + (error of the difference between the two) + (error of the person)
         + (errors of action units and of the emotion, which heads of their own read and which are dropped)

on people who show an emotion at any intensity, or a mixture that belongs to none, as unfinished edits do.

It ships with the package. Its networks began as those of an earlier version, which learned from single frames, and were
trained on each by itself, as by

    python -m pcmecl_fast.synthetic.reader --networks fine --start first/reader.safetensors --out second
    python -m pcmecl_fast.synthetic.reader --networks coarse --start second/reader.safetensors --seed 32 --people 70000
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcmecl_fast.clip import ASSETS
from pcmecl_fast.data.emotions import EMOTIONS
from pcmecl_fast.synthetic.augment import SIDE, at_side, augmented, drawn_by
from pcmecl_fast.synthetic.faces import SyntheticFaces
from pcmecl_fast.synthetic.painter import draw
from pcmecl_fast.synthetic.people import ACTION_UNITS, IDENTITY_LENGTH, FrameParameters, speech_difference
from pcmecl_fast.synthetic.training import (
    TrainingConfig,
    load_weights,
    main,
    one_cycle,
    optimise,
    reading_errors,
    save_weights,
    who,
)

log = logging.getLogger("pcmecl_fast")


class Seen(NamedTuple):
    """What one of the reader's networks sees in B frames."""

    speech: Tensor  # (B, 2): openness in [0, 1], spread in [-1, 1]
    identity: Tensor  # (B, K), the people's parameters, each roughly in [-1, 1]


class FaceReader(nn.Module):
    """Two different networks that read frames of any size, (B, 3, H, W) in [-1, 1].

    What fools one rarely fools the other; each gives a reading of its own.
    """

    def __init__(self, hidden: int = 48) -> None:
        super().__init__()
        fine, coarse = (16, 32, 48, 64), (32, 48, 64)
        self.fine = nn.Sequential(
            nn.Conv2d(3, fine[0], 4, stride=2, padding=1), nn.SiLU(),
            *(
                layer
                for i, o in itertools.pairwise(fine)
                for layer in (nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.SiLU(), nn.AvgPool2d(2))
            ),
            *_head(fine[-1], hidden),
        )  # fmt: skip
        self.coarse = nn.Sequential(
            nn.Conv2d(3, coarse[0], 6, stride=4, padding=1), nn.GELU(),
            *(
                layer
                for i, o in itertools.pairwise(coarse)
                for layer in (nn.BatchNorm2d(i), nn.Conv2d(i, o, 4, stride=2, padding=1), nn.GELU())
            ),
            *_head(coarse[-1], hidden),
        )  # fmt: skip

    def forward(self, frames: Tensor) -> list[Seen]:
        frames = at_side(frames)
        return [Seen(*network(frames).split((2, IDENTITY_LENGTH), dim=1)) for network in (self.fine, self.coarse)]


def _head(channels: int, hidden: int) -> list[nn.Module]:
    return [
        nn.Flatten(),
        nn.Linear(channels * (SIDE // 16) ** 2, hidden),
        nn.SiLU(),
        nn.Linear(hidden, 2 + IDENTITY_LENGTH),
    ]


def load_reader(device: torch.device | str | None = None, *, path: Path = ASSETS / "reader.safetensors") -> FaceReader:
    """The shipped reader, or the one at `path`, frozen and in eval mode."""
    reader = FaceReader()
    load_weights(path, reader)
    return reader.eval().requires_grad_(False).to(device)


def reading_losses(
    reader: FaceReader,
    source: Tensor,  # (B, 3, H, W) in [-1, 1]
    edited: Tensor,  # (B, 3, H, W)
    talking: Tensor | None = None,  # (B, 3, H, W)
) -> tuple[Tensor, Tensor]:
    """How far the edits change the speech, as a fraction of its range, and the person.

    Args:
        talking: the edited frames once more, for the speech to have gradients of its own; by default `edited`.

    Returns:
        (speech, person): mean |difference| of what is read, and 1 − mean cosine of the identities; gradients reach
        `talking` and `edited` only.
    """
    with torch.no_grad():
        before = reader(source)
    after = reader(edited)
    said = after if talking is None else reader(talking)
    speech = [speech_difference(y.speech, x.speech).mean() for x, y in zip(before, said, strict=True)]
    person = [1 - F.cosine_similarity(x.identity, y.identity).mean() for x, y in zip(before, after, strict=True)]
    return torch.stack(speech).mean(), torch.stack(person).mean()


@dataclass
class ReaderConfig(TrainingConfig):
    """Options for training the reader."""

    steps: int = 7000
    batch: int = 96
    """Frames per step: pairs of one person's."""
    individuals: int = 2500
    seed: int = 31
    networks: tuple[Literal["fine", "coarse"], ...] = ("fine", "coarse")
    """Those that learn; the others stay as --start has them."""
    mixed: float = 0.25
    """The fraction of faces that show mixtures of expressions."""
    people: int = 60_000
    """Seed of the people: even, since training sets use odd ones, and far from those of held-out people."""


def train(config: ReaderConfig) -> dict[str, float]:
    """Train and save the reader; returns its errors on people it has not seen."""
    torch.manual_seed(config.seed)
    faces = SyntheticFaces(config.individuals, clips=1, frames_per_clip=2, seed=config.people, intensity=(0.0, 1))
    parameters, mixed = _partly_mixed(faces.parameters, config.mixed)
    pixels = drawn_by(lambda rows: draw(faces.identities, parameters[rows], SIDE), len(parameters))
    # A faint expression is not a nameable emotion, nor is a mixture: only clear ones teach the emotion.
    clear = (faces.intensity > 0.5) & ~mixed
    truth = _Truth(parameters.speech, parameters.action_units, who(faces), faces.emotion_index, clear)
    reader = FaceReader()
    if config.start is not None:
        load_weights(config.start, reader)
    pupils = nn.ModuleList(_Pupil(getattr(reader, name)) for name in config.networks)
    pupils.to(memory_format=torch.channels_last)
    pairs, each = config.batch // 2, len(faces) // config.individuals

    def loss(_: int) -> tuple[Tensor, dict[str, Tensor]]:
        person, one = torch.randint(config.individuals, (pairs,)), torch.randint(each, (pairs,))
        other = (one + torch.randint(1, each, (pairs,))) % each
        index = torch.cat([person * each + one, person * each + other])
        frames = augmented(
            pixels[index], zoom=0.07, shift=0.07, blurred=0.3, noise=0.08, mirrored=True, grain=0.02, alike=2
        )
        terms = torch.stack([pupil(frames, truth.of(index)) for pupil in pupils]).sum(0)
        return terms.sum(), dict(zip(("speech", "difference", "person", "units", "emotion"), terms, strict=True))

    optimise("reader", config.steps, *one_cycle(pupils, config), loss)
    save_weights(config.out / "reader.safetensors", reader)
    errors = accuracy(reader.eval())
    log.info("on unseen people: %s", errors)
    return errors


class _Truth(NamedTuple):
    """What is drawn in B frames."""

    speech: Tensor  # (B, 2)
    action_units: Tensor  # (B, A, 2)
    identity: Tensor  # (B, K)
    emotion: Tensor  # (B,) int
    clear: Tensor  # (B,) bool: shows an emotion plainly

    def of(self, rows: Tensor) -> _Truth:
        return _Truth(*(part[rows] for part in self))


class _Pupil(nn.Module):
    """One of the reader's networks as it learns, with a head that only training has."""

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        self.trunk, self.head = network[:-1], network[-1]
        assert isinstance(self.head, nn.Linear)
        self.more = nn.Linear(self.head.in_features, 2 * len(ACTION_UNITS) + len(EMOTIONS))

    def forward(
        self,
        frames: Tensor,  # (B, 3, S, S); the first half is of the same people as the second
        truth: _Truth,
    ) -> Tensor:  # (5,)
        """The weighted errors: of speech, of its difference, of person, action units and emotion."""
        hidden = self.trunk(frames)
        speech, identity = self.head(hidden).split((2, IDENTITY_LENGTH), dim=1)
        units, emotion = self.more(hidden).split((2 * len(ACTION_UNITS), len(EMOTIONS)), dim=1)
        error = speech - truth.speech
        one, other = error.chunk(2)
        named = F.cross_entropy(emotion, truth.emotion, reduction="none") * truth.clear
        return torch.stack(
            [
                10 * error.square().mean(),
                10 * (one - other).square().mean(),
                3 * F.mse_loss(identity, truth.identity),
                5 * F.mse_loss(units, truth.action_units.flatten(1)),
                0.3 * named.sum() / truth.clear.sum().clamp(min=1),
            ]
        )


def _partly_mixed(parameters: FrameParameters, part: float) -> tuple[FrameParameters, Tensor]:
    """The same frames, a fraction of them showing a mix of two frames' expressions that belongs to no emotion.

    Returns:
        (parameters, mixed): the second (B,) bool.
    """
    units = parameters.action_units
    count = len(units)
    mix = units * torch.rand(units.shape[:2])[..., None] + units[torch.randperm(count)] * torch.rand(count, 1, 1)
    mixed = torch.rand(count) < part
    return replace(parameters, action_units=torch.where(mixed[:, None, None], mix, units)), mixed


@torch.no_grad()
def accuracy(reader: FaceReader, *, individuals: int = 24, seed: int = 40_002) -> dict[str, float]:
    """How well each of the reader's networks reads people it has not seen."""
    faces = SyntheticFaces(individuals, clips=1, frames_per_clip=4, seed=seed)
    return {
        f"{measure} {name}": value
        for name, seen in zip(("fine", "coarse"), reader(faces.frames(range(len(faces)))), strict=True)
        for measure, value in reading_errors(seen.speech, seen.identity, faces).items()
    }


if __name__ == "__main__":
    main(train, ReaderConfig)
