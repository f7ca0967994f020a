"""correlation_loss: the products of changes as sums of products of features; no logit leaves the chip.

Pairs a < b stand for both directions, whose logits are l and −l: Q = E(E−1)/2 of them for each individual. Individuals
are taken in groups of G = min(64 // Q, 32 // E), so that a group's pairs fill a tile (63 of 64 at E = 7).

    prepare   centred features, 1/|Δ| of every pair; one program per individual and side
    product   S = V Tᵀ of some groups' rows with all columns, tiles by tl.dot, at most CHUNK bytes of S at a time
    sums      per tile of groups: the logits from S by four gathers, exp(l) and exp(−l), added up along rows and columns
    loss      log-sum-exp and loss

    backward  prepare and product again, then
    fold      the logits again, their gradients, folded to gradients of S in S's place: Aᵀ G A, A[ab] = e_b − e_a
    product   dV = dS T and dT += dSᵀ V of the chunk
    gradient  less the part through the norms: Σ over pairs of ρ/|Δ|² · A Aᵀ times the features, ρ = Σ dloss/dl · l

Operations: 2·(N·E)²·D for each product, one forward and three backward; N²·Q² logits at about 20 (forward) and 40
(backward) operations and two exponentials. Bytes: S is written and read within L2; the rest is O(N). Bound by the
products' rate at D = 512 and E = 7.

Precision: everything is float32, also for half inputs, and products are 3xTF32, which keep float32's bits. Centring
first makes S as small as the differences that are taken of it. A row holds both l and −l, so its largest logit is not
below 0, and |l| ≤ s: exp(l − K) with one K = max(0, s − 60) neither overflows nor loses a row up to s = 120. Above
that the loss is NaN, never silently wrong. All sums have a fixed order.
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
    loss_kernel,
    prepare_kernel,
    sums_kernel,
)
from pcmecl_fast.kernels.products import multiply

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
    """How N individuals with E emotions are divided into groups, chunks of groups, and strips of groups."""

    people: int
    emotions: int
    width: int
    negatives: str

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
    def groups(self) -> int:
        return triton.cdiv(self.people, self.group_size)

    @property
    def slots(self) -> int:  # for a group's pairs
        return power_of_2(self.group_size * self.pairs, least=16)

    @property
    def columns(self) -> int:  # of S
        return self.rows if self.negatives == "within" else self.groups * self.rows

    @property
    def row_stride(self) -> int:  # of S: columns filled up, so that its rows begin at 16 bytes for whatever reads them
        return triton.cdiv(self.columns, 16) * 16

    @property
    def chunk(self) -> int:  # groups
        return max(1, min(self.groups, CHUNK // (4 * self.rows * self.row_stride)))

    @property
    def row_strips(self) -> int:
        return triton.cdiv(self.chunk, self.groups_per_row_strip)

    @property
    def groups_per_row_strip(self) -> int:
        return triton.cdiv(self.chunk, STRIPS)

    @property
    def column_strips(self) -> int:
        return 1 if self.negatives == "within" else triton.cdiv(self.groups, self.groups_per_column_strip)

    @property
    def groups_per_column_strip(self) -> int:
        return triton.cdiv(self.groups, STRIPS)

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
        return min(self.chunk, self.groups - chunk_start)

    def tiling(self, chunk_start: int) -> dict[str, int | bool]:
        """The arguments by which the kernels that walk over pairs know their place."""
        return {
            "chunk_start": chunk_start,
            "chunk_groups": self.chunk_groups(chunk_start),
            "row_stride": self.row_stride,
            "groups": self.groups,
            "rows_per_strip": self.groups_per_row_strip,
            "columns_per_strip": self.groups_per_column_strip,
            "KIND": KINDS[self.negatives].value,
            "ADD": chunk_start > 0 and self.negatives != "within",
            **self.constants,
        }


@dataclass(frozen=True)
class _Prepared:
    """Features of all groups, the last one filled up with zeros."""

    visual: Tensor  # (groups·G·E, D) centred
    text: Tensor  # (groups·G·E, D) centred
    inv_norm_visual: Tensor  # (groups, slots): 1/|Δ|, 0 for a short one, −1 where there is no pair
    inv_norm_text: Tensor  # (groups, slots)
    count: Tensor  # (): pairs
    counter: Tensor  # (): 0, for the sums over the grid of this launch and later ones


def correlation_loss_forward(
    visual: Tensor,  # (N, E, D)
    text: Tensor,  # (N, E, D)
    scale: Tensor | None,  # ()
    scale_number: float,
    mask: Tensor | None,  # (N, E)
    negatives: str,
) -> tuple[Tensor, Tensor, Tensor]:
    people, emotions, width = visual.shape
    if not _has_pairs(visual):
        nothing = visual.new_zeros(people, emotions * max(emotions - 1, 0) // 2, dtype=torch.float32)
        return visual.new_zeros((), dtype=torch.float32), nothing, nothing.clone()
    plan = Plan(people, emotions, width, negatives)
    prepared = _prepare(plan, visual, text, mask)
    row_sums, column_sums = _strip_sums(plan, visual)
    positives = visual.new_empty(plan.groups, plan.slots, dtype=torch.float32)
    for chunk_start in range(0, plan.groups, plan.chunk):
        products = _products(plan, prepared, chunk_start)
        _sums(plan, prepared, products, chunk_start, scale, scale_number, row_sums, column_sums, positives)
    return _loss(plan, prepared, row_sums, column_sums, positives, scale, scale_number)


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
    need_visual, need_text, need_scale = needs
    if not _has_pairs(visual):
        return (
            torch.zeros_like(visual) if need_visual else None,
            torch.zeros_like(text) if need_text else None,
            torch.zeros_like(scale) if need_scale and scale is not None else None,
        )
    plan = Plan(*visual.shape, negatives)
    prepared = _prepare(plan, visual, text, mask)
    grad_dots = _strip_sums(plan, visual)
    grad_visual = torch.empty_like(prepared.visual) if need_visual else None
    grad_text = torch.empty_like(prepared.text) if need_text else None
    for chunk_start in range(0, plan.groups, plan.chunk):
        products = _products(plan, prepared, chunk_start)
        _fold(plan, prepared, products, chunk_start, scale, scale_number, grad, row_lse, column_lse, grad_dots)
        _gradient_products(plan, prepared, products, chunk_start, grad_visual, grad_text)
    grad_scale = torch.empty_like(scale) if need_scale and scale is not None else None
    sums = (grad_visual, grad_text)
    return (*_gradients(plan, prepared, sums, grad_dots, scale, grad_scale, visual.dtype), grad_scale)


def _has_pairs(visual: Tensor) -> bool:
    return visual.shape[0] > 0 and visual.shape[1] > 1 and visual.shape[2] > 0


def _prepare(plan: Plan, visual: Tensor, text: Tensor, mask: Tensor | None) -> _Prepared:
    padded = plan.groups * plan.group_size
    visual_centred, text_centred = visual.new_empty(2, padded * plan.emotions, plan.width, dtype=torch.float32)
    inv_norm_visual, inv_norm_text = visual.new_empty(2, plan.groups, plan.slots, dtype=torch.float32).fill_(-1)
    count = visual.new_empty((), dtype=torch.float32)
    partial = visual.new_empty(2, 2 * padded, dtype=torch.float32)
    counter = counter_for(visual)
    run(
        visual,
        lambda: prepare_kernel[(2 * padded,)](
            visual,
            text,
            mask,
            visual_centred,
            text_centred,
            inv_norm_visual,
            inv_norm_text,
            count,
            partial,
            counter,
            plan.people,
            **plan.constants,
            D=plan.width,
            BLOCK_E=power_of_2(plan.emotions),
            BLOCK_Q=power_of_2(plan.pairs),
            BLOCK_D=min(power_of_2(plan.width), 64),
            num_warps=PREPARE_WARPS,
        ),
    )
    return _Prepared(visual_centred, text_centred, inv_norm_visual, inv_norm_text, count, counter)


def _strip_sums(plan: Plan, x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for what is added up along rows, one sum for each strip of columns, and along columns."""
    shape = (plan.groups, plan.slots)
    along_rows = x.new_empty(plan.column_strips, *shape, dtype=torch.float32)
    # Within individuals a group's columns meet its own rows alone, so that one program has them all.
    row_strips = 1 if plan.negatives == "within" else plan.row_strips
    return along_rows, x.new_empty(row_strips, *shape, dtype=torch.float32)


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
    plan: Plan,
    prepared: _Prepared,
    products: Tensor,
    chunk_start: int,
    scale: Tensor | None,
    scale_number: float,
    row_sums: Tensor,
    column_sums: Tensor,
    positives: Tensor,
) -> None:
    """Add a chunk's exponentials up along rows and columns."""

    def launch(config: Config) -> None:
        sums_kernel[plan.grid(chunk_start)](
            products,
            prepared.inv_norm_visual,
            prepared.inv_norm_text,
            scale,
            scale_number,
            row_sums,
            column_sums,
            positives,
            **plan.tiling(chunk_start),
            **plan.parts(config),
        )

    # Later chunks add to the first one's sums, so only the first can be repeated to be timed.
    shape_class = (plan.emotions, power_of_2(plan.groups), plan.negatives)
    configs = PAIR_CONFIGS[:1] if chunk_start else PAIR_CONFIGS
    run_tuned("correlation_sums", shape_class, configs, products, launch)


def _loss(
    plan: Plan,
    prepared: _Prepared,
    row_sums: Tensor,
    column_sums: Tensor,
    positives: Tensor,
    scale: Tensor | None,
    scale_number: float,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = positives.new_empty(())
    row_lse, column_lse = (positives.new_empty(plan.people, plan.pairs) for _ in range(2))
    partial = positives.new_empty(2, plan.groups)
    run(
        positives,
        lambda: loss_kernel[(plan.groups,)](
            row_sums,
            column_sums,
            positives,
            prepared.inv_norm_visual,
            prepared.count,
            scale,
            scale_number,
            loss,
            row_lse,
            column_lse,
            partial,
            prepared.counter,
            plan.people,
            len(row_sums),
            len(column_sums),
            **plan.constants,
            num_warps=2,
        ),
    )
    return loss, row_lse, column_lse


def _fold(
    plan: Plan,
    prepared: _Prepared,
    products: Tensor,
    chunk_start: int,
    scale: Tensor | None,
    scale_number: float,
    grad: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
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
            scale,
            scale_number,
            grad,
            prepared.count,
            row_lse,
            column_lse,
            *grad_dots,
            people=plan.people,
            ROWS=power_of_2(plan.rows, least=16),
            **plan.tiling(chunk_start),
            **plan.parts(config),
        ),
    )


def _gradients(
    plan: Plan,
    prepared: _Prepared,
    sums: tuple[Tensor | None, Tensor | None],  # (groups·G·E, D)
    grad_dots: tuple[Tensor, Tensor],
    scale: Tensor | None,
    grad_scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the features, in place where they are float32, and the scale's."""
    results = []
    shape = (plan.people, plan.emotions, plan.width)
    for total in sums:
        if total is None or dtype == torch.float32:
            results.append(None if total is None else total[: plan.people * plan.emotions].view(shape))
        else:
            results.append(total.new_empty(shape, dtype=dtype))
    partial = grad_dots[0].new_empty(2, 2 * plan.people)
    run(
        partial,
        lambda: gradient_kernel[(2 * plan.people,)](
            *sums,
            *results,
            prepared.visual,
            prepared.text,
            prepared.inv_norm_visual,
            prepared.inv_norm_text,
            *grad_dots,
            scale,
            grad_scale,
            partial,
            prepared.counter,
            plan.groups,
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
