"""correlation_loss over ranks: each has its own individuals, and their negatives are everybody's.

A rank has n of the N individuals, whose visual features are its rows of S, and meets the columns in blocks of text
features: of some individuals of all ranks, gathered, or of one rank after the other, passed round a ring. A block and
some of the rows are a rectangle of S, which a backend's kernels work through tile by tile:

    sums       → ln Σ e^l of its rows and columns, and the rows' own logits l₊
    gradients  → of Σ [½ (row + column) − l₊] / P, given the sums over all blocks

    loss = 1/P · Σ over pairs a < b that are present of [½ (row + column) − l₊],   P = their number over all ranks

A rank keeps its own features, sums and gradients, O(N / ranks), and blocks of at most `_AT_ONCE` individuals.

Sent by each of R ranks, of E·D numbers an individual: forward (R−1)·n of the text's; backward the same again, but for a
single gathered block, which is kept; and gradients of (R−1)·n (gathered) or R·n (passed round) individuals in the
computing dtype. The rest are sums, one for each pair of emotions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pcmecl_fast.distributed import Group, all_rows, own_rows_of_all, own_rows_of_sum
from pcmecl_fast.ops.checks import autocast_off
from pcmecl_fast.ops.operator import Rectangle
from pcmecl_fast.ops.reference import computing_dtype


@dataclass(frozen=True)
class Call:
    """What ranks must have in common.

    Attributes:
        rectangle: the backend's kernels.
        negatives: "all", "within" or "distinct".
        group: the ranks.
        sizes: how many individuals each has.
        overlap: pass text features round, and compute with one rank's while the next rank's arrive.
        on_gpu: whether the features are on one.
    """

    rectangle: Rectangle
    negatives: str
    group: Group
    sizes: tuple[int, ...]
    overlap: bool
    on_gpu: bool = False

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        return len(self.sizes)


@torch.compiler.disable
def correlation_over_ranks(
    visual: Tensor,  # (n, E, D)
    text: Tensor,  # (n, E, D)
    scale: float | Tensor,
    mask: Tensor | None,  # (n, E) bool
    call: Call,
) -> Tensor:  # ()
    """The loss of all ranks' individuals, on each rank."""
    tensor, number = (scale, 0.0) if isinstance(scale, Tensor) else (None, float(scale))
    return _OverRanks.apply(visual, text, tensor, number, mask, call)


def check_alike(visual: Tensor, negatives: str, group: Group, *, overlap: bool) -> tuple[int, ...]:
    """How many individuals each rank has; one exchange of a few numbers, which waits for the device.

    Raises:
        ValueError: a rank has other emotions, widths, dtypes or negatives than the first; on all ranks.
    """
    words = {"emotions": visual.shape[1], "features": visual.shape[2], "dtype": _DTYPES.index(visual.dtype)}
    words |= {"negatives": _NEGATIVES.index(negatives), "overlap": int(overlap)}
    mine = torch.tensor([len(visual), *words.values()], device=visual.device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    table = [row.tolist() for row in every]
    for other, row in enumerate(table):
        for k, name in enumerate(words, 1):
            if row[k] != table[0][k]:
                raise ValueError(f"group: rank {other} has other {name} than rank 0; takes the same on all ranks")
    return tuple(row[0] for row in table)


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NEGATIVES = ("all", "within", "distinct")


class _OverRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, visual: Tensor, text: Tensor, scale: Tensor | None, number: float, mask: Tensor | None, call: Call
    ) -> Tensor:
        visual, text = visual.contiguous(), text.contiguous()
        present = visual.new_ones(visual.shape[:2], dtype=torch.bool) if mask is None else mask.contiguous()
        before, after = torch.triu_indices(visual.shape[1], visual.shape[1], 1, device=visual.device)
        valid = present[:, before] & present[:, after]  # (n, Q)
        wide = computing_dtype(visual)
        row, column = (torch.full(valid.shape, -torch.inf, dtype=wide, device=visual.device) for _ in range(2))
        positive = torch.zeros_like(row)
        parts = list(_parts(call))

        with autocast_off(visual):
            for part in parts:

                def sums(block: Tensor, block_mask: Tensor, place: int | None, part: _Part = part) -> Tensor:
                    total = torch.full((len(block), valid.shape[1]), -torch.inf, dtype=wide, device=block.device)
                    for rows, first in part.rectangles(len(visual), place):
                        of_rows, of_columns, own = call.rectangle.sums(
                            visual[rows], block, scale, number, present[rows], block_mask, call.negatives, first
                        )
                        row[rows] = torch.logaddexp(row[rows], of_rows)
                        positive[rows] += own
                        total = torch.logaddexp(total, of_columns)
                    return total

                column[part.own] = part.exchange.sums(text[part.own], present[part.own], sums)
            each = (row + column) / 2 - positive
            # In float64, as one sum over ranks: that of the losses, and of the pairs that they are the mean of.
            total = torch.stack([each.double().masked_fill(~valid, 0.0).sum(), valid.sum().double()])
            dist.all_reduce(total, group=call.group)
        pairs = total[1].clamp(min=1)
        ctx.save_for_backward(visual, text, scale, present, row, column, pairs)
        ctx.call, ctx.number, ctx.parts = call, number, parts
        return (total[0] / pairs).to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        visual, text, scale, present, row, column, pairs = ctx.saved_tensors
        call: Call = ctx.call
        needs = list(ctx.needs_input_grad[:3])
        weight = grad.double()
        dist.all_reduce(weight, group=call.group)
        wide = computing_dtype(visual)
        weight = (weight / pairs).to(wide)
        grad_visual, grad_text = (
            torch.zeros(x.shape, dtype=wide, device=x.device) if need else None
            for x, need in zip((visual, text), needs, strict=False)
        )
        grad_scale = torch.zeros((), dtype=torch.float64, device=visual.device) if needs[2] else None

        with autocast_off(visual):
            for part in ctx.parts:

                def gradients(
                    block: Tensor, block_mask: Tensor, place: int | None, lse: Tensor, part: _Part = part
                ) -> Tensor:
                    total = torch.zeros(block.shape, dtype=wide, device=block.device)
                    for rows, first in part.rectangles(len(visual), place):
                        of_visual, of_text, of_scale = call.rectangle.gradients(
                            weight, visual[rows], block, scale, ctx.number, present[rows], block_mask, call.negatives,
                            first, row[rows], lse, needs,
                        )  # fmt: skip
                        if grad_visual is not None and of_visual is not None:
                            grad_visual[rows] += of_visual
                        if of_text is not None:
                            total += of_text
                        if grad_scale is not None and of_scale is not None:
                            grad_scale.add_(of_scale)
                    return total

                own = part.own
                of_own = part.exchange.gradients(text[own], present[own], column[own], gradients)
                if grad_text is not None:
                    grad_text[own] = of_own
        found, like = (grad_visual, grad_text, grad_scale), (visual, text, scale)
        return (*(None if x is None else x.to(y.dtype) for x, y in zip(found, like, strict=True)), None, None, None)


@dataclass(frozen=True)
class _Part:
    """The columns of one exchange: some individuals of each rank.

    Attributes:
        own: this rank's.
        exchange: how all see them.
        within: whether rows meet their own columns alone.
        most: rows of a rectangle.
    """

    own: slice
    exchange: _Alone | _Gathered | _Ring
    within: bool
    most: int

    def rectangles(self, count: int, place: int | None) -> Iterator[tuple[slice, int]]:
        """Rows to be met with a block, and the column of the first one's own individual.

        Args:
            count: rows in all.
            place: where `own` begins in the block; None where it is not in it.
        """
        begin, end = (min(at, count) for at in (self.own.start, self.own.stop))
        # Rows beside `own` have their own individuals in other blocks; the columns here may be another rank's.
        beside = () if self.within else ((0, begin, None), (end, count, None))
        for start, stop, first in (*beside, (begin, end, place)):
            for at in range(start, stop, self.most):
                rows = slice(at, min(at + self.most, stop))
                yield rows, -self.most if first is None else first + at - start


_AT_ONCE = {"cpu": 128, "cuda": 4096}
"""Individuals of a block, of all ranks together: enough for kernels at their rate."""


def _parts(call: Call) -> Iterator[_Part]:
    """All columns, in blocks of at most `_AT_ONCE`; as many parts on each rank, some of them empty."""
    within = call.negatives == "within"
    most = _AT_ONCE["cuda" if call.on_gpu else "cpu"]
    blocks_apart = within or call.ranks == 1 or call.overlap
    each = max(1, most if blocks_apart else most // call.ranks)
    alone = within or call.ranks == 1
    keep = max(call.sizes) <= each
    kind = _Alone if alone else _Ring if call.overlap else partial(_Gathered, keep=keep)
    for begin in range(0, max(call.sizes), each):
        sizes = tuple(min(max(size - begin, 0), each) for size in call.sizes)
        own = slice(begin, begin + sizes[call.rank])
        yield _Part(own, kind(call, sizes), within, each if within else most)


Sums = Callable[[Tensor, Tensor, "int | None"], Tensor]
"""Of a block (m, E, D), its mask (m, E), and where this rank's own begin in it: this rank's sums of columns, (m, Q)."""
Gradients = Callable[[Tensor, Tensor, "int | None", Tensor], Tensor]
"""Of the same and the columns' sums (m, Q): this rank's part of the gradient of the block's features, (m, E, D)."""


class _Alone:
    """Alone, or within individuals, nobody needs another's features."""

    def __init__(self, call: Call, sizes: Sequence[int]) -> None:
        pass

    def sums(self, text: Tensor, mask: Tensor, of: Sums) -> Tensor:
        return of(text, mask, 0)

    def gradients(self, text: Tensor, mask: Tensor, column: Tensor, of: Gradients) -> Tensor:
        return of(text, mask, 0, column)


class _Gathered:
    """The text features of all ranks' part at once: a message of them, and one to their owners, each way.

    Those of a single part are kept for the gradient: they are no more than a block.
    """

    def __init__(self, call: Call, sizes: Sequence[int], *, keep: bool) -> None:
        self.group, self.sizes, self.keep = call.group, sizes, keep
        self.place = sum(sizes[: call.rank])
        self.kept: tuple[Tensor, Tensor] | None = None

    def sums(self, text: Tensor, mask: Tensor, of: Sums) -> Tensor:
        block, block_mask = self._all(text, mask)
        if self.keep:
            self.kept = block, block_mask
        return own_rows_of_all(of(block, block_mask, self.place), self.sizes, self.group).logsumexp(0)

    def gradients(self, text: Tensor, mask: Tensor, column: Tensor, of: Gradients) -> Tensor:
        if self.kept is None:
            block, block_mask, column = self._all(text, mask, column)
        else:
            (block, block_mask), (column,) = self.kept, self._all(column)
        return own_rows_of_sum(of(block, block_mask, self.place, column), self.sizes, self.group)

    def _all(self, *tensors: Tensor) -> list[Tensor]:
        return all_rows(*tensors, sizes=self.sizes, group=self.group)


class _Ring:
    """Text features go round: every rank computes with one rank's, while the next rank's are on their way.

    What has been added up of a block follows it one place behind: its columns' sums, or its gradient, which so comes
    home after a whole round.
    """

    def __init__(self, call: Call, sizes: Sequence[int]) -> None:
        self.call, self.sizes = call, sizes

    def sums(self, text: Tensor, mask: Tensor, of: Sums) -> Tensor:
        def compute(place: int | None, block: Sequence[Tensor]) -> Tensor:
            return of(block[0], block[1].bool(), place)

        return self._round([text, mask.to(torch.uint8)], compute, torch.logaddexp)

    def gradients(self, text: Tensor, mask: Tensor, column: Tensor, of: Gradients) -> Tensor:
        def compute(place: int | None, block: Sequence[Tensor]) -> Tensor:
            return of(block[0], block[1].bool(), place, block[2])

        return self._round([text, mask.to(torch.uint8), column], compute, torch.add)

    def _round(
        self,
        block: Sequence[Tensor],
        compute: Callable[[int | None, Sequence[Tensor]], Tensor],
        add: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """What all ranks compute of this rank's block, added up."""
        ranks, rank = self.call.ranks, self.call.rank
        behind: _Sending | None = None  # this rank's result of the step before, on its way
        for step in range(ranks):
            owner = (rank - step) % ranks
            following = self._send(block, owner) if step + 1 < ranks else None
            here = compute(0 if owner == rank else None, block)
            if behind is not None:
                (sum_so_far,) = behind.received()
                here = add(sum_so_far, here)
            behind = self._send([here], owner)
            if following is not None:
                block = following.received()
        assert behind is not None
        return behind.received()[0]

    def _send(self, block: Sequence[Tensor], owner: int) -> _Sending:
        return _Sending(self.call, block, arriving=self.sizes[(owner - 1) % self.call.ranks])


class _Sending:
    """A block on its way to the next rank, and the one before it arriving from the last."""

    def __init__(self, call: Call, block: Sequence[Tensor], *, arriving: int) -> None:
        to, source = (dist.get_global_rank(call.group, (call.rank + k) % call.ranks) for k in (1, -1))
        self._sent = [x.contiguous() for x in block]  # kept until they are gone
        self._received = [x.new_empty(arriving, *x.shape[1:]) for x in block]
        operations = [dist.P2POp(dist.isend, x, to, call.group) for x in self._sent if x.numel()]
        operations += [dist.P2POp(dist.irecv, x, source, call.group) for x in self._received if x.numel()]
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def received(self) -> Sequence[Tensor]:
        for work in self._works:
            work.wait()
        self._sent = []
        return self._received
