"""The network of FID: InceptionV3 as TensorFlow's authors trained it, in the form of the package torch-fidelity."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor, nn

from pcmecl_fast.evaluate.networks.base import AuthorsFile, PreparedNetwork, load_authors_weights

WEIGHTS = AuthorsFile(
    "weights-inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05*",
    "the project toshas/torch-fidelity",
    "the Fréchet distance FID",
    install="it also takes the package: pip install torch-fidelity",
)
WIDTH = 2048


def load_inception(weights: Path | None, device: torch.device) -> PreparedNetwork:
    """InceptionV3 with the weights that torch-fidelity publishes; see `load_network`.

    Raises:
        ImportError: torch-fidelity is not installed.
    """
    path = WEIGHTS.find(weights)
    return PreparedNetwork("inception", WIDTH, load_authors_weights(_unfilled(), path), as_they_are, device)


def as_they_are(
    pictures: Tensor,  # (B, 3, H, W) uint8 RGB
) -> Tensor:
    """The network resizes pictures itself, to 299 × 299 as TensorFlow 1 did."""
    return pictures


def _unfilled() -> nn.Module:
    """The package's network, (B, 3, H, W) uint8 to (B, 2048), before it has weights."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise ImportError(
            "torch-fidelity, whose network FID takes, is not installed: pip install torch-fidelity"
        ) from error

    class Inception(FeatureExtractorInceptionV3):
        filled = False

        def load_state_dict(self, state_dict: dict[str, Tensor], *args: object, **options: object) -> object:
            """Nothing of what the constructor reads."""
            return super().load_state_dict(state_dict, *args, **options) if self.filled else None

        def forward(self, pictures: Tensor) -> Tensor:
            (features,) = super().forward(pictures)
            return features

    # The package would unpickle a file of weights, and with it run whatever is in it: it gets an empty one.
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network = Inception("inception", [str(WIDTH)], nothing)
    network.filled = True
    return network
