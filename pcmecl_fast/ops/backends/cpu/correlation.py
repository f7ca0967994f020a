"""correlation_loss on csrc/cpu/correlation.cpp: the products with S, tile by tile, and what is kept between them.

A tile of S, in the backward its gradient too, is all that exists of anything larger than the features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pcmecl_fast.ops.backends.native import Driver, address
from pcmecl_fast.ops.no_pairs import gradients_of_nothing, has_pairs, sums_of_nothing
from pcmecl_fast.ops.reference import computing_dtype

FLOAT32_SCALE = 128
"""Up to it float32 holds the sums of exponentials of logits; beyond, float64 does."""
MAX_SCALE = 1000


class Correlation(Driver):
    def correlation_loss(
        self, visual: Tensor, text: Tensor, scale: Tensor | None, scale_number: float, mask: Tensor | None,
        negatives: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The loss, (), and the sums of rows and of columns, (N, Q)."""
        wide = computing_dtype(visual)
        if not has_pairs(visual, text):
            rows, columns, _ = sums_of_nothing(visual, text, 0.0)
            return rows.new_zeros(()), rows, columns
        run = _Run(self._module, visual, text, _number(scale, scale_number), mask, mask, negatives, 0)
        rows, columns = run.sums()
        loss = rows.new_full((), run.native.loss(), dtype=wide)
        # Where float64 stands in for float32 the sums may overflow float32, and their logarithms do not.
        return (loss, rows, columns) if rows.dtype is wide else (loss, rows.log().to(wide), columns.log().to(wide))

    def correlation_loss_backward(
        self, grad: Tensor, visual: Tensor, text: Tensor, scale: Tensor | None, scale_number: float,
        mask: Tensor | None, negatives: str, rows: Tensor, columns: Tensor, needs: Sequence[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        if not has_pairs(visual, text):
            return gradients_of_nothing(visual, text, scale, needs)
        run = _Run(self._module, visual, text, _number(scale, scale_number), mask, mask, negatives, 0)
        if rows.dtype is not run.dtype:
            rows, columns = rows.to(run.dtype).exp(), columns.to(run.dtype).exp()
        of_visual, of_text, of_scale = run.gradients(grad.item(), rows, columns, needs, of_mean=True)
        return [
            None if of_visual is None else of_visual.to(visual.dtype),
            None if of_text is None else of_text.to(text.dtype),
            scale.new_full((), of_scale) if scale is not None and needs[2] else None,
        ]

    def correlation_rectangle_sums(
        self, visual: Tensor, text: Tensor, scale: Tensor | None, scale_number: float, mask: Tensor | None,
        text_mask: Tensor | None, negatives: str, first: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """ln Σ e^l of rows and of columns, (n, Q) and (m, Q), −∞ of nothing, and the rows' positive logits, (n, Q)."""
        wide = computing_dtype(visual)
        if not has_pairs(visual, text):
            return sums_of_nothing(visual, text, -math.inf)
        run = _Run(self._module, visual, text, _number(scale, scale_number), mask, text_mask, negatives, first)
        rows, columns = run.sums()
        positive = torch.empty_like(rows)
        run.native.logarithms(positive.data_ptr())
        return rows.to(wide), columns.to(wide), positive.to(wide)

    def correlation_rectangle_gradients(
        self, weight: Tensor, visual: Tensor, text: Tensor, scale: Tensor | None, scale_number: float,
        mask: Tensor | None, text_mask: Tensor | None, negatives: str, first: int, row_lse: Tensor,
        column_lse: Tensor, needs: Sequence[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        """Of visual, text and scale, in the sums' dtype, which are those of all rectangles."""
        wide = computing_dtype(visual)
        if not has_pairs(visual, text):
            return gradients_of_nothing(visual, text, scale, needs, wide)
        run = _Run(self._module, visual, text, _number(scale, scale_number), mask, text_mask, negatives, first)
        rows, columns = (x.to(run.dtype).contiguous() for x in (row_lse, column_lse))
        of_visual, of_text, of_scale = run.gradients(weight.item(), rows, columns, needs, of_mean=False)
        return [
            None if of_visual is None else of_visual.to(wide),
            None if of_text is None else of_text.to(wide),
            visual.new_full((), of_scale, dtype=wide) if needs[2] else None,
        ]


def _number(scale: Tensor | None, number: float) -> float:
    value = number if scale is None else float(scale.item())
    if value > MAX_SCALE:
        raise ValueError(f"scale: got {value:g}; the cpu backend supports at most {MAX_SCALE}")
    return value


class _Run:
    """One pass over the tiles of S of some individuals' visual features and others' text features."""

    def __init__(
        self, module: ModuleType, visual: Tensor, text: Tensor, scale: float, mask: Tensor | None,
        text_mask: Tensor | None, negatives: str, first: int,
    ) -> None:  # fmt: skip
        double = visual.dtype is torch.float64 or not scale <= FLOAT32_SCALE
        self.dtype = torch.float64 if double else torch.float32
        self.visual, self.text = visual.to(self.dtype), text.to(self.dtype)
        self.masks = mask, text_mask  # kept, as the features are, for whom the compiled part has their addresses
        self.count, self.emotions, self.width = visual.shape
        self.columns, self.within = text.shape[0], negatives == "within"
        self.native: Any = (module.CorrelationFloat64 if double else module.CorrelationFloat32)(
            torch.get_num_threads(), self.count, self.columns, self.emotions, self.width, first, scale,
            negatives == "distinct", self.within,
            self.visual.data_ptr(), self.text.data_ptr(), address(mask), address(text_mask),
        )  # fmt: skip
        self.space = self.visual.new_empty((self.native.forward_numbers,))
        self.centred = self._part(self.space, 0, self.count * self.emotions, self.width)
        self._text_at, self._product_at = self.native.text_at, self.native.product_at
        self._rows, self._lanes = self.native.rows, self.native.lanes

    def sums(self) -> tuple[Tensor, Tensor]:
        """Of 2^(l − K) over rows, (n, Q), and over columns, (m, Q)."""
        pairs = self.emotions * (self.emotions - 1) // 2
        rows, columns = self.visual.new_empty((self.count, pairs)), self.visual.new_empty((self.columns, pairs))
        native = self.native
        native.begin(self.space.data_ptr(), rows.data_ptr(), columns.data_ptr())
        for column, lanes, text in self._tiles():
            if self.within:
                blocks = torch.bmm(*self._own(column, lanes))
                native.forward_within(blocks.data_ptr())
                continue
            for row, centred, product in self._chunks(lanes):
                torch.mm(centred, text.t(), out=product)
                native.forward(row)
        return rows, columns

    def gradients(
        self, weight: float, rows: Tensor, columns: Tensor, needs: Sequence[bool], *, of_mean: bool
    ) -> tuple[Tensor | None, Tensor | None, float]:
        """Of visual, text and scale.

        Args:
            weight: the gradient of the mean over all pairs, or of each pair's loss.
            rows, columns: the sums of all logits, or, of each pair's, their natural logarithms.
            needs: of which of the three; the scale's is there in any case.
            of_mean: which of the two `weight` is.
        """
        native, emotions, width = self.native, self.emotions, self.width
        native.begin(self.space.data_ptr(), 0, 0)
        space = self.space.new_empty((native.backward_numbers,))
        of_visual = torch.empty_like(self.visual) if needs[0] else None
        of_text = torch.empty_like(self.text) if needs[1] else None
        native.begin_backward(
            space.data_ptr(), weight / native.valid_pairs() if of_mean else weight, rows.data_ptr(),
            columns.data_ptr(), not of_mean, address(of_visual), address(of_text),
        )  # fmt: skip
        flat_visual = None if of_visual is None else of_visual.view(self.count * emotions, width)
        for column, lanes, text in self._tiles():
            grad_text = self._part(space, native.grad_text_at, emotions * lanes, width) if needs[1] else None
            if self.within:
                self._differentiate_own(column, lanes, of_visual, grad_text)
            else:
                for row, centred, product in self._chunks(lanes):
                    torch.mm(centred, text.t(), out=product)
                    native.backward(row)
                    grad = self._part(space, native.grad_product_at, product.shape[0], product.shape[1])
                    if flat_visual is not None:
                        of_rows = flat_visual[row * emotions : row * emotions + grad.shape[0]]
                        of_rows.addmm_(grad, text, beta=int(column > 0))
                    if grad_text is not None:
                        grad_text.addmm_(grad.t(), centred, beta=int(row > 0))
            native.finish_tile()
        return of_visual, of_text, native.finish()

    def _differentiate_own(self, column: int, lanes: int, of_visual: Tensor | None, grad_text: Tensor | None) -> None:
        centred, text = self._own(column, lanes)
        blocks = torch.bmm(centred, text)
        grad = torch.empty_like(blocks)
        self.native.backward_within(blocks.data_ptr(), grad.data_ptr())
        count = len(blocks)
        if of_visual is not None:
            torch.bmm(grad, text.transpose(1, 2), out=of_visual[column : column + count])
        if grad_text is not None:
            own = grad_text.view(self.emotions, lanes, self.width)[:, :count].transpose(0, 1)
            own.copy_(torch.bmm(grad.transpose(1, 2), centred))

    def _tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """A tile's first column, its lanes, and its text features, (E·lanes, D), made as it begins."""
        for column in range(0, self.columns, self._lanes):
            lanes = self.native.begin_tile(column)
            yield column, lanes, self._part(self.space, self._text_at, self.emotions * lanes, self.width)

    def _chunks(self, lanes: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The tile's rows: the first individual, visual features, (rows·E, D), and the product, (rows·E, E·lanes)."""
        emotions = self.emotions
        for row in range(0, self.count, self._rows):
            rows = min(self._rows, self.count - row) * emotions
            whole = rows == len(self.centred)
            centred = self.centred if whole else self.centred[row * emotions : row * emotions + rows]
            yield row, centred, self._part(self.space, self._product_at, rows, emotions * lanes)

    def _own(self, column: int, lanes: int) -> tuple[Tensor, Tensor]:
        """The tile's individuals alone: visual features, (columns, E, D), and text features, (columns, D, E)."""
        count = min(self._lanes, self.columns - column)
        centred = self.centred.view(self.count, self.emotions, self.width)[column : column + count]
        text = self._part(self.space, self._text_at, self.emotions * lanes, self.width)
        return centred, text.view(self.emotions, lanes, self.width)[:, :count].permute(1, 2, 0)

    @staticmethod
    def _part(space: Tensor, at: int, rows: int, width: int) -> Tensor:
        return space.as_strided((rows, width), (width, 1), at)
