"""direction_logits and direction_loss: one launch forward, one backward.

A program owns some samples and takes them one after another. For each it reads the two image features once from memory
(again from L1 where D does not fit one tile), and the bank rows it needs, which stay in L2: all E of the individual
for logits and for a contrast, else only the source's and the target's. Per sample, E rows in use, w bytes a number:
forward reads (2 + E)·D·w bytes, backward that much again and writes 2·D·w; about 6·E·D and 12·E·D operations. The bytes
bound it. All sums are float32.

The bank's gradient is a scatter, samples of one individual adding to the same rows. It goes by float32 atomics, or,
under `torch.use_deterministic_algorithms`, in the samples' order: the backward leaves the two coefficients that each
row's gradient is made of, and a second launch adds them up, one program per individual and tile of D.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcmecl_fast.kernels.common import (
    Config,
    counter_for,
    inverse_length,
    load_scale,
    power_of_2,
    programs_for,
    run,
    run_tuned,
    sum_over_grid,
)

CONFIGS = [Config(warps=4), Config(warps=2), Config(warps=8)]
TILE = 4096  # numbers of the bank a program holds at once: 32 registers a thread at 4 warps, E rows of D = 512 at E ≤ 8

NO_BANK, ATOMICS, COEFFICIENTS = (tl.constexpr(i) for i in range(3))  # what the backward does for the bank's gradient


def direction_logits_forward(
    source: Tensor,  # (B, D)
    edited: Tensor,  # (B, D)
    bank: Tensor,  # (N, E, D)
    individual: Tensor,  # (B,)
    source_emotion: Tensor,  # (B,)
    normalize: bool,
) -> tuple[Tensor]:
    batch, emotions = source.shape[0], bank.shape[1]
    cosines = source.new_empty(batch, emotions)
    if batch:
        shape = _shape(bank, everything=True)
        programs = programs_for(source, batch, per_processor=16)
        run_tuned(
            "direction_logits",
            tuple(shape.values()),
            CONFIGS,
            source,
            lambda config: _logits_kernel[(programs,)](
                source,
                edited,
                bank,
                individual,
                source_emotion,
                cosines,
                batch,
                NORMALIZE=normalize,
                **shape,
                **config.options(),
            ),
        )
    return (cosines,)


def direction_logits_backward(
    grad: Tensor,  # (B, E)
    source: Tensor,
    edited: Tensor,
    bank: Tensor,
    individual: Tensor,
    source_emotion: Tensor,
    normalize: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    return _backward(
        grad,
        None,
        source,
        edited,
        bank,
        individual,
        source_emotion,
        None,
        None,
        0.0,
        0.0,
        normalize,
        "logits",
        (*needs, False),
    )[:3]


def direction_loss_forward(
    source: Tensor,  # (B, D)
    edited: Tensor,  # (B, D)
    bank: Tensor,  # (N, E, D)
    individual: Tensor,  # (B,)
    source_emotion: Tensor,  # (B,)
    target_emotion: Tensor,  # (B,)
    scale: Tensor | None,  # ()
    scale_number: float,
    contrast: float,
    normalize: bool,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    batch = source.shape[0]
    loss = source.new_empty(batch if reduction == "none" else (), dtype=torch.float32)
    divisor = source.new_empty((), dtype=torch.float32)
    shape = _shape(bank, everything=contrast > 0)
    programs = programs_for(source, batch, per_processor=16)
    partial = source.new_empty(2, programs, dtype=torch.float32)
    counter = counter_for(source)
    run_tuned(
        "direction_loss",
        tuple(shape.values()),
        CONFIGS,
        source,
        lambda config: _loss_kernel[(programs,)](
            source,
            edited,
            bank,
            individual,
            source_emotion,
            target_emotion,
            scale,
            scale_number,
            contrast,
            loss,
            divisor,
            partial,
            counter,
            batch,
            NORMALIZE=normalize,
            REDUCTION=reduction,
            **shape,
            **config.options(),
        ),
    )
    return loss, divisor


def direction_loss_backward(
    grad: Tensor,  # () or (B,)
    source: Tensor,
    edited: Tensor,
    bank: Tensor,
    individual: Tensor,
    source_emotion: Tensor,
    target_emotion: Tensor,
    scale: Tensor | None,
    scale_number: float,
    contrast: float,
    normalize: bool,
    reduction: str,
    divisor: Tensor,  # ()
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    return _backward(
        grad,
        divisor,
        source,
        edited,
        bank,
        individual,
        source_emotion,
        target_emotion,
        scale,
        scale_number,
        contrast,
        normalize,
        reduction,
        needs,
    )


def _backward(
    grad: Tensor,
    divisor: Tensor | None,
    source: Tensor,
    edited: Tensor,
    bank: Tensor,
    individual: Tensor,
    source_emotion: Tensor,
    target_emotion: Tensor | None,
    scale: Tensor | None,
    scale_number: float,
    contrast: float,
    normalize: bool,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    batch = source.shape[0]
    need_source, need_edited, need_bank, need_scale = needs
    shape = _shape(bank, everything=contrast > 0 or reduction == "logits")
    in_order = need_bank and torch.are_deterministic_algorithms_enabled()
    gradients = (
        torch.empty_like(source) if need_source else None,
        torch.empty_like(edited) if need_edited else None,
        torch.zeros_like(bank, dtype=torch.float32) if need_bank and not in_order else None,
        torch.empty_like(scale) if need_scale and scale is not None else None,
    )
    g_source, g_edited, g_bank, g_scale = gradients
    coefficients = source.new_empty(batch, 2 * shape["BLOCK_E"] + 2, dtype=torch.float32) if in_order else None
    programs = programs_for(source, batch, per_processor=16)
    partial = source.new_empty(2, programs, dtype=torch.float32)
    counter = counter_for(source)

    def launch(config: Config) -> None:
        if g_bank is not None:
            g_bank.zero_()
        _backward_kernel[(programs,)](
            grad,
            divisor,
            source,
            edited,
            bank,
            individual,
            source_emotion,
            target_emotion,
            scale,
            scale_number,
            contrast,
            g_source,
            g_edited,
            g_bank,
            coefficients,
            g_scale,
            partial,
            counter,
            batch,
            NORMALIZE=normalize,
            REDUCTION=reduction,
            BANK=(COEFFICIENTS if in_order else ATOMICS if need_bank else NO_BANK).value,
            **shape,
            **config.options(),
        )

    run_tuned("direction_backward", (*shape.values(), need_bank), CONFIGS, source, launch)
    if coefficients is not None:
        g_bank = _add_in_order(coefficients, source, edited, bank, individual, source_emotion, target_emotion, shape)
    return g_source, g_edited, None if g_bank is None else g_bank.to(bank.dtype), g_scale


def _add_in_order(
    coefficients: Tensor,  # (B, 2·BLOCK_E + 2)
    source: Tensor,
    edited: Tensor,
    bank: Tensor,
    individual: Tensor,
    source_emotion: Tensor,
    target_emotion: Tensor | None,
    shape: dict[str, int],
) -> Tensor:  # (N, E, D) float32
    people, emotions, width = bank.shape
    in_order, order = torch.sort(individual, stable=True)
    starts = torch.searchsorted(in_order, torch.arange(people + 1, device=bank.device))
    g_bank = torch.empty_like(bank, dtype=torch.float32)
    every = power_of_2(emotions)
    tile = bank_tile(width, every)
    run(
        source,
        lambda: _bank_kernel[(people, triton.cdiv(width, tile))](
            coefficients,
            source,
            edited,
            bank,
            source_emotion,
            target_emotion if shape["BLOCK_E"] == 1 and target_emotion is not None else None,
            order,
            starts,
            g_bank,
            E=emotions,
            D=width,
            EVERY=every,
            BLOCK_E=shape["BLOCK_E"],
            BLOCK_D=tile,
            num_warps=4,
        ),
    )
    return g_bank


def bank_tile(width: int, rows: int) -> int:
    """Columns of the bank that a program adds samples up on: small, so that few individuals fill a GPU."""
    return min(power_of_2(width), max(TILE // 4 // rows, 16))


def _shape(bank: Tensor, *, everything: bool) -> dict[str, int]:
    """A sample's part of the bank: all rows of its individual, or the target's alone, by tiles of D."""
    _, emotions, width = bank.shape
    rows = power_of_2(emotions) if everything else 1
    tile = min(power_of_2(width, least=16), TILE // rows)
    return {"E": emotions, "D": width, "BLOCK_E": rows, "BLOCK_D": tile, "ALL": everything}


@triton.jit
def _inverse_lengths(source, edited, row, D: tl.constexpr, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr):
    """1 / |source| and 1 / |edited|, or 1 and 1."""
    source_square = 0.0
    edited_square = 0.0
    if NORMALIZE:
        for start in range(0, D, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            v = tl.load(source + row + column, column < D, other=0.0).to(tl.float32)
            w = tl.load(edited + row + column, column < D, other=0.0).to(tl.float32)
            source_square += tl.sum(v * v)
            edited_square += tl.sum(w * w)
        return inverse_length(source_square), inverse_length(edited_square)
    else:  # noqa: RET505
        return source_square + 1.0, edited_square + 1.0


@triton.jit
def _change(source, edited, row, by_source, by_edited, column, D: tl.constexpr):
    """δ on a tile of columns."""
    v = tl.load(source + row + column, column < D, other=0.0).to(tl.float32)
    w = tl.load(edited + row + column, column < D, other=0.0).to(tl.float32)
    return w * by_edited - v * by_source


@triton.jit
def _directions(bank, person, e, a, column, E: tl.constexpr, D: tl.constexpr):
    """d[e] = t[e] − t[a] on a tile: emotions e down, columns across."""
    inside = (e[:, None] < E) & (column[None, :] < D)
    rows = tl.load(bank + (person * E + e[:, None]) * D + column[None, :], inside, other=0.0).to(tl.float32)
    before = tl.load(bank + (person * E + a) * D + column, column < D, other=0.0).to(tl.float32)
    return tl.where(e[:, None] < E, rows - before[None, :], 0.0)


@triton.jit
def _cosines(
    source,
    edited,
    bank,
    row,
    person,
    e,
    a,
    by_source,
    by_edited,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """c[e], 1 / |d[e]| and 1 / |δ|. δ and d are formed before they are multiplied: their low bits are the result."""
    dots = tl.zeros([BLOCK_E], tl.float32)
    squares = tl.zeros([BLOCK_E], tl.float32)
    square = 0.0
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        delta = _change(source, edited, row, by_source, by_edited, column, D)
        d = _directions(bank, person, e, a, column, E, D)
        dots += tl.sum(d * delta[None, :], axis=1)
        squares += tl.sum(d * d, axis=1)
        square += tl.sum(delta * delta)
    by_delta = inverse_length(square)
    by_d = inverse_length(squares)
    return dots * by_d * by_delta, by_d, by_delta


@triton.jit
def _contrast(c, c_target, e, a, scale, E: tl.constexpr):
    """−log softmax over e ≠ a of scale · c[e] at the target, and the softmax."""
    logits = tl.where((e < E) & (e != a), scale * c, -float("inf"))
    highest = tl.max(logits, axis=0)
    weights = tl.exp(logits - highest)
    total = tl.sum(weights, axis=0)
    return highest + tl.log(total) - scale * c_target, weights / total


@triton.jit
def _logits_kernel(
    source,
    edited,
    bank,
    individual,
    source_emotion,
    cosines,
    batch,
    NORMALIZE: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL: tl.constexpr,
):
    e = tl.arange(0, BLOCK_E)
    for sample in range(tl.program_id(0), batch, tl.num_programs(0)):
        row = tl.cast(sample, tl.int64) * D
        person, a = tl.load(individual + sample), tl.load(source_emotion + sample)
        by_source, by_edited = _inverse_lengths(source, edited, row, D, BLOCK_D, NORMALIZE)
        c, _, _ = _cosines(source, edited, bank, row, person, e, a, by_source, by_edited, E, D, BLOCK_E, BLOCK_D)
        tl.store(cosines + sample * E + e, c, e < E)


@triton.jit
def _loss_kernel(
    source,
    edited,
    bank,
    individual,
    source_emotion,
    target_emotion,
    scale,
    scale_number,
    contrast,
    loss,
    divisor,
    partial,
    counter,
    batch,
    NORMALIZE: tl.constexpr,
    REDUCTION: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL: tl.constexpr,
):
    s = load_scale(scale, scale_number)
    total = 0.0
    count = 0.0
    for sample in range(tl.program_id(0), batch, tl.num_programs(0)):
        row = tl.cast(sample, tl.int64) * D
        person, a, b = tl.load(individual + sample), tl.load(source_emotion + sample), tl.load(target_emotion + sample)
        e = tl.arange(0, BLOCK_E)
        if not ALL:
            e += tl.cast(b, tl.int32)
        by_source, by_edited = _inverse_lengths(source, edited, row, D, BLOCK_D, NORMALIZE)
        c, _, _ = _cosines(source, edited, bank, row, person, e, a, by_source, by_edited, E, D, BLOCK_E, BLOCK_D)
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
        last, total, count = sum_over_grid(partial, counter, total, count, 1024)
        if last:
            divide_by = tl.maximum(count, 1.0) if REDUCTION == "mean" else 1.0
            tl.store(loss, total / divide_by)
            tl.store(divisor, divide_by)


@triton.jit
def _backward_kernel(
    grad,
    divisor,
    source,
    edited,
    bank,
    individual,
    source_emotion,
    target_emotion,
    scale,
    scale_number,
    contrast,
    g_source,
    g_edited,
    g_bank,
    coefficients,
    g_scale,
    partial,
    counter,
    batch,
    NORMALIZE: tl.constexpr,
    REDUCTION: tl.constexpr,
    BANK: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL: tl.constexpr,
):
    s = load_scale(scale, scale_number)
    of_scale = 0.0
    for sample in range(tl.program_id(0), batch, tl.num_programs(0)):
        row = tl.cast(sample, tl.int64) * D
        person, a = tl.load(individual + sample), tl.load(source_emotion + sample)
        e = tl.arange(0, BLOCK_E)
        b = a
        if REDUCTION != "logits":
            b = tl.load(target_emotion + sample)
        if not ALL:
            e += tl.cast(b, tl.int32)
        by_source, by_edited = _inverse_lengths(source, edited, row, D, BLOCK_D, NORMALIZE)
        c, by_d, by_delta = _cosines(
            source, edited, bank, row, person, e, a, by_source, by_edited, E, D, BLOCK_E, BLOCK_D
        )

        # g[e] = dloss/dc[e]
        if REDUCTION == "logits":
            g = tl.load(grad + sample * E + e, e < E, other=0.0).to(tl.float32)
        else:
            upstream = tl.load(grad + sample) if REDUCTION == "none" else tl.load(grad) / tl.load(divisor)
            upstream = tl.where(a != b, upstream, 0.0)
            g = tl.where(e == b, -upstream, 0.0)
            if ALL:
                c_target = tl.sum(tl.where(e == b, c, 0.0))
                _, softmax = _contrast(c, c_target, e, a, s, E)
                pull = upstream * contrast * (softmax - tl.where(e == b, 1.0, 0.0))
                pull = tl.where((e < E) & (e != a), tl.where(a != b, pull, 0.0), 0.0)
                g += s * pull
                of_scale += tl.sum(pull * c)

        # With unit(x)'s derivative (g − ⟨g, x̂⟩ x̂) / |x|: dloss/dδ = (Σ g[e] d̂[e] − (Σ g[e] c[e]) δ̂) / |δ|. It is
        # orthogonal to δ = v̂' − v̂, so v̂ and v̂' have one inner product with it, `along`.
        weight = g * by_d * by_delta
        shrink = tl.sum(g * c) * by_delta * by_delta
        along = 0.0
        if NORMALIZE:
            for start in range(0, D, BLOCK_D):
                column = start + tl.arange(0, BLOCK_D)
                delta = _change(source, edited, row, by_source, by_edited, column, D)
                d = _directions(bank, person, e, a, column, E, D)
                g_delta = tl.sum(d * weight[:, None], axis=0) - shrink * delta
                v = tl.load(source + row + column, column < D, other=0.0).to(tl.float32)
                along += tl.sum(g_delta * v) * by_source
        for start in range(0, D, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            delta = _change(source, edited, row, by_source, by_edited, column, D)
            d = _directions(bank, person, e, a, column, E, D)
            g_delta = tl.sum(d * weight[:, None], axis=0) - shrink * delta
            if g_source is not None:
                v = tl.load(source + row + column, column < D, other=0.0).to(tl.float32)
                tl.store(g_source + row + column, (along * by_source * v - g_delta) * by_source, column < D)
            if g_edited is not None:
                w = tl.load(edited + row + column, column < D, other=0.0).to(tl.float32)
                tl.store(g_edited + row + column, (g_delta - along * by_edited * w) * by_edited, column < D)
            if BANK == ATOMICS:
                g_d = weight[:, None] * delta[None, :] - (g * c * by_d * by_d)[:, None] * d
                of_source = -tl.sum(g_d, axis=0)
                to_bank = g_bank + (person * E + e[:, None]) * D + column[None, :]
                inside = (e[:, None] < E) & (column[None, :] < D)
                if ALL:
                    g_d = tl.where(e[:, None] == a, of_source[None, :], g_d)
                    tl.atomic_add(to_bank, g_d, inside, sem="relaxed")
                else:
                    tl.atomic_add(to_bank, g_d, inside & (e[:, None] != a), sem="relaxed")
                    to_source = g_bank + (person * E + a) * D + column
                    tl.atomic_add(to_source, of_source, column < tl.where(a != b, D, 0), sem="relaxed")
        if BANK == COEFFICIENTS:
            kept = coefficients + tl.cast(sample, tl.int64) * (2 * BLOCK_E + 2)
            slot = tl.arange(0, BLOCK_E)
            tl.store(kept + slot, weight)
            tl.store(kept + BLOCK_E + slot, g * c * by_d * by_d)
            tl.store(kept + 2 * BLOCK_E, by_source)
            tl.store(kept + 2 * BLOCK_E + 1, by_edited)
    if g_scale is not None:
        last, of_scale, _ = sum_over_grid(partial, counter, of_scale, 0.0, 1024)
        if last:
            tl.store(g_scale, of_scale)


@triton.jit
def _bank_kernel(
    coefficients,
    source,
    edited,
    bank,
    source_emotion,
    target_emotion,
    order,
    starts,
    g_bank,
    E: tl.constexpr,
    D: tl.constexpr,
    EVERY: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds one individual's samples to its rows on a tile of D, in the samples' order."""
    person = tl.cast(tl.program_id(0), tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    e = tl.arange(0, EVERY)
    inside = (e[:, None] < E) & (column[None, :] < D)
    at = (person * E + e[:, None]) * D + column[None, :]
    total = tl.zeros([EVERY, BLOCK_D], tl.float32)
    for position in range(tl.load(starts + person), tl.load(starts + person + 1)):
        sample = tl.load(order + position)
        a = tl.load(source_emotion + sample)
        kept = coefficients + sample * (2 * BLOCK_E + 2)
        if target_emotion is None:
            weight = tl.load(kept + e)
            pull = tl.load(kept + BLOCK_E + e)
        else:
            b = tl.load(target_emotion + sample)
            weight = tl.where(e == b, tl.load(kept), 0.0)
            pull = tl.where(e == b, tl.load(kept + BLOCK_E), 0.0)
        by_source, by_edited = tl.load(kept + 2 * BLOCK_E), tl.load(kept + 2 * BLOCK_E + 1)
        delta = _change(source, edited, sample * D, by_source, by_edited, column, D)
        d = _directions(bank, person, e, a, column, E, D)
        g_d = weight[:, None] * delta[None, :] - pull[:, None] * d
        total += tl.where(e[:, None] == a, -tl.sum(g_d, axis=0)[None, :], g_d)
    tl.store(g_bank + at, total, inside)
