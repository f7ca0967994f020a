"""The Triton kernels of direction_logits and direction_loss; `direction` says how they work together."""

import triton
import triton.language as tl

from pcmecl_fast.kernels.common import inverse_change, inverse_norm, load_scale, sum_over_grid

# Launch options with which assertions are compiled in, but not those of Triton's own about overflows.
CHECKED = {"debug": True, "sanitize_overflow": False}
NO_BANK, ATOMICS, COEFFICIENTS = (tl.constexpr(i) for i in range(3))  # what the backward does for the bank's gradient


@triton.jit(do_not_specialize=["batch", "people"])
def logits_kernel(
    source,  # (B, D), read
    edited,  # (B, D), read
    bank,  # (N, E, D), read
    individual,  # (B,) int64, read
    source_emotion,  # (B,) int64, read
    cosines,  # (B, E) of the features' type, written
    min_change,  # float32: the least length that δ is divided by
    batch,  # B
    people,  # N
    NORMALIZE: tl.constexpr,  # whether features are made unit vectors first
    E: tl.constexpr,  # emotions
    D: tl.constexpr,  # features
    BLOCK_E: tl.constexpr,  # rows of the bank held at a time: E rounded up to a power of two, or 1
    BLOCK_D: tl.constexpr,  # features that are worked on at a time
    ALL: tl.constexpr,  # always True
):
    """A program walks over samples: for each it reads two features and E rows of the bank, and writes E cosines."""
    e = tl.arange(0, BLOCK_E)
    for sample in range(tl.program_id(0), batch, tl.num_programs(0)):
        row = tl.cast(sample, tl.int64) * D
        person, a = tl.load(individual + sample), tl.load(source_emotion + sample)
        _check_index(person, people, "individual: an index is out of range")
        _check_index(a, E, "source_emotion: an index is out of range")
        inv_norm_source, inv_norm_edited = _inverse_norms(source, edited, row, D, BLOCK_D, NORMALIZE)
        samples = (source, edited, bank, row, person, e, a, inv_norm_source, inv_norm_edited)
        c, _, _, _ = _cosines(*samples, min_change, NORMALIZE, E, D, BLOCK_E, BLOCK_D)
        tl.store(cosines + sample * E + e, c, e < E)


@triton.jit(do_not_specialize=["batch", "people"])
def loss_kernel(
    source,  # (B, D), read
    edited,  # (B, D), read
    bank,  # (N, E, D), read
    individual,  # (B,) int64, read
    source_emotion,  # (B,) int64, read
    target_emotion,  # (B,) int64, read
    scale,  # () of any float type, or None: then scale_number counts
    scale_number,  # float32: the logit scale
    contrast,  # float32: weight of the contrast
    loss,  # () float32, or (B,) where REDUCTION is "none"; written
    divisor,  # () float32: what the sum is divided by, written
    partial,  # (2, programs) float32: workspace of sum_over_grid, or None where nothing is summed
    counter,  # () int32: 0 before and after, for sum_over_grid; or None
    min_change,  # float32: the least length that δ is divided by
    batch,  # B
    people,  # N
    NORMALIZE: tl.constexpr,  # whether features are made unit vectors first
    REDUCTION: tl.constexpr,  # "mean", "sum" or "none"
    E: tl.constexpr,  # emotions
    D: tl.constexpr,  # features
    BLOCK_E: tl.constexpr,  # rows of the bank held at a time: E rounded up to a power of two, or 1
    BLOCK_D: tl.constexpr,  # features that are worked on at a time
    ALL: tl.constexpr,  # whether the contrast needs all rows of an individual, not the target's alone
):
    """A program walks over samples and adds their losses up; the last to finish reduces all programs' sums."""
    s = load_scale(scale, scale_number)
    total = 0.0
    count = 0.0
    for sample in range(tl.program_id(0), batch, tl.num_programs(0)):
        row = tl.cast(sample, tl.int64) * D
        person, a, b = tl.load(individual + sample), tl.load(source_emotion + sample), tl.load(target_emotion + sample)
        _check_index(person, people, "individual: an index is out of range")
        _check_index(a, E, "source_emotion: an index is out of range")
        _check_index(b, E, "target_emotion: an index is out of range")
        e = tl.arange(0, BLOCK_E)
        if not ALL:
            e += tl.cast(b, tl.int32)
        inv_norm_source, inv_norm_edited = _inverse_norms(source, edited, row, D, BLOCK_D, NORMALIZE)
        samples = (source, edited, bank, row, person, e, a, inv_norm_source, inv_norm_edited)
        c, _, _, _ = _cosines(*samples, min_change, NORMALIZE, E, D, BLOCK_E, BLOCK_D)
        c_target = tl.sum(tl.where(e == b, c, 0.0))
        value = 1.0 - c_target
        if ALL:
            cross_entropy, _ = _contrast(c, c_target, e, a, s, E)
            value += contrast * cross_entropy
        value = tl.where(a != b, value, 0.0)
        if REDUCTION == "none":
            tl.store(loss + sample, value)
        total += value
        count += tl.where(a != b, 1.0, 0.0)
    if REDUCTION == "none":
        tl.store(divisor, 1.0)
    else:
        last, total, count = sum_over_grid(partial, counter, total, count, 512)
        if last:
            divide_by = tl.maximum(count, 1.0) if REDUCTION == "mean" else 1.0
            tl.store(loss, total / divide_by)
            tl.store(divisor, divide_by)


@triton.jit
def _check_index(index, size, MESSAGE: tl.constexpr):
    """Stop the device if an index is out of range. Not compiled into launches without CHECKED."""
    tl.device_assert((index >= 0) & (index < size), MESSAGE)


@triton.jit(do_not_specialize=["batch"])
def backward_kernel(
    grad,  # () or (B,) float32, or (B, E) for the logits; read
    divisor,  # () float32, or None for the logits; read
    source,  # (B, D), read
    edited,  # (B, D), read
    bank,  # (N, E, D), read
    individual,  # (B,) int64, read
    source_emotion,  # (B,) int64, read
    target_emotion,  # (B,) int64, or None for the logits; read
    scale,  # () of any float type, or None: then scale_number counts
    scale_number,  # float32: the logit scale
    contrast,  # float32: weight of the contrast
    grad_source,  # (B, D) or None, written
    grad_edited,  # (B, D) or None, written
    grad_bank,  # (N, E, D) float32 or None: zeros, added to by atomics
    coefficients,  # (B, 2·BLOCK_E + 2) float32 or None: for bank_kernel, written
    grad_scale,  # () or None: the scale's gradient, written
    partial,  # (2, programs) float32: workspace of sum_over_grid, or None where nothing is summed
    counter,  # () int32: 0 before and after, for sum_over_grid; or None
    min_change,  # float32: the least length that δ is divided by
    batch,  # B
    NORMALIZE: tl.constexpr,  # whether features are made unit vectors first
    REDUCTION: tl.constexpr,  # "mean", "sum" or "none"; "logits" for direction_logits
    BANK: tl.constexpr,  # NO_BANK, ATOMICS or COEFFICIENTS
    E: tl.constexpr,  # emotions
    D: tl.constexpr,  # features
    BLOCK_E: tl.constexpr,  # rows of the bank held at a time: E rounded up to a power of two, or 1
    BLOCK_D: tl.constexpr,  # features that are worked on at a time
    ALL: tl.constexpr,  # whether all rows of an individual are needed, not the target's alone
):
    """A program walks over samples: for each it recomputes the cosines, and from them its features' gradients.

    The bank's gradient is added up by atomics, or left as coefficients for `bank_kernel`.
    """
    s = load_scale(scale, scale_number)
    scale_gradient = 0.0
    for sample in range(tl.program_id(0), batch, tl.num_programs(0)):
        row = tl.cast(sample, tl.int64) * D
        person, a = tl.load(individual + sample), tl.load(source_emotion + sample)
        e = tl.arange(0, BLOCK_E)
        b = a
        if REDUCTION != "logits":
            b = tl.load(target_emotion + sample)
        if not ALL:
            e += tl.cast(b, tl.int32)
        inv_norm_source, inv_norm_edited = _inverse_norms(source, edited, row, D, BLOCK_D, NORMALIZE)
        samples = (source, edited, bank, row, person, e, a, inv_norm_source, inv_norm_edited)
        c, inv_norm_d, inv_norm_delta, inv_square_delta = _cosines(
            *samples, min_change, NORMALIZE, E, D, BLOCK_E, BLOCK_D
        )
        # Whatever is in a sample that requests no change, NaN included, goes no further.
        counts = True if REDUCTION == "logits" else a != b

        # g[e] = dloss/dc[e]
        if REDUCTION == "logits":
            g = tl.load(grad + sample * E + e, e < E, other=0.0).to(tl.float32)
        else:
            upstream = tl.load(grad + sample) if REDUCTION == "none" else tl.load(grad) / tl.load(divisor)
            g = tl.where(e == b, -upstream, 0.0)
            if ALL:
                c_target = tl.sum(tl.where(e == b, c, 0.0))
                _, softmax = _contrast(c, c_target, e, a, s, E)
                grad_logit = upstream * contrast * (softmax - tl.where(e == b, 1.0, 0.0))
                grad_logit = tl.where((e < E) & (e != a), grad_logit, 0.0)
                g += s * grad_logit
                scale_gradient += tl.where(counts, tl.sum(grad_logit * c), 0.0)

        # With unit(x)'s derivative (g − ⟨g, x̂⟩ x̂) / |x|: dloss/dδ = (Σ g[e] d̂[e] − (Σ g[e] c[e]) δ̂) / |δ|. It is
        # orthogonal to δ = v̂' − v̂, so v̂ and v̂' have one inner product with it, `along`. Where δ is divided by
        # min_change, the second term is not there, and ⟨dloss/dδ, δ⟩ = Σ g[e] c[e].
        weight = g * inv_norm_d * inv_norm_delta
        shrink = tl.sum(g * c) * inv_square_delta
        along = 0.0
        further = tl.where(inv_square_delta == 0.0, tl.sum(g * c), 0.0) if NORMALIZE else 0.0
        if NORMALIZE:
            along_source = tl.zeros([BLOCK_D], tl.float32)
            for start in range(0, D, BLOCK_D):
                column = start + tl.arange(0, BLOCK_D)
                delta = _change(source, edited, row, inv_norm_source, inv_norm_edited, column, D)
                d = _directions(bank, person, e, a, column, E, D)
                grad_delta = tl.sum(d * weight[:, None], axis=0) - shrink * delta
                v = tl.load(source + row + column, column < D, other=0.0).to(tl.float32)
                along_source += grad_delta * (v * inv_norm_source)
            along = tl.sum(along_source)
        for start in range(0, D, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            delta = _change(source, edited, row, inv_norm_source, inv_norm_edited, column, D)
            d = _directions(bank, person, e, a, column, E, D)
            grad_delta = tl.sum(d * weight[:, None], axis=0) - shrink * delta
            if grad_source is not None:
                v = tl.load(source + row + column, column < D, other=0.0).to(tl.float32)
                gradient = (along * (inv_norm_source * v) - grad_delta) * inv_norm_source
                tl.store(grad_source + row + column, tl.where(counts, gradient, 0.0), column < D)
            if grad_edited is not None:
                w = tl.load(edited + row + column, column < D, other=0.0).to(tl.float32)
                gradient = (grad_delta - (along + further) * (inv_norm_edited * w)) * inv_norm_edited
                tl.store(grad_edited + row + column, tl.where(counts, gradient, 0.0), column < D)
            if BANK == ATOMICS:
                grad_d = weight[:, None] * delta[None, :] - (g * c * inv_norm_d * inv_norm_d)[:, None] * d
                grad_d = tl.where(counts, grad_d, 0.0)
                source_row = -tl.sum(grad_d, axis=0)
                bank_rows = grad_bank + (person * E + e[:, None]) * D + column[None, :]
                inside = (e[:, None] < E) & (column[None, :] < D)
                if ALL:
                    grad_d = tl.where(e[:, None] == a, source_row[None, :], grad_d)
                    tl.atomic_add(bank_rows, grad_d, inside, sem="relaxed")
                else:
                    tl.atomic_add(bank_rows, grad_d, inside & (e[:, None] != a), sem="relaxed")
                    bank_source_row = grad_bank + (person * E + a) * D + column
                    tl.atomic_add(bank_source_row, source_row, column < tl.where(a != b, D, 0), sem="relaxed")
        if BANK == COEFFICIENTS:
            sample_coefficients = coefficients + tl.cast(sample, tl.int64) * (2 * BLOCK_E + 2)
            slot = tl.arange(0, BLOCK_E)
            tl.store(sample_coefficients + slot, tl.where(counts, weight, 0.0))
            tl.store(sample_coefficients + BLOCK_E + slot, tl.where(counts, g * c * inv_norm_d * inv_norm_d, 0.0))
            tl.store(sample_coefficients + 2 * BLOCK_E, inv_norm_source)
            tl.store(sample_coefficients + 2 * BLOCK_E + 1, inv_norm_edited)
    if grad_scale is not None:
        last, scale_gradient, _ = sum_over_grid(partial, counter, scale_gradient, 0.0, 512)
        if last:
            tl.store(grad_scale, scale_gradient)


@triton.jit
def bank_kernel(
    coefficients,  # (B, 2·BLOCK_E + 2) float32, as backward_kernel leaves them; read
    source,  # (B, D), read
    edited,  # (B, D), read
    bank,  # (N, E, D), read
    source_emotion,  # (B,) int64, read
    target_emotion,  # (B,) int64, or None where all rows have coefficients; read
    order,  # (B,) int64: samples sorted by individual, read
    starts,  # (N + 1,) int64: where in order each individual begins, read
    grad_bank,  # (parts, N, E, D) float32, written
    E: tl.constexpr,  # emotions
    D: tl.constexpr,  # features
    ALL_E: tl.constexpr,  # E rounded up to a power of two
    BLOCK_E: tl.constexpr,  # rows that coefficients are kept for: ALL_E, or 1
    BLOCK_D: tl.constexpr,  # features that are worked on at a time
):
    """A program owns a part of one individual's samples and a tile of D, and adds the samples up in their order.

    A sample from a has d[e] = t[e] − t[a]: weight[e]·δ − shrink[e]·d[e] is added to row e and taken from row a. The
    first is one multiply-add for each number, row a's weight being −Σ weight. Of the second only shrink is added up, by
    e and a: what it is multiplied by is the bank's.
    """
    person = tl.cast(tl.program_id(0), tl.int64)
    part, parts = tl.program_id(2), tl.num_programs(2)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    e = tl.arange(0, ALL_E)
    inside = (e[:, None] < E) & (column[None, :] < D)
    begin, end = tl.load(starts + person), tl.load(starts + person + 1)
    share = tl.cdiv(end - begin, parts)
    begin += part * share
    end = tl.minimum(begin + share, end)
    total = tl.zeros([ALL_E, BLOCK_D], tl.float32)
    shrinks = tl.zeros([ALL_E, ALL_E], tl.float32)
    for position in range(begin, end):
        sample = tl.load(order + position)
        a = tl.load(source_emotion + sample)
        sample_coefficients = coefficients + sample * (2 * BLOCK_E + 2)
        if target_emotion is None:
            weight = tl.load(sample_coefficients + e)
            shrink = tl.load(sample_coefficients + BLOCK_E + e)
        else:
            b = tl.load(target_emotion + sample)
            weight = tl.where(e == b, tl.load(sample_coefficients), 0.0)
            shrink = tl.where(e == b, tl.load(sample_coefficients + BLOCK_E), 0.0)
        weight = tl.where(e == a, -tl.sum(tl.where(e == a, 0.0, weight)), weight)
        inv_norm_source = tl.load(sample_coefficients + 2 * BLOCK_E)
        inv_norm_edited = tl.load(sample_coefficients + 2 * BLOCK_E + 1)
        delta = _change(source, edited, sample * D, inv_norm_source, inv_norm_edited, column, D)
        total += tl.where(weight[:, None] == 0.0, 0.0, weight[:, None] * delta[None, :])
        shrinks += tl.where(e[None, :] == a, shrink[:, None], 0.0)
    shrinks += tl.trans(shrinks)
    for a in range(E):
        shrink = tl.sum(tl.where(e[None, :] == a, shrinks, 0.0), axis=1)
        d = _directions(bank, person, e, a, column, E, D)
        total -= tl.where(shrink[:, None] == 0.0, 0.0, shrink[:, None] * d)
    row = (tl.cast(part, tl.int64) * tl.num_programs(0) + person) * E + e
    tl.store(grad_bank + row[:, None] * D + column[None, :], total, inside)


@triton.jit
def _inverse_norms(source, edited, row, D: tl.constexpr, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr):
    """1 / |source| and 1 / |edited|, or 1 and 1."""
    if NORMALIZE:
        source_square = tl.zeros([BLOCK_D], tl.float32)
        edited_square = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            v = tl.load(source + row + column, column < D, other=0.0).to(tl.float32)
            w = tl.load(edited + row + column, column < D, other=0.0).to(tl.float32)
            source_square += v * v
            edited_square += w * w
        return inverse_norm(tl.sum(source_square)), inverse_norm(tl.sum(edited_square))
    else:  # noqa: RET505
        return 1.0, 1.0


@triton.jit
def _cosines(
    source,  # (B, D)
    edited,  # (B, D)
    bank,  # (N, E, D)
    row,  # where the sample begins: its number · D
    person,  # the individual
    e,  # (BLOCK_E,): emotions of the rows held
    a,  # the source's emotion
    inv_norm_source,  # 1/|source|, or 1
    inv_norm_edited,  # 1/|edited|, or 1
    min_change,  # the least length that δ is divided by
    NORMALIZE: tl.constexpr,  # whether features are made unit vectors first
    E: tl.constexpr,  # emotions
    D: tl.constexpr,  # features
    BLOCK_E: tl.constexpr,  # rows held at a time
    BLOCK_D: tl.constexpr,  # features that are worked on at a time
):
    """c[e], 1/|d[e]|, 1/max(|δ|, min_change), and its square, or 0 where that is min_change's.

    δ and d are formed before they are multiplied: their low bits are the result.
    """
    dots = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    square = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        delta = _change(source, edited, row, inv_norm_source, inv_norm_edited, column, D)
        d = _directions(bank, person, e, a, column, E, D)
        dots += d * delta[None, :]
        squares += d * d
        square += delta * delta
    inv_norm_delta, inv_square_delta = inverse_change(tl.sum(square), min_change, NORMALIZE)
    inv_norm_d = inverse_norm(tl.sum(squares, axis=1))
    return tl.sum(dots, axis=1) * inv_norm_d * inv_norm_delta, inv_norm_d, inv_norm_delta, inv_square_delta


@triton.jit
def _change(source, edited, row, inv_norm_source, inv_norm_edited, column, D: tl.constexpr):
    """δ on a tile of columns, as `difference_of_units` of csrc/common/directions.h forms it, and for its reasons."""
    v = tl.load(source + row + column, column < D, other=0.0).to(tl.float32)
    w = tl.load(edited + row + column, column < D, other=0.0).to(tl.float32)
    common = tl.minimum(inv_norm_edited, inv_norm_source)
    return (w * 0.5 - v * 0.5) * (common * 2.0) + w * (inv_norm_edited - common) - v * (inv_norm_source - common)


@triton.jit
def _directions(bank, person, e, a, column, E: tl.constexpr, D: tl.constexpr):
    """d[e] = t[e] − t[a] on a tile: emotions e down, columns across."""
    inside = (e[:, None] < E) & (column[None, :] < D)
    rows = tl.load(bank + (person * E + e[:, None]) * D + column[None, :], inside, other=0.0).to(tl.float32)
    before = tl.load(bank + (person * E + a) * D + column, column < D, other=0.0).to(tl.float32)
    return tl.where(e[:, None] < E, rows - before[None, :], 0.0)


@triton.jit
def _contrast(c, c_target, e, a, scale, E: tl.constexpr):
    """−log softmax over e ≠ a of scale · c[e] at the target, and the softmax."""
    counted = tl.where((e < E) & (e != a), c, -float("inf"))
    highest = tl.max(counted, axis=0)
    weights = tl.exp(scale * (counted - highest))
    total = tl.sum(weights, axis=0)
    return tl.log(total) + scale * (highest - c_target), weights / total
