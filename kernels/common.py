"""What the kernels share: which launch configuration, on which device, and sums over a whole grid."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ROUNDING_SQUARED = tl.constexpr(1e-12)  # the same between unit vectors, computed in float32
EPSILON_SQUARED = tl.constexpr(1e-16)  # ε², ε = 1e-8 as in `ops/reference.py`
ROUNDS, LAUNCHES = 5, 10  # of tuning: each configuration is timed so many times, over so many launches
BUSY_CYCLES = 2_000_000  # of the device's clock: about a millisecond, longer than LAUNCHES take the host
SUM = 1024  # numbers of a program that adds shares up
CLEARLY = 0.95  # of the first configuration's time: what takes more is no better

logger = logging.getLogger("pcmecl_fast")

_chosen: dict[Hashable, Config] = {}
_announced: set[torch.device] = set()


@dataclass(frozen=True)
class Config:
    """How a kernel is launched: its block sizes, warps, and depth of the software pipeline."""

    warps: int = 4
    stages: int = 2
    blocks: dict[str, int] = field(default_factory=dict)

    def options(self) -> dict[str, int | bool]:
        """As keyword arguments of a launch. Fused multiply-adds explicitly: Triton's default differs by version."""
        return {**self.blocks, "num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def run_tuned(
    name: str, shape_class: Hashable, configs: Sequence[Config], x: Tensor, launch: Callable[[Config], Any]
) -> None:
    """Launch on x's device and current stream with the fastest configuration for this kernel, shape class and GPU.

    The first call times them all, so `launch` must be repeatable; it waits for the device. Inside a CUDA graph's
    capture, where nothing can be timed, and in the interpreter the first configuration is taken and none is kept. So
    it is under `torch.use_deterministic_algorithms`: a configuration may set the order of a sum, and times differ.
    """
    with torch.cuda.device_of(x):
        if INTERPRETED or not x.is_cuda or torch.are_deterministic_algorithms_enabled():
            launch(configs[0])
            return
        _announce(x.device)
        key = (name, shape_class, x.device)
        if key not in _chosen and len(configs) > 1 and not torch.cuda.is_current_stream_capturing():
            _chosen[key] = _fastest(launch, configs)
        launch(_chosen.get(key, configs[0]))


def run(x: Tensor, launch: Callable[[], Any]) -> None:
    """Launch on x's device and current stream a kernel that has one configuration."""
    run_tuned("", None, [Config()], x, lambda _: launch())


def programs_for(x: Tensor, work: int, per_processor: int) -> int:
    """How many programs share `work` items in a loop: enough to fill the GPU, at least one."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    return max(1, min(work, processors * per_processor))


def major_capability(x: Tensor) -> int:
    """The first number of the compute capability of x's device: 8 of an A100, 12 of an RTX 5090; 0 of a CPU."""
    return torch.cuda.get_device_properties(x.device).major if x.is_cuda else 0


def counter_for(x: Tensor) -> Tensor:
    """A zeroed integer on x's device for `sum_over_grid`, which leaves it zeroed.

    Each call makes its own. One that outlives the call is wrong in a CUDA graph: made inside, it lies in that graph's
    memory, which torch.compile's graphs take back, and two graphs that replay side by side would share it.
    """
    return torch.zeros((), dtype=torch.int32, device=x.device)


def add_shares(
    partial: Tensor,  # (shares, *) float32, contiguous
    out: Tensor,  # (*) float32, contiguous
    *,
    add: bool = False,
) -> None:
    """Write the sum over shares, or add it, in order. Call it inside `run`."""
    numbers = out.numel()
    sum_kernel[(triton.cdiv(numbers, SUM),)](partial, out, numbers, SHARES=len(partial), ADD=add, SIZE=SUM, num_warps=4)


def power_of_2(number: int, least: int = 1) -> int:
    """The smallest power of two that is neither below `number` nor below `least`."""
    return max(triton.next_power_of_2(max(number, 1)), least)


def _fastest(launch: Callable[[Config], Any], configs: Sequence[Config]) -> Config:
    for config in configs:
        launch(config)  # compiles
    return clearly_fastest(configs, lambda config: _milliseconds(launch, config))


def clearly_fastest(configs: Sequence[Config], milliseconds: Callable[[Config], float]) -> Config:
    """The first configuration, unless another takes clearly less time.

    Each one's time is its shortest of several rounds, in which they take turns: a GPU's clock changes meanwhile.
    """
    rounds = [[milliseconds(config) for config in configs] for _ in range(ROUNDS)]
    shortest = [min(times) for times in zip(*rounds, strict=True)]
    best = shortest.index(min(shortest))
    return configs[best if shortest[best] < CLEARLY * shortest[0] else 0]


def _milliseconds(launch: Callable[[Config], Any], config: Config) -> float:
    """The device's time of LAUNCHES launches. It is kept busy until all are queued: else the host's time is taken."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(BUSY_CYCLES)
    start.record()
    for _ in range(LAUNCHES):
        launch(config)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _announce(device: torch.device) -> None:
    if device not in _announced:
        _announced.add(device)
        logger.info(
            "compiling Triton kernels for %s; the first call of each takes a few seconds",
            torch.cuda.get_device_name(device),
        )


@triton.jit
def inverse_norm(square):
    """1 / |x| from |x|²; 0 where |x| ≤ ε, which makes the unit vector and the gradient through it 0. NaN stays NaN."""
    too_short = square <= EPSILON_SQUARED
    return tl.where(too_short, 0.0, tl.rsqrt(tl.where(too_short, 1.0, square)))


@triton.jit
def inverse_change(square, least, OF_UNITS: tl.constexpr):
    """1 / max(|δ|, least) from |δ|², as in csrc/common/directions.h; and its square, 0 where that is 1 / least."""
    is_short = square <= least * least
    bounded = tl.where(is_short, least * least, square)
    inverse = inverse_norm(bounded)
    if OF_UNITS:
        inverse = tl.where(bounded <= ROUNDING_SQUARED, 0.0, inverse)
    return inverse, tl.where(is_short, 0.0, inverse * inverse)


@triton.jit
def load_scale(scale, scale_number):
    """The logit scale: a tensor on the device where there is one, else the number."""
    if scale is None:
        return scale_number
    else:  # noqa: RET505 - Triton compiles one branch only if it is written as one
        return tl.load(scale).to(tl.float32)


@triton.jit
def sum_over_grid(partial, counter, first, second, BLOCK: tl.constexpr):
    """The sums of two numbers over all programs of a one-dimensional grid, in a fixed order: (last, sum, sum).

    Only the program that finishes last has them; `last` tells whether this is the one. `partial` holds two numbers for
    each program; `counter` is 0 before and after.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(partial + program, first)
    tl.store(partial + programs + program, second)
    tl.debug_barrier()  # the stores come before the count, which releases them to the other programs
    last = tl.atomic_add(counter, 1) == programs - 1
    firsts = tl.zeros([BLOCK], tl.float32)
    seconds = tl.zeros([BLOCK], tl.float32)
    if last:
        for start in range(0, programs, BLOCK):
            index = start + tl.arange(0, BLOCK)
            inside = index < programs
            firsts += tl.load(partial + index, inside, other=0.0, volatile=True)
            seconds += tl.load(partial + programs + index, inside, other=0.0, volatile=True)
        tl.store(counter, 0)
    return last, tl.sum(firsts), tl.sum(seconds)


@triton.jit
def sum_kernel(
    partial,  # (SHARES, numbers) float32, read
    out,  # (numbers,) float32, written, or added to
    numbers,  # of one share
    SHARES: tl.constexpr,  # sums of each number
    ADD: tl.constexpr,  # whether to add to out
    SIZE: tl.constexpr,  # numbers of a program
):
    """A program owns SIZE numbers and adds their shares up in order. Bytes, which lie within L2, bound it."""
    at = tl.cast(tl.program_id(0), tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.load(partial + at, at < numbers, other=0.0)
    for share in tl.static_range(1, SHARES):
        total += tl.load(partial + tl.cast(share, tl.int64) * numbers + at, at < numbers, other=0.0)
    if ADD:
        total += tl.load(out + at, at < numbers, other=0.0)
    tl.store(out + at, total, at < numbers)
