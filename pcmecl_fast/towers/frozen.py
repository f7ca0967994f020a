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


def take_over(tower: nn.Module) -> None:
    """Let `PatchEmbedding` run what an image tower has of it; its weights, names and settings, and its hash, stay."""
    for module in tower.modules():
        if type(module) is nn.Conv2d and _splits_pixels(module):
            module.__class__ = PatchEmbedding


class PatchEmbedding(nn.Conv2d):
    """A convolution whose patches do not overlap; on a CPU, the matrix product that it is.

    The gradient of the pixels, which stage 2 needs, is then a product, too: a convolution's took several times as long.
    """

    def forward(self, x: Tensor) -> Tensor:
        high, wide = self.kernel_size
        if x.device.type != "cpu" or x.ndim != 4 or x.shape[2] % high or x.shape[3] % wide:
            return super().forward(x)
        rows, columns = x.shape[2] // high, x.shape[3] // wide
        patches = x.reshape(len(x), x.shape[1], rows, high, columns, wide).permute(0, 2, 4, 1, 3, 5)
        embedded = F.linear(patches.flatten(3).flatten(1, 2), self.weight.flatten(1), self.bias)
        return embedded.transpose(1, 2).unflatten(2, (rows, columns))


def _splits_pixels(module: nn.Conv2d) -> bool:
    return (
        module.in_channels == 3
        and module.groups == 1
        and module.kernel_size == module.stride
        and module.kernel_size > (1, 1)
        and module.padding in ((0, 0), "valid")
        and module.dilation == (1, 1)
    )


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
