"""The CUDA kernels on the CPU, under the host harness: sizes that the operators' own tests leave out.

Block and warp borders, several chunks of S, every number of emotions, and threads that run in either order: a kernel
that lacks a barrier would show.
"""

import cuda_on_host
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close_for
from torch import Tensor

from pcmecl_fast.ops import PromptTree, clip_frames, correlation_loss, direction_logits, direction_loss, tree_attention

pytestmark = [
    pytest.mark.skipif(not cuda_on_host.compiler(), reason="needs a C++ compiler and the sources"),
    pytest.mark.usefixtures("cuda_kernels_on_host"),
]
HALVES = (torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
WIDE_TREE = PromptTree(9, (2, 3, 2, 4, 2, 2, 3))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@pytest.mark.parametrize("emotions", [2, 3, 4, 5, 6, 7, 8, 9, 32])
@pytest.mark.parametrize("contrast", [0.0, 0.4])
def test_direction_loss_at_every_number_of_emotions(emotions, contrast):
    floats = direction_features(6, 3, emotions, 20)
    individual, a, b = indices(6, 3, emotions)
    check(
        lambda x, y, bank, backend: direction_loss(
            x, y, bank, individual, a, b, scale=30.0, contrast=contrast, backend=backend
        ),
        floats,
    )
    check(lambda x, y, bank, backend: direction_logits(x, y, bank, individual, a, backend=backend), floats)


@dtypes
@pytest.mark.parametrize("width", [8, 136, 512, 1000])
def test_direction_loss_of_aligned_features(dtype, width):
    floats = direction_features(5, 2, 7, width, dtype)
    individual, a, b = indices(5, 2, 7)
    check(
        lambda x, y, bank, backend: direction_loss(x, y, bank, individual, a, b, contrast=0.4, backend=backend), floats
    )


def test_features_that_begin_anywhere_in_memory_are_taken():
    floats = [
        torch.empty(x.numel() + 1).narrow(0, 1, x.numel()).view(x.shape).copy_(x)
        for x in direction_features(5, 2, 7, 16)
    ]
    individual, a, b = indices(5, 2, 7)
    check(lambda x, y, bank, backend: direction_loss(x, y, bank, individual, a, b, backend=backend), floats)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_banks_gradient_adds_repeated_individuals_up(deterministic):
    floats = direction_features(40, 2, 7, 140)
    individual, a, b = indices(40, 2, 7)
    torch.use_deterministic_algorithms(deterministic)
    try:
        check(
            lambda x, y, bank, backend: direction_loss(x, y, bank, individual, a, b, contrast=0.3, backend=backend),
            floats,
        )
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("negatives", ["all", "within", "distinct"])
@pytest.mark.parametrize("emotions", [2, 3, 4, 5, 6, 7, 8, 9])
def test_correlation_loss_at_every_number_of_emotions(emotions, negatives):
    floats, mask = correlation_features(5, emotions, 20)
    check(lambda v, t, backend: correlation_loss(v, t, mask=mask, negatives=negatives, backend=backend), floats)


def test_correlation_loss_of_as_many_emotions_as_it_takes():
    floats, mask = correlation_features(2, 32, 12)
    check(lambda v, t, backend: correlation_loss(v, t, mask=mask, negatives="distinct", backend=backend), floats)


@dtypes
@pytest.mark.parametrize("negatives", ["all", "distinct"])
def test_correlation_loss_over_several_blocks_and_chunks(negatives, dtype):
    floats, mask = correlation_features(37, 7, 24, dtype)
    scale = torch.tensor(40.0)
    check(
        lambda v, t, s, backend: correlation_loss(v, t, scale=s, mask=mask, negatives=negatives, backend=backend),
        [*floats, scale],
    )


@pytest.mark.parametrize("scale", [0.5, 100.0, 150.0])
def test_correlation_loss_at_the_scales_ends(scale):
    visual = F.normalize(torch.randn(6, 4, 16, generator=seed(1)), dim=-1)
    text = F.normalize(visual + 0.1 * torch.randn(6, 4, 16, generator=seed(2)), dim=-1)  # logits near ± scale
    check(lambda v, t, backend: correlation_loss(v, t, scale=scale, backend=backend), [visual, text])


def test_a_scale_that_float_sums_cannot_hold_gives_nan_and_not_a_wrong_number():
    floats, _ = correlation_features(4, 3, 8)
    assert correlation_loss(*floats, scale=torch.tensor(151.0), backend="cuda").isnan()


@dtypes
@pytest.mark.parametrize(("heads", "width"), [(2, 64), (1, 17), (1, 72), (1, 130), (1, 256)])
def test_tree_attention_of_every_heads_width(dtype, heads, width):
    qkv = torch.randn(2, WIDE_TREE.length, 3, heads, width, generator=seed(3)).to(dtype)
    check(lambda x, backend: tree_attention(x, WIDE_TREE, backend=backend), [qkv])


def test_tree_attention_of_many_segments():
    layout = PromptTree(3, tuple(1 + k % 3 for k in range(40)))
    qkv = 3 * torch.randn(1, layout.length, 3, 2, 8, generator=seed(4))
    check(lambda x, backend: tree_attention(x, layout, backend=backend), [qkv])


@dtypes
@pytest.mark.parametrize(
    ("height", "width", "size"), [(40, 64, 24), (20, 300, 16), (9, 8, 70), (31, 33, 5), (65, 17, 33)]
)
def test_frames_over_several_tiles_and_chunks(dtype, height, width, size):
    frames = (2 * torch.rand(1, 3, height, width, generator=seed(5)) - 1).to(dtype)
    check(lambda x, backend: clip_frames(x, size, *CLIP, backend=backend), [frames])


def test_threads_in_either_order_give_the_same_bits(monkeypatch):
    runs = []
    for order in ("up", "down"):
        monkeypatch.setenv("PCMECL_HOST_ORDER", order)
        runs.append(everything())
    for up, down in zip(*runs, strict=True):
        assert torch.equal(up, down)


def everything() -> list[Tensor]:
    """Results and gradients of all operators; those of the bank in a fixed order."""
    floats, mask = correlation_features(34, 7, 12)
    individual, a, b = indices(9, 3, 7)
    calls = [
        (lambda v, t: correlation_loss(v, t, mask=mask, backend="cuda"), floats),
        (lambda v, t: correlation_loss(v, t, mask=mask, negatives="within", backend="cuda"), floats),
        (
            lambda x, y, bank: direction_loss(x, y, bank, individual, a, b, contrast=0.3, backend="cuda"),
            direction_features(9, 3, 7, 140),
        ),
        (lambda x: tree_attention(x, WIDE_TREE, backend="cuda"), [torch.randn(2, WIDE_TREE.length, 3, 2, 20)]),
        (lambda x: clip_frames(x, 24, *CLIP, backend="cuda"), [torch.rand(1, 3, 40, 150, generator=seed(5))]),
    ]
    calls[3][1][0].copy_(torch.randn(calls[3][1][0].shape, generator=seed(6)))
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for call, inputs in calls:
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = call(*leaves)
            results += [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
    finally:
        torch.use_deterministic_algorithms(False)
    return results


def check(call, floats: list[Tensor]) -> None:
    """The kernels' result and gradients are the reference's in float64 from the same inputs."""
    ours = [x.detach().requires_grad_() for x in floats]
    exact = [x.detach().double().requires_grad_() for x in floats]
    out, expected = call(*ours, backend="cuda"), call(*exact, backend="reference")
    assert_close_for(out.dtype)(out, expected)
    weights = torch.randn(out.shape, generator=seed(7)).to(out.dtype)
    gradients = torch.autograd.grad((out * weights).sum(), ours)
    of_exact = torch.autograd.grad((expected * weights.double()).sum(), exact)
    for x, gradient, exact_gradient in zip(ours, gradients, of_exact, strict=True):
        assert_close_for(x.dtype)(gradient, exact_gradient)


def direction_features(samples, people, emotions, width, dtype=torch.float32) -> list[Tensor]:
    """Some edits change nothing, and two emotions of the first individual are the same."""
    generator = seed(emotions * 1000 + width)
    source, edited = (torch.randn(samples, width, generator=generator) for _ in range(2))
    edited[1] = source[1]
    bank = F.normalize(torch.randn(people, emotions, width, generator=generator), dim=-1)
    bank[0, 1] = bank[0, 0]
    return [x.to(dtype) for x in (source, edited, bank)]


def indices(samples: int, people: int, emotions: int) -> list[Tensor]:
    generator = seed(samples)
    return [torch.randint(0, size, (samples,), generator=generator) for size in (people, emotions, emotions)]


def correlation_features(people, emotions, width, dtype=torch.float32) -> tuple[list[Tensor], Tensor]:
    """Some emotions are missing, where features are NaN, and two of the first individual are the same."""
    generator = seed(emotions * 1000 + width)
    visual, text = F.normalize(torch.randn(2, people, emotions, width, generator=generator), dim=-1)
    mask = torch.rand(people, emotions, generator=generator) > 0.25
    mask[0] = True
    visual[0, 1] = visual[0, 0]
    return [x.masked_fill(~mask[..., None], torch.nan).to(dtype) for x in (visual, text)], mask


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)
