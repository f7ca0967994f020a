"""correlation_loss over ranks: each has its own individuals, and their negatives are everybody's.

A rank has n of the N individuals, whose visual features are its rows of S, and meets the columns in blocks of text
features: all of them gathered, or those of one rank after the other, passed round a ring. A block is a rectangle of S,
which a backend's kernels work through tile by tile:

    sums       → ln Σ e^l of its rows and columns, and the rows' own logits l₊
    gradients  → of Σ [½ (row + column) − l₊] / P, given the sums over all blocks

    loss = 1/P · Σ over pairs a < b that are present of [½ (row + column) − l₊],   P = their number over all ranks

What a rank keeps between forward and backward are its own features and sums, O(N / ranks).

Sent by each of R ranks, of E·D numbers an individual: forward (R−1)·n of the text's; backward the same again, and
gradients of (R−1)·n (gathered) or R·n (passed round) individuals in the computing dtype. The rest are sums, one for
each pair of emotions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pcmecl_fast.distributed import Group, all_rows, own_rows_of_sum
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
    """

    rectangle: Rectangle
    negatives: str
    group: Group
    sizes: tuple[int, ...]
    overlap: bool

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        return len(self.sizes)

    @property
    def first(self) -> int:
        """The number of this rank's first individual."""
        return sum(self.sizes[: self.rank])


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


def check_alike(visual: Tensor, negatives: str, group: Group) -> tuple[int, ...]:
    """How many individuals each rank has; one exchange of a few numbers, which waits for the device.

    Raises:
        ValueError: a rank has other emotions, widths, dtypes or negatives than the first; on all ranks.
    """
    words = {"emotions": visual.shape[1], "features": visual.shape[2], "dtype": _DTYPES.index(visual.dtype)}
    words["negatives"] = _NEGATIVES.index(negatives)
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

        def sums(block: Tensor, block_mask: Tensor, first: int) -> tuple[Tensor, ...]:
            return call.rectangle.sums(visual, block, scale, number, present, block_mask, call.negatives, first)

        with autocast_off(visual):
            row, column, positive = _exchange(call).sums(text, present, sums)
            each = (row + column) / 2 - positive
            # In float64, as one sum over ranks: that of the losses, and of the pairs that they are the mean of.
            total = torch.stack([each.double().masked_fill(~valid, 0.0).sum(), valid.sum().double()])
            dist.all_reduce(total, group=call.group)
        pairs = total[1].clamp(min=1)
        ctx.save_for_backward(visual, text, scale, present, row, column, pairs)
        ctx.call, ctx.number = call, number
        return (total[0] / pairs).to(computing_dtype(visual))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        visual, text, scale, present, row, column, pairs = ctx.saved_tensors
        call: Call = ctx.call
        needs = list(ctx.needs_input_grad[:3])
        weight = grad.double()
        dist.all_reduce(weight, group=call.group)
        weight = (weight / pairs).to(computing_dtype(visual))

        def gradients(block: Tensor, block_mask: Tensor, first: int, block_column: Tensor) -> Any:
            return call.rectangle.gradients(
                weight, visual, block, scale, ctx.number, present, block_mask, call.negatives, first, row,
                block_column, needs,
            )  # fmt: skip

        with autocast_off(visual):
            found = _exchange(call).gradients(text, present, column, gradients)
        like = (visual, text, scale)
        return (*(None if x is None else x.to(y.dtype) for x, y in zip(found, like, strict=True)), None, None, None)


Sums = Callable[[Tensor, Tensor, int], tuple[Tensor, ...]]
"""Of a block (m, E, D), its mask (m, E), and its own first column: sums of rows, of columns, and positives."""
Gradients = Callable[[Tensor, Tensor, int, Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]
"""Of the same and the columns' sums (m, Q): gradients of the rows' features, of the block's and of the scale."""


def _exchange(call: Call) -> _Alone | _Gathered | _Ring:
    if call.negatives == "within" or call.ranks == 1:
        return _Alone(call)
    return _Ring(call) if call.overlap else _Gathered(call)


class _Alone:
    """Alone, or within individuals, nobody needs another's features."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def sums(self, text: Tensor, mask: Tensor, of: Sums) -> tuple[Tensor, ...]:
        return of(text, mask, 0)

    def gradients(self, text: Tensor, mask: Tensor, column: Tensor, of: Gradients) -> tuple[Tensor | None, ...]:
        return of(text, mask, 0, column)


class _Gathered:
    """All text features at once: a collective each way, and the memory for them."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def sums(self, text: Tensor, mask: Tensor, of: Sums) -> tuple[Tensor, ...]:
        call = self.call
        row, column, positive = of(self._all(text), self._all_of(mask), call.first)
        return row, self._joined(column)[call.first : call.first + len(text)].clone(), positive

    def gradients(self, text: Tensor, mask: Tensor, column: Tensor, of: Gradients) -> tuple[Tensor | None, ...]:
        call = self.call
        visual, block, scale = of(self._all(text), self._all_of(mask), call.first, self._all(column))
        return visual, None if block is None else own_rows_of_sum(block, call.sizes, call.group), scale

    def _all(self, x: Tensor) -> Tensor:
        return all_rows(x, self.call.sizes, self.call.group)

    def _all_of(self, mask: Tensor) -> Tensor:
        return self._all(mask.to(torch.uint8)).bool()

    def _joined(self, column: Tensor) -> Tensor:
        """ln Σ e^x over ranks."""
        most = column.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.call.group)
        most = most.clamp(min=torch.finfo(most.dtype).min)  # of nothing: −inf less −inf is no number
        total = (column - most).exp()
        dist.all_reduce(total, group=self.call.group)
        return total.log() + most


class _Ring:
    """Text features go round: every rank computes with one rank's, while the next rank's are on their way.

    What has been added up of a block follows it one place behind: its columns' sums, or its gradient, which so comes
    home after a whole round.
    """

    def __init__(self, call: Call) -> None:
        self.call = call

    def sums(self, text: Tensor, mask: Tensor, of: Sums) -> tuple[Tensor, ...]:
        rows, positives = [], []

        def compute(owner: int, block: Sequence[Tensor]) -> Tensor:
            row, column, positive = of(block[0], block[1].bool(), self._first_in(owner))
            rows.append(row)
            positives.append(positive)
            return column

        column = self._round([text, mask.to(torch.uint8)], compute, torch.logaddexp)
        row, positive = rows[0], positives[0]
        for other in rows[1:]:
            row = torch.logaddexp(row, other)
        return row, column, positive

    def gradients(self, text: Tensor, mask: Tensor, column: Tensor, of: Gradients) -> tuple[Tensor | None, ...]:
        totals: list[Tensor | None] = [None, None]  # of the rows' features and of the scale

        def compute(owner: int, block: Sequence[Tensor]) -> Tensor:
            visual, columns, scale = of(block[0], block[1].bool(), self._first_in(owner), block[2])
            for k, x in enumerate((visual, scale)):
                before = totals[k]
                totals[k] = x if before is None or x is None else before + x
            # A rank whose text needs no gradient still passes on the others'.
            return torch.zeros_like(block[0], dtype=column.dtype) if columns is None else columns

        block = self._round([text, mask.to(torch.uint8), column], compute, torch.add)
        return totals[0], block, totals[1]

    def _first_in(self, owner: int) -> int:
        """Where this rank's individuals begin in a rank's block: at 0 in its own, and nowhere in another's."""
        call = self.call
        return 0 if owner == call.rank else max(call.sizes) + sum(call.sizes)

    def _round(
        self,
        block: Sequence[Tensor],
        compute: Callable[[int, Sequence[Tensor]], Tensor],
        add: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """What all ranks compute of this rank's block, added up."""
        call = self.call
        partial: Tensor | None = None  # of this rank's step before, on its way
        behind: _Sending | None = None
        for step in range(call.ranks):
            owner = (call.rank - step) % call.ranks
            following = _Sending(call, block, owner) if step + 1 < call.ranks else None
            here = compute(owner, block)
            if behind is not None:
                (sum_so_far,) = behind.received()
                here = add(sum_so_far, here)
            partial = here
            behind = _Sending(call, [partial], owner)
            if following is not None:
                block = following.received()
        assert behind is not None
        return behind.received()[0]


class _Sending:
    """A block on its way to the next rank, and the one before it arriving from the last."""

    def __init__(self, call: Call, block: Sequence[Tensor], owner: int) -> None:
        to, source = ((call.rank + k) % call.ranks for k in (1, -1))
        arriving = call.sizes[(owner - 1) % call.ranks]
        self._sent = [x.contiguous() for x in block]  # kept until they are gone
        self._received = [x.new_empty(arriving, *x.shape[1:]) for x in block]
        peers = [to, source] if call.group is None else [dist.get_global_rank(call.group, k) for k in (to, source)]
        operations = [dist.P2POp(dist.isend, x, peers[0], call.group) for x in self._sent if x.numel()]
        operations += [dist.P2POp(dist.irecv, x, peers[1], call.group) for x in self._received if x.numel()]
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def received(self) -> Sequence[Tensor]:
        for work in self._works:
            work.wait()
        return self._received
