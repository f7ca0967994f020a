"""The CUDA kernels on the CPU, under the host harness, at the sizes of `device_cases.py`."""

import cuda_on_host
import pytest
import torch
from device_cases import CASES, DTYPES, WIDE_TREE, check, correlation
from modes import Seen
from operators import make, value_and_gradients
from torch import Tensor

from pcmecl_fast.ops import correlation_loss

pytestmark = [
    pytest.mark.skipif(not cuda_on_host.compiler(), reason="needs a C++ compiler and the sources"),
    pytest.mark.usefixtures("cuda_kernels_on_host"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_give_the_references_result_and_gradients(case, dtype):
    check(CASES[case](dtype=dtype))


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_banks_gradient_sums_over_repeated_individuals(deterministic):
    torch.use_deterministic_algorithms(deterministic)
    try:
        check(make("direction_loss", batch=40, people=2, width=140, contrast=0.3, degenerate=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_scale_that_overflows_float_sums_gives_nan_and_not_a_wrong_number():
    call = make("correlation_loss")
    module = cuda_on_host.load()
    visual, text, _ = (x.detach() for x in call.floats)
    assert module.correlation_loss(visual, text, torch.tensor(151.0), 0.0, None, "all")[0].isnan()
    assert correlation_loss(visual, text, scale=150.0, backend="cuda").isfinite()


def test_a_resize_makes_its_weights_once_for_a_size():
    frames, *rest = make("clip_frames", height=21, width=23).schema_arguments
    frames, grad, module = frames.detach(), torch.ones(2, 3, 16, 16), cuda_on_host.load()
    with Seen() as seen:
        module.clip_frames(frames, *rest)
        module.clip_frames_backward(grad, frames, *rest, [True])
    assert seen.names == ["aten::empty.memory_format"] * 2  # the result and the gradient


def test_threads_in_either_order_give_the_same_bits(monkeypatch):
    runs = []
    for order in ("up", "down"):
        monkeypatch.setenv("PCMECL_HOST_ORDER", order)
        runs.append(everything())
    for up, down in zip(*runs, strict=True):
        assert torch.equal(up, down)


def everything() -> list[Tensor]:
    """Results and gradients of all operators; those of the bank in a fixed order."""
    calls = [
        correlation(people=34, emotions=7, width=12),
        correlation(people=34, emotions=7, width=12, negatives="within"),
        make("direction_loss", batch=9, width=140, contrast=0.3, degenerate=True),
        make("tree_attention", layout=WIDE_TREE, width=20),
        make("clip_frames", batch=1, height=40, width=150, size=24),
    ]
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for call in calls:
            out, gradients = value_and_gradients(call, call.floats, backend="cuda")
            results += [out, *gradients]
    finally:
        torch.use_deterministic_algorithms(False)
    return results
