"""The Triton backend's launches, compiled as on a GPU but without one.

    with as_launched.on(90) as launches:
        as_launched.run(CLIP_FRAMES, (frames, 224, mean, std, "bicubic"))

The backend's own functions run, forward and backward, on fake CUDA tensors (a shape, a dtype and a device, no memory).
Triton gets a driver that knows a compute capability and nothing else. So every launch is specialised as Triton's JIT
would on that GPU, by the divisibility of its integers and addresses and by what is None or 1, and is compiled, not run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.cuda_resources import cuobjdump
from pcmecl_fast.kernels import common
from pcmecl_fast.kernels.common import Config
from pcmecl_fast.ops.operator import BACKENDS, Operator

PROCESSORS = {80: 108, 90: 132, 120: 170}  # of an A100, an H100 and an RTX 5090
MAX_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)
MAX_SHARED = 99 << 10  # bytes of a block, the least of these three: sm_80 has 163 KiB, sm_90 has 227
ALIGNED = 1 << 20  # where fake storage begins: the CUDA allocator aligns to 512 bytes


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel: where, with which keyword arguments, and the code."""

    name: str
    grid: tuple[int, ...]
    options: dict[str, Any]
    compiled: Any  # triton.compiler.CompiledKernel

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a program."""
        return self.compiled.metadata.shared

    @property
    def ttir(self) -> str:
        """The program in Triton's own representation, where a product's precision is written."""
        return self.compiled.asm["ttir"]

    @property
    def ptx(self) -> str:
        return self.compiled.asm["ptx"]

    @cached_property
    def usage(self) -> dict[str, int]:
        """REG, registers per thread; STACK and LOCAL, spilled bytes per thread."""
        text = self._dumped("--dump-resource-usage")
        return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}

    @property
    def instructions(self) -> list[str]:
        """The machine code, an instruction with its operands a line."""
        return [instruction for _, instruction in self._code]

    @cached_property
    def loops(self) -> list[list[str]]:
        """The instructions of each innermost loop, from where its last branch leads back to, the longest loop first."""
        at = {address: i for i, (address, _) in enumerate(self._code)}
        found = []
        for end, (address, instruction) in enumerate(self._code):
            branch = re.search(r"\bBRA\S* .*?0x([0-9a-f]+)", instruction)
            if branch is not None and int(branch[1], 16) < address:
                found.append((at[int(branch[1], 16)], end))
        inner = [x for x in found if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in found)]
        return sorted((self.instructions[begin : end + 1] for begin, end in inner), key=len, reverse=True)

    @property
    def warps(self) -> int:
        """Of a program."""
        return self.options["num_warps"]

    def programs_a_processor(self, registers: int = 64 << 10, shared: int = 227 << 10, most: int = 32) -> int:
        """How many programs a processor holds at a time by its registers and bytes of shared memory; of sm_90."""
        a_warp = -(-self.usage["REG"] * 32 // 256) * 256
        return min(registers // (a_warp * self.warps), shared // (self.shared + 1024), most, 64 // self.warps)

    @cached_property
    def _code(self) -> list[tuple[int, str]]:
        """The machine code: addresses and instructions."""
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;", self._dumped("--dump-sass"), flags=re.MULTILINE)
        return [(int(address, 16), instruction) for address, instruction in lines]

    @property
    def spilled(self) -> int:
        """Bytes of stack per thread."""
        return max(self.usage["STACK"], self.usage["LOCAL"])

    def _dumped(self, what: str) -> str:
        tool = cuobjdump()
        if tool is None:
            raise FileNotFoundError("cuobjdump: neither on the PATH nor in Triton's wheel")
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(self.compiled.asm["cubin"])
            return subprocess.run([tool, what, str(cubin)], check=True, capture_output=True, text=True).stdout


@contextmanager
def on(
    capability: int, *, every_config: bool = False, compiles: bool = True, repeats: bool = False
) -> Iterator[list[Launch]]:
    """Collect what is launched inside, each kernel once per specialisation, for a compute capability (90 is sm_90).

    Tensors that are made inside are fake: `torch.empty(3, device="cuda")`. A launch that no GPU takes raises.

    Args:
        every_config: compile every configuration that tuning would try, instead of the first.
        repeats: collect every launch, also of what has been compiled.
        compiles: False leaves `Launch.compiled` None, for what is said about grids and tensors alone.
    """
    launches: list[Launch] = []
    known: set[tuple[str, str]] = set()
    run = JITFunction.run

    def collect(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        name = kernel.fn.__name__
        if any(not 1 <= size <= most for size, most in zip(grid, MAX_GRID, strict=False)):
            raise ValueError(f"{name}: got the grid {grid}; takes 1 to {MAX_GRID}")
        if not compiles:
            launches.append(Launch(name, grid, options, None))
            return
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
        if repeats or (name, compiled.hash) not in known:
            known.add((name, compiled.hash))
            launches.append(Launch(name, grid, options, compiled))

    def fastest(launch: Callable[[Config], Any], configs: Sequence[Config]) -> Config:
        for config in configs[1:] if every_config else ():
            launch(config)
        return configs[0]

    properties = SimpleNamespace(multi_processor_count=PROCESSORS[capability], major=capability // 10)
    with ExitStack() as stack:
        for owner, name, replacement in (
            (driver, "_active", _Driver(capability)),
            (JITFunction, "run", collect),
            (FakeTensor, "data_ptr", _address),
            (common, "_fastest", fastest),
            (torch.cuda, "device_of", lambda x: nullcontext()),
            (torch.cuda, "get_device_properties", lambda device: properties),
            (torch.cuda, "get_device_name", lambda device: f"sm_{capability}"),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
        ):
            stack.enter_context(patch.object(owner, name, replacement))
        stack.enter_context(patch.dict(common._chosen, clear=True))
        stack.enter_context(FakeTensorMode())
        yield launches


def run(operator: Operator, arguments: Sequence[Any], needs: Sequence[bool] | None = None) -> None:
    """An operator's forward and backward, with its schema's arguments; every gradient unless `needs` says which."""
    implementation = BACKENDS["triton"].implementations[operator.name]
    assert implementation.backward is not None
    results = implementation.forward(*arguments)
    grad = torch.empty_like(results[0])
    if needs is None:
        needs = [True] * len(operator._gradients)
    implementation.backward(grad, *arguments, *results[operator._keep_from :], needs)


def run_rectangle(operator: Operator, arguments: Sequence[Any]) -> None:
    """The sums of an operator's rectangle and every gradient of it, with the arguments of the sums."""
    rectangle = BACKENDS["triton"].rectangles[operator.name]
    row_lse, column_lse, _ = rectangle.sums(*arguments)
    rectangle.gradients(row_lse.new_empty(()), *arguments, row_lse, column_lse, [True] * len(operator._gradients))


class _Driver:
    """What Triton's JIT asks a driver when it compiles and does not launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # the JIT keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def _address(x: Tensor) -> int:
    return ALIGNED + int(x.storage_offset()) * x.element_size()
