"""The Triton kernels of correlation_loss that own individuals, or rows and columns; `correlation` says how they work.

Those that walk over pairs of individuals are in `correlation_pair_kernels`.
"""

import triton
import triton.language as tl

from pcmecl_fast.kernels.common import LN2, LOG2E, inverse_norm, load_scale, sum_over_grid

# Sizes whose divisibility no load depends on: without them a kernel is compiled once for a whole data set's chunks.
PEOPLE = ["row_people", "column_people"]
STRIPS = ["column_strips", "row_strips"]


@triton.jit(do_not_specialize=[*PEOPLE, "places", "chunk"])
def prepare_kernel(
    visual,  # (n, E, D), read
    text,  # (m, E, D), read
    mask,  # (n, E) bool or None: which emotions the rows' individuals have, read
    text_mask,  # (m, E) bool or None: which the columns' individuals have, read; None where mask is
    visual_centred,  # (chunks, E, chunk, D) float32: features less their individual's mean, written
    text_centred,  # (blocks, E, BLOCK, D) float32: the same of the text, written
    inv_norm_visual,  # (places, Q) float32: 1/|Δ| of each pair, 0 if too short, −1 where there is no pair, written
    inv_norm_text,  # (blocks, Q, BLOCK) float32: the same of the text, written
    count,  # () float32: the rows' pairs that are there, written; None where nobody asks
    partial,  # (2, programs) float32: workspace of sum_over_grid
    counter,  # () int32: 0 before and after, for sum_over_grid
    row_people,  # n
    column_people,  # m
    places,  # rows' individuals, filled up to whole chunks
    chunk,  # rows' individuals in a chunk
    E: tl.constexpr,  # emotions
    Q: tl.constexpr,  # pairs of emotions a < b: E(E−1)/2
    D: tl.constexpr,  # features
    BLOCK: tl.constexpr,  # columns' individuals in a block
    BLOCK_E: tl.constexpr,  # E rounded up to a power of two
    BLOCK_Q: tl.constexpr,  # Q rounded up to a power of two
    BLOCK_D: tl.constexpr,  # features that are worked on at a time
):
    """A program owns one side of one individual: it centres its features and measures their changes.

    Bytes bound it: E·D numbers read, and again from L1 for the changes; E·D written.
    """
    is_text = tl.program_id(0) >= places
    person = tl.program_id(0) - tl.where(is_text, places, 0)
    if is_text:
        x, people = text, column_people
        centred, step = text_centred + _first_row(person, BLOCK, E) * D, BLOCK
        inv_norm, inv_norm_step = inv_norm_text + _first_row(person, BLOCK, Q), BLOCK
    else:
        x, people = visual, row_people
        centred, step = visual_centred + _first_row(person, chunk, E) * D, chunk
        inv_norm, inv_norm_step = inv_norm_visual + tl.cast(person, tl.int64) * Q, 1
    e = tl.arange(0, BLOCK_E)
    pair = tl.arange(0, BLOCK_Q)
    a, b = emotions_of(pair, E)
    # A row is not read, and its pairs are none, where the individual or the emotion is missing.
    emotions_here = tl.where(person < people, E, 0)
    present = e < emotions_here
    is_pair = (pair < Q) & (b < emotions_here)
    if mask is not None:
        has = text_mask if is_text else mask
        present = tl.load(has + person * E + e, present, other=0) != 0
        has_a = tl.load(has + person * E + a, is_pair, other=0) != 0
        has_b = tl.load(has + person * E + b, is_pair, other=0) != 0
        is_pair = has_a & has_b
    emotions = tl.sum(tl.where(present, 1.0, 0.0))

    square = tl.zeros([BLOCK_Q], tl.float32)
    row = tl.cast(person, tl.int64) * E
    to = centred + (e.to(tl.int64) * step * D)[:, None]
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column[None, :] < D
        value = tl.load(x + (row + e[:, None]) * D + column[None, :], present[:, None] & inside, other=0.0)
        value = value.to(tl.float32)
        mean = tl.sum(value, axis=0) / tl.maximum(emotions, 1.0)
        centred_value = tl.where(present[:, None], value - mean[None, :], 0.0)
        tl.store(to + column[None, :], centred_value, (e[:, None] < E) & inside)
        at_a = tl.load(x + (row + a[:, None]) * D + column[None, :], is_pair[:, None] & inside, other=0.0)
        at_b = tl.load(x + (row + b[:, None]) * D + column[None, :], is_pair[:, None] & inside, other=0.0)
        change = at_b.to(tl.float32) - at_a.to(tl.float32)
        square += tl.sum(change * change, axis=1)
    tl.store(inv_norm + pair * inv_norm_step, tl.where(is_pair, inverse_norm(square), -1.0), pair < Q)
    if count is not None:
        pairs = tl.sum(tl.where(is_pair, 1.0, 0.0))
        last, pairs, _ = sum_over_grid(partial, counter, tl.where(is_text, 0.0, pairs), 0.0, 1024)
        if last:
            tl.store(count, pairs)


@triton.jit
def _first_row(place, chunk, E: tl.constexpr):
    """Where an individual's emotion 0 is in (chunks, E, chunk)."""
    return (tl.cast(place, tl.int64) // chunk * (E - 1)) * chunk + place


@triton.jit
def emotions_of(pair, E: tl.constexpr):
    """The emotions (a, b), a < b, of a pair's number; a changes slowest."""
    a = tl.zeros_like(pair)
    before = tl.zeros_like(pair)  # the number of the first pair that begins with a
    for begins in tl.static_range(1, E - 1):
        number = begins * (E - 1) - begins * (begins - 1) // 2
        a = tl.where(pair >= number, begins, a)
        before = tl.where(pair >= number, number, before)
    return a, pair - before + a + 1


@triton.jit
def pair_of(a, b, E: tl.constexpr):
    """The number of a pair (a, b), a < b."""
    return a * (2 * E - a - 3) // 2 + b - 1


@triton.jit
def exponent_shift(scale):
    """K = max(0, s − 60), in units of log 2; NaN above s = 120, where one K does not serve all rows."""
    return tl.where(scale <= 120.0, tl.maximum(scale - 60.0, 0.0), float("nan")) * LOG2E


@triton.jit(do_not_specialize=[*PEOPLE, *STRIPS, "places", "columns", "first", "row_programs"])
def log_sums_kernel(
    row_sums,  # (column strips, places, Q) float32, read
    column_sums,  # (row strips, blocks, Q, BLOCK) float32, read
    positives,  # (places, Q) float32: logits of the matching changes, times log2(e), read where these are
    inv_norm_visual,  # (places, Q) float32: −1 where there is no pair, read
    inv_norm_text,  # (blocks, Q, BLOCK) float32: the same of the text, read
    count,  # () float32: pairs that are there, read; or None
    scale,  # () of any float type, or None: then scale_number counts
    scale_number,  # float32: the logit scale
    row_lse,  # (n, Q) float32: log-sum-exp of each row, written
    column_lse,  # (m, Q) float32: log-sum-exp of each column, written
    positive,  # (n, Q) float32: logits of the matching changes, 0 where they are not in the rectangle, written; or None
    loss,  # () float32, written; or None
    partial,  # (2, programs) float32: workspace of sum_over_grid
    counter,  # () int32: 0 before and after, for sum_over_grid
    row_people,  # n
    column_people,  # m
    places,  # rows' individuals, filled up to whole chunks
    columns,  # columns' individuals, filled up to whole blocks
    first,  # the column that is row 0's own
    column_strips,  # strips that row sums are made of
    row_strips,  # strips that column sums are made of
    row_programs,  # programs that own rows
    Q: tl.constexpr,  # pairs of emotions
    BLOCK: tl.constexpr,  # columns' individuals in a block
    SIZE: tl.constexpr,  # rows or columns of a program
):
    """A program owns some rows, or some columns, and adds their strips up; the last one writes the loss of a square.

    The launch bounds it.
    """
    shift = exponent_shift(load_scale(scale, scale_number))
    program = tl.program_id(0)
    if program < row_programs:
        at = program * SIZE + tl.arange(0, SIZE)
        inside = at < row_people * Q
        is_pair = tl.load(inv_norm_visual + at, inside, other=-1.0) != -1.0
        lse = _log_sum(_over_strips(row_sums, at, inside, column_strips, places * Q, SIZE), is_pair, shift)
        tl.store(row_lse + at, lse, inside)
        own = at // Q + first
        is_own = is_pair & (own >= 0) & (own < column_people)
        is_own &= tl.load(inv_norm_text + _first_row(own, BLOCK, Q) + at % Q * BLOCK, is_own, other=-1.0) != -1.0
        logit = tl.load(positives + at, is_own, other=0.0) * LN2
        if positive is not None:
            tl.store(positive + at, logit, inside)
        total = tl.sum(0.5 * lse - logit) if loss is not None else 0.0
    else:
        at = (program - row_programs) * SIZE + tl.arange(0, SIZE)
        pair, column = at // BLOCK % Q, at // (BLOCK * Q) * BLOCK + at % BLOCK
        inside = column < column_people
        is_pair = tl.load(inv_norm_text + at, inside, other=-1.0) != -1.0
        lse = _log_sum(_over_strips(column_sums, at, inside, row_strips, columns * Q, SIZE), is_pair, shift)
        tl.store(column_lse + column * Q + pair, lse, inside)
        total = tl.sum(0.5 * lse) if loss is not None else 0.0
    if loss is not None:
        last, total, _ = sum_over_grid(partial, counter, total, 0.0, 1024)
        if last:
            tl.store(loss, total / tl.maximum(tl.load(count), 1.0))


@triton.jit
def _over_strips(sums, at, inside, strips, stride, BLOCK: tl.constexpr):
    """The sums at some places over all strips, eight of which are on their way at a time."""
    total = tl.zeros([8, BLOCK], tl.float32)
    for begin in range(0, strips, 8):
        strip = begin + tl.arange(0, 8)[:, None]
        total += tl.load(sums + strip * stride + at[None, :], inside[None, :] & (strip < strips), other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _log_sum(total, is_pair, shift):
    """ln of the sums: −∞ where nothing was added up, 0 where there is no pair."""
    return tl.where(is_pair, (shift + tl.log2(tl.where(is_pair, total, 1.0))) * LN2, 0.0)


@triton.jit(do_not_specialize=["row_people", *STRIPS, "places", "columns", "chunk", "emotions"])
def gradient_kernel(
    visual_sum,  # (chunks, E, chunk, D) float32 or None: dS T, read
    text_sum,  # (blocks, E, BLOCK, D) float32 or None: dSᵀ V, read
    grad_visual,  # (n, E, D) or None, written
    grad_text,  # (m, E, D) or None, written
    visual_centred,  # (chunks, E, chunk, D) float32: features less their individual's mean
    text_centred,  # (blocks, E, BLOCK, D) float32: the same of the text
    inv_norm_visual,  # (places, Q) float32: 1/|Δ| of each pair, 0 if too short, −1 where there is no pair
    inv_norm_text,  # (blocks, Q, BLOCK) float32: the same of the text
    row_grad_dots,  # (column strips, places, Q) float32: ρ along rows, by strip of columns, read; WIDE leaves weights
    column_grad_dots,  # (row strips, blocks, Q, BLOCK) float32: ρ along columns, by strip of rows, the same
    scale,  # () of any float type, or None: then scale_number counts
    grad_scale,  # () or None: the scale's gradient, written
    partial,  # (2, programs) float32: workspace of sum_over_grid
    counter,  # () int32: 0 before and after, for sum_over_grid
    row_people,  # n
    places,  # rows' individuals, filled up to whole chunks
    columns,  # columns' individuals, filled up to whole blocks
    chunk,  # rows' individuals in a chunk
    column_strips,  # strips that row sums are made of
    row_strips,  # strips that column sums are made of
    emotions,  # E, as the length of a loop that the compiler must not write out, which spills; None unless WIDE
    E: tl.constexpr,  # emotions
    Q: tl.constexpr,  # pairs of emotions a < b: E(E−1)/2
    D: tl.constexpr,  # features
    BLOCK: tl.constexpr,  # columns' individuals in a block
    BLOCK_E: tl.constexpr,  # E rounded up to a power of two
    BLOCK_Q: tl.constexpr,  # Q rounded up to a power of two
    BLOCK_D: tl.constexpr,  # features that are worked on at a time
    WIDE: tl.constexpr,  # whether emotions are so many that each one's pairs are taken together
):
    """A program owns one side of one individual and subtracts from its gradient what goes through the norms.

    Bytes bound it: 2·E·D numbers read, the features once for each pair, or WIDE emotion, from L1; E·D written.
    """
    pair = tl.arange(0, BLOCK_Q)
    total = 0.0
    if tl.program_id(0) < row_people:
        place = tl.program_id(0)
        inv_norm = tl.load(inv_norm_visual + place * Q + pair, pair < Q, other=-1.0)
        grad_dot = _over_strips(row_grad_dots, place * Q + pair, pair < Q, column_strips, places * Q, BLOCK_Q)
        grad_dot = tl.where(inv_norm != -1.0, grad_dot, 0.0)
        total = tl.sum(grad_dot)
        if visual_sum is not None and WIDE:
            weights = row_grad_dots + place * Q
            tl.store(weights + pair, grad_dot * inv_norm * inv_norm, pair < Q)
            _subtract_norm_gradient_by_emotion(
                visual_sum + _first_row(place, chunk, E) * D,
                grad_visual + tl.cast(place, tl.int64) * (E * D),
                visual_centred + _first_row(place, chunk, E) * D,
                chunk,
                weights,
                1,
                emotions,
                E,
                D,
                BLOCK_E,
                BLOCK_D,
            )
        elif visual_sum is not None:
            _subtract_norm_gradient(
                visual_sum + _first_row(place, chunk, E) * D,
                grad_visual + tl.cast(place, tl.int64) * (E * D),
                visual_centred + _first_row(place, chunk, E) * D,
                chunk,
                grad_dot * inv_norm * inv_norm,
                E,
                Q,
                D,
                BLOCK_E,
                BLOCK_Q,
                BLOCK_D,
            )
    else:
        if text_sum is not None:
            place = tl.program_id(0) - row_people
            at = _first_row(place, BLOCK, Q) + pair * BLOCK
            inv_norm = tl.load(inv_norm_text + at, pair < Q, other=-1.0)
            grad_dot = _over_strips(column_grad_dots, at, pair < Q, row_strips, columns * Q, BLOCK_Q)
            grad_dot = tl.where(inv_norm != -1.0, grad_dot, 0.0)
            if WIDE:
                tl.store(column_grad_dots + at, grad_dot * inv_norm * inv_norm, pair < Q)
                _subtract_norm_gradient_by_emotion(
                    text_sum + _first_row(place, BLOCK, E) * D,
                    grad_text + tl.cast(place, tl.int64) * (E * D),
                    text_centred + _first_row(place, BLOCK, E) * D,
                    BLOCK,
                    column_grad_dots + _first_row(place, BLOCK, Q),
                    BLOCK,
                    emotions,
                    E,
                    D,
                    BLOCK_E,
                    BLOCK_D,
                )
            else:
                _subtract_norm_gradient(
                    text_sum + _first_row(place, BLOCK, E) * D,
                    grad_text + tl.cast(place, tl.int64) * (E * D),
                    text_centred + _first_row(place, BLOCK, E) * D,
                    BLOCK,
                    grad_dot * inv_norm * inv_norm,
                    E,
                    Q,
                    D,
                    BLOCK_E,
                    BLOCK_Q,
                    BLOCK_D,
                )
    if grad_scale is not None:
        last, total, _ = sum_over_grid(partial, counter, total, 0.0, 1024)
        if last:
            tl.store(grad_scale, total / tl.load(scale).to(tl.float32))


@triton.jit
def _subtract_norm_gradient(
    sums,  # the individual's of emotion 0, (D,) float32, read
    gradient,  # the individual's, (E, D), written
    centred,  # its features of emotion 0, (D,) float32, read
    step,  # how many rows of D further the next emotion is, of sums and features
    weights,  # (BLOCK_Q,) float32: ρ/|Δ|² of each pair
    E: tl.constexpr,  # emotions
    Q: tl.constexpr,  # pairs of emotions a < b: E(E−1)/2
    D: tl.constexpr,  # features
    BLOCK_E: tl.constexpr,  # E rounded up to a power of two
    BLOCK_Q: tl.constexpr,  # Q rounded up to a power of two
    BLOCK_D: tl.constexpr,  # features that are worked on at a time
):
    """The sum of products, less each pair's weight times its change, from b and to a."""
    e = tl.arange(0, BLOCK_E)
    pair = tl.arange(0, BLOCK_Q)
    a, b = emotions_of(pair, E)
    row = e.to(tl.int64) * step
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = (e[:, None] < E) & (column[None, :] < D)
        total = tl.load(sums + row[:, None] * D + column[None, :], inside, other=0.0)
        for k in range(Q):
            row_a, row_b = tl.sum(tl.where(pair == k, a, 0)), tl.sum(tl.where(pair == k, b, 0))
            weight = tl.sum(tl.where(pair == k, weights, 0.0))
            change = tl.load(centred + tl.cast(row_b, tl.int64) * step * D + column, column < D, other=0.0)
            change -= tl.load(centred + tl.cast(row_a, tl.int64) * step * D + column, column < D, other=0.0)
            sign = tl.where(e == row_b, weight, 0.0) - tl.where(e == row_a, weight, 0.0)
            total -= sign[:, None] * change[None, :]
        tl.store(gradient + e[:, None] * D + column[None, :], total, inside)


@triton.jit
def _subtract_norm_gradient_by_emotion(
    sums,  # the individual's of emotion 0, (D,) float32, read
    gradient,  # the individual's, (E, D), written
    centred,  # its features of emotion 0, (D,) float32, read
    step,  # how many rows of D further the next emotion is, of sums and features
    weights,  # (Q,) float32: ρ/|Δ|² of each pair, read; this program has stored them
    weights_step,  # how much further the next pair's is
    emotions,  # E
    E: tl.constexpr,  # emotions
    D: tl.constexpr,  # features
    BLOCK_E: tl.constexpr,  # E rounded up to a power of two
    BLOCK_D: tl.constexpr,  # features that are worked on at a time
):
    """The same, as the product with a matrix of emotions: its columns, made of all pairs of one, times rows."""
    tl.debug_barrier()  # other threads have stored weights
    e = tl.arange(0, BLOCK_E)
    row = e.to(tl.int64) * step
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = (e[:, None] < E) & (column[None, :] < D)
        total = tl.load(sums + row[:, None] * D + column[None, :], inside, other=0.0)
        for other in range(emotions):
            pair = pair_of(tl.minimum(e, other), tl.maximum(e, other), E)
            weight = tl.load(weights + pair * weights_step, (e < E) & (e != other), other=0.0)
            weight = tl.where(e == other, -tl.sum(weight), weight)
            feature = tl.load(centred + tl.cast(other, tl.int64) * step * D + column, column < D, other=0.0)
            total += weight[:, None] * feature[None, :]
        tl.store(gradient + e[:, None] * D + column[None, :], total, inside)
