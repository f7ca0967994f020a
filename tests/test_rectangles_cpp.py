"""Rectangles of correlation_loss's logits by the C++ and the CUDA kernels, the latter under their host harness.

The reference's are held against the same formula, which tests/rectangles.py spells out.
"""

from functools import partial

import cuda_on_host
import pytest
import torch
from rectangles import check_block, in_float64, people, put_together, rectangle_gradients, rectangle_sums
from tolerances import assert_close_for

from pcmecl_fast.ops import correlation_loss
from pcmecl_fast.ops.operator import BACKENDS
from pcmecl_fast.ops.reference import computing_dtype

NEGATIVES = ["all", "within", "distinct"]
# Rows and columns of a batch: which of the rows' own individuals are among the columns, and from which column on.
CUTS = {
    "a square": (range(5), range(5)),
    "more columns than rows": (range(5), range(9)),
    "more rows than columns": (range(9), range(5)),
    "columns that begin before the rows": (range(3, 8), range(9)),
    "columns that end before the rows": (range(3, 8), range(6)),
    "columns that begin after the rows": (range(7), range(2, 9)),
    "other people's columns": (range(4), range(6, 9)),
    "the columns of people before": (range(6, 9), range(2)),
    "one column": (range(9), range(4, 5)),
    "one row": (range(4, 5), range(9)),
    "no rows": (range(4, 4), range(9)),
    "no columns": (range(9), range(4, 4)),
    "nobody": (range(4, 4), range(4, 4)),
}
CASES = [
    (cut, negatives)
    for cut, (rows, columns) in CUTS.items()
    for negatives in NEGATIVES
    if rows == columns or negatives != "within"
]
BY_DTYPE = {
    "reference": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    "cpu": (torch.float64, torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}


@pytest.fixture(params=BY_DTYPE)
def rectangle(request):
    """A backend's `sums` and `gradients`, CUDA's on the host; dtypes that it does not take are skipped."""
    if request.param == "cuda":
        if not cuda_on_host.compiler():
            pytest.skip("needs a C++ compiler and the sources")
        request.getfixturevalue("cuda_kernels_on_host")
    backend = BACKENDS[request.param]
    if backend.missing() is not None:
        pytest.skip(backend.missing())
    if request.node.callspec.params.get("dtype", torch.float32) not in BY_DTYPE[request.param]:
        pytest.skip(f"the {request.param} backend does not take this dtype")
    return backend.rectangles["correlation_loss"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("missing", [False, True], ids=["", "missing"])
@pytest.mark.parametrize(("cut", "negatives"), CASES)
def test_a_rectangle_gives_the_formulas_sums_and_gradients(rectangle, cut, negatives, missing, dtype):
    check_block(*rectangle, people(9, 7, 33, missing=missing, negatives=negatives, dtype=dtype), *CUTS[cut])


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("emotions", [1, 2, 3, 7, 8, 11])
@pytest.mark.parametrize("width", [16, 19])
def test_with_any_number_of_emotions(rectangle, width, emotions, negatives):
    rows, columns = (range(2, 8),) * 2 if negatives == "within" else (range(2, 8), range(4, 9))
    check_block(*rectangle, people(9, emotions, width, missing=emotions > 3, negatives=negatives), rows, columns)


@pytest.mark.parametrize("negatives", ["all", "distinct"])
@pytest.mark.parametrize(("rows", "columns"), [(range(50, 450), range(200)), (range(60), range(20, 450))])
def test_of_many_tiles(rectangle, rows, columns, negatives):
    check_block(*rectangle, people(450, 3, 5, negatives=negatives), rows, columns)


@pytest.mark.parametrize("missing", [False, True], ids=["", "missing"])
def test_of_many_people_within(rectangle, missing):
    check_block(*rectangle, people(120, 5, 9, missing=missing, negatives="within"), range(120), range(120))


@pytest.mark.parametrize("scale", [0.5, 100.0, torch.tensor(0.5), torch.tensor(100.0)], ids=str)
def test_scales_are_numbers_or_tensors_small_or_large(rectangle, scale):
    check_block(*rectangle, people(9, 4, 33, scale=scale), range(5), range(3, 9))


def test_gradients_nobody_needs_are_not_given(rectangle):
    _, gradients = rectangle
    few = people(5, 7, 16, scale=torch.tensor(20.0))
    rows, columns = range(3), range(1, 5)
    lse = [x.float() for x in few.totals(rows, columns)]
    of = partial(gradients, torch.tensor(0.1), *few.block(rows, columns), *lse)
    every = of([True, True, True])
    for needs in ([True, False, False], [False, True, False], [False, False, True]):
        for gradient, whole, need in zip(of(needs), every, needs, strict=True):
            assert torch.equal(gradient, whole) if need else gradient is None


def test_arguments_are_left_as_they_were(rectangle):
    sums, gradients = rectangle
    few = people(5, 7, 16, scale=torch.tensor(20.0))
    block, lse = few.block(range(3), range(1, 5)), [x.float() for x in few.totals(range(3), range(1, 5))]
    before = [x.clone() for x in (*block, *lse) if isinstance(x, torch.Tensor)]
    sums(*block)
    gradients(torch.tensor(0.1), *block, *lse, [True, True, True])
    for x, was in zip((x for x in (*block, *lse) if isinstance(x, torch.Tensor)), before, strict=True):
        assert torch.equal(x, was)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("missing", [False, True], ids=["", "missing"])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_rectangles_put_together_give_the_loss_and_all_its_gradients(rectangle, negatives, missing, dtype):
    assert_together(
        *rectangle, people(11, 7, 33, missing=missing, negatives=negatives, scale=tensor(20.0, dtype), dtype=dtype)
    )


@pytest.mark.parametrize("missing", [False, True], ids=["", "missing"])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_so_do_those_of_the_formula(negatives, missing):
    everybody = people(11, 4, 9, missing=missing, negatives=negatives, scale=tensor(20.0, torch.float64))
    assert_together(rectangle_sums, rectangle_gradients, in_float64(everybody))


@pytest.mark.skipif(not cuda_on_host.checks_accesses(), reason="needs GCC and the sources")
@pytest.mark.parametrize("emotions", [4, 7])
@pytest.mark.parametrize(
    ("rows", "columns", "negatives"),
    [
        (range(37), range(3, 40), "all"),
        (range(5, 40), range(37), "distinct"),
        (range(6), range(6, 40), "all"),
        (range(6), range(6), "within"),
    ],
    ids=["before", "behind", "apart", "within"],
)
def test_the_cuda_kernels_touch_their_own_memory_alone(watched, rows, columns, negatives, emotions):
    sums, gradients = watched.correlation_rectangle_sums, watched.correlation_rectangle_gradients
    check_block(sums, gradients, people(40, emotions, 9, missing=True, negatives=negatives), rows, columns)


@pytest.fixture(scope="module")
def watched():
    """The CUDA kernels under the checked host harness, which reports races and what is read or written elsewhere."""
    return cuda_on_host.load(checked=True)


def assert_together(sums, gradients, everybody):
    """Of three uneven shares of rows and of columns, one of them empty."""
    rows = [range(5), range(5, 9), range(9, 11)]
    columns = rows if everybody.negatives == "within" else [range(2), range(2, 2), range(2, 11)]
    loss, found = put_together(sums, gradients, everybody, rows, columns)

    exact = in_float64(everybody)
    leaves = [x.clone().requires_grad_() for x in (exact.visual, exact.text, exact.scale)]
    visual, text, scale = leaves
    options = {"mask": exact.mask, "negatives": exact.negatives, "backend": "reference"}
    expected = correlation_loss(visual, text, scale=scale, **options)
    close = assert_close_for(computing_dtype(everybody.visual))
    close(loss, expected)
    for gradient, whole in zip(found, torch.autograd.grad(expected, leaves), strict=True):
        close(gradient, whole)


def tensor(scale, dtype):
    """float64 beside float64, else float32."""
    return torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
