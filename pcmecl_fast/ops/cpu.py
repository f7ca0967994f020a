"""The `cpu` backend: csrc/cpu, compiled into `pcmecl_fast._C`: what it takes, which function is whose operator."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from pcmecl_fast import extension
from pcmecl_fast.ops import correlation, direction, frames, reference  # noqa: F401  they declare what is registered here
from pcmecl_fast.ops.backend import register, register_backend, register_kernels
from pcmecl_fast.ops.tree_attention import PromptTree

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
MOST_EMOTIONS = 32  # csrc/cpu/correlation_kernels.h keeps a row's differences in an array of this length
MOST_SCALE = 1000  # beyond it float64 sums would overflow


def missing() -> str | None:
    """Why the backend cannot run here at all, None where it can."""
    return _WHY_NOT_LOADED


def _why_not(x: Tensor, *rest: object, **options: object) -> str | None:
    if x.device.type != "cpu":
        return f"the tensors are on {x.device}; it takes CPU tensors"
    if x.dtype not in DTYPES:
        return f"the tensors are {x.dtype}; it takes float32, float64 or bfloat16"
    return None


def _why_not_correlation(visual: Tensor, text: Tensor, *, scale: float | Tensor, **options: object) -> str | None:
    if visual.shape[1] > MOST_EMOTIONS:
        return f"visual has {visual.shape[1]} emotions; it takes at most {MOST_EMOTIONS}"
    if not isinstance(scale, Tensor) and scale > MOST_SCALE:
        return f"scale is {scale}; it takes at most {MOST_SCALE}"
    return _why_not(visual)


def _tree_attention(qkv: Tensor, layout: PromptTree) -> Tensor:
    # PyTorch's own attention with the mask is the fastest on a CPU; the operator exists for the GPU.
    return reference.tree_attention(qkv, layout)


def _register(module: ModuleType) -> None:
    register_kernels(
        "direction_logits",
        "cpu",
        lambda *arguments: (module.direction_logits(*arguments),),
        module.direction_logits_backward,
        _why_not,
    )
    register_kernels("direction_loss", "cpu", module.direction_loss, module.direction_loss_backward, _why_not)
    register_kernels(
        "correlation_loss", "cpu", module.correlation_loss, module.correlation_loss_backward, _why_not_correlation
    )
    register_kernels(
        "clip_frames",
        "cpu",
        lambda *arguments: (module.clip_frames(*arguments),),
        module.clip_frames_backward,
        _why_not,
    )
    register("tree_attention", "cpu", _tree_attention, _why_not)


_extension = extension.load()
_WHY_NOT_LOADED = _extension if isinstance(_extension, str) else None
register_backend("cpu", missing)
if not isinstance(_extension, str):
    _register(_extension)
