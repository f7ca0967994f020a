"""Who a face is: dlib's face network (128 numbers; 0.6 apart is another person), offline and on the CPU.

The network's input is aligned by landmarks. A face is looked for in each frame, unless it is known already.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pcmecl_fast.data.faces import Detector, Face, load_detector
from pcmecl_fast.evaluate.networks.base import as_pictures

WIDTH = 128


def load_identity(_weights: Path | None, _device: torch.device) -> IdentityNetwork:
    """dlib's network from the installed packages: no folder of weights has it, and it runs on the CPU."""
    return IdentityNetwork(load_detector("dlib"))


class IdentityNetwork:
    """A `FrameNetwork` of identities.

    Args:
        detector: finds the faces that are not known.

    Raises:
        ImportError: dlib or its models' files are not installed; says what installs them.
    """

    name, width = "identity", WIDTH

    def __init__(self, detector: Detector) -> None:
        import dlib

        self._dlib, self._detector = dlib, detector
        self._network = dlib.face_recognition_model_v1(str(_weights_file()))

    def __call__(
        self,
        frames: Tensor,  # (B, 3, H, W) RGB in [-1, 1], or uint8
        faces: Sequence[Face | None] | None = None,
    ) -> Tensor:  # (B, 128) float32
        """The surest face of each frame; a frame without one has a row of NaN, for the caller to count.

        Args:
            frames: pictures with one face each.
            faces: with their 68 landmarks, where they are known; None among them is a frame without a face.
        """
        pictures = np.ascontiguousarray(as_pictures(frames).permute(0, 2, 3, 1).cpu().numpy())
        known = self.faces(frames) if faces is None else faces
        rows = np.full((len(pictures), WIDTH), np.nan, np.float32)
        seen = [k for k, face in enumerate(known) if face is not None]
        for k in seen:
            rows[k] = self._network.compute_face_descriptor(self._aligned(pictures[k], known[k]))
        return torch.from_numpy(rows)

    def faces(
        self,
        frames: Tensor,  # (B, 3, H, W) RGB in [-1, 1], or uint8
    ) -> list[Face | None]:
        """The surest face of each frame, or None."""
        pictures = as_pictures(frames).permute(0, 2, 3, 1).cpu().numpy()
        return [next((face for face in self._detector(picture) if face.score > 0), None) for picture in pictures]

    def _aligned(self, picture: np.ndarray, face: Face) -> np.ndarray:  # (150, 150, 3)
        if face.landmarks is None:
            raise ValueError("faces: got one without landmarks; takes those of the detector dlib")
        place = self._dlib.rectangle(*(round(side) for side in face.box))
        points = [self._dlib.point(round(x), round(y)) for x, y in face.landmarks - 0.5]
        return self._dlib.get_face_chip(picture, self._dlib.full_object_detection(place, points), 150, 0.25)


def _weights_file() -> Path:
    # Not by importing the package: it imports pkg_resources, which setuptools no longer has.
    spec = find_spec("face_recognition_models")
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / "models" / "dlib_face_recognition_resnet_model_v1.dat"
        if file.is_file():
            return file
    raise ImportError(
        'face-recognition-models, whose files tell faces apart, is not installed: pip install "pcmecl_fast[faces]"'
    )
