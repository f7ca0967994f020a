"""Faces in pictures: their boxes and landmarks, the same whatever finds them.

Coordinates are pixels of the upright picture, with pixel i from i to i + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from pcmecl_fast.wording import did_you_mean

Box = tuple[float, float, float, float]  # left, top, right, bottom


class Face(NamedTuple):
    """A face found in a picture."""

    box: Box
    """From the middle of the forehead to the chin and from cheek to cheek, where MTCNN puts it, whatever found it."""
    score: float
    """Above 0 where the detector is sure. A weaker one counts only for a person who is surely seen in other frames."""
    landmarks: np.ndarray | None
    """(68, 2) float64, the points of iBUG 300-W, or None."""


class Detector(Protocol):
    """Finds faces. One that also has `near`, like `DlibDetector`, is asked that where faces are known already."""

    def __call__(
        self,
        picture: np.ndarray,  # (H, W, 3) uint8 RGB
    ) -> list[Face]:  # surest first
        ...


def load_detector(name: str = "dlib") -> Detector:
    """A detector by name.

    Raises:
        ValueError: no detector of that name.
        ImportError: its libraries are not installed; says what installs them.
    """
    if name not in DETECTORS:
        hint = did_you_mean(name, DETECTORS)
        raise ValueError(f"detector: got {name!r}; takes one of {', '.join(DETECTORS)}{hint and '; '}{hint}")
    return DETECTORS[name]()


def surest_face(
    detector: Detector,
    picture: np.ndarray,  # (H, W, 3) uint8 RGB
) -> Face | None:
    """The face that the detector is surest of; None where it is of none, or has no landmarks for it."""
    return next((face for face in detector(picture) if face.score > 0 and face.landmarks is not None), None)


def recognition_file(name: str, use: str) -> Path:
    """A file of the package face-recognition-models.

    Args:
        name: of the file.
        use: what it does, for the message.

    Raises:
        ImportError: the package is not installed; says what installs it.
    """
    # Not by importing the package: it imports pkg_resources, which setuptools no longer has.
    spec = find_spec("face_recognition_models")
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / "models" / name
        if file.is_file():
            return file
    raise _faces_extra(f"face-recognition-models, whose files {use},")


def distance(a: Box, b: Box) -> float:
    """Of two boxes: centres' distance in parts of the mean side, plus the logarithm of their heights' ratio."""
    side_a, side_b = a[3] - a[1], b[3] - b[1]
    apart = math.hypot(a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]) / 2
    return apart / math.sqrt(side_a * side_b) + abs(math.log(side_a / side_b))


def fit_upright(
    landmarks: np.ndarray,  # (68, 2)
) -> tuple[float, float, float, float]:
    """Centre x, y, height and angle of the upright face whose steady parts fit best, by least squares."""
    points = landmarks @ [1, 1j]
    seen = np.array([points[part].mean() for part, _ in _STEADY])
    known = np.array([place for _, place in _STEADY])
    around_seen, around_known = seen - seen.mean(), known - known.mean()
    scale = np.vdot(around_known, around_seen) / np.vdot(around_known, around_known).real
    centre = seen.mean() - scale * known.mean()
    return float(centre.real), float(centre.imag), float(abs(scale)), _eyes_angle(landmarks)


class DlibDetector:
    """dlib's frontal faces (HOG) with the 68 landmarks of face-recognition-models.

    A picture is searched at a scale at which faces of a fifth of its height are seen, if it is 16:9; only where there
    is none, once more and finer, for faces of a ninth. Boxes are laid around the landmarks: dlib's own jump by a fifth
    as a face grows, and end at the brows.

    Raises:
        ImportError: dlib or the landmarks' files are not installed.
    """

    def __init__(self) -> None:
        try:
            import dlib
        except ModuleNotFoundError as error:
            raise _faces_extra("dlib, which finds faces,") from error
        self._rectangle = dlib.rectangle
        self._search = dlib.get_frontal_face_detector()
        landmarks = recognition_file("shape_predictor_68_face_landmarks.dat", "place faces' landmarks")
        self._landmarks = dlib.shape_predictor(str(landmarks))

    def __call__(
        self,
        picture: np.ndarray,  # (H, W, 3) uint8 RGB
    ) -> list[Face]:
        picture = np.ascontiguousarray(picture)  # dlib takes no turned views
        whole = (0.0, 0.0, float(picture.shape[1]), float(picture.shape[0]))
        area = whole[2] * whole[3]
        coarse = min(1.0, math.sqrt(_COARSE / area))
        fine = min(2.0, math.sqrt(_FINE / area))
        faces = self._look(picture, whole, coarse)
        if any(face.score > 0 for face in faces):
            return faces
        return self._look(picture, whole, max(coarse, fine)) or faces

    def near(
        self,
        picture: np.ndarray,  # (H, W, 3) uint8 RGB
        faces: Sequence[Face],
    ) -> list[Face]:
        """Those of an earlier picture's faces that are still close to where they were: a search of a part only."""
        picture = np.ascontiguousarray(picture)
        again = []
        for face in faces:
            left, top, right, bottom = face.box
            reach = 0.4 * (bottom - top)
            around = _within((left - reach, top - reach, right + reach, bottom + reach), picture)
            scale = min(2.0, _NEAR / (bottom - top))
            found = self._look(picture, around, scale)
            if found:
                again.append(min(found, key=lambda other: distance(face.box, other.box)))
        return again

    def _look(self, picture: np.ndarray, part: Box, scale: float) -> list[Face]:
        left, top = int(part[0]), int(part[1])
        shown = picture[top : int(part[3]), left : int(part[2])]
        if shown.size == 0:
            return []
        grey = Image.fromarray(shown).convert("L")
        width, height = max(1, round(grey.width * scale)), max(1, round(grey.height * scale))
        if scale != 1:
            grey = grey.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
        boxes, scores, _ = self._search.run(np.asarray(grey), 0, _WEAKEST)
        return [self._face(picture, (left, top), scale, box, score) for box, score in zip(boxes, scores, strict=True)]

    def _face(self, picture: np.ndarray, corner: tuple[int, int], scale: float, found: Any, score: float) -> Face:
        left, top = (c + s / scale for c, s in zip(corner, (found.left(), found.top()), strict=True))
        box = (left, top, left + found.width() / scale, top + found.height() / scale)
        landmarks = self._place(picture, box)
        # Landmarks depend on the box they start from, and the search's jump from frame to frame.
        landmarks = self._place(picture, _as_found(_around(landmarks)))
        return Face(_around(landmarks), float(score), landmarks)

    def _place(self, picture: np.ndarray, box: Box) -> np.ndarray:
        left, top, right, bottom = (round(side) for side in box)
        points = self._landmarks(picture, self._rectangle(left, top, right - 1, bottom - 1)).parts()
        # dlib counts pixels, whose centres lie half a pixel further.
        return np.array([(point.x, point.y) for point in points], dtype=np.float64) + 0.5


DETECTORS: dict[str, Callable[[], Detector]] = {"dlib": DlibDetector}

_COARSE = 960 * 540
"""Pixels at which a whole picture is searched first; dlib's faces have 80 pixels of its height or more."""
_FINE = 1600 * 900
"""Pixels at which it is searched again."""
_WEAKEST = -0.25
"""The least score that is looked at; dlib's own threshold is 0."""
_NEAR = 150
"""Height in pixels, from forehead to chin, at which a known face is looked for."""

# Measured against MTCNN (facenet-pytorch's), which NED's preparation uses, on 243 stills of seven speakers.
_FOREHEAD = 0.26
"""How far a face's box goes above the brows, in parts of the height from brows to chin."""
_STEADY = (
    (slice(0, 4), -0.365 + 0.069j),  # the jaw at the ears
    (slice(13, 17), 0.365 + 0.069j),
    (slice(36, 42), -0.169 - 0.139j),  # the eyes
    (slice(42, 48), 0.169 - 0.139j),
    (slice(27, 36), 0.008j),  # the nose
)
"""Landmarks that neither mouth nor brows move, and where their mean lies from the box's centre, in parts of its
height: x + y·j."""


def _around(
    landmarks: np.ndarray,  # (68, 2)
) -> Box:
    """MTCNN's box: as wide as the jaw, from the chin to above the brows; tilted, it is as large as upright."""
    turn = np.exp(-1j * _eyes_angle(landmarks))
    points = (landmarks @ [1, 1j]) * turn
    left, right, bottom, brows = points.real.min(), points.real.max(), points.imag.max(), points.imag.min()
    top = brows - _FOREHEAD * (bottom - brows)
    centre = ((left + right) / 2 + 1j * (top + bottom) / 2) / turn
    x, y, width, height = centre.real, centre.imag, (right - left) / 2, (bottom - top) / 2
    return float(x - width), float(y - height), float(x + width), float(y + height)


def _as_found(box: Box) -> Box:
    """A face's box as dlib's search would give it: a square from the brows to the chin."""
    x, y, height = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[3] - box[1]
    return x - 0.4 * height, y - 0.347 * height, x + 0.4 * height, y + 0.453 * height


def _eyes_angle(landmarks: np.ndarray) -> float:
    x, y = landmarks[42:48].mean(axis=0) - landmarks[36:42].mean(axis=0)
    return math.atan2(y, x)


def _within(box: Box, picture: np.ndarray) -> Box:
    height, width = picture.shape[:2]
    return max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height))


def _faces_extra(what: str) -> ImportError:
    return ImportError(f'{what} is not installed: pip install "pcmecl_fast[faces]"')
