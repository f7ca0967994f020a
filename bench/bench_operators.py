"""Times of every operator on every backend that runs here, forward and with backward, at the sizes of `bench.cases`.

    pytest bench --benchmark-only

"compiled" is torch.compile of the reference. Before anything is timed, the result and the gradients must be finite and
agree with float64.
"""

from functools import partial
from typing import Any

import pytest
import torch

from bench.cases import CASES, NOT_BY_THE_REFERENCE, Case
from bench.compare import relative_error
from bench.timing import finished
from pcmecl_fast.ops import backend_status

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton also runs on a CPU in its interpreter, but that is for tests and says nothing about speed.
RUN_HERE = ("reference", "triton", "cuda") if DEVICE.type == "cuda" else ("reference", "cpu")
SIDES = [*(b.name for b in backend_status() if b.available and b.name in RUN_HERE), "compiled"]
NAMES = [name for name in CASES if name not in NOT_BY_THE_REFERENCE[DEVICE.type]]
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=[f"{name} | {side}" for name in NAMES for side in SIDES])
def work(request: pytest.FixtureRequest) -> tuple[Case, str]:
    """A case and its backend, checked against float64."""
    name, side = request.param.split(" | ")
    case = CASES[name].on(DEVICE)
    backend = "reference" if side == "compiled" else side
    measured = case.compiled() if side == "compiled" else case
    try:
        results = measured.run(backend)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    exact = CASES[name].on(DEVICE, torch.float64).run("reference")
    for actual, expected in zip(results, exact, strict=True):
        assert relative_error(actual, expected) < TOLERANCE
    return measured, backend


def test_forward(benchmark: Any, work: tuple[Case, str], request: pytest.FixtureRequest) -> None:
    benchmark.group = f"{request.node.callspec.params['work'].split(' | ')[0]}, forward"
    case, backend = work
    with torch.no_grad():
        benchmark(finished(partial(case.call, backend=backend)), *case.inputs)


def test_forward_and_backward(benchmark: Any, work: tuple[Case, str], request: pytest.FixtureRequest) -> None:
    benchmark.group = f"{request.node.callspec.params['work'].split(' | ')[0]}, forward and backward"
    case, backend = work
    benchmark(finished(lambda: case.run(backend)))
