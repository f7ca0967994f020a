"""Registers, shared memory and instructions of every Triton kernel, compiled as launched at training sizes; no GPU.

    python -m bench.triton_resources          print the table of docs/kernels.md: the configurations launched first
    python -m bench.triton_resources all      every configuration that tuning tries

Needs Triton and cuobjdump, which comes with the CUDA toolkit and with Triton's wheel. For another Triton, put the
folder that it is installed in first on PYTHONPATH.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import as_launched
from bench.as_launched import Launch
from pcmecl_fast.ops.correlation import CORRELATION_LOSS
from pcmecl_fast.ops.direction import DIRECTION_LOGITS, DIRECTION_LOSS
from pcmecl_fast.ops.frames import CLIP_FRAMES
from pcmecl_fast.ops.operator import Operator
from pcmecl_fast.ops.tree_attention import TREE_ATTENTION

CAPABILITIES = (80, 90)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
D = 512  # ViT-B-32's features
LOGIT_INSTRUCTIONS = {"sums_kernel": 14, "fold_kernel": 30, "wide_sums_kernel": 18, "wide_fold_kernel": 20}
"""Most machine instructions for a logit and its opposite, each time, in the loop over pairs of emotions."""
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@dataclass(frozen=True)
class Workload:
    """A forward and backward of an operator on fake CUDA tensors."""

    label: str
    operator: Operator
    arguments: Callable[[], tuple[Any, ...]]
    """Makes the schema's arguments, inside `as_launched.on`."""
    needs: tuple[bool, ...] | None = None
    deterministic: bool = False

    def run(self, arguments: tuple[Any, ...]) -> None:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(self.deterministic)
        try:
            as_launched.run(self.operator, arguments, self.needs)
        finally:
            torch.use_deterministic_algorithms(before)


@dataclass(frozen=True)
class Rectangle(Workload):
    """The sums and the gradients of a rectangle of an operator's square, on fake CUDA tensors."""

    def run(self, arguments: tuple[Any, ...]) -> None:
        as_launched.run_rectangle(self.operator, arguments)


def workloads() -> Iterator[Workload]:
    """Every kernel at training sizes: 512 features, 7 emotions and CLIP's 224 pixels, and at the widest supported."""
    for word, dtype in DTYPES.items():
        yield Workload(f"direction_logits, {word}", DIRECTION_LOGITS, partial(_logits, dtype))
        for contrast in (0.0, 0.3):
            label = f"direction_loss, contrast {contrast}, {word}"
            loss = partial(_loss, contrast, dtype)
            yield Workload(label, DIRECTION_LOSS, loss)
            yield Workload(f"{label}, bank frozen", DIRECTION_LOSS, loss, needs=(True, True, False, False))
    for contrast in (0.0, 0.3):
        label = f"direction_loss, contrast {contrast}, deterministic"
        yield Workload(label, DIRECTION_LOSS, partial(_loss, contrast, torch.float32), deterministic=True)
    for word, dtype, emotions, negatives in (
        ("float32", torch.float32, 7, "all"),
        ("float32", torch.float32, 11, "distinct"),
        ("float32", torch.float32, 16, "all"),
        ("float32", torch.float32, 32, "distinct"),
        ("bfloat16", torch.bfloat16, 7, "within"),
    ):
        label = f"correlation_loss, E={emotions}, {negatives}, {word}"
        yield Workload(label, CORRELATION_LOSS, partial(_correlation, emotions, negatives, dtype))
        yield Rectangle(f"{label}, over ranks", CORRELATION_LOSS, partial(_rectangle, emotions, negatives, dtype))
    for word, dtype in DTYPES.items():
        for tokens in (30, 192):
            label = f"tree_attention, S={tokens}, {word}"
            yield Workload(label, TREE_ATTENTION, partial(_attention, tokens, 64, dtype))
        yield Workload(f"clip_frames, 256 to 224, {word}", CLIP_FRAMES, partial(_frames, 256, dtype))
        yield Workload(f"clip_frames, 64 to 224, {word}", CLIP_FRAMES, partial(_frames, 64, dtype))
    yield Workload(
        "tree_attention, S=64, d=128, bfloat16", TREE_ATTENTION, partial(_attention, 64, 128, torch.bfloat16)
    )


def launches(
    capability: int, chosen: Iterable[Workload], *, every_config: bool = False
) -> Iterator[tuple[Workload, Launch]]:
    """What workloads launch, each kernel once per specialisation."""
    with as_launched.on(capability, every_config=every_config) as launched:
        for workload in chosen:
            known = len(launched)
            workload.run(workload.arguments())
            yield from ((workload, launch) for launch in launched[known:])


def _logits(dtype: torch.dtype) -> tuple[Any, ...]:
    return (*_samples(dtype), True, 0.0)


def _loss(contrast: float, dtype: torch.dtype) -> tuple[Any, ...]:
    return (*_samples(dtype), _cuda(256, dtype=torch.int64), _cuda(), 0.0, contrast, True, 0.0, "mean")


def _samples(dtype: torch.dtype) -> tuple[Tensor, ...]:
    features = (_cuda(256, D, dtype=dtype), _cuda(256, D, dtype=dtype), _cuda(48, 7, D, dtype=dtype))
    return (*features, _cuda(256, dtype=torch.int64), _cuda(256, dtype=torch.int64))


def _correlation(emotions: int, negatives: str, dtype: torch.dtype) -> tuple[Any, ...]:
    visual, text = (_cuda(512, emotions, D, dtype=dtype) for _ in range(2))
    return (visual, text, _cuda(), 0.0, _cuda(512, emotions, dtype=torch.bool), negatives)


def _rectangle(emotions: int, negatives: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """128 individuals of 512 on each of four ranks: the third's meet everybody, or within themselves their own."""
    rows, columns, first = (128, 128, 0) if negatives == "within" else (128, 512, 256)
    visual, text = (_cuda(people, emotions, D, dtype=dtype) for people in (rows, columns))
    masks = (_cuda(people, emotions, dtype=torch.bool) for people in (rows, columns))
    return (visual, text, _cuda(), 0.0, *masks, negatives, first)


def _attention(tokens: int, width: int, dtype: torch.dtype) -> tuple[Any, ...]:
    return (_cuda(64, tokens, 3, 8, width, dtype=dtype), tokens % 7 + 7, (tokens // 7 - 1,) * 7)


def _frames(side: int, dtype: torch.dtype) -> tuple[Any, ...]:
    return (_cuda(16, 3, side, side, dtype=dtype), 224, MEAN, STD, "bicubic")


def _cuda(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def main() -> None:
    """Print the table: what is launched first, or with the argument `all` everything that is ever tried."""
    everything = sys.argv[1:] == ["all"]
    columns = [_by_name(launches(capability, workloads(), every_config=everything)) for capability in CAPABILITIES]
    print("| | " + " | ".join(f"sm_{c}: registers, shared bytes, instructions" for c in CAPABILITIES) + " |")
    print("| --- |" + " --- |" * len(CAPABILITIES))
    for key in dict.fromkeys(key for column in columns for key in column):
        found = [column.get(key) for column in columns]
        cells = ("" if x is None else _cell(x) for x in found)
        print(f"| {key[0]}: {_described(next(x for x in found if x))} | {' | '.join(cells)} |", flush=True)


def _by_name(found: Iterable[tuple[Workload, Launch]]) -> dict[tuple[str, str, int], Launch]:
    """Launches by workload, kernel and how many of it the workload has had: grids differ by device."""
    rows: dict[tuple[str, str, int], Launch] = {}
    for workload, launch in found:
        number = sum(key[:2] == (workload.label, launch.name) for key in rows)
        rows[workload.label, launch.name, number] = launch
    return rows


def _cell(x: Launch) -> str:
    return f"{x.usage['REG']}, {x.shared}, {len(x.instructions)}" + ", SPILLS" * (x.spilled > 0)


def _described(launch: Launch) -> str:
    programs = "×".join(str(size) for size in launch.grid if size > 1)
    return f"`{launch.name}`, {programs} programs, {launch.options['num_warps']} warps"


if __name__ == "__main__":
    main()
