"""What a backend's kernels support of an operator, and the sentence for what they do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """What a backend's kernels of one operator support: the check and the sentence that explains it come from here.

    Attributes:
        devices: types of device.
        dtypes: supported dtypes of the operator's first tensor.
        most: the largest supported value of each of the operator's `sizes`, for all dtypes or by dtype.
        least: the smallest.
    """

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    most: Mapping[str, float | Mapping[torch.dtype, float]] = field(default_factory=dict)
    least: Mapping[str, int] = field(default_factory=dict)

    def unsupported_reason(self, sizes: Mapping[str, Callable[..., float]], arguments: Sequence[Any]) -> str | None:
        """Why these arguments are not supported, or None if they are. Nothing here waits for a device."""
        first: Tensor = arguments[0]
        if first.device.type not in self.devices:
            return f"got a tensor on {first.device}; supports {_listed(map(_DEVICE_WORDS.__getitem__, self.devices))}"
        if first.dtype not in self.dtypes:
            return f"got {dtype_word(first.dtype)}; supports {_listed(map(dtype_word, self.dtypes))}"
        for size, most in self.most.items():
            value = sizes[size](*arguments)
            limit = most[first.dtype] if isinstance(most, Mapping) else most
            if value > limit:
                of_dtype = f" in {dtype_word(first.dtype)}" if isinstance(most, Mapping) else ""
                return f"{size}: got {value}; supports at most {limit}{of_dtype}"
        for size, least in self.least.items():
            value = sizes[size](*arguments)
            if value < least:
                return f"{size}: got {value}; supports at least {least}"
        return None


_DEVICE_WORDS = {"cpu": "CPU tensors", "cuda": "CUDA tensors"}


def dtype_word(dtype: torch.dtype) -> str:
    """Its name without "torch."."""
    return str(dtype).removeprefix("torch.")


def _listed(words: Iterator[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last
