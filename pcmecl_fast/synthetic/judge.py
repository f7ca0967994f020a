r"""The judge: a small convolutional network that reads drawn faces, independent of CLIP and of every training loss.

It was trained on the parameters that drew the faces (people that no experiment uses) and reads from a 64×64 frame the
emotion, the action units, the speech (mouth openness and spread, whatever the emotion) and a vector of who it is. It
ships with the package, trained by

    python -m pcmecl_fast.synthetic.judge --steps 6000 --individuals 3000 --out a
    python -m pcmecl_fast.synthetic.judge --start a/judge.safetensors --steps 5000 --individuals 4000 --seed 78 \
        --lr 1e-3
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from pcmecl_fast.data.base import EMOTIONS
from pcmecl_fast.files import write_atomically
from pcmecl_fast.synthetic.augment import augmented, drawn
from pcmecl_fast.synthetic.faces import SyntheticFaces
from pcmecl_fast.synthetic.people import ACTION_UNITS, IDENTITY_LENGTH

log = logging.getLogger("pcmecl_fast")

ASSETS = Path(__file__).parents[1] / "assets"
SIDE = 64


class Reading(NamedTuple):
    """What the judge sees in B frames."""

    emotion: Tensor  # (B, 7) logits over `data.base.EMOTIONS`
    action_units: Tensor  # (B, A, 2), about 0 … 1.5
    speech: Tensor  # (B, 2): openness in [0, 1], spread in [-1, 1]
    identity: Tensor  # (B, K), the people's parameters, each roughly in [-1, 1]


class Judge(nn.Module):
    """Reads frames of any size, (B, 3, H, W) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, 64)
        self.body = nn.Sequential(
            *(
                layer
                for i, o in itertools.pairwise(widths)
                for layer in (nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.SiLU())
            ),
            nn.Conv2d(64, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.SiLU(),
            nn.Flatten(),
        )
        self.sizes = (len(EMOTIONS), 2 * len(ACTION_UNITS), 2, IDENTITY_LENGTH)
        self.head = nn.Linear(64 * (SIDE // 16) ** 2, sum(self.sizes))

    def forward(self, frames: Tensor) -> Reading:
        if frames.shape[-2:] != (SIDE, SIDE):
            frames = F.interpolate(frames, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        emotion, units, speech, identity = self.head(self.body(frames)).split(self.sizes, dim=1)
        return Reading(emotion, units.unflatten(1, (-1, 2)), speech, identity)


def load_judge(device: torch.device | str | None = None, *, path: Path = ASSETS / "judge.safetensors") -> Judge:
    """The shipped judge, or another, frozen and in eval mode."""
    judge = Judge()
    state = load_file(path)
    # Stored without the batch counters, which only training reads.
    judge.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    return judge.eval().requires_grad_(False).to(device)


@dataclass
class JudgeConfig:
    """How the judge is trained."""

    steps: int = 4000
    """Optimiser steps."""
    batch: int = 128
    """Frames a step."""
    individuals: int = 2000
    """People drawn for training."""
    lr: float = 2e-3
    """Peak learning rate (AdamW, one cycle)."""
    seed: int = 77
    """Seed of people and weights."""
    start: Path | None = None
    """A `judge.safetensors` to go on from."""
    out: Path = ASSETS
    """Folder that `judge.safetensors` is written to."""


def train(config: JudgeConfig) -> dict[str, float]:
    """Train and save the judge; returns its errors on people it has not seen."""
    torch.manual_seed(config.seed)
    faces = SyntheticFaces(config.individuals, clips=1, frames_per_clip=2, seed=config.seed + 5000, intensity=(0.3, 1))
    pixels = drawn(faces)
    # A faint expression is not an emotion that one could name: only clear ones teach the emotion.
    clear = faces.intensity > 0.5
    identity = faces.identities.vector()[faces.individual_index]
    judge = Judge() if config.start is None else load_judge(path=config.start).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=config.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps)
    progress = tqdm(range(config.steps), desc="judge")
    for step in progress:
        index = torch.randint(len(faces), (config.batch,))
        read = judge(augmented(pixels[index], zoom=0.04, shift=0.04, blurred=0.4, noise=0.05))
        emotion = F.cross_entropy(read.emotion[clear[index]], faces.emotion_index[index][clear[index]])
        units = F.mse_loss(read.action_units, faces.parameters.action_units[index])
        speech = F.mse_loss(read.speech, faces.parameters.speech[index])
        who = F.mse_loss(read.identity, identity[index])
        loss = emotion + 10 * units + 10 * speech + 3 * who
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(
                emotion=f"{emotion:.2f}", units=f"{units:.3f}", speech=f"{speech:.3f}", who=f"{who:.3f}"
            )
    state = {k: v.half().contiguous() for k, v in judge.state_dict().items() if v.is_floating_point()}
    write_atomically(config.out / "judge.safetensors", save(state))
    errors = accuracy(judge.eval())
    log.info("on unseen people: %s", errors)
    return errors


@torch.no_grad()
def accuracy(judge: Judge, *, individuals: int = 24, seed: int = 6) -> dict[str, float]:
    """How well the judge reads people it has not seen."""
    faces = SyntheticFaces(individuals, clips=1, frames_per_clip=4, seed=seed)
    read = judge(faces.frames(range(len(faces))))
    identity = faces.identities.vector()[faces.individual_index]
    spans = torch.tensor([1.0, 2.0])
    return {
        "emotion_accuracy": (read.emotion.argmax(1) == faces.emotion_index).float().mean().item(),
        "action_unit_error": (read.action_units - faces.parameters.action_units).abs().mean().item(),
        "mouth_error": ((read.speech - faces.parameters.speech).abs() / spans).mean().item(),
        "identity_similarity": F.cosine_similarity(read.identity, identity).mean().item(),
    }


if __name__ == "__main__":
    import tyro

    logging.basicConfig(level=logging.INFO)
    train(tyro.cli(JudgeConfig))
