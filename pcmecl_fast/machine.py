"""A machine that others use too: PyTorch's threads wait for each other without taking the time that these need.

A thread that has done its part of an operator spins until the others have done theirs: three milliseconds, by default,
before it sleeps. On a machine of one's own that is the fastest. Beside other processes it costs a multiple, since what
it waits for is a thread that has to wait for a core, and spinning keeps that core from it. Measured on two cores:
spinning a tenth as long trains as fast on an idle machine (1.01 times), and in 0.56 of the time beside two busy
processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator

SPINS = 30_000
"""How often a waiting thread looks before it sleeps, some hundred microseconds; None leaves OpenMP's own."""

NOTICE = True
"""Whether a command says that others are using the machine."""


_began: list[float] = []


def begin_clock() -> None:
    """Count `command_seconds` from here: a command calls it first, before seconds go by in imports."""
    _began[:] = [time.monotonic()]


def command_seconds() -> float | None:
    """Seconds since `begin_clock`; None where no command began."""
    return time.monotonic() - _began[0] if _began else None


def share_cores() -> None:
    """Set how threads wait, unless the environment does; has an effect before PyTorch is imported only."""
    asked = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ)
    if SPINS is not None and not asked and "torch" not in sys.modules:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def busy_notice() -> str | None:
    """One line where the cores were busy in the last minute, before this command began; else None."""
    if not NOTICE or not hasattr(os, "getloadavg"):
        return None
    load, count = os.getloadavg()[0], cores()
    if load < max(1.5, 0.75 * count):
        return None
    return f"others are using this machine (load {load:.1f} on {count} cores): this will take longer than usual"


@contextlib.contextmanager
def stopping_at_once(message: str) -> Iterator[None]:
    """Ctrl-C in this block ends the process, with a message: for imports, in which libraries swallow interruptions."""

    def stop(*_: object) -> None:
        os.write(2, f"\n{message}\n".encode())
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # somebody else's to say, or ignored
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def launched() -> bool:
    """Whether torchrun has started this process as one of several."""
    given = {"RANK", "WORLD_SIZE"} & set(os.environ)
    return bool(given) and os.environ.get("WORLD_SIZE") != "1"


def default_workers() -> int:
    """Processes that read frames ahead of training: one for each core, at most four."""
    return min(4, cores())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
