"""How close a result must be to the exact one, by the result's dtype: defined once for all tests.

The exact one is computed in float64 from the same inputs, already rounded to the dtype under test. A half type's
tolerance is a few of its roundings; float32's leaves room for a logit scale of 100 on cosines right to 1e-7.
"""

from collections.abc import Callable
from functools import partial

import torch

TOLERANCES = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 8e-3},
}
DTYPES = tuple(TOLERANCES)


def assert_close_for(dtype: torch.dtype) -> Callable[..., None]:
    """A comparison `close(actual, expected)` at this dtype's tolerance; the two may differ in dtype and device."""
    return partial(torch.testing.assert_close, check_dtype=False, check_device=False, **TOLERANCES[dtype])
