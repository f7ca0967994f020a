"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, and keeps all it works on in registers."""

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler, not its interpreter", allow_module_level=True)

from pcmecl_fast.kernels import aot


@pytest.mark.parametrize("variant", aot.variants(), ids=lambda variant: variant.name)
@pytest.mark.parametrize("capability", aot.CAPABILITIES, ids="sm_{}".format)
def test_nothing_is_spilled(variant, capability):
    assert aot.needs(variant, capability).spilled == 0


def test_every_kernel_has_a_variant():
    compiled = {variant.kernel for variant in aot.variants()}
    for module in (aot.correlation, aot.direction, aot.frames, aot.tree_attention):
        assert {kernel for name, kernel in vars(module).items() if name.endswith("_kernel")} <= compiled
