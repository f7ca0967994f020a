"""Times of every operator on every backend that runs here, forward and with backward, at the sizes of real training.

    pytest bench --benchmark-only

Where one call would take about a second, individuals are fewer than in training. "compiled" is torch.compile of the
reference. Before anything is timed, the result and the gradients have to be finite and agree with float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.compare import finished
from pcmecl_fast import ops
from pcmecl_fast.ops import PromptTree, backend_status

D, E = 512, 7  # ViT-B-32's features, MEAD's emotions
NAMES = (2, 2, 2, 2, 2, 2, 2)  # one word and EOS each
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton runs on a CPU too, in its interpreter, which is there for tests and says nothing about speed.
RUN_HERE = ("reference", "triton", "cuda") if DEVICE.type == "cuda" else ("reference", "cpu")
SIDES = [*(b.name for b in backend_status() if b.available and b.name in RUN_HERE), "compiled"]


@dataclass
class Case:
    """One call: the operator as a function of its floating inputs, and the backend."""

    call: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    tolerance: float


def direction(batch: int, *, contrast: float = 0.0, logits: bool = False) -> Case:
    random = torch.Generator().manual_seed(0)
    people = 48
    source = torch.randn(batch, D, generator=random)
    edited = source + 0.3 * torch.randn(batch, D, generator=random)
    bank = F.normalize(torch.randn(people, E, D, generator=random), dim=-1)
    individual = torch.randint(people, (batch,), generator=random).to(DEVICE)
    shown = torch.randint(E, (batch,), generator=random).to(DEVICE)
    asked = (shown + torch.randint(1, E, (batch,), generator=random).to(DEVICE)) % E

    def call(source: Tensor, edited: Tensor, bank: Tensor, backend: str) -> Tensor:
        if logits:
            return ops.direction_logits(source, edited, bank, individual, shown, backend=backend)
        return ops.direction_loss(source, edited, bank, individual, shown, asked, contrast=contrast, backend=backend)

    return Case(call, (source, edited, bank), 1e-4)


def correlation(people: int, negatives: str, missing: float = 0.0) -> Case:
    random = torch.Generator().manual_seed(0)
    visual, text = (F.normalize(torch.randn(people, E, D, generator=random), dim=-1) for _ in range(2))
    mask = torch.rand(people, E, generator=random).to(DEVICE) >= missing if missing else None

    def call(visual: Tensor, text: Tensor, backend: str) -> Tensor:
        return ops.correlation_loss(visual, text, mask=mask, negatives=negatives, backend=backend)

    return Case(call, (visual, text), 1e-4)


def attention(people: int, tree: PromptTree, heads: int = 8, width: int = 64) -> Case:
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(people, tree.length, 3, heads, width, generator=random)
    return Case(lambda qkv, backend: ops.tree_attention(qkv, tree, backend=backend), (qkv,), 1e-4)


def frames(count: int, side: int, size: int) -> Case:
    random = torch.Generator().manual_seed(0)
    pictures = torch.rand(count, 3, side, side, generator=random) * 2 - 1
    return Case(lambda x, backend: ops.clip_frames(x, size, MEAN, STD, backend=backend), (pictures,), 1e-4)


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


@pytest.fixture(scope="module", params=[f"{case} | {side}" for case in CASES for side in SIDES])
def case(request: pytest.FixtureRequest) -> Case:
    """A case on a backend, checked against float64."""
    name, side = request.param.split(" | ")
    whole = CASES[name]()
    inputs = tuple(x.to(DEVICE) for x in whole.inputs)
    backend = "reference" if side == "compiled" else side
    call = partial(torch.compile(whole.call, dynamic=False) if side == "compiled" else whole.call, backend=backend)
    try:
        result, *gradients = run(call, *inputs)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    exact, *exact_gradients = run(partial(whole.call, backend="reference"), *(x.double() for x in inputs))
    for actual, expected in zip((result, *gradients), (exact, *exact_gradients), strict=True):
        assert actual.isfinite().all()
        distance = (actual.double() - expected).norm() / expected.norm()
        assert distance < whole.tolerance, f"relative error {distance:.1e}"
    return Case(call, inputs, whole.tolerance)


def run(call: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The result and the gradients of its sum, weighted so that no two elements count alike."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = call(*leaves)
    weight = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype, device=DEVICE).view(result.shape)
    return (result.detach(), *torch.autograd.grad(result, leaves, weight))


def test_forward(benchmark: Any, case: Case, request: pytest.FixtureRequest) -> None:
    benchmark.group = f"{request.node.callspec.params['case'].split(' | ')[0]}, forward"
    with torch.no_grad():
        benchmark(finished(case.call), *case.inputs)


def test_forward_and_backward(benchmark: Any, case: Case, request: pytest.FixtureRequest) -> None:
    benchmark.group = f"{request.node.callspec.params['case'].split(' | ')[0]}, forward and backward"
    leaves = [x.detach().requires_grad_() for x in case.inputs]
    weight = torch.ones_like(case.call(*leaves))
    benchmark(finished(lambda: torch.autograd.grad(case.call(*leaves), leaves, weight)))
