"""Predicts the times of correlation_loss's Triton kernels from their compiled code; no GPU, nothing is measured.

    python -m bench.triton_plans            print the table
    python -m bench.triton_plans --write    and put it into docs/kernels.md

A launch takes as long as its slowest limit: the instructions of its innermost loop at one a clock and scheduler, its
exponentials, its products on tensor cores, its bytes. The busiest processor counts, which has a whole number of
programs. What is left out: waiting for memory that other warps do not hide, bandwidth of L2, launching.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import as_launched
from bench.as_launched import PROCESSORS, Launch
from bench.triton_resources import D, _correlation
from pcmecl_fast.ops.correlation import CORRELATION_LOSS

DOCUMENT = Path(__file__).parent.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- plans: begin -->", "<!-- plans: end -->"
N, E = 512, 7
Q = E * (E - 1) // 2
SCHEDULERS, EXPONENTIALS = 4, 16  # of a processor: instructions of a warp, and exponentials, a clock


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet."""

    name: str
    capability: int
    clock: float  # Hz, boosted
    bandwidth: float  # bytes/s of its memory
    tf32: float  # dense operations/s

    @property
    def processors(self) -> int:
        return PROCESSORS[self.capability]


DEVICES = (Device("H100", 90, 1.755e9, 3.35e12, 495e12), Device("A100", 80, 1.41e9, 1.94e12, 156e12))
REGISTERS, SHARED = 64 << 10, {90: 227 << 10, 80: 163 << 10}


@dataclass(frozen=True)
class Prediction:
    """Of all launches of a kernel in a call, in microseconds; the floor has no instructions but the unavoidable."""

    launch: Launch
    launches: int
    per_unit: float  # instructions a logit, or in a step of a product
    resident: int  # programs of a processor
    busiest: float  # of processors: its programs over the average
    times: dict[str, float]  # by limit
    floor: float

    @property
    def predicted(self) -> float:
        return max(self.times.values())


def predictions(device: Device) -> Iterator[Prediction]:
    """Of every kernel that correlation_loss launches for a square of N individuals, forward and backward, in order."""
    with as_launched.on(device.capability, repeats=True) as launched:
        as_launched.run(CORRELATION_LOSS, _correlation(E, "all", torch.float32))
    groups: dict[tuple[str, tuple[int, ...]], list[Launch]] = {}
    for launch in launched:
        groups.setdefault((launch.name, launch.grid), []).append(launch)
    chunks = sum(launch.name == "sums_kernel" for launch in launched)
    for launches in groups.values():
        yield _predicted(device, launches[0], len(launches), chunks)


def _predicted(device: Device, launch: Launch, launches: int, chunks: int) -> Prediction:
    programs = 1
    for size in launch.grid:
        programs *= size
    busiest = -(-programs // device.processors) * device.processors / programs
    micro = 1e6 / device.processors / device.clock  # microseconds for something that a processor does in a clock
    feature_bytes = 4 * N * E * D
    per_unit, times, floor = 0.0, {}, 0.0
    loop = len(launch.loops[0]) if launch.loops else 0
    if launch.name in ("sums_kernel", "fold_kernel"):
        logits = N * N * Q * Q
        per_unit = loop / Q
        floor = 2 * logits / EXPONENTIALS * micro
        times = {"issue": logits / 32 * per_unit / SCHEDULERS * micro * busiest, "exp2": floor * busiest}
    elif launch.name == "product_kernel":
        options = launch.options
        # Each of the four products, forward and backward, is launched once a chunk.
        operations = 3 * 2 * (N * E) ** 2 * D * launches / chunks
        step = 2 * 3 * options["BLOCK_M"] * options["BLOCK_N"] * options["BLOCK_K"]
        per_unit = loop * launch.warps
        floor = operations / device.tf32 * 1e6
        issue = operations / step * per_unit / SCHEDULERS * micro * busiest
        times = {"issue": issue, "tensor cores": floor * busiest}
    else:
        moved = {"prepare_kernel": 4 * feature_bytes, "gradient_kernel": 6 * feature_bytes}.get(launch.name, 0)
        floor = moved / device.bandwidth * 1e6 * launches
        times = {"bytes": floor}
    resident = launch.programs_a_processor(REGISTERS, SHARED[device.capability])
    return Prediction(launch, launches, per_unit, resident, busiest, times, floor)


def table() -> str:
    """One row for each kernel and device."""
    rows = [
        "| device, kernel | launches | programs, of which a processor holds | instructions | limits, µs "
        "| predicted, µs | floor, µs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for device in DEVICES:
        for x in predictions(device):
            if x.floor > 0:
                limits = ", ".join(f"{name} {time:.0f}" for name, time in x.times.items())
                programs = "×".join(str(size) for size in x.launch.grid)
                unit = {"product_kernel": " a step"}.get(x.launch.name, " a logit")
                instructions = f"{x.per_unit:.1f}{unit}" if x.per_unit else ""
                rows.append(
                    f"| {device.name}, `{x.launch.name}` | {x.launches} | {programs}, {x.resident} | {instructions} "
                    f"| {limits} | {x.predicted:.0f} | {x.floor:.0f} |"
                )
    return "\n".join(rows)


def main(arguments: list[str]) -> int:
    text = table()
    if "--write" not in arguments:
        print(text)
        return 0
    before, rest = DOCUMENT.read_text().split(BEGIN)
    _, after = rest.split(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
