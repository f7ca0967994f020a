"""Operators and backends: an operator is declared once, as one object, and backends add their kernels to it.

    DIRECTION_LOSS = Operator(reference.direction_loss, schema, gradients=…, outputs=…)       in ops/direction.py
    CPU.add(DIRECTION_LOSS, forward, backward, limits)                                        in ops/backends/cpu.py

Calling an operator picks a backend: the call's `backend=`, else `use_backend(...)`, else the variable PCMECL_BACKEND,
else "auto", the fastest that supports the arguments. Kernels run inside a pair of `torch.library` operators,
`pcmecl_fast::<name>` and `pcmecl_fast::<name>_backward`, whose last argument is the backend's name: autograd, fake
kernels, autocast, contiguity and the error of a second derivative live here, once for every operator and backend.

Autograd is two `torch.autograd.Function`s registered under the Autograd key: `torch.library.register_autograd` would
cost 25 µs more per call, as long as some of these operators take in total. A call that nobody observes goes past the
dispatcher altogether, through a third `autograd.Function`: the four Python functions that it calls take 50 µs more.
And if a call like it has been checked before (`ops/signature.py`), neither that nor the choice is repeated: 25 µs.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library

from pcmecl_fast.ops import autograd
from pcmecl_fast.ops.checks import as_stored, outside_autocast
from pcmecl_fast.ops.choice import FASTEST_FIRST, chosen
from pcmecl_fast.ops.limits import Limits, dtype_word
from pcmecl_fast.ops.signature import Remembered, signature, unchanged

NAMESPACE = "pcmecl_fast"
NAMES = (*reversed(FASTEST_FIRST), "xformers", "auto")

logger = logging.getLogger("pcmecl_fast")

_library = Library(NAMESPACE, "DEF")
_in_context: ContextVar[str | None] = ContextVar("pcmecl_fast_backend", default=None)
# The same for torch.compile, which guards module variables but, in some versions, not context variables. Threads that
# compile under different backends at the same time must name them in the calls.
_while_compiling: list[str] = []
_explaining: ContextVar[bool] = ContextVar("pcmecl_fast_explaining", default=False)
_logged: set[tuple[str, str]] = set()


# ---- Backends --------------------------------------------------------------------------------------------------------


class Implementation(NamedTuple):
    """An operator on one backend; without a `backward`, PyTorch differentiates `forward`."""

    backend: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None
    limits: Limits | None
    checks_values_on: tuple[str, ...]
    with_gradients: Callable[..., Any] | None


class _Choice(NamedTuple):
    """The backends that a call tried, the one that runs it last."""

    operator: str
    implementation: Implementation
    tried: tuple[Backend, ...]

    def stands(self) -> bool:
        for backend in self.tried:
            if BACKENDS.get(backend.name) is not backend:
                return False
        last = self.tried[-1]
        return last.implementations.get(self.operator) is self.implementation and last.missing() is None


class Rectangle(NamedTuple):
    """A part of an operator that compares everything with everything: some rows with some columns.

    Attributes:
        sums: what the part adds to the sums of its rows and columns.
        gradients: of the part, given the sums over all parts.
    """

    sums: Callable[..., tuple[Tensor, ...]]
    gradients: Callable[..., Sequence[Tensor | None]]


class Backend:
    """One way of running operators, and its kernels.

    Args:
        name: "reference", "cpu", "triton", "cuda" or "xformers".
        missing: returns why the backend cannot run here at all and how to get it, or None if it can. Called each time.
    """

    def __init__(self, name: str, missing: Callable[[], str | None]) -> None:
        self.name = name
        self.missing = missing
        self.implementations: dict[str, Implementation] = {}
        self.rectangles: dict[str, Rectangle] = {}

    def add(
        self,
        operator: Operator,
        forward: Callable[..., Any],
        backward: Callable[..., Any] | None = None,
        limits: Limits | None = None,
        checks_values_on: tuple[str, ...] = (),
        with_gradients: Callable[..., tuple[Tensor, Sequence[Tensor | None]] | None] | None = None,
    ) -> None:
        """Add an operator.

        Args:
            operator: which one.
            forward: takes the schema's arguments and returns (result, *saved), or just the result if nothing is saved.
                Tensors arrive contiguous, outside autocast and outside autograd.
            backward: takes (gradient of the result, *the schema's arguments, *saved, needs) and returns a gradient, or
                None where `needs` is False, for each name in the operator's `gradients`. Without it, `forward` takes
                the operator's arguments as they are and is differentiated by PyTorch.
            limits: what the two support; None for everything the operator accepts.
            checks_values_on: types of device where `forward` itself refuses what the operator's `check_values` refuses.
            with_gradients: for a result that is one number, all in one pass: takes (*the schema's arguments, needs) and
                returns the result and what `backward` does for a gradient of 1; or None for the call to take the two.
        """
        self.implementations[operator.name] = Implementation(
            self.name, forward, backward, limits, checks_values_on, with_gradients
        )

    def add_rectangle(
        self,
        operator: Operator,
        sums: Callable[..., tuple[Tensor, ...]],
        gradients: Callable[..., Sequence[Tensor | None]],
    ) -> None:
        """Add an operator's parts, which ranks compute together; `ops/correlation_ranks.py` says what they take."""
        self.rectangles[operator.name] = Rectangle(sums, gradients)

    def takes(self, operator: Operator, device: str) -> bool:
        """Whether the operator's kernels, if there are any, work on this type of device."""
        implementation = self.implementations.get(operator.name)
        return implementation is not None and (implementation.limits is None or device in implementation.limits.devices)

    def unsupported_reason(self, operator: Operator, arguments: Sequence[Any]) -> str | None:
        """Why this backend cannot run the call, or None if it can."""
        reason = self.missing()
        if reason is not None:
            return reason
        implementation = self.implementations.get(operator.name)
        if implementation is None:
            return f"it has no implementation of {operator.name}; use backend='auto' or 'reference'"
        limits = implementation.limits
        return None if limits is None else limits.unsupported_reason(operator.sizes, arguments)


BACKENDS: dict[str, Backend] = {}
"""Every backend by name; filled by the files in `ops/backends`."""

BACKENDS["reference"] = REFERENCE = Backend("reference", missing=lambda: None)


@dataclass(frozen=True)
class BackendStatus:
    """One row of the table of backends: `reason` is why it is missing, or "" if it is available."""

    name: str
    available: bool
    reason: str


def backend_status() -> list[BackendStatus]:
    """What can run here: a record (name, available, reason) for each of the backends."""
    reasons = {name: BACKENDS[name].missing() for name in NAMES if name != "auto"}
    return [BackendStatus(name, reason is None, reason or "") for name, reason in reasons.items()]


def use_backend(name: str) -> AbstractContextManager[None]:
    """Run the operators called inside the `with` block on one backend.

    Applies to the calling thread or task only (a context variable), nests, and yields to a call's own `backend=`.
    The backward pass runs where its forward ran.

    Args:
        name: "reference", "cpu", "triton", "cuda", "xformers" or "auto".

    Raises:
        ValueError: an unknown name.
    """
    return _use_backend(_checked_name(name, "use_backend(name)"))


@contextmanager
def _use_backend(name: str) -> Iterator[None]:
    token = _in_context.set(name)
    _while_compiling.append(name)
    try:
        yield
    finally:
        _in_context.reset(token)
        _while_compiling.remove(name)


def requested_backend(backend: str | None) -> str:
    """The call's choice, else the context's, else the environment's, else "auto"."""
    if backend is not None:
        return _checked_name(backend, "backend")
    if torch.compiler.is_compiling():
        in_context = _while_compiling[-1] if _while_compiling else None
    else:
        in_context = _in_context.get()
    if in_context is not None:
        return in_context
    in_environment = os.environ.get("PCMECL_BACKEND")
    return _checked_name(in_environment, "PCMECL_BACKEND") if in_environment else "auto"


def usable_backend(backend: str | None) -> str:
    """`requested_backend`, checked before any work is done.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: it cannot run here; the message says why and how to get it.
    """
    name = requested_backend(backend)
    reason = None if name == "auto" else BACKENDS[name].missing()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    return name


def _checked_name(name: str, argument: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{argument}: got {name!r}; takes one of {', '.join(NAMES)}")
    return name


# ---- Explanations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """Which backend a call would run on, and why not on each of the others."""

    operator: str
    backend: str
    why_not: dict[str, str]

    def __str__(self) -> str:
        others = "; ".join(f"{name}: {reason}" for name, reason in self.why_not.items())
        return f"{self.operator} runs on {self.backend}" + (f" ({others})" if others else "")


def is_explaining() -> bool:
    """Whether a call is only to tell where it would run."""
    return not torch.compiler.is_compiling() and _explaining.get()


def explain(operator: Callable[..., Any], *arguments: Any, **options: Any) -> Explanation:
    """Tell which backend a call would run on and why not on the others; nothing is computed.

        print(ops.explain(ops.direction_loss, source, edited, bank, individual, source_emotion, target_emotion))
        direction_loss runs on cpu (cuda: there is no CUDA device; triton: no CUDA device; reference: slower than cpu)

    Args:
        operator: one of the functions of `pcmecl_fast.ops`.
        arguments, options: those of the call, `backend=` included.

    Raises:
        TypeError: anything but an operator of `pcmecl_fast.ops`; or whatever the call would raise.
        RuntimeError: a named backend that cannot run.
    """
    token = _explaining.set(True)
    try:
        explanation = operator(*arguments, **options)
    finally:
        _explaining.reset(token)
    if not isinstance(explanation, Explanation):
        raise TypeError(f"operator: got {operator!r}; takes a function of pcmecl_fast.ops, such as ops.direction_loss")
    return explanation


# ---- Operators -------------------------------------------------------------------------------------------------------


def _split(value: float | Tensor) -> tuple[Tensor | None, float]:
    """A number or a tensor in schema form, without waiting for a device."""
    return (value, 0.0) if isinstance(value, Tensor) else (None, float(value))


# Argument types that torch's schemas lack: what replaces them in the schema, and how to flatten a value to that.
_COMPOSITE: dict[str, tuple[str, Callable[[Any], tuple[Any, ...]]]] = {
    "Tensor|float": ("Tensor? {0}, float {0}_number", _split),
    "PromptTree": ("int prefix, int[] segment_lengths", lambda tree: (tree.prefix, tree.segment_lengths)),
}


class Operator:
    """An operator: its specification, its schema, and what is needed to differentiate and trace it.

    Called with the reference's arguments and `backend=`; returns the result.

    Args:
        reference: the specification in plain PyTorch; its name is the operator's.
        schema: the arguments in the notation of `torch.library`, plus two types: "Tensor|float scale", which
            becomes "Tensor? scale, float scale_number" for the kernels, and "PromptTree layout", which becomes
            "int prefix, int[] segment_lengths". The first argument is a tensor.
        gradients: names of the arguments that have a gradient, in order.
        outputs: takes the kernels' arguments and returns empty tensors like those their forward returns:
            (result, *saved).
        saved: names of the tensors that the forward saves for the backward in addition to its arguments.
        keeps_result: whether the backward also gets the result, before the saved ones.
        check: takes the arguments, raises unless they are right, and returns them as the kernels take them; reads no
            values of tensors, but of those of no dimensions.
        sizes: the quantities `Limits` may bound: functions of the operator's arguments, by name.
        check_values: raises if a tensor among the operator's arguments holds a value that it does not take, such as an
            index out of range; called unless the backend's kernels check that themselves.
    """

    def __init__(
        self,
        reference: Callable[..., Tensor],
        schema: str,
        *,
        gradients: Sequence[str],
        outputs: Callable[..., tuple[Tensor, ...]],
        saved: Sequence[str] = (),
        keeps_result: bool = False,
        check: Callable[..., Sequence[Any]] = lambda *arguments: arguments,
        sizes: Mapping[str, Callable[..., float]] | None = None,
        check_values: Callable[..., None] = lambda *arguments: None,
    ) -> None:
        self.name = reference.__name__
        self.reference = reference
        self._check, self._check_values = check, check_values
        self._choices = Remembered[_Choice]()
        self.sizes = dict(sizes or {})
        self._outputs = outputs
        REFERENCE.add(self, reference)
        self._keep_from = 0 if keeps_result else 1

        kinds = [argument.strip().split() for argument in schema.split(",")]
        self._composite = [_COMPOSITE[kind][1] if kind in _COMPOSITE else None for kind, _ in kinds]
        flat = ", ".join(
            _COMPOSITE[kind][0].format(name) if kind in _COMPOSITE else f"{kind} {name}" for kind, name in kinds
        )
        declared = [argument.split() for argument in flat.split(", ")]
        names = [name for _, name in declared]
        self._gradients = [names.index(name) for name in gradients]
        self._tensors = [i for i, (kind, _) in enumerate(declared) if kind in ("Tensor", "Tensor?")]
        self._gradients_among_tensors = [self._tensors.index(i) for i in self._gradients]

        kept = (["result"] if keeps_result else []) + list(saved)
        backward = ", ".join(["Tensor grad", flat, *(f"Tensor {name}" for name in kept), "bool[] needs", "str backend"])
        _library.define(f"{self.name}({flat}, str backend) -> {_tensors(1 + len(saved))}")
        _library.define(f"{self.name}_backward({backward}) -> {_tensors(len(gradients))}")
        self._forward = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        self._backward = getattr(getattr(torch.ops, NAMESPACE), f"{self.name}_backward").default
        self._function, self._twice = autograd.differentiable_once(self), autograd.not_differentiable_twice(self)
        self._direct_function = autograd.differentiable_directly(self)
        for name, run, differentiate, fake in (
            (self.name, self._run_forward, self._differentiate, self._fake_forward),
            (f"{self.name}_backward", self._run_backward, self._differentiate_backward, self._fake_backward),
        ):
            _library.impl(name, run, "CompositeExplicitAutograd")
            _library.impl(name, differentiate, "Autograd")
            torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)

    def __call__(self, *given: Any, backend: str | None) -> Any:
        """Run on the chosen backend; a named one that cannot run raises RuntimeError, "auto" tries the next."""
        requested, explaining = requested_backend(backend), is_explaining()
        direct = not (torch.compiler.is_compiling() or explaining or autograd.watched())
        alike = signature(requested, given) if direct else None
        choice = None if alike is None else self._choices.get(alike)
        arguments: Sequence[Any] = given
        if choice is not None and choice.stands():
            implementation = choice.implementation
        else:
            arguments = self._check(*given)
            if explaining:
                self._check_values(*arguments)
                return self._explanation(requested, arguments)
            name = self._fastest(arguments) if requested == "auto" else self._checked(requested, arguments)
            implementation = self._implementation(name)
            if alike is not None and unchanged(given, arguments):
                tried = self._order(arguments[0]) if requested == "auto" else (name,)
                tried = tried[: tried.index(name) + 1]
                self._choices.keep(alike, _Choice(self.name, implementation, tuple(map(BACKENDS.__getitem__, tried))))
        if not _checked_by_kernels(implementation, arguments[0]):
            self._check_values(*arguments)
        if implementation.backward is None:
            return implementation.forward(*arguments)
        flat = self._flat(arguments)
        if direct and (alike is not None or self._are_plain(flat)):
            if alike is None:
                self._make_contiguous(flat)
            if torch.is_grad_enabled() and self._differentiated(flat):
                return self._direct_function.apply(implementation, flat, *[flat[i] for i in self._tensors])
            results = outside_autocast(implementation.forward, flat)
            return results if isinstance(results, Tensor) else results[0]
        results = self._forward(*flat, implementation.backend)
        return results[0] if isinstance(results, tuple) else results

    def backend_for(self, arguments: Sequence[Any], backend: str | None) -> Backend:
        """The backend that a call with these arguments runs on."""
        requested = requested_backend(backend)
        return BACKENDS[self._fastest(arguments) if requested == "auto" else self._checked(requested, arguments)]

    def _fastest(self, arguments: Sequence[Any]) -> str:
        device, order = arguments[0].device.type, self._order(arguments[0])
        for name in order:
            # Asking whether there is a GPU takes longer than seeing that the tensors are not on one.
            backend = BACKENDS[name]
            if backend.takes(self, device) and backend.unsupported_reason(self, arguments) is None:
                break
        if not torch.compiler.is_compiling() and (self.name, name) not in _logged:
            _logged.add((self.name, name))
            explanation = self._explanation("auto", arguments)
            faster = order[: order.index(name)]
            reasons = {other: reason for other, reason in explanation.why_not.items() if other in faster}
            logger.info("%s runs on %s%s", self.name, name, _in_short(reasons))
        return name

    def _order(self, first: Tensor) -> tuple[str, ...]:
        """The backends that "auto" tries, the fastest first."""
        if not first.is_cuda:
            return FASTEST_FIRST
        return chosen(self.name, _gpu_name(first.device), dtype_word(first.dtype)).fastest_first

    def _checked(self, name: str, arguments: Sequence[Any]) -> str:
        reason = BACKENDS[name].unsupported_reason(self, arguments)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run {self.name}: {reason}")
        return name

    def _explanation(self, requested: str, arguments: Sequence[Any]) -> Explanation:
        order = self._order(arguments[0])
        reasons = {name: BACKENDS[name].unsupported_reason(self, arguments) for name in order}
        if requested == "auto":
            name = next(name for name, reason in reasons.items() if reason is None)
            otherwise = f"slower than {name}"
        else:
            name, otherwise = self._checked(requested, arguments), f"{requested} was requested"
        return Explanation(
            self.name, name, {other: reason or otherwise for other, reason in reasons.items() if other != name}
        )

    def _flat(self, arguments: Sequence[Any]) -> list[Any]:
        """The arguments in the form of the schema."""
        flat: list[Any] = []
        for flatten, value in zip(self._composite, arguments, strict=True):
            if flatten is None:
                flat.append(value)
            else:
                flat += flatten(value)
        return flat

    def _implementation(self, backend: str) -> Implementation:
        return BACKENDS[backend].implementations[self.name]

    def _are_plain(self, flat: Sequence[Any]) -> bool:
        """Whether no tensor would see the call pass the dispatcher."""
        for i in self._tensors:
            kind = type(flat[i])
            if kind is not Tensor and kind is not torch.nn.Parameter and flat[i] is not None:
                return False
        return True

    def _results(self, implementation: Implementation, flat: list[Any]) -> tuple[Tensor, ...]:
        """What the kernels' forward returns; `flat`'s tensors become contiguous."""
        self._make_contiguous(flat)
        results = outside_autocast(implementation.forward, flat)
        return (results,) if isinstance(results, Tensor) else results

    def _gradients_of(self, implementation: Implementation, flat: list[Any]) -> Sequence[Tensor | None]:
        """What the kernels' backward returns; `flat`, which begins with the result's gradient, becomes contiguous."""
        assert implementation.backward is not None
        flat[0] = as_stored(flat[0])
        self._make_contiguous(flat, first=1)
        return outside_autocast(implementation.backward, flat)

    def _make_contiguous(self, flat: list[Any], first: int = 0) -> None:
        """The arguments' tensors; they begin at `first`."""
        for i in self._tensors:
            if flat[first + i] is not None:
                flat[first + i] = as_stored(flat[first + i])

    def _differentiated(self, flat: Sequence[Any]) -> bool:
        """Whether autograd is to know: of a forward derivative too, which it then refuses."""
        inputs = (flat[i] for i in self._gradients)
        return any(x is not None and x.requires_grad for x in inputs) or torch.autograd.forward_ad._current_level >= 0

    def _run_forward(self, *arguments: Any) -> Any:
        *flat, backend = arguments
        self._check_devices(flat, backend)
        return _returned(self._results(self._implementation(backend), flat))

    def _run_backward(self, *arguments: Any) -> Any:
        *flat, needs, backend = arguments
        self._check_devices(flat, backend)
        gradients = self._gradients_of(self._implementation(backend), [*flat, needs])
        return _returned([flat[0].new_empty(0) if gradient is None else gradient for gradient in gradients])

    def _check_devices(self, flat: Sequence[Any], backend: str) -> None:
        """Nothing has checked the arguments of a bare `torch.ops` call, and kernels follow their pointers."""
        device = flat[0].device
        for x in flat:
            if isinstance(x, Tensor) and x.device != device:
                raise RuntimeError(
                    f"{self.name}: got tensors on {device} and on {x.device}; takes tensors on one device"
                )
        if not BACKENDS[backend].takes(self, device.type):
            raise RuntimeError(f"backend {backend!r} cannot run {self.name}: got a tensor on {device}")

    def _fake_forward(self, *arguments: Any) -> Any:
        return _returned(self._outputs(*arguments[:-1]))

    def _fake_backward(self, grad: Tensor, *arguments: Any) -> Any:
        needs = arguments[-2]
        inputs = [arguments[i] for i in self._gradients]
        return _returned(
            [x.new_empty(x.shape) if need else grad.new_empty(0) for x, need in zip(inputs, needs, strict=True)]
        )

    def _differentiate(self, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and self._differentiated(arguments):
            return self._function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self._forward(*arguments)

    def _differentiate_backward(self, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return self._twice.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self._backward(*arguments)


@cache
def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _checked_by_kernels(implementation: Implementation, first: Tensor) -> bool:
    """Whether values out of range are refused by the kernels themselves: without a launch or a pass of its own."""
    kind = first.device.type
    if kind not in implementation.checks_values_on:
        return False
    return kind == "cpu" or os.environ.get("PCMECL_CHECK") != "1"


def _in_short(reasons: Mapping[str, str]) -> str:
    """Why not the faster backends, in parentheses: equal reasons once, and of what is missing not how to get it."""
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason == BACKENDS[name].missing():
            reason = re.split(r" \(|[:;] ", reason)[0].removeprefix("there is ")
        grouped.setdefault(reason, []).append(name)
    if len(grouped) == 1:
        return f" ({next(iter(grouped))})"
    return f" ({'; '.join(f'{name}: {reason}' for reason, names in grouped.items() for name in names)})" * bool(grouped)


def _tensors(count: int) -> str:
    return "Tensor" if count == 1 else "(" + ", ".join(["Tensor"] * count) + ")"


def _returned(tensors: Sequence[Tensor]) -> Any:
    return tensors[0] if len(tensors) == 1 else tuple(tensors)
