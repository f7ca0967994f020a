"""Every change of the image features against every change of the text features.

    Δv[i,ab] = unit(v[i,b] − v[i,a]),   Δt[i,ab] = unit(t[i,b] − t[i,a])
    L[(i,ab),(j,cd)] = scale · ⟨Δv[i,ab], Δt[j,cd]⟩
    loss = ½ · (mean over rows of CE + mean over columns of CE)

with a ≠ b, both present for individual i; the positive of a row is the same (i,ab); unit(x) is x / |x|, and 0 where
|x| ≤ 1e-8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from pcmecl_fast.distributed import Group
from pcmecl_fast.ops import checks, reference
from pcmecl_fast.ops.correlation_ranks import Call, check_alike, correlation_over_ranks
from pcmecl_fast.ops.operator import REFERENCE, Operator, is_explaining
from pcmecl_fast.ops.reference_rectangle import correlation_rectangle_gradients, correlation_rectangle_sums

NEGATIVES = ("all", "within", "distinct")


def correlation_loss(
    visual: Tensor,  # (N, E, D)
    text: Tensor,  # (N, E, D)
    *,
    scale: float | Tensor = 100.0,
    mask: Tensor | None = None,  # (N, E) bool
    negatives: str = "all",
    backend: str | None = None,
    group: Group | None = None,
    group_sizes: Sequence[int] | None = None,
    overlap: bool = False,
) -> Tensor:  # ()
    """Match each individual's changes of image features to its own changes of text features, among all of them.

    The loss is the symmetric cross entropy above over the valid directions: ordered pairs of different emotions that
    are both present. `negatives` selects what a direction (i, ab) is contrasted with, in its row and in its column:

    - "all": every valid (j, cd).
    - "within": the individual's own (i, cd). An individual has either no direction or at least two (a→b and b→a), so
      no row has only its positive.
    - "distinct": all but the same change in another individual, (j, ab) with j ≠ i, which is hardly a negative.

    The mean is over all valid directions, equally weighted. Without any (nobody has two emotions, or the batch is
    empty) the loss is 0 and still has a graph. Two emotions with identical features (norm ≤ 1e-8) still form
    directions: their logits are 0, and so is the gradient through them. Gradients flow to `visual`, `text` and a
    tensor `scale`; a missing emotion's features are not read and their gradient is 0.

    Numbers are supported up to 1e6 in size: each individual's mean is taken off first, so that one number beyond takes
    the low bits of the others along, and from 1e18 on products overflow to NaN.

    **Over ranks**, with `group`: each rank gives its own n of the N individuals, in the order of ranks, none at all
    included, and gets the loss of all N. A rank computes its own rows of S against everybody's columns and keeps
    O(N / ranks). Its gradients are those of the sum of what all ranks return, as `torch.distributed.nn` has it: the
    mean over ranks that DistributedDataParallel takes is then the loss's. All ranks must call, and all run backward,
    one without individuals too: its empty features must require gradients, as the others' do.

    Args:
        visual: image features, (N, E, D), unit features as CLIP gives them; float16, bfloat16, float32 or float64.
        text: unit text features, (N, E, D), the same dtype and device (under autocast the wider dtype counts).
        scale: CLIP's logit scale, above 0 and at most 1e6: a number, or a float tensor of shape () on the same
            device, whose value is checked on a CPU alone.
        mask: True where individual n has emotion e, (N, E) bool; None means everywhere.
        negatives: "all", "within" or "distinct".
        backend: see `use_backend`; None leaves the choice to it.
        group: a process group, such as `torch.distributed.group.WORLD`; None for this process alone.
        group_sizes: how many individuals each rank has; None asks them, and whether they are alike, which waits for the
            device.
        overlap: pass the text features round a ring instead of gathering them: the next ones arrive while those here
            are computed with.

    Returns:
        A scalar; float32 for half inputs, else the inputs' dtype.

    Raises:
        TypeError: an argument's type or dtype, or dtypes that differ.
        ValueError: a shape or value, devices that differ, an unknown backend or kind of negatives, ranks that differ.
        RuntimeError: a named backend that cannot run.

    Source: the paper's feature differencing; the symmetric cross entropy of CLIP over all pairs is ours.
    """
    if group is not None and not is_explaining():
        return _over_ranks(*_check(visual, text, scale, mask, negatives), backend, group, group_sizes, overlap)
    return CORRELATION_LOSS(visual, text, scale, mask, negatives, backend=backend)


def _check(
    visual: Tensor, text: Tensor, scale: float | Tensor, mask: Tensor | None, negatives: str
) -> tuple[Tensor, Tensor, float | Tensor, Tensor | None, str]:
    sizes = checks.Sizes(needed="D")
    checks.check_float("visual", visual)
    sizes.check("visual", visual, "NED")
    checks.check_float("text", text)
    sizes.check("text", text, "NED")
    visual, text = checks.alike(visual=visual, text=text)
    if mask is not None:
        checks.check_bool("mask", mask)
        sizes.check("mask", mask, "NE")
    checks.check_scale(scale)
    checks.check_one_device(visual=visual, text=text, mask=mask, scale=scale if isinstance(scale, Tensor) else None)
    checks.check_choice("negatives", negatives, NEGATIVES)
    return visual, text, scale, mask, negatives


def _over_ranks(
    visual: Tensor,
    text: Tensor,
    scale: float | Tensor,
    mask: Tensor | None,
    negatives: str,
    backend: str | None,
    group: Group,
    group_sizes: Sequence[int] | None,
    overlap: bool,
) -> Tensor:
    chosen = CORRELATION_LOSS.backend_for((visual, text, scale, mask, negatives), backend)
    rectangle = chosen.rectangles.get(CORRELATION_LOSS.name)
    if rectangle is None:
        raise RuntimeError(f"backend {chosen.name!r} cannot run correlation_loss over ranks; use backend='reference'")
    sizes = check_alike(visual, negatives, group, overlap=overlap) if group_sizes is None else tuple(group_sizes)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if len(sizes) != ranks or sizes[rank] != len(visual):
        raise ValueError(
            f"group_sizes: got {list(sizes)} for {ranks} ranks, of which this, {rank}, has {len(visual)} individuals"
        )
    call = Call(rectangle, negatives, group, sizes, overlap, on_gpu=visual.is_cuda)
    return correlation_over_ranks(visual, text, scale, mask, call)


def _outputs(visual: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and what a backend saves of the row and column of each pair a < b; b → a shares them."""
    individuals, emotions, _ = visual.shape
    wide = reference.computing_dtype(visual)
    pairs = emotions * (emotions - 1) // 2
    rows, columns = (visual.new_empty(individuals, pairs, dtype=wide) for _ in range(2))
    return visual.new_empty((), dtype=wide), rows, columns


CORRELATION_LOSS = Operator(
    reference.correlation_loss,
    "Tensor visual, Tensor text, Tensor|float scale, Tensor? mask, str negatives",
    gradients=("visual", "text", "scale"),
    outputs=_outputs,
    saved=("rows", "columns"),
    check=_check,
    sizes={
        "emotions": lambda visual, *rest: visual.shape[1],
        "scale": lambda visual, text, scale, *rest: checks.known_number(scale) or 0.0,
    },
)
REFERENCE.add_rectangle(CORRELATION_LOSS, correlation_rectangle_sums, correlation_rectangle_gradients)
