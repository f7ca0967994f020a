"""The backend "xformers": its memory-efficient attention for `tree_attention`, with the tree's mask as bias.

Only asked for by name, or chosen where it was measured to be the fastest (`ops/choice.py`).
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from pcmecl_fast.ops.operator import BACKENDS, Backend, Limits
from pcmecl_fast.ops.prompt_tree import PromptTree
from pcmecl_fast.ops.tree_attention import TREE_ATTENTION

ALIGNED = 8  # its kernels take a bias whose rows begin at multiples of so many numbers
LIMITS = Limits(("cuda",), (torch.float32, torch.float16, torch.bfloat16))


def tree_attention(qkv: Tensor, layout: PromptTree) -> Tensor:
    query, key, value = qkv.unbind(2)
    bias = _bias(layout, qkv.device, qkv.dtype).expand(len(qkv), qkv.shape[3], -1, -1)
    return import_module("xformers.ops").memory_efficient_attention(query, key, value, attn_bias=bias)


def _bias(layout: PromptTree, device: torch.device, dtype: torch.dtype) -> Tensor:  # (1, 1, S, S)
    """0 where a token sees another, −∞ elsewhere."""
    if torch.compiler.is_compiling():  # a tensor made while tracing is fake: it must not be kept for real calls
        return _build_bias(layout, device, dtype)
    return _kept_bias(layout, device, dtype)


@lru_cache(maxsize=64)
def _kept_bias(layout: PromptTree, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used in a later backward
        return _build_bias(layout, device, dtype)


def _build_bias(layout: PromptTree, device: torch.device, dtype: torch.dtype) -> Tensor:
    tokens = layout.length
    beyond = ALIGNED * math.ceil(tokens / ALIGNED) - tokens
    hidden = F.pad(~layout.mask(device), (0, beyond), value=False)
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -math.inf)[None, None, :, :tokens]


def _missing() -> str | None:
    if find_spec("xformers") is None:
        return "xformers is not installed; `pip install xformers`, on Linux with a CUDA build of torch"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return _failure(torch.cuda.current_device())


@cache
def _failure(device: int) -> str | None:
    """Why its operator does not run on this GPU, tried on a tree of two tokens, or None."""
    qkv = torch.zeros(1, 2, 3, 1, 16, device=f"cuda:{device}", dtype=torch.float16)
    try:
        with torch.no_grad():
            tree_attention(qkv, PromptTree(1, (1,)))
    except Exception as error:  # whatever its build, this torch and this GPU have against one another
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"xformers' operator does not run here ({why}); install the xformers made for torch {torch.__version__}"
    return None


BACKENDS["xformers"] = XFORMERS = Backend("xformers", _missing)
XFORMERS.add(TREE_ATTENTION, tree_attention, limits=LIMITS)
