"""Which implementation runs an operator.

An operator's file registers its implementations by backend name; `dispatch` picks one: the call's `backend=`, else
`use_backend(...)`, else the variable PCMECL_BACKEND, else "auto", the fastest that takes the tensors.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pcmecl_fast.ops.choice import fastest_first
from pcmecl_fast.ops.library import register_pair

NAMES = ("reference", "cpu", "triton", "cuda", "auto")

logger = logging.getLogger("pcmecl_fast")

_in_context: ContextVar[str | None] = ContextVar("pcmecl_fast_backend", default=None)
# The same where torch.compile traces: it guards a module's variable, but no context variable in every version. Threads
# that compile under different backends at a time have to name them in the calls.
_while_compiling: str | None = None
_implementations: dict[tuple[str, str], Implementation] = {}
_fused: dict[str, Callable[..., Tensor]] = {}
_missing: dict[str, Callable[[], str | None]] = {}
_logged: set[str] = set()


@dataclass(frozen=True)
class BackendStatus:
    """One line of the table of backends: `reason` is why it is missing, or "" where it is available."""

    name: str
    available: bool
    reason: str


@dataclass(frozen=True)
class Implementation:
    run: Callable[..., Tensor]
    why_not: Callable[..., str | None]


def use_backend(name: str) -> AbstractContextManager[None]:
    """Run the operators called inside the `with` block on one backend.

    Holds for the calling thread or task only (a context variable), nests, and gives way to a call's own `backend=`.
    The backward pass runs where its forward ran.

    Args:
        name: "reference", "cpu", "triton", "cuda" or "auto".

    Raises:
        ValueError: another name.
    """
    _check_name(name, "use_backend(name)")
    return _use_backend(name)


def backends() -> list[BackendStatus]:
    """What can run here: a record (name, available, reason) for "reference", "cpu", "triton" and "cuda"."""
    reasons = {name: _backend_missing(name) for name in NAMES if name != "auto"}
    return [BackendStatus(name, reason is None, reason or "") for name, reason in reasons.items()]


def register_backend(name: str, missing: Callable[[], str | None]) -> None:
    """Add a backend: `missing()` says why it cannot run here at all and how to get it, None where it can."""
    _check_name(name, "register_backend(name)")
    _missing[name] = missing


def register(
    operator: str,
    backend: str,
    run: Callable[..., Tensor],
    why_not: Callable[..., str | None] = lambda *args, **kwargs: None,
) -> None:
    """Add an operator's implementation for a backend.

    `run` takes the operator's checked arguments, as `reference.py` does; `why_not` takes the same and says why it
    cannot run them (a device, a dtype, a size), None where it can. It must not synchronise: it is asked every call.
    """
    _check_name(backend, "register(backend)")
    _implementations[operator, backend] = Implementation(run, why_not)


def register_fused(operator: str, call: Callable[..., Tensor]) -> None:
    """Say how the operator's checked arguments, with `backend=`, become a call of its `torch.library` operator."""
    _fused[operator] = call


def register_kernels(
    operator: str,
    backend: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    why_not: Callable[..., str | None] = lambda *args, **kwargs: None,
) -> None:
    """Add an operator's kernels for a backend: two plain functions on contiguous tensors, see `FusedOperator`.

    `why_not` is that of `register`.
    """
    register_pair(operator, backend, forward, backward)
    register(operator, backend, partial(_fused[operator], backend=backend), why_not)


def dispatch(operator: str, *args: Any, backend: str | None, **kwargs: Any) -> Tensor:
    """Run an operator on the chosen backend; a named one that cannot run raises RuntimeError, "auto" goes on."""
    name = choose(backend)
    if name != "auto":
        reason = _why_not(operator, name, args, kwargs)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run {operator}: {reason}")
        return _implementations[operator, name].run(*args, **kwargs)

    lacks: dict[str, str] = {}
    for name in fastest_first(operator, args[0]):
        reason = _why_not(operator, name, args, kwargs)
        if reason is None:
            break
        lacks[name] = reason
    if name == "reference" and not torch.compiler.is_compiling():
        _log_once(operator, lacks)
    return _implementations[operator, name].run(*args, **kwargs)


@contextmanager
def _use_backend(name: str) -> Iterator[None]:
    global _while_compiling
    token, before = _in_context.set(name), _while_compiling
    _while_compiling = name
    try:
        yield
    finally:
        _in_context.reset(token)
        _while_compiling = before


def choose(backend: str | None) -> str:
    if backend is not None:
        return _check_name(backend, "backend")
    in_context = _while_compiling if torch.compiler.is_compiling() else _in_context.get()
    if in_context is not None:
        return in_context
    in_environment = os.environ.get("PCMECL_BACKEND")
    return _check_name(in_environment, "PCMECL_BACKEND") if in_environment else "auto"


def _why_not(operator: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    reason = _backend_missing(name)
    if reason is not None:
        return reason
    implementation = _implementations.get((operator, name))
    if implementation is None:
        return f"it has no implementation of {operator}; take backend='auto' or 'reference'"
    return implementation.why_not(*args, **kwargs)


def _backend_missing(name: str) -> str | None:
    if name == "reference":
        return None
    if name not in _missing:
        return "this version does not have it yet; take 'reference' or 'auto'"
    return _missing[name]()


def _check_name(name: str, argument: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{argument}: got {name!r}; takes one of {', '.join(NAMES)}")
    return name


def _log_once(operator: str, lacks: dict[str, str]) -> None:
    if operator not in _logged:
        _logged.add(operator)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in lacks.items())
        logger.info("%s runs on the reference backend (%s)", operator, reasons)
