"""The CUDA kernels on the CPU, under the host harness, at the sizes of `device_cases.py`."""

import cuda_on_host
import pytest
import torch
from device_cases import CASES, DTYPES, WIDE_TREE, check, correlation
from modes import Seen
from operators import make, seed, value_and_gradients
from tolerances import assert_close_for
from torch import Tensor

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
    qkv = make("tree_attention", people=2, heads=3, layout=layout, width=width, dtype=dtype).floats[0]
    out = tree_attention(qkv, layout, backend="cuda")
    grad = torch.randn(out.shape, generator=seed(1), dtype=torch.float64).to(dtype)
    (gradient,) = torch.autograd.grad(out, qkv, grad)
    expected, expected_gradient = attention_in_float64(qkv.detach(), layout, grad, out.detach())
    assert_close_for(dtype)(out, expected)
    assert_close_for(dtype)(gradient, expected_gradient)


def attention_in_float64(qkv, layout, grad, rounded):
    """The result, and the gradient by the result as it was rounded, whose errors add up over the queries of a key."""
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)
    grad, rounded = (x.double().transpose(1, 2) for x in (grad, rounded))
    logits = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    weights = logits.masked_fill(~layout.mask(), -torch.inf).softmax(-1)
    of_logits = weights * (grad @ v.transpose(-1, -2) - (grad * rounded).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    gradients = of_logits @ k, of_logits.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad
    return (weights @ v).transpose(1, 2), torch.stack(gradients).permute(1, 3, 0, 2, 4)


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
