"""Times of every operator on the reference backend, forward and with backward, at the sizes of real training.

    pytest bench --benchmark-only

Where one call would take about a second, individuals are fewer than in training. Before anything is timed, the result
and the gradients have to be finite and agree with the same call in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pcmecl_fast import ops
from pcmecl_fast.ops import PromptTree

D, E = 512, 7  # ViT-B-32's features, MEAD's emotions
NAMES = (2, 2, 2, 2, 2, 2, 2)  # one word and EOS each
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Case:
    """One call: the operator as a function of its floating inputs."""

    call: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    tolerance: float


def direction(batch: int, *, contrast: float = 0.0, logits: bool = False) -> Case:
    random = torch.Generator().manual_seed(0)
    people = 48
    source = torch.randn(batch, D, generator=random)
    edited = source + 0.3 * torch.randn(batch, D, generator=random)
    bank = F.normalize(torch.randn(people, E, D, generator=random), dim=-1)
    individual = torch.randint(people, (batch,), generator=random)
    shown = torch.randint(E, (batch,), generator=random)
    asked = (shown + torch.randint(1, E, (batch,), generator=random)) % E

    def call(source: Tensor, edited: Tensor, bank: Tensor) -> Tensor:
        if logits:
            return ops.direction_logits(source, edited, bank, individual, shown, backend="reference")
        return ops.direction_loss(
            source, edited, bank, individual, shown, asked, contrast=contrast, backend="reference"
        )

    return Case(call, (source, edited, bank), 1e-4)


def correlation(people: int, negatives: str, missing: float = 0.0) -> Case:
    random = torch.Generator().manual_seed(0)
    visual, text = (F.normalize(torch.randn(people, E, D, generator=random), dim=-1) for _ in range(2))
    mask = torch.rand(people, E, generator=random) >= missing if missing else None

    def call(visual: Tensor, text: Tensor) -> Tensor:
        return ops.correlation_loss(visual, text, mask=mask, negatives=negatives, backend="reference")

    return Case(call, (visual, text), 1e-4)


def attention(people: int, tree: PromptTree, heads: int = 8, width: int = 64) -> Case:
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(people, tree.length, 3, heads, width, generator=random)
    return Case(lambda qkv: ops.tree_attention(qkv, tree, backend="reference"), (qkv,), 1e-4)


def frames(count: int, side: int, size: int) -> Case:
    random = torch.Generator().manual_seed(0)
    pictures = torch.rand(count, 3, side, side, generator=random) * 2 - 1
    return Case(lambda x: ops.clip_frames(x, size, MEAN, STD, backend="reference"), (pictures,), 1e-4)


CASES: dict[str, Callable[[], Case]] = {
    "direction_logits B=256": lambda: direction(256, logits=True),
    "direction_loss B=256": lambda: direction(256),
    "direction_loss B=256 contrast": lambda: direction(256, contrast=0.2),
    "direction_loss B=2048": lambda: direction(2048),
    "correlation_loss N=16 all": lambda: correlation(16, "all"),
    "correlation_loss N=16 within": lambda: correlation(16, "within"),
    "correlation_loss N=16 distinct": lambda: correlation(16, "distinct"),
    "correlation_loss N=16 missing": lambda: correlation(16, "all", missing=0.3),
    "correlation_loss N=64 all": lambda: correlation(64, "all"),
    "tree_attention N=16 shared": lambda: attention(16, PromptTree(1 + 8, NAMES)),
    "tree_attention N=4 per-emotion": lambda: attention(4, PromptTree(1, tuple(8 + n for n in NAMES))),
    "tree_attention N=2 192 tokens": lambda: attention(2, PromptTree(5, (3,) * 62)),
    "clip_frames 16x256 to 224": lambda: frames(16, 256, 224),
    "clip_frames 16x64 to 224": lambda: frames(16, 64, 224),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """A case that has been checked against float64."""
    case = CASES[request.param]()
    result, *gradients = run(case.call, *case.inputs)
    exact, *exact_gradients = run(case.call, *(x.double() for x in case.inputs))
    for actual, expected in zip((result, *gradients), (exact, *exact_gradients), strict=True):
        assert actual.isfinite().all()
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < case.tolerance, f"relative error {error:.1e}"
    return case


def run(call: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The result and the gradients of its sum, weighted so that no two elements count alike."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = call(*leaves)
    weight = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype).view(result.shape)
    return (result.detach(), *torch.autograd.grad(result, leaves, weight))


def test_forward(benchmark: Any, case: Case) -> None:
    with torch.no_grad():
        benchmark(case.call, *case.inputs)


def test_forward_and_backward(benchmark: Any, case: Case) -> None:
    leaves = [x.detach().requires_grad_() for x in case.inputs]
    weight = torch.ones_like(case.call(*leaves))
    benchmark(lambda: torch.autograd.grad(case.call(*leaves), leaves, weight))
