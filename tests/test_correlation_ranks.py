"""correlation_loss over ranks is the loss of one process: its value, every gradient, and what ranks keep."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from operators import correlation_inputs
from tolerances import DTYPES, assert_close_for

from pcmecl_fast.distributed import share
from pcmecl_fast.ops import correlation_loss, correlation_ranks

SIZES = [(9, 5, 17), (6, 7, 33)]  # N, E, D
BACKENDS = {"reference": DTYPES, "cpu": (torch.bfloat16, torch.float32, torch.float64)}


@pytest.mark.parametrize("overlap", [False, True], ids=["gathered", "passed round"])
@pytest.mark.parametrize("negatives", ["all", "within", "distinct"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_have_the_loss_and_gradients_of_one_process(crew, backend, negatives, overlap):
    for ranks, parts in ((1, None), (2, None), (4, None), (4, (2, 0, 1)), (3, (0, 1))):
        check(crew, ranks, parts, backend, negatives, overlap, BACKENDS[backend], SIZES)


def test_in_float64_they_agree_to_1e_12(crew):
    for negatives in ("all", "within", "distinct"):
        for overlap in (False, True):
            check(crew, 4, (2, 0, 1), "reference", negatives, overlap, [torch.float64], SIZES, tolerance=1e-12)


def test_blocks_of_a_few_individuals_add_up(crew):
    for negatives in ("all", "within", "distinct"):
        for overlap in (False, True):
            check(crew, 2, (4,), "cpu", negatives, overlap, [torch.float64], SIZES, tolerance=1e-12, at_once=4)


def test_without_anybody_the_loss_is_0_and_has_a_graph(crew):
    for overlap in (False, True):
        found = crew(2, on_rank, (0, 0), "reference", "all", overlap, torch.float32, (0, 7, 5), True)
        for loss, *gradients in found:
            assert loss == 0
            assert all(x is None or not x.any() for x in gradients)


def test_ranks_that_differ_are_named(crew):
    for message in crew(3, with_another_dtype):
        assert message == "group: rank 2 has other dtype than rank 0; takes the same on all ranks"


def test_sizes_that_are_not_so_are_refused(crew):
    for rank, message in enumerate(crew(2, with_wrong_sizes)):
        assert message == f"group_sizes: got [3, 3] for 2 ranks, of which this, {rank}, has 2 individuals"


def check(crew, ranks, parts, backend, negatives, overlap, dtypes, sizes, tolerance=None, at_once=512):
    """All cases of one kind; `parts` are the individuals of the first ranks, and the last has the rest."""
    cases = []
    for dtype in dtypes:
        for size in sizes:
            counts = [part.stop - part.start for part in (share(size[0], of=ranks, at=k) for k in range(ranks))]
            if parts is not None:
                counts = [*parts, size[0] - sum(parts)]
            cases += [(tuple(counts), backend, negatives, overlap, dtype, size, missing) for missing in (False, True)]
    for case, *found in zip(cases, *crew(ranks, all_of, on_rank, cases, at_once), strict=True):
        *_, dtype, size, missing = case
        visual, text, mask = correlation_inputs(*size, dtype=dtype)
        exact = [x.detach().double().requires_grad_() for x in (visual, text)]
        scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
        expected = correlation_loss(
            *exact, scale=scale, mask=mask if missing else None, negatives=negatives, backend="reference"
        )
        expected.backward()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        close = assert_close_for if tolerance is None else lambda _: closer(tolerance)
        for loss, *_ in found:
            assert loss.dtype == wide
            close(wide)(loss, expected.detach())
        # Ranks' gradients are those of the sum of their losses; the scale's are its parts.
        for k, x in enumerate(exact, 1):
            close(dtype)(torch.cat([each[k] for each in found]).double() / ranks, x.grad)
        close(wide)(sum(each[3].double() for each in found) / ranks, scale.grad)


def closer(tolerance):
    return lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)


def all_of(function, cases, at_once):
    with patch.dict(correlation_ranks._AT_ONCE, cpu=at_once):  # for this call alone: the process stays
        return [function(*case) for case in cases]


def on_rank(counts, backend, negatives, overlap, dtype, size, missing):
    rank, first = dist.get_rank(), sum(counts[: dist.get_rank()])
    rows = slice(first, first + counts[rank])
    visual, text, mask = correlation_inputs(*size, dtype=dtype)
    visual, text = (x.detach()[rows].clone().requires_grad_() for x in (visual, text))
    scale = torch.tensor(20.0, dtype=dtype if dtype == torch.float64 else torch.float32, requires_grad=True)
    loss = correlation_loss(
        visual, text, scale=scale, mask=mask[rows] if missing else None, negatives=negatives, backend=backend,
        group=dist.group.WORLD, group_sizes=None if overlap else counts, overlap=overlap,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), visual.grad, text.grad, scale.grad


def with_another_dtype():
    dtype = torch.float64 if dist.get_rank() == 2 else torch.float32
    visual, text, _ = correlation_inputs(2, 3, 4, dtype=dtype)
    try:
        correlation_loss(visual, text, backend="reference", group=dist.group.WORLD)
    except ValueError as error:
        return str(error)


def with_wrong_sizes():
    visual, text, _ = correlation_inputs(2, 3, 4)
    try:
        correlation_loss(visual, text, backend="reference", group=dist.group.WORLD, group_sizes=(3, 3))
    except ValueError as error:
        return str(error)
