"""The order in which `auto` tries the backends, by operator and size: one table, from measurements.

None of the GPU's rows has been measured yet: until they are, `cuda` goes before `triton` everywhere, for it compiles
nothing at the first call. A measurement is `bench/gpu.sh` on a named GPU; where `triton` wins from some size on, that
operator gets a second row here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# operator -> rows (from this size on, this order), the largest size first. The size is the first tensor's leading one:
# samples, individuals, packed sequences or frames.
FASTEST_FIRST: dict[str, Sequence[tuple[int, tuple[str, ...]]]] = {
    "direction_logits": [(0, ("cuda", "triton", "cpu", "reference"))],  # cuda before triton: not measured
    "direction_loss": [(0, ("cuda", "triton", "cpu", "reference"))],  # likewise
    "correlation_loss": [(0, ("cuda", "triton", "cpu", "reference"))],  # likewise
    "tree_attention": [(0, ("cuda", "triton", "cpu", "reference"))],  # likewise
    "clip_frames": [(0, ("cuda", "triton", "cpu", "reference"))],  # likewise
}
DEFAULT = ("cuda", "triton", "cpu", "reference")


def fastest_first(operator: str, first: Any) -> tuple[str, ...]:
    """The backends in the order to try for an operator whose first argument is `first`."""
    rows = FASTEST_FIRST.get(operator, ())
    size = first.shape[0] if isinstance(first, Tensor) else 0
    return next((order for start, order in rows if size >= start), DEFAULT)
