"""Faces are found, followed through time, and cut out as NED's preparation frames them."""

import dataclasses
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pcmecl_fast.data.faces import DETECTORS, Face, load_detector
from pcmecl_fast.data.tracks import Crop, Square, Track, Tracker, centre_track, choose_tracks, cut

MEAD_STILLS = Path(__file__).resolve().parents[2] / "shared" / "data" / "mead_stills"
FACE_OF_256 = 256 / (256 - 70)  # NED's margin
ASTRONAUT = (224.4, 117.1, 109.9)  # centre x, y and height of MTCNN's box in scikit-image's picture
STILL = (127.9, 101.1, 272.3)  # their mean over the stills
WIDTH, HEIGHT = 1280, 720
FRAMES = 60


@pytest.fixture(scope="module")
def detector():
    pytest.importorskip("dlib")
    return load_detector("dlib")


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    return Image.fromarray(pytest.importorskip("skimage.data").astronaut())


@pytest.fixture(scope="module")
def background() -> Image.Image:
    colours = np.random.default_rng(5).integers(60, 160, (12, 20, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


class Person:
    """A picture that moves and zooms: its face's centre and height at each frame, and what stands there."""

    def __init__(
        self,
        picture: Image.Image,
        face: tuple[float, float, float],
        path: Callable[[int], tuple[float, float, float]],
        present: range = range(FRAMES),
    ) -> None:
        self.picture, self.face, self.path, self.present = picture, face, path, present

    def paste(self, frame: Image.Image, number: int) -> None:
        if number not in self.present:
            return
        x, y, height = self.path(number)
        scale = height / self.face[2]
        size = tuple(math.ceil(side * scale) for side in self.picture.size)
        left, top = x - self.face[0] * scale, y - self.face[1] * scale
        corner = (math.floor(left), math.floor(top))
        # The part of a pixel that paste() cannot move is moved in the picture.
        box = ((corner[0] - left) / scale, (corner[1] - top) / scale)
        turn = (1 / scale, 0, box[0], 0, 1 / scale, box[1])
        small = self.picture.transform(size, Image.Transform.AFFINE, turn, Image.Resampling.BICUBIC)
        inside = Image.new("L", self.picture.size, 255).transform(size, Image.Transform.AFFINE, turn)
        frame.paste(small, corner, inside)

    def square(self, number: int) -> Square:
        x, y, height = self.path(number)
        return x, y, height * FACE_OF_256, 0.0


def film(background: Image.Image, *people: Person, frames: int = FRAMES, every: int = 5):
    for number in range(0, frames, every):
        frame = background.copy()
        for person in people:
            person.paste(frame, number)
        yield number, np.array(frame)


def sure(detector, picture) -> list[Face]:
    return [face for face in detector(np.asarray(picture)) if face.score > 0]


def follow(detector, pictures, crop: Crop | None = None, frames: int = FRAMES) -> list[Track]:
    tracker = Tracker(detector, crop)
    for number, picture in pictures:
        tracker.look(number, picture)
    return tracker.tracks(frames)


def swaying(number: int) -> tuple[float, float, float]:
    """A head of a third of the height, that sways by a fifth of the width and comes nearer by half, in 2.4 seconds."""
    turn = 2 * math.pi * number / 75
    return 640 + 130 * math.sin(turn), 360 + 30 * math.cos(turn), 240 + 120 * number / FRAMES


def overlap(a: Square, b: Square) -> float:
    """Intersection over union of two upright squares."""
    sides = [
        max(0.0, min(a[axis] + a[2] / 2, b[axis] + b[2] / 2) - max(a[axis] - a[2] / 2, b[axis] - b[2] / 2))
        for axis in (0, 1)
    ]
    shared = sides[0] * sides[1]
    return shared / (a[2] ** 2 + b[2] ** 2 - shared)


# What is found


def test_a_face_is_found_where_mtcnn_finds_it(detector, astronaut):
    face = detector(np.asarray(astronaut))[0]
    x, y, height = ASTRONAUT
    left, top, right, bottom = face.box
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((x, y), abs=0.05 * height)
    assert bottom - top == pytest.approx(height, rel=0.1)
    assert face.landmarks.shape == (68, 2)


@pytest.mark.parametrize("angle", [-20, 15])
def test_a_tilted_heads_box_is_no_larger(detector, astronaut, angle):
    upright = detector(np.asarray(astronaut))[0]
    tilted = detector(np.asarray(astronaut.rotate(angle, Image.Resampling.BICUBIC)))[0]
    assert tilted.box[3] - tilted.box[1] == pytest.approx(upright.box[3] - upright.box[1], rel=0.07)


@pytest.mark.parametrize("height", [80, 200, 600])
def test_faces_of_a_ninth_of_the_picture_to_all_of_it_are_found(detector, astronaut, background, height):
    person = Person(astronaut, ASTRONAUT, lambda _: (640, 360, height))
    ((_, picture),) = film(background, person, frames=1)
    face = detector(picture)[0]
    assert overlap(Crop().square(face), person.square(0)) > 0.8


def test_what_has_no_face_gives_none(detector, background):
    assert sure(detector, background) == []
    assert sure(detector, np.zeros((1, 1, 3), np.uint8)) == []


def test_a_turned_view_of_an_array_is_taken(detector, astronaut):
    lying = np.ascontiguousarray(np.rot90(np.asarray(astronaut)))
    assert len(sure(detector, np.rot90(lying, -1))) == 1


def test_a_known_face_is_found_again_near_where_it_was(detector, astronaut, background):
    pictures = [picture for _, picture in film(background, Person(astronaut, ASTRONAUT, swaying), frames=10)]
    known = sure(detector, pictures[0])
    (again,), (anew,) = detector.near(pictures[1], known), sure(detector, pictures[1])
    assert overlap(Crop().square(again), Crop().square(anew)) > 0.93


# Following it


@pytest.mark.parametrize("align", ["none", "eyes"])
def test_a_moving_and_zooming_face_is_followed(detector, astronaut, background, align):
    person = Person(astronaut, ASTRONAUT, swaying)
    (track,) = follow(detector, film(background, person), Crop(align=align))
    assert track.found == 1
    assert track.missing == ()
    assert np.mean([overlap(track.square(n), person.square(n)) for n in range(FRAMES)]) > 0.8


def test_a_still_face_does_not_tremble(detector, astronaut, background):
    ((_, clean),) = film(background, Person(astronaut, ASTRONAUT, lambda _: (640.3, 360.4, 300)), frames=1)
    noise = np.random.default_rng(1)

    def compressed() -> np.ndarray:
        file = io.BytesIO()
        noisy = np.clip(clean + noise.normal(0, 4, clean.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(file, "JPEG", quality=75)
        return np.array(Image.open(file))

    (track,) = follow(detector, ((n, compressed()) for n in range(0, 100, 5)), frames=100)
    squares = np.array([track.square(n)[:3] for n in range(100)])
    assert np.diff(squares, axis=0).std(axis=0).max() < 1


@pytest.mark.skipif(not MEAD_STILLS.is_dir(), reason=f"no real stills at {MEAD_STILLS}")
def test_real_faces_are_found_and_followed(detector, background):
    """A few of each speaker; all 243 give 0.994 found and a mean overlap of 0.91."""
    found, overlaps = [], []
    for file in sorted(MEAD_STILLS.glob("*/*/*.jpg"))[::30]:
        person = Person(Image.open(file), STILL, swaying)
        track = follow(detector, film(background, person))[0]
        found.append(track.found)
        overlaps += [overlap(track.square(n), person.square(n)) for n in range(FRAMES)]
    assert np.mean(found) >= 0.97
    assert np.mean(overlaps) >= 0.8


def beside(astronaut: Image.Image, present: range = range(FRAMES)) -> tuple[Person, Person]:
    small = Person(astronaut.crop((80, 0, 370, 300)), (144.4, 117.1, 109.9), lambda n: (300 + n, 350, 200))
    large = Person(astronaut.crop((80, 0, 370, 300)), (144.4, 117.1, 109.9), lambda n: (900 - n, 380, 300), present)
    return small, large


def test_of_two_people_the_larger_comes_first_and_either_can_be_had(detector, astronaut, background):
    small, large = beside(astronaut)
    tracks = follow(detector, film(background, small, large))
    assert [track.found for track in tracks] == [1, 1]
    for chosen, person in ((choose_tracks(tracks), large), (choose_tracks(tracks, "left"), small)):
        (track,) = chosen
        assert min(overlap(track.square(n), person.square(n)) for n in range(FRAMES)) > 0.75
    assert choose_tracks(tracks, "all") == tracks


def test_one_who_leaves_loses_to_one_who_stays(detector, astronaut, background):
    small, large = beside(astronaut, range(20))
    first, second = follow(detector, film(background, small, large))
    assert first.found == 1
    assert overlap(first.square(50), small.square(50)) > 0.75
    assert second.found == pytest.approx(1 / 3)
    assert second.missing == ((20, FRAMES - 1),)


def test_one_who_comes_late_is_found_beside_one_who_is_known(detector, astronaut, background):
    small, large = beside(astronaut, range(30, FRAMES))
    tracks = follow(detector, film(background, small, large))
    assert len(tracks) == 2
    late = min(tracks, key=lambda track: track.found)
    assert late.at[0] - 30 <= 15  # the whole picture is searched every half second
    assert overlap(late.square(55), large.square(55)) > 0.75


# Tracks, with faces as given


def faces_at(*boxes: tuple[float, float, float], score: float = 1.0) -> list[Face]:
    """Faces without landmarks, of centre x, y and height."""
    return [Face((x - 0.4 * h, y - h / 2, x + 0.4 * h, y + h / 2), score, None) for x, y, h in boxes]


def track_of(by_frame: dict[int, list[Face]], frames: int = 100, **options) -> list[Track]:
    numbers = iter(range(0, frames, options.get("every", 5)))
    tracker = Tracker(lambda _: by_frame.get(next(numbers), []), **options)
    for number in range(frames):
        if tracker.wants(number):
            tracker.look(number, np.zeros((1, 1, 3), np.uint8))
    return tracker.tracks(frames)


def test_the_square_has_neds_margin():
    (face,) = faces_at((100, 80, 186))
    assert Crop().square(face) == pytest.approx((100, 80, 256, 0))
    assert Crop(margin=0).square(face) == pytest.approx((100, 80, 186, 0))


@pytest.mark.parametrize(("rate", "every"), [(25, 5), (25, 1), (50, 10), (30, 3), (1, 50), (0.1, 1)])
def test_a_steady_movement_keeps_its_place_at_any_rate(rate, every):
    moving = {n: faces_at((100 + n / every, 200 - n / every, 60 + n / every)) for n in range(0, 40 * every, every)}
    (track,) = track_of(moving, 40 * every, rate=rate, every=every, crop=Crop(margin=0))
    for number in range(39 * every + 1):
        looks = number / every
        assert track.square(number) == pytest.approx((100 + looks, 200 - looks, 60 + looks, 0))


def test_a_single_wrong_box_does_not_move_the_square():
    faces = {n: faces_at((100, 100, 100)) for n in range(0, 100, 5)}
    faces[50] = faces_at((140, 100, 130))
    (track,) = track_of(faces, crop=Crop(margin=0))
    assert track.square(50) == pytest.approx((100, 100, 100, 0))


def test_a_gap_of_a_second_is_bridged_on_a_line_and_named():
    faces = {n: faces_at((100 + n, 100, 200)) for n in range(0, 100, 5) if not 40 <= n < 60}
    (track,) = track_of(faces)
    assert track.square(50)[0] == pytest.approx(150, abs=1)
    assert track.missing == ((40, 59),)
    assert track.found == 0.8


def test_after_a_longer_gap_it_is_another_track():
    faces = {n: faces_at((100, 100, 200)) for n in range(0, 100, 5) if not 30 <= n < 65}
    tracks = track_of(faces)
    assert [track.missing for track in tracks] == [((0, 64),), ((30, 99),)]


def test_what_is_seen_twice_or_never_surely_is_no_face():
    faces = {n: faces_at((100, 100, 200)) + faces_at((900, 100, 200), score=-0.1) for n in range(0, 100, 5)}
    faces[50] += faces_at((500, 500, 200))
    (track,) = track_of(faces)
    assert track.square(50)[0] == pytest.approx(100)


def test_what_is_far_less_sure_than_another_face_is_none():
    faces = {n: faces_at((900, 100, 200)) + faces_at((100, 100, 200), score=0.2) for n in range(0, 100, 5)}
    assert len(track_of(faces)) == 1
    faces = {n: faces_at((900, 100, 200), score=0.3) + faces_at((100, 100, 200), score=0.2) for n in range(0, 100, 5)}
    assert len(track_of(faces)) == 2


def test_a_single_picture_is_enough():
    (track,) = track_of({0: faces_at((100, 100, 186))}, frames=1)
    assert track.square(0) == pytest.approx((100, 100, 256, 0))


def test_without_faces_there_is_no_track():
    tracks = track_of({})
    assert tracks == []
    assert choose_tracks(tracks, "left") == choose_tracks(tracks, "all") == []


def test_a_track_survives_json():
    track = Track(np.array([0, 5]), np.array([[1.234, 2, 3, 0.1], [4, 5, 6, 0.2]]), 0.5, ((0, 4),))
    again = Track.from_json(json.loads(json.dumps(track.to_json())))
    assert again.square(5) == track.square(5)
    assert again.square(0) == pytest.approx(track.square(0), abs=0.005)
    assert (again.found, again.missing) == (0.5, ((0, 4),))
    assert Crop(**json.loads(json.dumps(dataclasses.asdict(Crop(align="eyes"))))) == Crop(align="eyes")


def test_the_square_is_linear_between_and_constant_beyond():
    track = Track(np.array([10, 20]), np.array([[0.0, 0, 100, 0], [10, 20, 200, 0]]), 1.0)
    assert track.square(15) == (5, 10, 150, 0)
    assert track.square(0) == track.square(10)
    assert track.square(99) == track.square(20)


def test_the_centred_square_needs_no_detector():
    assert centre_track(1280, 720).square(77) == (640, 360, 720, 0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: load_detector("dlip"), "detector: got 'dlip'.*did you mean dlib"),
        (lambda: Crop(margin=1), "margin: got 1"),
        (lambda: Crop(align="nose"), "align: got 'nose'; takes none or eyes"),
        (lambda: choose_tracks([], "right"), "which: got 'right'"),
        (lambda: Tracker(list, every=0), "every: got 0"),
        (lambda: Tracker(list, rate=0), "rate: got 0"),
        (lambda: Tracker(list).look(3, np.zeros((1, 1, 3), np.uint8)), "number: got 3; takes multiples of 5"),
        (lambda: Crop(align="eyes").square(faces_at((1, 1, 1))[0]), "'eyes' needs a detector that finds landmarks"),
        (lambda: cut(np.zeros((9, 9, 3), np.uint8), (4, 4, 0, 0), 8), "square: got side 0"),
    ],
)
def test_wrong_values_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("missing", ["dlib", "face_recognition_models"])
def test_a_missing_library_is_named_with_what_installs_it(missing):
    pytest.importorskip("dlib")
    script = f"import sys; sys.modules[{missing!r}] = None; from pcmecl_fast.data.faces import load_detector\n"
    script += "try: load_detector()\nexcept ImportError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 'pip install "pcmecl_fast[faces]"' in done.stdout
    assert missing.replace("_", "-") in done.stdout


def test_every_detector_is_known_by_its_name():
    assert list(DETECTORS) == ["dlib"]


# Cutting it out


@pytest.fixture(scope="module")
def smooth() -> np.ndarray:
    """(200, 300, 3), brightness rising to the right in red and downwards in green."""
    y, x = np.mgrid[:200, :300] + 0.5
    return np.stack([x * 0.8, y * 1.2, np.full_like(x, 90)], axis=-1).round().astype(np.uint8)


@pytest.mark.parametrize("side", [37.3, 100, 180.5])
@pytest.mark.parametrize("angle", [0.0, 0.2, -0.5])
def test_each_pixel_comes_from_its_place_in_the_turned_square(smooth, side, angle):
    size = 32
    square = (150.3, 100.7, side, angle)
    v, u = (np.mgrid[:size, :size] + 0.5 - size / 2) * side / size
    x = square[0] + u * math.cos(angle) - v * math.sin(angle)
    y = square[1] + u * math.sin(angle) + v * math.cos(angle)
    inside = (x > 4) & (x < 296) & (y > 4) & (y < 196)
    face = cut(smooth, square, size).astype(float)
    assert np.abs(face[..., 0] - 0.8 * x)[inside].max() < 2.5
    assert np.abs(face[..., 1] - 1.2 * y)[inside].max() < 2.5


@pytest.mark.parametrize("angle", [0.0, 0.3])
def test_beyond_the_border_the_edge_is_repeated(smooth, angle):
    whole = np.pad(smooth, ((150, 150), (150, 150), (0, 0)), mode="edge")
    face, expected = cut(smooth, (10, 190, 120, angle), 64), cut(whole, (160, 340, 120, angle), 64)
    np.testing.assert_array_equal(face, expected)
    assert cut(smooth, (-500, -500, 50, angle), 8).std(axis=(0, 1)).max() == 0


def test_fine_stripes_become_grey_instead_of_beating():
    stripes = np.tile(np.array([0, 255], np.uint8), 400)[None, :, None].repeat(800, 0).repeat(3, 2)
    for angle in (0.0, 0.1):
        face = cut(stripes, (400.2, 400, 500, angle), 128).astype(int)
        assert np.abs(face - 127.5).max() < 12


def test_a_square_as_large_as_its_crop_is_copied(smooth):
    np.testing.assert_array_equal(cut(smooth, (150, 100, 64, 0), 64), smooth[68:132, 118:182])
