"""Compiles every kernel ahead of time, without a GPU, and reads what the machine code needs.

`python -m pcmecl_fast.kernels.aot` prints the table of docs/kernels.md; a test asserts that nothing is spilled.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pcmecl_fast.kernels import direction
from pcmecl_fast.kernels.common import Config

CAPABILITIES = (80, 90)


@dataclass(frozen=True)
class Variant:
    """A kernel with the types, constants and launch configuration it is compiled for."""

    name: str
    kernel: Any
    types: dict[str, str]  # of the arguments that are not constants: "*fp32", "i32", …
    constants: dict[str, Any]
    config: Config


@dataclass(frozen=True)
class Needs:
    """What one program (block) of a compiled kernel takes."""

    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes
    instructions: int  # in the whole kernel


def variants() -> Iterator[Variant]:
    """Every kernel at the sizes of training: D = 512, E = 7, float32 and bfloat16, each configuration it is tuned over."""
    for dtype in ("fp32", "bf16"):
        yield from _direction_variants(dtype)


def needs(variant: Variant, capability: int) -> Needs:
    """Compile for a compute capability (90 is sm_90) and read the code's needs."""
    names = variant.kernel.arg_names
    missing = set(names) - variant.types.keys() - variant.constants.keys()
    if missing:
        raise ValueError(f"variant {variant.name}: no type and no constant for {', '.join(sorted(missing))}")
    signature = {name: "constexpr" if name in variant.constants else variant.types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    compiled = triton.compile(
        ASTSource(variant.kernel, signature, variant.constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": variant.config.warps, "num_stages": variant.config.stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, code = (_cuobjdump(way, cubin) for way in ("--dump-resource-usage", "--dump-sass"))
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Needs(
        registers=found["REG"],
        spilled=max(found["STACK"], found["LOCAL"]),
        shared=compiled.metadata.shared,
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", code, flags=re.MULTILINE)),
    )


def _direction_variants(dtype: str) -> Iterator[Variant]:
    types = {
        **dict.fromkeys(("grad", "divisor", "loss", "partial", "coefficients", "g_bank", "scale"), "*fp32"),
        **dict.fromkeys(("source", "edited", "bank", "cosines", "g_source", "g_edited"), f"*{dtype}"),
        **dict.fromkeys(("individual", "source_emotion", "target_emotion", "order", "starts"), "*i64"),
        **{"counter": "*i32", "batch": "i32", "contrast": "fp32", "scale_number": "fp32", "g_scale": "*fp32"},
    }
    for config in direction.CONFIGS:
        for emotions, everything in ((7, True), (7, False), (32, True)):
            rows = 1 if not everything else 8 if emotions == 7 else 32
            shape = {"E": emotions, "D": 512, "BLOCK_E": rows, "BLOCK_D": min(512, direction.TILE // rows)}
            constants = {"NORMALIZE": True, "ALL": everything, **shape}
            says = f"E={emotions} {'all' if everything else 'target'}"
            if everything:
                yield _variant(f"direction_logits {says}", direction._logits_kernel, types, constants, config)
            loss = {**constants, "REDUCTION": "mean", }
            yield _variant(f"direction_loss {says}", direction._loss_kernel, types, loss, config)
            for bank, way in ((direction.NO_BANK, "no bank"), (direction.ATOMICS, "bank")):
                without = {"g_bank": None} if bank is direction.NO_BANK else {}
                more = {"coefficients": None, "BANK": bank.value, **without}
                yield _variant(f"direction_backward {says} {way}", direction._backward_kernel, types, loss | more, config)


def _variant(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], config: Config) -> Variant:
    constants = {k: v for k, v in {**constants, **config.blocks}.items() if k in kernel.arg_names}
    types = {k: types[k] for k in kernel.arg_names if k not in constants}
    blocks = "".join(f" {k}={v}" for k, v in config.blocks.items())
    return Variant(f"{name}{blocks} warps={config.warps}", kernel, types, constants, config)


def _cuobjdump(way: str, cubin: Path) -> str:
    beside_ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    program = str(beside_ptxas) if beside_ptxas.exists() else shutil.which("cuobjdump")
    if program is None:
        raise FileNotFoundError(f"cuobjdump: not in {beside_ptxas.parent}, where Triton has it, nor on the path")
    return subprocess.run([program, way, str(cubin)], check=True, capture_output=True, text=True).stdout


def main() -> None:
    for variant in variants():
        for capability in CAPABILITIES:
            print(f"{variant.name:70} sm_{capability} {needs(variant, capability)}", flush=True)


if __name__ == "__main__":
    main()
