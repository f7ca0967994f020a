"""direction_logits and direction_loss on csrc/cpu/direction.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pcmecl_fast.ops.backends.native import DTYPE, Driver, address
from pcmecl_fast.ops.reference import computing_dtype

_HALVES = (torch.float16, torch.bfloat16)


class Direction(Driver):
    def direction_logits(
        self, source: Tensor, edited: Tensor, bank: Tensor, individual: Tensor, source_emotion: Tensor,
        normalize: bool, min_change: float,
    ) -> Tensor:  # fmt: skip
        logits = source.new_empty((source.shape[0], bank.shape[1]))
        self._module.direction_logits(
            *_features(source, edited, bank, individual, source_emotion), normalize, min_change, logits.data_ptr()
        )
        return logits

    def direction_logits_backward(
        self, grad: Tensor, source: Tensor, edited: Tensor, bank: Tensor, individual: Tensor, source_emotion: Tensor,
        normalize: bool, min_change: float, needs: Sequence[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        gradients = _of_features(source, edited, bank, needs)
        self._module.direction_logits_backward(
            *_features(source, edited, bank, individual, source_emotion), normalize, min_change,
            grad.data_ptr(), *map(address, gradients),
        )  # fmt: skip
        return gradients

    def direction_loss(
        self, source: Tensor, edited: Tensor, bank: Tensor, individual: Tensor, source_emotion: Tensor,
        target_emotion: Tensor, scale: Tensor | None, scale_number: float, contrast: float, normalize: bool,
        min_change: float, reduction: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The loss, () or (B,), and the number that it is divided by, ()."""
        loss, divisor = _numbers(source), _numbers(source)
        losses = _numbers(source, len(source)) if reduction == "none" else None
        self._module.direction_loss(
            *_features(source, edited, bank, individual, source_emotion), target_emotion.data_ptr(),
            scale_number if scale is None else scale.item(), contrast, normalize, min_change,
            address(losses), loss.data_ptr(), divisor.data_ptr(), reduction == "mean",
        )  # fmt: skip
        return (loss if losses is None else losses), divisor

    def direction_loss_backward(
        self, grad: Tensor, source: Tensor, edited: Tensor, bank: Tensor, individual: Tensor, source_emotion: Tensor,
        target_emotion: Tensor, scale: Tensor | None, scale_number: float, contrast: float, normalize: bool,
        min_change: float, reduction: str, divisor: Tensor, needs: Sequence[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        gradients = _of_features(source, edited, bank, needs)
        of_scale = self._module.direction_loss_backward(
            *_features(source, edited, bank, individual, source_emotion), target_emotion.data_ptr(),
            scale_number if scale is None else scale.item(), contrast, normalize, min_change,
            grad.data_ptr(), int(reduction == "none"), divisor.data_ptr(), *map(address, gradients), needs[3],
        )  # fmt: skip
        gradients.append(scale.new_full((), of_scale) if scale is not None and needs[3] else None)
        return gradients

    def direction_loss_and_gradients(
        self, source: Tensor, edited: Tensor, bank: Tensor, individual: Tensor, source_emotion: Tensor,
        target_emotion: Tensor, scale: Tensor | None, scale_number: float, contrast: float, normalize: bool,
        min_change: float, reduction: str, needs: Sequence[bool],
    ) -> tuple[Tensor, list[Tensor | None]] | None:  # fmt: skip
        """None where gradients of a half type would be rounded twice, or there is more than one loss."""
        halves = source.dtype in _HALVES or (scale is not None and scale.dtype in _HALVES)
        if reduction == "none" or halves:
            return None
        loss, gradients = _numbers(source), _of_features(source, edited, bank, needs)
        of_scale = self._module.direction_loss_and_gradients(
            *_features(source, edited, bank, individual, source_emotion), target_emotion.data_ptr(),
            scale_number if scale is None else scale.item(), contrast, normalize, min_change,
            loss.data_ptr(), reduction == "mean", *map(address, gradients), needs[3],
        )  # fmt: skip
        gradients.append(scale.new_full((), of_scale) if scale is not None and needs[3] else None)
        return loss, gradients


def _features(source: Tensor, edited: Tensor, bank: Tensor, individual: Tensor, source_emotion: Tensor) -> list[int]:
    """What every call begins with: threads, dtype, B, N, E, D, and where the tensors are."""
    return [
        torch.get_num_threads(), DTYPE[source.dtype], source.shape[0], *bank.shape,
        source.data_ptr(), edited.data_ptr(), bank.data_ptr(), individual.data_ptr(), source_emotion.data_ptr(),
    ]  # fmt: skip


def _of_features(source: Tensor, edited: Tensor, bank: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """Room for the gradients of source, edited and bank."""
    return [torch.empty_like(x) if need else None for x, need in zip((source, edited, bank), needs)]  # noqa: B905


def _numbers(source: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=computing_dtype(source))
