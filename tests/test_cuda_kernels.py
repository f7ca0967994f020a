"""The CUDA kernels on the CPU, under the host harness, at the sizes of `device_cases.py`."""

import cuda_on_host
import pytest
import torch
from device_cases import CASES, DTYPES, WIDE_TREE, check, correlation, unaligned
from modes import Seen
from operators import CLIP_MEAN, CLIP_STD, make, seed, value_and_gradients
from tolerances import TOLERANCES, assert_close_for
from torch import Tensor
from torch.testing import assert_close

from pcmecl_fast.ops import PromptTree, correlation_loss, tree_attention
from pcmecl_fast.ops.backends.cuda import direction
from pcmecl_fast.ops.backends.cuda.correlation import rows_of_chunk

pytestmark = [
    pytest.mark.skipif(not cuda_on_host.compiler(), reason="needs a C++ compiler and the sources"),
    pytest.mark.usefixtures("cuda_kernels_on_host"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_give_the_references_result_and_gradients(case, dtype):
    check(CASES[case](dtype=dtype))


TREES = [(1, (40,)), (16, (1,) * 20), (17, (15, 17, 1)), (40, (3, 5)), (1, (1,)), (1, (2,) * 31), (15, (1, 16, 16))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 40, 64, 100])
@pytest.mark.parametrize(("prefix", "segments"), TREES, ids=str)
def test_tiles_of_a_tree_end_anywhere(prefix, segments, width, dtype):
    layout = PromptTree(prefix, segments)
    qkv = make("tree_attention", people=2, heads=3, layout=layout, width=width, dtype=dtype).floats[0].detach()
    grad = torch.randn(2, layout.length, 3, width, generator=seed(1), dtype=torch.float64)
    check_attention(qkv, layout, grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_a_key_that_many_see_do_not_add_up_what_the_result_was_rounded_by(dtype):
    layout = PromptTree(3, (2,) * 120)
    qkv = make("tree_attention", people=1, heads=1, layout=layout, width=16).floats[0].detach()
    qkv[:, :, 2] += 20  # what all values share takes the result's bits, and has no gradient
    check_attention(qkv.to(dtype), layout, torch.ones(1, layout.length, 1, 16, dtype=dtype))


@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("width", [16, 72])
def test_in_float16_gradients_of_logits_may_lie_beyond_its_range(width, size):
    layout = PromptTree(3, (20, 3, 1))
    qkv = make("tree_attention", people=2, heads=2, layout=layout, width=width).floats[0].detach()
    qkv[:, :, :2] *= 1e-3 / size  # gradients of queries and keys are within the range again
    qkv[:, :, 2] *= 200
    grad = size * torch.randn(2, layout.length, 2, width, generator=seed(1))
    grad[:, ::5] *= 20  # some queries' are far larger than those of the others
    check_attention(qkv.half(), layout, grad.half(), least=max(size * 1e-5, 1e-6))


def check_attention(qkv: Tensor, layout: PromptTree, grad: Tensor, least: float = 0.0) -> None:
    """Result and gradient are the reference's in float64 from the same inputs, the gradient up to `least` if given."""
    out = tree_attention(qkv.requires_grad_(), layout, backend="cuda")
    exact = qkv.detach().double().requires_grad_()
    expected = tree_attention(exact, layout, backend="reference")
    assert_close_for(qkv.dtype)(out, expected)
    (gradient,), (exact_gradient,) = (
        torch.autograd.grad(y, x, grad.to(y.dtype)) for y, x in ((out, qkv), (expected, exact))
    )
    tolerances = {**TOLERANCES[qkv.dtype], **({"atol": least} if least else {})}
    assert_close(gradient.double(), exact_gradient, **tolerances)


@pytest.mark.parametrize(("people", "emotions", "width"), [(1, 7, 140), (3, 7, 1040), (2, 20, 33), (60, 2, 8)])
def test_the_banks_gradient_sums_over_repeated_individuals(people, emotions, width):
    sizes = {"batch": 100, "people": people, "emotions": emotions, "width": width}
    check(make("direction_loss", **sizes, contrast=0.3, degenerate=True))


def test_individuals_in_any_order_are_sorted_and_counted_over_many_stretches(monkeypatch):
    monkeypatch.setattr(direction, "STRETCH", 32)
    check(make("direction_loss", batch=150, people=11, width=12, contrast=0.3, degenerate=True))


def test_a_loss_of_many_samples_is_added_up_over_blocks():
    check(make("direction_loss", batch=2100, people=1, emotions=2, width=1))


def test_a_scale_that_overflows_float_sums_gives_nan_and_not_a_wrong_number():
    call = make("correlation_loss")
    module = cuda_on_host.load()
    visual, text, _ = (x.detach() for x in call.floats)
    assert module.correlation_loss(visual, text, torch.tensor(151.0), 0.0, None, "all")[0].isnan()
    assert correlation_loss(visual, text, scale=150.0, backend="cuda").isfinite()


@pytest.mark.parametrize("negatives", ["all", "within"])
def test_features_that_are_no_numbers_are_none_of_the_loss_only_where_they_are_masked(negatives):
    visual, text, scale = (x.detach() for x in make("correlation_loss", people=5, emotions=7, width=16).floats)
    visual[3, 2, 1] = torch.nan
    mask = torch.ones(5, 7, dtype=torch.bool)
    options = {"scale": scale, "negatives": negatives, "backend": "cuda"}
    assert correlation_loss(visual, text, mask=mask, **options).isnan()
    mask[3, 2] = False
    assert correlation_loss(visual, text, mask=mask, **options).isfinite()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("emotions", [5, 7, 8])
def test_features_of_whole_rows_may_begin_anywhere(emotions, dtype):
    check(unaligned("correlation_loss", people=5, emotions=emotions, width=16, missing=True, dtype=dtype))


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ({"n": 512, "most": 167, "of_wave": 132, "of_block": 4}, 128),  # 512 blocks of 528
        ({"n": 512, "most": 167, "of_wave": 96, "of_block": 4}, 88),  # 352 of 396, six times
        ({"n": 512, "most": 400, "of_wave": 96, "of_block": 4}, 256),
        ({"n": 33, "most": 4000, "of_wave": 96, "of_block": 4}, 33),
        ({"n": 5000, "most": 2, "of_wave": 0, "of_block": 4}, 2),
    ],
)
def test_chunks_are_equal_and_whole_waves(sizes, rows):
    assert rows_of_chunk(**sizes) == rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("height", "size"), [(24, 21), (28, 20), (40, 20), (160, 140), (70, 81)], ids=str)
def test_squares_are_resized_by_the_same_taps_down_and_across(height, size, interpolation, dtype):
    sizes = {"batch": 1, "height": height, "width": height, "size": size}
    check(make("clip_frames", **sizes, mean=CLIP_MEAN, std=CLIP_STD, interpolation=interpolation, dtype=dtype))


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
    """Results and gradients of all operators."""
    calls = [
        correlation(people=34, emotions=7, width=12),
        correlation(people=34, emotions=7, width=12, negatives="within"),
        make("direction_loss", batch=9, width=140, contrast=0.3, degenerate=True),
        make("tree_attention", layout=WIDE_TREE, width=20),
        make("clip_frames", batch=1, height=40, width=150, size=24),
    ]
    results = []
    for call in calls:
        out, gradients = value_and_gradients(call, call.floats, backend="cuda")
        results += [out, *gradients]
    return results
