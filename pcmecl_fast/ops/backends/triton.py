"""The backend "triton": the kernels of `pcmecl_fast.kernels`, imported when an operator first runs on them."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from pcmecl_fast.ops.correlation import CORRELATION_LOSS
from pcmecl_fast.ops.direction import DIRECTION_LOGITS, DIRECTION_LOSS
from pcmecl_fast.ops.frames import CLIP_FRAMES
from pcmecl_fast.ops.operator import BACKENDS, Backend, Limits, Operator
from pcmecl_fast.ops.tree_attention import TREE_ATTENTION

# Read once, because Triton reads it once too, when first imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ANY = Limits(DEVICES, DTYPES)
DIRECTION = Limits(DEVICES, DTYPES, most={"emotions": 32}, least={"emotions": 1, "features": 1})
CORRELATION = Limits(DEVICES, DTYPES, most={"emotions": 32, "scale": 120})  # a tensor scale beyond it gives NaN
TREE = Limits(
    DEVICES,
    DTYPES,
    most={"tokens": 256, "width of a head": {torch.float16: 128, torch.bfloat16: 128, torch.float32: 64}},
)

_HAS_TRITON = find_spec("triton") is not None


def _missing() -> str | None:
    if not _HAS_TRITON:
        return "Triton is not installed; `pip install triton`, on Linux with a CUDA build of torch"
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the kernels support NVIDIA GPUs"
    if not INTERPRETED and not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def _add(operator: Operator, module: str, limits: Limits, checks_values_on: tuple[str, ...] = ()) -> None:
    forward, backward = (_when_needed(module, f"{operator.name}_{way}") for way in ("forward", "backward"))
    TRITON.add(operator, forward, backward, limits, checks_values_on)


def _add_rectangle(operator: Operator, module: str, name: str) -> None:
    TRITON.add_rectangle(operator, *(_when_needed(module, f"{name}_{part}") for part in ("sums", "gradients")))


def _when_needed(module: str, function: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        return getattr(import_module(f"pcmecl_fast.kernels.{module}"), function)(*arguments)

    return run


BACKENDS["triton"] = TRITON = Backend("triton", _missing)
_add(DIRECTION_LOGITS, "direction", DIRECTION, checks_values_on=("cuda",))  # by assertions in the kernels
_add(DIRECTION_LOSS, "direction", DIRECTION, checks_values_on=("cuda",))
_add(CORRELATION_LOSS, "correlation", CORRELATION)
_add_rectangle(CORRELATION_LOSS, "correlation", "correlation_rectangle")
_add(TREE_ATTENTION, "tree_attention", TREE)
_add(CLIP_FRAMES, "frames", ANY)
