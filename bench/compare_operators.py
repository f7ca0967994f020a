"""Comparisons of the fused operators: the reference, eager and through torch.compile, against the fastest backend.

On a GPU every backend that has kernels for the operator is a side, too.
"""

from __future__ import annotations

from functools import partial

import torch

from bench.cases import CASES, NOT_BY_THE_REFERENCE, SOURCES
from bench.compare import Comparison, Side, backend_sides, comparison, those_that_run


@comparison(
    "direction_loss",
    "256 edits (65,536 on a GPU) against a bank of 48 people × 7 emotions, every gradient",
    sources=SOURCES,
    targets={"cpu": {"eager": 25, "torch.compile": 2}, "cuda": {"eager": 8, "torch.compile": 2}},
)
def direction_loss(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _compared("direction_loss", device, dtype)


@comparison(
    "direction_logits",
    "the cosines of 256 edits (65,536 on a GPU) with every change of emotion, every gradient",
    sources=SOURCES,
)
def direction_logits(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _compared("direction_logits", device, dtype)


@comparison(
    "direction_loss_edited",
    "the same as stage 2 runs it: the gradient of the edited frames' features alone",
    sources=SOURCES,
    targets={"cpu": {"torch.compile": 2}, "cuda": {"torch.compile": 2}},
)
def direction_loss_edited(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _compared("direction_loss_edited", device, dtype)


@comparison(
    "direction_loss_bandwidth", "2,048 edits, every gradient: beside the time of moving the bytes", sources=SOURCES
)
def direction_loss_bandwidth(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _compared("direction_loss_bandwidth", device, dtype)


@comparison(
    "correlation_loss",
    "every change against every change of 128 individuals (512 on a GPU), with backward",
    sources=SOURCES,
    targets={"cpu": {"eager": 20, "torch.compile": 12}, "cuda": {"eager": 30, "torch.compile": 10}},
)
def correlation_loss(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _compared("correlation_loss", device, dtype)


@comparison(
    "correlation_loss_memory",
    "512 individuals, 4.6e8 logits: peak memory beside the inputs, at most 64 MB",
    sources=SOURCES,
)
def correlation_loss_memory(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _compared("correlation_loss_memory", device, dtype)


@comparison(
    "clip_frames",
    "16 frames of 256 × 256 to 224 × 224, bicubic and antialiased, with backward",
    sources=SOURCES,
    targets={"cpu": {"eager": 1.5}, "cuda": {"eager": 3}},
)
def clip_frames(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _compared("clip_frames", device, dtype)


def _compared(name: str, device: torch.device, dtype: torch.dtype) -> Comparison:
    """The reference, the compiled reference, and what `auto` chooses; only the last if the others do not fit."""
    case = CASES[name].on(device, dtype)
    fused = Side("fused", partial(case.run, "auto"))
    backends, skipped = those_that_run(backend_sides(case.run, device, case.operator))
    if name in NOT_BY_THE_REFERENCE[device.type]:
        why = "its copies of the logits exceed the machine's memory"
        return Comparison([*backends, fused], skipped=dict.fromkeys(("eager", "torch.compile"), why) | skipped)
    plain = [
        Side("eager", partial(case.run, "reference")),
        Side("torch.compile", partial(case.compiled().run, "reference")),
    ]
    sides = [*plain, *backends, fused]
    return Comparison(sides, moved=case.moved, operations=case.operations, skipped=skipped)
