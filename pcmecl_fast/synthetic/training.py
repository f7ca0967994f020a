"""What the networks trained on drawn faces share: options, the loop, stored weights, errors on unseen people.

Training is reproducible: all random draws come from torch's global generator and, for captions, from one
`random.Random`, both seeded by the configuration, and always in the same order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from tqdm import tqdm

from pcmecl_fast.clip import ASSETS
from pcmecl_fast.files import write_atomically
from pcmecl_fast.synthetic.faces import SyntheticFaces
from pcmecl_fast.synthetic.people import speech_difference
from pcmecl_fast.wording import name_some

Config = TypeVar("Config", bound="TrainingConfig")


@dataclass
class TrainingConfig:
    """The options common to all networks; each sets its own defaults."""

    steps: int = 4000
    """Optimiser steps."""
    batch: int = 128
    """Frames per step."""
    individuals: int = 1000
    """People drawn for training."""
    lr: float = 2e-3
    """Peak learning rate of AdamW."""
    seed: int = 0
    """Seed of weights, batches and everything else that is random."""
    start: Path | None = None
    """Weights of the same network to continue from."""
    out: Path = ASSETS
    """Folder to write the weights to."""


def main(train: Callable[[Config], object], config: type[Config]) -> None:
    """The command line of a training module."""
    import tyro

    logging.basicConfig(level=logging.INFO)
    train(tyro.cli(config))


def one_cycle(network: nn.Module, config: TrainingConfig) -> tuple[Optimizer, LRScheduler]:
    """AdamW and a one-cycle learning rate: a single rise and fall."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=0.02)
    return optimizer, OneCycleLR(optimizer, config.lr, total_steps=config.steps)


def optimise(
    name: str,
    steps: int,
    optimizer: Optimizer,
    schedule: LRScheduler,
    loss: Callable[[int], tuple[Tensor, dict[str, Tensor]]],
    *,
    clipped: nn.Module | None = None,
    after: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> None:
    """Minimize a loss for `steps` steps, with a progress bar.

    Args:
        name: what is trained, for the bar.
        steps: the number of steps.
        optimizer: over everything that learns.
        schedule: its learning rate's schedule, advanced once per step.
        loss: maps the step's number, from 0, to the scalar to minimize and the terms that the bar shows.
        clipped: the network whose gradient norm is clipped to 1.
        after: called with the number of steps taken so far, from 1, and the last step's terms.
    """
    progress = tqdm(range(steps), desc=name)
    for step in progress:
        total, terms = loss(step)
        optimizer.zero_grad()
        total.backward()
        if clipped is not None:
            nn.utils.clip_grad_norm_(clipped.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix({term: f"{value.item():.3f}" for term, value in terms.items()})
        if after is not None:
            after(step + 1, terms)


def save_half(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the tensors in half precision: enough for a network used only for inference."""
    write_atomically(path, save(in_half(tensors)))


def in_half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().half().contiguous() for name, value in tensors.items()}


def load_half(path: Path) -> dict[str, Tensor]:
    """What `save_half` wrote, in float32."""
    return {name: value.float() for name, value in load_file(path).items()}


def save_weights(path: Path, network: nn.Module) -> None:
    """Write a network without its batch counters, which only training uses."""
    save_half(path, {name: value for name, value in network.state_dict().items() if value.is_floating_point()})


def load_weights(path: Path, network: nn.Module) -> None:
    """Read what `save_weights` wrote.

    Raises:
        ValueError: the file holds another network's weights.
    """
    missing, unknown = network.load_state_dict(load_half(path), strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unknown:
        kind = type(network).__name__
        raise ValueError(
            f"path: {path} does not hold the weights of a {kind}: "
            f"it lacks {name_some(missing, 3) or 'nothing'}; unknown there: {name_some(unknown, 3) or 'nothing'}"
        )


def reading_errors(
    speech: Tensor,  # (L, 2), read from every frame
    identity: Tensor,  # (L, K)
    faces: SyntheticFaces,
) -> dict[str, float]:
    """How far a network's readings are from what was drawn."""
    return {
        "mouth_error": speech_difference(speech, faces.parameters.speech).mean().item(),
        "identity_similarity": F.cosine_similarity(identity, who(faces)).mean().item(),
    }


def who(faces: SyntheticFaces) -> Tensor:
    """The identity vector of every frame's individual, (L, K)."""
    return faces.identities.vector()[faces.individual_index]
