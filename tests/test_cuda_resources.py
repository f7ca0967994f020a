"""The compiled CUDA kernels: no spills at the common sizes, 16 bytes per load. Needs no GPU."""

import re

import pytest

from bench import cuda_resources
from pcmecl_fast.ops.backends import extension

PATH, TOOL = extension._path(extension.CUDA_NAME), cuda_resources.cuobjdump()
pytestmark = pytest.mark.skipif(PATH is None or TOOL is None, reason="needs the CUDA extension and cuobjdump")


@pytest.fixture(scope="module")
def kernels():
    return cuda_resources.read(PATH, TOOL)


def test_every_operator_is_there_for_every_architecture(kernels):
    of = {(kernel.arch, kernel.name.rsplit(" ", 1)[1]) for kernel in kernels}
    for arch in {kernel.arch for kernel in kernels}:
        assert {(arch, name) for name in ("Direction", "Correlation", "Tree", "Frames")} <= of


def test_only_heads_wider_than_128_spill(kernels):
    spilled = {kernel.name for kernel in kernels if kernel.spills}
    assert all(re.fullmatch(r"backward_kernel<\w+, \d, 32> of Tree", name) for name in spilled), spilled


@pytest.mark.parametrize(
    "name", ["forward_kernel<{}> of Direction", "backward_kernel<{}> of Direction", "forward_kernel<{}> of Tree"]
)
def test_aligned_rows_are_loaded_16_bytes_at_a_time(kernels, name):
    begin = name.split("{")[0]
    vectors = ("float, 4", "Half, 8", "BFloat16, 8")
    found = [
        kernel
        for kernel in kernels
        if kernel.name.startswith(tuple(begin + vector for vector in vectors)) and kernel.name.endswith(name[-5:])
    ]
    assert found
    assert all(kernel.wide_loads >= kernel.loads / 2 for kernel in found)
