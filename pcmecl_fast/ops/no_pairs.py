"""correlation_loss where no pair of emotions meets another: of nobody, or with a single emotion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pcmecl_fast.ops.reference import computing_dtype


def has_pairs(visual: Tensor, text: Tensor) -> bool:
    return visual.shape[0] > 0 and text.shape[0] > 0 and visual.shape[1] > 1


def sums_of_nothing(visual: Tensor, text: Tensor, value: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows, (n, Q), and of columns, (m, Q), and the positives, 0."""
    emotions = visual.shape[1]
    pairs, wide = emotions * (emotions - 1) // 2, computing_dtype(visual)
    row, column = (x.new_full((x.shape[0], pairs), value, dtype=wide) for x in (visual, text))
    return row, column, torch.zeros_like(row)


def gradients_of_nothing(
    visual: Tensor, text: Tensor, scale: Tensor | None, needs: Sequence[bool], dtype: torch.dtype | None = None
) -> list[Tensor | None]:
    """Zeros, in a dtype or each in its own."""
    return [
        torch.zeros_like(x, dtype=dtype) if need and x is not None else None
        for x, need in zip((visual, text, scale), needs, strict=True)
    ]
