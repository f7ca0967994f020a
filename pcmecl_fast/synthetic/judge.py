r"""The judge: a small convolutional network that reads drawn faces, independent of CLIP and of every training loss.

It was trained on the parameters behind the drawn faces (of people used in no experiment). From a 64×64 frame it reads
the emotion, the action units, the speech (mouth openness and spread, whatever the emotion) and an identity vector. It
ships with the package and was trained by

    python -m pcmecl_fast.synthetic.judge --steps 6000 --individuals 3000 --out a
    python -m pcmecl_fast.synthetic.judge --start a/judge.safetensors --steps 5000 --individuals 4000 --seed 78 \
        --lr 1e-3
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcmecl_fast.clip import ASSETS
from pcmecl_fast.data.emotions import EMOTIONS
from pcmecl_fast.synthetic.augment import SIDE, at_side, augmented, drawn
from pcmecl_fast.synthetic.faces import SyntheticFaces
from pcmecl_fast.synthetic.people import ACTION_UNITS, IDENTITY_LENGTH
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
        emotion, units, speech, identity = self.head(self.body(at_side(frames))).split(self.sizes, dim=1)
        return Reading(emotion, units.unflatten(1, (-1, 2)), speech, identity)


def load_judge(device: torch.device | str | None = None, *, path: Path = ASSETS / "judge.safetensors") -> Judge:
    """The shipped judge, or the one at `path`, frozen and in eval mode."""
    judge = Judge()
    load_weights(path, judge)
    return judge.eval().requires_grad_(False).to(device)


def emotion_columns(emotions: Sequence[str]) -> Tensor:
    """The columns of a data set's emotions in the judge's logits, (E,) int."""
    return torch.tensor([EMOTIONS.index(emotion) for emotion in emotions])


@dataclass
class JudgeConfig(TrainingConfig):
    """Options for training the judge."""

    individuals: int = 2000
    seed: int = 77


def train(config: JudgeConfig) -> dict[str, float]:
    """Train and save the judge; returns its errors on people it has not seen."""
    torch.manual_seed(config.seed)
    faces = SyntheticFaces(config.individuals, clips=1, frames_per_clip=2, seed=config.seed + 5000, intensity=(0.3, 1))
    pixels, identity = drawn(faces), who(faces)
    # A faint expression is not a nameable emotion: only clear ones teach the emotion.
    clear = faces.intensity > 0.5
    judge = Judge()
    if config.start is not None:
        load_weights(config.start, judge)

    def loss(_: int) -> tuple[Tensor, dict[str, Tensor]]:
        index = torch.randint(len(faces), (config.batch,))
        read = judge(augmented(pixels[index], zoom=0.04, shift=0.04, blurred=0.4, noise=0.05))
        emotion = F.cross_entropy(read.emotion[clear[index]], faces.emotion_index[index][clear[index]])
        units = F.mse_loss(read.action_units, faces.parameters.action_units[index])
        speech = F.mse_loss(read.speech, faces.parameters.speech[index])
        person = F.mse_loss(read.identity, identity[index])
        terms = {"emotion": emotion, "units": units, "speech": speech, "person": person}
        return emotion + 10 * units + 10 * speech + 3 * person, terms

    optimise("judge", config.steps, *one_cycle(judge, config), loss)
    save_weights(config.out / "judge.safetensors", judge)
    errors = accuracy(judge.eval())
    log.info("on unseen people: %s", errors)
    return errors


@torch.no_grad()
def accuracy(judge: Judge, *, individuals: int = 24, seed: int = 6) -> dict[str, float]:
    """How well the judge reads people it has not seen."""
    faces = SyntheticFaces(individuals, clips=1, frames_per_clip=4, seed=seed)
    read = judge(faces.frames(range(len(faces))))
    return {
        "emotion_accuracy": (read.emotion.argmax(1) == faces.emotion_index).float().mean().item(),
        "action_unit_error": (read.action_units - faces.parameters.action_units).abs().mean().item(),
        **reading_errors(read.speech, read.identity, faces),
    }


if __name__ == "__main__":
    main(train, JudgeConfig)
