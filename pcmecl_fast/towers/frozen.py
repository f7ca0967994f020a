"""Layers whose weights never change, run as fast as the machine allows: weight gradients are never computed."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from pcmecl_fast.ops.autograd import transformed


def run_frozen(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) in eval mode, with the linear layers in it run by `frozen_linear` and less kept for the backward pass.

    It looks into sequences, timm's MLPs and open_clip's quick-GELU; other modules run as they are.
    """
    layer: Any = module
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return frozen_linear(x, layer.weight, layer.bias)
    if forward is nn.Sequential.forward:
        for child in layer:
            x = run_frozen(child, x)
        return x
    if forward is QuickGELU.forward:
        return _quick_gelu(x)
    if forward is Mlp.forward:
        return run_frozen(layer.fc2, layer.norm(run_frozen(layer.act, run_frozen(layer.fc1, x))))
    if forward is SwiGLU.forward:
        hidden = layer.act(run_frozen(layer.fc1_g, x)) * run_frozen(layer.fc1_x, x)
        return run_frozen(layer.fc2, layer.norm(hidden))
    if forward is GluMlp.forward:
        first, second = run_frozen(layer.fc1, x).chunk(2, dim=layer.chunk_dim)
        hidden = first * layer.act(second) if layer.gate_last else layer.act(first) * second
        return run_frozen(layer.fc2, layer.norm(hidden))
    return module(x)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with a frozen weight; in float32 it uses oneDNN where that is faster, unless
    `torch.backends.mkldnn` is off."""
    onednn = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not weight.requires_grad
        and not (bias is not None and bias.requires_grad)
        and not torch.compiler.is_compiling()
        and not transformed()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and _onednn_is_faster()
    )
    return _OneDNNLinear.apply(x, weight, bias) if onednn else F.linear(x, weight, bias)


def frozen_patches(
    convolution: nn.Module,
    pixels: Tensor,  # (B, C, H, W)
) -> Tensor:  # (B, patches, W)
    """A convolution of patches that do not overlap, as one matrix product; of others, as it is; flattened."""
    layer: Any = convolution
    apart = (
        type(convolution).forward is nn.Conv2d.forward
        and layer.stride == layer.kernel_size
        and layer.padding in ((0, 0), "valid")
        and layer.dilation == (1, 1)
        and layer.groups == 1
    )
    if not apart:
        return convolution(pixels).flatten(2).transpose(1, 2)
    high, wide = layer.kernel_size
    rows, columns = pixels.shape[-2] // high, pixels.shape[-1] // wide
    patches = pixels[..., : rows * high, : columns * wide].unflatten(-1, (columns, wide)).unflatten(-3, (rows, high))
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return frozen_linear(patches, layer.weight.flatten(1), layer.bias)


@cache
def _onednn_is_faster() -> bool:
    """Whether oneDNN's products are faster than MKL's.

    With AVX-512 they take half as long on AMD CPUs, where MKL stays at AVX2. Without it, MKL's are 1.2 times as fast
    forward and up to 1.9 times backward, where oneDNN first copies the transposed weight.
    """
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _quick_gelu(x: Tensor) -> Tensor:
    """x · σ(1.702 x), written so that one tensor is kept for the backward pass instead of two."""
    return F.silu(1.702 * x) / 1.702


class _OneDNNLinear(torch.autograd.Function):
    """A frozen float32 linear layer in oneDNN, which uses AVX-512 on any CPU that has it."""

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
