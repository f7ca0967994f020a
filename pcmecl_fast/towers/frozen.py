"""Layers whose weights never change, run as fast as the machine allows: weight gradients are never computed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def run_frozen(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), with the linear layers in it run by `frozen_linear`."""
    if isinstance(module, nn.Sequential):
        for child in module:
            x = run_frozen(child, x)
        return x
    if type(module).forward is not nn.Linear.forward:
        return module(x)
    layer: Any = module
    return frozen_linear(x, layer.weight, layer.bias)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with a frozen weight; in float32 on a CPU it uses oneDNN, unless `torch.backends.mkldnn` is off."""
    onednn = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not weight.requires_grad
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )
    return _OneDNNLinear.apply(x, weight, bias) if onednn else F.linear(x, weight, bias)


class _OneDNNLinear(torch.autograd.Function):
    """A frozen float32 linear layer in oneDNN, which uses AVX-512 on any CPU that has it.

    F.linear calls MKL, which uses AVX2 on AMD CPUs and takes twice as long.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _OneDNNLinear.apply(grad, weight.t(), None), None, None
