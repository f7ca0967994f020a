"""The `cuda` backend: csrc/cuda, compiled into `pcmecl_fast._C_cuda`. What it takes, and which function is whose."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from pcmecl_fast import extension
from pcmecl_fast.ops import correlation, direction, frames  # noqa: F401  they declare what is registered here
from pcmecl_fast.ops.backend import register_backend, register_kernels
from pcmecl_fast.ops.tree_attention import PromptTree

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_EMOTIONS = 32  # a lane of a warp keeps what belongs to an emotion
MOST_SCALE = 150  # float32 sums hold no more, see csrc/cuda/correlation.cu; a tensor beyond it gives NaN
MOST_HEAD_WIDTH = 256
MOST_SEGMENTS, MOST_TOKENS = 1024, 65535  # the layout travels as an argument of the launch


def missing() -> str | None:
    """Why the backend cannot run here at all, None where it can."""
    if isinstance(_extension, str):
        return _extension
    return None if torch.cuda.is_available() else "there is no CUDA device"


def register_module(module: ModuleType, device: str = "cuda") -> None:
    """Let the operators run on a module of csrc/cuda: the extension, or its host harness with device="cpu"."""
    takes = _Takes(device)
    register_kernels(
        "direction_logits", "cuda", _alone(module.direction_logits), module.direction_logits_backward, takes.direction
    )
    register_kernels("direction_loss", "cuda", module.direction_loss, module.direction_loss_backward, takes.direction)
    register_kernels(
        "correlation_loss", "cuda", module.correlation_loss, module.correlation_loss_backward, takes.correlation
    )
    register_kernels("tree_attention", "cuda", module.tree_attention, module.tree_attention_backward, takes.tree)
    register_kernels("clip_frames", "cuda", _alone(module.clip_frames), module.clip_frames_backward, takes.any)


class _Takes:
    """Why an operator's arguments cannot be run, None where they can."""

    def __init__(self, device: str) -> None:
        self._device = device

    def any(self, x: Tensor, *rest: object, **options: object) -> str | None:
        if x.device.type != self._device:
            return f"the tensors are on {x.device}; it takes CUDA tensors"
        if x.dtype not in DTYPES:
            return f"the tensors are {x.dtype}; it takes float32, float16 or bfloat16 (for float64 take 'reference')"
        return None

    def direction(self, source: Tensor, edited: Tensor, bank: Tensor, *rest: object, **options: object) -> str | None:
        if bank.shape[1] > MOST_EMOTIONS:
            return f"bank has {bank.shape[1]} emotions; it takes at most {MOST_EMOTIONS}"
        return self.any(source)

    def correlation(self, visual: Tensor, text: Tensor, *, scale: float | Tensor, **options: object) -> str | None:
        if visual.shape[1] > MOST_EMOTIONS:
            return f"visual has {visual.shape[1]} emotions; it takes at most {MOST_EMOTIONS}"
        if not isinstance(scale, Tensor) and scale > MOST_SCALE:
            return f"scale is {scale}; it takes at most {MOST_SCALE}"
        return self.any(visual)

    def tree(self, qkv: Tensor, layout: PromptTree) -> str | None:
        if qkv.shape[4] > MOST_HEAD_WIDTH:
            return f"qkv has heads of width {qkv.shape[4]}; it takes at most {MOST_HEAD_WIDTH}"
        if len(layout.segment_lengths) > MOST_SEGMENTS or layout.length > MOST_TOKENS:
            return (
                f"layout has {len(layout.segment_lengths)} segments and {layout.length} tokens; "
                f"it takes at most {MOST_SEGMENTS} and {MOST_TOKENS}"
            )
        return self.any(qkv)


def _alone(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    return lambda *arguments: (function(*arguments),)


_extension = extension.load_cuda()
register_backend("cuda", missing)
if not isinstance(_extension, str):
    register_module(_extension)
