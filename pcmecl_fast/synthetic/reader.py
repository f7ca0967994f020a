r"""The reader: small frozen networks that read speech and identity from drawn faces, as a loss for stage 2 (ours).

    speech = mean |speech(edited) − speech(source)| / range
    person = 1 − mean cos(identity(edited), identity(source))

It is to drawn faces what a lip reader and a face recogniser are to real ones: it notices when the lips say something
else or the face becomes another person's, whatever the emotion. It reads neither emotions nor action units, so it
teaches no expression, and it shares no people, weights, seed or layers with the judge that evaluates the edits.

Many of the faces it was first trained on show mixtures of expressions that no emotion has, as unfinished edits do; then
it learned to be exact on the emotions themselves. It ships with the package; train it with

    python -m pcmecl_fast.synthetic.reader --out first
    python -m pcmecl_fast.synthetic.reader --start first/reader.safetensors --steps 2500 --mixed 0.1 --lr 0.0015 \
        --people 40320 --seed 32
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from pcmecl_fast.files import write_atomically
from pcmecl_fast.synthetic.augment import augmented, to_bytes
from pcmecl_fast.synthetic.faces import SyntheticFaces
from pcmecl_fast.synthetic.painter import draw
from pcmecl_fast.synthetic.people import IDENTITY_LENGTH, SPEECH_SPANS, FrameParameters

log = logging.getLogger("pcmecl_fast")

ASSETS = Path(__file__).parents[1] / "assets"
SIDE = 64


class Seen(NamedTuple):
    """What one of the reader's networks sees in B frames."""

    speech: Tensor  # (B, 2): openness in [0, 1], spread in [-1, 1]
    identity: Tensor  # (B, K), the people's parameters, each roughly in [-1, 1]


class FaceReader(nn.Module):
    """Two networks that look at frames of any size, (B, 3, H, W) in [-1, 1], in different ways.

    What fools one is seldom made for the other; each is asked by itself.
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
        if frames.shape[-2:] != (SIDE, SIDE):
            frames = F.interpolate(frames, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        return [Seen(*network(frames).split((2, IDENTITY_LENGTH), dim=1)) for network in (self.fine, self.coarse)]


def _head(channels: int, hidden: int) -> list[nn.Module]:
    return [
        nn.Flatten(),
        nn.Linear(channels * (SIDE // 16) ** 2, hidden),
        nn.SiLU(),
        nn.Linear(hidden, 2 + IDENTITY_LENGTH),
    ]


def load_reader(device: torch.device | str | None = None) -> FaceReader:
    """The shipped reader, frozen and in eval mode."""
    return _load(ASSETS / "reader.safetensors").eval().requires_grad_(False).to(device)


def _load(path: Path) -> FaceReader:
    reader = FaceReader()
    # Stored without the batch counters, which only training reads.
    reader.load_state_dict({k: v.float() for k, v in load_file(path).items()}, strict=False)
    return reader


def reading_losses(
    reader: FaceReader,
    source: Tensor,  # (B, 3, H, W) in [-1, 1]
    edited: Tensor,  # (B, 3, H, W)
) -> tuple[Tensor, Tensor]:
    """How much else the edited frames say, as a part of the speech's range, and how much another person they show.

    Returns:
        (speech, person): mean |difference| of what is read, and 1 − mean cosine of the identities; gradients reach
        `edited` only.
    """
    with torch.no_grad():
        before = reader(source)
    after = reader(edited)
    spans = source.new_tensor(SPEECH_SPANS)
    pairs = list(zip(before, after, strict=True))
    speech = [((y.speech - x.speech).abs() / spans).mean() for x, y in pairs]
    person = [1 - F.cosine_similarity(x.identity, y.identity).mean() for x, y in pairs]
    return torch.stack(speech).mean(), torch.stack(person).mean()


@dataclass
class ReaderConfig:
    """How the reader is trained."""

    steps: int = 4000
    """Optimiser steps."""
    batch: int = 96
    """Frames a step."""
    individuals: int = 1500
    """People drawn for training."""
    lr: float = 2e-3
    """Peak learning rate (AdamW, one cycle)."""
    mixed: float = 0.5
    """The part of the faces that show mixtures of expressions."""
    start: Path | None = None
    """Weights to go on from."""
    people: int = 40_000
    """Seed of the people: even, as those of data sets to train on are odd, and far from the held-out people's."""
    seed: int = 31
    """Seed of weights and batches."""
    out: Path = ASSETS
    """Folder that `reader.safetensors` is written to."""


def train(config: ReaderConfig) -> dict[str, float]:
    """Train and save the reader; returns its errors on people it has not seen."""
    torch.manual_seed(config.seed)
    faces = SyntheticFaces(config.individuals, clips=1, frames_per_clip=2, seed=config.people, intensity=(0.0, 1))
    pixels, parameters = _draw_all(faces, config.mixed)
    identity = faces.identities.vector()[faces.individual_index]
    reader = FaceReader() if config.start is None else _load(config.start)
    reader = reader.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=config.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps)

    progress = tqdm(range(config.steps), desc="reader")
    for step in progress:
        index = torch.randint(len(pixels), (config.batch,))
        read = reader(augmented(pixels[index], zoom=0.07, shift=0.07, blurred=0.4, noise=0.08, mirrored=True))
        speech = torch.stack([F.mse_loss(x.speech, parameters.speech[index]) for x in read])
        person = torch.stack([F.mse_loss(x.identity, identity[index]) for x in read])
        loss = (10 * speech + 3 * person).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(speech=f"{speech.mean():.3f}", person=f"{person.mean():.3f}")
    state = {k: v.half().contiguous() for k, v in reader.state_dict().items() if v.is_floating_point()}
    write_atomically(config.out / "reader.safetensors", save(state))
    errors = accuracy(reader.eval())
    log.info("on unseen people: %s", errors)
    return errors


@torch.no_grad()
def accuracy(reader: FaceReader, *, individuals: int = 24, seed: int = 40_002) -> dict[str, float]:
    """How well the reader reads people it has not seen."""
    faces = SyntheticFaces(individuals, clips=1, frames_per_clip=4, seed=seed)
    read = reader(faces.frames(range(len(faces))))
    identity = faces.identities.vector()[faces.individual_index]
    return {
        f"{measure} {name}": value.mean().item()
        for name, seen in zip(("fine", "coarse"), read, strict=True)
        for measure, value in (
            ("mouth_error", (seen.speech - faces.parameters.speech).abs() / torch.tensor(SPEECH_SPANS)),
            ("identity_similarity", F.cosine_similarity(seen.identity, identity)),
        )
    }


def _draw_all(faces: SyntheticFaces, part: float) -> tuple[Tensor, FrameParameters]:
    """Every frame in bytes; a part of them with a mixture of expressions that belongs to no emotion."""
    parameters = faces.parameters
    units = parameters.action_units
    mixed = units * torch.rand(units.shape[:2])[..., None] + units[torch.randperm(len(units))] * torch.rand(
        len(units), 1, 1
    )
    odd = (torch.rand(len(units)) < part)[:, None, None]
    values = {f.name: getattr(parameters, f.name) for f in fields(FrameParameters)}
    parameters = FrameParameters(**values | {"action_units": torch.where(odd, mixed, units)})
    chunks = tqdm(torch.arange(len(parameters)).split(128), desc="drawing faces")
    return torch.cat([to_bytes(draw(faces.identities, parameters[c], SIDE)) for c in chunks]), parameters


if __name__ == "__main__":
    import tyro

    logging.basicConfig(level=logging.INFO)
    train(tyro.cli(ReaderConfig))
