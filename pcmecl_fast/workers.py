"""Work in processes beside this one, which end with it however it ends."""

from __future__ import annotations

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
Result = TypeVar("Result")

_AHEAD = 4  # jobs that wait for each worker


class WorkerEndedError(RuntimeError):
    """A worker process was ended from outside."""


def in_workers(
    do: Callable[[Job], Result],
    jobs: Iterable[Job],
    workers: int,
    *,
    begin: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """`do(job)` of all jobs, in order of completion; few jobs and results wait in memory at any time.

    The processes are started by this call, before anything is iterated: the caller had better have no threads yet. When
    the caller leaves early, by an exception or Ctrl-C, jobs at work come to their end; their results are lost unless
    it goes on iterating.

    Args:
        do: a function that can be pickled, as can jobs and results.
        jobs: taken one after the other.
        workers: processes, at least 1.
        begin: called with `arguments` in each worker before its first job.
        arguments: of `begin`.

    Raises:
        WorkerEndedError: while iterating: a worker was ended by the system, as for want of memory.
        Exception: while iterating: whatever `do` raises.
    """
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(os.getpid(), begin, arguments))
    left = iter(jobs)
    waiting: set[Future[Result]] = {pool.submit(do, job) for job in itertools.islice(left, _AHEAD * workers)}
    return _results(pool, do, left, waiting)


def _results(
    pool: ProcessPoolExecutor, do: Callable[[Job], Result], left: Iterator[Job], waiting: set[Future[Result]]
) -> Iterator[Result]:
    try:
        while waiting:
            try:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            except KeyboardInterrupt:
                # What is at work is finished and given back, so that nothing is lost; another Ctrl-C does not wait.
                left = iter(())
                finished = {future for future in waiting if not future.cancel()}
                for future in finished:
                    yield future.result()
                raise
            # What has been done first: the error of another ends the iteration.
            done = sorted(finished, key=lambda future: future.exception() is not None)
            if done[-1].exception() is None:
                waiting |= {pool.submit(do, job) for job in itertools.islice(left, len(done))}
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise WorkerEndedError("a worker process was ended by the system, perhaps for want of memory") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int, begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    # Ctrl-C reaches every process of a terminal; what this one does is its parent's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    end_with(parent)
    if begin is not None:
        begin(*arguments)


def end_with(parent: int) -> None:
    """Let this process end soon after its parent, the process of that number, however that ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
