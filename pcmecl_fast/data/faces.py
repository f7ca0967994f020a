"""Faces in videos: found in every few frames, followed through time, and cut out as upright or aligned squares.

    tracker = Tracker(load_detector("dlib"), Crop(), every=5, rate=reader.rate)
    for frame in reader:
        if tracker.wants(frame.number):
            tracker.look(frame.number, frame.rgb())
    (track,) = choose_tracks(tracker.tracks(frames), "largest")
    face = cut(picture, track.square(number), 256)

Coordinates are pixels of the upright picture, with pixel i from i to i + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
from PIL import Image

from pcmecl_fast.wording import did_you_mean, listed

Align = Literal["none", "eyes"]
Choice = Literal["largest", "left", "all"]
Box = tuple[float, float, float, float]  # left, top, right, bottom
Square = tuple[float, float, float, float]  # centre x, centre y, side, angle (radians, clockwise as seen)


class Face(NamedTuple):
    """A face found in a picture."""

    box: Box
    """From the middle of the forehead to the chin and from cheek to cheek, where MTCNN puts it, whatever found it."""
    score: float
    """The detector's own; larger is surer."""
    landmarks: np.ndarray | None
    """(68, 2) float64, the points of iBUG 300-W, or None."""


class Detector(Protocol):
    """Finds faces. One that also has `near`, of the same signature as `DlibDetector.near`, is asked that in between."""

    def __call__(
        self,
        picture: np.ndarray,  # (H, W, 3) uint8 RGB
    ) -> list[Face]: ...


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


@dataclass(frozen=True)
class Crop:
    """How a face's square is laid.

    Args:
        margin: part of the square's side that is not face: side = longer side of the face's box / (1 - margin).
            NED's preparation has 70 of 256 pixels.
        align: "none", an upright square around the box; "eyes", a square turned so that the eyes are level, with its
            centre and side from the eyes and the nose, which a talking mouth does not move.

    Raises:
        ValueError: a value that it does not take.
    """

    margin: float = 70 / 256
    align: Align = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 1:
            raise ValueError(f"margin: got {self.margin}; takes a part of the square's side from 0 to below 1")
        if self.align not in get_args(Align):
            raise ValueError(f"align: got {self.align!r}; takes {' or '.join(get_args(Align))}")

    def square(self, face: Face) -> Square:
        """The square of one face, before any smoothing; ValueError where it needs landmarks and there are none."""
        if self.align == "none":
            left, top, right, bottom = face.box
            return (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top) / (1 - self.margin), 0.0
        if face.landmarks is None:
            raise ValueError("align: 'eyes' needs a detector that finds landmarks; this one does not")
        x, y, height, angle = _similarity(face.landmarks)
        return x, y, height / (1 - self.margin), angle


@dataclass(frozen=True)
class Track:
    """One face's square through a video, linear between the frames it is given at."""

    at: np.ndarray
    """(K,) int64, frame numbers, ascending."""
    squares: np.ndarray
    """(K, 4) float64: centre x, centre y, side, angle."""
    found: float
    """The part of the frames looked at in which this face was found."""
    missing: tuple[tuple[int, int], ...] = ()
    """First and last frame of each stretch in which it was not found."""

    def square(self, frame: int) -> Square:
        """The square in a frame; before the first known and after the last, those."""
        x, y, side, angle = (float(np.interp(frame, self.at, column)) for column in self.squares.T)
        return x, y, side, angle

    def to_json(self) -> dict[str, Any]:
        """Rounded to a hundredth of a pixel, and the angle to as little at a face's border."""
        return {
            "at": self.at.tolist(),
            "squares": [[*(round(v, 2) for v in row[:3]), round(row[3], 5)] for row in self.squares.tolist()],
            "found": round(self.found, 4),
            "missing": [list(stretch) for stretch in self.missing],
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Track:
        return cls(
            np.array(content["at"], dtype=np.int64),
            np.array(content["squares"], dtype=np.float64).reshape(-1, 4),
            float(content["found"]),
            tuple((int(first), int(last)) for first, last in content["missing"]),
        )


class Tracker:
    """Links the faces found in frames 0, k, 2k, … into one track a person.

    A face continues the track whose last box is closest in place and size, if it is close at all; a track is
    continued over gaps of up to a second, and in the gap its square moves on a line. Squares are smoothed in time by a
    running median, which drops single wrong boxes, and then by fitting lines under a Gaussian window, which leaves a
    steadily moving or zooming face where it is, also at the ends of a track.

    Args:
        detector: what finds faces in one picture.
        crop: how squares are laid around faces.
        every: k.
        rate: frames a second, which turns the windows' seconds into frames.

    Raises:
        ValueError: `every` or `rate` not above 0.
    """

    def __init__(
        self, detector: Detector, crop: Crop | None = None, *, every: int = 5, rate: float | Fraction = 25
    ) -> None:
        if every < 1:
            raise ValueError(f"every: got {every}; takes 1 or more")
        if rate <= 0:
            raise ValueError(f"rate: got {rate}; takes frames a second above 0")
        self.detector = detector
        self.crop = crop or Crop()
        self.every = every
        self.rate = float(rate)
        self._looked: list[int] = []
        self._links: list[_Link] = []
        self._everywhere = -math.inf  # the frame in which the whole picture was searched last

    def wants(self, number: int) -> bool:
        """Whether a frame is one to look at."""
        return number % self.every == 0

    def look(
        self,
        number: int,
        picture: np.ndarray,  # (H, W, 3) uint8 RGB
    ) -> list[Face]:
        """Find the faces of a frame, and continue the tracks with them; frames come in ascending order.

        Raises:
            ValueError: a frame that is not wanted, or comes late.
        """
        if not self.wants(number) or (self._looked and number <= self._looked[-1]):
            raise ValueError(f"number: got {number}; takes multiples of {self.every} in ascending order")
        faces = self._find(number, picture)
        self._looked.append(number)
        pairs = sorted(
            (distance, link, face)
            for link, open_link in enumerate(self._links)
            if number - open_link.numbers[-1] <= self._longest_gap()
            for face, found in enumerate(faces)
            if (distance := _distance(open_link.faces[-1].box, found.box)) < _CLOSE
        )
        continued: set[int] = set()
        taken: set[int] = set()
        for _, link, face in pairs:
            if link not in continued and face not in taken:
                self._links[link].add(number, faces[face])
                continued.add(link)
                taken.add(face)
        for face, found in enumerate(faces):
            if face not in taken:
                self._links.append(_Link([number], [found]))
        return faces

    def tracks(
        self,
        frames: int,  # of the whole video
    ) -> list[Track]:
        """The tracks so far, best first: those of faces that are large and long present. Empty where there are none.

        A face seen in fewer than three of the frames looked at counts as a mistake of the detector, unless there were
        no more.
        """
        enough = min(_FEWEST, len(self._looked))
        tracks = [self._track(link, frames) for link in self._links if len(link.numbers) >= enough]
        return sorted(tracks, key=lambda track: -float(np.median(track.squares[:, 2])) * track.found)

    def _find(self, number: int, picture: np.ndarray) -> list[Face]:
        near = getattr(self.detector, "near", None)
        known = [link.faces[-1] for link in self._links if self._looked and link.numbers[-1] == self._looked[-1]]
        if near and known and number - self._everywhere < _EVERYWHERE * self.rate:
            faces = near(picture, known)
            if len(faces) == len(known):
                return faces
        self._everywhere = number
        return self.detector(picture)

    def _longest_gap(self) -> float:
        # However sparse the looks, two that follow each other may be linked.
        return max(_GAP * self.rate, self.every) + 0.5

    def _track(self, link: _Link, frames: int) -> Track:
        at = np.arange(link.numbers[0], link.numbers[-1] + 1, self.every)
        raw = np.array([self.crop.square(face) for face in link.faces])
        raw[:, 3] = np.unwrap(raw[:, 3])
        squares = np.stack([np.interp(at, link.numbers, column) for column in raw.T], axis=1)
        looks = self.rate / self.every
        return Track(
            at,
            _fit_lines(_running_median(squares, round(_MEDIAN * looks / 2)), _SIGMA * looks),
            len(link.numbers) / len(self._looked),
            self._missing(link, frames),
        )

    def _missing(self, link: _Link, frames: int) -> tuple[tuple[int, int], ...]:
        found = set(link.numbers)
        stretches: list[tuple[int, int]] = []
        for look, following in zip(self._looked, [*self._looked[1:], frames], strict=True):
            if look in found or look >= frames:
                continue
            if stretches and stretches[-1][1] == look - 1:
                stretches[-1] = (stretches[-1][0], following - 1)
            else:
                stretches.append((look, following - 1))
        return tuple(stretches)


def choose_tracks(tracks: Sequence[Track], which: Choice = "largest") -> list[Track]:
    """Of a video's tracks, best first: the best one, the one that is furthest left, or all. Empty where there are none.

    Raises:
        ValueError: `which` is something else.
    """
    if which not in get_args(Choice):
        raise ValueError(f"which: got {which!r}; takes one of {', '.join(get_args(Choice))}")
    if which == "left" and tracks:
        return [min(tracks, key=lambda track: float(np.median(track.squares[:, 0])))]
    return list(tracks) if which == "all" else list(tracks[:1])


def centre_track(width: int, height: int) -> Track:
    """The centred square of every frame, for videos that are framed already or faces that no detector finds."""
    square = (width / 2, height / 2, float(min(width, height)), 0.0)
    return Track(np.zeros(1, dtype=np.int64), np.array([square]), 0.0)


def cut(
    picture: np.ndarray,  # (H, W, 3) uint8
    square: Square,
    size: int,
) -> np.ndarray:  # (size, size, 3) uint8
    """A square of a picture at any size and angle, antialiased; beyond the picture's border its edge is repeated.

    Pixels around the square count where the filter reaches over its border, so that neighbouring frames' crops differ
    by what moves, not by where the border fell.
    """
    x, y, side, angle = square
    if side <= 0:
        raise ValueError(f"square: got side {side}; takes more than 0")
    # What is turned is cut out upright and at its final scale first: an affine transform does not antialias.
    extent = side * (abs(math.cos(angle)) + abs(math.sin(angle)))
    scaled = size if angle == 0 else max(1, round(size * extent / side)) + 4
    extent = side * scaled / size
    box = (x - extent / 2, y - extent / 2, x + extent / 2, y + extent / 2)
    upright = _resized(picture, box, scaled)
    if angle == 0:
        return np.array(upright)
    cos, sin = math.cos(angle), math.sin(angle)
    from_left = scaled / 2 - (cos - sin) * size / 2
    from_top = scaled / 2 - (sin + cos) * size / 2
    turn = (cos, -sin, from_left, sin, cos, from_top)
    return np.array(upright.transform((size, size), Image.Transform.AFFINE, turn, Image.Resampling.BICUBIC))


class DlibDetector:
    """dlib's frontal faces (HOG) with the 68 landmarks of face-recognition-models.

    The picture is searched at a scale at which faces of a sixth of the height of a wide picture are seen; only where
    there is none, once more and finer. Boxes are laid around the landmarks: dlib's own jump by a fifth as a face
    grows, and end at the brows.

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
        self._landmarks = dlib.shape_predictor(str(_landmarks_file()))

    def __call__(
        self,
        picture: np.ndarray,  # (H, W, 3) uint8 RGB
    ) -> list[Face]:
        whole = (0.0, 0.0, float(picture.shape[1]), float(picture.shape[0]))
        area = whole[2] * whole[3]
        coarse = min(1.0, math.sqrt(_COARSE / area))
        fine = min(2.0, math.sqrt(_FINE / area))
        return self._look(picture, whole, coarse) or self._look(picture, whole, max(coarse, fine))

    def near(
        self,
        picture: np.ndarray,  # (H, W, 3) uint8 RGB
        faces: Sequence[Face],
    ) -> list[Face]:
        """Those of an earlier picture's faces that are still close to where they were: a search of a part only."""
        again = []
        for face in faces:
            left, top, right, bottom = face.box
            reach = 0.4 * (bottom - top)
            around = _within((left - reach, top - reach, right + reach, bottom + reach), picture)
            scale = min(2.0, _NEAR / (bottom - top))
            found = self._look(picture, around, scale)
            if found:
                again.append(min(found, key=lambda other: _distance(face.box, other.box)))
        return again

    def _look(self, picture: np.ndarray, part: Box, scale: float) -> list[Face]:
        left, top = int(part[0]), int(part[1])
        shown = picture[top : int(part[3]), left : int(part[2])]
        grey = Image.fromarray(shown).convert("L")
        width, height = max(1, round(grey.width * scale)), max(1, round(grey.height * scale))
        if scale != 1:
            grey = grey.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
        boxes, scores, _ = self._search.run(np.asarray(grey), 0, 0.0)
        return [self._face(picture, (left, top), scale, box, score) for box, score in zip(boxes, scores, strict=True)]

    def _face(self, picture: np.ndarray, corner: tuple[int, int], scale: float, box: Any, score: float) -> Face:
        left, top = corner
        sides = (
            round(left + box.left() / scale),
            round(top + box.top() / scale),
            round(left + (box.right() + 1) / scale) - 1,
            round(top + (box.bottom() + 1) / scale) - 1,
        )
        points = self._landmarks(picture, self._rectangle(*sides)).parts()
        # dlib counts pixels, whose centres lie half a pixel further.
        landmarks = np.array([(point.x, point.y) for point in points], dtype=np.float64) + 0.5
        return Face(_around(landmarks), float(score), landmarks)


DETECTORS: dict[str, Callable[[], Detector]] = {"dlib": DlibDetector}

_COARSE = 960 * 540
"""Pixels at which a whole picture is searched first; dlib's faces have 80 pixels of its height or more."""
_FINE = 1920 * 1080
"""Pixels at which it is searched again."""
_NEAR = 200
"""Height in pixels, from forehead to chin, at which a known face is looked for."""
_EVERYWHERE = 1.0
"""Seconds after which the whole picture is searched again, for other people."""
_GAP = 1.0
"""Seconds that a face may be gone, turned away or hidden, and still be the same."""
_CLOSE = 0.8
"""The `_distance` up to which two boxes may be of one face."""
_MEDIAN = 0.6
"""Seconds of the median's window."""
_SIGMA = 0.2
"""Seconds, standard deviation of the Gaussian window."""
_FEWEST = 3
"""Looks in which a face has to be found."""

# Measured against MTCNN (facenet-pytorch's), which NED's preparation uses, on 243 stills of seven speakers.
_FOREHEAD = 0.26
"""How far a face's box goes above the brows, in parts of the height from brows to chin."""
_EYE_X, _EYE_Y, _NOSE_Y = 0.166, -0.131, 0.090
"""Where the eyes' centres and the base of the nose lie from the box's centre, in parts of its height."""


@dataclass
class _Link:
    """What was found of one face."""

    numbers: list[int] = field(default_factory=list)
    faces: list[Face] = field(default_factory=list)

    def add(self, number: int, face: Face) -> None:
        self.numbers.append(number)
        self.faces.append(face)


def _distance(a: Box, b: Box) -> float:
    """Of two boxes: centres' distance in parts of the mean side, plus the logarithm of their heights' ratio."""
    side_a, side_b = a[3] - a[1], b[3] - b[1]
    apart = math.hypot(a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]) / 2
    return apart / math.sqrt(side_a * side_b) + abs(math.log(side_a / side_b))


def _running_median(
    rows: np.ndarray,  # (K, C)
    reach: int,  # rows to either side
) -> np.ndarray:
    """The median over each row's neighbours. Beyond the ends the rows are reflected in the end's value, which keeps
    lines; reach 0 where there are fewer than three rows, and at least 1 where there are."""
    reach = min(max(reach, 1), len(rows) - 1) if len(rows) >= 3 else 0
    if reach == 0:
        return rows
    before = 2 * rows[0] - rows[reach:0:-1]
    after = 2 * rows[-1] - rows[-2 : -2 - reach : -1]
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate([before, rows, after]), 2 * reach + 1, axis=0)
    return np.median(windows, axis=-1)


def _fit_lines(
    rows: np.ndarray,  # (K, C)
    sigma: float,  # of the window, in rows
) -> np.ndarray:
    """At each row, the value there of the line that fits its neighbours best under a Gaussian window."""
    reach = min(math.ceil(3 * sigma), len(rows) - 1)
    if reach < 1:
        return rows
    offsets = np.arange(-reach, reach + 1)
    window = np.exp(-0.5 * (offsets / sigma) ** 2)
    size = len(rows)

    def sums(weights: np.ndarray, values: np.ndarray) -> np.ndarray:  # over the neighbours that exist
        return np.convolve(values, weights[::-1])[reach : reach + size]

    one = np.ones(size)
    s0, s1, s2 = (sums(window * offsets**power, one) for power in (0, 1, 2))
    fitted = []
    for column in rows.T:
        t0, t1 = sums(window, column), sums(window * offsets, column)
        fitted.append((s2 * t0 - s1 * t1) / (s0 * s2 - s1**2))
    return np.stack(fitted, axis=1)


def _around(
    landmarks: np.ndarray,  # (68, 2)
) -> Box:
    """MTCNN's box: as wide as the jaw, from the chin to above the brows. A tilted head has the box of an upright one."""
    turn = np.exp(-1j * _eyes_angle(landmarks))
    points = (landmarks @ [1, 1j]) * turn
    left, right, bottom, brows = points.real.min(), points.real.max(), points.imag.max(), points.imag.min()
    top = brows - _FOREHEAD * (bottom - brows)
    centre = ((left + right) / 2 + 1j * (top + bottom) / 2) / turn
    x, y, width, height = centre.real, centre.imag, (right - left) / 2, (bottom - top) / 2
    return float(x - width), float(y - height), float(x + width), float(y + height)


def _similarity(
    landmarks: np.ndarray,  # (68, 2)
) -> tuple[float, float, float, float]:
    """Centre x, y, height and angle of the upright face whose eyes and nose fit best, by least squares."""
    eyes_and_nose = np.array([_EYE_Y * 1j - _EYE_X, _EYE_Y * 1j + _EYE_X, _NOSE_Y * 1j])
    points = landmarks @ [1, 1j]
    seen = np.array([points[36:42].mean(), points[42:48].mean(), points[33]])
    around, known = seen - seen.mean(), eyes_and_nose - eyes_and_nose.mean()
    scale = np.vdot(known, around) / np.vdot(known, known).real
    centre = seen.mean() - scale * eyes_and_nose.mean()
    return float(centre.real), float(centre.imag), float(abs(scale)), _eyes_angle(landmarks)


def _eyes_angle(landmarks: np.ndarray) -> float:
    x, y = landmarks[42:48].mean(axis=0) - landmarks[36:42].mean(axis=0)
    return math.atan2(y, x)


def _resized(picture: np.ndarray, box: Box, size: int) -> Image.Image:
    """A box of a picture, resized, with the pixels around it that the filter reaches and its edges repeated."""
    reach = 2 + math.ceil(2 * (box[2] - box[0]) / size)
    left, top = math.floor(box[0]) - reach, math.floor(box[1]) - reach
    right, bottom = math.ceil(box[2]) + reach, math.ceil(box[3]) + reach
    height, width = picture.shape[:2]
    inside = picture[
        min(max(top, 0), height - 1) : min(max(bottom, 1), height),
        min(max(left, 0), width - 1) : min(max(right, 1), width),
    ]
    if left < 0 or top < 0 or right > width or bottom > height:
        rows = np.clip(np.arange(top, bottom), 0, height - 1)
        columns = np.clip(np.arange(left, right), 0, width - 1)
        inside = picture[rows[:, None], columns]
    image = Image.fromarray(np.ascontiguousarray(inside))
    placed = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=placed, reducing_gap=3.0)


def _within(box: Box, picture: np.ndarray) -> Box:
    height, width = picture.shape[:2]
    return max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height))


def _landmarks_file() -> Path:
    # Not by importing the package: it imports pkg_resources, which setuptools no longer has.
    spec = find_spec("face_recognition_models")
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / "models" / "shape_predictor_68_face_landmarks.dat"
        if file.is_file():
            return file
    raise _faces_extra("face-recognition-models, whose files place faces' landmarks,")


def _faces_extra(what: str) -> ImportError:
    return ImportError(f'{what} is not installed: pip install "pcmecl_fast[faces]"')
