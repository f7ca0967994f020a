"""The compiled CUDA kernels: no spills at the common sizes, 16 bytes per load, written bounds on what they issue.

Needs no GPU.
"""

from math import ceil

import pytest

from bench import cuda_plan, cuda_resources
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


def test_no_kernel_uses_local_memory(kernels):
    assert [(kernel.name, kernel.arch) for kernel in kernels if kernel.spills] == []


@pytest.mark.parametrize("name", ["forward_kernel<{}> of Direction", "backward_kernel<{}> of Direction"])
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


def named(kernels, name):
    """The kernel's code for sm_90, which the bounds are written for."""
    if not any(kernel.arch == "sm_90" for kernel in kernels):
        pytest.skip("the bounds are for sm_90")
    (found,) = (kernel for kernel in kernels if kernel.name == name and kernel.arch == "sm_90")
    return found


PREFIX, SEGMENT, SEGMENTS = 9, 3, 7  # a prompt tree of seven names: 30 tokens
TOKENS = PREFIX + SEGMENT * SEGMENTS


def begin_and_end(token):
    if token < PREFIX:
        return PREFIX, TOKENS
    begin = token - (token - PREFIX) % SEGMENT
    return begin, begin + SEGMENT


def keys_of(first, last):
    """How many keys the queries from `first` to `last` see."""
    return last + 1 if first < PREFIX else PREFIX + last + 1 - begin_and_end(first)[0]


@pytest.mark.parametrize("of", ["Half", "BFloat16"])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_tensor_cores_take_a_third_of_the_instructions_of_the_attention_of_a_tree(kernels, way, of):
    queries = [keys_of(token, token) for token in range(TOKENS)]
    as_keys = [begin_and_end(token)[1] - token for token in range(TOKENS)]
    tiles = [(first, min(first + 16, TOKENS) - 1) for first in range(0, TOKENS, 16)]
    of_tiles = [ceil(keys_of(*tile) / 16) for tile in tiles]
    seen_by = [ceil((max(begin_and_end(token)[1] for token in tile) - tile[0]) / 16) for tile in tiles]
    search, searches = 3, TOKENS - PREFIX  # steps to find a segment, for those who look for one
    by_ones, by_tiles = sum(ceil(count / 4) for count in queries), sum(of_tiles)
    alone, together = [search * searches, by_ones], [search * len(tiles), by_tiles]
    if way == "backward":
        alone += [search * searches, sum(ceil(count / 4) for count in as_keys)]
        together += [search * len(tiles), sum(seen_by)]
    # A warp of a backward takes one of two ways through the code, about half of it.
    tensor, scalar = (
        named(kernels, f"{way}_kernel<{of}, 8, false> of Tree"),
        named(kernels, f"{way}_kernel<4, 8, true> of Tree"),
    )
    assert tensor.tensor >= (24 if way == "forward" else 80)
    assert tensor.issued(len(tiles), together) <= 0.35 * scalar.issued(TOKENS, alone)


@pytest.mark.parametrize("of", ["Half", "BFloat16"])
def test_attention_on_tensor_cores_fills_a_multiprocessor(kernels, of):
    found = [kernel for kernel in kernels if kernel.name.endswith("of Tree") and of in kernel.name]
    assert found
    for kernel in found:
        assert kernel.tensor
        assert kernel.spills == kernel.atomics == 0
        assert kernel.blocks(128) >= (3 if "forward" in kernel.name else 2), kernel
        if "8, " in kernel.name:
            assert kernel.wide_loads >= kernel.loads * 0.75, kernel


def test_nothing_is_added_up_by_atomics(kernels):
    assert [kernel.name for kernel in kernels if kernel.atomics] == []


@pytest.mark.parametrize(("of", "vector"), [("float", 4), ("Half", 8), ("BFloat16", 8)])
def test_a_runs_bank_gradient_is_added_up_in_registers(kernels, of, vector):
    kernel = named(kernels, f"run_kernel<{of}, {vector}, 7> of Direction")
    assert kernel.spills == 0
    assert kernel.blocks(128, shared=4 * 7 * 7) >= 4  # which the number of runs counts on


@pytest.mark.parametrize("negatives", ["false", "true"])
@pytest.mark.parametrize("emotions", [7, 8])
def test_a_logit_of_the_correlations_takes_few_instructions(kernels, emotions, negatives):
    pairs = emotions * (emotions - 1) // 2
    of_columns = 4 * pairs * 128  # bytes of shared memory
    sums = named(kernels, f"sums_kernel<{emotions}, {negatives}> of Correlation")
    gradients = named(kernels, f"gradients_kernel<{emotions}, {negatives}> of Correlation")
    most, most_backward = (14, 24) if negatives == "false" else (16, 26)
    assert sums.loops()[0] <= most * pairs
    assert gradients.loops()[0] <= most_backward * pairs
    assert sums.spills == gradients.spills == 0
    assert sums.blocks(128, of_columns) >= 4
    assert gradients.blocks(128, of_columns + 4 * emotions**2 * 128) >= 3
    # Of the loops over pairs of emotions: a part of the sums, where a row of dS used to be added up in memory.
    assert gradients.stores_in_loop(1) == 1


@pytest.fixture(scope="module", params=cuda_plan.DEVICES, ids=lambda device: device.name)
def planned(request, kernels):
    """The launches on a device."""
    if not any(kernel.arch == request.param.arch for kernel in kernels):
        pytest.skip(f"the extension has no code for {request.param.arch}")
    return cuda_plan.launches(kernels, request.param)


def test_what_the_plan_predicts_is_within_twice_the_floor_and_a_microsecond(planned):
    for launch in planned:
        assert launch.predicted() <= (2e-6 if launch.bound else launch.allowed()), launch.what


@pytest.mark.parametrize(
    ("name", "shared", "most"),
    [
        ("resize_kernel<float, 4, 5> of Frames", 16 * 132 * 4, 340),
        ("resize_kernel<float, 4, 4> of Frames", 16 * 132 * 4, 320),
        ("changes_kernel<float, 4, 7> of Changes", 0, 1100),
        ("finish_kernel<float, 4, 7> of CorrelationFinish", 16 * 7 * 7, 2100),
        ("forward_kernel<4, 8, true> of Tree", 0, 350),
        ("backward_kernel<4, 8, true> of Tree", 0, 620),
    ],
)
def test_kernels_of_known_sizes_are_short_and_share_a_multiprocessor(kernels, name, shared, most):
    kernel = named(kernels, name)
    assert len(kernel._addresses()) <= most
    assert kernel.blocks(256 if "Frames" in name else 128, shared) >= 3


def test_every_main_kernel_keeps_its_registers_and_shares_a_multiprocessor(planned):
    for launch in planned:
        assert launch.kernel.spills == 0, launch.what
        assert launch.kernel.blocks(launch.threads, launch.shared) >= 2, launch.what
        if "Frames" in launch.kernel.name:
            assert launch.kernel.registers <= 100
        if "BFloat16" in launch.kernel.name:
            assert launch.kernel.tensor


def test_the_document_holds_the_plan_of_the_built_extension(kernels):
    missing = {device.arch for device in cuda_plan.DEVICES} - {kernel.arch for kernel in kernels}
    if missing:
        pytest.skip(f"the extension has no code for {', '.join(sorted(missing))}")
    assert cuda_plan.written() == cuda_plan.tables(kernels).strip(), "run python -m bench.cuda_plan --write"


def test_a_loop_may_end_in_a_branch_without_a_condition():
    code = "".join(
        f"/*{address:04x}*/  {text} ;\n"
        for address, text in enumerate(["MOV", "ISETP", "@P0 CALL.REL.NOINC 0x4", "BRA 0x1", "EXIT", "BRA 0x5"])
    )
    kernel = cuda_resources.Kernel("sm_80", "loop", 32, 0, 0, 0, 0, 0, 0, code)
    assert kernel.loops() == [3]
    assert kernel.issued(1, [10]) == 2 + 3 * 10
