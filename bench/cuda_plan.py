"""What an H100 would need for the CUDA kernels, predicted from their machine code: no measurement.

    python -m bench.cuda_plan            print the table
    python -m bench.cuda_plan --write    and put it into docs/kernels-cuda.md

A launch's time is the longest of: its bytes at the memory's rate; its instructions at one a cycle and scheduler, in
whole waves of the blocks that a multiprocessor holds; its exponentials at 16 a cycle and multiprocessor. The floor is
the longest of the bytes and the exponentials alone. Neither counts latency, the launch itself or what misses a cache.
Needs what bench.cuda_resources needs, built for sm_90.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import ceil

from bench.cuda_resources import Kernel, cuobjdump, read, write_between
from pcmecl_fast.ops.backends import extension

BEGIN, END = "<!-- plan: begin -->", "<!-- plan: end -->"
MULTIPROCESSORS, CLOCK, BYTES = 132, 1.98e9, 3.35e12  # of an H100 SXM, by its data sheet
B, D, E, N = 65536, 512, 7, 512  # as bench/cases.py has them on a GPU
Q = E * (E - 1) // 2
STRIPS = D // 128  # of a warp's loads of four float32 numbers a lane
TREES, HEADS, TOKENS, WIDTH = 64, 8, 30, 64  # a prefix of nine, seven segments of three


@dataclass
class Launch:
    """A launch, how many instructions its warps issue, and what else it needs."""

    what: str
    kernel: Kernel
    instructions: float
    blocks: int
    threads: int = 128
    shared: int = 0
    bytes: float = 0
    exponentials: float = 0
    of_one: str = ""  # the unit of work
    units: float = 1

    def seconds(self) -> dict[str, float]:
        at_once = self.kernel.blocks(self.threads, self.shared) * MULTIPROCESSORS
        waves = ceil(self.blocks / at_once) * at_once / self.blocks if self.blocks > at_once else 1.0
        return {
            "issue": self.instructions / (4 * MULTIPROCESSORS * CLOCK) * waves,
            "memory": self.bytes / BYTES,
            "exp2": self.exponentials / (16 * MULTIPROCESSORS * CLOCK),
        }

    def floor(self) -> float:
        times = self.seconds()
        return max(times["memory"], times["exp2"])


def launches(kernels: list[Kernel]) -> list[Launch]:
    of = {kernel.name: kernel for kernel in kernels if kernel.arch == "sm_90"}
    features = 4.0 * B * D
    forward, backward = of["forward_kernel<float, 4, 7> of Direction"], of["backward_kernel<float, 4, 7> of Direction"]
    run, sums, fold = (
        of["run_kernel<float, 4, 7> of Direction"],
        of["sums_kernel<7, false> of Correlation"],
        of["gradients_kernel<7, false> of Correlation"],
    )
    runs = 4 * MULTIPROCESSORS
    logits, blocks_of_chunk = N * N * Q * Q, ceil(N / 32)
    warps_of_correlation = N * ceil(N / 32)
    of_logits = "quarter of the logits, 32 at a time"
    found = [
        Launch(
            "`direction_loss` forward, contrast",
            forward,
            forward.issued(B, [B, B * STRIPS, B * STRIPS, B]),
            bytes=2 * features,
            blocks=B // 4,
            of_one="sample",
            units=B,
        ),
        Launch(
            "its backward, features",
            backward,
            backward.issued(B, [B, B * STRIPS, B * STRIPS, B, B * STRIPS, B * STRIPS, 0, 0]),
            bytes=4 * features,
            blocks=B // 4,
            of_one="sample",
            units=B,
        ),
        Launch(
            "its backward, bank",
            run,
            run.issued_around(4 * runs, 4 * B / 2),
            blocks=runs,
            shared=4 * E * E,
            bytes=2 * features,
            of_one="sample",
            units=B,
        ),
        Launch(
            "`correlation_loss` sums",
            sums,
            pairs_issued(sums, warps_of_correlation),
            blocks=N // 4 * blocks_of_chunk,
            shared=4 * Q * 128,
            exponentials=2 * logits,
            of_one=of_logits,
            units=logits / 32,
        ),
        Launch(
            "its gradient of S",
            fold,
            pairs_issued(fold, warps_of_correlation),
            blocks=N // 4 * blocks_of_chunk,
            shared=4 * (Q + E * E) * 128,
            exponentials=2 * logits,
            of_one=of_logits,
            units=logits / 32,
        ),
    ]
    for way, trips, numbers in (("forward", [6, 3], 4), ("backward", [6, 3, 6, 3], 8)):
        kernel, heads = of[f"{way}_kernel<BFloat16, 8, false> of Tree"], TREES * HEADS
        # A warp of the backward takes one of two ways through the code: as often as there are tiles, each.
        found.append(
            Launch(
                f"`tree_attention` {way}, bfloat16",
                kernel,
                kernel.issued(2 * heads, [heads * each for each in trips]),
                blocks=heads * 2 // 4 * (1 if way == "forward" else 2),
                bytes=2.0 * numbers * heads * TOKENS * WIDTH,
                of_one="head of a tree",
                units=heads,
            )
        )
    return found


def pairs_issued(kernel: Kernel, warps: int) -> float:
    """Of the kernels over S: two loops inside each other over pairs of emotions, then those that write parts."""
    inside, around = kernel.loops()[:2]
    return warps * (Q * inside + (E - 1) * (around - inside) + len(kernel._addresses()) - sum(kernel.loops()[1:]))


def table(found: list[Launch]) -> str:
    lines = [
        "| launch | registers | blocks | instructions of one | issue | memory | exp2 | predicted | floor |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        times = one.seconds()
        shown = [f"{1e6 * time:.1f} µs" if time else "–" for time in times.values()]
        predicted = f"{1e6 * max(times.values()):.1f} µs | {1e6 * one.floor():.1f} µs |"
        per_unit = f"{one.instructions / one.units:.4g} a {one.of_one}"
        held = one.kernel.blocks(one.threads, one.shared)
        lines.append(f"| {one.what} | {one.kernel.registers} | {held} | {per_unit} | {' | '.join(shown)} | {predicted}")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    path, tool = extension._path(extension.CUDA_NAME), cuobjdump()
    if path is None or tool is None:
        print("needs the built CUDA extension and cuobjdump", file=sys.stderr)
        return 1
    text = table(launches(read(path, tool)))
    if "--write" in arguments:
        write_between(BEGIN, END, text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
