"""What a call's checks and the choice of its backend depend on: calls that are alike in it are checked and chosen once.

At small sizes they are what a call costs. Values inside tensors are no part of it: whoever needs those checks them in
every call.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from pcmecl_fast.ops.prompt_tree import PromptTree

_TENSORS = (Tensor, nn.Parameter)
_VALUES = (int, float, bool, str, tuple, type(None), PromptTree)
_MOST = 1024

What = TypeVar("What")


def signature(requested: str, arguments: Sequence[Any]) -> tuple[Hashable, ...] | None:
    """The shapes, dtypes and devices of tensors, and the values of all else.

    None where there is more to a call than that: subclasses of tensors, strides, a sign that is still to be applied, a
    tensor of no dimensions, which stands for a number, and values that cannot be compared.
    """
    parts: list[Any] = [requested]
    for x in arguments:
        kind = type(x)
        if kind in _TENSORS:
            if not x.dim() or not x.is_contiguous() or x.is_neg():
                return None
            parts += [x.shape, x.dtype, x.device]
        elif kind is tuple:
            parts += [tuple(map(type, x)), x]
        elif kind in _VALUES:
            parts += [kind, x]
        else:
            return None
    return tuple(parts)


def unchanged(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Whether a check returned the very tensors that it was given, and equal values of the same type."""
    return all(
        x is y or (not isinstance(x, Tensor) and type(x) is type(y) and x == y)
        for x, y in zip(before, after, strict=True)
    )


class Remembered(Generic[What]):
    """Something by signature; of many, the first are forgotten together."""

    def __init__(self) -> None:
        self._found: dict[tuple[Hashable, ...], What] = {}

    def get(self, of: tuple[Hashable, ...]) -> What | None:
        try:
            return self._found.get(of)
        except TypeError:  # a tuple of what has no hash
            return None

    def keep(self, of: tuple[Hashable, ...], what: What) -> None:
        if len(self._found) >= _MOST:
            self._found.clear()
        try:
            self._found[of] = what
        except TypeError:
            return
