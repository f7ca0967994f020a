"""Which dtype frozen towers run in, and how gradients pass one in float16."""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

log = logging.getLogger("pcmecl_fast")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"

_LARGEST = 256.0
"""To what gradients of float16's features are scaled: 1/256 of the largest number, six decades above the smallest."""


def tower_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """The dtype of the towers' weights, activations and attention on a device.

    Args:
        name: "float32", "bfloat16", "float16", or "auto": bfloat16 on GPUs with tensor cores for it (compute capability
            8.0 or more) and on CPUs with instructions for it (AVX512-BF16, AMX), float32 elsewhere. The log says once
            which one and why.
        device: where the towers are.

    Raises:
        ValueError: another name.
    """
    if name == AUTO:
        return _fast_dtype(str(device))
    if name not in DTYPES:
        raise ValueError(f"tower_dtype: takes one of {', '.join([*DTYPES, AUTO])}, got {name!r}")
    return DTYPES[name]


@cache
def _fast_dtype(device: str) -> torch.dtype:
    fast, why = _fast_in_bfloat16(torch.device(device))
    dtype = torch.bfloat16 if fast else torch.float32
    log.info("tower_dtype: auto takes %s, since %s", str(dtype).removeprefix("torch."), why)
    return dtype


def _fast_in_bfloat16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        fast, what = major >= 8, f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
        return fast, f"{what} {'has' if fast else 'lacks'} tensor cores for bfloat16"
    if device.type != "cpu":
        return False, f"nothing is known of bfloat16 on {device.type}"
    found = [name for name, has in (("AVX512-BF16", _has_avx512_bf16), ("AMX", _has_amx)) if has()]
    if found:
        return True, f"this CPU has {' and '.join(found)}"
    return False, "this CPU has no instructions for bfloat16 (AVX512-BF16, AMX)"


def _has_avx512_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()


def _has_amx() -> bool:
    """Every CPU with AMX's tiles so far multiplies bfloat16 in them."""
    return torch.cpu._is_amx_tile_supported()


class GradientRange:
    """Keeps a float16 tower's gradients in float16's range: a power of two larger inside it, which changes no digit.

    `enter` is the identity on the tower's input, `leave` on its output. Gradients of a loss of edited frames are about
    1e-5 a pixel, where float16 has two digits left. The factor follows from the gradient that arrives, without waiting
    for a device. There is no second derivative.
    """

    def __init__(self) -> None:
        self.factor: Tensor | None = None

    def enter(self, x: Tensor) -> Tensor:
        return _Divided.apply(x, self)

    def leave(self, x: Tensor) -> Tensor:
        return _Multiplied.apply(x, self).clone()  # a view made here could not be changed in place


class _Passed(torch.autograd.Function):
    """The identity, whose gradient a `GradientRange` has a say in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, range_: GradientRange) -> Tensor:
        ctx.range = range_
        return x.view_as(x)


class _Multiplied(_Passed):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        largest = grad.abs().amax() if grad.numel() else grad.new_ones(())
        exponent = torch.floor(math.log2(_LARGEST) - torch.log2(largest))
        usable = torch.isfinite(exponent)  # of 0, inf and NaN it is not
        ctx.range.factor = torch.exp2(torch.where(usable, exponent, torch.zeros_like(exponent)).clamp(-60, 60))
        return grad * ctx.range.factor, None


class _Divided(_Passed):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.range.factor, None
