"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, and keeps its working set in registers."""

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler, not its interpreter", allow_module_level=True)

import triton

from bench import triton_resources

# Bytes a thread that Triton 3.8 spills; 3.9, whose table is in docs/kernels.md, spills none.
SPILLED_BY_3_8 = {
    "attention backward S=30, d=64, fp32": 104,
    "attention forward S=30, d=64, fp32": 32,
    "attention queries S=192, d=64, fp32": 24,
    "correlation sums E=7, all": 16,
    "correlation prepare E=11, bf16": 8,
}


@pytest.mark.parametrize("variant", triton_resources.variants(), ids=lambda variant: variant.name)
@pytest.mark.parametrize("capability", triton_resources.CAPABILITIES, ids="sm_{}".format)
def test_nothing_is_spilled(variant, capability):
    known = SPILLED_BY_3_8 if triton.__version__.startswith("3.8.") else {}
    most = next((spilled for name, spilled in known.items() if variant.name.startswith(name)), 0)
    assert triton_resources.needs(variant, capability).spilled <= most


def test_every_kernel_has_a_variant():
    compiled = {variant.kernel for variant in triton_resources.variants()}
    for module in (
        triton_resources.products,
        triton_resources.correlation_kernels,
        triton_resources.direction_kernels,
        triton_resources.frames,
        triton_resources.tree_attention,
    ):
        assert {kernel for name, kernel in vars(module).items() if name.endswith("_kernel")} <= compiled
