"""The autograd functions of an operator: through the dispatcher and past it.

They are made for one operator each, and know of it what `ops/operator.py` says: its kernels, the positions of tensors
and of arguments with a gradient among its arguments, and what its forward keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pcmecl_fast.ops.checks import as_stored, outside_autocast


def watched() -> bool:
    """Whether a mode, a transform, a trace or the profiler wants to see what passes the dispatcher."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
        or transformed()
    )


def transformed() -> bool:
    """Whether a transform such as vmap, a trace or forward-mode differentiation is under way."""
    return bool(
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _observed(grad: Tensor) -> bool:
    """Whether somebody differentiates a backward, or wants to see it; `is_grads_batched` is in no stack."""
    legacy = torch._C._functorch.is_legacy_batchedtensor(grad)
    return torch.is_grad_enabled() or type(grad) is not Tensor or legacy or watched()


def differentiable_directly(operator: Any) -> Any:
    places: list[int] = operator._tensors
    count = len(places)
    first = 0 if operator._keep_from == 0 else 1
    differentiated = [2 + at for at in operator._gradients_among_tensors]

    class Direct(torch.autograd.Function):
        """Of an operator's implementation and arguments; its tensors come again, for autograd to see them.

        Where the implementation makes the gradients with the result, they are kept for the backward, which is then a
        product with the result's gradient.
        """

        @staticmethod
        def forward(ctx: Any, implementation: Any, flat: list[Any], *tensors: Tensor | None) -> Tensor:
            both, result = None, None
            if implementation.with_gradients is not None:
                needed = ctx.needs_input_grad
                both = outside_autocast(implementation.with_gradients, [*flat, [needed[at] for at in differentiated]])
            if both is None:
                made = outside_autocast(implementation.forward, flat)
                result, kept = (made, (made,)[first:]) if isinstance(made, Tensor) else (made[0], made[first:])
            else:
                result, kept = both
            ctx.save_for_backward(*tensors, *kept)
            for i in places:  # they are kept by autograd, which sees to it that nobody changes them
                flat[i] = None
            ctx.implementation, ctx.rest, ctx.has_gradients = implementation, flat, both is not None
            ctx.set_materialize_grads(False)
            return result

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None) -> Any:
            gradients: list[Tensor | None] = [None] * (2 + count)
            if grad is None:
                return tuple(gradients)
            saved = ctx.saved_tensors
            observed = _observed(grad)
            if ctx.has_gradients and not observed:
                for at, gradient in zip(differentiated, saved[count:]):  # noqa: B905 - as many
                    if gradient is not None:
                        gradients[at] = gradient * grad
                return tuple(gradients)

            needed = ctx.needs_input_grad
            needs = [needed[at] for at in differentiated]
            flat, kept = list(ctx.rest), saved[count:]
            for i, x in zip(places, saved):  # noqa: B905 - what the forward made comes after them
                flat[i] = x
            if ctx.has_gradients:  # which somebody who observes would not see being made
                made = outside_autocast(ctx.implementation.forward, flat)
                kept = () if isinstance(made, Tensor) else made[first:]
            if observed:
                computed = operator._backward(grad, *flat, *kept, needs, ctx.implementation.backend)
                computed = computed if isinstance(computed, tuple) else (computed,)
            else:
                computed = outside_autocast(ctx.implementation.backward, [as_stored(grad), *flat, *kept, needs])
            for at, need, gradient in zip(differentiated, needs, computed):  # noqa: B905 - as many
                if need:
                    gradients[at] = gradient
            return tuple(gradients)

    return Direct


def differentiable_once(operator: Any) -> Any:
    class Forward(torch.autograd.Function):
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
        def backward(ctx: Any, grad: Tensor | None, *saved_grads: None) -> Any:
            gradients: list[Tensor | None] = [None] * len(ctx.rest)
            if grad is None:
                return tuple(gradients)
            tensors = ctx.saved_tensors
            count = len(operator._tensors)
            *arguments, backend = ctx.rest
            for i, x in zip(operator._tensors, tensors[:count], strict=True):
                arguments[i] = x
            needs = [ctx.needs_input_grad[i] for i in operator._gradients]
            computed = operator._backward(grad, *arguments, *tensors[count:], needs, backend)
            computed = computed if isinstance(computed, tuple) else (computed,)
            for i, need, gradient in zip(operator._gradients, needs, computed, strict=True):
                gradients[i] = gradient if need else None
            return tuple(gradients)

    return Forward


def not_differentiable_twice(operator: Any) -> Any:
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator._backward(*arguments)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise NotImplementedError(
                f"{operator.name}: the compiled backends have no second derivative; use backend='reference'"
            )

    return Backward
