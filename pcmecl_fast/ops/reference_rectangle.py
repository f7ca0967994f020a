"""correlation_loss's rectangle in plain PyTorch: some individuals' rows of S against some columns; the specification.

Pairs a < b stand for both directions, whose logits are l and −l: Q = E(E−1)/2 of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pcmecl_fast.ops.checks import autocast_off
from pcmecl_fast.ops.reference import _centred, _unit, computing_dtype


class _Logits(NamedTuple):
    values: Tensor  # (n, Q, m, Q)
    forth: Tensor  # bool, broadcasts to it: a→b of the row with a→b of the column, and b→a with b→a
    across: Tensor  # a→b with b→a, and b→a with a→b
    own: Tensor  # the row's own change


def correlation_rectangle_sums(
    visual: Tensor,  # (n, E, D)
    text: Tensor,  # (m, E, D)
    scale: Tensor | None,  # ()
    scale_number: float,
    mask: Tensor | None,  # (n, E) bool
    text_mask: Tensor | None,  # (m, E) bool
    negatives: str,
    first: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (n, Q), (m, Q), (n, Q)
    with torch.no_grad(), autocast_off(visual):
        number = scale_number if scale is None else scale
        values, forth, across, own = _logits(visual, text, number, mask, text_mask, negatives, first)
        both = torch.stack([values.masked_fill(~forth, -torch.inf), (-values).masked_fill(~across, -torch.inf)])
        return both.logsumexp(dim=(0, 3, 4)), both.logsumexp(dim=(0, 1, 2)), (values * own).sum(dim=(2, 3))


def correlation_rectangle_gradients(
    weight: Tensor,  # ()
    visual: Tensor,  # (n, E, D)
    text: Tensor,  # (m, E, D)
    scale: Tensor | None,  # ()
    scale_number: float,
    mask: Tensor | None,  # (n, E) bool
    text_mask: Tensor | None,  # (m, E) bool
    negatives: str,
    first: int,
    row_lse: Tensor,  # (n, Q)
    column_lse: Tensor,  # (m, Q)
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    wide = computing_dtype(visual)
    number = torch.tensor(scale_number, dtype=wide, device=visual.device) if scale is None else scale.to(wide)
    inputs = tuple(x.detach().to(wide).requires_grad_() for x in (visual, text, number))
    with torch.enable_grad(), autocast_off(visual):
        values, forth, across, own = _logits(inputs[0], inputs[1], inputs[2], mask, text_mask, negatives, first)
        with torch.no_grad():
            # What is masked may have sums of −inf: it takes no part.
            each = [
                (sign * values - lse).masked_fill(~keep, -torch.inf).exp()
                for sign, keep in ((1, forth), (-1, across))
                for lse in (row_lse[:, :, None, None], column_lse)
            ]
            gradient = weight * ((each[0] + each[1] - each[2] - each[3]) / 2 - own.to(wide))
        if not values.numel():
            return tuple(torch.zeros_like(x) if need else None for x, need in zip(inputs, needs, strict=True))
        wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(values, wanted, gradient) if wanted else ())
        return tuple(next(found) if need else None for need in needs)


def _logits(
    visual: Tensor,
    text: Tensor,
    scale: float | Tensor,
    mask: Tensor | None,
    text_mask: Tensor | None,
    negatives: str,
    first: int,
) -> _Logits:
    emotions, device = visual.shape[1], visual.device
    before, after = torch.triu_indices(emotions, emotions, 1, device=device)
    changes, valid = [], []
    for x, given in ((visual, mask), (text, text_mask)):
        present = x.new_ones(x.shape[:2], dtype=torch.bool) if given is None else given
        centred = _centred(x, present)
        changes.append(_unit(centred[:, after] - centred[:, before]))
        valid.append(present[:, before] & present[:, after])
    values = scale * torch.einsum("iad,jbd->iajb", *changes)
    keep = valid[0][:, :, None, None] & valid[1]
    people = torch.arange(len(visual), device=device)[:, None] + first == torch.arange(len(text), device=device)
    same_person = people[:, None, :, None]
    same_change = torch.eye(len(before), dtype=torch.bool, device=device)[None, :, None, :]
    own = keep & same_person & same_change
    if negatives == "within":
        keep = keep & same_person
    forth = keep & (same_person | ~same_change) if negatives == "distinct" else keep
    return _Logits(values, forth, keep, own)
