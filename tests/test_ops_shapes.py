"""Every operator on every compiled backend equals the reference in float64: drawn shapes, masks and coincidences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pcmecl_fast.ops import (
    PromptTree,
    clip_frames,
    correlation_loss,
    direction_logits,
    direction_loss,
    tree_attention,
    use_backend,
)

pytestmark = pytest.mark.usefixtures("compiled_backend")

# The largest error, relative to the norm: what the operators promise.
PROMISED = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}
drawn = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the backend is the same for every example
)
dtypes = st.sampled_from(list(PROMISED))
seeds = st.integers(0, 2**31)
emotions = st.one_of(st.integers(2, 9), st.just(32))
widths = st.one_of(st.integers(4, 40), st.sampled_from([127, 512, 513]))


@drawn
@given(
    dtypes, seeds, st.integers(1, 40), st.integers(1, 6), emotions, widths, st.sampled_from([0.0, 0.3]), st.booleans()
)
def test_direction_loss(dtype, seed, batch, people, count, width, contrast, normalize):
    random = torch.Generator().manual_seed(seed)
    source, edited = (torch.randn(batch, width, generator=random) for _ in range(2))
    edited[::5] = source[::5]  # δ = 0
    bank = F.normalize(torch.randn(people, count, width, generator=random), dim=-1)
    individual = torch.randint(people, (batch,), generator=random)
    a, b = (torch.randint(count, (batch,), generator=random) for _ in range(2))  # b = a among them
    scale = torch.rand((), generator=random) * 30 + 1

    def loss(source, edited, bank, scale):
        return direction_loss(
            source, edited, bank, individual, a, b, scale=scale, contrast=contrast, normalize=normalize
        )

    def logits(source, edited, bank):
        return direction_logits(source, edited, bank, individual, a, normalize=normalize)

    assert_as_promised(loss, dtype, (source, edited, bank, scale))
    assert_as_promised(logits, dtype, (source, edited, bank))


@drawn
@given(
    dtypes, seeds, st.integers(1, 18), emotions, widths, st.sampled_from(["all", "within", "distinct"]), st.booleans()
)
def test_correlation_loss(dtype, seed, people, count, width, negatives, missing):
    people = min(people, 2) if count == 32 else people
    random = torch.Generator().manual_seed(seed)
    visual, text = (F.normalize(torch.randn(people, count, width, generator=random), dim=-1) for _ in range(2))
    visual[::3, 1] = visual[::3, 0]  # two emotions with the same features
    visual[1:2], text[1:2] = visual[:1], text[:1]  # the same individual twice
    mask = torch.rand(people, count, generator=random) > 0.4 if missing else None
    scale = torch.rand((), generator=random) * 30 + 1

    def loss(visual, text, scale):
        return correlation_loss(visual, text, scale=scale, mask=mask, negatives=negatives)

    assert_as_promised(loss, dtype, (visual, text, scale))


@drawn
@given(dtypes, seeds, st.integers(1, 3), *[st.integers(1, 70)] * 3)
def test_clip_frames(dtype, seed, batch, height, width, side):
    frames = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    # A bias of 0 in the result, so that the relative error is that of the resize.
    assert_as_promised(lambda x: clip_frames(x, side, (0.5,) * 3, (0.2, 0.3, 0.4)), dtype, (frames,), at_least=1e-4)


@drawn
@given(dtypes, seeds, st.integers(1, 3), st.integers(1, 5), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_tree_attention(dtype, seed, people, prefix, lengths):
    layout = PromptTree(prefix, tuple(lengths))
    qkv = torch.randn(people, layout.length, 3, 2, 5, generator=torch.Generator().manual_seed(seed))
    assert_as_promised(lambda qkv: tree_attention(qkv, layout), dtype, (qkv,))


def assert_as_promised(call, dtype: torch.dtype, inputs: tuple[Tensor, ...], at_least: float = 0.0) -> None:
    """The result and the gradients of its weighted sum, against float64 from the same, rounded inputs.

    `at_least` widens float32's promise where the reference itself computes its constants in float32.
    """
    ours = [x.to(dtype if x.dim() else torch.float64).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in ours]
    promised = max(PROMISED[dtype], at_least if dtype == torch.float32 else 0.0)
    result = call(*ours)
    with use_backend("reference"):
        expected = call(*exact)
    weight = torch.linspace(0.5, 1.5, expected.numel(), dtype=torch.float64).view(expected.shape)
    found = (result, *torch.autograd.grad((result * weight).sum(), ours))
    wanted = (expected, *torch.autograd.grad((expected * weight).sum(), exact))
    for x, x_exact in zip(found, wanted, strict=True):
        error = (x.double() - x_exact).norm()
        assert error <= promised * x_exact.norm() + 1e-3 * promised, f"{error / x_exact.norm():.1e}"
