"""direction_logits and direction_loss on csrc/cpu/direction.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pcmecl_fast.ops.backends.native import DTYPE, Driver


def _computing(x: Tensor) -> torch.dtype:
    """In which dtype a tensor is computed with."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


class Direction(Driver):
    def direction_logits(
        self, source: Tensor, edited: Tensor, bank: Tensor, individual: Tensor, source_emotion: Tensor,
        normalize: bool, min_change: float,
    ) -> Tensor:  # fmt: skip
        logits = source.new_empty((source.shape[0], bank.shape[1]))
        self._module.direction_forward(
            *_call(source, edited, bank, individual, source_emotion), 0, 1.0, 0.0, normalize, min_change,
            logits.data_ptr(), 0, 0, 0, False,
        )  # fmt: skip
        return logits

    def direction_logits_backward(
        self, grad: Tensor, source: Tensor, edited: Tensor, bank: Tensor, individual: Tensor, source_emotion: Tensor,
        normalize: bool, min_change: float, needs: Sequence[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        gradients = _of_features(source, edited, bank, needs)
        sums, longest = _runs(source, bank) if needs[2] else (None, 0)
        self._module.direction_backward(
            *_call(source, edited, bank, individual, source_emotion), 0, 1.0, 0.0, normalize, min_change,
            grad.data_ptr(), 0, 0, *[0 if x is None else x.data_ptr() for x in gradients], 0,
            0 if sums is None else sums.data_ptr(), longest,
        )  # fmt: skip
        return gradients

    def direction_loss(
        self, source: Tensor, edited: Tensor, bank: Tensor, individual: Tensor, source_emotion: Tensor,
        target_emotion: Tensor, scale: Tensor | None, scale_number: float, contrast: float, normalize: bool,
        min_change: float, reduction: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The loss, () or (B,), and the number that it is divided by, ()."""
        losses = _losses_like(source)
        loss, divisor = losses.new_empty(()), losses.new_empty(())
        self._module.direction_forward(
            *_call(source, edited, bank, individual, source_emotion), target_emotion.data_ptr(),
            scale_number if scale is None else scale.item(), contrast, normalize, min_change,
            0, losses.data_ptr(), loss.data_ptr(), divisor.data_ptr(), reduction == "mean",
        )  # fmt: skip
        return (losses if reduction == "none" else loss), divisor

    def direction_loss_backward(
        self, grad: Tensor, source: Tensor, edited: Tensor, bank: Tensor, individual: Tensor, source_emotion: Tensor,
        target_emotion: Tensor, scale: Tensor | None, scale_number: float, contrast: float, normalize: bool,
        min_change: float, reduction: str, divisor: Tensor, needs: Sequence[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        gradients = _of_features(source, edited, bank, needs)
        sums, longest = _runs(source, bank) if needs[2] else (None, 0)
        of_samples = _losses_like(source) if needs[3] else None
        of_scale = self._module.direction_backward(
            *_call(source, edited, bank, individual, source_emotion), target_emotion.data_ptr(),
            scale_number if scale is None else scale.item(), contrast, normalize, min_change,
            grad.data_ptr(), int(reduction == "none"), divisor.data_ptr(),
            *[0 if x is None else x.data_ptr() for x in gradients], 0 if of_samples is None else of_samples.data_ptr(),
            0 if sums is None else sums.data_ptr(), longest,
        )  # fmt: skip
        gradients.append(scale.new_full((), of_scale) if scale is not None and needs[3] else None)
        return gradients


def _losses_like(source: Tensor) -> Tensor:
    return source.new_empty((source.shape[0],), dtype=_computing(source))


def _call(source: Tensor, edited: Tensor, bank: Tensor, individual: Tensor, source_emotion: Tensor) -> tuple[int, ...]:
    """What every call begins with: threads, dtype, B, N, E, D, and where the tensors are."""
    return (
        torch.get_num_threads(), DTYPE[source.dtype], source.shape[0], *bank.shape,
        source.data_ptr(), edited.data_ptr(), bank.data_ptr(), individual.data_ptr(), source_emotion.data_ptr(),
    )  # fmt: skip


def _of_features(source: Tensor, edited: Tensor, bank: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """Room for the gradients of source, edited and bank."""
    return [torch.empty_like(x) if need else None for x, need in zip((source, edited, bank), needs)]  # noqa: B905


def _runs(source: Tensor, bank: Tensor) -> tuple[Tensor, int]:
    """Room for the gradients of runs, ranges of samples of one individual, and the longest of them."""
    individuals, emotions, width = bank.shape
    # So long that the runs' gradients need at most an eighth of the features' gradient, beside one for each individual:
    # n samples are at most 1 + n / longest runs.
    longest = max(64, 8 * emotions)
    samples = source.shape[0]
    runs = min(samples, individuals + samples // longest)
    return bank.new_empty((runs * emotions * width,), dtype=_computing(bank)), longest
