"""Frames read ahead of their use, in worker processes: the same frames in the same order for any number of them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pcmecl_fast.data.base import FrameDataset, as_frames

Plan = TypeVar("Plan")


def read_ahead(
    dataset: FrameDataset,
    plans: Iterable[Plan],
    indices_of: Callable[[Plan], Tensor],
    *,
    workers: int = 0,
) -> Iterator[tuple[Plan, Tensor]]:
    """Each plan with the frames at its indices, (B, 3, S, S) float32 in [-1, 1]; each worker is two plans ahead.

    Plans are made in this process, in order; workers only decode. So whatever is random about a plan does not depend on
    the number of workers.

    Args:
        dataset: any data set of frames.
        plans: anything that says which frames are wanted; taken one after the other.
        indices_of: the indices, (B,) int, that a plan wants.
        workers: processes that read; 0 reads in this one.

    Raises:
        Exception: whatever reading raises, at its plan.
    """
    if workers == 0:
        for plan in plans:
            yield plan, dataset.frames(indices_of(plan))
        return
    waiting: deque[Plan] = deque()

    def indices() -> Iterator[list[int]]:
        for plan in plans:
            waiting.append(plan)
            yield indices_of(plan).tolist()

    # Forked, where there is forking: a worker shares the data set's memory, whatever its size.
    context = "fork" if hasattr(os, "fork") else None
    loader: Any = DataLoader(
        _Pixels(dataset),
        batch_size=None,
        sampler=indices(),  # an iterable of what __getitem__ takes
        num_workers=workers,
        multiprocessing_context=context,
    )
    for pixels in loader:
        if isinstance(pixels, Exception):
            raise pixels
        yield waiting.popleft(), as_frames(pixels)


class _Pixels(Dataset[Any]):
    """The data set as a worker reads it: whole batches, still as bytes where that is what there is."""

    def __init__(self, dataset: FrameDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: Any) -> Any:
        try:
            return self.dataset.pixels(indices)
        except Exception as error:  # PyTorch would wrap it in a page of text
            return error
