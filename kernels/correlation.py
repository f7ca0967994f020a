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
    gradient  minus what the norms take: Σ over pairs of ρ/|Δ|² · A Aᵀ times the features, ρ = Σ dloss/dl · l

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
import triton.language as tl
from torch import Tensor

from pcmecl_fast.kernels.common import (
    LN2,
    LOG2E,
    Config,
    counter_for,
    inverse_length,
    load_scale,
    power_of_2,
    run,
    run_tuned,
    sum_over_grid,
)

CHUNK = 16 << 20  # bytes of S at a time: a third of an H100's L2
STRIPS = 24  # programs along rows and along columns, each with its own partial sums: 576 for 132 processors
ALL, WITHIN, DISTINCT = (tl.constexpr(i) for i in range(3))
KINDS = {"all": ALL, "within": WITHIN, "distinct": DISTINCT}
PRODUCT_CONFIGS = [
    Config(warps=4, stages=3, blocks={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}),
    Config(warps=8, stages=3, blocks={"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 16}),
    Config(warps=8, stages=3, blocks={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}),
]
PAIR_CONFIGS = [
    Config(warps=8, stages=1, blocks={"PART": 16}),
    Config(warps=4, stages=1, blocks={"PART": 16}),
]
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
    def group(self) -> int:  # individuals
        return min(64 // self.pairs, 32 // self.emotions)

    @property
    def rows(self) -> int:  # of features in a group
        return self.group * self.emotions

    @property
    def groups(self) -> int:
        return triton.cdiv(self.people, self.group)

    @property
    def slots(self) -> int:  # for a group's pairs
        return power_of_2(self.group * self.pairs, least=16)

    @property
    def columns(self) -> int:  # of S
        return self.rows if self.negatives == "within" else self.groups * self.rows

    @property
    def chunk(self) -> int:  # groups
        return max(1, min(self.groups, CHUNK // (4 * self.rows * self.columns)))

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
        return {"E": self.emotions, "Q": self.pairs, "G": self.group, "SLOTS": self.slots}

    def parts(self, config: Config) -> dict[str, int | bool]:
        """A launch's options, its part of a tile no wider than the tile."""
        return {**config.options(), "PART": min(config.blocks["PART"], self.slots)}

    @property
    def tiling(self) -> dict[str, int]:
        return {
            "columns": self.columns,
            "groups": self.groups,
            "rows_per_strip": self.groups_per_row_strip,
            "columns_per_strip": self.groups_per_column_strip,
        }


@dataclass(frozen=True)
class _Prepared:
    """Features of all groups, the last one filled up with zeros."""

    visual: Tensor  # (groups·G·E, D) centred
    text: Tensor  # (groups·G·E, D) centred
    by_visual: Tensor  # (groups, slots): 1/|Δ|, 0 for a short one, −1 where there is no pair
    by_text: Tensor  # (groups, slots)
    count: Tensor  # (): pairs


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
    row_sums = visual.new_empty(plan.column_strips, plan.groups, plan.slots, dtype=torch.float32)
    column_sums = visual.new_empty(_column_slots(plan), plan.groups, plan.slots, dtype=torch.float32)
    positives = visual.new_empty(plan.groups, plan.slots, dtype=torch.float32)
    for first in range(0, plan.groups, plan.chunk):
        products = _products(plan, prepared, first)
        here = min(plan.chunk, plan.groups - first)

        def launch(config: Config, products: Tensor = products, first: int = first, here: int = here) -> None:
            _sums_kernel[(triton.cdiv(here, plan.groups_per_row_strip), plan.column_strips)](
                products,
                prepared.by_visual,
                prepared.by_text,
                scale,
                scale_number,
                row_sums,
                column_sums,
                positives,
                first,
                here,
                **plan.tiling,
                **plan.constants,
                KIND=KINDS[negatives].value,
                ADD=first > 0 and negatives != "within",
                **plan.parts(config),
            )

        # Later chunks add to the first one's sums, so only the first can be repeated to be timed.
        shape_class = (plan.emotions, power_of_2(plan.groups), negatives)
        run_tuned("correlation_sums", shape_class, PAIR_CONFIGS[:1] if first else PAIR_CONFIGS, visual, launch)
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
    row_pulls = visual.new_empty(plan.column_strips, plan.groups, plan.slots, dtype=torch.float32)
    column_pulls = visual.new_empty(_column_slots(plan), plan.groups, plan.slots, dtype=torch.float32)
    g_visual = torch.empty_like(prepared.visual) if need_visual else None
    g_text = torch.empty_like(prepared.text) if need_text else None
    for first in range(0, plan.groups, plan.chunk):
        products = _products(plan, prepared, first)
        _fold(plan, prepared, products, first, scale, scale_number, grad, row_lse, column_lse, row_pulls, column_pulls)
        _gradient_products(plan, prepared, products, first, g_visual, g_text)
    g_scale = torch.empty_like(scale) if need_scale and scale is not None else None
    return (
        *_gradients(plan, prepared, (g_visual, g_text), (row_pulls, column_pulls), scale, g_scale, visual.dtype),
        g_scale,
    )


def _has_pairs(visual: Tensor) -> bool:
    return visual.shape[0] > 0 and visual.shape[1] > 1 and visual.shape[2] > 0


def _column_slots(plan: Plan) -> int:
    # A group's columns meet its own rows alone within individuals: one program has them all.
    return 1 if plan.negatives == "within" else plan.row_strips


def _prepare(plan: Plan, visual: Tensor, text: Tensor, mask: Tensor | None) -> _Prepared:
    padded = plan.groups * plan.group
    visual_centred, text_centred = visual.new_empty(2, padded * plan.emotions, plan.width, dtype=torch.float32)
    by_visual, by_text = visual.new_empty(2, plan.groups, plan.slots, dtype=torch.float32).fill_(-1)
    count = visual.new_empty((), dtype=torch.float32)
    partial = visual.new_empty(2, 2 * padded, dtype=torch.float32)
    counter = counter_for(visual)
    run(
        visual,
        lambda: _prepare_kernel[(2 * padded,)](
            visual,
            text,
            mask,
            visual_centred,
            text_centred,
            by_visual,
            by_text,
            count,
            partial,
            counter,
            plan.people,
            **plan.constants,
            D=plan.width,
            BLOCK_E=power_of_2(plan.emotions),
            BLOCK_Q=power_of_2(plan.pairs),
            BLOCK_D=min(power_of_2(plan.width), 64),
            num_warps=4,
        ),
    )
    return _Prepared(visual_centred, text_centred, by_visual, by_text, count)


def _products(plan: Plan, prepared: _Prepared, first: int) -> Tensor:
    """S of a chunk: (groups in it · rows, columns), or of each group with itself, (groups in it, rows, rows)."""
    visual, text = _chunk_of(plan, prepared.visual, first), prepared.text
    if plan.negatives == "within":
        text = _chunk_of(plan, text, first)
        products = visual.new_empty(len(visual) // plan.rows, plan.rows, plan.rows)
        by_group = (-1, plan.rows, plan.width)
        _multiply(visual.view(by_group), text.view(by_group).mT, products)
    else:
        products = visual.new_empty(len(visual), plan.columns)
        _multiply(visual[None], text.mT[None], products[None])
    return products


def _gradient_products(
    plan: Plan, prepared: _Prepared, g_products: Tensor, first: int, g_visual: Tensor | None, g_text: Tensor | None
) -> None:
    visual, text = _chunk_of(plan, prepared.visual, first), prepared.text
    by_group = (-1, plan.rows, plan.width)
    within = plan.negatives == "within"
    if g_visual is not None:
        g_chunk = _chunk_of(plan, g_visual, first)
        if within:
            _multiply(g_products, _chunk_of(plan, text, first).view(by_group), g_chunk.view(by_group))
        else:
            _multiply(g_products[None], text[None], g_chunk[None])
    if g_text is not None:
        if within:
            _multiply(g_products.mT, visual.view(by_group), _chunk_of(plan, g_text, first).view(by_group))
        else:
            _multiply(g_products.mT[None], visual[None], g_text[None], add=first > 0)


def _chunk_of(plan: Plan, features: Tensor, first: int) -> Tensor:
    return features[first * plan.rows : (first + plan.chunk) * plan.rows]


def _multiply(
    left: Tensor,  # (batch, M, K), any strides
    right: Tensor,  # (batch, K, N), any strides
    out: Tensor,  # (batch, M, N)
    *,
    add: bool = False,
) -> None:
    """out = left · right, or out += left · right, float32 in 3xTF32."""
    batch, m, k = left.shape
    n = right.shape[2]

    def launch(config: Config) -> None:
        tiles = triton.cdiv(m, config.blocks["BLOCK_M"]) * triton.cdiv(n, config.blocks["BLOCK_N"])
        _product_kernel[(tiles, batch)](
            left, right, out, m, n, k, *left.stride(), *right.stride(), *out.stride()[:2], ADD=add, **config.options()
        )

    # Timed without adding, which would add several times over; the first chunk never adds.
    layout = (left.stride(2) == 1, right.stride(2) == 1)
    shape_class = (*(power_of_2(size) for size in (m, n, k)), layout)
    run_tuned("correlation_product", shape_class, PRODUCT_CONFIGS[:1] if add else PRODUCT_CONFIGS, left, launch)


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
    counter = counter_for(positives)
    run(
        positives,
        lambda: _loss_kernel[(plan.groups,)](
            row_sums,
            column_sums,
            positives,
            prepared.by_visual,
            prepared.count,
            scale,
            scale_number,
            loss,
            row_lse,
            column_lse,
            partial,
            counter,
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
    first: int,
    scale: Tensor | None,
    scale_number: float,
    grad: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    row_pulls: Tensor,
    column_pulls: Tensor,
) -> None:
    here = min(plan.chunk, plan.groups - first)
    run_tuned(
        "correlation_fold",
        None,
        [FOLD_CONFIG],
        products,
        lambda config: _fold_kernel[(triton.cdiv(here, plan.groups_per_row_strip), plan.column_strips)](
            products,
            prepared.by_visual,
            prepared.by_text,
            scale,
            scale_number,
            grad,
            prepared.count,
            row_lse,
            column_lse,
            row_pulls,
            column_pulls,
            first,
            here,
            plan.people,
            **plan.tiling,
            **plan.constants,
            ROWS=power_of_2(plan.rows, least=16),
            KIND=KINDS[plan.negatives].value,
            ADD=first > 0 and plan.negatives != "within",
            **plan.parts(config),
        ),
    )


def _gradients(
    plan: Plan,
    prepared: _Prepared,
    sums: tuple[Tensor | None, Tensor | None],  # (groups·G·E, D)
    pulls: tuple[Tensor, Tensor],
    scale: Tensor | None,
    g_scale: Tensor | None,
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
    partial = pulls[0].new_empty(2, 2 * plan.people)
    counter = counter_for(partial)
    run(
        partial,
        lambda: _gradient_kernel[(2 * plan.people,)](
            *sums,
            *results,
            prepared.visual,
            prepared.text,
            prepared.by_visual,
            prepared.by_text,
            *pulls,
            scale,
            g_scale,
            partial,
            counter,
            plan.groups,
            len(pulls[0]),
            len(pulls[1]),
            **plan.constants,
            D=plan.width,
            BLOCK_E=power_of_2(plan.emotions),
            BLOCK_Q=power_of_2(plan.pairs),
            BLOCK_D=min(power_of_2(plan.width), 512),
            num_warps=4,
        ),
    )
    return results[0], results[1]


@triton.jit
def _emotions_of(pair, E: tl.constexpr):
    """(a, b) with a < b of a pair's number, a changing slowest."""
    a = tl.zeros_like(pair)
    before = tl.zeros_like(pair)  # the number of the first pair that begins with a
    for begins in tl.static_range(1, E - 1):
        number = begins * (E - 1) - begins * (begins - 1) // 2
        a = tl.where(pair >= number, begins, a)
        before = tl.where(pair >= number, number, before)
    return a, pair - before + a + 1


@triton.jit
def _slot_rows(slot, E: tl.constexpr, Q: tl.constexpr, G: tl.constexpr):
    """The rows of a and of b in their group, for each slot; 0 for the slots that are left over."""
    a, b = _emotions_of(slot % Q, E)
    first = slot // Q * E
    filled = slot < G * Q
    return tl.where(filled, first + a, 0), tl.where(filled, first + b, 0)


@triton.jit
def _prepare_kernel(
    visual,
    text,
    mask,
    visual_centred,
    text_centred,
    by_visual,
    by_text,
    count,
    partial,
    counter,
    people,
    E: tl.constexpr,
    Q: tl.constexpr,
    G: tl.constexpr,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    person, is_text = tl.program_id(0) // 2, tl.program_id(0) % 2
    if is_text == 1:
        x, centred, by = text, text_centred, by_text
    else:
        x, centred, by = visual, visual_centred, by_visual
    e = tl.arange(0, BLOCK_E)
    pair = tl.arange(0, BLOCK_Q)
    a, b = _emotions_of(pair, E)
    # A row is not read, and its pairs are none, where the individual or the emotion is missing.
    here = tl.where(person < people, E, 0)
    present = e < here
    is_pair = (pair < Q) & (b < here)
    if mask is not None:
        present = tl.load(mask + person * E + e, present, other=0) != 0
        has_a = tl.load(mask + person * E + a, is_pair, other=0) != 0
        has_b = tl.load(mask + person * E + b, is_pair, other=0) != 0
        is_pair = has_a & has_b
    emotions = tl.sum(tl.where(present, 1.0, 0.0))

    square = tl.zeros([BLOCK_Q], tl.float32)
    row = tl.cast(person, tl.int64) * E
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column[None, :] < D
        at = (row + e[:, None]) * D + column[None, :]
        value = tl.load(x + at, present[:, None] & inside, other=0.0).to(tl.float32)
        mean = tl.sum(value, axis=0) / tl.maximum(emotions, 1.0)
        tl.store(centred + at, tl.where(present[:, None], value - mean[None, :], 0.0), (e[:, None] < E) & inside)
        of_a = tl.load(x + (row + a[:, None]) * D + column[None, :], is_pair[:, None] & inside, other=0.0)
        of_b = tl.load(x + (row + b[:, None]) * D + column[None, :], is_pair[:, None] & inside, other=0.0)
        change = of_b.to(tl.float32) - of_a.to(tl.float32)
        square += tl.sum(change * change, axis=1)
    slot = person // G * SLOTS + person % G * Q + pair
    tl.store(by + slot, tl.where(is_pair, inverse_length(square), -1.0), pair < Q)
    pairs = tl.sum(tl.where(is_pair, 1.0, 0.0))
    last, pairs, _ = sum_over_grid(partial, counter, tl.where(is_text == 1, 0.0, pairs), 0.0, 1024)
    if last:
        tl.store(count, pairs)


@triton.jit
def _product_kernel(
    left,
    right,
    out,
    M,
    N,
    K,
    left_batch,
    left_m,
    left_k,
    right_batch,
    right_k,
    right_n,
    out_batch,
    out_m,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    across = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tl.program_id(1)
    left += batch * left_batch
    right += batch * right_batch
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(left + m[:, None] * left_m + k[None, :] * left_k, (m[:, None] < M) & (k[None, :] < K), other=0.0)
        y = tl.load(right + k[:, None] * right_k + n[None, :] * right_n, (k[:, None] < K) & (n[None, :] < N), other=0.0)
        total = tl.dot(x, y, acc=total, input_precision="tf32x3")
    at = out + batch * out_batch + m[:, None] * out_m + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    if ADD:
        total += tl.load(at, inside, other=0.0)
    tl.store(at, total, inside)


@triton.jit
def _shift(scale):
    """K = max(0, s − 60), in units of log 2; NaN above s = 120, where one K does not serve all rows."""
    return tl.where(scale <= 120.0, tl.maximum(scale - 60.0, 0.0), float("nan")) * LOG2E


@triton.jit
def _differences(products, at_a, at_b, c, d):
    """⟨x_b − x_a, y_d − y_c⟩ on a tile of pairs."""
    after = tl.load(products + at_b[:, None] + d[None, :]) - tl.load(products + at_b[:, None] + c[None, :])
    before = tl.load(products + at_a[:, None] + d[None, :]) - tl.load(products + at_a[:, None] + c[None, :])
    return after - before


@triton.jit
def _kept(row, column, by_row, by_column, same_group, Q: tl.constexpr, KIND: tl.constexpr):
    """Which logits of a row's and a column's slots count, and which of the same way round (e^l, not e^−l) do."""
    keep = (by_row[:, None] != -1.0) & (by_column[None, :] != -1.0)
    if KIND == WITHIN:
        keep = keep & ((row // Q)[:, None] == (column // Q)[None, :])
    same_way = keep
    if KIND == DISTINCT:
        # In another group nobody is the same person.
        person = tl.where(same_group, column // Q, -1)
        same_way = keep & (((row % Q)[:, None] != (column % Q)[None, :]) | ((row // Q)[:, None] == person[None, :]))
    return keep, same_way


@triton.jit
def _sums_kernel(
    products,
    by_visual,
    by_text,
    scale,
    scale_number,
    row_sums,
    column_sums,
    positives,
    first,
    here,
    columns,
    groups,
    rows_per_strip,
    columns_per_strip,
    E: tl.constexpr,
    Q: tl.constexpr,
    G: tl.constexpr,
    SLOTS: tl.constexpr,
    KIND: tl.constexpr,
    ADD: tl.constexpr,
    PART: tl.constexpr,
):
    row_strip, column_strip = tl.program_id(0), tl.program_id(1)
    s = load_scale(scale, scale_number)
    shift = _shift(s)
    slot = tl.arange(0, SLOTS)
    a, b = _slot_rows(slot, E, Q, G)
    of_strip = groups * SLOTS
    columns_strip = 0 if KIND == WITHIN else row_strip  # within individuals a group's columns meet its own rows alone
    begin = row_strip * rows_per_strip
    for row in range(begin, tl.minimum(begin + rows_per_strip, here)):
        group = first + row
        by_row = tl.load(by_visual + group * SLOTS + slot)
        at_a, at_b = (row * G * E + a) * columns, (row * G * E + b) * columns
        total = tl.zeros([SLOTS], tl.float32)
        if KIND == WITHIN:
            from_column, to_column = group, group + 1
        else:
            from_column = column_strip * columns_per_strip
            to_column = tl.minimum(from_column + columns_per_strip, groups)
        positive = tl.zeros([SLOTS], tl.float32)
        for step in range(from_column * (SLOTS // PART), to_column * (SLOTS // PART)):
            column = step // (SLOTS // PART)
            other = step % (SLOTS // PART) * PART + tl.arange(0, PART)
            by_column = tl.load(by_text + column * SLOTS + other)
            base = 0 if KIND == WITHIN else column * G * E
            c, d = _slot_rows(other, E, Q, G)
            logit = _differences(products, at_a, at_b, base + c, base + d)
            logit = logit * (by_row * (s * LOG2E))[:, None] * by_column[None, :]
            keep, same_way = _kept(slot, other, by_row, by_column, column == group, Q, KIND)
            weight = tl.where(same_way, tl.exp2(logit - shift), 0.0) + tl.where(keep, tl.exp2(-logit - shift), 0.0)
            total += tl.sum(weight, axis=1)
            _add_up(
                column_sums + columns_strip * of_strip + column * SLOTS + other,
                tl.sum(weight, axis=0),
                KIND != WITHIN and row > begin,
                ADD,
            )
            if column == group:
                positive += tl.sum(tl.where(slot[:, None] == other[None, :], logit, 0.0), 1)
        if (from_column <= group) & (group < to_column):
            tl.store(positives + group * SLOTS + slot, positive)
        tl.store(row_sums + column_strip * of_strip + group * SLOTS + slot, total)
        tl.debug_barrier()  # the next row of groups adds to what other threads have stored


@triton.jit
def _add_up(to, of_columns, again, ADD: tl.constexpr):
    """Add a tile's column sums to those that this program, or its like of an earlier chunk, has stored."""
    if ADD or again:
        of_columns += tl.load(to)
    tl.store(to, of_columns)


@triton.jit
def _strips(sums, strips, of_strip, at):
    total = tl.load(sums + at)
    for strip in range(1, strips):
        total += tl.load(sums + strip * of_strip + at)
    return total


@triton.jit
def _loss_kernel(
    row_sums,
    column_sums,
    positives,
    by_visual,
    count,
    scale,
    scale_number,
    loss,
    row_lse,
    column_lse,
    partial,
    counter,
    people,
    column_strips,
    row_strips,
    E: tl.constexpr,
    Q: tl.constexpr,
    G: tl.constexpr,
    SLOTS: tl.constexpr,
):
    group = tl.program_id(0)
    slot = tl.arange(0, SLOTS)
    at = group * SLOTS + slot
    is_pair = tl.load(by_visual + at) != -1.0
    of_strip = tl.num_programs(0) * SLOTS
    shift = _shift(load_scale(scale, scale_number))
    rows = tl.where(is_pair, _strips(row_sums, column_strips, of_strip, at), 1.0)
    columns = tl.where(is_pair, _strips(column_sums, row_strips, of_strip, at), 1.0)
    of_row = tl.where(is_pair, (shift + tl.log2(rows)) * LN2, 0.0)
    of_column = tl.where(is_pair, (shift + tl.log2(columns)) * LN2, 0.0)
    positive = tl.where(is_pair, tl.load(positives + at) * LN2, 0.0)
    person = group * G + slot // Q
    inside = (slot < G * Q) & (person < people)
    tl.store(row_lse + person * Q + slot % Q, of_row, inside)
    tl.store(column_lse + person * Q + slot % Q, of_column, inside)
    total = tl.sum(0.5 * (of_row + of_column) - positive)
    last, total, _ = sum_over_grid(partial, counter, total, 0.0, 1024)
    if last:
        tl.store(loss, total / tl.maximum(tl.load(count), 1.0))


@triton.jit
def _fold_kernel(
    products,
    by_visual,
    by_text,
    scale,
    scale_number,
    grad,
    count,
    row_lse,
    column_lse,
    row_pulls,
    column_pulls,
    first,
    here,
    people,
    columns,
    groups,
    rows_per_strip,
    columns_per_strip,
    E: tl.constexpr,
    Q: tl.constexpr,
    G: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    ADD: tl.constexpr,
    PART: tl.constexpr,
):
    row_strip, column_strip = tl.program_id(0), tl.program_id(1)
    s = load_scale(scale, scale_number)
    shift = _shift(s)
    each = tl.load(grad).to(tl.float32) / tl.maximum(tl.load(count), 1.0)
    slot = tl.arange(0, SLOTS)
    a, b = _slot_rows(slot, E, Q, G)
    x = tl.arange(0, ROWS)
    signs_t = tl.where(x[:, None] == b[None, :], 1.0, 0.0) - tl.where(x[:, None] == a[None, :], 1.0, 0.0)
    of_strip = groups * SLOTS
    columns_strip = 0 if KIND == WITHIN else row_strip  # within individuals a group's columns meet its own rows alone
    begin = row_strip * rows_per_strip
    for row in range(begin, tl.minimum(begin + rows_per_strip, here)):
        group = first + row
        by_row = tl.load(by_visual + group * SLOTS + slot)
        of_row = _over_sum(row_lse, group, slot, shift, people, Q, G)
        at_a, at_b = (row * G * E + a) * columns, (row * G * E + b) * columns
        pull = tl.zeros([SLOTS], tl.float32)
        if KIND == WITHIN:
            from_column, to_column = group, group + 1
        else:
            from_column = column_strip * columns_per_strip
            to_column = tl.minimum(from_column + columns_per_strip, groups)
        for column in range(from_column, to_column):
            base = 0 if KIND == WITHIN else column * G * E
            folded = tl.zeros([ROWS, ROWS], tl.float32)
            for part in range(0, SLOTS, PART):
                other = part + tl.arange(0, PART)
                by_column = tl.load(by_text + column * SLOTS + other)
                of_column = _over_sum(column_lse, column, other, shift, people, Q, G)
                c, d = _slot_rows(other, E, Q, G)
                logit = (
                    _differences(products, at_a, at_b, base + c, base + d) * (by_row * s)[:, None] * by_column[None, :]
                )
                keep, same_way = _kept(slot, other, by_row, by_column, column == group, Q, KIND)
                g = tl.where(same_way, tl.exp2(logit * LOG2E - shift), 0.0)
                g -= tl.where(keep, tl.exp2(-logit * LOG2E - shift), 0.0)
                g *= (of_row[:, None] + of_column[None, :]) * (0.5 * each)
                if column == group:
                    g -= tl.where(keep & (slot[:, None] == other[None, :]), each, 0.0)
                pulls = g * logit
                pull += tl.sum(pulls, axis=1)
                of_columns = tl.sum(pulls, axis=0)
                _add_up(
                    column_pulls + columns_strip * of_strip + column * SLOTS + other,
                    of_columns,
                    KIND != WITHIN and row > begin,
                    ADD,
                )
                high, low = _two_parts(g * (by_row * s)[:, None] * by_column[None, :])
                half = tl.dot(signs_t, low, acc=tl.dot(signs_t, high, input_precision="tf32"), input_precision="tf32")
                signs = tl.where(x[None, :] == d[:, None], 1.0, 0.0) - tl.where(x[None, :] == c[:, None], 1.0, 0.0)
                high, low = _two_parts(half)
                folded = tl.dot(high, signs, acc=folded, input_precision="tf32")
                folded = tl.dot(low, signs, acc=folded, input_precision="tf32")
            tl.debug_barrier()  # all threads have read their products, whose place the gradient takes
            to = products + (row * G * E + x[:, None]) * columns + base + x[None, :]
            tl.store(to, folded, (x[:, None] < G * E) & (x[None, :] < G * E))
        tl.store(row_pulls + column_strip * of_strip + group * SLOTS + slot, pull)
        tl.debug_barrier()  # the next row of groups adds to what other threads have stored


@triton.jit
def _two_parts(x):
    """x as a sum of two numbers that TF32 holds, but for 2⁻²² of it: the signs it is multiplied by are exact there."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _over_sum(lse, group, slot, shift, people, Q: tl.constexpr, G: tl.constexpr):
    """e^K over the sum of a row's or a column's exponentials."""
    person = group * G + slot // Q
    value = tl.load(lse + person * Q + slot % Q, (slot < G * Q) & (person < people), other=0.0)
    return tl.exp2(shift - value * LOG2E)


@triton.jit
def _gradient_kernel(
    visual_sum,
    text_sum,
    g_visual,
    g_text,
    visual_centred,
    text_centred,
    by_visual,
    by_text,
    row_pulls,
    column_pulls,
    scale,
    g_scale,
    partial,
    counter,
    groups,
    column_strips,
    row_strips,
    E: tl.constexpr,
    Q: tl.constexpr,
    G: tl.constexpr,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    person = tl.program_id(0) // 2
    pair = tl.arange(0, BLOCK_Q)
    at = person // G * SLOTS + person % G * Q + pair
    of_strip = groups * SLOTS
    total = 0.0
    if tl.program_id(0) % 2 == 0:
        by = tl.load(by_visual + at, pair < Q, other=-1.0)
        pull = _pulls(row_pulls, column_strips, of_strip, at, by, pair, Q)
        total = tl.sum(pull)
        if visual_sum is not None:
            _without_pulls(
                visual_sum, g_visual, visual_centred, person, pull * by * by, E, Q, D, BLOCK_E, BLOCK_Q, BLOCK_D
            )
    else:
        if text_sum is not None:
            by = tl.load(by_text + at, pair < Q, other=-1.0)
            pull = _pulls(column_pulls, row_strips, of_strip, at, by, pair, Q)
            _without_pulls(text_sum, g_text, text_centred, person, pull * by * by, E, Q, D, BLOCK_E, BLOCK_Q, BLOCK_D)
    if g_scale is not None:
        last, total, _ = sum_over_grid(partial, counter, total, 0.0, 1024)
        if last:
            tl.store(g_scale, total / tl.load(scale).to(tl.float32))


@triton.jit
def _pulls(pulls, strips, of_strip, at, by, pair, Q: tl.constexpr):
    """ρ = Σ dloss/dl · l over a pair's row or column."""
    total = tl.zeros_like(by)
    for strip in range(strips):
        total += tl.load(pulls + strip * of_strip + at, pair < Q, other=0.0)
    return tl.where(by != -1.0, total, 0.0)


@triton.jit
def _without_pulls(
    sums,
    gradient,
    centred,
    person,
    weights,
    E: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sum of products, less each pair's weight times its change, from b and to a."""
    e = tl.arange(0, BLOCK_E)
    pair = tl.arange(0, BLOCK_Q)
    a, b = _emotions_of(pair, E)
    row = tl.cast(person, tl.int64) * E
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        at = (row + e[:, None]) * D + column[None, :]
        inside = (e[:, None] < E) & (column[None, :] < D)
        total = tl.load(sums + at, inside, other=0.0)
        for k in range(Q):
            of_a, of_b = tl.sum(tl.where(pair == k, a, 0)), tl.sum(tl.where(pair == k, b, 0))
            weight = tl.sum(tl.where(pair == k, weights, 0.0))
            change = tl.load(centred + (row + of_b) * D + column, column < D, other=0.0)
            change -= tl.load(centred + (row + of_a) * D + column, column < D, other=0.0)
            sign = tl.where(e == of_b, weight, 0.0) - tl.where(e == of_a, weight, 0.0)
            total -= sign[:, None] * change[None, :]
        tl.store(gradient + at, total, inside)
