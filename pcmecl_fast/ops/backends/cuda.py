"""The backend "cuda": csrc/cuda, compiled into `pcmecl_fast._C_cuda`."""

from __future__ import annotations

from types import ModuleType

import torch

from pcmecl_fast.ops.backends import extension
from pcmecl_fast.ops.correlation import CORRELATION_LOSS
from pcmecl_fast.ops.direction import DIRECTION_LOGITS, DIRECTION_LOSS
from pcmecl_fast.ops.frames import CLIP_FRAMES
from pcmecl_fast.ops.operator import BACKENDS, Backend, Limits
from pcmecl_fast.ops.tree_attention import TREE_ATTENTION

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_EMOTIONS = 32  # one lane of a warp per emotion
MAX_SCALE = 150  # float32 sums overflow above it, see csrc/cuda/correlation.cu; a tensor scale beyond it gives NaN
MAX_TREE = {"width of a head": 256, "segments": 1024, "tokens": 65535}  # the layout is a launch argument


def add_kernels(backend: Backend, module: ModuleType, device: str = "cuda") -> None:
    """Add a module of csrc/cuda: the extension, or its host harness with device="cpu"."""
    anything = Limits((device,), DTYPES)
    direction = Limits((device,), DTYPES, most={"emotions": MAX_EMOTIONS})
    correlation = Limits((device,), DTYPES, most={"emotions": MAX_EMOTIONS, "scale": MAX_SCALE})
    tree = Limits((device,), DTYPES, most=MAX_TREE)
    asserted = ("cuda",)  # inside the kernels
    extension.add(backend, DIRECTION_LOGITS, module, direction, checks_values_on=asserted)
    extension.add(backend, DIRECTION_LOSS, module, direction, checks_values_on=asserted)
    extension.add(backend, CORRELATION_LOSS, module, correlation)
    extension.add_rectangle(backend, CORRELATION_LOSS, module)
    extension.add(backend, TREE_ATTENTION, module, tree)
    extension.add(backend, CLIP_FRAMES, module, anything)


def _missing() -> str | None:
    if isinstance(_module, str):
        return _module
    return None if torch.cuda.is_available() else "there is no CUDA device"


_module = extension.load_cuda()
BACKENDS["cuda"] = CUDA = Backend("cuda", _missing)
if not isinstance(_module, str):
    add_kernels(CUDA, _module)
