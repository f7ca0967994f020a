"""Which backends "auto" tries for an operator, the fastest first.

Rows for a GPU are measured there: `python -m bench.choose` prints them from a result file of `bench.compare`. Where
nothing has been measured the order is estimated, and says so.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

FASTEST_FIRST = ("cuda", "triton", "cpu", "reference")
"""The order without a row of its own: `cuda` before `triton`, because it compiles nothing on the first call."""


class Choice(NamedTuple):
    """The backends that come first for an operator on a GPU; the others of `FASTEST_FIRST` follow."""

    operator: str
    device: str
    """The GPU's name, as `torch.cuda.get_device_name` gives it; "" for all that have no row of their own."""
    dtype: str
    """"float32", "bfloat16", …; "" for all that have no row of their own."""
    fastest_first: tuple[str, ...]
    source: str
    """The result file, or how it was estimated."""


ESTIMATED = "estimated from the compiled code, not measured"
CHOICES = (
    Choice("correlation_loss", "", "", ("triton", "cuda"), ESTIMATED),
    Choice("tree_attention", "", "", ("triton", "cuda"), ESTIMATED),
)


@cache
def chosen(operator: str, device: str, dtype: str) -> Choice:
    """The row for an operator on a GPU, the most special one; `FASTEST_FIRST` where there is none."""
    fitting = [
        row for row in CHOICES if row.operator == operator and row.device in (device, "") and row.dtype in (dtype, "")
    ]
    if not fitting:
        return Choice(operator, "", "", FASTEST_FIRST, ESTIMATED)
    best = max(fitting, key=lambda row: (row.device != "", row.dtype != ""))
    rest = (name for name in FASTEST_FIRST if name not in best.fastest_first)
    return best._replace(fastest_first=(*best.fastest_first, *rest))
