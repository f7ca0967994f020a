"""Processes that stay, and become ranks of a gloo group for one function at a time: `crew(4, function, *arguments)`."""

from __future__ import annotations

import contextlib
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp


class Crew:
    """Up to `most` ranks; they are started with the first call, since each takes seconds to import PyTorch."""

    def __init__(self, most: int = 4) -> None:
        self._context = mp.get_context("spawn")
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        self._most = most
        self._calls = 0
        self._folder = tempfile.TemporaryDirectory()

    def __call__(self, ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returns on each rank; its error if it raises on one."""
        if not self._processes:
            self._start()
        self._calls += 1
        store = Path(self._folder.name) / str(self._calls)
        for rank, pipe in enumerate(self._pipes[:ranks]):
            pipe.send((rank, ranks, str(store), function, arguments))
        answers = [pipe.recv() for pipe in self._pipes[:ranks]]
        wrong = [answer for done, answer in answers if not done]
        if wrong:
            raise RuntimeError("\n".join(wrong))
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()
        self._folder.cleanup()

    def _start(self) -> None:
        for _ in range(self._most):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)


def _serve(pipe: Any) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    import torch

    from pcmecl_fast import distributed

    torch.set_num_threads(1)
    while (work := pipe.recv()) is not None:
        rank, ranks, store, function, arguments = work
        try:
            distributed._state["exchanges"] = 0  # as `joined` does: ranks count them alike
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
            answer = function(*arguments)
            dist.barrier()  # the store goes with the first that leaves
            pipe.send((True, answer))
        except BaseException as error:
            with contextlib.suppress(Exception):
                distributed._tell_failure(error)  # for those who wait
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
        finally:
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
