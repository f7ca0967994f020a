"""correlation_loss on csrc/cuda, and rectangles of its logits, of which a group of processes makes the whole.

The products with S in chunks of individuals, and what is kept between them. A chunk of S, in the backward its gradient
too, is all that exists of anything larger than the features: memory grows with the individuals, time with their square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from pcmecl_fast.ops.backends.cuda.driver import in_dtype, multiprocessors, place
from pcmecl_fast.ops.backends.cuda.products import exact_products
from pcmecl_fast.ops.backends.native import DTYPE, Driver, address
from pcmecl_fast.ops.no_pairs import gradients_of_nothing, has_pairs, sums_of_nothing

CHUNK = {"cuda": 4 << 20, "cpu": 1 << 12}
"""Numbers of S at once, at most: 16 MB; on the host harness few, so that a test has several chunks."""


class Correlation(Driver):
    def correlation_loss(
        self,
        visual: Tensor,  # (N, E, D)
        text: Tensor,  # (N, E, D)
        scale: Tensor | None,  # ()
        scale_number: float,
        mask: Tensor | None,  # (N, E) bool
        negatives: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # (), and the sums of rows and columns, both (N, Q)
        if not has_pairs(visual, text):
            row_sum, column_sum, _ = sums_of_nothing(visual, text, 0.0)
            return torch.zeros((), dtype=torch.float32, device=visual.device), row_sum, column_sum
        run = _Run(self._module, visual, text, scale, scale_number, mask, mask, negatives, 0)
        row_sum, column_sum = run.sums()
        return run.loss(row_sum, column_sum), row_sum, column_sum

    def correlation_loss_backward(
        self,
        grad: Tensor,  # ()
        visual: Tensor,  # (N, E, D)
        text: Tensor,  # (N, E, D)
        scale: Tensor | None,  # ()
        scale_number: float,
        mask: Tensor | None,  # (N, E) bool
        negatives: str,
        row_sum: Tensor,  # (N, Q)
        column_sum: Tensor,  # (N, Q)
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        if not has_pairs(visual, text):
            return gradients_of_nothing(visual, text, scale, needs)
        run = _Run(self._module, visual, text, scale, scale_number, mask, mask, negatives, 0)
        gradients = run.backward(grad, True, visual.dtype, row_sum, column_sum, needs)
        if scale is not None and gradients[2] is not None:
            gradients[2] = in_dtype(gradients[2], scale.dtype)
        return gradients

    def correlation_rectangle_sums(
        self,
        visual: Tensor,  # (n, E, D)
        text: Tensor,  # (m, E, D)
        scale: Tensor | None,  # ()
        scale_number: float,
        mask: Tensor | None,  # (n, E) bool
        text_mask: Tensor | None,  # (m, E) bool
        negatives: str,
        first: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # logarithms (n, Q) and (m, Q), positives (n, Q)
        if not has_pairs(visual, text):
            return sums_of_nothing(visual, text, -math.inf)
        run = _Run(self._module, visual, text, scale, scale_number, mask, text_mask, negatives, first)
        row_sum, column_sum = run.sums()
        row_lse, column_lse = torch.empty_like(row_sum), torch.empty_like(column_sum)
        positive = torch.empty_like(row_sum)
        run.convert(row_sum, column_sum, row_lse, column_lse, positive)
        return row_lse, column_lse, positive

    def correlation_rectangle_gradients(
        self,
        weight: Tensor,  # ()
        visual: Tensor,  # (n, E, D)
        text: Tensor,  # (m, E, D)
        scale: Tensor | None,  # ()
        scale_number: float,
        mask: Tensor | None,  # (n, E) bool
        text_mask: Tensor | None,  # (m, E) bool
        negatives: str,
        first: int,
        row_lse: Tensor,  # (n, Q)
        column_lse: Tensor,  # (m, Q)
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        if not has_pairs(visual, text):
            return tuple(gradients_of_nothing(visual, text, scale, needs, torch.float32))
        run = _Run(self._module, visual, text, scale, scale_number, mask, text_mask, negatives, first)
        row_lse, column_lse = row_lse.contiguous(), column_lse.contiguous()
        row_sum, column_sum = torch.empty_like(row_lse), torch.empty_like(column_lse)
        run.convert(row_sum, column_sum, row_lse, column_lse, None)
        return tuple(run.backward(weight, False, torch.float32, row_sum, column_sum, needs))


class _Run:
    """A call: what is made of the features first, and the steps from there.

    Attributes:
        sizes: individuals of the rows n, of the columns m, emotions E, features D, pairs of emotions Q.
        centred: the rows' features less each individual's mean, (n·E, D) in the order (individual, emotion).
        text: the columns', (E·m, D) in the order (emotion, individual).
    """

    def __init__(
        self,
        module: ModuleType,
        visual: Tensor,
        text: Tensor,
        scale: Tensor | None,
        scale_number: float,
        mask: Tensor | None,
        text_mask: Tensor | None,
        negatives: str,
        first: int,
    ) -> None:
        n, emotions, width = visual.shape
        m, pairs = text.shape[0], emotions * (emotions - 1) // 2
        self.sizes = n, m, emotions, width, pairs
        self.device, self.first, self.negatives = visual.device, first, negatives
        assert negatives != "within" or (n == m and first == 0)
        self.scale = None if scale is None else in_dtype(scale, torch.float32)
        self.centred = torch.empty((n * emotions, width), dtype=torch.float32, device=visual.device)
        self._new = self.centred.new_empty  # which takes half the time
        self.text = self._new(emotions * m, width)
        inv_norm_visual, inv_norm_text = self._new(n, pairs), self._new(pairs, m)
        self.cosine = torch.empty_like(inv_norm_visual)
        self._kept = inv_norm_visual, inv_norm_text  # while kernels have their addresses
        self._inv_norms = inv_norm_visual.data_ptr(), inv_norm_text.data_ptr()
        self._scale = address(self.scale), scale_number
        self._place = place(visual)
        self._module = module
        module.correlation_prepare(
            *self._place,
            DTYPE[visual.dtype],
            n,
            m,
            first,
            width,
            emotions,
            visual.data_ptr(),
            text.data_ptr(),
            address(mask),
            address(text_mask),
            self.centred.data_ptr(),
            self.text.data_ptr(),
            *self._inv_norms,
            self.cosine.data_ptr(),
        )

    def sums(self) -> tuple[Tensor, Tensor]:
        """Sums of 2^(l − K) over rows and columns, (n, Q) and (m, Q)."""
        n, m, emotions, _, pairs = self.sizes
        row_sum = self._new(n, pairs)
        if self.negatives == "within":
            column_sum = self._new(m, pairs)
            product = self._own_product()
            self._module.correlation_within(
                *self._place, n, emotions, *self._scale, *self._inv_norms,
                product.data_ptr(), row_sum.data_ptr(), column_sum.data_ptr(),
            )  # fmt: skip
            return row_sum, column_sum
        columns = self._new(pairs, m)

        def add_up(chunk: tuple[int | float, ...], rows: slice, product: Tensor) -> None:
            self._module.correlation_chunk(*chunk)

        _, resident, _, _ = self._module.correlation_plan_of(emotions)
        self._over_chunks(add_up, self._rows_at_once(resident), row_sum, columns)
        return row_sum, columns.t().contiguous()

    def loss(self, row_sum: Tensor, column_sum: Tensor) -> Tensor:  # ()
        n, _, emotions, _, _ = self.sizes
        loss = self._new(())
        self._module.correlation_end(
            *self._place, n, emotions, *self._scale, self._inv_norms[0],
            self.cosine.data_ptr(), row_sum.data_ptr(), column_sum.data_ptr(), loss.data_ptr(),
        )  # fmt: skip
        return loss

    def convert(
        self, row_sum: Tensor, column_sum: Tensor, row_lse: Tensor, column_lse: Tensor, positive: Tensor | None
    ) -> None:
        """Sums to their logarithms and the positives' logits; without `positive` back."""
        self._module.correlation_convert(
            *self._place, row_sum.numel(), column_sum.numel(), *self._scale, self.cosine.data_ptr(),
            row_sum.data_ptr(), column_sum.data_ptr(), row_lse.data_ptr(), column_lse.data_ptr(), address(positive),
        )  # fmt: skip

    def backward(
        self,
        grad: Tensor,  # ()
        of_mean: bool,
        dtype: torch.dtype,
        row_sum: Tensor,  # (n, Q)
        column_sum: Tensor,  # (m, Q)
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients of visual and text, in `dtype`, and of scale; `grad` is of everybody's mean or of each pair.

        Sums are of all logits of the rows and of the columns, inside this rectangle or not.
        """
        n, m, emotions, width, pairs = self.sizes
        row_grad_dot, column_grad_dot = self._new(n, pairs), self._new(pairs, m)
        through = self._through_own if self.negatives == "within" else self._through_chunks
        through_visual, through_text = through(row_grad_dot, column_grad_dot, row_sum, column_sum, needs)
        valid_pairs = self._new(()) if of_mean else None
        of_visual = torch.empty((n, emotions, width), dtype=dtype, device=self.device) if needs[0] else None
        of_text = torch.empty((m, emotions, width), dtype=dtype, device=self.device) if needs[1] else None
        self._module.correlation_end_backward(
            *self._place,
            DTYPE[dtype],
            n,
            m,
            self.first,
            width,
            emotions,
            *self._scale,
            grad.data_ptr(),
            address(valid_pairs),
            self.centred.data_ptr(),
            self.text.data_ptr(),
            *self._inv_norms,
            self.cosine.data_ptr(),
            row_grad_dot.data_ptr(),
            column_grad_dot.data_ptr(),
            address(through_visual),
            address(through_text),
            address(of_visual),
            address(of_text),
        )
        of_scale = row_grad_dot.sum() / self.scale if needs[2] and self.scale is not None else None
        return [of_visual, of_text, of_scale]

    def _through_chunks(
        self,
        row_grad_dot: Tensor,
        column_grad_dot: Tensor,
        row_sum: Tensor,
        column_sum: Tensor,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """What goes through S: the gradients of the centred features, as these lie."""
        module, centred, text = self._module, self.centred, self.text
        _, m, emotions, _, _ = self.sizes
        _, _, resident, in_place = module.correlation_plan_of(emotions)
        at_once = self._rows_at_once(resident)
        second = None if in_place else self._new(at_once * emotions, emotions * m)
        through_visual = torch.empty_like(centred) if needs[0] else None
        through_text = torch.empty_like(text) if needs[1] else None
        also = row_sum.data_ptr(), column_sum.data_ptr()

        def differentiate(chunk: tuple[int | float, ...], rows: slice, product: Tensor) -> None:
            grad = product if second is None else _part(second, slice(product.shape[0]))
            module.correlation_chunk_backward(*chunk, *also, grad.data_ptr())
            if through_visual is not None:
                torch.mm(grad, text, out=_part(through_visual, rows))
            if through_text is not None and rows.start == 0:
                torch.mm(grad.t(), _part(centred, rows), out=through_text)
            elif through_text is not None:
                through_text.addmm_(grad.t(), centred[rows])

        self._over_chunks(differentiate, at_once, row_grad_dot, column_grad_dot)
        return through_visual, through_text

    def _through_own(
        self,
        row_grad_dot: Tensor,
        column_grad_dot: Tensor,
        row_sum: Tensor,
        column_sum: Tensor,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        n, _, emotions, width, _ = self.sizes
        product = self._own_product()
        grad = torch.empty_like(product)
        self._module.correlation_within_backward(
            *self._place, n, emotions, *self._scale, *self._inv_norms, product.data_ptr(),
            row_sum.data_ptr(), column_sum.data_ptr(), grad.data_ptr(),
            row_grad_dot.data_ptr(), column_grad_dot.data_ptr(),
        )  # fmt: skip
        centred, text = self.centred.view(n, emotions, width), self.text.view(emotions, n, width)
        with exact_products(grad):
            through_visual = torch.bmm(grad, text.transpose(0, 1)) if needs[0] else None
            through_text = torch.bmm(grad.transpose(1, 2), centred) if needs[1] else None
        return through_visual, None if through_text is None else through_text.transpose(0, 1).contiguous()

    def _over_chunks(
        self,
        step: Callable[[tuple[int | float, ...], slice, Tensor], None],
        at_once: int,
        row_sums: Tensor,  # (n, Q), written
        column_sums: Tensor,  # (Q, m), written
    ) -> None:
        """S of every chunk, step(the kernel's arguments, rows of features, S), and the sum of what it wrote.

        It writes parts; where there is one alone, it is the sum.
        """
        module, centred, text = self._module, self.centred, self.text.t()
        n, m, emotions, _, pairs = self.sizes
        column_blocks, row_blocks = module.correlation_part_counts(m, emotions, at_once)
        row_parts, column_parts = row_sums, column_sums
        if at_once < n or column_blocks > 1:
            row_parts = self._new(column_blocks * at_once * pairs)
        if at_once < n or row_blocks > 1:
            column_parts = self._new(row_blocks * pairs * m)
        products = self._new(at_once * emotions, emotions * m)
        of_all = *self._place, m, self.first, emotions, self.negatives == "distinct", *self._scale, *self._inv_norms
        parts = row_parts.data_ptr(), column_parts.data_ptr()
        with exact_products(products):
            for row in range(0, n, at_once):
                count = min(at_once, n - row)
                rows = slice(row * emotions, (row + count) * emotions)
                product = _part(products, slice(count * emotions))
                torch.mm(_part(centred, rows), text, out=product)
                step((*of_all, product.data_ptr(), row, count, *parts), rows, product)
                if row_parts is not row_sums:
                    of_rows = row_parts[: column_blocks * count * pairs].view(column_blocks, count, pairs)
                    torch.sum(of_rows, 0, out=row_sums[row : row + count])
                if column_parts is not column_sums:
                    _, row_blocks = module.correlation_part_counts(m, emotions, count)
                    of_columns = column_parts[: row_blocks * pairs * m].view(row_blocks, pairs, m)
                    if row == 0:
                        torch.sum(of_columns, 0, out=column_sums)
                    else:
                        column_sums.add_(of_columns.sum(0))

    def _own_product(self) -> Tensor:  # (n, E, E)
        n, _, emotions, width, _ = self.sizes
        centred, text = self.centred.view(n, emotions, width), self.text.view(emotions, n, width)
        with exact_products(centred):
            return torch.bmm(centred, text.permute(1, 2, 0))

    def _rows_at_once(self, resident: int) -> int:
        """Individuals of a chunk, of kernels of which a multiprocessor holds `resident` blocks."""
        n, m, emotions, _, _ = self.sizes
        rows_of_block = self._module.correlation_plan_of(emotions)[0]
        most = max(CHUNK[self.device.type] // (m * emotions * emotions), 1)
        column_blocks, _ = self._module.correlation_part_counts(m, emotions, 1)
        of_wave = resident * multiprocessors(self.centred) // column_blocks * rows_of_block
        return rows_of_chunk(n, most, of_wave, rows_of_block)


def rows_of_chunk(n: int, most: int, of_wave: int, of_block: int) -> int:
    """How many of n rows to take at once, at most `most`: equal chunks that fill the waves of blocks they take.

    A device runs `of_wave` rows at a time, a block `of_block`.
    """
    if 0 < of_wave < most:
        most -= most % of_wave
    equal = math.ceil(n / math.ceil(n / most))
    return min(math.ceil(equal / of_block) * of_block, most, n)


def _part(x: Tensor, rows: slice) -> Tensor:
    """Some rows; all of them without a view, which takes longer than to look."""
    return x if rows.stop - (rows.start or 0) == x.shape[0] else x[rows]
