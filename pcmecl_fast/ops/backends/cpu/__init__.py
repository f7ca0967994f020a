"""The backend "cpu": csrc/cpu, compiled into `pcmecl_fast._C`, and what allocates for it, a file for each operator."""

from __future__ import annotations

from typing import Any

import torch

from pcmecl_fast.ops.backends import extension
from pcmecl_fast.ops.backends.cpu.correlation import MAX_SCALE, Correlation
from pcmecl_fast.ops.backends.cpu.direction import Direction
from pcmecl_fast.ops.backends.cpu.frames import Frames
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
    most={"emotions": 32, "scale": MAX_SCALE},
)


class Operators(Direction, Correlation, Frames):
    """Every operator of csrc/cpu, on tensors."""


def holds() -> str | None:
    """What the extension holds, in words; None where there is none."""
    if isinstance(_module, str):
        return None
    return f"{_module.instruction_sets}; this processor runs {_module.cpu_capability()}"


_module: Any = extension.load()
BACKENDS["cpu"] = CPU = Backend("cpu", missing=lambda: _module if isinstance(_module, str) else None)
if not isinstance(_module, str):
    operators = Operators(_module)
    extension.add(CPU, operators, DIRECTION_LOGITS, ANY, checks_values_on=DEVICES)
    extension.add(CPU, operators, DIRECTION_LOSS, ANY, checks_values_on=DEVICES)
    extension.add(CPU, operators, CORRELATION_LOSS, CORRELATION)
    extension.add_rectangle(CPU, operators, CORRELATION_LOSS)
    extension.add(CPU, operators, CLIP_FRAMES, ANY)
    # PyTorch's own attention with the mask is the fastest on a CPU; the operator exists for the GPU.
    CPU.add(TREE_ATTENTION, TREE_ATTENTION.reference, limits=ANY)
