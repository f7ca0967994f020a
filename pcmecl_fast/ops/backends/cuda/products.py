"""PyTorch's matrix products as the kernels need them: in float32, whatever the user allows.

TF32's ten bits, times a logit scale of 100, would be wrong logits. Whether products may use it is a setting of the
process: it is turned off while `exact_products` lasts, one thread at a time, and then is as it was. To another thread,
which multiplies meanwhile, more exact products are never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from pcmecl_fast.ops.checks import autocast_is_on, autocast_off

_changing = RLock()


def exact_products(x: Tensor) -> AbstractContextManager[object]:
    """Products of tensors like x are in float32: neither autocast nor TF32 takes bits away."""
    if not x.is_cuda:
        return autocast_off(x)
    return _both(x) if autocast_is_on("cuda") else WithoutTF32()


@contextmanager
def _both(x: Tensor) -> Iterator[None]:
    with autocast_off(x), WithoutTF32():
        yield


class WithoutTF32:
    """No product of this process uses TF32. A class, which takes a third of a generator's time."""

    __slots__ = ("_restore",)

    def __enter__(self) -> None:
        _changing.acquire()
        try:
            allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
            self._restore = _turn_off() if allowed else None
        except BaseException:
            _changing.release()
            raise

    def __exit__(self, *raised: object) -> None:
        try:
            if self._restore is not None:
                self._restore()
        finally:
            _changing.release()


def _turn_off() -> Callable[[], None]:
    """Disallow TF32; returns what allows it again, by the interface that had: PyTorch refuses a mixture of the two."""
    matmul = torch.backends.cuda.matmul
    try:
        by_old_interface = matmul.allow_tf32
    except RuntimeError:  # by the new one alone
        by_old_interface = False
    if by_old_interface:
        level = _level()
        matmul.allow_tf32 = False
        return lambda: _allow_by_old_interface(level)
    matmul.fp32_precision = "none"
    inherited = matmul.fp32_precision  # from a setting for all of CUDA or of PyTorch
    matmul.fp32_precision = "ieee"
    return lambda: setattr(matmul, "fp32_precision", "none" if inherited == "tf32" else "tf32")


def _allow_by_old_interface(level: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    if level != "high":
        of_cpu: Any = torch.backends.mkldnn  # which the level is of, too
        before = of_cpu.matmul.fp32_precision
        torch.set_float32_matmul_precision(level)
        of_cpu.matmul.fp32_precision = before


def _level() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # that of CPUs is set by the new interface
        return "high"
