"""The face network of the Fréchet distance (FAD): ResNetFace-18 of the project arcface-pytorch.

CDRL's evaluation takes its 512 features of grey faces, without the squeeze-and-excitation that the project also has.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from pcmecl_fast.evaluate.networks.base import AuthorsFile, PreparedNetwork, cut_by_pillow, load_authors_weights

WEIGHTS = AuthorsFile(
    "resnet18_110.pth", "resnet18_110*", "the project ronghuaiyang/arcface-pytorch", "the Fréchet distance FAD"
)
WIDTH = 512


def load_resnet_face(weights: Path | None, device: torch.device) -> PreparedNetwork:
    """ResNetFace-18 with its authors' weights; see `load_network`."""
    module = load_authors_weights(ResNetFace18(), WEIGHTS.find(weights))
    return PreparedNetwork("resnet_face18", WIDTH, module, grey_faces, device)


class ResNetFace18(nn.Module):
    """(B, 1, 128, 128) grey faces in [-1, 1] to (B, 512). The parameters' names are those of the authors' file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.prelu = nn.PReLU()
        self.layer1 = nn.Sequential(_Block(64, 64), _Block(64, 64))
        self.layer2 = nn.Sequential(_Block(64, 128, stride=2), _Block(128, 128))
        self.layer3 = nn.Sequential(_Block(128, 256, stride=2), _Block(256, 256))
        self.layer4 = nn.Sequential(_Block(256, 512, stride=2), _Block(512, 512))
        self.bn4 = nn.BatchNorm2d(512)
        self.fc5 = nn.Linear(512 * 8 * 8, WIDTH)
        self.bn5 = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.prelu(self.bn1(self.conv1(x))), 2)
        x = self.bn4(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
        return self.bn5(self.fc5(x.flatten(1)))


class _Block(nn.Module):
    """The residual block of ArcFace's "improved" ResNets: normalised first, widened by its second convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, inputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.prelu = nn.PReLU()
        self.conv2 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.prelu(self.bn1(self.conv1(self.bn0(x))))))
        return self.prelu(y + (x if self.downsample is None else self.downsample(x)))


def grey_faces(
    pictures: Tensor,  # (B, 3, H, W) uint8 RGB
) -> Tensor:  # (B, 1, 128, 128) in [-1, 1]
    """Grey, the shorter side 164 pixels long, the middle 128 × 128 of it."""
    return (cut_by_pillow(pictures, "L", 164, 128) - 0.5) / 0.5
