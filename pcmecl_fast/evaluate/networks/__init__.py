"""The networks of the field's metrics by name: architectures built here, with the weights that authors publish."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pcmecl_fast.evaluate.networks.base import FrameNetwork, MissingWeights
from pcmecl_fast.evaluate.networks.efficient_face import load_efficient_face
from pcmecl_fast.evaluate.networks.emotion import EmotionNetwork, load_emotion
from pcmecl_fast.evaluate.networks.identity import IdentityNetwork, load_identity
from pcmecl_fast.evaluate.networks.inception import load_inception
from pcmecl_fast.evaluate.networks.resnet_face import load_resnet_face
from pcmecl_fast.evaluate.networks.syncnet import SyncNet, load_syncnet
from pcmecl_fast.wording import did_you_mean

__all__ = [
    "NETWORKS",
    "EmotionNetwork",
    "FrameNetwork",
    "IdentityNetwork",
    "MissingWeights",
    "SyncNet",
    "load_network",
    "load_syncnet",
]

NETWORKS: dict[str, Callable[[Path | None, torch.device], FrameNetwork]] = {
    "resnet_face18": load_resnet_face,
    "efficient_face": load_efficient_face,
    "emotion": load_emotion,
    "identity": load_identity,
    "inception": load_inception,
}


def load_network(
    name: str, weights: str | Path | None = None, device: torch.device | str | None = None
) -> FrameNetwork:
    """A network that describes faces, ready to run.

    Args:
        name: "resnet_face18" (512 features, for FAD), "efficient_face" (1024, for CSIM), "emotion" (7 logits; also
            `emotions` and `probabilities`), "identity" (128; a row of NaN for a frame without a face) or "inception"
            (2048, for FID).
        weights: the folder with their authors' files. "identity" needs none, nor "emotion" where the package `fer` is
            installed.
        device: where it runs; None is the CPU.

    Raises:
        MissingWeights: a file that is not in the folder; says which, of which project, and what goes without it.
        ValueError: an unknown name; a file of another architecture, by the first key that differs.
        ImportError: a library that is not installed; says what installs it.
    """
    if name not in NETWORKS:
        hint = did_you_mean(name, NETWORKS)
        raise ValueError(f"name: got {name!r}; takes one of {', '.join(NETWORKS)}{hint and '; '}{hint}")
    return NETWORKS[name](None if weights is None else Path(weights), torch.device(device or "cpu"))
