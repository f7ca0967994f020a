"""The Triton kernels of correlation_loss and what they are made of; `correlation` says how they work together."""

import triton
import triton.language as tl

from pcmecl_fast.kernels.common import LN2, LOG2E, inverse_norm, load_scale, sum_over_grid

# Sizes whose divisibility no load depends on: without them a kernel is compiled once for a whole data set's chunks.
PEOPLE = ["row_people", "column_people"]
GROUPS = ["row_groups", "column_groups"]
STRIPS = ["column_strips", "row_strips"]
TILING = [*GROUPS, "chunk_start", "own_start", "chunk_groups", "rows_per_strip", "columns_per_strip"]
ALL, WITHIN, DISTINCT = (tl.constexpr(i) for i in range(3))


@triton.jit(do_not_specialize=[*PEOPLE, "row_groups", "lead"])
def prepare_kernel(
    visual,  # (n, E, D), read
    text,  # (m, E, D), read
    mask,  # (n, E) bool or None: which emotions the rows' individuals have, read
    text_mask,  # (m, E) bool or None: which the columns' individuals have, read; None where mask is
    visual_centred,  # (row_groups·G·E, D) float32: features less their individual's mean, written
    text_centred,  # (column_groups·G·E, D) float32: the same of the text, written
    inv_norm_visual,  # (row_groups, SLOTS) float32: 1/|Δ| of each pair, written; −1 before, and where there is no pair
    inv_norm_text,  # (column_groups, SLOTS) float32: the same of the text, written
    count,  # () float32: the rows' pairs that are there, written; None where nobody asks
    partial,  # (2, programs) float32: workspace of sum_over_grid
    counter,  # () int32: 0 before and after, for sum_over_grid
    row_people,  # n
    column_people,  # m
    row_groups,  # groups of rows, the first one after `lead` empty places
    lead,  # places before the first row
    E: tl.constexpr,  # emotions
    Q: tl.constexpr,  # pairs of emotions a < b: E(E−1)/2
    G: tl.constexpr,  # individuals in a group
    SLOTS: tl.constexpr,  # room for a group's pairs, a power of two
    D: tl.constexpr,  # features
    BLOCK_E: tl.constexpr,  # E rounded up to a power of two
    BLOCK_Q: tl.constexpr,  # Q rounded up to a power of two
    BLOCK_D: tl.constexpr,  # features that are worked on at a time
):
    """A program owns one side of one individual: it centres its features and measures their changes.

    Bytes bound it: E·D numbers read, and again from L1 for the changes; E·D written.
    """
    is_text = tl.program_id(0) >= row_groups * G
    if is_text:
        x, centred, inv_norm = text, text_centred, inv_norm_text
    else:
        x, centred, inv_norm = visual, visual_centred, inv_norm_visual
    place = tl.program_id(0) - tl.where(is_text, row_groups * G, 0)
    person = place - tl.where(is_text, 0, lead)
    people = tl.where(is_text, column_people, row_people)
    e = tl.arange(0, BLOCK_E)
    pair = tl.arange(0, BLOCK_Q)
    a, b = _emotions_of(pair, E)
    # A row is not read, and its pairs are none, where the individual or the emotion is missing.
    emotions_here = tl.where((person >= 0) & (person < people), E, 0)
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
    centred += tl.cast(place - person, tl.int64) * E * D
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column[None, :] < D
        offset = (row + e[:, None]) * D + column[None, :]
        value = tl.load(x + offset, present[:, None] & inside, other=0.0).to(tl.float32)
        mean = tl.sum(value, axis=0) / tl.maximum(emotions, 1.0)
        tl.store(centred + offset, tl.where(present[:, None], value - mean[None, :], 0.0), (e[:, None] < E) & inside)
        at_a = tl.load(x + (row + a[:, None]) * D + column[None, :], is_pair[:, None] & inside, other=0.0)
        at_b = tl.load(x + (row + b[:, None]) * D + column[None, :], is_pair[:, None] & inside, other=0.0)
        change = at_b.to(tl.float32) - at_a.to(tl.float32)
        square += tl.sum(change * change, axis=1)
    slot = place // G * SLOTS + place % G * Q + pair
    tl.store(inv_norm + slot, tl.where(is_pair, inverse_norm(square), -1.0), pair < Q)
    if count is not None:
        pairs = tl.sum(tl.where(is_pair, 1.0, 0.0))
        last, pairs, _ = sum_over_grid(partial, counter, tl.where(is_text, 0.0, pairs), 0.0, 1024)
        if last:
            tl.store(count, pairs)


@triton.jit(do_not_specialize=TILING)
def sums_kernel(
    products,  # S of the chunk, (chunk_groups·G·E, columns) float32, rows row_stride apart, read
    inv_norm_visual,  # (row_groups, SLOTS) float32: 1/|Δ| of each pair, 0 if too short, −1 where there is no pair
    inv_norm_text,  # (column_groups, SLOTS) float32: the same of the text
    scale,  # () of any float type, or None: then scale_number counts
    scale_number,  # float32: the logit scale
    row_sums,  # (column strips, row_groups, SLOTS) float32: Σ (e^l + e^−l) along rows by strip of columns, written
    column_sums,  # (row strips, column_groups, SLOTS) float32: the same along columns, by strip of rows, written
    positives,  # (row_groups, SLOTS) float32: logits of the matching changes, times log2(e), written where these are
    chunk_start,  # the chunk's first group of rows
    own_start,  # the group of columns where its individuals are, in the same places; any number if it is not there
    chunk_groups,  # groups in the chunk
    row_stride,  # of S, whose columns are those of all groups, or of one in WITHIN
    row_groups,  # groups of rows, the first and the last one filled up
    column_groups,  # groups of columns, the last one filled up
    rows_per_strip,  # groups that a program walks along rows
    columns_per_strip,  # groups that it walks along columns
    E: tl.constexpr,  # emotions
    Q: tl.constexpr,  # pairs of emotions a < b: E(E−1)/2
    G: tl.constexpr,  # individuals in a group
    SLOTS: tl.constexpr,  # room for a group's pairs, a power of two
    KIND: tl.constexpr,  # which changes are negatives: ALL, WITHIN or DISTINCT
    ADD: tl.constexpr,  # whether an earlier chunk left column sums to add to
    PART: tl.constexpr,  # columns of a tile that are worked on at a time
):
    """A program owns a strip of the chunk's rows by a strip of columns, and walks over its tiles of two groups each.

    A tile's logits are gathered from S, (G·E)² numbers within L2, and never stored: about 20 operations and two
    exponentials for each of SLOTS², which bound it.
    """
    row_strip, column_strip = tl.program_id(0), tl.program_id(1)
    s = load_scale(scale, scale_number)
    shift = _exponent_shift(s)
    slot = tl.arange(0, SLOTS)
    a, b = _slot_rows(slot, E, Q, G)
    # Within individuals a group's columns meet its own rows alone.
    column_sums_strip = 0 if KIND == WITHIN else row_strip
    begin = row_strip * rows_per_strip
    for row in range(begin, tl.minimum(begin + rows_per_strip, chunk_groups)):
        group, own = chunk_start + row, own_start + row
        inv_norm_row = tl.load(inv_norm_visual + group * SLOTS + slot)
        at_a, at_b = (row * G * E + a) * row_stride, (row * G * E + b) * row_stride
        total = tl.zeros([SLOTS], tl.float32)
        if KIND == WITHIN:
            first_column, end_column = own, own + 1
        else:
            first_column = column_strip * columns_per_strip
            end_column = tl.minimum(first_column + columns_per_strip, column_groups)
        positive = tl.zeros([SLOTS], tl.float32)
        for step in range(first_column * (SLOTS // PART), end_column * (SLOTS // PART)):
            column = step // (SLOTS // PART)
            other = step % (SLOTS // PART) * PART + tl.arange(0, PART)
            inv_norm_column = tl.load(inv_norm_text + column * SLOTS + other)
            base = 0 if KIND == WITHIN else column * G * E
            c, d = _slot_rows(other, E, Q, G)
            logit = _differences(products, at_a, at_b, base + c, base + d)
            logit = logit * (inv_norm_row * (s * LOG2E))[:, None] * inv_norm_column[None, :]
            keep, same_way = _kept(slot, other, inv_norm_row, inv_norm_column, column == own, Q, KIND)
            weight = tl.where(same_way, tl.exp2(logit - shift), 0.0) + tl.where(keep, tl.exp2(-logit - shift), 0.0)
            total += tl.sum(weight, axis=1)
            _accumulate(
                column_sums + (column_sums_strip * column_groups + column) * SLOTS + other,
                tl.sum(weight, axis=0),
                KIND != WITHIN and row > begin,
                ADD,
            )
            if column == own:
                positive += tl.sum(tl.where(slot[:, None] == other[None, :], logit, 0.0), 1)
        if (first_column <= own) & (own < end_column):
            tl.store(positives + group * SLOTS + slot, positive)
        tl.store(row_sums + (column_strip * row_groups + group) * SLOTS + slot, total)
        tl.debug_barrier()  # the next row of groups adds to what other threads have stored


@triton.jit
def _slot_rows(slot, E: tl.constexpr, Q: tl.constexpr, G: tl.constexpr):
    """The rows of a and of b in their group, for each slot; 0 for unused slots."""
    a, b = _emotions_of(slot % Q, E)
    first_row = slot // Q * E
    filled = slot < G * Q
    return tl.where(filled, first_row + a, 0), tl.where(filled, first_row + b, 0)


@triton.jit
def _emotions_of(pair, E: tl.constexpr):
    """The emotions (a, b), a < b, of a pair's number; a changes slowest."""
    a = tl.zeros_like(pair)
    before = tl.zeros_like(pair)  # the number of the first pair that begins with a
    for begins in tl.static_range(1, E - 1):
        number = begins * (E - 1) - begins * (begins - 1) // 2
        a = tl.where(pair >= number, begins, a)
        before = tl.where(pair >= number, number, before)
    return a, pair - before + a + 1


@triton.jit
def _exponent_shift(scale):
    """K = max(0, s − 60), in units of log 2; NaN above s = 120, where one K does not serve all rows."""
    return tl.where(scale <= 120.0, tl.maximum(scale - 60.0, 0.0), float("nan")) * LOG2E


@triton.jit
def _differences(products, at_a, at_b, c, d):
    """⟨x_b − x_a, y_d − y_c⟩ on a tile of pairs."""
    after = tl.load(products + at_b[:, None] + d[None, :]) - tl.load(products + at_b[:, None] + c[None, :])
    before = tl.load(products + at_a[:, None] + d[None, :]) - tl.load(products + at_a[:, None] + c[None, :])
    return after - before


@triton.jit
def _kept(row, column, inv_norm_row, inv_norm_column, same_group, Q: tl.constexpr, KIND: tl.constexpr):
    """Which logits of a row's and a column's slots count, and which of the same way round (e^l, not e^−l) do."""
    keep = (inv_norm_row[:, None] != -1.0) & (inv_norm_column[None, :] != -1.0)
    if KIND == WITHIN:
        keep = keep & ((row // Q)[:, None] == (column // Q)[None, :])
    same_way = keep
    if KIND == DISTINCT:
        # In another group nobody is the same person.
        person = tl.where(same_group, column // Q, -1)
        same_way = keep & (((row % Q)[:, None] != (column % Q)[None, :]) | ((row // Q)[:, None] == person[None, :]))
    return keep, same_way


@triton.jit
def _accumulate(target, column_sum, add, ADD: tl.constexpr):
    """Add a tile's column sums to those stored before by this program, or by its counterpart of an earlier chunk."""
    if ADD or add:
        column_sum += tl.load(target)
    tl.store(target, column_sum)


@triton.jit(do_not_specialize=["people", *STRIPS])
def loss_kernel(
    row_sums,  # (column strips, groups, SLOTS) float32, read
    column_sums,  # (row strips, groups, SLOTS) float32, read
    positives,  # (groups, SLOTS) float32: logits of the matching changes, times log2(e), read
    inv_norm_visual,  # (groups, SLOTS) float32: −1 where there is no pair, read
    count,  # () float32: pairs that are there, read
    scale,  # () of any float type, or None: then scale_number counts
    scale_number,  # float32: the logit scale
    loss,  # () float32, written
    row_lse,  # (N, Q) float32: log-sum-exp of each row, written
    column_lse,  # (N, Q) float32: log-sum-exp of each column, written
    partial,  # (2, programs) float32: workspace of sum_over_grid
    counter,  # () int32: 0 before and after, for sum_over_grid
    people,  # N, of rows and of columns: the same
    column_strips,  # strips that row sums are made of
    row_strips,  # strips that column sums are made of
    E: tl.constexpr,  # emotions
    Q: tl.constexpr,  # pairs of emotions a < b: E(E−1)/2
    G: tl.constexpr,  # individuals in a group
    SLOTS: tl.constexpr,  # room for a group's pairs, a power of two
):
    """A program owns a group: it adds its strips up, and the last program writes the loss. The launch bounds it."""
    group, groups = tl.program_id(0), tl.num_programs(0)
    slot = tl.arange(0, SLOTS)
    is_pair = tl.load(inv_norm_visual + group * SLOTS + slot) != -1.0
    shift = _exponent_shift(load_scale(scale, scale_number))
    lse_row = _log_sum(row_sums, column_strips, groups, group, slot, is_pair, shift, SLOTS)
    lse_column = _log_sum(column_sums, row_strips, groups, group, slot, is_pair, shift, SLOTS)
    positive = tl.where(is_pair, tl.load(positives + group * SLOTS + slot) * LN2, 0.0)
    at, inside = _in_table(group, slot, 0, people, Q, G)
    tl.store(row_lse + at, lse_row, inside)
    tl.store(column_lse + at, lse_column, inside)
    total = tl.sum(0.5 * (lse_row + lse_column) - positive)
    last, total, _ = sum_over_grid(partial, counter, total, 0.0, 1024)
    if last:
        tl.store(loss, total / tl.maximum(tl.load(count), 1.0))


@triton.jit(do_not_specialize=[*PEOPLE, *GROUPS, *STRIPS, "lead", "own_start"])
def log_sums_kernel(
    row_sums,  # (column strips, row_groups, SLOTS) float32, read
    column_sums,  # (row strips, column_groups, SLOTS) float32, read
    positives,  # (row_groups, SLOTS) float32: logits of the matching changes, times log2(e), read where these are
    inv_norm_visual,  # (row_groups, SLOTS) float32: −1 where there is no pair, read
    inv_norm_text,  # (column_groups, SLOTS) float32: the same of the text, read
    scale,  # () of any float type, or None: then scale_number counts
    scale_number,  # float32: the logit scale
    row_lse,  # (n, Q) float32: log-sum-exp of each row, written
    column_lse,  # (m, Q) float32: log-sum-exp of each column, written
    positive,  # (n, Q) float32: logits of the matching changes, 0 where they are not in the rectangle, written
    row_people,  # n
    column_people,  # m
    row_groups,  # groups of rows, the first one after `lead` empty places
    column_groups,  # groups of columns
    lead,  # places before the first row
    own_start,  # the group of columns where the individuals of the rows' first group are
    column_strips,  # strips that row sums are made of
    row_strips,  # strips that column sums are made of
    E: tl.constexpr,  # emotions
    Q: tl.constexpr,  # pairs of emotions a < b: E(E−1)/2
    G: tl.constexpr,  # individuals in a group
    SLOTS: tl.constexpr,  # room for a group's pairs, a power of two
):
    """A program owns a group of a rectangle's rows or of its columns and adds its strips up. The launch bounds it."""
    shift = _exponent_shift(load_scale(scale, scale_number))
    slot = tl.arange(0, SLOTS)
    group = tl.program_id(0)
    if group < row_groups:
        is_pair = tl.load(inv_norm_visual + group * SLOTS + slot) != -1.0
        lse = _log_sum(row_sums, column_strips, row_groups, group, slot, is_pair, shift, SLOTS)
        at, inside = _in_table(group, slot, lead, row_people, Q, G)
        tl.store(row_lse + at, lse, inside)
        own = own_start + group
        is_own = is_pair & (own >= 0) & (own < column_groups)
        is_own &= tl.load(inv_norm_text + own * SLOTS + slot, is_own, other=-1.0) != -1.0
        tl.store(positive + at, tl.load(positives + group * SLOTS + slot, is_own, other=0.0) * LN2, inside)
    else:
        column = group - row_groups
        is_pair = tl.load(inv_norm_text + column * SLOTS + slot) != -1.0
        lse = _log_sum(column_sums, row_strips, column_groups, column, slot, is_pair, shift, SLOTS)
        at, inside = _in_table(column, slot, 0, column_people, Q, G)
        tl.store(column_lse + at, lse, inside)


@triton.jit
def _log_sum(sums, strips, groups, group, slot, is_pair, shift, SLOTS: tl.constexpr):
    """ln of a group's sums over all strips: −∞ where nothing was added up, 0 where there is no pair."""
    offset = group * SLOTS + slot
    total = tl.load(sums + offset)
    for strip in range(1, strips):
        total += tl.load(sums + strip * (groups * SLOTS) + offset)
    return tl.where(is_pair, (shift + tl.log2(tl.where(is_pair, total, 1.0))) * LN2, 0.0)


@triton.jit
def _in_table(group, slot, lead, people, Q: tl.constexpr, G: tl.constexpr):
    """Where a group's slots lie in a table (people, Q), and which of them do."""
    at = (group * G - lead) * Q + slot
    return at, (slot < G * Q) & (at >= 0) & (at < people * Q)


@triton.jit(do_not_specialize=[*TILING, "lead"])
def fold_kernel(
    products,  # S of the chunk, (chunk_groups·G·E, columns) float32, rows row_stride apart: replaced by its gradient
    inv_norm_visual,  # (row_groups, SLOTS) float32: 1/|Δ| of each pair, 0 if too short, −1 where there is no pair
    inv_norm_text,  # (column_groups, SLOTS) float32: the same of the text
    scale,  # () of any float type, or None: then scale_number counts
    scale_number,  # float32: the logit scale
    grad,  # () float32: gradient of the loss, read; or of the sum over pairs, where count is None
    count,  # () float32: pairs that are there, over which the loss is the mean; or None
    row_lse,  # (n, Q) float32: log-sum-exp of each row, read
    column_lse,  # (m, Q) float32: log-sum-exp of each column, read
    row_grad_dots,  # (column strips, row_groups, SLOTS) float32: ρ along rows, by strip of columns, written
    column_grad_dots,  # (row strips, column_groups, SLOTS) float32: ρ along columns, by strip of rows, written
    lead,  # places before the first row
    chunk_start,  # the chunk's first group of rows
    own_start,  # the group of columns where its individuals are, in the same places; any number if it is not there
    chunk_groups,  # groups in the chunk
    row_stride,  # of S, whose columns are those of all groups, or of one in WITHIN
    row_groups,  # groups of rows, the first and the last one filled up
    column_groups,  # groups of columns, the last one filled up
    rows_per_strip,  # groups that a program walks along rows
    columns_per_strip,  # groups that it walks along columns
    E: tl.constexpr,  # emotions
    Q: tl.constexpr,  # pairs of emotions a < b: E(E−1)/2
    G: tl.constexpr,  # individuals in a group
    SLOTS: tl.constexpr,  # room for a group's pairs, a power of two
    ROWS: tl.constexpr,  # G·E rounded up to a power of two
    KIND: tl.constexpr,  # which changes are negatives: ALL, WITHIN or DISTINCT
    ADD: tl.constexpr,  # whether an earlier chunk left column sums to add to
    PART: tl.constexpr,  # columns of a tile that are worked on at a time
):
    """A program owns a strip of the chunk's rows by a strip of columns, as in the forward, and walks over its tiles.

    It recomputes a tile's logits from S, turns them into their gradients, and writes Aᵀ G A where S stood. About 40
    operations and two exponentials a logit, and a tile's two products in two parts each, bound it.
    """
    row_strip, column_strip = tl.program_id(0), tl.program_id(1)
    s = load_scale(scale, scale_number)
    shift = _exponent_shift(s)
    grad_per_logit = tl.load(grad).to(tl.float32)
    if count is not None:
        grad_per_logit /= tl.maximum(tl.load(count), 1.0)
    slot = tl.arange(0, SLOTS)
    a, b = _slot_rows(slot, E, Q, G)
    x = tl.arange(0, ROWS)
    signs_t = tl.where(x[:, None] == b[None, :], 1.0, 0.0) - tl.where(x[:, None] == a[None, :], 1.0, 0.0)
    # Within individuals a group's columns meet its own rows alone.
    column_sums_strip = 0 if KIND == WITHIN else row_strip
    begin = row_strip * rows_per_strip
    for row in range(begin, tl.minimum(begin + rows_per_strip, chunk_groups)):
        group, own = chunk_start + row, own_start + row
        inv_norm_row = tl.load(inv_norm_visual + group * SLOTS + slot)
        inv_sum_row = _inverse_sum(row_lse + (group * G - lead) * Q + slot, inv_norm_row, shift)
        at_a, at_b = (row * G * E + a) * row_stride, (row * G * E + b) * row_stride
        grad_dot = tl.zeros([SLOTS], tl.float32)
        if KIND == WITHIN:
            first_column, end_column = own, own + 1
        else:
            first_column = column_strip * columns_per_strip
            end_column = tl.minimum(first_column + columns_per_strip, column_groups)
        for column in range(first_column, end_column):
            base = 0 if KIND == WITHIN else column * G * E
            folded = tl.zeros([ROWS, ROWS], tl.float32)
            for part in range(0, SLOTS, PART):
                other = part + tl.arange(0, PART)
                inv_norm_column = tl.load(inv_norm_text + column * SLOTS + other)
                inv_sum_column = _inverse_sum(column_lse + column * G * Q + other, inv_norm_column, shift)
                c, d = _slot_rows(other, E, Q, G)
                logit = (
                    _differences(products, at_a, at_b, base + c, base + d)
                    * (inv_norm_row * s)[:, None]
                    * inv_norm_column[None, :]
                )
                keep, same_way = _kept(slot, other, inv_norm_row, inv_norm_column, column == own, Q, KIND)
                g = tl.where(same_way, tl.exp2(logit * LOG2E - shift), 0.0)
                g -= tl.where(keep, tl.exp2(-logit * LOG2E - shift), 0.0)
                g *= (inv_sum_row[:, None] + inv_sum_column[None, :]) * (0.5 * grad_per_logit)
                if column == own:
                    g -= tl.where(keep & (slot[:, None] == other[None, :]), grad_per_logit, 0.0)
                grad_dots = g * logit
                grad_dot += tl.sum(grad_dots, axis=1)
                column_grad_dot = tl.sum(grad_dots, axis=0)
                _accumulate(
                    column_grad_dots + (column_sums_strip * column_groups + column) * SLOTS + other,
                    column_grad_dot,
                    KIND != WITHIN and row > begin,
                    ADD,
                )
                high, low = _two_parts(g * (inv_norm_row * s)[:, None] * inv_norm_column[None, :])
                half = tl.dot(signs_t, low, acc=tl.dot(signs_t, high, input_precision="tf32"), input_precision="tf32")
                signs = tl.where(x[None, :] == d[:, None], 1.0, 0.0) - tl.where(x[None, :] == c[:, None], 1.0, 0.0)
                high, low = _two_parts(half)
                folded = tl.dot(high, signs, acc=folded, input_precision="tf32")
                folded = tl.dot(low, signs, acc=folded, input_precision="tf32")
            tl.debug_barrier()  # all threads have read their products, whose place the gradient takes
            target = products + (row * G * E + x[:, None]) * row_stride + base + x[None, :]
            tl.store(target, folded, (x[:, None] < G * E) & (x[None, :] < G * E))
        tl.store(row_grad_dots + (column_strip * row_groups + group) * SLOTS + slot, grad_dot)
        tl.debug_barrier()  # the next row of groups adds to what other threads have stored


@triton.jit
def _inverse_sum(lse, inv_norm, shift):
    """e^K over the sum of a row's or a column's exponentials; any finite number where there is no pair."""
    return tl.exp2(shift - tl.load(lse, inv_norm != -1.0, other=0.0) * LOG2E)


@triton.jit
def _two_parts(x):
    """x as a sum of two numbers that TF32 holds, but for 2⁻²² of it: the signs it is multiplied by are exact there."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit(do_not_specialize=["row_people", *GROUPS, *STRIPS, "lead"])
def gradient_kernel(
    visual_sum,  # (row_groups·G·E, D) float32 or None: dS T, read
    text_sum,  # (column_groups·G·E, D) float32 or None: dSᵀ V, read
    grad_visual,  # (n, E, D) or None, written; its rows of visual_sum itself where that is float32
    grad_text,  # (m, E, D) or None, written; may be text_sum
    visual_centred,  # (row_groups·G·E, D) float32: features less their individual's mean
    text_centred,  # (column_groups·G·E, D) float32: the same of the text
    inv_norm_visual,  # (row_groups, SLOTS) float32: 1/|Δ| of each pair, 0 if too short, −1 where there is no pair
    inv_norm_text,  # (column_groups, SLOTS) float32: the same of the text
    row_grad_dots,  # (column strips, row_groups, SLOTS) float32: ρ along rows, by strip of columns, read
    column_grad_dots,  # (row strips, column_groups, SLOTS) float32: ρ along columns, by strip of rows, read
    scale,  # () of any float type, or None: then scale_number counts
    grad_scale,  # () or None: the scale's gradient, written
    partial,  # (2, programs) float32: workspace of sum_over_grid
    counter,  # () int32: 0 before and after, for sum_over_grid
    row_people,  # n
    row_groups,  # groups of rows, the first one after `lead` empty places
    column_groups,  # groups of columns
    lead,  # places before the first row
    column_strips,  # strips that row sums are made of
    row_strips,  # strips that column sums are made of
    E: tl.constexpr,  # emotions
    Q: tl.constexpr,  # pairs of emotions a < b: E(E−1)/2
    G: tl.constexpr,  # individuals in a group
    SLOTS: tl.constexpr,  # room for a group's pairs, a power of two
    D: tl.constexpr,  # features
    BLOCK_E: tl.constexpr,  # E rounded up to a power of two
    BLOCK_Q: tl.constexpr,  # Q rounded up to a power of two
    BLOCK_D: tl.constexpr,  # features that are worked on at a time
):
    """A program owns one side of one individual and subtracts from its gradient what goes through the norms.

    Bytes bound it: 2·E·D numbers read, the features once for each pair from L1; E·D written.
    """
    pair = tl.arange(0, BLOCK_Q)
    total = 0.0
    if tl.program_id(0) < row_people:
        place = tl.program_id(0) + lead
        offset = place // G * SLOTS + place % G * Q + pair
        inv_norm = tl.load(inv_norm_visual + offset, pair < Q, other=-1.0)
        grad_dot = _grad_dots(row_grad_dots, column_strips, row_groups * SLOTS, offset, inv_norm, pair, Q)
        total = tl.sum(grad_dot)
        if visual_sum is not None:
            _subtract_norm_gradient(
                visual_sum,
                grad_visual - tl.cast(lead, tl.int64) * E * D,
                visual_centred,
                place,
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
            offset = place // G * SLOTS + place % G * Q + pair
            inv_norm = tl.load(inv_norm_text + offset, pair < Q, other=-1.0)
            grad_dot = _grad_dots(column_grad_dots, row_strips, column_groups * SLOTS, offset, inv_norm, pair, Q)
            _subtract_norm_gradient(
                text_sum,
                grad_text,
                text_centred,
                place,
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
def _grad_dots(grad_dots, strips, strip_stride, offset, inv_norm, pair, Q: tl.constexpr):
    """ρ = Σ dloss/dl · l over a pair's row or column."""
    total = tl.zeros_like(inv_norm)
    for strip in range(strips):
        total += tl.load(grad_dots + strip * strip_stride + offset, pair < Q, other=0.0)
    return tl.where(inv_norm != -1.0, total, 0.0)


@triton.jit
def _subtract_norm_gradient(
    sums,  # (groups·G·E, D) float32, read
    gradient,  # the same rows, written; may be sums
    centred,  # (groups·G·E, D) float32, read
    place,  # the individual's, among all groups'
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
    a, b = _emotions_of(pair, E)
    row = tl.cast(place, tl.int64) * E
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        offset = (row + e[:, None]) * D + column[None, :]
        inside = (e[:, None] < E) & (column[None, :] < D)
        total = tl.load(sums + offset, inside, other=0.0)
        for k in range(Q):
            row_a, row_b = tl.sum(tl.where(pair == k, a, 0)), tl.sum(tl.where(pair == k, b, 0))
            weight = tl.sum(tl.where(pair == k, weights, 0.0))
            change = tl.load(centred + (row + row_b) * D + column, column < D, other=0.0)
            change -= tl.load(centred + (row + row_a) * D + column, column < D, other=0.0)
            sign = tl.where(e == row_b, weight, 0.0) - tl.where(e == row_a, weight, 0.0)
            total -= sign[:, None] * change[None, :]
        tl.store(gradient + offset, total, inside)
