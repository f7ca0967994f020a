"""correlation_loss: the products of changes as sums of products of features; no logit leaves the chip.

Pairs a < b stand for both directions, whose logits are l and −l: Q = E(E−1)/2 of them for each individual. Individuals
are taken in groups of G = min(64 // Q, 32 // E), so that a group's pairs fill a tile (63 of 64 at E = 7).

The loss of N individuals is a square of S; a process of several that compute it together has its own n individuals'
rows, and meets m columns at a time. All kernels work on such rectangles. Where row i's own column is first + i, the
rows begin with first mod G empty places: so every row and its own column have the same place in their groups, which
are first // G groups apart, and the tiles of a rectangle cost what those of a square do.

    prepare   centred features, 1/|Δ| of every pair; one program per individual and side
    product   S = V Tᵀ of some groups' rows with all columns, tiles by tl.dot, at most CHUNK bytes of S at a time
    sums      per tile of groups: the logits from S by four gathers, exp(l) and exp(−l), added up along rows and columns
    loss      log-sum-exp and loss; of a rectangle log-sum-exp and positives, which a sum over rectangles makes a loss

    backward  prepare and product again, then
    fold      the logits again, their gradients, folded to gradients of S in S's place: Aᵀ G A, A[ab] = e_b − e_a
    product   dV = dS T and dT += dSᵀ V of the chunk
    gradient  less the part through the norms: Σ over pairs of ρ/|Δ|² · A Aᵀ times the features, ρ = Σ dloss/dl · l

Operations, of a square: 2·(N·E)²·D for each product, one forward and three backward; N²·Q² logits at about 20
(forward) and 40 (backward) operations and two exponentials. Bytes: S is written and read within L2; the rest is O(N).
Bound by the products' rate at D = 512 and E = 7.

Precision: everything is float32, also for half inputs, and products are 3xTF32, which keep float32's bits. Centring
first makes S as small as the differences that are taken of it. A row holds both l and −l, so its largest logit is not
below 0, and |l| ≤ s: exp(l − K) with one K = max(0, s − 60) neither overflows nor loses a row up to s = 120. Above
that the loss is NaN, never silently wrong. In "distinct" a rectangle may hold −l alone: below e^(K−87) it counts as
nothing, as it would beside the 1 that a whole row has at least. All sums have a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from pcmecl_fast.kernels.common import Config, counter_for, power_of_2, run, run_tuned
from pcmecl_fast.kernels.correlation_kernels import (
    ALL,
    DISTINCT,
    WITHIN,
    fold_kernel,
    gradient_kernel,
    log_sums_kernel,
    loss_kernel,
    prepare_kernel,
    sums_kernel,
)
from pcmecl_fast.kernels.products import multiply
from pcmecl_fast.ops.no_pairs import gradients_of_nothing, has_pairs, sums_of_nothing

CHUNK = 16 << 20  # bytes of S at a time: a third of an H100's L2
STRIPS = 24  # programs along rows and along columns, each with its own partial sums: 576 for 132 processors
KINDS = {"all": ALL, "within": WITHIN, "distinct": DISTINCT}
PAIR_CONFIGS = [
    Config(warps=4, stages=1, blocks={"PART": 16}),
    Config(warps=8, stages=1, blocks={"PART": 16}),
]
PREPARE_WARPS = 8
# It works in place, so it cannot be repeated to be timed.
FOLD_CONFIG = Config(warps=8, stages=1, blocks={"PART": 32})


@dataclass(frozen=True)
class Plan:
    """How a rectangle is divided into groups of individuals, chunks of groups of rows, and strips of groups."""

    row_people: int  # individuals whose visual features the rows are
    column_people: int  # individuals whose text features the columns are
    emotions: int
    width: int
    negatives: str
    first: int  # the column that is row 0's own; columns from 0 to column_people are here

    @classmethod
    def of(cls, visual: Tensor, text: Tensor, negatives: str, first: int = 0) -> Plan:
        assert negatives != "within" or (len(visual) == len(text) and first == 0), "a square holds all negatives within"
        people, emotions, width = visual.shape
        return cls(people, len(text), emotions, width, negatives, first)

    @property
    def pairs(self) -> int:
        return self.emotions * (self.emotions - 1) // 2

    @property
    def group_size(self) -> int:  # individuals
        return min(64 // self.pairs, 32 // self.emotions)

    @property
    def rows(self) -> int:  # of features in a group
        return self.group_size * self.emotions

    @property
    def lead(self) -> int:  # empty places before the first row
        return self.first % self.group_size

    @property
    def own_group(self) -> int:  # of columns, whose places are the first group of rows' own; it may be none of them
        return self.first // self.group_size

    @property
    def row_groups(self) -> int:
        return triton.cdiv(self.lead + self.row_people, self.group_size)

    @property
    def column_groups(self) -> int:
        return triton.cdiv(self.column_people, self.group_size)

    @property
    def slots(self) -> int:  # for a group's pairs
        return power_of_2(self.group_size * self.pairs, least=16)

    @property
    def columns(self) -> int:  # of S
        return self.rows if self.negatives == "within" else self.column_groups * self.rows

    @property
    def row_stride(self) -> int:  # of S: columns filled up, so that its rows begin at 16 bytes for whatever reads them
        return triton.cdiv(self.columns, 16) * 16

    @property
    def chunk(self) -> int:  # groups
        return max(1, min(self.row_groups, CHUNK // (4 * self.rows * self.row_stride)))

    @property
    def row_strips(self) -> int:
        return triton.cdiv(self.chunk, self.groups_per_row_strip)

    @property
    def groups_per_row_strip(self) -> int:
        return triton.cdiv(self.chunk, STRIPS)

    @property
    def column_strips(self) -> int:
        return 1 if self.negatives == "within" else triton.cdiv(self.column_groups, self.groups_per_column_strip)

    @property
    def groups_per_column_strip(self) -> int:
        return triton.cdiv(self.column_groups, STRIPS)

    @property
    def constants(self) -> dict[str, int]:
        return {"E": self.emotions, "Q": self.pairs, "G": self.group_size, "SLOTS": self.slots}

    def parts(self, config: Config) -> dict[str, int | bool]:
        """A launch's options, its part of a tile no wider than the tile."""
        return {**config.options(), "PART": min(config.blocks["PART"], self.slots)}

    def grid(self, chunk_start: int) -> tuple[int, int]:
        """Programs that share a chunk: strips of its rows by strips of all columns."""
        return triton.cdiv(self.chunk_groups(chunk_start), self.groups_per_row_strip), self.column_strips

    def chunk_groups(self, chunk_start: int) -> int:
        return min(self.chunk, self.row_groups - chunk_start)

    def tiling(self, chunk_start: int) -> dict[str, int | bool]:
        """The arguments by which the kernels that walk over pairs know their place."""
        return {
            "chunk_start": chunk_start,
            "own_start": chunk_start + self.own_group,
            "chunk_groups": self.chunk_groups(chunk_start),
            "row_stride": self.row_stride,
            "row_groups": self.row_groups,
            "column_groups": self.column_groups,
            "rows_per_strip": self.groups_per_row_strip,
            "columns_per_strip": self.groups_per_column_strip,
            "KIND": KINDS[self.negatives].value,
            "ADD": chunk_start > 0 and self.negatives != "within",
            **self.constants,
        }


@dataclass(frozen=True)
class _Prepared:
    """Features of all groups, filled up with zeros, and the logit scale."""

    visual: Tensor  # (row_groups·G·E, D) centred
    text: Tensor  # (column_groups·G·E, D) centred
    inv_norm_visual: Tensor  # (row_groups, slots): 1/|Δ|, 0 for a short one, −1 where there is no pair
    inv_norm_text: Tensor  # (column_groups, slots)
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
    return _loss(plan, prepared, _exponentials(plan, prepared))


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
    return _log_sums(plan, prepared, _exponentials(plan, prepared))


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
    for chunk_start in range(0, plan.row_groups, plan.chunk):
        products = _products(plan, prepared, chunk_start)
        _sums(plan, prepared, products, chunk_start, sums)
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
    for chunk_start in range(0, plan.row_groups, plan.chunk):
        products = _products(plan, prepared, chunk_start)
        _fold(plan, prepared, products, chunk_start, grad, lse, grad_dots)
        _gradient_products(plan, prepared, products, chunk_start, grad_visual, grad_text)
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
    groups = plan.row_groups, plan.column_groups
    places = sum(groups) * plan.group_size
    centred = visual.new_empty(places * plan.emotions, plan.width, dtype=torch.float32)
    centred = centred.split([size * plan.rows for size in groups])
    inv_norms = visual.new_empty(sum(groups), plan.slots, dtype=torch.float32).fill_(-1).split(groups)
    count = visual.new_empty((), dtype=torch.float32) if counts else None
    partial = visual.new_empty(2, places, dtype=torch.float32) if counts else None
    counter = counter_for(visual)
    run(
        visual,
        lambda: prepare_kernel[(places,)](
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
            plan.row_groups,
            plan.lead,
            **plan.constants,
            D=plan.width,
            BLOCK_E=power_of_2(plan.emotions),
            BLOCK_Q=power_of_2(plan.pairs),
            BLOCK_D=min(power_of_2(plan.width), 64),
            num_warps=PREPARE_WARPS,
        ),
    )
    return _Prepared(*centred, *inv_norms, count, counter, scale, scale_number)


def _strip_sums(plan: Plan, x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for what is added up along rows, one sum for each strip of columns, and along columns."""
    # Within individuals a group's columns meet its own rows alone, so that one program has them all.
    row_strips = 1 if plan.negatives == "within" else plan.row_strips
    return (
        x.new_empty(plan.column_strips, plan.row_groups, plan.slots, dtype=torch.float32),
        x.new_empty(row_strips, plan.column_groups, plan.slots, dtype=torch.float32),
    )


def _products(plan: Plan, prepared: _Prepared, chunk_start: int) -> Tensor:
    """S of a chunk: (groups in it · rows, columns), or of each group with itself, (groups in it, rows, rows)."""
    visual, text = _chunk_of(plan, prepared.visual, chunk_start), prepared.text
    if plan.negatives == "within":
        text = _chunk_of(plan, text, chunk_start)
        products = visual.new_empty(len(visual) // plan.rows, plan.rows, plan.row_stride)[..., : plan.columns]
        grouped = (-1, plan.rows, plan.width)
        multiply(visual.view(grouped), text.view(grouped).mT, products)
    else:
        products = visual.new_empty(len(visual), plan.row_stride)[:, : plan.columns]
        multiply(visual[None], text.mT[None], products[None])
    return products


def _gradient_products(
    plan: Plan,
    prepared: _Prepared,
    grad_products: Tensor,
    chunk_start: int,
    grad_visual: Tensor | None,
    grad_text: Tensor | None,
) -> None:
    visual, text = _chunk_of(plan, prepared.visual, chunk_start), prepared.text
    grouped = (-1, plan.rows, plan.width)
    within = plan.negatives == "within"
    if grad_visual is not None:
        grad_chunk = _chunk_of(plan, grad_visual, chunk_start)
        if within:
            multiply(grad_products, _chunk_of(plan, text, chunk_start).view(grouped), grad_chunk.view(grouped))
        else:
            multiply(grad_products[None], text[None], grad_chunk[None])
    if grad_text is not None:
        if within:
            multiply(grad_products.mT, visual.view(grouped), _chunk_of(plan, grad_text, chunk_start).view(grouped))
        else:
            multiply(grad_products.mT[None], visual[None], grad_text[None], add=chunk_start > 0)


def _chunk_of(plan: Plan, features: Tensor, chunk_start: int) -> Tensor:
    return features[chunk_start * plan.rows : (chunk_start + plan.chunk) * plan.rows]


def _sums(
    plan: Plan, prepared: _Prepared, products: Tensor, chunk_start: int, sums: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Add a chunk's exponentials up along rows and columns."""

    def launch(config: Config) -> None:
        sums_kernel[plan.grid(chunk_start)](
            products,
            prepared.inv_norm_visual,
            prepared.inv_norm_text,
            prepared.scale,
            prepared.scale_number,
            *sums,
            **plan.tiling(chunk_start),
            **plan.parts(config),
        )

    # Later chunks add to the first one's sums, so only the first can be repeated to be timed.
    shape_class = (plan.emotions, power_of_2(plan.row_groups), power_of_2(plan.column_groups), plan.negatives)
    configs = PAIR_CONFIGS[:1] if chunk_start else PAIR_CONFIGS
    run_tuned("correlation_sums", shape_class, configs, products, launch)


def _loss(plan: Plan, prepared: _Prepared, sums: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    loss = sums[2].new_empty(())
    row_lse, column_lse = (sums[2].new_empty(plan.row_people, plan.pairs) for _ in range(2))
    partial = sums[2].new_empty(2, plan.row_groups)
    run(
        loss,
        lambda: loss_kernel[(plan.row_groups,)](
            *sums,
            prepared.inv_norm_visual,
            prepared.count,
            prepared.scale,
            prepared.scale_number,
            loss,
            row_lse,
            column_lse,
            partial,
            prepared.counter,
            plan.row_people,
            len(sums[0]),
            len(sums[1]),
            **plan.constants,
            num_warps=2,
        ),
    )
    return loss, row_lse, column_lse


def _log_sums(plan: Plan, prepared: _Prepared, sums: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    row_lse, positive = (sums[2].new_empty(plan.row_people, plan.pairs) for _ in range(2))
    column_lse = sums[2].new_empty(plan.column_people, plan.pairs)
    run(
        row_lse,
        lambda: log_sums_kernel[(plan.row_groups + plan.column_groups,)](
            *sums,
            prepared.inv_norm_visual,
            prepared.inv_norm_text,
            prepared.scale,
            prepared.scale_number,
            row_lse,
            column_lse,
            positive,
            plan.row_people,
            plan.column_people,
            plan.row_groups,
            plan.column_groups,
            plan.lead,
            plan.own_group,
            len(sums[0]),
            len(sums[1]),
            **plan.constants,
            num_warps=2,
        ),
    )
    return row_lse, column_lse, positive


def _fold(
    plan: Plan,
    prepared: _Prepared,
    products: Tensor,
    chunk_start: int,
    grad: Tensor,
    lse: tuple[Tensor, Tensor],
    grad_dots: tuple[Tensor, Tensor],
) -> None:
    """Replace a chunk of S by its gradient, and add up ρ along rows and columns."""
    run_tuned(
        "correlation_fold",
        None,
        [FOLD_CONFIG],
        products,
        lambda config: fold_kernel[plan.grid(chunk_start)](
            products,
            prepared.inv_norm_visual,
            prepared.inv_norm_text,
            prepared.scale,
            prepared.scale_number,
            grad,
            prepared.count,
            *lse,
            *grad_dots,
            lead=plan.lead,
            ROWS=power_of_2(plan.rows, least=16),
            **plan.tiling(chunk_start),
            **plan.parts(config),
        ),
    )


def _gradients(
    plan: Plan,
    prepared: _Prepared,
    sums: tuple[Tensor | None, Tensor | None],  # (row_groups·G·E, D), (column_groups·G·E, D)
    grad_dots: tuple[Tensor, Tensor],
    grad_scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the features, in place where they are float32, and the scale's."""
    results = []
    for total, start, people in zip(sums, (plan.lead, 0), (plan.row_people, plan.column_people), strict=True):
        shape = (people, plan.emotions, plan.width)
        if total is None or dtype == torch.float32:
            there = slice(start * plan.emotions, (start + people) * plan.emotions)
            results.append(None if total is None else total[there].view(shape))
        else:
            results.append(total.new_empty(shape, dtype=dtype))
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
            plan.row_groups,
            plan.column_groups,
            plan.lead,
            len(grad_dots[0]),
            len(grad_dots[1]),
            **plan.constants,
            D=plan.width,
            BLOCK_E=power_of_2(plan.emotions),
            BLOCK_Q=power_of_2(plan.pairs),
            BLOCK_D=min(power_of_2(plan.width), 512),
            num_warps=4,
        ),
    )
    return results[0], results[1]
