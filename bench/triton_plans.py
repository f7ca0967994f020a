"""Predicts the times of the Triton kernels from their compiled code; no GPU, nothing is measured.

    python -m bench.triton_plans            print the table
    python -m bench.triton_plans --write    and put it into docs/kernels.md

A launch takes as long as its slowest limit: its instructions at one a clock and scheduler, its exponentials, its
products on tensor cores, its bytes. The busiest processor counts, which has a whole number of programs. What is left
out: waiting for memory that other warps do not hide, bandwidth of L2, launching.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from bench import as_launched
from bench.as_launched import PROCESSORS, Launch
from bench.triton_resources import MEAN, STD, D, Workload, _attention, _correlation, _cuda
from pcmecl_fast.ops.correlation import CORRELATION_LOSS
from pcmecl_fast.ops.direction import DIRECTION_LOSS
from pcmecl_fast.ops.frames import CLIP_FRAMES
from pcmecl_fast.ops.tree_attention import TREE_ATTENTION

DOCUMENT = Path(__file__).parent.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- plans: begin -->", "<!-- plans: end -->"
B, N, E = 65_536, 512, 7  # samples of direction_loss, individuals of correlation_loss, emotions
WIDE = (16, 32)  # emotions of correlation_loss that have kernels of their own
PEOPLE = 48  # individuals of direction_loss's bank
TREES, TOKENS, HEADS, WIDTH = 64, 30, 8, 64
FRAMES, OLD, NEW = 16, 256, 224
SCHEDULERS, EXPONENTIALS = 4, 16  # of a processor: instructions of a warp, and exponentials, a clock
REGISTERS, SHARED = 64 << 10, {90: 227 << 10, 80: 163 << 10}


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet."""

    name: str
    capability: int
    clock: float  # Hz, boosted
    bandwidth: float  # bytes/s of its memory
    products: dict[int, float]  # dense operations/s of tensor cores by the bytes of a number; float32 as TF32

    @property
    def processors(self) -> int:
        return PROCESSORS[self.capability]


DEVICES = (
    Device("H100", 90, 1.755e9, 3.35e12, {4: 495e12, 2: 989e12}),
    Device("A100", 80, 1.41e9, 1.94e12, {4: 156e12, 2: 312e12}),
)


@dataclass(frozen=True)
class Needs:
    """What all launches of a kernel in a call do."""

    instructions: float = 0.0  # that their warps issue
    of_one: str = ""  # unit of work, of which `units` are done
    units: float = 1.0
    bytes: float = 0.0  # of memory
    operations: float = 0.0  # on tensor cores
    number: int = 4  # bytes of a number of a product
    exponentials: float = 0.0
    again: float = 1.0  # how often each of these is computed
    uneven: float = 1.0  # the units of the busiest program over the average


@dataclass(frozen=True)
class Prediction:
    """Of all launches of a kernel in a call, in microseconds; the floor has neither instructions nor a busiest one."""

    call: str
    launch: Launch
    launches: int
    needs: Needs
    resident: int  # programs of a processor
    times: dict[str, float] = field(default_factory=dict)  # by limit
    floor: float = 0.0

    @property
    def predicted(self) -> float:
        return max(self.times.values())

    @property
    def per_unit(self) -> float:
        return self.needs.instructions / self.needs.units


def calls() -> Iterator[tuple[str, Workload]]:
    """A forward and backward of every operator at the sizes of docs/performance.md."""
    of_sample = (True, True, False, False)
    for contrast in (0.0, 0.3):
        loss, label = partial(_loss, contrast), f"direction_loss, contrast {contrast}"
        yield f"{label}, bank frozen", Workload("", DIRECTION_LOSS, loss, needs=of_sample)
        yield f"{label}, deterministic", Workload("", DIRECTION_LOSS, loss, deterministic=True)
    for emotions in (E, *WIDE):
        label = "correlation_loss" if emotions == E else f"correlation_loss, {emotions} emotions"
        yield label, Workload("", CORRELATION_LOSS, partial(_correlation, emotions, "all", torch.float32))
    for word, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        yield f"tree_attention, {word}", Workload("", TREE_ATTENTION, partial(_attention, TOKENS, WIDTH, dtype))
    frames = (_cuda, (FRAMES, 3, OLD, OLD), (NEW, MEAN, STD, "bicubic"))
    yield "clip_frames", Workload("", CLIP_FRAMES, lambda: (frames[0](*frames[1]), *frames[2]))


def _loss(contrast: float) -> tuple[Any, ...]:
    features = (_cuda(B, D), _cuda(B, D), _cuda(PEOPLE, E, D))
    return (*features, *(_cuda(B, dtype=torch.int64) for _ in range(3)), None, 20.0, contrast, True, 0.0, "mean")


def predictions(device: Device) -> Iterator[Prediction]:
    """Of every kernel that the calls launch, in order; each with the first call that launches it."""
    known = set()
    for call, workload in calls():
        with as_launched.on(device.capability, repeats=True) as launched:
            workload.run(workload.arguments())
        groups: dict[tuple[Any, ...], list[Launch]] = {}
        for launch in launched:
            known_when_compiled = tuple(sorted(launch.compiled.src.constants))  # strides of 1: a product's layout
            groups.setdefault((launch.name, launch.grid, known_when_compiled), []).append(launch)
        for key, launches in groups.items():
            if (key, launches[0].compiled.hash) not in known:
                known.add((key, launches[0].compiled.hash))
                yield _predicted(device, call, launches, launched)


def _predicted(device: Device, call: str, launches: list[Launch], of_call: list[Launch]) -> Prediction:
    launch = launches[0]
    needs = NEEDS[call.split(",")[0], launch.name](call, launches, of_call)
    programs = prod(launch.grid)
    busiest = -(-programs // device.processors) * device.processors / programs * needs.uneven
    micro = 1e6 / device.processors / device.clock  # microseconds for something that a processor does in a clock
    floors = {
        "bytes": needs.bytes / device.bandwidth * 1e6,
        "tensor cores": needs.operations / device.products[needs.number] * 1e6,
        "exp2": needs.exponentials / EXPONENTIALS * micro,
    }
    times = {"issue": needs.instructions / SCHEDULERS * micro * busiest, "bytes": floors["bytes"]}
    times |= {"tensor cores": floors["tensor cores"] * busiest, "exp2": floors["exp2"] * busiest * needs.again}
    resident = launch.programs_a_processor(REGISTERS, SHARED[device.capability])
    used = {limit: time for limit, time in times.items() if time > 0}
    return Prediction(call, launch, len(launches), needs, resident, used, max(floors.values()))


def _executed(launch: Launch, trips: float, loop: list[str] | None = None) -> float:
    """Instructions that the warps of all programs issue, if an innermost loop, the longest, is gone round so often."""
    code = [x for x in launch.instructions if not x.startswith("NOP")]
    loop = loop or next(iter(launch.loops), [])
    return prod(launch.grid) * launch.warps * (len(code) + (trips - 1) * len(loop))


def _of_samples(rows: int, writes: int) -> Callable[..., Needs]:
    """A walk over samples that reads so many features of each, and writes so many."""

    def needs(call: str, launches: list[Launch], of_call: list[Launch]) -> Needs:
        launch, programs = launches[0], launches[0].grid[0]
        return Needs(
            instructions=B * launch.warps * len(launch.loops[0]),
            of_one="sample",
            units=B,
            bytes=4 * B * D * (rows + writes),
            exponentials=0 if "contrast 0.0" in call else B * E,
            uneven=-(-B // programs) * programs / B,
        )

    return needs


def _of_bank(call: str, launches: list[Launch], of_call: list[Launch]) -> Needs:
    launch = launches[0]
    walks = launch.grid[1]  # of all samples
    executed = B * walks * launch.warps * len(launch.loops[0])
    return Needs(executed, "sample", B, bytes=4 * B * D * 2)


def _of_pairs(call: str, launches: list[Launch], of_call: list[Launch]) -> Needs:
    options = launches[0].options
    q = options["Q"]
    logits = N * N * q * q
    walk = options["columns"] // options["BLOCK"]
    per_strip = options.get("blocks_per_strip")
    made = q * q  # logits of two individuals
    at_once = q  # of them, by a turn of the loop
    if per_strip is None:
        groups = -(-options["E"] // options["GROUP"])
        walk, per_strip = walk * groups, options["units_per_strip"]
        at_once = options["E"] // (2 if launches[0].name == "wide_sums_kernel" else 1)
        made = q * groups * options["GROUP"] * at_once
    row_strips, column_strips = launches[0].grid
    uneven = options["rows_per_strip"] * row_strips / options["rows"] * per_strip * column_strips / walk
    return Needs(
        instructions=N * N / 32 * made * len(launches[0].loops[0]) / at_once,
        of_one="32 logits",
        units=logits / 32,
        exponentials=2 * logits,
        again=made / q**2,
        uneven=uneven,
    )


def _of_product(call: str, launches: list[Launch], of_call: list[Launch]) -> Needs:
    launch, options = launches[0], launches[0].options
    chunks = len(_walks(of_call))
    # Each of the four products, forward and backward, is launched once a chunk.
    operations = 3 * 2 * (N * _emotions(of_call)) ** 2 * D * len(launches) / chunks
    step = 2 * 3 * options["BLOCK_M"] * options["BLOCK_N"] * options["BLOCK_K"]
    return Needs(
        instructions=operations / step * len(launch.loops[0]) * launch.warps,
        of_one="2¹⁸ multiply-adds",
        units=operations / 6 / 2**18,
        operations=operations,
    )


def _walks(of_call: list[Launch]) -> list[Launch]:
    """Those of a correlation's forward over pairs of individuals: one for each chunk."""
    return [x for x in of_call if x.name in ("sums_kernel", "wide_sums_kernel")]


def _emotions(of_call: list[Launch]) -> int:
    return _walks(of_call)[0].options["E"]


def _of_features(moved: int, trips: Callable[[Launch], float]) -> Callable[..., Needs]:
    """A walk over individuals that moves all features so often; its loop is the one with most multiply-adds."""

    def needs(call: str, launches: list[Launch], of_call: list[Launch]) -> Needs:
        loops = (max(x.loops, key=lambda loop: sum("FFMA" in line for line in loop)) for x in launches)
        instructions = sum(_executed(x, trips(x), loop) for x, loop in zip(launches, loops, strict=True))
        numbers = N * _emotions(of_call) * D * moved
        return Needs(instructions, "individual", N * len(launches), bytes=4 * numbers * len(launches))

    return needs


def _turns(launch: Launch) -> float:
    """Of the loop that takes a norm's part from a gradient: over pairs of emotions, or over emotions of pairs."""
    options = launch.options
    return options["E" if options["WIDE"] else "Q"] * D / min(D, options["BLOCK_D"])


def _of_shares(call: str, launches: list[Launch], of_call: list[Launch]) -> Needs:
    x = launches[0]
    numbers = prod(x.grid) * x.options["SIZE"] * len(launches)
    return Needs(_executed(x, 1) * len(launches), "number", numbers, bytes=4 * numbers * (x.options["SHARES"] + 1))


def _of_log_sums(call: str, launches: list[Launch], of_call: list[Launch]) -> Needs:
    walk = _walks(of_call)[0]
    strips, pairs = sum(walk.grid), walk.options["Q"]
    at_once = sum("LDG" in x for x in launches[0].loops[0])  # strips, which the compiler writes out
    executed = _executed(launches[0], strips / 2 / at_once)
    return Needs(executed, "row or column", 2 * N * pairs, bytes=4 * N * pairs * strips)


def _of_trees(moved: int, products: int) -> Callable[..., Needs]:
    """A program a head of a tree, which moves so many of q, k, v, out and their gradients, in so many products."""

    def needs(call: str, launches: list[Launch], of_call: list[Launch]) -> Needs:
        number = 2 if "bfloat16" in call else 4
        numbers = TREES * HEADS * TOKENS * WIDTH
        return Needs(
            instructions=_executed(launches[0], 1),
            of_one="head of a tree",
            units=TREES * HEADS,
            bytes=number * numbers * moved,
            operations=2 * products * TREES * HEADS * TOKENS**2 * WIDTH * (3 if number == 4 else 1),
            number=number,
            exponentials=TREES * HEADS * TOKENS**2,
        )

    return needs


def _of_pixels(call: str, launches: list[Launch], of_call: list[Launch]) -> Needs:
    launch = launches[0]
    pixels = FRAMES * 3 * (NEW**2 if launch is next(x for x in of_call if x.name == launch.name) else OLD**2)
    executed = _executed(launch, launch.options["PARTS"])
    return Needs(executed, "32 pixels", pixels / 32, bytes=4 * FRAMES * 3 * (OLD**2 + NEW**2))


def _of_bands(call: str, launches: list[Launch], of_call: list[Launch]) -> Needs:
    launch, options = launches[0], launches[0].options
    pixels = prod(launch.grid) * options["BLOCK"]
    # The loop goes over the taps of a new pixel: five of 256 on 224, one more than a gradient's.
    return Needs(_executed(launch, 5), "pixel of a side", pixels, bytes=4 * pixels * (options["TAPS"] + 1))


NEEDS: dict[tuple[str, str], Callable[..., Needs]] = {
    ("direction_loss", "loss_kernel"): _of_samples(2, 0),
    ("direction_loss", "backward_kernel"): _of_samples(2, 2),
    ("direction_loss", "bank_kernel"): _of_bank,
    ("direction_loss", "sum_kernel"): _of_shares,
    ("correlation_loss", "prepare_kernel"): _of_features(4, lambda x: D / x.options["BLOCK_D"]),
    ("correlation_loss", "product_kernel"): _of_product,
    ("correlation_loss", "sum_kernel"): _of_shares,
    ("correlation_loss", "sums_kernel"): _of_pairs,
    ("correlation_loss", "log_sums_kernel"): _of_log_sums,
    ("correlation_loss", "fold_kernel"): _of_pairs,
    ("correlation_loss", "wide_sums_kernel"): _of_pairs,
    ("correlation_loss", "wide_fold_kernel"): _of_pairs,
    ("correlation_loss", "gradient_kernel"): _of_features(6, _turns),
    ("tree_attention", "forward_kernel"): _of_trees(4, 2),
    ("tree_attention", "backward_kernel"): _of_trees(7, 5),
    ("clip_frames", "weights_kernel"): _of_bands,
    ("clip_frames", "resample_kernel"): _of_pixels,
}


def table(plans: Iterable[tuple[Device, Iterable[Prediction]]] | None = None) -> str:
    """One row for each kernel and device."""
    rows = [
        "| kernel | launches | programs | registers | programs a processor holds | waves | instructions | MB "
        "| limits, µs | predicted, µs | floor, µs |",
        f"|{' --- |' * 11}",
    ]
    plans = plans or ((device, predictions(device)) for device in DEVICES)
    rows += [_row(device, x) for device, predicted in plans for x in predicted]
    return "\n".join(rows)


def written() -> str:
    """The table as the document has it."""
    return DOCUMENT.read_text().split(BEGIN)[1].split(END)[0].strip()


def _row(device: Device, x: Prediction) -> str:
    programs = prod(x.launch.grid)
    cells = [
        f"{device.name}, {x.call}: `{x.launch.name}`",
        x.launches,
        programs,
        x.launch.usage["REG"],
        x.resident,
        f"{programs / device.processors / x.resident:.2f}",
        f"{x.per_unit:,.{1 if x.per_unit < 1000 else 0}f} per {x.needs.of_one}",
        f"{x.needs.bytes / 1e6:.0f}" if x.needs.bytes > 5e5 else "",
        ", ".join(f"{limit} {time:.1f}" for limit, time in x.times.items()),
        f"{x.predicted:.1f}",
        f"{x.floor:.1f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


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
