"""Comparisons of the fused operators: the reference run eagerly and through torch.compile against the compiled backend.

The plain sides are the reference that the tests compare with, so that the two cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.compare import Comparison, Side, comparison
from pcmecl_fast import ops

D, E = 512, 7  # ViT-B-32's features, MEAD's emotions
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SOURCES = ("pcmecl_fast/ops/*.py", "csrc/**/*", "kernels/*.py")


@comparison(
    "direction_loss",
    "256 edits (65,536 on a GPU) against a bank of 48 people × 7 emotions, every gradient",
    sources=SOURCES,
    targets={"cpu": {"eager": 25, "torch.compile": 2}, "cuda": {"eager": 8, "torch.compile": 2}},
)
def direction_loss(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _direction(256 if device.type == "cpu" else 65536, device, dtype)


@comparison(
    "direction_loss_edited",
    "the same as stage 2 runs it: the gradient of the edited frames' features alone",
    sources=SOURCES,
    targets={"cpu": {"torch.compile": 2}, "cuda": {"torch.compile": 2}},
)
def direction_loss_edited(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _direction(256 if device.type == "cpu" else 65536, device, dtype, edited_alone=True)


@comparison(
    "direction_loss_bandwidth", "2,048 edits, every gradient: beside the time of moving the bytes", sources=SOURCES
)
def direction_loss_bandwidth(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _direction(2048 if device.type == "cpu" else 65536, device, dtype)


@comparison(
    "correlation_loss",
    "every change against every change of 128 individuals (512 on a GPU), with backward",
    sources=SOURCES,
    targets={"cpu": {"eager": 20, "torch.compile": 12}, "cuda": {"eager": 30, "torch.compile": 10}},
)
def correlation_loss(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _correlation(128 if device.type == "cpu" else 512, device, dtype, plain=True)


@comparison(
    "correlation_loss_memory",
    "512 individuals, 4.6e8 logits: peak memory beside the inputs, at most 64 MB",
    sources=SOURCES,
)
def correlation_loss_memory(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _correlation(512, device, dtype, plain=device.type == "cuda")


@comparison(
    "clip_frames",
    "16 frames of 256 × 256 to 224 × 224, bicubic and antialiased, with backward",
    sources=SOURCES,
    targets={"cpu": {"eager": 1.5}, "cuda": {"eager": 3}},
)
def clip_frames(device: torch.device, dtype: torch.dtype) -> Comparison:
    random = torch.Generator().manual_seed(0)
    frames = (torch.rand(16, 3, 256, 256, generator=random) * 2 - 1).to(device, dtype)
    weight = torch.randn(16, 3, 224, 224, generator=random).to(device, dtype)
    call = partial(ops.clip_frames, size=224, mean=MEAN, std=STD)
    return Comparison(_sides(call, [frames], weight), moved=2.0 * (frames.nbytes + weight.nbytes))


def _direction(batch: int, device: torch.device, dtype: torch.dtype, *, edited_alone: bool = False) -> Comparison:
    random = torch.Generator().manual_seed(0)
    people = 48
    source = torch.randn(batch, D, generator=random)
    edited = source + 0.3 * torch.randn(batch, D, generator=random)
    bank = F.normalize(torch.randn(people, E, D, generator=random), dim=-1)
    shown = torch.randint(E, (batch,), generator=random)
    asked = (shown + torch.randint(1, E, (batch,), generator=random)) % E
    indices = [x.to(device) for x in (torch.randint(people, (batch,), generator=random), shown, asked)]
    source, edited, bank = (x.to(device, dtype) for x in (source, edited, bank))

    def call(edited: Tensor, source: Tensor = source, bank: Tensor = bank, **choice: Any) -> Tensor:
        return ops.direction_loss(source, edited, bank, *indices, **choice)

    # The features and the bank are read forward and backward, and their gradients written.
    moved = 2 * (source.nbytes + edited.nbytes + bank.nbytes) + edited.nbytes
    if edited_alone:
        return Comparison(_sides(call, [edited]), moved=float(moved))
    return Comparison(_sides(call, [edited, source, bank]), moved=float(moved + source.nbytes + bank.nbytes))


def _correlation(individuals: int, device: torch.device, dtype: torch.dtype, *, plain: bool) -> Comparison:
    random = torch.Generator().manual_seed(0)
    visual, text = (
        F.normalize(torch.randn(individuals, E, D, generator=random), dim=-1).to(device, dtype) for _ in range(2)
    )
    sides = _sides(ops.correlation_loss, [visual, text])
    if not plain:
        why = "its copies of the logits exceed the machine's memory"
        return Comparison(sides[-1:], skipped=dict.fromkeys(("eager", "torch.compile"), why))
    # Forward one product of V and T, backward the same again and one for each gradient.
    return Comparison(sides, operations=4 * 2.0 * (individuals * E) ** 2 * D)


def _sides(call: Callable[..., Tensor], inputs: Sequence[Tensor], weight: Tensor | None = None) -> list[Side]:
    """The reference, the reference compiled, and what `auto` takes."""
    compiled = torch.compile(call, fullgraph=True, dynamic=False)

    def run(function: Callable[..., Tensor], backend: str) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        result = function(*leaves, backend=backend)
        return [result, *torch.autograd.grad(result, leaves, weight)]

    return [
        Side("eager", partial(run, call, "reference")),
        Side("torch.compile", partial(run, compiled, "reference")),
        Side("fused", partial(run, call, "auto")),
    ]
