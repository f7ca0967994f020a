"""How time and memory grow: with individuals, emotions, classes, samples and threads.

    python -m bench.scaling --json FILE [--seconds 2]

Each series varies one size and keeps the others; `bench.report` draws them with the exponents of their last half.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from torch import Tensor

from bench.compare import alternate, environment, files_digest, peak_memory
from bench.steps import SOURCES
from pcmecl_fast import PersonalizedPrompts, load_clip, ops

D = 512
LARGEST_LOGITS = {"cpu": 4e7, "cuda": 4e9}
"""How many logits the reference may hold at a time: it keeps several copies of them."""


@dataclass
class Options:
    """Measure how cost grows."""

    seconds: float = 2.0
    """For each point; slow ones take three runs."""
    device: str = "auto"
    """cpu or cuda; auto takes a GPU where there is one."""
    only: str = ""
    """Series whose names contain this."""
    json: Path | None = None
    """A file for the results."""


@dataclass(frozen=True)
class Series:
    """One curve: a name, what grows, and the work at each size."""

    name: str
    grows: str
    side: str
    sizes: tuple[int, ...]
    work: Callable[[int], Callable[[], Any]]


def main() -> None:
    options = tyro.cli(Options)
    kind = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device, console = torch.device(kind), Console(width=140)
    points = []
    for series in all_series(device):
        if options.only not in series.name:
            continue
        for size in series.sizes:
            run = series.work(size)
            peak = peak_memory(run, device)
            (times,) = alternate([run], device, options.seconds)
            point = {"name": series.name, "grows": series.grows, "side": series.side, "size": size}
            points.append(point | {"median_ms": 1e3 * median(times), "peak_mb": peak})
            console.print(f"{series.name}, {series.side}, {size}: {points[-1]['median_ms']:.4g} ms, {peak:.0f} MB")
    torch.set_num_threads(_THREADS)
    if options.json is not None:
        result = {"points": points, "sources": files_digest(SOURCES, device.type)} | environment(device)
        result["command"] = "python -m bench.scaling " + " ".join(sys.argv[1:])
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def all_series(device: torch.device) -> Iterator[Series]:
    cpu = device.type == "cpu"
    sides = {"reference": "reference", "pcmecl_fast": "auto"}
    for side, backend in sides.items():
        rest: dict[str, Any] = {"backend": backend, "device": device}
        people = (8, 16, 32, 64, 128, 256, 512) if cpu else (32, 64, 128, 256, 512, 1024, 2048)
        fits = _that_fit(people, lambda n: (42 * n) ** 2, side, device)
        yield Series("correlation_loss", "individuals", side, fits, partial(_correlation, emotions=7, **rest))
        emotions = (2, 4, 8, 16, 32)
        fits = _that_fit(emotions, lambda e: (32 * e * (e - 1)) ** 2, side, device)
        yield Series("correlation_loss", "emotions", side, fits, partial(_correlation, 32, **rest))
        samples = (16, 64, 256, 1024, 4096) if cpu else (256, 1024, 4096, 16384, 65536)
        yield Series("direction_loss", "samples", side, samples, partial(_direction, **rest))
        classes = ((8, 16, 32) if side == "reference" else (8, 16, 32, 64, 128, 256)) if cpu else (32, 128, 512)
        yield Series("text features", "classes", side, classes, partial(_classes, **rest))
    if cpu:
        threads = tuple(n for n in (1, 2, 4, 8, 16, 32, 64) if n <= (os.cpu_count() or 1))
        for side, backend in sides.items():
            rest = {"backend": backend, "device": device}
            yield Series("correlation_loss", "threads", side, threads, partial(_threads, **rest))


_THREADS = torch.get_num_threads()


def _that_fit(sizes: tuple[int, ...], logits: Callable[[int], int], side: str, device: torch.device) -> tuple[int, ...]:
    if side != "reference":
        return sizes
    return tuple(n for n in sizes if logits(n) <= LARGEST_LOGITS[device.type])


def _correlation(individuals: int, emotions: int, backend: str, device: torch.device) -> Callable[[], Any]:
    visual, text = (_unit(individuals, emotions, D, device=device, seed=seed) for seed in (0, 1))
    return lambda: torch.autograd.grad(ops.correlation_loss(visual, text, backend=backend), (visual, text))


def _direction(samples: int, backend: str, device: torch.device) -> Callable[[], Any]:
    source, edited, bank = (
        _unit(*shape, device=device, seed=seed) for seed, shape in enumerate(((samples, D), (samples, D), (48, 7, D)))
    )
    individual = torch.arange(samples, device=device) % 48
    shown = individual % 7
    asked = (shown + 1) % 7
    return lambda: torch.autograd.grad(
        ops.direction_loss(source, edited, bank, individual, shown, asked, backend=backend), (source, edited, bank)
    )


def _classes(count: int, backend: str, device: torch.device) -> Callable[[], Any]:
    clip = load_clip("ViT-B-32", device=device)
    names = list(dict.fromkeys(open_clip.IMAGENET_CLASSNAMES))[:count]
    prompts = PersonalizedPrompts(clip, names, n_ctx=4).to(device)
    condition = _unit(1, clip.embed_dim, device=device, seed=0).detach()
    return lambda: prompts(condition, backend=backend).sum().backward()


def _threads(count: int, backend: str, device: torch.device) -> Callable[[], Any]:
    run = _correlation(64, 7, backend, device)

    def with_threads() -> None:
        torch.set_num_threads(count)
        run()

    return with_threads


def _unit(*shape: int, device: torch.device, seed: int) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return F.normalize(drawn, dim=-1).to(device).requires_grad_()


if __name__ == "__main__":
    main()
