"""What a call costs besides arithmetic: every operator, forward and backward, where a kernel has nothing to do.

    python -m bench.compare --host

Checks, the choice of a backend, PyTorch's dispatcher, autograd and allocations are what is left: the time below which
no kernel can bring a call. One core and no garbage collection, which would hit some calls and not others.

`tree_attention` has no kernel of its own on a CPU. Its side there is csrc/cuda, compiled with the host harness of the
tests and given no tree at all: the Python and C++ of the backend "cuda" run whole, and every grid is empty, so nothing
is launched. What the CUDA driver takes for a launch is not in it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench import rehearsal
from bench.cases import SHARED, SOURCES, Case, attention, correlation, direction, frames
from bench.compare import Comparison, Side, backend_sides, comparison, those_that_run
from pcmecl_fast.ops.backends.cuda import add_kernels
from pcmecl_fast.ops.operator import BACKENDS, Backend

HARNESS = "csrc/cuda, no launches"


@comparison("host_direction_logits", "a call with 4 edits of 16 features, every gradient", sources=SOURCES, host=True)
def host_direction_logits(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _compared(direction(4, device, dtype, people=2, width=16, logits=True), device)


@comparison("host_direction_loss", "a call with 4 edits of 16 features, every gradient", sources=SOURCES, host=True)
def host_direction_loss(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _compared(direction(4, device, dtype, people=2, width=16), device)


@comparison(
    "host_correlation_loss", "a call with 2 individuals of 2 emotions × 16 features", sources=SOURCES, host=True
)
def host_correlation_loss(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _compared(correlation(2, device, dtype, emotions=2, width=16), device)


@comparison("host_tree_attention", "a call with one tree (a CPU: none) of 1 head of 8", sources=SOURCES, host=True)
def host_tree_attention(device: torch.device, dtype: torch.dtype) -> Comparison:
    on_gpu = rehearsal.as_on_gpu(device)
    case = attention(1 if on_gpu else 0, device, dtype, tree=SHARED, heads=1, width=8)
    if on_gpu:
        return _compared(case, device)
    harness = importlib.import_module("tests.cuda_on_host")
    run = _call(case)
    eager = Side("eager", partial(run, "reference"))
    if harness.compiler() is None:
        return Comparison([eager], skipped={HARNESS: "needs a C++ compiler and the sources"})
    backend = Backend("cuda", missing=lambda: None)
    add_kernels(backend, harness.load(), device="cpu")
    return Comparison([eager, Side(HARNESS, _as_cuda(backend, partial(run, "auto")))])


@comparison("host_clip_frames", "a call with 1 frame of 8 × 8 to 4 × 4", sources=SOURCES, host=True)
def host_clip_frames(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _compared(frames(1, device, dtype, side=8, size=4), device)


def _compared(case: Case, device: torch.device) -> Comparison:
    run = _call(case)
    backends, skipped = those_that_run(backend_sides(run, device, case.operator))
    eager, fused = Side("eager", partial(run, "reference")), Side("fused", partial(run, "auto"))
    return Comparison([eager, *backends, fused], skipped=skipped)


def _call(case: Case) -> Callable[[str], list[Tensor]]:
    """The call alone: as `Case.run`, but of leaves that are there already, as parameters and features are."""
    leaves = [x.detach().requires_grad_() for x in case.inputs]

    def run(backend: str) -> list[Tensor]:
        result = case.call(*leaves, backend=backend)
        return [result, *torch.autograd.grad(result, leaves, case.weight)]

    return run


def _as_cuda(backend: Backend, run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """`run` while this backend stands for "cuda"."""

    def replaced() -> list[Tensor]:
        installed, BACKENDS["cuda"] = BACKENDS["cuda"], backend
        try:
            return run()
        finally:
            BACKENDS["cuda"] = installed

    return replaced
