"""What an H100 and an A100 would need for the CUDA kernels, predicted from their machine code: no measurement.

    python -m bench.cuda_plan            print the tables
    python -m bench.cuda_plan --write    and put them into docs/kernels-cuda.md

A launch's time is the longest of: its bytes at the memory's rate; its instructions at one a cycle and scheduler, on the
multiprocessor that has most of them, in whole waves of the blocks that one holds; its exponentials at 16 a cycle and
multiprocessor. The floor is the longest of the bytes and the exponentials alone. Neither counts latency, the launch
itself, what misses a cache, nor that an A100's float32 units take two cycles for a warp. Needs what
bench.cuda_resources needs, built for sm_80 and sm_90.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from bench.cuda_resources import DOCUMENT, Kernel, cuobjdump, read, write_between
from pcmecl_fast.ops.backends import extension

BEGIN, END = "<!-- plan: begin -->", "<!-- plan: end -->"
B, D, E, N = 65536, 512, 7, 512  # as bench/cases.py has them on a GPU
Q = E * (E - 1) // 2
STRIPS = D // 128  # of a warp's loads of four float32 numbers a lane
STRETCHES = B // 1024  # of samples that are counted at once
TREES, HEADS, TOKENS, WIDTH = 64, 8, 30, 64  # a prefix of nine, seven segments of three
SEARCH = 3  # steps to find a token's segment
LAUNCH = 1e-6  # seconds
PLANES, LARGE, SMALL = 3 * 16, 256, 224  # frames, bicubic: five taps, four of the way back


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet; clocks and bandwidths as bench/triton_plans.py has them."""

    name: str
    arch: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes/s
    lanes: int  # float32 units of a multiprocessor

    @property
    def float32(self) -> float:
        """Operations a second."""
        return 2 * self.lanes * self.multiprocessors * self.clock


DEVICES = (Device("H100", "sm_90", 132, 1.755e9, 3.35e12, 128), Device("A100", "sm_80", 108, 1.41e9, 1.94e12, 64))


@dataclass
class Launch:
    """A launch, how many instructions its warps issue, and what else it needs."""

    what: str
    device: Device
    kernel: Kernel
    instructions: float
    blocks: int
    of_one: str  # the unit of work
    units: float
    threads: int = 128
    shared: int = 0
    bytes: float = 0
    exponentials: float = 0
    bound: str = ""  # what a launch is bound by that may take more than `allowed`

    @property
    def held(self) -> int:
        return self.kernel.blocks(self.threads, self.shared)

    @property
    def waves(self) -> float:
        return self.blocks / (self.held * self.device.multiprocessors)

    def seconds(self) -> dict[str, float]:
        device = self.device
        on_busiest = ceil(self.waves) * self.held if self.waves > 1 else ceil(self.blocks / device.multiprocessors)
        schedulers = min(4, ceil(self.threads / 32) * min(on_busiest, self.held))
        return {
            "issue": self.instructions / self.blocks * on_busiest / (schedulers * device.clock),
            "memory": self.bytes / device.bandwidth,
            "exp2": self.exponentials / (16 * device.multiprocessors * device.clock),
        }

    def predicted(self) -> float:
        return max(self.seconds().values())

    def floor(self) -> float:
        times = self.seconds()
        return max(times["memory"], times["exp2"])

    def allowed(self) -> float:
        """Twice the floor, and what is little beside the launch itself."""
        return 2 * self.floor() + LAUNCH


def launches(kernels: list[Kernel], device: Device) -> list[Launch]:
    """Of every operator, in the order of a call; those that bench's sizes have no use for are left out."""
    of = {kernel.name: kernel for kernel in kernels if kernel.arch == device.arch}

    def launch(what: str, name: str, count: Callable[[Kernel], float], **needs: object) -> Launch:
        return Launch(what, device, of[name], count(of[name]), **needs)  # type: ignore[arg-type]

    return [*_direction(launch, device), *_correlation(launch), *_tree(launch), *_frames(launch)]


def _direction(launch: Callable[..., Launch], device: Device) -> list[Launch]:
    features, runs, sample = 4.0 * B * D, 4 * device.multiprocessors, {"of_one": "sample", "units": B}
    table = 4.0 * (runs + N) * E * D
    strips = B * STRIPS

    def trips(*each: float) -> Callable[[Kernel], float]:
        return lambda kernel: kernel.issued(B, each)

    return [
        launch(
            "`direction_loss` with contrast, `direction_logits`",
            "forward_kernel<float, 4, 7> of Direction",
            trips(B, strips, strips, B),
            **sample, blocks=B // 4, bytes=2 * features,
        ),
        launch(
            "`direction_loss` without contrast",
            "forward_kernel<float, 4, 1> of Direction",
            trips(B, strips, strips),
            **sample, blocks=B // 4, bytes=2 * features,
        ),
        launch(
            "sum of the losses",
            "parts_kernel of DirectionResult",
            lambda kernel: kernel.issued(B / 128, [], last=B / 1024),
            **sample, blocks=B // 1024, threads=256, bytes=20.0 * B,
        ),
        launch(
            "those of its blocks",
            "result_kernel of DirectionResult",
            lambda kernel: kernel.issued(8, [B / 1024 / 32], last=1),
            **sample, blocks=1, threads=256, bytes=8.0 * B / 1024,
        ),
        launch(
            "gradient of the features, with contrast",
            "backward_kernel<float, 4, 7> of Direction",
            trips(B, strips, strips, B, strips, strips, 0, 0),
            **sample, blocks=B // 4, bytes=4 * features,
        ),
        launch(
            "the same without",
            "backward_kernel<float, 4, 1> of Direction",
            trips(B, strips, strips, strips, strips, 0, 0),
            **sample, blocks=B // 4, bytes=4 * features,
        ),
        launch(
            "samples of each individual counted",
            "count_kernel of BankOrder",
            lambda kernel: kernel.issued(STRETCHES, [0, STRETCHES * N / 128, 0, B / 128]),
            **sample, blocks=STRETCHES, threads=32, bytes=8.0 * B + 4 * N * STRETCHES,
        ),
        launch(
            "each individual's counts added up",
            "stretches_kernel of BankOrder",
            lambda kernel: kernel.issued(N, [N * STRETCHES / 32]),
            **sample, blocks=N // 4, bytes=8.0 * N * STRETCHES,
        ),
        launch(
            "those of individuals added up",
            "scan_kernel of BankOrder",
            lambda kernel: kernel.issued(N / 32, [N / 32]),
            **sample, blocks=1, threads=N, bytes=8.0 * N,
        ),
        launch(
            "samples put in order",
            "place_kernel of BankOrder",
            lambda kernel: kernel.issued(STRETCHES, [0, B / 128]),
            **sample, blocks=STRETCHES, threads=32, bytes=12.0 * B + 4 * N * STRETCHES,
        ),
        launch(
            "gradient of the bank",
            "run_kernel<float, 4, 7> of Direction",
            lambda kernel: kernel.issued_around(4 * runs, 4 * B / 2),
            **sample, blocks=runs, shared=4 * E * E, bytes=2 * features + table,
        ),
        launch(
            "its runs added up",
            "add_runs_kernel<float> of BankOrder",
            lambda kernel: kernel.issued(N * E * D / 32, [N * E * D / 32 * 3, 0]),
            **sample, blocks=N * E * D // 128, bytes=table + 4.0 * N * E * D,
        ),
    ]  # fmt: skip


def _correlation(launch: Callable[..., Launch]) -> list[Launch]:
    logits, column_blocks, features = N * N * Q * Q, ceil(N / 32), 4.0 * N * E * D
    warps = N * column_blocks
    quarter = {"of_one": "quarter of the logits, 32 at a time", "units": logits / 32, "exponentials": 2.0 * logits}
    individual = {"of_one": "individual", "units": N}
    pair = {"of_one": "pair", "units": N * Q}
    own_lines = {**individual, "blocks": N, "threads": 64, "exponentials": 4.0 * N * Q * Q}
    return [
        launch(
            "`correlation_loss`: differences prepared",
            "changes_kernel<float, 4, 7> of Changes",
            lambda kernel: kernel.issued(4 * N, [0, 4 * N, 0, 4 * N, 4 * (E - 1) * N, STRIPS * Q * N, Q * N]),
            **individual, blocks=N, bytes=4 * features,
        ),
        launch(
            "sums",
            "sums_kernel<7, false> of Correlation",
            lambda kernel: _pairs_issued(kernel, warps),
            **quarter, blocks=N // 4 * column_blocks, shared=4 * Q * 128, bytes=4.0 * (N * E) ** 2,
        ),
        launch(
            "the loss of the sums",
            "result_kernel<4> of CorrelationResult",
            lambda kernel: kernel.issued(32, [N * Q / 128, 0], last=1),
            **individual, blocks=1, threads=1024, bytes=16.0 * N * Q,
            bound="one block",
        ),
        launch(
            "gradient of S",
            "gradients_kernel<7, false> of Correlation",
            lambda kernel: _pairs_issued(kernel, warps),
            **quarter, blocks=N // 4 * column_blocks, shared=4 * (Q + E * E) * 128, bytes=8.0 * (N * E) ** 2,
        ),
        launch(
            "lengths and positives",
            "finish_kernel<float, 4, 7> of CorrelationFinish",
            lambda kernel: kernel.issued(4 * N, [(E - 1) * N, N, 4 * N]),
            **individual, blocks=N, shared=16 * E * E, bytes=6 * features,
        ),
        launch(
            'sums with `negatives="within"`',
            "sums_within_kernel<7> of Correlation",
            lambda kernel: kernel.issued(2 * N, [2 * N, N, 2 * N * (E - 1), 2 * N]),
            **own_lines, shared=4 * (E * E + 2 * Q), bytes=4.0 * N * (E * E + 4 * Q),
        ),
        launch(
            "their gradients",
            "gradients_within_kernel<7> of Correlation",
            lambda kernel: kernel.issued(2 * N, [2 * N, N, N, 2 * N * (E - 1), 2 * N, 2 * N]),
            **own_lines, shared=4 * (E * E + 4 * Q + Q * E), bytes=4.0 * N * (2 * E * E + 6 * Q),
        ),
        launch(
            "valid pairs counted",
            "count_kernel of float",
            lambda kernel: kernel.issued(32, [N * Q / 128], last=1),
            **pair, blocks=1, threads=1024, bytes=4.0 * N * Q,
        ),
        launch(
            "logarithms of a rectangle's sums",
            "logarithms_kernel of CorrelationLogarithms",
            lambda kernel: kernel.issued(N * Q / 32, []),
            **pair, blocks=N * Q // 128, bytes=24.0 * N * Q,
        ),
        launch(
            "sums of their logarithms",
            "exponentials_kernel of CorrelationLogarithms",
            lambda kernel: kernel.issued(N * Q / 32, []),
            **pair, blocks=N * Q // 128, bytes=16.0 * N * Q,
        ),
    ]  # fmt: skip


def _tree(launch: Callable[..., Launch]) -> list[Launch]:
    heads, tiles = TREES * HEADS, TREES * HEADS * 2
    # Sixteen tokens see one step of keys, the others two; as keys, two and one.
    head = {"of_one": "head of a tree", "units": heads}
    rows = float(heads * TOKENS * WIDTH)
    half, single = "{}_kernel<BFloat16, 8, false> of Tree", "{}_kernel<4, 8, true> of Tree"
    # Steps of four keys for each token, of four queries for each key; a warp of a backward takes one of two ways.
    of_queries = heads * sum(ceil((token + 1 if token < 9 else 10 + token % 3) / 4) for token in range(TOKENS))
    of_keys = heads * sum(ceil((TOKENS - token if token < 9 else 3 - token % 3) / 4) for token in range(TOKENS))
    search = heads * SEARCH * (TOKENS - 9)
    by_ones = heads * ceil(TOKENS / 4)

    def issued(warps: float, *trips: float) -> Callable[[Kernel], float]:
        return lambda kernel: kernel.issued(warps, trips)

    return [
        launch(
            "`tree_attention` in bfloat16",
            half.format("forward"),
            issued(tiles, tiles * SEARCH, heads * 3),
            **head, blocks=tiles // 4, bytes=8 * rows,
        ),
        launch(
            "⟨grad, out⟩ of its queries",
            half.format("means"),
            issued(tiles, tiles * SEARCH, heads * 5),
            **head, blocks=tiles // 4, bytes=8 * rows,
        ),
        launch(
            "its gradient in bfloat16",
            half.format("backward"),
            issued(tiles, tiles * SEARCH, heads * 3, tiles * SEARCH, heads * 3),
            **head, blocks=tiles // 4 * 2, bytes=14 * rows,
        ),
        launch(
            "`tree_attention` in float32",
            single.format("forward"),
            issued(heads * TOKENS, search, of_queries),
            **head, blocks=by_ones, bytes=16 * rows,
        ),
        launch(
            "its gradient in float32",
            single.format("backward"),
            issued(heads * TOKENS, search, of_queries, search, of_keys),
            **head, blocks=2 * by_ones, bytes=32 * rows,
        ),
    ]  # fmt: skip


def _frames(launch: Callable[..., Launch]) -> list[Launch]:
    found = []
    for what, after, taps in (("`clip_frames`", SMALL, 5), ("its gradient", LARGE, 4)):
        blocks = PLANES * ceil(after / 16) * ceil(after / 64)
        found.append(
            launch(
                what,
                f"resize_kernel<float, 4, {taps}> of Frames",
                lambda kernel, warps=8 * blocks: kernel.issued(warps, []),
                of_one="16 × 64 pixels", units=blocks, blocks=blocks, threads=256, shared=16 * 132 * 4,
                bytes=4.0 * PLANES * (LARGE**2 + SMALL**2),
            )
        )  # fmt: skip
    return found


def _pairs_issued(kernel: Kernel, warps: int) -> float:
    """Of the kernels over S: two loops inside each other over pairs of emotions, then those that write parts."""
    inside, around = kernel.loops()[:2]
    return warps * (Q * inside + (E - 1) * (around - inside) + len(kernel._addresses()) - sum(kernel.loops()[1:]))


def table(found: list[Launch]) -> str:
    device = found[0].device
    lines = [
        f"### {device.name}, {device.arch}\n",
        "| launch | registers | blocks | waves | instructions of one | issue | memory | exp2 | predicted | floor |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        shown = [_time(time) for time in one.seconds().values()]
        per_unit = f"{one.instructions / one.units:.4g} a {one.of_one}"
        bound = f" ({one.bound})" if one.predicted() > one.allowed() else ""
        lines.append(
            f"| {one.what} | {one.kernel.registers} | {one.held} | {one.waves:.2g} | {per_unit} | "
            f"{' | '.join(shown)} | {_time(one.predicted())}{bound} | {_time(one.floor())} |"
        )
    operations = 2 * (N * E) ** 2 * D
    product = max(operations / device.float32, 4 * ((N * E) ** 2 + 2 * N * E * D) / device.bandwidth)
    lines.append(
        f"| each product of `correlation_loss`: V Tᵀ, dS T, dSᵀ V | cuBLAS's | | | | | | | – | {_time(product)} |"
    )
    return "\n".join(lines) + "\n"


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} µs" if seconds >= 5e-8 else f"{1e6 * seconds:.2f} µs" if seconds else "–"


def tables(kernels: list[Kernel]) -> str:
    return "\n".join(table(launches(kernels, device)) for device in DEVICES)


def written() -> str:
    """What the document holds."""
    return DOCUMENT.read_text().split(BEGIN)[1].split(END)[0].strip()


def main(arguments: list[str]) -> int:
    path, tool = extension._path(extension.CUDA_NAME), cuobjdump()
    if path is None or tool is None:
        print("needs the built CUDA extension and cuobjdump", file=sys.stderr)
        return 1
    text = tables(read(path, tool))
    if "--write" in arguments:
        write_between(BEGIN, END, text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
