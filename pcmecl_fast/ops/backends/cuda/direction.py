"""direction_loss and direction_logits on csrc/cuda: allocation, and how the bank's gradient is added up."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor

from pcmecl_fast.ops.backends.cuda.driver import in_dtype, multiprocessors, place
from pcmecl_fast.ops.backends.native import DTYPE, Driver, address

WARP = 32
STRETCH = 1024  # samples that a warp counts, if there are not too many individuals
COUNTS = 1 << 20  # at most
RUNS, LEAST_RUN = 4, 8  # runs for each multiprocessor, which holds that many blocks; samples in one


class Direction(Driver):
    def direction_logits(
        self,
        source: Tensor,  # (B, D)
        edited: Tensor,  # (B, D)
        bank: Tensor,  # (N, E, D)
        individual: Tensor,  # (B,)
        source_emotion: Tensor,  # (B,)
        normalize: bool,
        min_change: float,
    ) -> Tensor:  # (B, E)
        logits = torch.empty((source.shape[0], bank.shape[1]), dtype=source.dtype, device=source.device)
        inputs = _inputs(source, edited, bank, individual, source_emotion, normalize, min_change)
        self._module.direction_logits(*inputs, logits.data_ptr())
        return logits

    def direction_logits_backward(
        self,
        grad: Tensor,  # (B, E)
        source: Tensor,  # (B, D)
        edited: Tensor,  # (B, D)
        bank: Tensor,  # (N, E, D)
        individual: Tensor,  # (B,)
        source_emotion: Tensor,  # (B,)
        normalize: bool,
        min_change: float,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        inputs = _inputs(source, edited, bank, individual, source_emotion, normalize, min_change)
        to = _Gradients(source, edited, bank, needs)
        self._module.direction_logits_backward(*inputs, grad.data_ptr(), *to.arguments())
        return [to.source, to.edited, to.bank]

    def direction_loss(
        self,
        source: Tensor,  # (B, D)
        edited: Tensor,  # (B, D)
        bank: Tensor,  # (N, E, D)
        individual: Tensor,  # (B,)
        source_emotion: Tensor,  # (B,)
        target_emotion: Tensor,  # (B,)
        scale: Tensor | None,  # ()
        scale_number: float,
        contrast: float,
        normalize: bool,
        min_change: float,
        reduction: str,
    ) -> tuple[Tensor, Tensor]:  # () or (B,), and what it was divided by, ()
        device = source.device
        losses = torch.empty(source.shape[:1], dtype=torch.float32, device=device)
        loss = divisor = parts = None
        if reduction != "none":
            count = 2 * self._module.direction_reduce_parts(source.shape[0])
            parts = torch.empty(count, dtype=torch.float32, device=device)
            loss = torch.empty((), dtype=torch.float32, device=device)
            divisor = torch.empty((), dtype=torch.float32, device=device)
        if scale is not None:
            scale = in_dtype(scale, torch.float32)
        self._module.direction_loss(
            *_inputs(source, edited, bank, individual, source_emotion, normalize, min_change),
            target_emotion.data_ptr(),
            address(scale),
            scale_number,
            contrast,
            losses.data_ptr(),
            reduction == "mean",
            address(parts),
            address(loss),
            address(divisor),
        )
        if loss is None or divisor is None:
            return losses, torch.ones((), dtype=torch.float32, device=device)
        return loss, divisor

    def direction_loss_backward(
        self,
        grad: Tensor,  # () or (B,)
        source: Tensor,  # (B, D)
        edited: Tensor,  # (B, D)
        bank: Tensor,  # (N, E, D)
        individual: Tensor,  # (B,)
        source_emotion: Tensor,  # (B,)
        target_emotion: Tensor,  # (B,)
        scale: Tensor | None,  # ()
        scale_number: float,
        contrast: float,
        normalize: bool,
        min_change: float,
        reduction: str,
        divisor: Tensor,  # ()
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        inputs = _inputs(source, edited, bank, individual, source_emotion, normalize, min_change)
        to = _Gradients(source, edited, bank, needs)
        of_scale = torch.empty(source.shape[:1], dtype=torch.float32, device=source.device) if needs[3] else None
        wide_scale = None if scale is None else in_dtype(scale, torch.float32)
        self._module.direction_loss_backward(
            *inputs,
            target_emotion.data_ptr(),
            address(wide_scale),
            scale_number,
            contrast,
            grad.data_ptr(),
            1 if reduction == "none" else 0,
            divisor.data_ptr(),
            address(of_scale),
            *to.arguments(),
        )
        sum_of_scale = None if of_scale is None or scale is None else in_dtype(of_scale.sum(), scale.dtype)
        return [to.source, to.edited, to.bank, sum_of_scale]


class _Gradients:
    """Where gradients go, and what the bank's takes on the way (csrc/cuda/direction_bank.cu)."""

    def __init__(self, source: Tensor, edited: Tensor, bank: Tensor, needs: Sequence[bool]) -> None:
        self.source = torch.empty_like(source) if needs[0] else None
        self.edited = torch.empty_like(edited) if needs[1] else None
        self.bank = self._integers = self._coefficients = self._sums = None
        self._sizes = self._starts = (0, 0, 0)
        if not needs[2]:
            return
        samples, (individuals, emotions, width) = source.shape[0], bank.shape
        run = max(ceil(samples / (RUNS * multiprocessors(source))), LEAST_RUN)
        stretches = max(min(ceil(samples / STRETCH), COUNTS // max(individuals, 1)), 1)
        stretch = max(ceil(samples / stretches / WARP), 1) * WARP
        stretches = max(ceil(samples / stretch), 1)
        counts = individuals * stretches
        new = partial(torch.empty, device=bank.device)
        self.bank = torch.empty_like(bank)
        self._sizes = stretches, stretch, run
        self._integers = new(counts + individuals + 1 + samples, dtype=torch.int32)
        self._starts = 0, counts, counts + individuals + 1
        self._coefficients = new((samples, 2 * emotions + 3), dtype=torch.float32)
        self._sums = new((ceil(samples / run) + individuals, emotions, width), dtype=torch.float32)

    def arguments(self) -> tuple[int, ...]:
        integers = address(self._integers)
        return (
            address(self.source),
            address(self.edited),
            *self._sizes,
            *(integers + 4 * start for start in self._starts),
            address(self._coefficients),
            address(self._sums),
            address(self.bank),
        )


def _inputs(
    source: Tensor,
    edited: Tensor,
    bank: Tensor,
    individual: Tensor,
    source_emotion: Tensor,
    normalize: bool,
    min_change: float,
) -> tuple[Any, ...]:
    samples, width = source.shape
    individuals, emotions, _ = bank.shape
    return (
        *place(source),
        DTYPE[source.dtype],
        samples,
        width,
        individuals,
        emotions,
        source.data_ptr(),
        edited.data_ptr(),
        bank.data_ptr(),
        individual.data_ptr(),
        source_emotion.data_ptr(),
        normalize,
        min_change,
    )
