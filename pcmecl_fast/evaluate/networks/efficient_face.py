"""The expression network of CSIM: EfficientFace, trained on AffectNet's seven expressions.

What CDRL's evaluation calls CSIM compares these features, not identities: it is a similarity of expressions.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor, nn

from pcmecl_fast.evaluate.networks.base import AuthorsFile, PreparedNetwork, cut_by_pillow, load_authors_weights

WEIGHTS = AuthorsFile(
    "EfficientFace_Trained_on_AffectNet7.pth.tar",
    "EfficientFace*AffectNet7*",
    "the project zengqunzhao/EfficientFace",
    "the expression similarity CSIM",
)
WIDTH = 1024
_MEAN = (0.57535914, 0.44928582, 0.40079932)
_STD = (0.20735591, 0.18981615, 0.18132027)


def load_efficient_face(weights: Path | None, device: torch.device) -> PreparedNetwork:
    """EfficientFace with its authors' weights; see `load_network`."""
    module = load_authors_weights(EfficientFace(), WEIGHTS.find(weights))
    return PreparedNetwork("efficient_face", WIDTH, module, colour_faces, device)


class EfficientFace(nn.Module):
    """(B, 3, 224, 224) normalised faces to (B, 1024): what the classifier of expressions sees.

    A ShuffleNet V2 whose second stage is modulated by attention and joined by convolutions over the four quarters of
    the face. The names of the parameters are those of the authors' file; `fc` is in it, and not used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 29, 3, 2, 1, bias=False), nn.BatchNorm2d(29), nn.ReLU(inplace=True))
        self.stage2 = _stage(29, 116, 4)
        self.stage3 = _stage(116, 232, 8)
        self.stage4 = _stage(232, 464, 4)
        self.local = _Quarters(29, 116)
        self.modulator = _Modulator(116)
        self.conv5 = nn.Sequential(nn.Conv2d(464, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True))
        self.fc = nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.conv1(x), 3, 2, 1)
        x = self.modulator(self.stage2(x)) + self.local(x)
        return self.conv5(self.stage4(self.stage3(x))).mean((2, 3))


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(_Halving(inputs, outputs), *(_Shuffled(outputs) for _ in range(blocks - 1)))


class _Halving(nn.Module):
    """Half the resolution: both branches see all channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.branch1 = nn.Sequential(*_depthwise(inputs, 2), *_pointwise(inputs, half))
        self.branch2 = nn.Sequential(*_pointwise(inputs, half), *_depthwise(half, 2), *_pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        return _shuffle(torch.cat((self.branch1(x), self.branch2(x)), 1))


class _Shuffled(nn.Module):
    """One half of the channels goes through, the other is left as it is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch2 = nn.Sequential(*_pointwise(half, half), *_depthwise(half, 1), *_pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        kept, seen = x.chunk(2, 1)
        return _shuffle(torch.cat((kept, self.branch2(seen)), 1))


def _depthwise(channels: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False), nn.BatchNorm2d(channels)


def _pointwise(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def _shuffle(x: Tensor) -> Tensor:
    """The two halves of the channels take turns."""
    return nn.functional.channel_shuffle(x, 2)


class _Quarters(nn.Module):
    """Convolutions of their own for each quarter of the 56 × 56 map, which is put together again at half the size."""

    PLACES = ((0, 0), (1, 0), (0, 1), (1, 1))  # row and column of the quarters 1 to 4

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        for k in range(1, 5):
            for step, (channels, stride) in enumerate(((inputs, 2), (outputs, 1)), 1):
                convolution = nn.Conv2d(channels, outputs, 3, stride, 1, groups=channels, bias=False)
                self.add_module(f"conv{k}_{step}", convolution)
                self.add_module(f"bn{k}_{step}", nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth = (
            self._quarter(k, x[:, :, 28 * row : 28 * row + 28, 28 * column : 28 * column + 28])
            for k, (row, column) in enumerate(self.PLACES, 1)
        )
        return torch.cat((torch.cat((first, second), 2), torch.cat((third, fourth), 2)), 3)

    def _quarter(self, k: int, x: Tensor) -> Tensor:
        for step in (1, 2):
            x = self.get_submodule(f"bn{k}_{step}")(self.get_submodule(f"conv{k}_{step}")(x)).relu()
        return x


class _Modulator(nn.Module):
    """x · σ(channel attention · spatial attention)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel_att, self.spatial_att = _ChannelAttention(channels), _SpatialAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.channel_att(x) * self.spatial_att(x))


class _ChannelAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        few = channels // 16
        self.gate_c = nn.Sequential(
            OrderedDict(
                gate_c_fc_0=nn.Linear(channels, few),
                gate_c_bn_1=nn.BatchNorm1d(few),
                gate_c_relu_1=nn.ReLU(),
                gate_c_fc_final=nn.Linear(few, channels),
            )
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, C, 1, 1)
        return self.gate_c(x.mean((2, 3)))[:, :, None, None]


class _SpatialAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        few = channels // 16
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            gate_s_conv_reduce0=nn.Conv2d(channels, few, 1),
            gate_s_bn_reduce0=nn.BatchNorm2d(few),
            gate_s_relu_reduce0=nn.ReLU(),
        )
        for k in range(2):
            layers[f"gate_s_conv_di_{k}"] = nn.Conv2d(few, few, 3, padding=4, dilation=4)
            layers[f"gate_s_bn_di_{k}"] = nn.BatchNorm2d(few)
            layers[f"gate_s_relu_di_{k}"] = nn.ReLU()
        layers["gate_s_conv_final"] = nn.Conv2d(few, 1, 1)
        self.gate_s = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, H, W)
        return self.gate_s(x)


def colour_faces(
    pictures: Tensor,  # (B, 3, H, W) uint8 RGB
) -> Tensor:  # (B, 3, 224, 224)
    """The shorter side 256 pixels long, the middle 224 × 224 of it, AffectNet's mean and deviation of each colour."""
    return TF.normalize(cut_by_pillow(pictures, "RGB", 256, 224), list(_MEAN), list(_STD))
