"""The fused operators as `torch.library` operators: the seam under the compiled backends.

An operator is a pair, `pcmecl_fast::<name>` and `pcmecl_fast::<name>_backward`. Their last argument is the backend's
name; what they run is the pair of plain functions on tensors that `register_kernels` was given for it. Autograd, fake
kernels, autocast, contiguity and the error of a second derivative live here, once for every operator and backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from pcmecl_fast.ops.checks import autocast_is_on

NAMESPACE = "pcmecl_fast"

_library = Library(NAMESPACE, "DEF")
_kernels: dict[tuple[str, str], tuple[Callable[..., Any], Callable[..., Any]]] = {}


class FusedOperator:
    """A forward and a backward operator, differentiable once, that look their kernels up by backend.

    The forward's kernel takes `arguments` and returns (result, *saved); the backward's takes (grad of the result,
    *arguments, *saved, needs) and returns one gradient, or None where `needs` is False, for each name in
    `differentiable`. Tensors reach the kernels contiguous, outside autocast and outside autograd.

    Args:
        name: the operator's name in the namespace.
        arguments: the arguments' schema, `torch.library`'s notation, the backend left out.
        differentiable: names of the arguments that have a gradient, in order.
        fake: takes the arguments and returns empty tensors shaped as (result, *saved).
        saved: how many tensors the forward saves for the backward besides its arguments.
        keep_result: whether the backward gets the result too, before the saved ones.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        differentiable: Sequence[str],
        fake: Callable[..., tuple[Tensor, ...]],
        *,
        saved: int = 0,
        keep_result: bool = False,
    ) -> None:
        self.name = name
        self._fake = fake
        self._keep_from = 0 if keep_result else 1
        self._saved = saved + keep_result
        declared = [argument.strip() for argument in arguments.split(",")]
        names = [argument.split()[-1] for argument in declared]
        self._arguments = len(names)
        self._differentiable = [names.index(argument) for argument in differentiable]
        self._tensors = [i for i, argument in enumerate(declared) if argument.startswith(("Tensor ", "Tensor? "))]

        kept = ", ".join(f"Tensor saved_{i}" for i in range(self._saved))
        _library.define(f"{name}({arguments}, str backend) -> {_tensors(1 + saved)}")
        _library.define(
            f"{name}_backward(Tensor grad, {arguments}, {kept + ', ' if kept else ''}bool[] needs, str backend)"
            f" -> {_tensors(len(differentiable))}"
        )
        self._forward = getattr(getattr(torch.ops, NAMESPACE), name).default
        self._backward = getattr(getattr(torch.ops, NAMESPACE), f"{name}_backward").default
        self._function = self._make_function()
        self._twice = self._make_second_derivative()

        _library.impl(name, self._run_forward, "CompositeExplicitAutograd")
        _library.impl(name, self._differentiate, "Autograd")
        _library.impl(f"{name}_backward", self._run_backward, "CompositeExplicitAutograd")
        _library.impl(f"{name}_backward", self._differentiate_twice, "Autograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", self._fake_forward, lib=_library)
        torch.library.register_fake(f"{NAMESPACE}::{name}_backward", self._fake_backward, lib=_library)

    def __call__(self, *arguments: Any, backend: str) -> Tensor:
        """The result alone; `arguments` as in the schema."""
        results = self._forward(*arguments, backend)
        return results[0] if isinstance(results, tuple) else results

    def _run_forward(self, *arguments: Any) -> Any:
        *arguments, backend = arguments  # type: ignore[assignment]
        forward, _ = _kernels[self.name, backend]
        with _outside_autocast(arguments[0]):
            return _returned(forward(*map(_contiguous, arguments)))

    def _run_backward(self, *arguments: Any) -> Any:
        *arguments, needs, backend = arguments  # type: ignore[assignment]
        _, backward = _kernels[self.name, backend]
        with _outside_autocast(arguments[0]):
            gradients = backward(*map(_contiguous, arguments), needs)
        return _returned([arguments[0].new_empty(0) if gradient is None else gradient for gradient in gradients])

    def _fake_forward(self, *arguments: Any) -> Any:
        return _returned(self._fake(*arguments[:-1]))

    def _fake_backward(self, grad: Tensor, *arguments: Any) -> Any:
        needs = arguments[-2]
        inputs = [arguments[i] for i in self._differentiable]
        return _returned(
            [x.new_empty(x.shape) if need else grad.new_empty(0) for x, need in zip(inputs, needs, strict=True)]
        )

    def _differentiate(self, *arguments: Any) -> Any:
        inputs = (arguments[i] for i in self._differentiable)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
            return self._function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self._forward(*arguments)

    def _differentiate_twice(self, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return self._twice.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self._backward(*arguments)

    def _make_function(self) -> Any:
        operator = self

        class Fused(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                with torch._C._AutoDispatchBelowAutograd():
                    results = operator._forward(*arguments)
                kept = (results if isinstance(results, tuple) else (results,))[operator._keep_from :]
                ctx.save_for_backward(*(arguments[i] for i in operator._tensors), *kept)
                ctx.rest = [None if i in operator._tensors else x for i, x in enumerate(arguments)]
                ctx.set_materialize_grads(False)
                ctx.mark_non_differentiable(*(results[1:] if isinstance(results, tuple) else ()))
                return results

            @staticmethod
            def backward(ctx: Any, grad: Tensor | None, *of_saved: None) -> Any:
                gradients: list[Tensor | None] = [None] * len(ctx.rest)
                if grad is None:
                    return tuple(gradients)
                tensors = ctx.saved_tensors
                count = len(operator._tensors)
                *arguments, backend = ctx.rest
                for i, x in zip(operator._tensors, tensors[:count], strict=True):
                    arguments[i] = x
                needs = [ctx.needs_input_grad[i] for i in operator._differentiable]
                computed = operator._backward(grad, *arguments, *tensors[count:], needs, backend)
                computed = computed if isinstance(computed, tuple) else (computed,)
                for i, need, gradient in zip(operator._differentiable, needs, computed, strict=True):
                    gradients[i] = gradient if need else None
                return tuple(gradients)

        return Fused

    def _make_second_derivative(self) -> Any:
        operator = self

        class Twice(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                with torch._C._AutoDispatchBelowAutograd():
                    return operator._backward(*arguments)

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                raise NotImplementedError(
                    f"{operator.name}: the compiled backends have no second derivative; take backend='reference'"
                )

        return Twice


def register_pair(operator: str, backend: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
    """Keep an operator's kernels for a backend; `backend.register_kernels` is the way in."""
    _kernels[operator, backend] = (forward, backward)


def _tensors(count: int) -> str:
    return "Tensor" if count == 1 else "(" + ", ".join(["Tensor"] * count) + ")"


def _returned(tensors: Sequence[Tensor]) -> Any:
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _contiguous(x: Any) -> Any:
    return x.contiguous() if isinstance(x, Tensor) else x


def _outside_autocast(x: Tensor) -> AbstractContextManager[object]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if autocast_is_on(kind) else nullcontext()
