"""The backend "cuda": csrc/cuda, compiled into `pcmecl_fast._C_cuda`, whose functions know addresses and sizes alone.

Drivers beside this file make functions on tensors of them: they allocate, and have PyTorch do the matrix products.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from pcmecl_fast.ops.backends import extension
from pcmecl_fast.ops.backends.cuda.correlation import Correlation
from pcmecl_fast.ops.backends.cuda.direction import Direction
from pcmecl_fast.ops.backends.cuda.frames import Frames
from pcmecl_fast.ops.backends.cuda.tree_attention import TreeAttention
from pcmecl_fast.ops.correlation import CORRELATION_LOSS
from pcmecl_fast.ops.direction import DIRECTION_LOGITS, DIRECTION_LOSS
from pcmecl_fast.ops.frames import CLIP_FRAMES
from pcmecl_fast.ops.operator import BACKENDS, Backend, Limits
from pcmecl_fast.ops.tree_attention import TREE_ATTENTION

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_EMOTIONS = 32  # one lane of a warp per emotion
MAX_SCALE = 150  # float32 sums overflow above it, see csrc/cuda/correlation.cu; a tensor scale beyond it gives NaN
MAX_TREE = {"width of a head": 256, "segments": 1024, "tokens": 65535}  # the layout is a launch argument


class Operators(Direction, Correlation, TreeAttention, Frames):
    """Every operator of csrc/cuda, on tensors."""


def add_kernels(backend: Backend, operators: Operators, device: str = "cuda") -> None:
    """Add the operators: the extension's, or its host harness's with device="cpu"."""
    anything = Limits((device,), DTYPES)
    direction = Limits((device,), DTYPES, most={"emotions": MAX_EMOTIONS})
    correlation = Limits((device,), DTYPES, most={"emotions": MAX_EMOTIONS, "scale": MAX_SCALE})
    tree = Limits((device,), DTYPES, most=MAX_TREE)
    asserted = ("cuda",)  # inside the kernels
    extension.add(backend, operators, DIRECTION_LOGITS, direction, checks_values_on=asserted)
    extension.add(backend, operators, DIRECTION_LOSS, direction, checks_values_on=asserted)
    extension.add(backend, operators, CORRELATION_LOSS, correlation)
    extension.add_rectangle(backend, operators, CORRELATION_LOSS)
    extension.add(backend, operators, TREE_ATTENTION, tree)
    extension.add(backend, operators, CLIP_FRAMES, anything)


def _missing() -> str | None:
    if isinstance(_module, str):
        return _module
    return _unfit() if torch.cuda.is_available() else "there is no CUDA device"


@cache
def _unfit() -> str | None:
    """Why the extension does not fit the driver or the first GPU."""
    toolkit, driver = _module.toolkit, _module.driver()
    if driver // 1000 < toolkit // 1000:
        return (
            f"the driver is of CUDA {_version(driver)}, and the extension was built by CUDA {_version(toolkit)}: "
            f"update the driver, or build it with an nvcc {driver // 1000}.x"
        )
    capability = torch.cuda.get_device_capability()
    if not runs_on(_module.architectures, capability):
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}, and the extension code for "
            f"{_module.architectures}: rebuild it with PCMECL_CUDA_ARCH={capability[0]}.{capability[1]}"
        )
    return None


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for "8.0 9.0 9.0+PTX" runs on a GPU: of its generation and no newer, or compiled by the driver."""
    for word in architectures.split():
        number = word.removesuffix("+PTX")
        major, minor = map(int, number.rstrip("a").split("."))
        if number.endswith("a"):  # has what no other GPU has
            fits = (major, minor) == capability
        elif word.endswith("+PTX"):
            fits = (major, minor) <= capability
        else:
            fits = major == capability[0] and minor <= capability[1]
        if fits:
            return True
    return False


def holds() -> str | None:
    """What the extension holds, in words; None where there is none."""
    if isinstance(_module, str):
        return None
    return f"code for compute capability {_module.architectures}, built by CUDA {_version(_module.toolkit)}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


_module: Any = extension.load_cuda()
BACKENDS["cuda"] = CUDA = Backend("cuda", _missing)
if not isinstance(_module, str):
    add_kernels(CUDA, Operators(_module))
