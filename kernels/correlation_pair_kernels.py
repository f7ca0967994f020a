"""The Triton kernels of correlation_loss that walk over pairs of individuals: of sums, and of gradients.

Whatever a thread needs of its column lies BLOCK apart, so that addresses are one register and constants.
"""

import triton
import triton.language as tl

from pcmecl_fast.kernels.common import LN2, LOG2E, load_scale
from pcmecl_fast.kernels.correlation_kernels import emotions_of, exponent_shift, pair_of

TILING = ["places", "columns", "chunk_start", "own_start", "rows", "rows_per_strip", "blocks_per_strip"]
ALL, WITHIN, DISTINCT = (tl.constexpr(i) for i in range(3))


@triton.jit(do_not_specialize=TILING)
def sums_kernel(
    products,  # S of the chunk, (E, rows, blocks, E, BLOCK) float32, read
    inv_norm_visual,  # (places, Q) float32: 1/|Δ| of each pair, 0 if too short, −1 where there is no pair
    inv_norm_text,  # (blocks, Q, BLOCK) float32: the same of the text
    scale,  # () of any float type, or None: then scale_number counts
    scale_number,  # float32: the logit scale
    row_sums,  # (column strips, places, Q) float32: Σ (e^l + e^−l) along rows by strip of columns, written
    column_sums,  # (row strips, blocks, Q, BLOCK) float32: the same along columns, by strip of rows, written
    positives,  # (places, Q) float32: logits of the matching changes, times log2(e), written where these are
    places,  # rows' individuals, filled up to whole chunks
    columns,  # columns' individuals, filled up to whole blocks
    chunk_start,  # the chunk's first individual; where it is not 0, an earlier chunk left column sums to add to
    own_start,  # the column where it is; any number if it is not there
    rows,  # the chunk's individuals; 1 in WITHIN, where a column has its own row alone
    rows_per_strip,  # individuals that a program walks along rows
    blocks_per_strip,  # blocks of columns that it walks
    E: tl.constexpr,  # emotions
    Q: tl.constexpr,  # pairs of emotions a < b: E(E−1)/2
    KIND: tl.constexpr,  # which changes are negatives: ALL, WITHIN or DISTINCT
    BLOCK: tl.constexpr,  # columns' individuals at a time, one for each thread
    BLOCK_Q: tl.constexpr,  # Q rounded up to a power of two
):
    """A program, one warp, owns a strip of the chunk's rows by a strip of columns; a thread owns pairs of individuals.

    For each pair (a, b) of a row it loads T[d] = S[b, d] − S[a, d] once and makes the Q logits of its column from them:
    about 10 instructions and two exponentials each, which bound it. S lies within L2.
    """
    row_strip, column_strip = tl.program_id(0), tl.program_id(1)
    s = load_scale(scale, scale_number)
    shift = exponent_shift(s)
    begin = row_strip * rows_per_strip
    end = tl.minimum(begin + rows_per_strip, rows)
    first_block = column_strip * blocks_per_strip
    for block in range(first_block, tl.minimum(first_block + blocks_per_strip, columns // BLOCK)):
        lane = tl.arange(0, BLOCK)
        j = block * BLOCK + lane
        column = products + block * (E * BLOCK) + lane
        inv_norm_columns, sums = (), ()
        for k in tl.static_range(Q):
            inv_norm_columns += (tl.load(inv_norm_text + block * (Q * BLOCK) + k * BLOCK + lane),)
            sums += (tl.zeros([BLOCK], tl.float32),)
        present = _present(inv_norm_columns, E, Q)
        inv_norm_columns = _or_zero(inv_norm_columns, Q)
        for i in range(begin, end):
            place = j if KIND == WITHIN else chunk_start + i
            own = own_start + i
            for b in range(1, E):
                after = _row_of(column + (b * rows + i) * (E * columns), E, BLOCK)
                for a in range(b):
                    pair = pair_of(a, b, E)
                    inv_norm_row = tl.load(inv_norm_visual + place * Q + pair)
                    against = tl.where(inv_norm_row == -1.0, float("inf"), shift)
                    along = tl.where(j == own, against, float("inf")) if KIND == DISTINCT else against
                    before = column + (a * rows + i) * (E * columns)
                    differences = _differences(before, after, inv_norm_row * (s * LOG2E), E, BLOCK)
                    total = tl.zeros([BLOCK], tl.float32)
                    of_first = total
                    new = ()
                    for k in tl.static_range(Q):
                        change = (differences[_second(k, E)] - differences[_first(k, E)]) * inv_norm_columns[k]
                        same_way = tl.where(pair == k, along, against) if KIND == DISTINCT else against
                        weight = tl.exp2(change - same_way) + tl.exp2(-change - against)
                        of_first += weight * present[_second(k, E)]
                        if _second(k, E) == E - 1:  # the last pair of its first emotion
                            total += of_first * present[_first(k, E)]
                            of_first = tl.zeros([BLOCK], tl.float32)
                        new += (sums[k] + weight,)
                    sums = new
                    if KIND == WITHIN:
                        tl.store(row_sums + place * Q + pair, total)
                        logit = _own_difference(column, a, b, E * columns, BLOCK) * inv_norm_row * (s * LOG2E)
                        logit *= tl.load(inv_norm_text + block * (Q * BLOCK) + pair * BLOCK + lane)
                        tl.store(positives + place * Q + pair, logit)
                    else:
                        to = row_sums + (column_strip * places + place) * Q + pair
                        tl.store(to, tl.sum(total) + tl.load(to, block > first_block, other=0.0))
            if KIND != WITHIN:  # noqa: SIM102 - known when it is compiled, the other when it runs
                if (own >= block * BLOCK) & (own < block * BLOCK + BLOCK):
                    in_block = own - block * BLOCK
                    at = products + i * (E * columns) + block * (E * BLOCK) + in_block
                    logits = _own_differences(at, rows * E * columns, E, Q, BLOCK, BLOCK_Q) * (s * LOG2E)
                    inv_norms = inv_norm_text + block * (Q * BLOCK) + in_block
                    _store_own(positives, logits, inv_norm_visual, inv_norms, place, Q, BLOCK, BLOCK_Q)
        for k in tl.static_range(Q):
            to = column_sums + (row_strip * columns + block * BLOCK) * Q + k * BLOCK + lane
            tl.store(to, sums[k] + tl.load(to, chunk_start > 0, other=0.0))
        tl.debug_barrier()  # the next block adds to what other threads have stored


@triton.jit
def _present(inv_norms, E: tl.constexpr, Q: tl.constexpr):
    """1.0 for each emotion that has a pair, else 0.0: a pair is there where both of its emotions are."""
    present = ()
    for e in tl.static_range(E):
        most = tl.full(inv_norms[0].shape, -1.0, tl.float32)
        for k in tl.static_range(Q):
            if e == _first(k, E) or e == _second(k, E):
                most = tl.where(inv_norms[k] == -1.0, most, 1.0)
        present += (tl.maximum(most, 0.0),)
    return present


@triton.jit
def _or_zero(inv_norms, Q: tl.constexpr):
    """1/|Δ|, 0 where there is no pair."""
    values = ()
    for k in tl.static_range(Q):
        values += (tl.where(inv_norms[k] == -1.0, 0.0, inv_norms[k]),)
    return values


@triton.jit
def _row_of(at, E: tl.constexpr, BLOCK: tl.constexpr):
    """A row of S with each emotion of the columns: E tensors."""
    values = ()
    for d in tl.static_range(E):
        values += (tl.load(at + d * BLOCK),)
    return values


@triton.jit
def _differences(at, after, factor, E: tl.constexpr, BLOCK: tl.constexpr):
    """(S[b, d] − S[a, d]) · factor for each emotion d, of the rows of b, which is loaded, and of a."""
    before = _row_of(at, E, BLOCK)
    values = ()
    for d in tl.static_range(E):
        values += ((after[d] - before[d]) * factor,)
    return values


@triton.jit
def _own_difference(at, a, b, row_stride, BLOCK: tl.constexpr):
    """⟨v_b − v_a, t_b − t_a⟩ of an individual, whose column `at` points to."""
    after = tl.load(at + b * row_stride + b * BLOCK) - tl.load(at + b * row_stride + a * BLOCK)
    before = tl.load(at + a * row_stride + b * BLOCK) - tl.load(at + a * row_stride + a * BLOCK)
    return after - before


@triton.jit
def _own_differences(at, row_stride, E: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The same of every pair."""
    pair = tl.arange(0, BLOCK_Q)
    a, b = emotions_of(pair, E)
    return _own_difference(at, tl.where(pair < Q, a, 0), tl.where(pair < Q, b, 0), row_stride, BLOCK)


@triton.jit
def _store_own(
    positives,
    logits,  # (BLOCK_Q,) float32: the products of an individual's matching differences
    inv_norm_visual,
    inv_norms,  # of the individual's texts
    place,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Logits of an individual's matching changes."""
    pair = tl.arange(0, BLOCK_Q)
    logits *= tl.load(inv_norm_visual + place * Q + pair, pair < Q, other=0.0)
    logits *= tl.load(inv_norms + pair * BLOCK, pair < Q, other=0.0)
    tl.store(positives + place * Q + pair, logits, pair < Q)


@triton.constexpr_function
def _first(number, emotions):
    """The emotion a of a pair (a, b), a < b, by its number; a changes slowest."""
    a = 0
    while number >= emotions - 1 - a:
        number -= emotions - 1 - a
        a += 1
    return a


@triton.constexpr_function
def _second(number, emotions):
    """The emotion b of the same pair."""
    a = 0
    while number >= emotions - 1 - a:
        number -= emotions - 1 - a
        a += 1
    return a + 1 + number


@triton.jit(do_not_specialize=TILING)
def fold_kernel(
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
    row_grad_dots,  # (column strips, places, Q) float32: ρ along rows, by strip of columns, written
    column_grad_dots,  # (row strips, blocks, Q, BLOCK) float32: ρ along columns, by strip of rows, written
    places,  # rows' individuals, filled up to whole chunks
    columns,  # columns' individuals, filled up to whole blocks
    chunk_start,  # the chunk's first individual; where it is not 0, an earlier chunk left column sums to add to
    own_start,  # the column where it is; any number if it is not there
    rows,  # the chunk's individuals; 1 in WITHIN, where a column has its own row alone
    rows_per_strip,  # individuals that a program walks along rows
    blocks_per_strip,  # blocks of columns that it walks
    E: tl.constexpr,  # emotions
    Q: tl.constexpr,  # pairs of emotions a < b: E(E−1)/2
    KIND: tl.constexpr,  # which changes are negatives: ALL, WITHIN or DISTINCT
    BLOCK: tl.constexpr,  # columns' individuals at a time, one for each thread
):
    """A program, one warp, owns a strip of the chunk's rows by a strip of columns, as in the forward.

    With h[c, d] the gradients of a pair's logits by ⟨v_b − v_a, t_d − t_c⟩, row b gets Σ_c h[c, d] − Σ_c h[d, c] for
    each d, and row a the opposite. Row b's sums stay in registers, row a's are added to where they lie, which no other
    thread touches. About 20 instructions and two exponentials a logit bound it.
    """
    row_strip, column_strip = tl.program_id(0), tl.program_id(1)
    s = load_scale(scale, scale_number)
    shift = exponent_shift(s)
    half_grad = 0.5 * tl.load(grad).to(tl.float32)  # of each logit, where a row's and a column's shares are 1
    if count is not None:
        half_grad /= tl.maximum(tl.load(count), 1.0)
    begin = row_strip * rows_per_strip
    end = tl.minimum(begin + rows_per_strip, rows)
    first_block = column_strip * blocks_per_strip
    for block in range(first_block, tl.minimum(first_block + blocks_per_strip, columns // BLOCK)):
        lane = tl.arange(0, BLOCK)
        j = block * BLOCK + lane
        column = products + block * (E * BLOCK) + lane
        grad_column = grad_products + block * (E * BLOCK) + lane
        inv_norm_columns, shares, dots = (), (), ()
        for k in tl.static_range(Q):
            inv_norm = tl.load(inv_norm_text + block * (Q * BLOCK) + k * BLOCK + lane)
            is_there = inv_norm != -1.0
            inv_norm = tl.where(is_there, inv_norm, 0.0)
            inv_norm_columns += (inv_norm,)
            shares += (inv_norm * _inverse_sum(column_lse + j * Q + k, is_there, shift),)
            dots += (tl.zeros([BLOCK], tl.float32),)
        for i in range(begin, end):
            place = j if KIND == WITHIN else chunk_start + i
            of_own = tl.where(j == own_start + i, -2.0, 0.0) if KIND != WITHIN else tl.full([BLOCK], -2.0, tl.float32)
            nothing = ()
            for _ in tl.static_range(E):
                nothing += (tl.zeros([BLOCK], tl.float32),)
            _store_row(grad_column + i * (E * columns), nothing, E, BLOCK)
            for b in range(1, E):
                after = _row_of(column + (b * rows + i) * (E * columns), E, BLOCK)
                grad_after = nothing
                for a in range(b):
                    pair = pair_of(a, b, E)
                    inv_norm_row = tl.load(inv_norm_visual + place * Q + pair)
                    is_pair = inv_norm_row != -1.0
                    inv_norm_row = tl.where(is_pair, inv_norm_row, 0.0)
                    share = _inverse_sum(row_lse + place * Q + pair, is_pair, shift)
                    before = column + (a * rows + i) * (E * columns)
                    differences = _differences(before, after, inv_norm_row * (s * LOG2E), E, BLOCK)
                    dot = tl.zeros([BLOCK], tl.float32)
                    grads, new = nothing, ()
                    for k in tl.static_range(Q):
                        difference = differences[_second(k, E)] - differences[_first(k, E)]
                        change = difference * inv_norm_columns[k]
                        along = tl.exp2(change - shift)
                        if KIND == DISTINCT:
                            along = tl.where((pair == k) & (of_own == 0.0), 0.0, along)
                        g = (along - tl.exp2(-change - shift)) * (share * inv_norm_columns[k] + shares[k])
                        g += tl.where(pair == k, of_own, 0.0) * inv_norm_columns[k]
                        dot += g * difference
                        new += (dots[k] + g * difference,)
                        grads = (
                            grads[: _first(k, E)]  # noqa: RUF005 - Triton's tuples are added up
                            + (grads[_first(k, E)] - g,)
                            + grads[_first(k, E) + 1 : _second(k, E)]
                            + (grads[_second(k, E)] + g,)
                            + grads[_second(k, E) + 1 :]
                        )
                    dots = new
                    factor = inv_norm_row * (s * half_grad)
                    grad_after = _moved(
                        grad_column + (a * rows + i) * (E * columns), grad_after, grads, factor, E, BLOCK
                    )
                    if KIND == WITHIN:
                        tl.store(row_grad_dots + place * Q + pair, dot * (half_grad * LN2))
                    else:
                        to = row_grad_dots + (column_strip * places + place) * Q + pair
                        before = tl.load(to, block > first_block, other=0.0)
                        tl.store(to, before + tl.sum(dot) * (half_grad * LN2))
                _store_row(grad_column + (b * rows + i) * (E * columns), grad_after, E, BLOCK)
        for k in tl.static_range(Q):
            to = column_grad_dots + (row_strip * columns + block * BLOCK) * Q + k * BLOCK + lane
            total = dots[k] * (half_grad * LN2)
            tl.store(to, total + tl.load(to, chunk_start > 0, other=0.0))
        tl.debug_barrier()  # the next block adds to what other threads have stored


@triton.jit
def _inverse_sum(lse, is_there, shift):
    """e^K over the sum of a row's or a column's exponentials; 0 where it is not there."""
    return tl.where(is_there, tl.exp2(shift - tl.load(lse, is_there, other=0.0) * LOG2E), 0.0)


@triton.jit
def _moved(at, sums, grads, factor, E: tl.constexpr, BLOCK: tl.constexpr):
    """The sums and gradients times a factor, which are subtracted from the row that `at` points to."""
    new = ()
    for d in tl.static_range(E):
        change = grads[d] * factor
        tl.store(at + d * BLOCK, tl.load(at + d * BLOCK) - change)
        new += (sums[d] + change,)
    return new


@triton.jit
def _store_row(at, values, E: tl.constexpr, BLOCK: tl.constexpr):
    for d in tl.static_range(E):
        tl.store(at + d * BLOCK, values[d])
