r"""The reader: small frozen networks that read speech and identity from drawn faces, as a loss for stage 2 (ours).

    speech = mean |speech(edited) − speech(source)| / range
    person = 1 − mean cos(identity(edited), identity(source))

It is to drawn faces what a lip reader and a face recogniser are to real ones: it notices when the lips say something
else or the face becomes another person's, whatever the emotion. It reads neither emotions nor action units, so it
teaches no expression, and it shares no people, weights, seed or layers with the judge that evaluates the edits.

It was first trained on faces many of which mix expressions in ways that belong to no emotion, as unfinished edits do,
and then refined on the emotions themselves. It ships with the package; train it with

    python -m pcmecl_fast.synthetic.reader --out first
    python -m pcmecl_fast.synthetic.reader --start first/reader.safetensors --steps 2500 --mixed 0.1 --lr 0.0015 \
        --people 40320 --seed 32
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcmecl_fast.clip import ASSETS
from pcmecl_fast.synthetic.augment import SIDE, at_side, augmented, drawn_by
from pcmecl_fast.synthetic.faces import SyntheticFaces
from pcmecl_fast.synthetic.painter import draw
from pcmecl_fast.synthetic.people import IDENTITY_LENGTH, FrameParameters, speech_difference
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


def reading(
    reader: FaceReader,
    frames: Tensor,  # (B, 3, H, W) in [-1, 1]
) -> Tensor:  # (B, 2 (2 + K))
    """What the reader sees in frames, a row for each, without gradients."""
    with torch.no_grad():
        return torch.cat([part for seen in reader(frames) for part in seen], 1)


def reading_losses(
    reader: FaceReader,
    source: Tensor,  # (B, 3, H, W) in [-1, 1]
    edited: Tensor,  # (B, 3, H, W)
    *,
    read: Tensor | None = None,  # (B, 2 (2 + K)): reading(reader, source), if already known
) -> tuple[Tensor, Tensor]:
    """How far the edits change the speech, as a fraction of its range, and the person.

    Returns:
        (speech, person): mean |difference| of what is read, and 1 − mean cosine of the identities; gradients reach
        `edited` only.
    """
    rows = reading(reader, source) if read is None else read
    after = reader(edited)
    before = [Seen(*row.split((2, IDENTITY_LENGTH), dim=1)) for row in rows.chunk(len(after), dim=1)]
    pairs = list(zip(before, after, strict=True))
    speech = [speech_difference(y.speech, x.speech).mean() for x, y in pairs]
    person = [1 - F.cosine_similarity(x.identity, y.identity).mean() for x, y in pairs]
    return torch.stack(speech).mean(), torch.stack(person).mean()


@dataclass
class ReaderConfig(TrainingConfig):
    """Options for training the reader."""

    batch: int = 96
    individuals: int = 1500
    seed: int = 31
    mixed: float = 0.5
    """The fraction of faces that show mixtures of expressions."""
    people: int = 40_000
    """Seed of the people: even, since training sets use odd ones, and far from those of held-out people."""


def train(config: ReaderConfig) -> dict[str, float]:
    """Train and save the reader; returns its errors on people it has not seen."""
    torch.manual_seed(config.seed)
    faces = SyntheticFaces(config.individuals, clips=1, frames_per_clip=2, seed=config.people, intensity=(0.0, 1))
    parameters, identity = _partly_mixed(faces.parameters, config.mixed), who(faces)
    pixels = drawn_by(lambda rows: draw(faces.identities, parameters[rows], SIDE), len(parameters))
    reader = FaceReader()
    if config.start is not None:
        load_weights(config.start, reader)
    reader = reader.to(memory_format=torch.channels_last)

    def loss(_: int) -> tuple[Tensor, dict[str, Tensor]]:
        index = torch.randint(len(pixels), (config.batch,))
        read = reader(augmented(pixels[index], zoom=0.07, shift=0.07, blurred=0.4, noise=0.08, mirrored=True))
        speech = torch.stack([F.mse_loss(x.speech, parameters.speech[index]) for x in read])
        person = torch.stack([F.mse_loss(x.identity, identity[index]) for x in read])
        return (10 * speech + 3 * person).sum(), {"speech": speech.mean(), "person": person.mean()}

    optimise("reader", config.steps, *one_cycle(reader, config), loss)
    save_weights(config.out / "reader.safetensors", reader)
    errors = accuracy(reader.eval())
    log.info("on unseen people: %s", errors)
    return errors


def _partly_mixed(parameters: FrameParameters, part: float) -> FrameParameters:
    """The same frames, a fraction of them showing a mix of two frames' expressions that belongs to no emotion."""
    units = parameters.action_units
    count = len(units)
    mixed = units * torch.rand(units.shape[:2])[..., None] + units[torch.randperm(count)] * torch.rand(count, 1, 1)
    odd = (torch.rand(count) < part)[:, None, None]
    return replace(parameters, action_units=torch.where(odd, mixed, units))


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
