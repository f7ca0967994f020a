"""Registers, shared memory, spills and instructions of every Triton kernel, compiled ahead of time.

    python -m bench.triton_resources          print the table of docs/kernels.md: the default launch configurations
    python -m bench.triton_resources all      every configuration that is ever tried

Needs Triton and cuobjdump, which comes with the CUDA toolkit and with Triton's wheel; no GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import pcmecl_fast.kernels.correlation as correlation
import pcmecl_fast.kernels.correlation_kernels as correlation_kernels
import pcmecl_fast.kernels.direction as direction
import pcmecl_fast.kernels.direction_kernels as direction_kernels
import pcmecl_fast.kernels.frames as frames
import pcmecl_fast.kernels.products as products
import pcmecl_fast.kernels.tree_attention as tree_attention
from bench.cuda_resources import cuobjdump
from pcmecl_fast.kernels.common import Config, power_of_2

CAPABILITIES = (80, 90)


@dataclass(frozen=True)
class Variant:
    """A kernel with the types, constants and launch configuration it is compiled for."""

    name: str
    kernel: Any
    types: dict[str, str]  # of the arguments that are not constants: "*fp32", "i32", …
    constants: dict[str, Any]
    config: Config
    main: bool  # what training launches first


@dataclass(frozen=True)
class Needs:
    """The resources that one program (block) of a compiled kernel needs."""

    registers: int  # per thread
    spilled: int  # bytes per thread
    shared: int  # bytes
    instructions: int  # in the whole kernel


def variants(*, everything: bool = False) -> Iterator[Variant]:
    """Every kernel at training sizes (D = 512, E = 7) as launched first; `everything`: every one ever tried."""
    for variant in _all_variants():
        if everything or variant.main:
            yield variant


def _all_variants() -> Iterator[Variant]:
    yield from _correlation_variants()
    for dtype in ("fp32", "bf16"):
        yield from _prepare_variants(dtype)
        yield from _direction_variants(dtype)
        yield from _attention_variants(dtype)
        yield from _frames_variants(dtype)


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
        options={k: v for k, v in variant.config.options().items() if k not in variant.config.blocks},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, code = (_cuobjdump(what, cubin) for what in ("--dump-resource-usage", "--dump-sass"))
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Needs(
        registers=found["REG"],
        spilled=max(found["STACK"], found["LOCAL"]),
        shared=compiled.metadata.shared,
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", code, flags=re.MULTILINE)),
    )


def _direction_variants(dtype: str) -> Iterator[Variant]:
    types = {
        **dict.fromkeys(
            ("grad", "divisor", "loss", "partial", "coefficients", "grad_bank", "scale", "grad_scale"), "*fp32"
        ),
        **dict.fromkeys(("source", "edited", "bank", "cosines", "grad_source", "grad_edited"), f"*{dtype}"),
        **dict.fromkeys(("individual", "source_emotion", "target_emotion", "order", "starts"), "*i64"),
        **{"counter": "*i32", "batch": "i32", "contrast": "fp32", "min_change": "fp32", "scale_number": "fp32"},
    }
    for emotions, whole in ((7, True), (7, False), (32, True)):
        rows = power_of_2(emotions) if whole else 1
        shape = {"E": emotions, "D": 512, "BLOCK_E": rows, "BLOCK_D": min(512, direction.TILE // rows)}
        constants = {"NORMALIZE": True, "ALL": whole, "REDUCTION": "mean", **shape}
        label = f"E={emotions}, {'all rows' if whole else 'two rows'}, {dtype}"
        for config in direction.CONFIGS:
            main = emotions == 7 and config is direction.CONFIGS[0] and (dtype == "fp32" or not whole)
            if whole:
                yield _variant(
                    f"direction logits {label}", direction_kernels.logits_kernel, types, constants, config, main
                )
            yield _variant(f"direction loss {label}", direction_kernels.loss_kernel, types, constants, config, main)
            for bank, gone in (("NO_BANK", ["grad_bank", "coefficients"]), ("ATOMICS", ["coefficients"])):
                own = {**constants, **dict.fromkeys(gone), "BANK": getattr(direction_kernels, bank).value}
                bank_label = f"direction backward {label}{'' if 'grad_bank' in gone else ', bank'}"
                yield _variant(bank_label, direction_kernels.backward_kernel, types, own, config, main)
        all_rows = power_of_2(emotions)
        tile = {"ALL_E": all_rows, "BLOCK_D": direction.bank_tile(512, all_rows)}
        gone_target = {} if rows == 1 else {"target_emotion": None}
        own = constants | tile | gone_target
        yield _variant(
            f"direction bank {label}",
            direction_kernels.bank_kernel,
            types,
            own,
            Config(),
            dtype == "fp32" and emotions == 7,
        )


def _correlation_variants() -> Iterator[Variant]:
    names = (
        "left right out products inv_norm_visual inv_norm_text scale row_sums column_sums positives grad count row_lse "
        "column_lse row_grad_dots column_grad_dots loss partial"
    )
    numbers = (
        "M N K left_batch left_m left_k right_batch right_k right_n out_batch out_m chunk_start chunk_groups columns "
        "groups people rows_per_strip columns_per_strip column_strips row_strips"
    )
    types = {
        **dict.fromkeys(names.split(), "*fp32"),
        **dict.fromkeys(numbers.split(), "i32"),
        **{"counter": "*i32", "scale_number": "fp32"},
    }
    # One inner stride is 1, which Triton detects itself at launch: S = V Tᵀ, dV = dS T, dT = dSᵀ V.
    for product, inner in (
        ("VTᵀ", ("left_k", "right_k")),
        ("dS T", ("left_k", "right_n")),
        ("dSᵀV", ("left_m", "right_n")),
    ):
        for config in products.PRODUCT_CONFIGS:
            constants = {**dict.fromkeys(inner, 1), "ADD": inner[0] == "left_m"}
            main = config is products.PRODUCT_CONFIGS[0]
            yield _variant(f"correlation product {product}", products.product_kernel, types, constants, config, main)
    for emotions, kind in ((7, "all"), (7, "within"), (7, "distinct"), (11, "distinct")):
        plan = correlation.Plan(512, emotions, 512, kind)
        rows = power_of_2(plan.rows, least=16)
        constants = {**plan.constants, "KIND": correlation.KINDS[kind].value, "ADD": kind != "within", "ROWS": rows}
        label = f"E={emotions}, {kind}"
        for config in correlation.PAIR_CONFIGS:
            main = config is correlation.PAIR_CONFIGS[0]
            yield _variant(f"correlation sums {label}", correlation_kernels.sums_kernel, types, constants, config, main)
        yield _variant(
            f"correlation fold {label}", correlation_kernels.fold_kernel, types, constants, correlation.FOLD_CONFIG
        )
        if kind == "distinct":
            yield _variant(
                f"correlation loss E={emotions}", correlation_kernels.loss_kernel, types, constants, Config(warps=2)
            )


def _prepare_variants(dtype: str) -> Iterator[Variant]:
    half = dict.fromkeys(("visual", "text", "grad_visual", "grad_text"), f"*{dtype}")
    single = (
        "visual_centred text_centred inv_norm_visual inv_norm_text count partial visual_sum text_sum row_grad_dots "
        "column_grad_dots scale grad_scale"
    )
    types = {
        **half,
        **dict.fromkeys(single.split(), "*fp32"),
        **dict.fromkeys(("people", "groups", "column_strips", "row_strips"), "i32"),
        **{"mask": "*i1", "counter": "*i32"},
    }
    for emotions in (7, 11):
        plan = correlation.Plan(512, emotions, 512, "all")
        for name, kernel, tile, warps in (
            ("prepare", correlation_kernels.prepare_kernel, 64, correlation.PREPARE_WARPS),
            ("gradient", correlation_kernels.gradient_kernel, 512, 4),
        ):
            blocks = {"BLOCK_E": power_of_2(emotions), "BLOCK_Q": power_of_2(plan.pairs), "BLOCK_D": tile}
            constants = {**plan.constants, **blocks, "D": 512}
            yield _variant(f"correlation {name} E={emotions}, {dtype}", kernel, types, constants, Config(warps=warps))


def _attention_variants(dtype: str) -> Iterator[Variant]:
    types = {
        **dict.fromkeys(("grad", "qkv", "out", "grad_qkv"), f"*{dtype}"),
        **dict.fromkeys(("lse", "deltas"), "*fp32"),
        **dict.fromkeys(("prefix", "tokens", "heads"), "i32"),
        **{"segment_starts": "*i32", "softmax_scale": "fp32"},
    }
    forward = ("forward", tree_attention.forward_kernel)
    one_block = [forward, ("backward", tree_attention.backward_kernel)]
    blocks = [forward, ("queries", tree_attention.queries_kernel), ("keys", tree_attention.keys_kernel)]
    half = dtype != "fp32"
    widths = ((30, 64), (192, 64)) + (((64, 128), (256, 128)) if half else ())
    for tokens, width in widths:
        block = tree_attention.block_of(tokens, half=half)
        constants = {"WIDTH": width, "BLOCK": block, "BLOCK_D": width, "WIDE": not half}
        for name, kernel in one_block if tokens <= block else blocks:
            configs = tree_attention.HALF_CONFIGS if half else tree_attention.WIDE_CONFIGS
            for config in configs:
                main = width == 64 and config is configs[0]
                label = f"attention {name} S={tokens}, d={width}, {dtype}"
                yield _variant(label, kernel, types, constants, config, main)


def _frames_variants(dtype: str) -> Iterator[Variant]:
    colours = [f"{kind}_{colour}" for kind in ("gain", "offset") for colour in ("red", "green", "blue")]
    types = {
        **dict.fromkeys(("x", "out"), f"*{dtype}"),
        **dict.fromkeys(("row_weights", "column_weights"), "*fp32"),
        **dict.fromkeys(("row_spans", "column_spans"), "*i32"),
        **dict.fromkeys(("old_height", "old_width", "new_height", "new_width"), "i32"),
        **dict.fromkeys(colours, "fp32"),
    }
    for block in (16, 64 if dtype == "bf16" else 32):
        constants = {"TILE": frames.TILE, "BLOCK": block, "PRECISION": "tf32x3" if dtype == "fp32" else "tf32"}
        for config in frames.CONFIGS:
            main = config is frames.CONFIGS[0]
            yield _variant(f"frames blocks of {block}, {dtype}", frames.resample_kernel, types, constants, config, main)


def _variant(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], config: Config, main: bool = True
) -> Variant:
    constants = {k: v for k, v in {**constants, **config.blocks}.items() if k in kernel.arg_names}
    types = {k: types[k] for k in kernel.arg_names if k not in constants}
    blocks = "×".join(map(str, config.blocks.values()))
    return Variant(
        f"{name}{', ' + blocks if blocks else ''}, {config.warps} warps", kernel, types, constants, config, main
    )


def _cuobjdump(what: str, cubin: Path) -> str:
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump: neither on the PATH nor in Triton's wheel")
    return subprocess.run([tool, what, str(cubin)], check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Print the table: what is launched first, or with the argument `all` everything that is ever tried."""
    everything = sys.argv[1:] == ["all"]
    print("| kernel | " + " | ".join(f"sm_{c}: registers, shared bytes, instructions" for c in CAPABILITIES) + " |")
    print("| --- |" + " --- |" * len(CAPABILITIES))
    for variant in variants(everything=everything):
        cells = [needs(variant, capability) for capability in CAPABILITIES]
        texts = [f"{x.registers}, {x.shared}, {x.instructions}" + ", SPILLS" * (x.spilled > 0) for x in cells]
        print(f"| {variant.name} | {' | '.join(texts)} |", flush=True)


if __name__ == "__main__":
    main()
