"""One training step of SSERD's stage 2 with PCMECL: python docs/examples/sserd.py --repository ../SSERD"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from common import DrawnActors, criterion_for, train, use_repository
from torch import Tensor, nn

WEIGHT = 0.1


class StandIn(nn.Module):
    """pSp's interface: a source and two driving frames to two edits, all (B, 3, 256, 256) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.paint = nn.Conv2d(6, 16, 5, padding=2), nn.Conv2d(16, 3, 5, padding=2)

    def forward(self, x: Tensor, D1: Tensor, D2: Tensor, **options: object) -> tuple[Tensor, ...]:
        return tuple(torch.tanh(x + 0.1 * self.paint(self.read(torch.cat([x, D], dim=1)).relu())) for D in (D1, D2))


def published(output_size: int) -> nn.Module:
    """SSERD's pSp with random weights; stage 2 trains its fusion, cross attention and transformer."""
    from models.psp import pSp
    from options.train_options import TrainOptions

    class Untrained(pSp):
        def load_weights(self, *args: object) -> None:
            """A step shows where gradients go without the weights, too."""

    opts = TrainOptions().parser.parse_args(["--start_from_latent_avg", "--use_skip", "--use_att", "1"])
    opts.output_size, opts.use_sft = output_size, False  # the options that were published lack use_sft
    net = Untrained(opts)
    net.latent_avg = net.decoder.mean_latent(1000)[0].detach().repeat(opts.n_styles, 1)
    net.requires_grad_(False)
    for part in (net.encoder.fusion, net.cross_attention, net.transformer):
        part.requires_grad_(True)
    return net


def main(
    repository: Path | None = None,
    run: Path | None = None,
    clip: str = "tiny-face",
    output_size: int = 1024,
    steps: int = 3,
) -> None:
    """Train a few steps, and print what PCMECL does and costs.

    Args:
        repository: a clone of SSERD; without one, a stand-in with its interface is trained.
        run: the folder of `pcmecl-fast prompts`; without one, prompts that have learned nothing.
        clip: the tower, where there is no run; ViT-B-32 costs what the published weights cost.
        output_size: side of what SSERD's decoder paints before it is shrunk to 256.
        steps: how many steps to time.
    """
    torch.manual_seed(0)
    net = published(output_size) if use_repository(repository, "SSERD") else StandIn()
    drawn = DrawnActors(256)
    actor_S, emo_S, emo_D = ["M003", "W029"], ["neutral", "sad"], ["happy", "angry"]  # as SSERD's batches have them
    x, D1, D2 = (drawn.frames(*batch) for batch in ((actor_S, emo_S), (actor_S, emo_D), (actor_S[::-1], emo_D)))
    criterion = criterion_for(drawn, run, clip)

    def step(with_pcmecl: bool) -> tuple[Tensor, Tensor]:
        SD1, SD2 = net(x, D1, D2, use_skip=True, zero_noise=True)
        own = F.mse_loss(SD1, D1) + F.mse_loss(SD2, D1)  # as of paired samples
        if not with_pcmecl:
            return own, own.new_zeros(())
        return own, WEIGHT * criterion(x, torch.stack([SD1, SD2], dim=1), actor_S, emo_S, emo_D)

    train(step, net.parameters(), steps)
    SD1, _ = net(x, D1, D2, use_skip=True, zero_noise=True)
    print(criterion.explain(x, SD1, actor_S, emo_S, emo_D, beside={"l2": F.mse_loss(SD1, D1)}))


if __name__ == "__main__":
    tyro.cli(main)
