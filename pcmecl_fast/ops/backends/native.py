"""How tensors are handed to compiled functions, which know nothing of PyTorch: addresses, sizes, and a number a dtype.

A compiled function takes what it is given for granted: drivers beside this file allocate, and hand over contiguous
tensors of the shapes and dtypes that it expects. Whoever made a tensor keeps it until the call has returned.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

DTYPE = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
"""csrc/common/dtype.h's."""


def address(x: Tensor | None) -> int:
    """Where a tensor's numbers begin; 0 for None."""
    return 0 if x is None else x.data_ptr()


class Driver:
    """Operators on a compiled module.

    A forward takes an operator's arguments in the form of its schema and returns (result, *saved), or just the result.
    A backward takes (gradient of the result, *arguments, *saved, needs). An `…_and_gradients`, for results that are one
    number, takes (*arguments, needs) and returns (result, gradients), or None. Tensors are contiguous and outside
    autograd.
    """

    def __init__(self, module: ModuleType) -> None:
        self._module = module
