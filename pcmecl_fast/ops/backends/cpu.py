"""The backend "cpu": csrc/cpu, compiled into `pcmecl_fast._C`."""

from __future__ import annotations

import torch

from pcmecl_fast.ops.backends import extension
from pcmecl_fast.ops.correlation import CORRELATION_LOSS
from pcmecl_fast.ops.direction import DIRECTION_LOGITS, DIRECTION_LOSS
from pcmecl_fast.ops.frames import CLIP_FRAMES
from pcmecl_fast.ops.operator import BACKENDS, Backend, Limits
from pcmecl_fast.ops.tree_attention import TREE_ATTENTION

DEVICES, DTYPES = ("cpu",), (torch.float32, torch.float64, torch.bfloat16)
ANY = Limits(DEVICES, DTYPES)
CORRELATION = Limits(
    DEVICES,
    DTYPES,
    # csrc/cpu/correlation_kernels.h keeps a row's differences in an array of 32; above that scale float64 overflows.
    most={"emotions": 32, "scale": 1000},
)

_module = extension.load()
BACKENDS["cpu"] = CPU = Backend("cpu", missing=lambda: _module if isinstance(_module, str) else None)
if not isinstance(_module, str):
    extension.add(CPU, DIRECTION_LOGITS, _module, ANY, checks_values_on=DEVICES)
    extension.add(CPU, DIRECTION_LOSS, _module, ANY, checks_values_on=DEVICES)
    extension.add(CPU, CORRELATION_LOSS, _module, CORRELATION)
    extension.add_rectangle(CPU, CORRELATION_LOSS, _module)
    extension.add(CPU, CLIP_FRAMES, _module, ANY)
    # PyTorch's own attention with the mask is the fastest on a CPU; the operator exists for the GPU.
    CPU.add(TREE_ATTENTION, TREE_ATTENTION.reference, limits=ANY)
