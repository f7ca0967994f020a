"""The backend "triton": the kernels of `pcmecl_fast/kernels`, imported when an operator first runs on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pcmecl_fast.ops.backend import register_backend, register_kernels
from pcmecl_fast.ops.tree_attention import PromptTree

MOST_EMOTIONS = 32
MOST_EMOTIONS_CORRELATED = 11
LONGEST_TREE = 256
WIDEST_HEAD = 128

_HAS_TRITON = find_spec("triton") is not None
# Read once: Triton reads it once too, when it is first imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def register() -> None:
    """Put the kernels behind the operators; called once all operators are defined."""
    register_backend("triton", _missing)
    for operator, module, why_not in (
        ("direction_logits", "direction", _why_not_direction),
        ("direction_loss", "direction", _why_not_direction),
        ("correlation_loss", "correlation", _why_not_correlation),
        ("tree_attention", "tree_attention", _why_not_attention),
        ("clip_frames", "frames", _why_not_frames),
    ):
        forward, backward = (_when_needed(module, f"{operator}_{way}") for way in ("forward", "backward"))
        register_kernels(operator, "triton", forward, backward, why_not)


def _missing() -> str | None:
    if not _HAS_TRITON:
        return "Triton is not installed; `pip install triton`, on Linux with a CUDA build of torch"
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the kernels take NVIDIA GPUs"
    if not _INTERPRETED and not torch.cuda.is_available():
        return "no CUDA device (tests set TRITON_INTERPRET=1 before Python starts, which runs the kernels on the CPU)"
    return None


def _why_not_tensor(x: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "it takes float16, bfloat16 or float32, got float64; take backend='auto' or 'reference'"
    if x.device.type != "cuda" and not (_INTERPRETED and x.device.type == "cpu"):
        return f"it takes CUDA tensors, got one on {x.device.type}"
    return None


def _why_not_direction(source: Tensor, edited: Tensor, bank: Tensor, *rest: Any, **options: Any) -> str | None:
    if bank.shape[1] > MOST_EMOTIONS:
        return f"it takes at most {MOST_EMOTIONS} emotions, got {bank.shape[1]}"
    if bank.shape[1] == 0 or bank.shape[2] == 0:
        return f"it takes a bank with emotions and features, got shape {tuple(bank.shape)}"
    return _why_not_tensor(source)


def _why_not_correlation(visual: Tensor, text: Tensor, *, scale: float | Tensor, **options: Any) -> str | None:
    if visual.shape[1] > MOST_EMOTIONS_CORRELATED:
        return f"it takes at most {MOST_EMOTIONS_CORRELATED} emotions, got {visual.shape[1]}"
    if not isinstance(scale, Tensor) and scale > 120:
        return f"it takes a scale up to 120, got {scale}; a tensor's value above that makes the loss NaN"
    return _why_not_tensor(visual)


def _why_not_attention(qkv: Tensor, layout: PromptTree) -> str | None:
    if qkv.shape[1] > LONGEST_TREE:
        return f"it takes trees of at most {LONGEST_TREE} tokens, got {qkv.shape[1]}"
    widest = WIDEST_HEAD if qkv.dtype != torch.float32 else WIDEST_HEAD // 2
    if qkv.shape[4] > widest:
        return f"it takes {qkv.dtype} heads at most {widest} wide, got {qkv.shape[4]}"
    return _why_not_tensor(qkv)


def _why_not_frames(frames: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> str | None:
    return _why_not_tensor(frames)


def _when_needed(module: str, function: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        return getattr(import_module(f"pcmecl_fast.kernels.{module}"), function)(*arguments)

    return run
