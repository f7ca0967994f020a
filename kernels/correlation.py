"""correlation_loss: the products of changes as sums of products of features; no logit leaves the chip.

Pairs a < b stand for both directions, whose logits are l and −l: Q = E(E−1)/2 of them for each individual. Features
lie emotion by emotion, (E, individuals, D), and so do both sides of S: neighbouring threads read neighbouring columns,
and a thread that owns a pair of individuals finds all E² products of their emotions.

The loss of N individuals is a square of S; a process of several that compute it together has its own n individuals'
rows, and meets m columns at a time. All kernels work on such rectangles: row i's own column is first + i.

    prepare   centred features, 1/|Δ| of every pair; one program per individual and side
    product   S = V Tᵀ of some individuals' rows with all columns, tiles by tl.dot, at most CHUNK bytes of S at a time
    sums      per pair of individuals: the logits from S, exp(l) and exp(−l), added up along rows and columns
    log_sums  log-sum-exp, and of a square the loss; of a rectangle positives, which a sum over rectangles makes a loss

    backward  prepare and product again, then
    fold      the logits again, their gradients, folded to gradients of S: Aᵀ G A, A[ab] = e_b − e_a
    product   dV = dS T and dT += dSᵀ V of the chunk
    gradient  less the part through the norms: Σ over pairs of ρ/|Δ|² · A Aᵀ times the features, ρ = Σ dloss/dl · l

Of more than NARROW emotions `correlation_wide_kernels` has other sums and another fold, in which warps own emotions;
and gradient takes all pairs of an emotion together.

Operations, of a square: 2·(N·E)²·D for each product, one forward and three backward; N²·Q² logits at about 10
(forward) and 20 (backward) instructions and two exponentials. Bytes: S, and in the backward its gradient, are written
and read within L2; the rest is O(N). Bound by the products' rate at D = 512 and E = 7.

Precision: everything is float32, also for half inputs, and products are 3xTF32, which keep float32's bits. Centring
first makes S as small as the differences that are taken of it. A row holds both l and −l, so its largest logit is not
below 0, and |l| ≤ s: exp(l − K) with one K = max(0, s − 60) neither overflows nor loses a row up to s = 120. Above
that the loss is NaN, never silently wrong. In "distinct" a rectangle may hold −l alone: below e^(K−87) it counts as
nothing, as it would beside the 1 that a whole row has at least. All sums have a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from pcmecl_fast.kernels.common import Config, counter_for, power_of_2, programs_for, run
from pcmecl_fast.kernels.correlation_kernels import gradient_kernel, log_sums_kernel, prepare_kernel
from pcmecl_fast.kernels.correlation_pair_kernels import ALL, DISTINCT, WITHIN, fold_kernel, sums_kernel
from pcmecl_fast.kernels.correlation_wide_kernels import wide_fold_kernel, wide_sums_kernel
from pcmecl_fast.kernels.products import multiply
from pcmecl_fast.ops.no_pairs import gradients_of_nothing, has_pairs, sums_of_nothing

CHUNK = 16 << 20  # bytes of S at a time: a third of an H100's L2
BLOCK = 32  # columns' individuals at a time: one for each thread of a warp
WARPS = 8  # programs of one warp that share a processor at a time: two for each of its schedulers
COLUMN_STRIPS = 32  # programs along the columns at most, each with its own partial sums of rows
NARROW = 11  # emotions, of which a thread keeps all pairs in registers; of more, the wide kernels' warps have one each
# Registers of a thread at most, of many emotions: by itself the compiler spills some, for one more program a
# processor. Of the kernels that walk over pairs of individuals WARPS share it, which leave them this many.
WALK_REGISTERS, OTHER_REGISTERS = 255, 128
LEAST_ROWS = 32  # individuals of a chunk of theirs, over warps, at least: so that all processors have some
LOG_SUMS = 128  # rows or columns of a program that adds strips up
KINDS = {"all": ALL, "within": WITHIN, "distinct": DISTINCT}
PREPARE_WARPS = 8


@dataclass(frozen=True)
class Plan:
    """How a rectangle is divided into chunks of rows, and a chunk into strips of rows by strips of columns."""

    row_people: int  # individuals whose visual features the rows are
    column_people: int  # individuals whose text features the columns are
    emotions: int
    width: int
    negatives: str
    first: int  # the column that is row 0's own; columns from 0 to column_people are here
    programs: int  # that the device runs side by side

    @classmethod
    def of(cls, visual: Tensor, text: Tensor, negatives: str, first: int = 0) -> Plan:
        assert negatives != "within" or (len(visual) == len(text) and first == 0), "a square holds all negatives within"
        people, emotions, width = visual.shape
        programs = programs_for(visual, 1 << 30, WARPS // warps_for(emotions))
        return cls(people, len(text), emotions, width, negatives, first, programs)

    @property
    def within(self) -> bool:
        return self.negatives == "within"

    @property
    def pairs(self) -> int:
        return self.emotions * (self.emotions - 1) // 2

    @property
    def columns(self) -> int:  # individuals, filled up to whole blocks: so every row of S begins at 128 bytes
        return self.blocks * BLOCK

    @property
    def chunks(self) -> int:
        if self.within:  # whose S is no larger than its features: one launch has all of it
            return self.blocks
        most = max(CHUNK // (4 * self.emotions**2 * self.columns), LEAST_ROWS // self.warps if self.wide else 1)
        return triton.cdiv(self.row_people, min(self.row_people, most))

    @property
    def chunk(self) -> int:  # rows' individuals in one, the same number in all
        return BLOCK if self.within else triton.cdiv(self.row_people, self.chunks)

    @property
    def blocks(self) -> int:  # of columns
        return triton.cdiv(self.column_people, BLOCK)

    @property
    def places(self) -> int:  # for rows' individuals
        return self.chunks * self.chunk

    @property
    def rows(self) -> int:  # individuals that a chunk of S has rows for; within, a column has its own alone
        return 1 if self.within else self.chunk

    @property
    def wide(self) -> bool:
        return self.emotions > NARROW

    @property
    def warps(self) -> int:  # of a program that walks over pairs of individuals
        return warps_for(self.emotions)

    @property
    def groups(self) -> int:  # of columns' emotions
        return triton.cdiv(self.emotions, self.warps) if self.wide else 1

    @property
    def units(self) -> int:  # of columns
        return self.blocks * self.groups

    @property
    def units_per_strip(self) -> int:
        return self._per_strip[1]

    @property
    def column_strips(self) -> int:
        return triton.cdiv(self.units, self.units_per_strip)

    @property
    def row_sums(self) -> int:  # that a row's sum is made of; within individuals it meets one column alone
        return self.groups if self.within else self.column_strips

    @property
    def rows_per_strip(self) -> int:
        return self._per_strip[0]

    @cached_property
    def _per_strip(self) -> tuple[int, int]:
        """Rows and units of a program, of all that together are no more than run side by side."""
        least = triton.cdiv(self.units, min(self.units, self.programs if self.within else COLUMN_STRIPS))
        if not self.wide:
            return triton.cdiv(self.rows, max(1, self.programs // triton.cdiv(self.units, least))), least
        # Of few rows and many units the division that gives a program the least work.
        choices = (
            (rows, max(least, triton.cdiv(self.units, max(1, self.programs // triton.cdiv(self.rows, rows)))))
            for rows in range(1, self.rows + 1)
        )
        return min(choices, key=lambda choice: (choice[0] * choice[1], choice[0]))

    @property
    def row_strips(self) -> int:
        return triton.cdiv(self.rows, self.rows_per_strip)

    @property
    def launches(self) -> range:  # each with a chunk's products
        return range(1 if self.within else self.chunks)

    @property
    def constants(self) -> dict[str, int]:
        return {"E": self.emotions, "Q": self.pairs, "BLOCK": BLOCK}

    def tiling(self, chunk: int) -> dict[str, int | bool]:
        """The arguments by which the kernels that walk over pairs of individuals know their place."""
        return {
            "places": self.places,
            "columns": self.columns,
            "chunk_start": chunk * self.chunk,
            "own_start": chunk * self.chunk + self.first,
            "rows": self.rows,
            "rows_per_strip": self.rows_per_strip,
            "units_per_strip" if self.wide else "blocks_per_strip": self.units_per_strip,
            "KIND": KINDS[self.negatives].value,
            **self.constants,
            **({"GROUP": self.warps, "maxnreg": WALK_REGISTERS} if self.wide else {}),
            **Config(warps=self.warps, stages=1).options(),
        }

    def of_warps(self, x: Tensor) -> tuple[Tensor, ...]:
        """The workspace in which warps of the wide kernels leave a row's sums."""
        if not self.wide:
            return ()
        programs = 0 if self.within else self.row_strips * self.column_strips
        return (x.new_empty(programs, self.warps, self.pairs),)


def warps_for(emotions: int) -> int:
    """Of a program that walks over pairs of individuals: of many emotions one for each of a group."""
    if emotions <= NARROW:
        return 1
    return 4 if -emotions % 4 <= 1 else 2


@dataclass(frozen=True)
class _Prepared:
    """Features of all places, filled up with zeros, and the logit scale."""

    visual: Tensor  # (chunks, E, chunk, D) centred
    text: Tensor  # (blocks, E, BLOCK, D) centred
    inv_norm_visual: Tensor  # (places, Q): 1/|Δ|, 0 for a short one, −1 where there is no pair
    inv_norm_text: Tensor  # (blocks, Q, BLOCK)
    count: Tensor | None  # (): the rows' pairs, where the loss is their mean
    counter: Tensor  # (): 0, for the sums over the grid of this launch and later ones
    scale: Tensor | None  # (); without it scale_number counts
    scale_number: float


def correlation_loss_forward(
    visual: Tensor,  # (N, E, D)
    text: Tensor,  # (N, E, D)
    scale: Tensor | None,  # ()
    scale_number: float,
    mask: Tensor | None,  # (N, E)
    negatives: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if not has_pairs(visual, text):
        row_lse, column_lse, _ = sums_of_nothing(visual, text, 0.0)
        return visual.new_zeros((), dtype=torch.float32), row_lse, column_lse
    plan = Plan.of(visual, text, negatives)
    prepared = _prepare(plan, visual, text, scale, scale_number, mask, mask, counts=True)
    row_lse, column_lse, _, loss = _log_sums(plan, prepared, _exponentials(plan, prepared))
    assert loss is not None
    return loss, row_lse, column_lse


def correlation_loss_backward(
    grad: Tensor,  # ()
    visual: Tensor,  # (N, E, D)
    text: Tensor,  # (N, E, D)
    scale: Tensor | None,  # ()
    scale_number: float,
    mask: Tensor | None,  # (N, E)
    negatives: str,
    row_lse: Tensor,  # (N, Q)
    column_lse: Tensor,  # (N, Q)
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    if not has_pairs(visual, text):
        return tuple(gradients_of_nothing(visual, text, scale, needs))
    plan = Plan.of(visual, text, negatives)
    prepared = _prepare(plan, visual, text, scale, scale_number, mask, mask, counts=True)
    grad_scale = torch.empty_like(scale) if needs[2] and scale is not None else None
    lse = row_lse, column_lse
    return _all_gradients(plan, prepared, grad, lse, needs, visual.dtype, grad_scale)


def correlation_rectangle_sums(
    visual: Tensor,  # (n, E, D): of the rows
    text: Tensor,  # (m, E, D): of the columns
    scale: Tensor | None,  # ()
    scale_number: float,
    mask: Tensor | None,  # (n, E)
    text_mask: Tensor | None,  # (m, E)
    negatives: str,
    first: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of a rectangle's rows (n, Q) and of its columns (m, Q), and its positives (n, Q)."""
    if not has_pairs(visual, text):
        return sums_of_nothing(visual, text, -torch.inf)
    plan = Plan.of(visual, text, negatives, first)
    prepared = _prepare(plan, visual, text, scale, scale_number, mask, text_mask, counts=False)
    row_lse, column_lse, positive, _ = _log_sums(plan, prepared, _exponentials(plan, prepared))
    assert positive is not None
    return row_lse, column_lse, positive


def correlation_rectangle_gradients(
    weight: Tensor,  # ()
    visual: Tensor,  # (n, E, D): of the rows
    text: Tensor,  # (m, E, D): of the columns
    scale: Tensor | None,  # ()
    scale_number: float,
    mask: Tensor | None,  # (n, E)
    text_mask: Tensor | None,  # (m, E)
    negatives: str,
    first: int,
    row_lse: Tensor,  # (n, Q), over all columns
    column_lse: Tensor,  # (m, Q), over all rows
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """A rectangle's part, in float32, of the gradients of weight · Σ over pairs of ½ (row_lse + column_lse) − l."""
    if not has_pairs(visual, text):
        return tuple(gradients_of_nothing(visual, text, scale, needs, torch.float32))
    plan = Plan.of(visual, text, negatives, first)
    prepared = _prepare(plan, visual, text, scale, scale_number, mask, text_mask, counts=False)
    grad_scale = weight.new_empty((), dtype=torch.float32) if needs[2] and scale is not None else None
    lse = row_lse, column_lse
    return _all_gradients(plan, prepared, weight, lse, needs, torch.float32, grad_scale)


def _exponentials(plan: Plan, prepared: _Prepared) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of exponentials along rows and columns by strips, and the positives where their columns are here."""
    sums = *_strip_sums(plan, prepared.visual), torch.empty_like(prepared.inv_norm_visual)
    for chunk in plan.launches:
        products = _products(plan, prepared, chunk)
        _sums(plan, prepared, products, chunk, sums)
    return sums


def _all_gradients(
    plan: Plan,
    prepared: _Prepared,
    grad: Tensor,
    lse: tuple[Tensor, Tensor],
    needs: Sequence[bool],
    dtype: torch.dtype,
    grad_scale: Tensor | None,
) -> tuple[Tensor | None, ...]:
    grad_dots = _strip_sums(plan, prepared.visual)
    grad_visual = torch.empty_like(prepared.visual) if needs[0] else None
    grad_text = torch.empty_like(prepared.text) if needs[1] else None
    for chunk in plan.launches:
        products = _products(plan, prepared, chunk)
        grad_products = _fold(plan, prepared, products, chunk, grad, lse, grad_dots)
        _gradient_products(plan, prepared, grad_products, chunk, grad_visual, grad_text)
    return *_gradients(plan, prepared, (grad_visual, grad_text), grad_dots, grad_scale, dtype), grad_scale


def _prepare(
    plan: Plan,
    visual: Tensor,
    text: Tensor,
    scale: Tensor | None,
    scale_number: float,
    mask: Tensor | None,
    text_mask: Tensor | None,
    *,
    counts: bool,
) -> _Prepared:
    if (mask is None) != (text_mask is None):
        mask, text_mask = (
            x.new_ones(x.shape[:2], dtype=torch.bool) if has is None else has
            for x, has in ((visual, mask), (text, text_mask))
        )
    programs = plan.places + plan.columns
    of_float = {"dtype": torch.float32}
    centred = (
        visual.new_empty(plan.chunks, plan.emotions, plan.chunk, plan.width, **of_float),
        visual.new_empty(plan.blocks, plan.emotions, BLOCK, plan.width, **of_float),
    )
    inv_norms = (
        visual.new_empty(plan.places, plan.pairs, **of_float),
        visual.new_empty(plan.blocks, plan.pairs, BLOCK, **of_float),
    )
    count = visual.new_empty((), **of_float) if counts else None
    partial = visual.new_empty(2, programs, **of_float) if counts else None
    counter = counter_for(visual)
    run(
        visual,
        lambda: prepare_kernel[(programs,)](
            visual,
            text,
            mask,
            text_mask,
            *centred,
            *inv_norms,
            count,
            partial,
            counter,
            plan.row_people,
            plan.column_people,
            plan.places,
            plan.chunk,
            **plan.constants,
            D=plan.width,
            BLOCK_E=power_of_2(plan.emotions),
            BLOCK_Q=power_of_2(plan.pairs),
            BLOCK_D=min(power_of_2(plan.width), min(32, 8192 // power_of_2(plan.pairs)) if plan.wide else 128),
            num_warps=PREPARE_WARPS,
        ),
    )
    return _Prepared(*centred, *inv_norms, count, counter, scale, scale_number)


def _strip_sums(plan: Plan, x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for what is added up along rows, one sum for each strip of columns, and along columns."""
    return (
        x.new_empty(plan.row_sums, plan.places, plan.pairs, dtype=torch.float32),
        x.new_empty(plan.row_strips, plan.blocks, plan.pairs, BLOCK, dtype=torch.float32),
    )


def _products(plan: Plan, prepared: _Prepared, chunk: int) -> Tensor:
    """S of a chunk, (E·rows, blocks·E·BLOCK); within, each individual's products with itself."""
    products = prepared.visual.new_empty(plan.emotions * plan.rows, plan.emotions * plan.columns)
    if plan.within:
        visual, text = _by_individual(prepared.visual), _by_individual(prepared.text)
        multiply(visual, text.mT, _products_by_individual(plan, products))
    else:
        multiply(_matrix(prepared.visual[chunk]), _matrix(prepared.text).mT, _matrix(products))
    return products


def _gradient_products(
    plan: Plan,
    prepared: _Prepared,
    grad_products: Tensor,  # (E·rows, blocks·E·BLOCK)
    chunk: int,
    grad_visual: Tensor | None,  # (chunks, E, chunk, D), of which the chunk's part is written
    grad_text: Tensor | None,  # (blocks, E, BLOCK, D), written by the first chunk and added to by the others
) -> None:
    if plan.within:
        view, cut, grads = _by_individual, slice(None), _products_by_individual(plan, grad_products)
    else:
        view, cut, grads = _matrix, chunk, _matrix(grad_products)
    if grad_visual is not None:
        multiply(grads, view(prepared.text), view(grad_visual[cut]))
    if grad_text is not None:
        multiply(grads.mT, view(prepared.visual[cut]), view(grad_text), add=chunk > 0)


def _matrix(x: Tensor) -> Tensor:  # (..., D) -> (1, 1, rows, D)
    return x.view(1, 1, -1, x.shape[-1])


def _by_individual(x: Tensor) -> Tensor:  # (blocks, E, BLOCK, D) -> (blocks, BLOCK, E, D)
    return x.transpose(1, 2)


def _products_by_individual(plan: Plan, products: Tensor) -> Tensor:  # -> (blocks, BLOCK, E, E)
    return products.view(plan.emotions, plan.blocks, plan.emotions, BLOCK).permute(1, 3, 0, 2)


def _sums(plan: Plan, prepared: _Prepared, products: Tensor, chunk: int, sums: tuple[Tensor, Tensor, Tensor]) -> None:
    """Add a chunk's exponentials up along rows and columns."""
    kernel, block = (wide_sums_kernel, "BLOCK_E") if plan.wide else (sums_kernel, "BLOCK_Q")
    sizes = {block: power_of_2(plan.emotions if plan.wide else plan.pairs)}
    of_warps = plan.of_warps(products)
    run(
        products,
        lambda: kernel[(plan.row_strips, plan.column_strips)](
            products,
            prepared.inv_norm_visual,
            prepared.inv_norm_text,
            prepared.scale,
            prepared.scale_number,
            *sums,
            *of_warps,
            **plan.tiling(chunk),
            **sizes,
        ),
    )


def _log_sums(
    plan: Plan, prepared: _Prepared, sums: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Log-sum-exp of rows (n, Q) and of columns (m, Q), a rectangle's positives (n, Q), and a square's loss."""
    of_square = prepared.count is not None
    row_lse = sums[2].new_empty(plan.row_people, plan.pairs)
    column_lse = sums[2].new_empty(plan.column_people, plan.pairs)
    positive = None if of_square else torch.empty_like(row_lse)
    loss = sums[2].new_empty(()) if of_square else None
    row_programs = triton.cdiv(plan.row_people * plan.pairs, LOG_SUMS)
    programs = row_programs + triton.cdiv(plan.columns * plan.pairs, LOG_SUMS)
    partial = sums[2].new_empty(2, programs) if of_square else None
    run(
        row_lse,
        lambda: log_sums_kernel[(programs,)](
            *sums,
            prepared.inv_norm_visual,
            prepared.inv_norm_text,
            prepared.count,
            prepared.scale,
            prepared.scale_number,
            row_lse,
            column_lse,
            positive,
            loss,
            partial,
            prepared.counter,
            plan.row_people,
            plan.column_people,
            plan.places,
            plan.columns,
            plan.first,
            len(sums[0]),
            len(sums[1]),
            row_programs,
            Q=plan.pairs,
            BLOCK=BLOCK,
            SIZE=LOG_SUMS,
            num_warps=4,
            **({"maxnreg": OTHER_REGISTERS} if plan.wide else {}),
        ),
    )
    return row_lse, column_lse, positive, loss


def _fold(
    plan: Plan,
    prepared: _Prepared,
    products: Tensor,
    chunk: int,
    grad: Tensor,
    lse: tuple[Tensor, Tensor],
    grad_dots: tuple[Tensor, Tensor],
) -> Tensor:
    """The gradient of a chunk of S; and ρ is added up along rows and columns."""
    grad_products = torch.empty_like(products)
    kernel = wide_fold_kernel if plan.wide else fold_kernel
    of_warps = plan.of_warps(products)
    run(
        products,
        lambda: kernel[(plan.row_strips, plan.column_strips)](
            products,
            grad_products,
            prepared.inv_norm_visual,
            prepared.inv_norm_text,
            prepared.scale,
            prepared.scale_number,
            grad,
            prepared.count,
            *lse,
            *grad_dots,
            *of_warps,
            **plan.tiling(chunk),
        ),
    )
    return grad_products


def _gradients(
    plan: Plan,
    prepared: _Prepared,
    sums: tuple[Tensor | None, Tensor | None],  # (chunks, E, chunk, D), (blocks, E, BLOCK, D)
    grad_dots: tuple[Tensor, Tensor],
    grad_scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the features, (n, E, D) and (m, E, D), and the scale's."""
    results = [
        None if x is None else x.new_empty(people, plan.emotions, plan.width, dtype=dtype)
        for x, people in zip(sums, (plan.row_people, plan.column_people), strict=True)
    ]
    programs = plan.row_people + plan.column_people
    partial = grad_dots[0].new_empty(2, programs)
    run(
        partial,
        lambda: gradient_kernel[(programs,)](
            *sums,
            *results,
            prepared.visual,
            prepared.text,
            prepared.inv_norm_visual,
            prepared.inv_norm_text,
            *grad_dots,
            prepared.scale,
            grad_scale,
            partial,
            prepared.counter,
            plan.row_people,
            plan.places,
            plan.columns,
            plan.chunk,
            len(grad_dots[0]),
            len(grad_dots[1]),
            plan.emotions if plan.wide else None,
            **plan.constants,
            D=plan.width,
            BLOCK_E=power_of_2(plan.emotions),
            BLOCK_Q=power_of_2(plan.pairs),
            BLOCK_D=min(power_of_2(plan.width), 4096 // power_of_2(plan.emotions) if plan.wide else 512),
            WIDE=plan.wide,
            num_warps=4,
            **({"maxnreg": OTHER_REGISTERS} if plan.wide else {}),
        ),
    )
    return results[0], results[1]
