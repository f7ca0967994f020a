"""The CUDA kernels on the CPU, under the host harness: sizes that the operators' own tests do not cover.

Block and warp borders, several chunks of S, every number of emotions, and threads that run in either order: a kernel
that lacks a barrier would show.
"""

import cuda_on_host
import pytest
import torch
import torch.nn.functional as F
from operators import CLIP_MEAN, CLIP_STD, Call, make, seed, value_and_gradients
from tolerances import assert_close_for
from torch import Tensor

from pcmecl_fast.ops import PromptTree

pytestmark = [
    pytest.mark.skipif(not cuda_on_host.compiler(), reason="needs a C++ compiler and the sources"),
    pytest.mark.usefixtures("cuda_kernels_on_host"),
]
HALVES = (torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
WIDE_TREE = PromptTree(9, (2, 3, 2, 4, 2, 2, 3))


@pytest.mark.parametrize("emotions", [2, 3, 4, 5, 6, 7, 8, 9, 32])
@pytest.mark.parametrize("contrast", [0.0, 0.4])
def test_direction_loss_at_every_number_of_emotions(emotions, contrast):
    sizes = {"batch": 6, "people": 3, "emotions": emotions, "width": 20, "degenerate": True}
    check(make("direction_loss", **sizes, contrast=contrast, scale=30.0))
    check(make("direction_logits", **sizes))


@dtypes
@pytest.mark.parametrize("width", [8, 136, 512, 1000])
def test_direction_loss_of_aligned_features(dtype, width):
    check(make("direction_loss", people=2, width=width, dtype=dtype, contrast=0.4, scale=100.0, degenerate=True))


def test_unaligned_features_are_supported():
    call = make("direction_loss", people=2, width=16, contrast=0.0, degenerate=True)
    for i, x in enumerate(call.floats[:3]):
        moved = torch.empty(x.numel() + 1).narrow(0, 1, x.numel()).view(x.shape).copy_(x.detach())
        call.floats[i] = moved.requires_grad_()
    check(call)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_banks_gradient_sums_over_repeated_individuals(deterministic):
    torch.use_deterministic_algorithms(deterministic)
    try:
        check(make("direction_loss", batch=40, people=2, width=140, contrast=0.3, degenerate=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("negatives", ["all", "within", "distinct"])
@pytest.mark.parametrize("emotions", [2, 3, 4, 5, 6, 7, 8, 9])
def test_correlation_loss_at_every_number_of_emotions(emotions, negatives):
    check(correlation(people=5, emotions=emotions, width=20, negatives=negatives, scale=100.0))


def test_correlation_loss_of_as_many_emotions_as_it_supports():
    check(correlation(people=2, emotions=32, width=12, negatives="distinct", scale=100.0))


@dtypes
@pytest.mark.parametrize("negatives", ["all", "distinct"])
def test_correlation_loss_over_several_blocks_and_chunks(negatives, dtype):
    check(correlation(people=37, emotions=7, width=24, negatives=negatives, scale=40.0, dtype=dtype))


@pytest.mark.parametrize("scale", [0.5, 100.0, 150.0])
def test_correlation_loss_at_the_scales_ends(scale):
    call = make("correlation_loss", people=6, emotions=4, width=16, scale=scale)
    visual = call.floats[0].detach()
    call.floats[1] = F.normalize(visual + 0.1 * torch.randn(6, 4, 16, generator=seed(2)), dim=-1)  # logits near ± scale
    check(call)


def test_a_scale_that_overflows_float_sums_gives_nan_and_not_a_wrong_number():
    assert make("correlation_loss", scale=151.0)(backend="cuda").isnan()


@dtypes
@pytest.mark.parametrize(("heads", "width"), [(2, 64), (1, 17), (1, 72), (1, 130), (1, 256)])
def test_tree_attention_of_every_heads_width(dtype, heads, width):
    check(make("tree_attention", layout=WIDE_TREE, heads=heads, width=width, dtype=dtype))


def test_tree_attention_of_many_segments():
    call = make("tree_attention", people=1, layout=PromptTree(3, tuple(1 + k % 3 for k in range(40))), width=8)
    call.floats[0] = 3 * call.floats[0].detach()
    check(call)


@dtypes
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(40, 64, 24), (20, 300, 16), (9, 8, 70), (31, 33, 5), (65, 17, 33)]
)
def test_frames_over_several_tiles_and_chunks(dtype, height, width, size, interpolation):
    sizes = {"batch": 1, "height": height, "width": width, "size": size, "interpolation": interpolation}
    check(make("clip_frames", **sizes, mean=CLIP_MEAN, std=CLIP_STD, dtype=dtype))


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


def check(call: Call) -> None:
    """The kernels' result and gradients are the reference's in float64 from the same inputs."""
    out, gradients = value_and_gradients(call, call.floats, backend="cuda")
    expected, exact_gradients = value_and_gradients(call, call.widened(), backend="reference")
    assert_close_for(out.dtype)(out, expected)
    for x, gradient, exact in zip(call.floats, gradients, exact_gradients, strict=True):
        assert_close_for(x.dtype)(gradient, exact)


def correlation(**options) -> Call:
    """Some emotions are missing: their features are NaN."""
    call = make("correlation_loss", missing=True, degenerate=True, **options)
    (mask,) = call.rest
    call.floats[:2] = [x.detach().masked_fill(~mask[..., None], torch.nan) for x in call.floats[:2]]
    return call
