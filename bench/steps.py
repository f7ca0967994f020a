"""Where a training step's time goes, part by part, for a plain trainer and for this library.

    python -m bench.steps --json FILE [--towers ViT-B-32 ViT-B-16 ViT-L-14] [--individuals 4]

Stage 1 is a step on every emotion of some individuals, stage 2 PCMECL on 4 edited frames per individual, with prompts
conditioned on the frame. The graph is cut between the parts and gradients are passed across explicitly, so each part's
forward and backward are timed together; the sum is the step.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import rehearsal
from bench.compare import environment, files_digest
from bench.timing import peak_memory
from pcmecl_fast import PersonalizedPrompts, PromptBank, load_clip, ops
from pcmecl_fast.clip import Clip
from pcmecl_fast.data.emotions import EMOTIONS
from pcmecl_fast.files import write_atomically
from pcmecl_fast.train.prompts import matching_loss

PARTS = ("image tower", "text tower", "operators", "optimiser", "data")
SOURCES = ("pcmecl_fast/prompts/*.py", "pcmecl_fast/ops/**/*.py", "pcmecl_fast/clip.py", "csrc/**/*", "kernels/*.py")


@dataclass
class Options:
    """Split training steps into their parts."""

    towers: list[str] = field(default_factory=lambda: ["ViT-B-32", "ViT-B-16", "ViT-L-14"])
    """Names of open_clip models."""
    individuals: int = 4
    """Individuals per step of stage 1."""
    rounds: int = 3
    """Steps timed after one warm-up step; medians are reported."""
    device: str = "auto"
    """cpu or cuda; auto takes a GPU where there is one."""
    rehearse: bool = False
    """Go through what a GPU would do on a machine without one, with a tiny tower; see bench/rehearsal.py."""
    json: Path | None = None
    """A file for the results, written after each measurement."""


class Clock:
    """Adds up how long each part takes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = self._now()
        yield
        self.seconds[name] += self._now() - begin

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def main() -> None:
    options = tyro.cli(Options)
    kind = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind)
    rows: list[dict[str, Any]] = []
    if options.rehearse:
        rehearsal.begin()
        options.towers, options.individuals, options.rounds = ["tiny-face"], 1, 1
    for tower in options.towers:
        clip = load_clip(tower, device=device)
        for stage, steps in (("stage 1", stage_one(clip, options)), ("stage 2", stage_two(clip, options))):
            for side, step in steps.items():
                rows.append({"tower": tower, "stage": stage, "side": side, **measure(step, options.rounds, device)})
                if options.json is not None:
                    keep(options.json, rows, options.individuals, device)
    show(rows)


def keep(path: Path, rows: list[dict[str, Any]], individuals: int, device: torch.device) -> None:
    """Write all rows so far."""
    result = {"rows": rows, "individuals": individuals, "sources": files_digest(SOURCES, device.type)}
    result |= environment(device) | {"command": "python -m bench.steps " + " ".join(sys.argv[1:])}
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


def measure(step: Callable[[Clock], None], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each part, and a step's memory in megabytes."""
    peak = peak_memory(lambda: step(Clock(device)), device)  # also warms up
    clocks = [Clock(device) for _ in range(rounds)]
    for clock in clocks:
        step(clock)
    return {part: 1e3 * median(clock.seconds[part] for clock in clocks) for part in PARTS} | {"peak_mb": peak}


def stage_one(clip: Clip, options: Options) -> dict[str, Callable[[Clock], None]]:
    count, emotions = options.individuals, len(EMOTIONS)
    prompts, optimizer = _prompts(clip)
    pixels, stored = _pixels_and_features(clip, count * emotions)
    mask = torch.ones(count, emotions, dtype=torch.bool, device=clip.device)

    def step(clock: Clock, backend: str) -> None:
        with clock.part("data"):
            frames = pixels.to(clip.device).float() / 127.5 - 1 if backend == "reference" else None
            visual = stored if frames is None else torch.empty(0)
        if frames is not None:
            with clock.part("image tower"), torch.no_grad():
                visual = F.normalize(clip.encode_image(frames, backend=backend), dim=-1)
        visual = visual.view(count, emotions, -1)
        with clock.part("text tower"):
            text = prompts(visual.mean(1), backend=backend)
        given = text.detach().requires_grad_()
        with clock.part("operators"):
            loss = matching_loss(visual, given, mask, 20.0)
            loss = loss + ops.correlation_loss(visual, given, scale=20.0, backend=backend)
            (gradient,) = torch.autograd.grad(loss, given)
        with clock.part("text tower"):
            text.backward(gradient)
        with clock.part("optimiser"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return _sides(step)


def stage_two(clip: Clip, options: Options) -> dict[str, Callable[[Clock], None]]:
    """The criterion's part of a step, without the generator's own cost."""
    count = 4 * options.individuals
    prompts, _ = _prompts(clip)
    pixels, stored = _pixels_and_features(clip, count)
    names = [str(i) for i in range(count)]
    bank = PromptBank.build(prompts, stored, names, EMOTIONS, clip=clip, condition="frame")
    edited = (pixels.to(clip.device).float() / 127.5 - 1).flip(-1).requires_grad_()
    individual = torch.arange(count, device=clip.device)
    shown = individual % len(EMOTIONS)
    asked = (shown + 1) % len(EMOTIONS)

    def step(clock: Clock, backend: str) -> None:
        if backend == "reference":
            with clock.part("data"):
                frames = pixels.to(clip.device).float() / 127.5 - 1
            with clock.part("image tower"), torch.no_grad():
                source = F.normalize(clip.encode_image(frames, backend=backend), dim=-1)
            with clock.part("text tower"), torch.no_grad():
                rows = prompts(source, backend=backend)
        else:
            with clock.part("data"):
                source, rows = stored, bank.features
        with clock.part("image tower"):
            features = clip.encode_image(edited, backend=backend)
        given = features.detach().requires_grad_()
        with clock.part("operators"):
            loss = ops.direction_loss(source, given, rows, individual, shown, asked, backend=backend)
            (gradient,) = torch.autograd.grad(loss, given)
        with clock.part("image tower"):
            torch.autograd.grad(features, edited, gradient)

    return _sides(step)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Milliseconds of a training step")
    for column in ("tower", "stage", "side", *PARTS, "sum", "memory"):
        table.add_column(column, justify="left" if column in ("tower", "stage", "side") else "right")
    for row in rows:
        parts = [row[part] for part in PARTS]
        table.add_row(
            str(row["tower"]), str(row["stage"]), str(row["side"]), *(f"{part:.3g}" for part in parts),
            f"{sum(parts):.4g}", f"{row['peak_mb']:.0f} MB",
        )  # fmt: skip
    Console(width=140).print(table)


def _sides(step: Callable[[Clock, str], None]) -> dict[str, Callable[[Clock], None]]:
    return {
        "plain trainer": lambda clock: step(clock, "reference"),
        "pcmecl_fast": lambda clock: step(clock, "auto"),
    }


def _prompts(clip: Clip) -> tuple[PersonalizedPrompts, torch.optim.Optimizer]:
    torch.manual_seed(0)
    prompts = PersonalizedPrompts(clip, EMOTIONS).to(clip.device)
    return prompts, torch.optim.AdamW(prompts.parameters(), lr=0.0)


def _pixels_and_features(clip: Clip, count: int) -> tuple[Tensor, Tensor]:
    """uint8 frames on the CPU, as data sets keep them, and features as a store keeps them."""
    generator = torch.Generator().manual_seed(0)
    side = clip.image_size
    pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    features = F.normalize(torch.randn(count, clip.embed_dim, generator=generator), dim=-1)
    return pixels, features.to(clip.device)


if __name__ == "__main__":
    main()
