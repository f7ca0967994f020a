"""direction_loss and direction_logits on csrc/cuda: allocation, and how the bank's gradient is added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pcmecl_fast.ops.backends.cuda.driver import in_dtype, place
from pcmecl_fast.ops.backends.native import DTYPE, Driver, address


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
        to = _Gradients(source, edited, bank, individual, needs)
        self._module.direction_logits_backward(
            *inputs, grad.data_ptr(), address(to.source), address(to.edited), *to.of_bank()
        )
        return [to.source, to.edited, to.bank()]

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
        loss = divisor = None
        if reduction != "none":
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
        to = _Gradients(source, edited, bank, individual, needs)
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
            address(to.source),
            address(to.edited),
            address(of_scale),
            *to.of_bank(),
        )
        sum_of_scale = None if of_scale is None or scale is None else in_dtype(of_scale.sum(), scale.dtype)
        return [to.source, to.edited, to.bank(), sum_of_scale]


class _Gradients:
    """Where gradients go. The bank's is added up in float32, or bitwise the same in every run in the samples' order."""

    def __init__(self, source: Tensor, edited: Tensor, bank: Tensor, individual: Tensor, needs: Sequence[bool]) -> None:
        self.source = torch.empty_like(source) if needs[0] else None
        self.edited = torch.empty_like(edited) if needs[1] else None
        self._dtype = bank.dtype
        self._sum = self._ordered = self._coefficients = self._first = self._order = None
        if not needs[2]:
            return
        if not torch.are_deterministic_algorithms_enabled():
            self._sum = torch.zeros(bank.shape, dtype=torch.float32, device=bank.device)
            return
        individuals, emotions, _ = bank.shape
        self._ordered = torch.empty_like(bank)
        size = source.shape[0], 2 * emotions + 2
        self._coefficients = torch.empty(size, dtype=torch.float32, device=bank.device)
        ascending, self._order = torch.sort(individual, stable=True)
        self._first = torch.searchsorted(ascending, torch.arange(individuals + 1, device=bank.device))

    def of_bank(self) -> tuple[int, ...]:
        return (
            address(self._sum),
            address(self._coefficients),
            address(self._first),
            address(self._order),
            address(self._ordered),
        )

    def bank(self) -> Tensor | None:
        return self._ordered if self._sum is None else in_dtype(self._sum, self._dtype)


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
