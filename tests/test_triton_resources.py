"""The code of every Triton kernel as it is launched at training sizes, compiled for three GPUs without having one."""

import importlib.util
import os
import re

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler, not its interpreter", allow_module_level=True)

import pcmecl_fast.kernels.correlation_kernels as correlation_kernels
import pcmecl_fast.kernels.correlation_pair_kernels as correlation_pair_kernels
import pcmecl_fast.kernels.correlation_wide_kernels as correlation_wide_kernels
import pcmecl_fast.kernels.direction_kernels as direction_kernels
import pcmecl_fast.kernels.frames as frames
import pcmecl_fast.kernels.products as products
import pcmecl_fast.kernels.tree_attention as tree_attention
from bench import as_launched, triton_resources
from bench.triton_resources import LOGIT_INSTRUCTIONS
from pcmecl_fast.ops.tree_attention import TREE_ATTENTION

MODULES = (
    products,
    correlation_kernels,
    correlation_pair_kernels,
    correlation_wide_kernels,
    direction_kernels,
    frames,
    tree_attention,
)
NARROW = {  # a thread has a column, or a few sums, of its own
    ("correlation_loss", "sums_kernel"),
    ("correlation_loss", "fold_kernel"),
    ("correlation_loss", "wide_sums_kernel"),
    ("correlation_loss", "wide_fold_kernel"),
    ("correlation_loss", "log_sums_kernel"),
    ("clip_frames", "weights_kernel"),  # reads nothing
}
WIDE_LOAD = r"ld\.global\S*\.(v4\.[bu]32|v2\.[bu]64)|cp\.async\.cg"  # 16 bytes


@pytest.fixture(scope="module", params=[90, 80, 120], ids="sm_{}".format)
def launched(request):
    """Everything for sm_90; for the others, whose code differs little, float32 with seven emotions, and with most."""
    chosen = [
        workload
        for workload in triton_resources.workloads()
        if request.param == 90 or not re.search("bfloat16|E=11|E=16", workload.label)
    ]
    return list(triton_resources.launches(request.param, chosen))


def test_nothing_is_spilled(launched):
    assert [named(*pair) for pair in launched if pair[1].spilled] == []


def test_a_programs_shared_memory_fits(launched):
    assert [named(*pair) for pair in launched if pair[1].shared > as_launched.MAX_SHARED] == []


def test_float32_is_multiplied_without_losing_bits(launched):
    for workload, launch in launched:
        precisions = re.findall(r"tt\.dot .* inputPrecision = (\w+) : tensor<\w+xf32>", launch.ttir)
        assert set(precisions) <= {"tf32x3"}, named(workload, launch)
        if "tf32x3" in precisions:
            products = re.findall(r"tt\.dot |ttng\.warp_group_dot ", launch.compiled.asm["ttgir"])
            assert len(products) == 3 * len(precisions), named(workload, launch)
            assert "cvt.rna.tf32" in launch.ptx, named(workload, launch)  # rounded, not truncated


def test_rows_are_read_16_bytes_at_a_time(launched):
    for workload, launch in launched:
        aligned = "float32" in workload.label and "64 to" not in workload.label  # a tile there holds too few for it
        if aligned and (workload.operator.name, launch.name) not in NARROW:
            assert re.search(WIDE_LOAD, launch.ptx), named(workload, launch)


def test_copies_of_products_are_of_16_bytes(launched):
    """Rows of S begin at 128 bytes for any number of individuals, so that none is copied by single numbers."""
    for workload, launch in launched:
        if launch.name == "product_kernel" and "within" not in workload.label:
            assert "cp.async.cg" in launch.ptx, named(workload, launch)
            assert not re.search(r"cp\.async\.ca", launch.ptx), named(workload, launch)


def test_a_logit_takes_few_instructions_and_no_barrier(launched):
    walks = [(workload, launch) for workload, launch in launched if launch.name in LOGIT_INSTRUCTIONS]
    assert {launch.name for _, launch in walks} == set(LOGIT_INSTRUCTIONS)
    for workload, launch in walks:
        loop = launch.loops[0]
        at_once = {"wide_sums_kernel": launch.options["E"] // 2, "wide_fold_kernel": launch.options["E"]}
        logits = at_once.get(launch.name, launch.options["Q"])  # of a turn; the wide fold makes each one twice
        assert sum("MUFU.EX2" in x for x in loop) >= 2 * logits, named(workload, launch)
        assert len(loop) <= LOGIT_INSTRUCTIONS[launch.name] * logits, named(workload, launch)
        assert not any(re.search(r"\b(BAR|LDL|STL|LDS|STS)\b", x) for x in loop), named(workload, launch)


def test_a_processor_holds_several_programs(launched):
    """Eight warps at least, two for each of its four schedulers, and two programs."""
    for workload, launch in launched:
        if launch.compiled.metadata.target.arch == 90:
            programs = launch.programs_a_processor()
            assert programs >= 2, named(workload, launch)
            assert programs * launch.warps >= 8, named(workload, launch)


def test_every_kernel_is_launched(launched):
    names = {launch.name for _, launch in launched}
    assert {name for module in MODULES for name in vars(module) if name.endswith("_kernel")} <= names


def named(workload, launch):
    return f"{workload.label}: {launch.name} {launch.options} {launch.usage}"


def test_the_forward_kernels_of_samples_check_their_indices(launched):
    for workload, launch in launched:
        checks = launch.name in ("logits_kernel", "loss_kernel") and workload.operator.name != "correlation_loss"
        assert ("__assertfail" in launch.ptx) == checks, named(workload, launch)


def test_another_layout_of_as_many_tokens_compiles_nothing_new():
    with as_launched.on(90) as launches:
        qkv = torch.empty(2, 100, 3, 2, 64, dtype=torch.bfloat16, device="cuda")
        as_launched.run(TREE_ATTENTION, (qkv, 4, [24] * 4))
        before = len(launches)
        as_launched.run(TREE_ATTENTION, (qkv, 1, [63, 1, 35]))  # sets the highest bit of a word
        assert len(launches) == before == 3
