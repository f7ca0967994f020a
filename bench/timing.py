"""How calls are timed: wall time on a CPU; on a GPU the device's time and the host's, apart."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import rehearsal
from pcmecl_fast.train.graphs import capture, rehearse

Run = Callable[[], Sequence[Tensor]]
CLOCK = 2e9  # cycles a second: no GPU spins much faster


def alternate(timers: Sequence[Callable[[], float]], seconds: float) -> list[list[float]]:
    """Sorted times of each, in turns; a fast one is timed several times per turn. All must be warm already."""
    turns = [max(1, min(50, round(0.2 / max(measure(), 1e-6)))) for measure in timers]
    times: list[list[float]] = [[] for _ in timers]
    begin = time.perf_counter()
    while len(times[0]) < 3 or (time.perf_counter() - begin < seconds and len(times[0]) < 2000):
        for measure, count, measured in zip(timers, turns, times, strict=True):
            measured += [measure() for _ in range(count)]
    return [sorted(measured) for measured in times]


def timer(run: Run, device: torch.device, *, as_it_runs: bool = False) -> Callable[[], float]:
    """A function that measures the seconds of one call, which must be warm already.

    Args:
        run: the call.
        device: on a CPU, wall time is measured; on a GPU, the device's own time.
        as_it_runs: on a GPU, what passes between two events on an idle stream, the host's work included.
    """
    return partial(timed, run, device) if as_it_runs or device.type != "cuda" else device_timer(run)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds taken by one call; on a GPU, between two events on its stream."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def device_timer(run: Run) -> Callable[[], float]:
    """A timer of the device alone, which never waits for the host.

    The calls are replays of a CUDA graph, or the calls themselves if they cannot be captured, several between two
    events, and all are enqueued while the device still spins.
    """
    call = replays(run)
    host, together = host_seconds(call), timed(call, torch.device("cuda"))
    count = max(1, min(20, round(1e-3 / max(together, 1e-6))))
    spin = int(1.5 * CLOCK * host * count)

    def measure() -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(spin)
        start.record()
        for _ in range(count):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / count

    return measure


def replays(run: Run) -> Callable[[], Any]:
    """The call's replay as a CUDA graph, or the call itself if it waits for the device or cannot be captured."""

    def step() -> tuple[Tensor, ...]:
        return tuple(run())

    try:
        rehearse(step, ())
        graph, _ = capture(step, ())
    except RuntimeError:
        return run
    return graph.replay


def host_seconds(run: Callable[[], Any]) -> float:
    """How long a call keeps the host on a GPU that is idle: until everything is enqueued."""
    times: list[float] = []
    while len(times) < 3 or (len(times) < 30 and sum(times) < 0.3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(times)


@contextmanager
def one_core() -> Iterator[None]:
    """One thread, and no garbage collection, which would hit some calls and not others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        torch.set_num_threads(threads)


def finished(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, returning only when its work is done, for timers unaware of GPUs."""
    if not torch.cuda.is_available():
        return run

    def wait(*args: Any) -> Any:
        result = run(*args)
        torch.cuda.synchronize()
        return result

    return wait


def peak_memory(run: Callable[[], Any], device: torch.device) -> float:
    """Peak megabytes of one call beyond what was allocated before; NaN if the system does not report it."""
    if rehearsal.is_on():
        run()
        return 0.0
    release_unused(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
        before = _resident("VmRSS")
        run()
        return (_resident("VmHWM") - before) / 1e6
    except OSError:
        return float("nan")


def release_unused(device: torch.device) -> None:
    """Release unused memory, so that a peak is one run's own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field_name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field_name} in /proc/self/status")
