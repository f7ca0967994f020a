"""One step of ICface's generator with PCMECL: python docs/examples/icface.py --repository ../icface"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro
from common import DrawnActors, criterion_for, train, use_repository
from torch import Tensor, nn

WEIGHT = 0.01
# OpenFace's action units in the order of ICface's driving vector, after three angles of the head.
UNITS = [1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 17, 20, 23, 25, 26, 45]
# Each emotion's units (EMFACS), in parts of OpenFace's largest intensity, 5: a beginning, yours to change.
OF_EMOTION: dict[str, dict[int, float]] = {
    "neutral": {},
    "angry": {4: 0.6, 5: 0.2, 7: 0.5, 23: 0.6},
    "disgusted": {4: 0.3, 7: 0.3, 9: 0.6, 10: 0.6, 17: 0.2},
    "fear": {1: 0.6, 2: 0.2, 4: 0.3, 5: 0.5, 20: 0.6, 25: 0.3, 26: 0.2},
    "happy": {6: 0.6, 12: 0.6, 25: 0.3},
    "sad": {1: 0.5, 4: 0.2, 15: 0.6, 17: 0.4},
    "surprised": {1: 0.6, 2: 0.6, 5: 0.6, 25: 0.5, 26: 0.6},
    "contempt": {12: 0.2, 14: 0.6},
}


def driving_vector(emotions: list[str]) -> Tensor:  # (B, 20) in [0, 1]
    """What drives ICface to show the emotions: the head straight, 0.5 three times, and the units."""
    vectors = torch.zeros(len(emotions), 3 + len(UNITS))
    vectors[:, :3] = 0.5
    for vector, emotion in zip(vectors, emotions, strict=True):
        for unit, intensity in OF_EMOTION[emotion].items():
            vector[3 + UNITS.index(unit)] = intensity
    return vectors


def planes(vectors: Tensor, size: int) -> Tensor:  # (B, 20, size, size)
    return vectors[:, :, None, None].expand(-1, -1, size, size)


def stand_in() -> nn.Module:
    """The generator's interface: (B, 3 + 20, 128, 128) to (B, 3, 128, 128) in [-1, 1]."""
    return nn.Sequential(nn.Conv2d(23, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 3, 5, padding=2), nn.Tanh())


def published() -> nn.Module:
    """ICface's generator as its test command makes it, with random weights."""
    from models.networks import define_G

    return define_G(23, 3, 128, "resnet_6blocks", "batch", False, "xavier", [])


def main(repository: Path | None = None, run: Path | None = None, clip: str = "tiny-face", steps: int = 3) -> None:
    """Train a few steps, and print what PCMECL does and costs.

    Args:
        repository: a clone of icface; without one, a stand-in with its interface is trained.
        run: the folder of `pcmecl-fast prompts`; without one, prompts that have learned nothing.
        clip: the tower, where there is no run; ViT-B-32 costs what the published weights cost.
        steps: how many steps to time.
    """
    torch.manual_seed(0)
    code = repository / "test_code_released_new" if repository is not None else None
    netG = published() if use_repository(code, "icface") else stand_in()
    drawn = DrawnActors(128)
    actors, shown, asked = ["M003", "W029"], ["neutral", "neutral"], ["happy", "surprised"]
    fake_B, target = drawn.frames(actors, shown), drawn.frames(actors, asked)  # the neutral face that netGN makes
    criterion = criterion_for(drawn, run, clip)

    def step(with_pcmecl: bool) -> tuple[Tensor, Tensor]:
        fake_B_recon = netG(torch.cat([fake_B, planes(driving_vector(asked), 128)], dim=1))
        own = (fake_B_recon - target).abs().mean()
        if not with_pcmecl:
            return own, own.new_zeros(())
        return own, WEIGHT * criterion(fake_B, fake_B_recon, actors, shown, asked)

    train(step, netG.parameters(), steps)
    fake_B_recon = netG(torch.cat([fake_B, planes(driving_vector(asked), 128)], dim=1))
    l1 = (fake_B_recon - target).abs().mean()
    print(criterion.explain(fake_B, fake_B_recon, actors, shown, asked, beside={"l1": l1}))


if __name__ == "__main__":
    tyro.cli(main)
