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
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from pcmecl_fast.data.faces import Box, Detector, Face, distance, fit_upright

Align = Literal["none", "eyes"]
Choice = Literal["largest", "left", "all"]
Square = tuple[float, float, float, float]  # centre x, centre y, side, angle (radians, clockwise as seen)


@dataclass(frozen=True)
class Crop:
    """How a face's square is laid.

    Args:
        margin: part of the square's side that is not face: side = longer side of the face's box / (1 - margin).
            NED's preparation has 70 of 256 pixels.
        align: "none", an upright square around the box; "eyes", a square turned so that the eyes are level, with its
            centre and side from the eyes, the nose and the upper jaw, which talking does not move.

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
        x, y, height, angle = fit_upright(face.landmarks)
        return x, y, height / (1 - self.margin), angle


@dataclass(frozen=True, eq=False)
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
    continued over gaps of up to a second, and in the gap its square moves on a line. Squares are smoothed in time:
    single wrong ones give way to a running median, and then lines are fitted under a Gaussian window, which leaves a
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
        links = self._open(number)
        pairs = sorted(
            (apart, link, face)
            for link, one in enumerate(links)
            for face, found in enumerate(faces)
            if (apart := distance(one.faces[-1].box, found.box)) < _CLOSE
        )
        continued: set[int] = set()
        taken: set[int] = set()
        for _, link, face in pairs:
            if link not in continued and face not in taken:
                links[link].add(number, faces[face])
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

        A face counts as a mistake of the detector if it is seen in fewer than three of the frames looked at (unless
        there were no more), and if the detector is never sure of it, or much less so than of another.
        """
        enough = min(_FEWEST, len(self._looked))
        links = [link for link in self._links if len(link.numbers) >= enough and link.score() > 0]
        surest = max((link.score() for link in links), default=0.0)
        tracks = [self._track(link, frames) for link in links if link.score() >= _AS_SURE * surest]
        return sorted(tracks, key=lambda track: -float(np.median(track.squares[:, 2])) * track.found)

    def _find(self, number: int, picture: np.ndarray) -> list[Face]:
        near = getattr(self.detector, "near", None)
        known = [link.faces[-1] for link in self._open(number)]
        again = _distinct(near(picture, known)) if near and known else []
        if len(again) < len(known) or not known or number - self._everywhere >= _EVERYWHERE * self.rate:
            self._everywhere = number
            return _distinct([*again, *self.detector(picture)])
        return again

    def _open(self, number: int) -> list[_Link]:
        # However sparse the looks, two that follow each other may be linked.
        longest = max(_GAP * self.rate, self.every) + 0.5
        return [link for link in self._links if number - link.numbers[-1] <= longest]

    def _track(self, link: _Link, frames: int) -> Track:
        at = np.arange(link.numbers[0], link.numbers[-1] + 1, self.every)
        raw = np.array([self.crop.square(face) for face in link.faces])
        raw[:, 3] = np.unwrap(raw[:, 3])
        squares = np.stack([np.interp(at, link.numbers, column) for column in raw.T], axis=1)
        looks = self.rate / self.every
        smooth = _fit_lines(_without_outliers(squares, round(_MEDIAN * looks / 2)), _SIGMA * looks)
        after = frames - 1 - at[-1]
        if link.numbers[-1] == self._looked[-1] and len(at) > 1 and after > 0:
            # The few frames after the last look go on as the last ones did.
            at = np.append(at, frames - 1)
            smooth = np.concatenate([smooth, smooth[-1:] + (smooth[-1:] - smooth[-2:-1]) * after / self.every])
        return Track(
            at,
            smooth,
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


_EVERYWHERE = 0.5
"""Seconds after which the whole picture is searched again, for other people."""
_GAP = 1.0
"""Seconds that a face may be gone, turned away or hidden, and still be the same."""
_CLOSE = 0.8
"""The `distance` up to which two boxes may be of one face."""
_SAME = 0.4
"""The `distance` up to which two boxes of one picture are of one face; cheek to cheek, two faces have 0.7."""
_AS_SURE = 0.25
"""A face's best score, in parts of the surest face's: dlib sees faces in clothes at 0.2, where people have 1."""
_MEDIAN = 0.6
"""Seconds of the median's window."""
_WRONG = 0.2
"""How far, in parts of the side or in radians, a square may be from the median: a head does not move as fast."""
_SIGMA = 0.16
"""Seconds, standard deviation of the Gaussian window."""
_FEWEST = 3
"""Looks in which a face has to be found."""


@dataclass
class _Link:
    """What was found of one face."""

    numbers: list[int] = field(default_factory=list)
    faces: list[Face] = field(default_factory=list)

    def add(self, number: int, face: Face) -> None:
        self.numbers.append(number)
        self.faces.append(face)

    def score(self) -> float:
        return max(face.score for face in self.faces)


def _distinct(faces: list[Face]) -> list[Face]:
    """Without those that were found before in the list."""
    kept: list[Face] = []
    for face in faces:
        if all(distance(face.box, other.box) >= _SAME for other in kept):
            kept.append(face)
    return kept


def _without_outliers(
    squares: np.ndarray,  # (K, 4)
    reach: int,  # rows to either side
) -> np.ndarray:
    """Squares far from the median of their neighbours are replaced by it; the others stay, so that turning points of
    a movement are not cut off. Beyond the ends, the rows are reflected in the end's value."""
    reach = min(max(reach, 1), len(squares) - 1)
    if reach < 1:
        return squares
    before = 2 * squares[0] - squares[reach:0:-1]
    after = 2 * squares[-1] - squares[-2 : -2 - reach : -1]
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate([before, squares, after]), 2 * reach + 1, axis=0)
    median = np.median(windows, axis=-1)
    off = np.abs(squares - median)
    off[:, :3] /= median[:, 2:3]
    return np.where((off > _WRONG).any(axis=1, keepdims=True), median, squares)


def _fit_lines(
    rows: np.ndarray,  # (K, C)
    sigma: float,  # of the window, in rows
) -> np.ndarray:
    """At each row, the value there of the line that fits its neighbours best under a Gaussian window."""
    if sigma < 0.25 or len(rows) < 2:
        return rows  # the window does not reach a neighbour
    reach = min(math.ceil(3 * sigma), len(rows) - 1)
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


def _resized(picture: np.ndarray, box: Box, size: int) -> Image.Image:
    """A box of a picture, resized, with the pixels around it that the filter reaches and its edges repeated."""
    reach = 2 + math.ceil(2 * (box[2] - box[0]) / size)
    height, width = picture.shape[:2]
    # At least a row and a column of the picture, to be repeated where the box lies outside.
    left, top = min(math.floor(box[0]) - reach, width - 1), min(math.floor(box[1]) - reach, height - 1)
    right, bottom = max(math.ceil(box[2]) + reach, 1), max(math.ceil(box[3]) + reach, 1)
    above, below = max(top, 0), min(bottom, height)
    before, after = max(left, 0), min(right, width)
    part = picture[above:below, before:after]
    beyond = ((above - top, bottom - below), (before - left, right - after), (0, 0))
    if any(map(any, beyond)):
        part = np.pad(part, beyond, mode="edge")
    image = Image.fromarray(part)
    placed = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=placed, reducing_gap=1.5)
