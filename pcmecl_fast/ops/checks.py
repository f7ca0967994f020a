"""Argument checks: a single exception that names the argument, what it got and what it takes.

TypeError for a wrong type or dtype, ValueError for a shape, a value or a mix of devices, IndexError for an index out
of range. Sizes are letters: `Sizes` remembers each letter's first value and the argument it came from.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor

AUTOCAST = tuple(kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(kind))
"""Device types that autocast supports: queried once, because not every version of torch.compile can trace it."""

MAX_SCALE = 1e6
"""Of logits: a cosine's rounding, 1e-7 in float32, times this is a tenth; beyond it no digit of a loss is right."""

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Sizes:
    """The values of the shapes' letters in one call."""

    def __init__(self, needed: str = "") -> None:
        """`needed`: letters that must not be 0."""
        self._needed = needed
        self._sizes: dict[str | int, int] = {}
        self._named_by: dict[str, str] = {}

    def check(self, name: str, value: Tensor, dims: Sequence[str | int]) -> None:
        """Raise unless `value` has these dimensions: a letter takes any size, the same in every argument."""
        shape = value.shape
        if len(shape) != len(dims):
            raise ValueError(f"{name}: got shape {tuple(shape)}; takes {_text(dims)}")
        for dim, size in zip(dims, shape):  # noqa: B905 - as many; `strict` takes a third longer
            if self._sizes.get(dim, dim) != size:
                self._add(dim, size, name, shape, dims)

    def _add(self, dim: str | int, size: int, name: str, shape: torch.Size, dims: Sequence[str | int]) -> None:
        """A letter's first value; raise if it is not the first, or not a letter."""
        if isinstance(dim, int):
            raise ValueError(f"{name}: got shape {tuple(shape)}; takes {_text(dims)}")
        if dim in self._sizes:
            raise ValueError(
                f"{name}: got shape {tuple(shape)}; takes {_text(dims)} with {dim} = {self._sizes[dim]}, "
                f"as in {self._named_by[dim]}"
            )
        if not size and dim in self._needed:
            raise ValueError(f"{name}: got shape {tuple(shape)}; takes {_text(dims)} with {dim} ≥ 1")
        self._sizes[dim], self._named_by[dim] = size, name

    def __getitem__(self, letter: str) -> int:
        return self._sizes[letter]


def check_float(name: str, value: Any) -> None:
    """Raise unless `value` is a tensor of a supported float dtype."""
    if not isinstance(value, Tensor) or value.dtype not in FLOAT_DTYPES:
        _check_tensor(name, value)
        raise TypeError(f"{name}: got {value.dtype}; takes float16, bfloat16, float32 or float64")


def check_bool(name: str, value: Any) -> None:
    """Raise unless `value` is a bool tensor."""
    _check_tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{name}: got {value.dtype}; takes torch.bool")


def check_integer(name: str, value: Any) -> None:
    """Raise unless `value` is a tensor of an integer dtype (bool is not one)."""
    _check_tensor(name, value)
    dtype = value.dtype
    if dtype is not torch.int64 and (dtype is torch.bool or dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"{name}: got {value.dtype}; takes an integer dtype such as torch.int64")


def alike(**tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one dtype; raises unless all share the first one's, or autocast is on and widens them."""
    values = tuple(tensors.values())
    first = values[0]
    for name, value in tensors.items():
        if value.dtype is first.dtype:
            continue
        if autocast_is_on(first.device.type):
            dtype = reduce(torch.promote_types, (value.dtype for value in values))
            return tuple(value.to(dtype) for value in values)
        raise TypeError(
            f"{name}: got {value.dtype}; takes {first.dtype}, as {next(iter(tensors))} (convert one of them)"
        )
    return values


def autocast_is_on(kind: str) -> bool:
    """Whether autocast is active on devices of this type."""
    return kind in AUTOCAST and torch.is_autocast_enabled(kind)


def autocast_off(x: Tensor) -> AbstractContextManager[object]:
    """Outside autocast, for devices like x's."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if autocast_is_on(kind) else nullcontext()


def outside_autocast(function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """What the function returns, outside autocast for devices like that of the first argument, a tensor."""
    kind = arguments[0].device.type
    if not autocast_is_on(kind):
        return function(*arguments)
    with torch.autocast(kind, enabled=False):
        return function(*arguments)


def as_stored(x: Tensor) -> Tensor:
    """The tensor as kernels read it, by its address: contiguous, and the numbers themselves, not their negatives."""
    x = x.contiguous()
    return x.resolve_neg() if x.is_neg() else x


def check_one_device(**tensors: Tensor | None) -> None:
    """Raise unless the tensors lie on one device, that of the first."""
    device = None
    for name, value in tensors.items():
        if device is None:
            assert value is not None
            first, device = name, value.device
        elif value is not None and value.device != device:
            raise ValueError(f"{name}: got a tensor on {value.device}; takes {device}, as {first}")


def check_scale(scale: Any) -> None:
    """Raise unless `scale` is a number in range, or a float tensor of no dimensions; its value, too, where known."""
    if isinstance(scale, Tensor):
        check_float("scale", scale)
        if scale.dim() != 0:
            raise ValueError(f"scale: got shape {tuple(scale.shape)}; takes a number or a tensor of shape ()")
    value = known_number(scale)
    if value is not None:
        check_number("scale", value)
        if not 0 < value <= MAX_SCALE:
            raise ValueError(f"scale: got {value}; takes a number above 0 and at most {MAX_SCALE:g}")


def known_number(value: Any) -> Any:
    """The value of a tensor of no dimensions on a CPU, None of another: reading it would wait. A number as it is."""
    if not isinstance(value, Tensor):
        return value
    return None if torch.compiler.is_compiling() or value.device.type != "cpu" else value.item()


def check_number(name: str, value: Any) -> None:
    """Raise unless `value` is a finite int or float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}; takes a number")
    if not -math.inf < value < math.inf:  # unlike `isfinite`, traceable with a symbolic number
        raise ValueError(f"{name}: got {value}; takes a finite number")


def check_at_least_0(name: str, value: Any) -> None:
    """Raise unless `value` is a finite int or float that is not negative."""
    check_number(name, value)
    if value < 0:
        raise ValueError(f"{name}: got {value}; takes a number of at least 0")


def check_flag(name: str, value: Any) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}; takes True or False")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of these words."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}; takes one of {', '.join(choices)}")


def check_index_range(name: str, index: Tensor, size: int, of: str) -> None:
    """Raise IndexError unless 0 ≤ index < size.

    On the CPU always. Elsewhere, and inside `torch.compile`, without waiting for the device: by a device-side assertion
    that fails at the next synchronisation; PCMECL_CHECK=1 checks on the host instead, to find the bad index.
    """
    on_host = index.device.type == "cpu" or (index.device.type != "meta" and os.environ.get("PCMECL_CHECK") == "1")
    if torch.compiler.is_compiling() or not on_host:
        message = f"{name}: an index is out of range; takes 0 to {size - 1} ({of})"
        torch._assert_async(_inside(index, size).all(), message)
    elif index.numel() and not _extremes_inside(index, size):
        position = int(_inside(index, size).logical_not().nonzero()[0, 0])
        got = int(index[position])
        raise IndexError(f"{name}: got {got} at position {position}; takes 0 to {size - 1} ({of})")


def _inside(index: Tensor, size: int) -> Tensor:
    return (index >= 0) & (index < size)


def _extremes_inside(index: Tensor, size: int) -> bool:
    """Whether all of `_inside` is True, in a third of the time: every CPU call needs it."""
    lowest, highest = index.aminmax()
    return int(lowest) >= 0 and int(highest) < size


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}; takes a tensor")


def _text(dims: Sequence[str | int]) -> str:
    inner = ", ".join(str(dim) for dim in dims)
    return f"({inner},)" if len(dims) == 1 else f"({inner})"
