"""One step of NED's manipulator with PCMECL through a render: python docs/examples/ned.py --repository ../NED"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import tyro
from common import ACTORS, DrawnActors, criterion_for, train, use_repository
from torch import Tensor, nn

from pcmecl_fast.synthetic import ACTION_UNITS, draw

WEIGHT = 0.2
LENGTH, COEFFICIENTS, STYLE = 10, 51, 16


class StandIn(nn.Module):
    """The manipulator's interface: coefficients (B, 10, 51) and a style (B, 16) to coefficients."""

    def __init__(self) -> None:
        super().__init__()
        self.change = nn.Sequential(nn.Linear(COEFFICIENTS + STYLE, 64), nn.ReLU(), nn.Linear(64, COEFFICIENTS))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return x + self.change(torch.cat([x, s[:, None].expand(-1, x.shape[1], -1)], dim=2))


class StandInStyle(nn.Module):
    """The style encoder's interface: coefficients (B, 10, 51) to a style (B, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(COEFFICIENTS, STYLE)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x).mean(1)


def published() -> tuple[nn.Module, nn.Module]:
    """NED's generator and style encoder with random weights."""
    from manipulator.models.networks import Generator, StyleEncoder

    return Generator(STYLE, COEFFICIENTS), StyleEncoder(STYLE, COEFFICIENTS)


class DrawnRender:
    """Coefficients to frames of one actor, differentiable; a drawn face in place of DECA's (docs/examples/ned.md).

    The first coefficient opens the jaw. The others move action units, by a fixed matrix.
    """

    def __init__(self, drawn: DrawnActors, actor: str, size: int) -> None:
        self.drawn, self.size = drawn, size
        self.resting = drawn.faces.parameters[drawn.rows([actor], ["neutral"])]
        self.basis = torch.randn(COEFFICIENTS - 1, len(ACTION_UNITS), generator=torch.Generator().manual_seed(0)) / 7

    def __call__(self, x: Tensor) -> Tensor:  # (B, T, 51) to (B, T, 3, size, size)
        flat = x.flatten(0, 1)
        units = torch.sigmoid(flat[:, 1:] @ self.basis)[..., None].expand(-1, -1, 2)
        speech = torch.stack([torch.sigmoid(flat[:, 0]), torch.zeros(len(flat))], dim=1)
        frames = replace(self.resting[torch.zeros(len(flat), dtype=torch.long)], action_units=units, speech=speech)
        return draw(self.drawn.faces.identities, frames, self.size).unflatten(0, x.shape[:2])


def main(repository: Path | None = None, run: Path | None = None, clip: str = "tiny-face", steps: int = 3) -> None:
    """Train a few steps, and print what PCMECL does and costs.

    Args:
        repository: a clone of NED; without one, a stand-in with its interface is trained.
        run: the folder of `pcmecl-fast prompts`; without one, prompts that have learned nothing.
        clip: the tower, where there is no run; ViT-B-32 costs what the published weights cost.
        steps: how many steps to time.
    """
    torch.manual_seed(0)
    generator, style_encoder = published() if use_repository(repository, "NED") else (StandIn(), StandInStyle())
    drawn, actor = DrawnActors(64), ACTORS[0]
    criterion, render = criterion_for(drawn, run, clip), DrawnRender(drawn, actor, 64)
    selected_emotions = ["neutral", "angry", "disgusted", "fear", "happy", "sad", "surprised"]  # NED's options
    y_org, y_trg = torch.tensor([0, 4]), torch.tensor([4, 5])
    x_real, x_ref = torch.randn(2, LENGTH, COEFFICIENTS), torch.randn(2, LENGTH, COEFFICIENTS)

    def names(y: Tensor) -> list[str]:
        return [selected_emotions[e] for e in y]

    def pcmecl(x_fake: Tensor) -> Tensor:
        return WEIGHT * criterion(render(x_real), render(x_fake), actor, names(y_org), names(y_trg))

    def losses(x_fake: Tensor, s_trg: Tensor) -> Tensor:
        kept = (generator(x_fake, style_encoder(x_real)) - x_real).abs().mean()  # the cycle's
        return kept + (style_encoder(x_fake) - s_trg).abs().mean()

    def step(with_pcmecl: bool) -> tuple[Tensor, Tensor]:
        s_trg = style_encoder(x_ref)
        x_fake = generator(x_real, s_trg)
        own = losses(x_fake, s_trg)
        return own, pcmecl(x_fake) if with_pcmecl else own.new_zeros(())

    train(step, [*generator.parameters(), *style_encoder.parameters()], steps)
    # The other losses know no frames: compare where the two meet, in the coefficients.
    s_trg = style_encoder(x_ref)
    x_fake = generator(x_real, s_trg)
    for name, loss in {"own losses": losses(x_fake, s_trg), "PCMECL, weighted": pcmecl(x_fake)}.items():
        (gradient,) = torch.autograd.grad(loss, x_fake, retain_graph=True)
        print(f"{name}: gradient in the coefficients {gradient.norm().item():.3g}")


if __name__ == "__main__":
    tyro.cli(main)
