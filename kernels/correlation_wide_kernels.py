"""The walks of `correlation_pair_kernels` for more emotions than a thread can keep pairs of: a warp has one emotion.

A unit of columns is a block of individuals and GROUP emotions c, one for each warp of a program; it holds the pairs
(c, d), so that a thread keeps a few numbers for each d alone. Sums take d = c + 1, …, c + ⌊E/2⌋, round the circle of
emotions, and so each pair once. The gradient of S's columns of c needs every d: a logit is made for c and for d, and no
other program touches these columns. Warps of a program read the same rows of S, which L1 keeps for them.
"""

import triton
import triton.language as tl

from pcmecl_fast.kernels.common import LN2, LOG2E, load_scale
from pcmecl_fast.kernels.correlation_kernels import exponent_shift, pair_of
from pcmecl_fast.kernels.correlation_pair_kernels import (
    DISTINCT,
    WITHIN,
    _inverse_sum,
    _own_difference,
    _row_of,
)

TILING = ["places", "columns", "chunk_start", "own_start", "rows", "rows_per_strip", "units_per_strip"]
SIZE = tl.constexpr(128)  # pairs of a row whose sums of several warps are added up at a time


@triton.jit(do_not_specialize=TILING)
def wide_sums_kernel(
    products,  # S of the chunk, (E, rows, blocks, E, BLOCK) float32, read
    inv_norm_visual,  # (places, Q) float32: 1/|Δ| of each pair, 0 if too short, −1 where there is no pair
    inv_norm_text,  # (blocks, Q, BLOCK) float32: the same of the text
    scale,  # () of any float type, or None: then scale_number counts
    scale_number,  # float32: the logit scale
    row_sums,  # (column strips, or WITHIN groups, places, Q) float32: Σ (e^l + e^−l) along rows, written
    column_sums,  # (row strips, blocks, Q, BLOCK) float32: the same along columns, by strip of rows, written
    positives,  # (places, Q) float32: logits of the matching changes, times log2(e), written where these are
    of_warps,  # (programs, GROUP, Q) float32: workspace for a row's sums by warp; unused WITHIN
    places,  # rows' individuals, filled up to whole chunks
    columns,  # columns' individuals, filled up to whole blocks
    chunk_start,  # the chunk's first individual; where it is not 0, an earlier chunk left column sums to add to
    own_start,  # the column where it is; any number if it is not there
    rows,  # the chunk's individuals; 1 in WITHIN, where a column has its own row alone
    rows_per_strip,  # individuals that a program walks along rows
    units_per_strip,  # units of columns that it walks
    E: tl.constexpr,  # emotions
    Q: tl.constexpr,  # pairs of emotions a < b: E(E−1)/2
    KIND: tl.constexpr,  # which changes are negatives: ALL, WITHIN or DISTINCT
    BLOCK: tl.constexpr,  # columns' individuals at a time, one for each thread of a warp
    GROUP: tl.constexpr,  # columns' emotions at a time, one for each warp
    BLOCK_E: tl.constexpr,  # E rounded up to a power of two
):
    """A program owns a strip of the chunk's rows by a strip of units of columns.

    For each pair (a, b) of a row a thread makes the ⌊E/2⌋ logits of its emotion c from ⌊E/2⌋ + 1 differences of S:
    about 11 instructions and two exponentials each, which bound it. (Triton 3.6 makes −x of 0 − x, x · −1 of nothing.)
    """
    row_strip, column_strip = tl.program_id(0), tl.program_id(1)
    s = load_scale(scale, scale_number)
    shift = exponent_shift(s)
    begin = row_strip * rows_per_strip
    end = tl.minimum(begin + rows_per_strip, rows)
    groups: tl.constexpr = (E + GROUP - 1) // GROUP
    first_unit = column_strip * units_per_strip
    of_program = of_warps + (row_strip * tl.num_programs(1) + column_strip) * (GROUP * Q)
    warp = tl.arange(0, GROUP)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    of_warp = of_program + warp * Q + lane  # where lane 0 leaves sums
    nothing = tl.zeros([GROUP, BLOCK], tl.float32)
    for unit in range(first_unit, tl.minimum(first_unit + units_per_strip, columns // BLOCK * groups)):
        block, group = unit // groups, unit % groups
        j = block * BLOCK + lane
        column = products + block * (E * BLOCK) + lane
        c = group * GROUP + warp
        at_c = c % E * BLOCK
        at, inv_norms, here, sums = (), (), (), ()
        for k in tl.static_range(1, E // 2 + 1):
            d = (c + k) % E
            inv_norm = _of_pair(inv_norm_text, block, c, d, lane, E, Q, BLOCK)
            inv_norm = tl.load(inv_norm, _once(c, d, k, E), other=-1.0)
            at += (d * BLOCK,)
            # Turned round the circle a pair has the logits of the opposite change.
            inv_norms += (tl.where(inv_norm == -1.0, 0.0, tl.where(c < d, inv_norm, -inv_norm)),)
            here += (tl.where(inv_norm == -1.0, 0.0, 1.0),)
            sums += (nothing,)
        for i in range(begin, end):
            place = j if KIND == WITHIN else chunk_start + i
            own = own_start + i
            for b in range(1, E):
                row_b = column + (b * rows + i) * (E * columns)
                after_c = tl.load(row_b + at_c)
                after = ()
                for k in tl.static_range(E // 2):
                    after += (tl.load(row_b + at[k]),)
                for a in range(b):
                    pair = pair_of(a, b, E)
                    inv_norm_row = tl.load(inv_norm_visual + place * Q + pair)
                    total = nothing
                    if True if KIND == WITHIN else inv_norm_row != -1.0:
                        against = tl.where(inv_norm_row == -1.0, -float("inf"), -shift)
                        along = tl.where(j == own, against, -float("inf")) if KIND == DISTINCT else against
                        same = tl.where(c == a, b - a, tl.where(c == b, a + E - b, 0))  # the k that has the row's pair
                        factor = inv_norm_row * (s * LOG2E)
                        row_a = column + (a * rows + i) * (E * columns)
                        difference_c = (after_c - tl.load(row_a + at_c)) * factor
                        new = ()
                        for k in tl.static_range(E // 2):
                            difference = tl.fma(after[k] - tl.load(row_a + at[k]), factor, -difference_c)
                            same_way = tl.where(same == k + 1, along, against) if KIND == DISTINCT else against
                            weight = tl.exp2(tl.fma(difference, inv_norms[k], same_way))
                            weight += tl.exp2(tl.fma(difference * -1.0, inv_norms[k], against))
                            total = tl.fma(weight, here[k], total)
                            new += (sums[k] + weight,)
                        sums = new
                    if KIND == WITHIN:
                        to = row_sums + (tl.cast(group, tl.int64) * places + place) * Q + pair
                        tl.store(to, tl.sum(total, axis=0)[None, :])
                    else:
                        tl.store(of_warp + pair, tl.sum(total, axis=1)[:, None] + nothing, lane == 0)
            if KIND != WITHIN:
                to = row_sums + (tl.cast(column_strip, tl.int64) * places + place) * Q
                _add_warps(of_program, to, unit > first_unit, Q, GROUP)
            if group == 0:
                if KIND == WITHIN:
                    for b in range(1, E):
                        for a in range(b):
                            own_logit = _own_difference(column, a, b, E * columns, BLOCK) * (s * LOG2E)
                            of_text = _of_pair(inv_norm_text, block, a, b, lane, E, Q, BLOCK)
                            _store_own(positives, own_logit, inv_norm_visual, of_text, place * Q + pair_of(a, b, E))
                elif (own >= block * BLOCK) & (own < block * BLOCK + BLOCK):
                    in_block = own - block * BLOCK
                    at_own = products + i * (E * columns) + block * (E * BLOCK) + in_block
                    for b in range(1, E):
                        first = tl.arange(0, BLOCK_E)
                        first = tl.where(first < b, first, 0)
                        own_logit = _own_difference(at_own, first, b, rows * E * columns, BLOCK) * (s * LOG2E)
                        of_text = _of_pair(inv_norm_text, block, first, b, in_block, E, Q, BLOCK)
                        _store_own(positives, own_logit, inv_norm_visual, of_text, place * Q + pair_of(first, b, E))
        for k in tl.static_range(1, E // 2 + 1):
            d = (c + k) % E
            to = column_sums + tl.cast(row_strip, tl.int64) * columns * Q
            to = _of_pair(to, block, c, d, lane, E, Q, BLOCK)
            once = _once(c, d, k, E)
            tl.store(to, sums[k - 1] + tl.load(to, once & (chunk_start > 0), other=0.0), once)


@triton.jit
def _once(c, d, k, E: tl.constexpr):
    """Whether (c, d), d = (c + k) mod E, is a pair, and not one that c + k has already."""
    return (c < E) & ((2 * k < E) | (c < d))


@triton.jit
def _of_pair(values, block, c, d, lane, E: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr):
    """Where (blocks, Q, BLOCK) has the pair of c and d."""
    pair = pair_of(tl.minimum(c, d), tl.maximum(c, d), E)
    return values + tl.cast(block, tl.int64) * (Q * BLOCK) + pair * BLOCK + lane


@triton.jit
def _add_warps(of_warps, to, add, Q: tl.constexpr, GROUP: tl.constexpr):
    """Write a row's sums over all warps, (Q,), or add them."""
    tl.debug_barrier()  # other warps have stored theirs
    for start in range(0, Q, SIZE):
        pair = start + tl.arange(0, SIZE)
        values = tl.load(of_warps + tl.arange(0, GROUP)[:, None] * Q + pair[None, :], pair[None, :] < Q, other=0.0)
        total = tl.sum(values, axis=0) + tl.load(to + pair, (pair < Q) & add, other=0.0)
        tl.store(to + pair, total, pair < Q)
    tl.debug_barrier()  # the next row's sums come where these are read


@triton.jit
def _store_own(positives, logit, inv_norm_visual, inv_norm_text, at):
    """Logits of an individual's matching changes, from the products; where 1/|Δ| of the text is, and of the row."""
    tl.store(positives + at, logit * tl.load(inv_norm_visual + at) * tl.load(inv_norm_text))


@triton.jit(do_not_specialize=TILING)
def wide_fold_kernel(
    products,  # S of the chunk, (E, rows, blocks, E, BLOCK) float32, read
    grad_products,  # its gradient, (E, rows, blocks, E, BLOCK) float32, written
    inv_norm_visual,  # (places, Q) float32: 1/|Δ| of each pair, 0 if too short, −1 where there is no pair
    inv_norm_text,  # (blocks, Q, BLOCK) float32: the same of the text
    scale,  # () of any float type, or None: then scale_number counts
    scale_number,  # float32: the logit scale
    grad,  # () float32: gradient of the loss, read; or of the sum over pairs, where count is None
    count,  # () float32: pairs that are there, over which the loss is the mean; or None
    row_lse,  # (n, Q) float32: log-sum-exp of each row, read
    column_lse,  # (m, Q) float32: log-sum-exp of each column, read
    row_grad_dots,  # (column strips, or WITHIN groups, places, Q) float32: ρ along rows, written
    column_grad_dots,  # (row strips, blocks, Q, BLOCK) float32: ρ along columns, by strip of rows, written
    of_warps,  # (programs, GROUP, Q) float32: workspace for a row's ρ by warp; unused WITHIN
    places,  # rows' individuals, filled up to whole chunks
    columns,  # columns' individuals, filled up to whole blocks
    chunk_start,  # the chunk's first individual; where it is not 0, an earlier chunk left column sums to add to
    own_start,  # the column where it is; any number if it is not there
    rows,  # the chunk's individuals; 1 in WITHIN, where a column has its own row alone
    rows_per_strip,  # individuals that a program walks along rows
    units_per_strip,  # units of columns that it walks
    E: tl.constexpr,  # emotions
    Q: tl.constexpr,  # pairs of emotions a < b: E(E−1)/2
    KIND: tl.constexpr,  # which changes are negatives: ALL, WITHIN or DISTINCT
    BLOCK: tl.constexpr,  # columns' individuals at a time, one for each thread of a warp
    GROUP: tl.constexpr,  # columns' emotions at a time, one for each warp
):
    """A program owns a strip of the chunk's rows by a strip of units of columns, and the gradient of S there.

    With h[c, d] = −h[d, c] the gradients of a pair's logits by ⟨v_b − v_a, t_d − t_c⟩, row b gets −Σ_d h[c, d] for c,
    and row a the opposite; and ρ of the pair is the sum over c of this times S[b, c] − S[a, c]. About 14 instructions
    and two exponentials for each ordered pair (c, d), two of a logit, bound it.
    """
    row_strip, column_strip = tl.program_id(0), tl.program_id(1)
    s = load_scale(scale, scale_number)
    shift = exponent_shift(s)
    half_grad = 0.5 * tl.load(grad).to(tl.float32)  # of each logit, where a row's and a column's shares are 1
    if count is not None:
        half_grad /= tl.maximum(tl.load(count), 1.0)
    begin = row_strip * rows_per_strip
    end = tl.minimum(begin + rows_per_strip, rows)
    groups: tl.constexpr = (E + GROUP - 1) // GROUP
    first_unit = column_strip * units_per_strip
    of_program = of_warps + (row_strip * tl.num_programs(1) + column_strip) * (GROUP * Q)
    warp = tl.arange(0, GROUP)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    of_warp = of_program + warp * Q + lane  # where lane 0 leaves sums
    nothing = tl.zeros([GROUP, BLOCK], tl.float32)
    for unit in range(first_unit, tl.minimum(first_unit + units_per_strip, columns // BLOCK * groups)):
        block, group = unit // groups, unit % groups
        j = block * BLOCK + lane
        column = products + block * (E * BLOCK) + lane
        c = group * GROUP + warp
        is_emotion = (c < E) & (lane >= 0)
        at_c = c % E * BLOCK
        grad_column = grad_products + block * (E * BLOCK) + lane + at_c
        inv_norms, shares, dots = (), (), ()
        for d in tl.static_range(E):
            inv_norm = _of_pair(inv_norm_text, block, c, d, lane, E, Q, BLOCK)
            inv_norm = tl.load(inv_norm, is_emotion & (c != d), other=-1.0)
            is_there = inv_norm != -1.0
            inv_norm = tl.where(is_there, inv_norm, 0.0)
            lse = column_lse + j * Q + pair_of(tl.minimum(c, d), tl.maximum(c, d), E)
            inv_norms += (inv_norm,)
            # Read as a vector: a tile whose lanes read no neighbours gets another layout from Triton 3.6, and each
            # logit would be carried from one to the other.
            lse, is_there = tl.reshape(lse, [GROUP * BLOCK]), tl.reshape(is_there, [GROUP * BLOCK])
            shares += (inv_norm * tl.reshape(_inverse_sum(lse, is_there, shift), [GROUP, BLOCK]),)
            dots += (nothing,)
        for i in range(begin, end):
            place = j if KIND == WITHIN else chunk_start + i
            tl.store(grad_column + i * (E * columns), nothing, is_emotion)
            for b in range(1, E):
                row_b = column + (b * rows + i) * (E * columns)
                after_c = tl.load(row_b + at_c)
                after = _row_of(row_b, E, BLOCK)
                grad_after = nothing
                for a in range(b):
                    pair = pair_of(a, b, E)
                    inv_norm_row = tl.load(inv_norm_visual + place * Q + pair)
                    dot = nothing
                    if True if KIND == WITHIN else inv_norm_row != -1.0:
                        is_pair = inv_norm_row != -1.0
                        inv_norm_row = tl.where(is_pair, inv_norm_row, 0.0)
                        share = _inverse_sum(row_lse + place * Q + pair, is_pair, shift)
                        factor = inv_norm_row * (s * LOG2E)
                        # The d with which c makes the row's pair, or the opposite one.
                        same = tl.where((c == a) & (j != own_start + i), b, -1)
                        opposite = tl.where((c == b) & (j != own_start + i), a, -1)
                        row_a = column + (a * rows + i) * (E * columns)
                        difference_c = (after_c - tl.load(row_a + at_c)) * factor
                        total = nothing
                        new = ()
                        for d in tl.static_range(E):
                            difference = tl.fma(after[d] - tl.load(row_a + d * BLOCK), factor, -difference_c)
                            along = tl.exp2(tl.fma(difference, inv_norms[d], -shift))
                            against = tl.exp2(tl.fma(difference * -1.0, inv_norms[d], -shift))
                            if KIND == DISTINCT:
                                along = tl.where(same == d, 0.0, along)
                                against = tl.where(opposite == d, 0.0, against)
                            g = (along - against) * tl.fma(share, inv_norms[d], shares[d])
                            total -= g
                            new += (tl.fma(g, difference, dots[d]),)
                        dots = new
                        dot = total * difference_c
                        change = total * (inv_norm_row * (s * half_grad))
                        grad_after += change
                        to = grad_column + (a * rows + i) * (E * columns)
                        tl.store(to, tl.load(to, is_emotion, other=0.0) - change, is_emotion)
                    if KIND == WITHIN:
                        to = row_grad_dots + (tl.cast(group, tl.int64) * places + place) * Q + pair
                        tl.store(to, tl.sum(dot, axis=0)[None, :] * (half_grad * LN2))
                    else:
                        dot = tl.sum(dot, axis=1)[:, None] * (half_grad * LN2)
                        tl.store(of_warp + pair, dot + nothing, lane == 0)
                tl.store(grad_column + (b * rows + i) * (E * columns), grad_after, is_emotion)
            if KIND != WITHIN:
                to = row_grad_dots + (tl.cast(column_strip, tl.int64) * places + place) * Q
                _add_warps(of_program, to, unit > first_unit, Q, GROUP)
        for d in tl.static_range(E):
            to = column_grad_dots + tl.cast(row_strip, tl.int64) * columns * Q
            to = _of_pair(to, block, c, d, lane, E, Q, BLOCK)
            is_first = is_emotion & (c < d)
            before = tl.load(to, is_first & (chunk_start > 0), other=0.0)
            tl.store(to, dots[d] * (half_grad * LN2) + before, is_first)
        tl.debug_barrier()  # what follows adds to what other warps have stored
        for i in range(begin, end):
            own = own_start + i
            if (KIND == WITHIN) | ((own >= block * BLOCK) & (own < block * BLOCK + BLOCK)):
                place = j if KIND == WITHIN else chunk_start + i
                is_own = is_emotion & ((j == own) | (KIND == WITHIN))
                row_dots = row_grad_dots + tl.cast(group if KIND == WITHIN else column_strip, tl.int64) * places * Q
                column_dots = column_grad_dots + tl.cast(row_strip, tl.int64) * columns * Q
                row_c = (c % E * rows + i) * (E * columns)
                total = nothing
                for e in range(E):
                    is_other = is_own & (c != e)
                    row_e = (e * rows + i) * (E * columns)
                    of_c, of_e = column + at_c, column + e * BLOCK
                    difference = tl.load(of_c + row_c, is_other) - tl.load(of_e + row_c, is_other)
                    difference -= tl.load(of_c + row_e, is_other) - tl.load(of_e + row_e, is_other)
                    at = place * Q + pair_of(tl.minimum(c, e), tl.maximum(c, e), E) + lane * 0
                    of_row = tl.load(inv_norm_visual + at, is_other, other=-1.0)
                    of_column = tl.load(_of_pair(inv_norm_text, block, c, e, lane, E, Q, BLOCK), is_other, other=-1.0)
                    are_there = (of_row != -1.0) & (of_column != -1.0)
                    change = tl.where(are_there, of_row * of_column, 0.0) * (-2.0 * s * half_grad)
                    total += change
                    tl.store(grad_column + row_e, tl.load(grad_column + row_e, is_other) - change, is_other)
                    dot = change * difference
                    is_first = is_other & (c < e)
                    tl.store(row_dots + at, tl.load(row_dots + at, is_first) + dot, is_first)
                    at_column = _of_pair(column_dots, block, c, e, lane, E, Q, BLOCK)
                    tl.store(at_column, tl.load(at_column, is_first) + dot, is_first)
                tl.store(grad_column + row_c, tl.load(grad_column + row_c, is_own) + total, is_own)
        tl.debug_barrier()  # the next unit adds to what other threads have stored
