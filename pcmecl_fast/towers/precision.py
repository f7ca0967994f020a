"""In which dtype frozen towers run, and how gradients pass one in float16."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

log = logging.getLogger("pcmecl_fast")

TOWER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_LARGEST = 256.0
"""To what gradients of float16's features are scaled: 1/256 of the largest number, six decades above the smallest."""


def tower_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """The dtype of an option's value: "float32", "bfloat16", "float16", or "auto": bfloat16 where the device is made
    for it, else float32, with a line in the log that says why."""
    if name != "auto":
        return TOWER_DTYPES[name]
    fast, why = _has_fast_bfloat16(torch.device(device))
    dtype = torch.bfloat16 if fast else torch.float32
    log.info("the towers run in %s: %s", str(dtype).removeprefix("torch."), why)
    return dtype


def _has_fast_bfloat16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"the GPU has compute capability {major}.{minor}, and bfloat16 is fast from 8.0 on"
    if device.type == "cpu":
        for words, asked in (("AMX", "_is_amx_tile_supported"), ("AVX-512-BF16", "_is_avx512_bf16_supported")):
            if getattr(torch.cpu, asked, lambda: False)():
                return True, f"the processor has {words}"
        return False, "the processor has neither AMX nor AVX-512-BF16, without which bfloat16 is slower"
    return False, f"of {device.type} nothing is known"


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
        return _Multiplied.apply(x, self)


class _Multiplied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, range_: GradientRange) -> Tensor:
        ctx.range = range_
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        largest = grad.abs().amax() if grad.numel() else grad.new_ones(())
        exponent = torch.floor(math.log2(_LARGEST) - torch.log2(largest))
        usable = torch.isfinite(exponent)  # of 0, inf and NaN it is not
        ctx.range.factor = torch.exp2(torch.where(usable, exponent, torch.zeros_like(exponent)).clamp(-60, 60))
        return grad * ctx.range.factor, None


class _Divided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, range_: GradientRange) -> Tensor:
        ctx.range = range_
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.range.factor, None
