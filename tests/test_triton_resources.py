"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, and keeps its working set in registers."""

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler, not its interpreter", allow_module_level=True)

from bench import triton_resources


@pytest.mark.parametrize("variant", triton_resources.variants(), ids=lambda variant: variant.name)
@pytest.mark.parametrize("capability", triton_resources.CAPABILITIES, ids="sm_{}".format)
def test_nothing_is_spilled(variant, capability):
    assert triton_resources.needs(variant, capability).spilled == 0


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
