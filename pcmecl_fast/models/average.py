"""The running average of a generator's weights over its training, which edits more calmly than the last ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from pcmecl_fast.models.base import Generator


class Average:
    """w ← w + max(1 − decay, 1 / (n + 1)) · (last − w) after the n-th update: at first a mean, then exponential.

    Args:
        generator: whose weights are averaged; buffers are the last ones.
        decay: in [0, 1); 0 takes the last weights, of which no copy is made.

    Attributes:
        generator: the averaged one.
    """

    def __init__(self, generator: Generator, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.generator = copy.deepcopy(generator).requires_grad_(False) if decay else generator

    @torch.no_grad()
    def update(self, generator: Generator) -> None:
        """Take in the weights after an optimiser's step."""
        if not self.decay:
            return
        self.updates += 1
        weight = max(1 - self.decay, 1 / self.updates)
        torch._foreach_lerp_(_weights(self.generator), _weights(generator), weight)
        for own, last in zip(self.generator.buffers(), generator.buffers(), strict=True):
            own.copy_(last)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "weights": self.generator.state_dict() if self.decay else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        if self.decay:
            self.generator.load_state_dict(state["weights"])


def _weights(generator: Generator) -> list[Tensor]:
    return list(generator.parameters())
