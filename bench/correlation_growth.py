"""How correlation_loss's time and memory grow with the individuals, up to 4,096: 3e10 logits.

    python -m bench.correlation_growth --out bench/results/correlation_growth

Writes OUT.json and OUT.png. Time should grow as the square, memory beside the inputs linearly.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from bench.compare import environment, files_digest, peak_memory, timed
from pcmecl_fast import ops

E, D = 7, 512
SOURCES = ("pcmecl_fast/ops/*.py", "csrc/**/*", "kernels/*.py")


@dataclass
class Options:
    """Measure how correlation_loss grows."""

    individuals: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    """Sizes of the batch."""
    device: str = "cpu"
    """cpu or cuda."""
    out: Path = Path("bench/results/correlation_growth")
    """Where the results go, without an ending."""


def main() -> None:
    options = tyro.cli(Options)
    device = torch.device(options.device)
    points = [measure(individuals, device) for individuals in options.individuals]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"points": points, "sources": files_digest(SOURCES, device.type)} | environment(device)
    result["command"] = "python -m bench.correlation_growth"
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw(points, options.out.with_suffix(".png"))


def measure(individuals: int, device: torch.device) -> dict[str, float]:
    """Forward and backward: the shortest time of one to three runs, and the peak of one beside the inputs."""
    random = torch.Generator().manual_seed(0)
    visual, text = (
        F.normalize(torch.randn(individuals, E, D, generator=random), dim=-1).to(device).requires_grad_()
        for _ in range(2)
    )

    def run() -> tuple[Tensor, ...]:
        loss = ops.correlation_loss(visual, text)
        gradients = torch.autograd.grad(loss, (visual, text))
        if not all(x.isfinite().all() for x in (loss, *gradients)):
            raise ArithmeticError(f"{individuals} individuals: a result is not finite")
        return gradients

    peak = peak_memory(run, device)
    best = min(timed(run, device) for _ in range(3 if individuals < 2048 else 1))
    return {"individuals": individuals, "seconds": best, "peak_mb": peak}


def draw(points: list[dict[str, float]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    individuals = [point["individuals"] for point in points]
    for axis, name, label, power in ((axes[0], "seconds", "seconds", 2), (axes[1], "peak_mb", "MB", 1)):
        values = [point[name] for point in points]
        axis.loglog(individuals, values, "o-", label="correlation_loss, forward and backward")
        guide = [values[-1] * (n / individuals[-1]) ** power for n in individuals]
        axis.loglog(individuals, guide, "--", color="grey", label=f"power {power}")
        axis.set(xlabel=f"individuals, {E} emotions each", ylabel=label)
        axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
