"""dlib's face network, read from dlib's own file and run by PyTorch: ten times as fast as in dlib's wheel.

A ResNet of 29 layers with half the filters of the original (dlib's `dnn_face_recognition_ex`); its file is in the
public domain. A test compares the two.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 150
WIDTH = 128
_COLOURS = (122.782, 117.001, 104.298)  # taken off before all is divided by 256
_BLOCKS = (  # from the input on: filters, and whether the resolution is halved
    *((32, False),) * 3,
    *((64, True), *((64, False),) * 3),
    *((128, True), *((128, False),) * 2),
    *((256, True), *((256, False),) * 2),
    (256, True),
)


class DlibFace(nn.Module):
    """(B, 3, 150, 150) aligned RGB faces from 0 to 255, to (B, 128).

    Args:
        path: `dlib_face_recognition_resnet_model_v1.dat`.

    Raises:
        ValueError: the file is damaged, or holds another network.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        content = _Content(path)
        self.first = content.convolution(3, 32, 7, 2)
        self.blocks = nn.Sequential()
        inputs = 32
        for filters, halves in _BLOCKS:
            self.blocks.append(_Block(content, inputs, filters, halves))
            inputs = filters
        last = content.tensor("fc_2", skip=2)  # behind the numbers of its outputs and inputs
        self.last = nn.Parameter(content.checked(last, inputs * WIDTH).view(inputs, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.new_tensor(_COLOURS)[:, None, None]) / 256
        x = self.blocks(F.max_pool2d(self.first(x).relu(), 3, 2))
        return x.mean((2, 3)) @ self.last


class _Block(nn.Module):
    """Two convolutions beside what comes in, which is averaged where the resolution is halved."""

    def __init__(self, content: _Content, inputs: int, filters: int, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        self.one = content.convolution(inputs, filters, 3, 2 if halves else 1)
        self.two = content.convolution(filters, filters, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return _sum(F.avg_pool2d(x, 2) if self.halves else x, self.two(self.one(x).relu())).relu()


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """Where one has more channels, rows or columns, the other has zeros."""
    sizes = [max(pair) for pair in zip(a.shape[1:], b.shape[1:], strict=True)]

    def padded(x: Tensor) -> Tensor:
        missing = [size - own for size, own in zip(sizes, x.shape[1:], strict=True)]
        return F.pad(x, [part for each in reversed(missing) for part in (0, each)])

    return padded(a) + padded(b)


class _Content:
    """A file of dlib's, read from its beginning to its end: each layer's name stands before its numbers."""

    def __init__(self, path: Path) -> None:
        self._path, self._bytes, self._at = path, path.read_bytes(), 0

    def convolution(self, inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
        """The next convolution, with the affine layer that follows it."""
        layer = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2 if stride == 1 else 0)
        numbers = self.tensor("con_4")
        scale, shift = self.checked(self.tensor("affine_"), 2 * outputs).view(2, outputs)
        weight = self.checked(numbers, outputs * (inputs * size**2 + 1))[:-outputs].view(layer.weight.shape)
        layer.weight.data.copy_(weight * scale[:, None, None, None])
        layer.bias.data.copy_(numbers[-outputs:] * scale + shift)  # type: ignore[union-attr]
        return layer

    def tensor(self, layer: str, skip: int = 0) -> Tensor:  # flat, float32
        """The numbers of the next layer of a kind, behind its name and a few whole numbers."""
        name = layer.encode()
        mark = b"\x01" + bytes([len(name)]) + name
        begin = self._bytes.find(mark, self._at)
        if begin < 0:
            raise ValueError(f"{self._path} is not dlib's face network: it has no further {layer}")
        self._at = begin + len(mark)
        for _ in range(skip + 1):  # and the version of the tensor's format
            self._whole()
        count = self._whole() * self._whole() * self._whole() * self._whole()
        if self._at + 4 * count > len(self._bytes):
            raise ValueError(f"{self._path} is cut short")
        numbers = torch.frombuffer(bytearray(self._bytes[self._at : self._at + 4 * count]), dtype=torch.float32)
        self._at += 4 * count
        return numbers

    def checked(self, numbers: Tensor, count: int) -> Tensor:
        """Numbers that are as many as they should be."""
        if len(numbers) != count:
            raise ValueError(
                f"{self._path} is not dlib's face network: a layer has {len(numbers)} numbers, not {count}"
            )
        return numbers

    def _whole(self) -> int:
        """A number of as many bytes as its first says."""
        length = self._bytes[self._at]
        value = int.from_bytes(self._bytes[self._at + 1 : self._at + 1 + length], "little")
        self._at += 1 + length
        return value
