"""direction_logits and direction_loss: one launch forward, one backward.

A program walks over some of the samples. For each it reads the two image features once from memory (again from L1 where
D does not fit one tile), and the bank rows it needs, which stay in L2: all E of the individual for logits and for a
contrast, else only the source's and the target's. Per sample, with E rows in use and w bytes a number, the forward
reads (2 + E)·D·w bytes, and the backward reads them again and writes 2·D·w; about 6·E·D and 12·E·D operations. The
bytes bound it. All sums are float32. The forward checks each sample's indices before it uses them, and stops the device
with an assertion where one is out of range.

The bank's gradient is a scatter, samples of one individual adding to the same rows. It goes by float32 atomics, or,
under `torch.use_deterministic_algorithms`, in the samples' order: the backward leaves the two coefficients that each
row's gradient is made of, and a second launch adds them up, one program per individual, part of its samples and tile of
D. A third adds the parts up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from pcmecl_fast.kernels.common import Config, add_shares, counter_for, power_of_2, programs_for, run, run_tuned
from pcmecl_fast.kernels.direction_kernels import (
    ATOMICS,
    CHECKED,
    COEFFICIENTS,
    NO_BANK,
    backward_kernel,
    bank_kernel,
    logits_kernel,
    loss_kernel,
)

CONFIGS = [Config(warps=1), Config(warps=2), Config(warps=4)]  # of one: sums over features need no barrier
TILE = 1024  # numbers of the bank a program holds at once: 32 registers a thread of one warp, 128 features at E ≤ 8
# Of a thread, at most, of logits of half types by one warp: by itself Triton 3.6 spills one of 139, so that a processor
# holds 16 programs instead of 14. Other launches have no bound: it would let them take up to half as many again.
LOGIT_REGISTERS = 168
PROGRAMS = 32  # of a processor: more than it holds at a time, so that those that begin late take over no more than that
BANK_PROGRAMS, BANK_PARTS = 16, 8  # of a processor that add the bank's gradient up; of an individual's samples, at most


class _Samples(NamedTuple):
    """What every sample of a call is made of, in the order in which the kernels take it."""

    source: Tensor  # (B, D)
    edited: Tensor  # (B, D)
    bank: Tensor  # (N, E, D)
    individual: Tensor  # (B,)
    source_emotion: Tensor  # (B,)
    target_emotion: Tensor | None  # (B,), None for the logits


def direction_logits_forward(
    source: Tensor,  # (B, D)
    edited: Tensor,  # (B, D)
    bank: Tensor,  # (N, E, D)
    individual: Tensor,  # (B,)
    source_emotion: Tensor,  # (B,)
    normalize: bool,
    min_change: float,
) -> tuple[Tensor]:
    """(cosines,), (B, E)."""
    batch, (people, emotions, _) = source.shape[0], bank.shape
    cosines = source.new_empty(batch, emotions)
    if batch == 0:
        return (cosines,)
    shape = _shape(bank, everything=True)
    programs = programs_for(source, batch, per_processor=PROGRAMS)

    def launch(config: Config) -> None:
        arguments = (source, edited, bank, individual, source_emotion, cosines, min_change, batch, people)
        bound = {"maxnreg": LOGIT_REGISTERS} if config.warps == 1 and source.element_size() == 2 else {}
        logits_kernel[(programs,)](*arguments, NORMALIZE=normalize, **shape, **CHECKED, **config.options(), **bound)

    run_tuned("direction_logits", tuple(shape.values()), CONFIGS, source, launch)
    return (cosines,)


def direction_logits_backward(
    grad: Tensor,  # (B, E)
    source: Tensor,  # (B, D)
    edited: Tensor,  # (B, D)
    bank: Tensor,  # (N, E, D)
    individual: Tensor,  # (B,)
    source_emotion: Tensor,  # (B,)
    normalize: bool,
    min_change: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of source, edited and bank, None where `needs` says so."""
    samples = _Samples(source, edited, bank, individual, source_emotion, None)
    return _backward(grad, None, samples, None, 0.0, 0.0, normalize, min_change, "logits", (*needs, False))[:3]


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
    min_change: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The loss, and () what it was divided by."""
    batch = source.shape[0]
    samples = _Samples(source, edited, bank, individual, source_emotion, target_emotion)
    loss = source.new_empty(batch if reduction == "none" else (), dtype=torch.float32)
    divisor = source.new_empty((), dtype=torch.float32)
    shape = _shape(bank, everything=contrast > 0)
    programs = programs_for(source, batch, per_processor=PROGRAMS)
    over_grid = _sums_over_grid(source, programs) if reduction != "none" else (None, None)

    def launch(config: Config) -> None:
        loss_kernel[(programs,)](
            *samples,
            scale,
            scale_number,
            contrast,
            loss,
            divisor,
            *over_grid,
            min_change,
            batch,
            bank.shape[0],
            NORMALIZE=normalize,
            REDUCTION=reduction,
            **shape,
            **CHECKED,
            **config.options(),
        )

    run_tuned("direction_loss", tuple(shape.values()), CONFIGS, source, launch)
    return loss, divisor


def direction_loss_backward(
    grad: Tensor,  # () or (B,)
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
    min_change: float,
    reduction: str,
    divisor: Tensor,  # ()
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of source, edited, bank and scale, None where `needs` says so."""
    samples = _Samples(source, edited, bank, individual, source_emotion, target_emotion)
    return _backward(grad, divisor, samples, scale, scale_number, contrast, normalize, min_change, reduction, needs)


def _backward(
    grad: Tensor,  # () or (B,), (B, E) for the logits
    divisor: Tensor | None,  # (), None for the logits
    samples: _Samples,
    scale: Tensor | None,  # ()
    scale_number: float,
    contrast: float,
    normalize: bool,
    min_change: float,
    reduction: str,  # "logits" for the logits
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    source, edited, bank = samples[:3]
    need_source, need_edited, need_bank, need_scale = needs
    shape = _shape(bank, everything=contrast > 0 or reduction == "logits")
    in_order = need_bank and torch.are_deterministic_algorithms_enabled()
    grad_source = torch.empty_like(source) if need_source else None
    grad_edited = torch.empty_like(edited) if need_edited else None
    grad_bank = torch.empty_like(bank, dtype=torch.float32) if need_bank and not in_order else None
    grad_scale = torch.empty_like(scale) if need_scale and scale is not None else None
    batch = source.shape[0]
    coefficients = source.new_empty(batch, 2 * shape["BLOCK_E"] + 2, dtype=torch.float32) if in_order else None
    programs = programs_for(source, batch, per_processor=PROGRAMS)
    over_grid = _sums_over_grid(source, programs) if grad_scale is not None else (None, None)

    def launch(config: Config) -> None:
        if grad_bank is not None:
            grad_bank.zero_()
        backward_kernel[(programs,)](
            grad,
            divisor,
            *samples,
            scale,
            scale_number,
            contrast,
            grad_source,
            grad_edited,
            grad_bank,
            coefficients,
            grad_scale,
            *over_grid,
            min_change,
            batch,
            NORMALIZE=normalize,
            REDUCTION=reduction,
            BANK=(COEFFICIENTS if in_order else ATOMICS if need_bank else NO_BANK).value,
            **shape,
            **config.options(),
        )

    run_tuned("direction_backward", (*shape.values(), need_bank), CONFIGS, source, launch)
    bank_sum = grad_bank if coefficients is None else _add_in_order(coefficients, samples, shape)
    return grad_source, grad_edited, None if bank_sum is None else bank_sum.to(bank.dtype), grad_scale


def _sums_over_grid(x: Tensor, programs: int) -> tuple[Tensor, Tensor]:
    """The workspace and the counter of `sum_over_grid`."""
    return x.new_empty(2, programs, dtype=torch.float32), counter_for(x)


def _add_in_order(
    coefficients: Tensor,  # (B, 2·BLOCK_E + 2)
    samples: _Samples,
    shape: dict[str, int],
) -> Tensor:  # (N, E, D) float32
    source, edited, bank, individual, source_emotion, target_emotion = samples
    people, emotions, width = bank.shape
    in_order, order = torch.sort(individual, stable=True)
    starts = torch.searchsorted(in_order, torch.arange(people + 1, device=bank.device))
    grad_bank = torch.empty_like(bank, dtype=torch.float32)
    all_rows = power_of_2(emotions)
    tile = bank_tile(width, all_rows)
    tiles = triton.cdiv(width, tile)
    parts = bank_parts(len(source), people, programs_for(source, 1 << 30, BANK_PROGRAMS) // (people * tiles))
    partial = grad_bank if parts == 1 else grad_bank.new_empty(parts, *grad_bank.shape)
    run(
        source,
        lambda: bank_kernel[(people, tiles, parts)](
            coefficients,
            source,
            edited,
            bank,
            source_emotion,
            target_emotion if shape["BLOCK_E"] == 1 else None,
            order,
            starts,
            partial,
            E=emotions,
            D=width,
            ALL_E=all_rows,
            BLOCK_E=shape["BLOCK_E"],
            BLOCK_D=tile,
            num_warps=1,
        ),
    )
    if parts > 1:
        run(source, lambda: add_shares(partial, grad_bank))
    return grad_bank


def bank_tile(width: int, rows: int) -> int:
    """Columns of the bank that a program adds samples up on."""
    return min(power_of_2(width), max(TILE // rows, 16))


def bank_parts(samples: int, people: int, most: int) -> int:
    """Programs that share an individual's samples: no more than fill the GPU, and of a few samples each at least."""
    return max(1, min(most, BANK_PARTS, samples // (4 * max(people, 1))))


def _shape(bank: Tensor, *, everything: bool) -> dict[str, int]:
    """A sample's part of the bank: all rows of its individual, or the target's alone, by tiles of D."""
    _, emotions, width = bank.shape
    rows = power_of_2(emotions) if everything else 1
    tile = min(power_of_2(width, least=16), TILE // rows)
    return {"E": emotions, "D": width, "BLOCK_E": rows, "BLOCK_D": tile, "ALL": everything}
