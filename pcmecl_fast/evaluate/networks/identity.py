"""Who a face is: dlib's face network (128 numbers; 0.6 apart is another person), offline.

Its input is aligned by landmarks. A face is looked for in each frame, unless it is known already.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pcmecl_fast.data.faces import Detector, Face, load_detector, recognition_file, surest_face
from pcmecl_fast.evaluate.networks.base import as_pictures, frozen
from pcmecl_fast.evaluate.networks.dlib_face import SIDE, WIDTH, DlibFace

FILE = "dlib_face_recognition_resnet_model_v1.dat"

_AT_ONCE = 32
_MARGIN = 0.25  # around the face, in parts of it: dlib's own


def load_identity(_weights: Path | None, device: torch.device) -> IdentityNetwork:
    """dlib's network from the installed packages: no folder of weights has it; see `load_network`."""
    return IdentityNetwork(load_detector("dlib"), device)


class IdentityNetwork:
    """A `FrameNetwork` of identities.

    Args:
        detector: finds the faces that are not known, with their 68 landmarks.
        device: where the network runs; faces are found and aligned on the CPU.

    Raises:
        ImportError: dlib or its models' files are not installed; says what installs them.
    """

    name, width = "identity", WIDTH

    def __init__(self, detector: Detector, device: torch.device) -> None:
        import dlib

        self._dlib, self._detector, self._device = dlib, detector, device
        self._network = frozen(DlibFace(recognition_file(FILE, "tell faces apart")), device)

    def __call__(
        self,
        frames: Tensor,  # (B, 3, H, W) RGB in [-1, 1], or uint8
        faces: Sequence[Face | None] | None = None,
    ) -> Tensor:  # (B, 128) float32, on the network's device
        """The surest face of each frame; a frame without one has a row of NaN, for the caller to count.

        Args:
            frames: pictures with one face each.
            faces: with their landmarks, where they are known; None among them is a frame without a face.
        """
        pictures = _rows_first(frames)
        known = self.faces(frames) if faces is None else faces
        aligned = [self._aligned(picture, face) for picture, face in zip(pictures, known, strict=True) if face]
        rows = torch.full((len(pictures), WIDTH), torch.nan, device=self._device)
        if aligned:
            chips = torch.from_numpy(np.stack(aligned)).permute(0, 3, 1, 2)
            with torch.inference_mode():
                parts = [self._network(part.to(self._device).float()) for part in chips.split(_AT_ONCE)]
            rows[[k for k, face in enumerate(known) if face]] = torch.cat(parts)
        return rows

    def faces(
        self,
        frames: Tensor,  # (B, 3, H, W) RGB in [-1, 1], or uint8
    ) -> list[Face | None]:
        """The surest face of each frame, or None."""
        return [surest_face(self._detector, picture) for picture in _rows_first(frames)]

    def _aligned(self, picture: np.ndarray, face: Face) -> np.ndarray:  # (150, 150, 3) uint8
        if face.landmarks is None:
            raise ValueError("faces: got one without landmarks; takes those of the detector dlib")
        place = self._dlib.rectangle(*(round(side) for side in face.box))
        # dlib counts pixels, whose centres lie half a pixel further.
        points = [self._dlib.point(round(x), round(y)) for x, y in face.landmarks - 0.5]
        return self._dlib.get_face_chip(picture, self._dlib.full_object_detection(place, points), SIDE, _MARGIN)


def _rows_first(frames: Tensor) -> np.ndarray:  # (B, H, W, 3) uint8
    return np.ascontiguousarray(as_pictures(frames).permute(0, 2, 3, 1).cpu().numpy())
