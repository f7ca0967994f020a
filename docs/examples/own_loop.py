"""PCMECL in a training loop of your own: python docs/examples/own_loop.py --run runs/prompts"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro
from common import ACTORS, EMOTIONS, DrawnActors, criterion_for
from torch import nn

WEIGHT = 0.01


class Generator(nn.Module):
    """Yours: frames and the emotion asked for to edited frames."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = nn.Embedding(len(EMOTIONS), 32)
        self.read, self.paint = nn.Conv2d(3, 32, 5, padding=2), nn.Conv2d(32, 3, 5, padding=2)

    def forward(self, frames: torch.Tensor, asked: list[str]) -> torch.Tensor:
        emotion = self.asked(torch.tensor([EMOTIONS.index(name) for name in asked]))
        return torch.tanh(frames + 0.1 * self.paint((self.read(frames) + emotion[:, :, None, None]).relu()))


def main(run: Path | None = None, steps: int = 20) -> None:
    """Train a generator on drawn people.

    Args:
        run: the folder of `pcmecl-fast prompts`; without one, prompts that have learned nothing.
        steps: how many steps to train.
    """
    torch.manual_seed(0)
    drawn, generator = DrawnActors(64), Generator()
    criterion = criterion_for(drawn, run)
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
    who, shown, asked = ACTORS * 2, ["neutral", "sad", "angry", "neutral"], ["happy", "angry", "sad", "fear"]
    frames = drawn.frames(who, shown)
    for step in range(steps):
        edited = generator(frames, asked)
        kept = (edited - frames).abs().mean()
        loss = kept + WEIGHT * criterion(frames, edited, who, shown, asked)
        if step == 0:
            print(criterion.explain(frames, edited, who, shown, asked, beside={"kept": kept}))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    tyro.cli(main)
