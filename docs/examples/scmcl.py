"""One step of SCMCL's renderer with PCMECL: python docs/examples/scmcl.py --repository ../SCMCL"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro
from common import DrawnActors, criterion_for, train, use_repository
from torch import Tensor, nn

WEIGHT = 1.0
FRAMES, INPUTS = 3, 10  # n_frames_G; of one frame, three pictures of three colours (NMFC, gaze, shape) and the mask


class StandIn(nn.Module):
    """The renderer's interface: FRAMES conditions and FRAMES − 1 earlier frames to a frame, −1 outside the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Conv2d(FRAMES * (INPUTS - 1) + (FRAMES - 1) * 3, 16, 5, padding=2)
        self.paint = nn.Conv2d(16, 3, 5, padding=2)

    def forward(self, conditions: Tensor, earlier: Tensor) -> Tensor:
        mask = conditions[:, -1:]
        pictures = torch.cat([frame[:, :-1] for frame in conditions.chunk(FRAMES, dim=1)], dim=1)
        painted = torch.tanh(self.paint(self.read(torch.cat([pictures, earlier], dim=1)).relu()))
        return painted * mask - (1 - mask)


def published() -> nn.Module:
    """SCMCL's renderer with random weights; NED's is the same."""
    from renderer.models.networks import define_G

    class opt:
        n_blocks, no_prev_output, n_frames_G = 9, False, FRAMES

    return define_G(FRAMES * (INPUTS - 1), 3, 3 * (FRAMES - 1), 64, 3, "instance", [], opt)


def main(repository: Path | None = None, run: Path | None = None, clip: str = "tiny-face", steps: int = 3) -> None:
    """Train a few steps, and print what PCMECL does and costs.

    Args:
        repository: a clone of SCMCL, or of NED; without one, a stand-in with its interface is trained.
        run: the folder of `pcmecl-fast prompts`; without one, prompts that have learned nothing.
        clip: the tower, where there is no run; ViT-B-32 costs what the published weights cost.
        steps: how many steps to time.
    """
    torch.manual_seed(0)
    renderer = published() if use_repository(repository, "SCMCL") else StandIn()
    drawn, length = DrawnActors(256), 2  # frames that the renderer makes of one clip
    criterion = criterion_for(drawn, run, clip)

    # One clip, as `_compute_renderer_loss` has it: the face lies on −1, and so does the source's.
    actor, shown, asked = "M003", "neutral", "happy"
    y, x = torch.meshgrid(torch.linspace(-1, 1, 256), torch.linspace(-1, 1, 256), indexing="ij")
    mask = ((x / 0.6) ** 2 + (y / 0.8) ** 2 < 1).float()[None, None, None]  # (1, 1, 1, 256, 256)
    source = drawn.frames([actor], [shown])[:, None] * mask - (1 - mask)  # (1, 1, 3, 256, 256)
    target = drawn.frames([actor], [asked])[:, None] * mask - (1 - mask)
    guides = torch.rand(1, length + FRAMES - 1, INPUTS - 1, 256, 256)
    conditions = torch.cat([guides, mask.expand(1, length + FRAMES - 1, -1, -1, -1)], dim=2)

    def render() -> Tensor:  # (1, length, 3, 256, 256)
        frames = [torch.zeros(1, 3, 256, 256)] * (FRAMES - 1)
        for t in range(length):
            earlier = torch.cat(frames[-(FRAMES - 1) :], dim=1).detach()
            frames.append(renderer(conditions[:, t : t + FRAMES].flatten(1, 2), earlier))
        return torch.stack(frames[FRAMES - 1 :], dim=1)

    def step(with_pcmecl: bool) -> tuple[Tensor, Tensor]:
        fake_B = render()
        own = 10 * (fake_B - target).abs().mean()
        if not with_pcmecl:
            return own, own.new_zeros(())
        return own, WEIGHT * criterion(source[:, 0], fake_B, actor, shown, asked, mask=mask[:, 0])

    train(step, renderer.parameters(), steps)
    fake_B = render()
    l1 = 10 * (fake_B - target).abs().mean()
    print(criterion.explain(source[:, 0], fake_B, actor, shown, asked, mask=mask[:, 0], beside={"l1": l1}))


if __name__ == "__main__":
    tyro.cli(main)
