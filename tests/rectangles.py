"""Blocks of correlation_loss's logits in plain PyTorch, and what holds for every backend's `sums` and `gradients`.

`rectangle_sums` and `rectangle_gradients` are the specification: a rectangle of S has n individuals as rows (visual
features) and m as columns (text features), and row i's own individual is column first + i, where that is inside. With
l the logit of the changes (i, a→b) and (j, c→d), a < b and c < d, the opposite directions have l or −l, so that a row
(i, ab) and a column (j, cd) sum e^l + e^−l; "distinct" keeps e^l of the same change in its own individual alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from operators import correlation_inputs
from tolerances import assert_close_for
from torch import Tensor

from pcmecl_fast.ops.reference import _centred, _unit, computing_dtype

Sums = Callable[..., tuple[Tensor, Tensor, Tensor]]
Gradients = Callable[..., Sequence[Tensor | None]]


def rectangle_sums(
    visual: Tensor,  # (n, E, D)
    text: Tensor,  # (m, E, D)
    scale: Tensor | None,  # ()
    scale_number: float,
    mask: Tensor | None,  # (n, E) bool
    text_mask: Tensor | None,  # (m, E) bool
    negatives: str,
    first: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log of the sums over this rectangle's kept logits, (n, Q) and (m, Q), and the positive logits in it, (n, Q)."""
    logits = _Logits(visual, text, scale, scale_number, mask, text_mask, negatives, first)
    kept = logits.both_ways()
    rows, columns = kept.flatten(2).logsumexp(dim=2), kept.permute(2, 3, 0, 1, 4).flatten(2).logsumexp(dim=2)
    return rows, columns, logits.positive()


def rectangle_gradients(
    weight: Tensor,  # ()
    visual: Tensor,
    text: Tensor,
    scale: Tensor | None,
    scale_number: float,
    mask: Tensor | None,
    text_mask: Tensor | None,
    negatives: str,
    first: int,
    row_lse: Tensor,  # (n, Q), over all rectangles
    column_lse: Tensor,  # (m, Q)
    needs: Sequence[bool],  # of visual, text, scale
) -> tuple[Tensor | None, ...]:
    """This rectangle's part of the gradients of weight · Σ [½ (row_lse + column_lse) − positive] over valid pairs."""
    wide = computing_dtype(visual)
    factor = torch.as_tensor(scale_number if scale is None else scale.detach(), dtype=wide, device=visual.device)
    leaves = [x.detach().to(wide).requires_grad_() for x in (visual, text, factor)]
    with torch.enable_grad():
        logits = _Logits(*leaves, 0.0, mask, text_mask, negatives, first)
        kept = logits.both_ways()
        # d lse / d l is e^(l − lse), whatever else is in the sum: that is why rectangles' gradients add up.
        shares = [(kept - lse).exp() for lse in (row_lse[:, :, None, None, None], column_lse[None, None, ..., None])]
        shares = [share.masked_fill(kept == -torch.inf, 0.0) for share in shares]
        value = weight * (0.5 * (shares[0].detach() + shares[1].detach()) * logits.directions()).sum()
        value = value - weight * logits.positive().sum() + 0 * sum(x.sum() for x in leaves)
    needed = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    gradients = iter(torch.autograd.grad(value, needed) if needed else ())
    return tuple(next(gradients) if need else None for need in needs)


class _Logits:
    """Logits of unordered pairs, (n, Q, m, Q), and which of them count."""

    def __init__(
        self,
        visual: Tensor,
        text: Tensor,
        scale: Tensor | None,
        scale_number: float,
        mask: Tensor | None,
        text_mask: Tensor | None,
        negatives: str,
        first: int,
    ) -> None:
        wide = computing_dtype(visual)
        changes, text_changes = (_changes(x, of) for x, of in ((visual, mask), (text, text_mask)))
        factor = scale_number if scale is None else scale.to(wide)
        self.values = factor * torch.einsum("iad,jcd->iajc", changes, text_changes)
        device = visual.device
        rows, columns = torch.arange(len(visual), device=device), torch.arange(len(text), device=device)
        pairs = torch.arange(changes.shape[1], device=device)
        self.own = (rows[:, None] + first == columns)[:, None, :, None]
        self.same_change = (pairs[:, None] == pairs)[None, :, None, :]
        self.valid = _valid(visual, mask)[:, :, None, None] & _valid(text, text_mask)
        self.negatives = negatives

    def both_ways(self) -> Tensor:
        """l and −l, (n, Q, m, Q, 2); −inf where it is not kept."""
        along = against = self.valid
        if self.negatives == "within":
            along = against = self.valid & self.own
        elif self.negatives == "distinct":
            along = self.valid & (self.own | ~self.same_change)
        kept = torch.stack([along, against], dim=-1)
        return self.directions().masked_fill(~kept, -torch.inf)

    def directions(self) -> Tensor:
        return torch.stack([self.values, -self.values], dim=-1)

    def positive(self) -> Tensor:  # (n, Q)
        return torch.where(self.valid & self.own & self.same_change, self.values, 0.0).sum(dim=(2, 3))


def _changes(x: Tensor, mask: Tensor | None) -> Tensor:
    """Unit changes of every pair a < b, (n, Q, D)."""
    present = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    before, after = torch.triu_indices(x.shape[1], x.shape[1], offset=1, device=x.device)
    centred = _centred(x, present)
    return _unit(centred[:, after] - centred[:, before])


def _valid(x: Tensor, mask: Tensor | None) -> Tensor:
    """Of every pair, (n, Q)."""
    present = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    before, after = torch.triu_indices(x.shape[1], x.shape[1], offset=1, device=x.device)
    return present[:, before] & present[:, after]


@dataclass(frozen=True)
class People:
    """Everybody of a batch: rectangles are cut out of it."""

    visual: Tensor  # (N, E, D)
    text: Tensor  # (N, E, D)
    scale: Tensor | float
    mask: Tensor | None  # (N, E); what is missing is NaN
    negatives: str

    def block(self, rows: range, columns: range) -> tuple[Any, ...]:
        """The arguments of `sums`: these people's faces against those people's texts."""
        tensor = isinstance(self.scale, Tensor)
        masks = [None if self.mask is None else _cut(self.mask, of) for of in (rows, columns)]
        scale = (self.scale, 0.0) if tensor else (None, self.scale)
        features = _cut(self.visual, rows), _cut(self.text, columns)
        return *features, *scale, *masks, self.negatives, rows.start - columns.start

    def totals(self, rows: range, columns: range) -> tuple[Tensor, Tensor]:
        """The exact log sums of these rows and columns over everybody, (n, Q) and (m, Q) float64."""
        everyone = range(len(self.visual))
        row_lse, column_lse, _ = rectangle_sums(*_widened(self.block(everyone, everyone)))
        return _cut(row_lse, rows), _cut(column_lse, columns)

    def valid(self) -> Tensor:
        """Of every pair, (N, Q)."""
        return _valid(self.visual, self.mask)


def people(
    count: int,
    emotions: int,
    width: int,
    *,
    missing: bool = False,
    negatives: str = "all",
    scale: Tensor | float = 20.0,
    **where: Any,
) -> People:
    """Unit features of `count` people; `missing`: not everybody has every emotion, and what is missing is NaN."""
    visual, text, mask = correlation_inputs(count, emotions, width, **where)
    visual, text = visual.detach(), text.detach()
    if missing:
        visual, text = (x.masked_fill(~mask[..., None], torch.nan) for x in (visual, text))
    return People(visual, text, scale, mask if missing else None, negatives)


def check_block(sums: Sums, gradients: Gradients, people: People, rows: range, columns: range) -> None:
    """A backend's sums and gradients of one rectangle are the specification's, of the same inputs in float64."""
    block, wide = people.block(rows, columns), computing_dtype(people.visual)
    results, expected = sums(*block), rectangle_sums(*_widened(block))
    valid = [_valid(x, mask) for x, mask in ((block[0], block[4]), (block[1], block[5]))]
    for result, exact, of in zip(results, expected, (*valid, valid[0]), strict=True):
        assert result.dtype == wide
        assert result.shape == exact.shape
        assert not result.isnan().any()
        assert_close_for(wide)(result[of], exact[of])
    assert results[2][~valid[0]].eq(0).all()

    weight = torch.tensor(1 / max(int(people.valid().sum()), 1), dtype=wide, device=people.visual.device)
    needs = [True, True, isinstance(people.scale, Tensor)]
    lse = people.totals(rows, columns)
    found = gradients(weight, *block, *(x.to(wide) for x in lse), needs)
    exact_gradients = rectangle_gradients(weight.double(), *_widened(block), *lse, needs)
    for gradient, exact in zip(found, exact_gradients, strict=True):
        if exact is None:
            assert gradient is None
            continue
        assert gradient.dtype == wide
        assert gradient.shape == exact.shape
        assert_close_for(wide)(gradient, exact)
    for gradient, mask in zip(found, block[4:6], strict=False):
        assert mask is None or gradient[~mask].eq(0).all()


def put_together(
    sums: Sums, gradients: Gradients, people: People, row_parts: Sequence[range], column_parts: Sequence[range]
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss and the gradients of visual, text and scale, (), from rectangles that cover everybody once.

    With negatives "within" only an individual's own column counts: then both parts have to be the same, and only the
    rectangles on the diagonal are computed.
    """
    wide, valid = computing_dtype(people.visual), people.valid()
    within = people.negatives == "within"
    blocks = [(rows, columns) for rows in row_parts for columns in column_parts if not within or rows == columns]
    row_lse, column_lse = (valid.new_full(valid.shape, -torch.inf, dtype=wide) for _ in range(2))
    positive = torch.zeros_like(row_lse)
    for rows, columns in blocks:
        of_rows, of_columns, own = sums(*people.block(rows, columns))
        _cut(row_lse, rows).copy_(torch.logaddexp(_cut(row_lse, rows), of_rows))
        _cut(column_lse, columns).copy_(torch.logaddexp(_cut(column_lse, columns), of_columns))
        _cut(positive, rows).add_(own)
    weight = 1 / valid.sum().clamp(min=1).to(wide)
    loss = weight * (0.5 * (row_lse + column_lse) - positive)[valid].sum()

    needs = [True, True, isinstance(people.scale, Tensor)]
    grad_visual, grad_text = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (people.visual, people.text))
    grad_scale = loss.new_zeros(()) if needs[2] else None
    for rows, columns in blocks:
        lse = _cut(row_lse, rows), _cut(column_lse, columns)
        of_visual, of_text, of_scale = gradients(weight, *people.block(rows, columns), *lse, needs)
        _cut(grad_visual, rows).add_(of_visual)
        _cut(grad_text, columns).add_(of_text)
        grad_scale = grad_scale + of_scale if needs[2] else None
    return loss, [grad_visual, grad_text, grad_scale]


def _cut(x: Tensor, people: range) -> Tensor:
    return x[people.start : people.stop]


def _widened(block: Sequence[Any]) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in block]


def in_float64(people: People) -> People:
    """The same people, already rounded, for the exact result."""
    visual, text, scale = _widened([people.visual, people.text, people.scale])
    return replace(people, visual=visual, text=text, scale=scale)
