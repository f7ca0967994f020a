"""The network of lip synchronisation: SyncNet (Chung and Zisserman 2016), the authors' second version."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from pcmecl_fast.evaluate.networks.base import AuthorsFile, fold_normalisations, load_authors_weights, resize_as_opencv

WEIGHTS = AuthorsFile(
    "syncnet_v2.model", "syncnet_v2*", "the project joonson/syncnet_python", "the lip synchronisation LSE-D and LSE-C"
)
WIDTH = 1024
WINDOW = 5  # frames
STEPS = 4  # of sound for each frame
COEFFICIENTS = 13  # of each step of sound
_SIDE = 224
_AT_ONCE = 8  # windows: each takes 5 MB in the first layer


def load_syncnet(weights: str | Path | None, device: torch.device | str | None = None) -> SyncNet:
    """SyncNet with its authors' weights.

    Args:
        weights: the folder that has `syncnet_v2.model`, or the file itself.
        device: where it runs; None is the CPU.

    Raises:
        MissingWeights: there is no such file; says which project publishes it.
        ValueError: the file holds no weights, or those of another architecture; names the first that differs.
    """
    path = Path(weights) if weights is not None and Path(weights).is_file() else WEIGHTS.find(weights)
    network = load_authors_weights(SyncNet(), path).eval().requires_grad_(False).to(torch.device(device or "cpu"))
    fold_normalisations(network)
    network.netcnnlip.to(memory_format=torch.channels_last_3d)  # a quarter faster on a CPU
    return network


class SyncNet(nn.Module):
    """Windows of 5 frames and of 20 steps of sound, as features that are close where they belong together."""

    def __init__(self) -> None:
        super().__init__()
        self.netcnnaud = nn.Sequential(
            *_layer(1, 64, 3, padding=1),
            nn.Identity(),  # the authors pool 1 × 1 here; the file's numbers count it
            *_layer(64, 192, 3, padding=1),
            nn.MaxPool2d(3, (1, 2)),
            *_layer(192, 384, 3, padding=1),
            *_layer(384, 256, 3, padding=1),
            *_layer(256, 256, 3, padding=1),
            nn.MaxPool2d(3, 2),
            *_layer(256, 512, (5, 4)),
        )
        self.netfcaud = _head()
        self.netfclip = _head()
        self.netcnnlip = nn.Sequential(
            *_layer_in_time(3, 96, (WINDOW, 7, 7), stride=2),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_layer_in_time(96, 256, (1, 5, 5), stride=2, padding=1),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), padding=(0, 1, 1)),
            *_layer_in_time(256, 256, (1, 3, 3), padding=1),
            *_layer_in_time(256, 256, (1, 3, 3), padding=1),
            *_layer_in_time(256, 256, (1, 3, 3), padding=1),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_layer_in_time(256, 512, (1, 6, 6)),
        )

    @torch.inference_mode()
    def lips(
        self,
        pictures: Tensor,  # (T, 3, H, W) uint8 RGB
        starts: Tensor,  # (W,) int in [0, T − 5]
    ) -> Tensor:  # (W, 1024)
        """The features of windows of 5 frames, by their first."""
        parts = []
        for part in starts.split(_AT_ONCE):
            needed, place = (part[:, None] + torch.arange(WINDOW)).unique(return_inverse=True)
            seen = _as_seen(pictures[needed].to(self._like.device)).to(self._like)
            windows = seen[place].transpose(1, 2)  # (N, 3, 5, 224, 224)
            parts.append(self.netfclip(self.netcnnlip(windows).flatten(1)))
        return torch.cat(parts) if parts else self._like.new_zeros(0, WIDTH)

    @torch.inference_mode()
    def sounds(
        self,
        cepstrum: Tensor,  # (N, 13): 4 steps for each frame
    ) -> Tensor:  # ((N − 20) // 4 + 1, 1024)
        """The features of every window of 20 steps that begins with a frame."""
        if len(cepstrum) < STEPS * WINDOW:
            return self._like.new_zeros(0, WIDTH)
        windows = cepstrum.to(self._like).unfold(0, STEPS * WINDOW, STEPS)[:, None]  # (W, 1, 13, 20)
        return torch.cat([self.netfcaud(self.netcnnaud(part).flatten(1)) for part in windows.split(_AT_ONCE)])

    @property
    def _like(self) -> Tensor:
        """Whose device and dtype everything takes."""
        return self.netfclip.get_parameter("0.weight")


def _as_seen(
    pictures: Tensor,  # (T, 3, H, W) uint8 RGB
) -> Tensor:  # (T, 3, 224, 224) BGR, 0 to 255
    """Blue first, and resized as OpenCV does, with which both protocols read pictures."""
    return resize_as_opencv(pictures.flip(1), _SIDE, _SIDE)


def _layer(
    inputs: int, outputs: int, size: int | tuple[int, int], stride: int = 1, padding: int = 0
) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, size, stride, padding), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def _layer_in_time(
    inputs: int, outputs: int, size: tuple[int, int, int], stride: int = 1, padding: int = 0
) -> tuple[nn.Module, ...]:
    convolution = nn.Conv3d(inputs, outputs, size, (1, stride, stride), (0, padding, padding))
    return convolution, nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)


def _head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Linear(512, WIDTH))
