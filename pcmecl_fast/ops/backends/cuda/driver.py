"""Where the functions of csrc/cuda run."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def place(x: Tensor) -> tuple[int, int]:
    """A tensor's device and its current stream; of the host harness, where they mean nothing, zeros."""
    device = x.get_device()
    return (0, 0) if device < 0 else (device, torch._C._cuda_getCurrentRawStream(device))


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x itself if it has the dtype, which `to` takes longer to find out."""
    return x if x.dtype is dtype else x.to(dtype)


def multiprocessors(x: Tensor) -> int:
    """How many the tensor's device has; the host harness as few as make a test's work several blocks."""
    return _multiprocessors(x.get_device()) if x.is_cuda else 2


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
