"""A GPU's comparisons on a machine without one: every side is there and runs, at tiny sizes, and no number counts.

It shows beforehand what would fail on a rented GPU for another reason than the GPU: an import, an option, a shape. A
side that needs the GPU's kernels runs the reference instead.
"""

from __future__ import annotations

import torch

_on = False


def begin() -> None:
    """From now on this process builds a GPU's comparisons, whatever the device."""
    global _on
    _on = True


def is_on() -> bool:
    return _on


def as_on_gpu(device: torch.device) -> bool:
    """Whether a comparison has the sides that it has on a GPU."""
    return _on or device.type == "cuda"


def size(count: int, tiny: int = 2) -> int:
    """A comparison's size."""
    return min(count, tiny) if _on else count
