"""Times of the towers' paths and of whole training steps: what people run, and what this library runs instead.

    pytest bench --benchmark-only

The pairs are those of `bench.compare`, which shows more of them; both sides must agree before they are timed.
"""

from typing import Any

import pytest
import torch

from bench.compare import COMPARISONS, DTYPES, TOLERANCES, Comparison, load_all, relative_error
from bench.timing import finished

load_all()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = DTYPES["float32"]
NAMES = [name for name in COMPARISONS if name.startswith(("text_tower", "stage"))]


@pytest.fixture(scope="module", params=NAMES)
def work(request: pytest.FixtureRequest) -> Comparison:
    """A comparison whose sides agree."""
    work = COMPARISONS[request.param].build(DEVICE, DTYPE)
    plain, ours = work.sides[0].run(), work.sides[-1].run()
    assert max(map(relative_error, ours, plain)) <= TOLERANCES[DTYPE]
    return work


@pytest.mark.parametrize("side", ["plain", "pcmecl_fast"])
def test_step(benchmark: Any, work: Comparison, side: str, request: pytest.FixtureRequest) -> None:
    benchmark.group = request.node.callspec.params["work"]
    run = work.sides[0 if side == "plain" else -1].run
    # Not calibrated: the plain sides take seconds, and all are warm.
    benchmark.pedantic(finished(run), rounds=3 if side == "plain" else 10)
