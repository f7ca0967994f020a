"""Weights files in the formats of the metrics' authors, filled by a formula that their code and ours can both follow.

A tensor's numbers depend on its name alone: N(0, 2 / fan-in) from NumPy's PCG64, seeded by the name's CRC-32, for
weights; small deviations from what normalisations begin with for the rest. Features written down from a run of the
authors' code with these weights stay true as long as names, shapes and arithmetic do.
"""

import zlib
from pathlib import Path

import numpy as np
import torch

from pcmecl_fast.evaluate.networks.efficient_face import EfficientFace
from pcmecl_fast.evaluate.networks.resnet_face import ResNetFace18
from pcmecl_fast.evaluate.networks.syncnet import SyncNet


def by_formula(state):
    """A state dict of the same names and shapes, filled by the formula."""
    return {key: _filled(key, value) for key, value in state.items()}


def write_field_weights(folder):
    """The three files that `measure --weights` looks for and no package has, in their authors' formats."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    face = by_formula(ResNetFace18().state_dict())
    torch.save({f"module.{key}": value for key, value in face.items()}, folder / "resnet18_110.pth")
    expression = {f"module.{key}": value for key, value in by_formula(EfficientFace().state_dict()).items()}
    torch.save({"state_dict": expression}, folder / "EfficientFace_Trained_on_AffectNet7.pth.tar")
    torch.save(by_formula(SyncNet().state_dict()), folder / "syncnet_v2.model")
    return folder


def _filled(key, value):
    if not value.is_floating_point():
        return torch.zeros_like(value)
    noise = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(value.shape)
    if value.ndim > 1:
        numbers = noise * np.sqrt(2 / value[0].numel())
    elif key.endswith("running_var"):
        numbers = 1 + 0.2 * np.tanh(noise)
    else:
        begin = 1 if key.endswith("weight") else 0  # of normalisations, and PReLU's slope
        numbers = begin + 0.1 * noise
    return torch.from_numpy(numbers.astype(np.float32)).reshape(value.shape)
