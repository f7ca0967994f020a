"""How time and memory grow: with individuals, emotions, classes, samples and threads.

    python -m bench.scaling --json FILE [--seconds 2]

Each series varies one size and fixes the others; individuals go up to 4,096, with 3e10 logits. `bench.report` draws
them with exponents fitted to the larger half.
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

from bench import rehearsal
from bench.cases import Case, correlation, direction
from bench.compare import environment, files_digest
from bench.steps import SOURCES
from bench.timing import alternate, peak_memory, timer
from pcmecl_fast import PersonalizedPrompts, load_clip
from pcmecl_fast.files import write_atomically

SIDES = {"reference": "reference", "pcmecl_fast": "auto"}
LARGEST_LOGITS = {"cpu": 4e7, "cuda": 4e9}
"""How many logits the reference may hold at once: it keeps several copies of them."""


@dataclass
class Options:
    """Measure how cost grows."""

    seconds: float = 2.0
    """Time per point; slow ones run three times."""
    device: str = "auto"
    """cpu or cuda; auto takes a GPU where there is one."""
    only: str = ""
    """Series whose names contain this."""
    rehearse: bool = False
    """Go through what a GPU would do on a machine without one, the least size alone; see bench/rehearsal.py."""
    json: Path | None = None
    """A file for the results, written after each point."""


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
    if options.rehearse:
        rehearsal.begin()
    points: list[dict[str, Any]] = []
    for series in all_series(device):
        if options.only not in series.name:
            continue
        for size in series.sizes[:1] if rehearsal.is_on() else series.sizes:
            run = series.work(size)
            peak = peak_memory(run, device)
            measure = timer(run, device)
            (times,) = [[measure()]] if rehearsal.is_on() else alternate([measure], options.seconds)
            point = {"name": series.name, "grows": series.grows, "side": series.side, "size": size}
            points.append(point | {"median_ms": 1e3 * median(times), "peak_mb": peak})
            console.print(f"{series.name}, {series.side}, {size}: {points[-1]['median_ms']:.4g} ms, {peak:.0f} MB")
            if options.json is not None:
                keep(options.json, points, device)


def keep(path: Path, points: list[dict[str, Any]], device: torch.device) -> None:
    """Write all points so far."""
    result = {"points": points, "sources": files_digest(SOURCES, device.type)} | environment(device)
    result |= {"command": "python -m bench.scaling " + " ".join(sys.argv[1:]), "threads": _THREADS}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


def all_series(device: torch.device) -> Iterator[Series]:
    cpu = not rehearsal.as_on_gpu(device)
    fixed: dict[str, Any] = {"device": device, "dtype": torch.float32}
    for side, backend in SIDES.items():
        people = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096) if cpu else (32, 64, 128, 256, 512, 1024, 2048, 4096)
        fits = _that_fit(people, lambda n: (42 * n) ** 2, side, device)
        yield Series("correlation_loss", "individuals", side, fits, _runs(partial(correlation, **fixed), backend))
        emotions = (2, 4, 8, 16, 32)
        fits = _that_fit(emotions, lambda e: (32 * e * (e - 1)) ** 2, side, device)
        by_emotions = _runs(lambda count: correlation(32, emotions=count, **fixed), backend)
        yield Series("correlation_loss", "emotions", side, fits, by_emotions)
        samples = (16, 64, 256, 1024, 4096) if cpu else (256, 1024, 4096, 16384, 65536)
        yield Series("direction_loss", "samples", side, samples, _runs(partial(direction, **fixed), backend))
        classes = ((8, 16, 32) if side == "reference" else (8, 16, 32, 64, 128, 256)) if cpu else (32, 128, 512)
        yield Series("text features", "classes", side, classes, partial(_classes, backend=backend, device=device))
    if cpu:
        threads = tuple(n for n in (1, 2, 4, 8, 16, 32, 64) if n <= (os.cpu_count() or 1))
        for side, backend in SIDES.items():
            work = partial(_threads, backend=backend, device=device)
            yield Series("correlation_loss", "threads", side, threads, work)


_THREADS = torch.get_num_threads()


def _that_fit(sizes: tuple[int, ...], logits: Callable[[int], int], side: str, device: torch.device) -> tuple[int, ...]:
    if side != "reference":
        return sizes
    return tuple(n for n in sizes if logits(n) <= LARGEST_LOGITS[device.type])


def _runs(build: Callable[[int], Case], backend: str) -> Callable[[int], Callable[[], Any]]:
    return lambda size: partial(build(size).run, backend)


def _classes(count: int, backend: str, device: torch.device) -> Callable[[], Any]:
    clip = load_clip("tiny-face" if rehearsal.is_on() else "ViT-B-32", device=device)
    names = list(dict.fromkeys(open_clip.IMAGENET_CLASSNAMES))[:count]
    prompts = PersonalizedPrompts(clip, names, n_ctx=4).to(device)
    drawn = torch.randn(1, clip.embed_dim, generator=torch.Generator().manual_seed(0))
    condition = F.normalize(drawn, dim=-1).to(device)
    return lambda: prompts(condition, backend=backend).sum().backward()


def _threads(count: int, backend: str, device: torch.device) -> Callable[[], Any]:
    case = correlation(64, device, torch.float32)

    def with_threads() -> None:
        torch.set_num_threads(count)
        case.run(backend)

    return with_threads


if __name__ == "__main__":
    main()
