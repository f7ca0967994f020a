"""Work spread over processes that end with this one, however it ends."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

Job = TypeVar("Job")
Done = TypeVar("Done")

_AHEAD = 4  # jobs that wait for each worker


@contextlib.contextmanager
def in_workers(
    do: Callable[[Job], Done], jobs: Iterable[Job], workers: int, begin: Callable[..., None], *arguments: Any
) -> Iterator[Iterator[Done]]:
    """What `do` makes of the jobs, as they are finished.

    Args:
        do: a function of a module, called in a worker.
        jobs: few of them wait at any time.
        workers: how many processes, each with one of PyTorch's threads.
        begin: called with `arguments` in each worker before its first job.

    Raises:
        RuntimeError: the system has ended a worker.
    """
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(os.getpid(), begin, arguments))
    try:
        yield _finished(pool, do, iter(jobs), _AHEAD * workers)
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"workers: one of {workers} processes was ended by the system, perhaps for want of memory; with fewer, the "
            "same command goes on"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(pool: ProcessPoolExecutor, do: Callable[[Job], Done], jobs: Iterator[Job], ahead: int) -> Iterator[Done]:
    waiting: set[Future[Done]] = {pool.submit(do, job) for job in itertools.islice(jobs, ahead)}
    while waiting:
        finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        waiting |= {pool.submit(do, job) for job in itertools.islice(jobs, len(finished))}
        for future in finished:
            yield future.result()


def _begin(parent: int, begin: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # Ctrl-C reaches every process of a terminal; this one ends with its parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    begin(*arguments)
