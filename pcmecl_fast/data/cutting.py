"""One recording becomes one prepared clip: its face found, followed and cut out, with the sound that belongs to it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from pcmecl_fast.data.faces import Detector, load_detector
from pcmecl_fast.data.index import Entry, Form, packed_pts
from pcmecl_fast.data.layouts.base import RawClip, is_picture
from pcmecl_fast.data.media import read_picture
from pcmecl_fast.data.sound import has_sound, write_sound
from pcmecl_fast.data.tracks import Crop, Track, Tracker, centre_track, choose_tracks, cut
from pcmecl_fast.data.video import Frame, open_video, scan, write_clip
from pcmecl_fast.files import content_hash, remove, replacing, unfinished

GROUP = 8
"""Pictures from one keyframe to the next: what reading any one frame of a prepared clip decodes at most."""

SUFFIXES: dict[Form, str] = {"video": ".mp4", "picture": ".png", "pictures": ""}

_RATE = Fraction(25)  # of frames given as pictures, where nothing says theirs


@dataclass(frozen=True)
class Cutting:
    """What decides the pixels and the sound of prepared clips: options of `pcmecl-fast prepare`, which says more."""

    size: int = 256
    crop: Literal["faces", "centre"] = "faces"
    detector: str = "dlib"
    align: Literal["none", "eyes"] = "none"
    margin: float = 70 / 256
    face: Literal["largest", "left"] = "largest"
    every: int = 5
    fps: float | None = None
    frames: Literal["mp4", "png"] = "mp4"
    sound: Literal["keep", "need", "drop"] = "keep"
    crf: float = 14


class NoFaceError(ValueError):
    """No face was found in a recording."""


def cut_clip(
    clip: RawClip,
    cutting: Cutting,
    form: Form,
    path: Path,  # of the prepared file, or folder of pictures
) -> Entry:
    """Prepare one clip: `path` is whole or absent. The entry lacks what only the caller knows: file, source, stamp.

    Raises:
        NoFaceError: no face was found; the message has the numbers of the frames that were looked at.
        ValueError: the recording is damaged, or has no sound where it is needed; the message names the file.
        OSError: the disk is full, or a folder cannot be written.
    """
    entry = Entry("", clip.individual, clip.emotion, 0, level=clip.level, view=clip.view, sentence=clip.sentence)
    entry.repetition, entry.number = clip.repetition, clip.number
    recording = _Pictures(clip) if is_picture(clip.sources[0]) else _Video(clip)
    sound = _sound_of(clip, recording, cutting)
    track = _track(recording, clip, cutting)
    if track is not None:
        entry.track, entry.found = track.to_json(), round(track.found, 3)
    faces = recording.faces(track, cutting)
    if form == "picture":
        write_png(path, next(faces)[1])
        entry.frames = 1
    elif form == "video":
        clock, rate = recording.clock(cutting)
        write_clip(path, faces, time_base=clock, rate=rate, sound=sound, crf=cutting.crf, group=GROUP)
        pts = scan(path).tolist()
        entry.frames, entry.pts, entry.rate = len(pts), packed_pts(pts), str(rate)
    else:
        entry.frames = _write_pictures(path, faces, sound)
        entry.rate = str(recording.clock(cutting)[1])
    entry.form, entry.checksum = form, hash_of(path)
    entry.bytes = 0 if form == "pictures" else path.stat().st_size
    return entry


def hash_of(path: Path) -> str:
    """A prepared clip's checksum: of a file its content's, of a folder that of all its files."""
    if path.is_file():
        return content_hash(path)
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(path.iterdir()):
        digest.update(f"{file.name} {content_hash(file)}\n".encode())
    return digest.hexdigest()


class _Video:
    """A recording that is one video file."""

    def __init__(self, clip: RawClip) -> None:
        self.path = clip.sources[0]
        self.count = 0
        with open_video(self.path) as reader:
            self.shape = reader.height, reader.width
            self.time_base, self.rate = reader.time_base, reader.rate

    def look(self, tracker: Tracker) -> None:
        """Show the tracker the frames that it wants, and count them all."""
        with open_video(self.path) as reader:
            for frame in reader:
                if tracker.wants(frame.number):
                    tracker.look(frame.number, frame.rgb(quick=True))
                self.count = frame.number + 1

    def faces(self, track: Track | None, cutting: Cutting) -> Iterator[tuple[int, np.ndarray]]:
        """The faces, each with its time in units of `clock`."""
        track = track or centre_track(self.shape[1], self.shape[0])
        with open_video(self.path) as reader:
            timed = _as_recorded(reader)
            if cutting.fps is not None:
                timed = _resampled(reader, _exact(cutting.fps), self.rate)
            for pts, frame in timed:
                yield pts, cut(frame.rgb(), track.square(frame.number), cutting.size)

    def clock(self, cutting: Cutting) -> tuple[Fraction, Fraction]:
        """Seconds a unit of time, and frames a second."""
        if cutting.fps is None:
            return self.time_base, self.rate
        rate = _exact(cutting.fps)
        return 1 / rate, rate


class _Pictures:
    """A recording that is one picture, or several, its frames in order."""

    def __init__(self, clip: RawClip) -> None:
        self.paths, self.count = clip.sources, len(clip.sources)
        self.cropped, self.rate = clip.cropped, clip.rate or _RATE
        self.shape = read_picture(self.paths[0]).shape[:2]

    def look(self, tracker: Tracker) -> None:
        for number in filter(tracker.wants, range(self.count)):
            tracker.look(number, read_picture(self.paths[number]))

    def faces(self, track: Track | None, cutting: Cutting) -> Iterator[tuple[int, np.ndarray]]:
        for number, path in enumerate(self.paths):
            picture = read_picture(path)
            here = track or centre_track(picture.shape[1], picture.shape[0])
            yield number, cut(picture, here.square(number), cutting.size)

    def clock(self, cutting: Cutting) -> tuple[Fraction, Fraction]:
        return 1 / self.rate, self.rate


def _track(recording: _Video | _Pictures, clip: RawClip, cutting: Cutting) -> Track | None:
    """Where the face is; None for the centred square."""
    if cutting.crop == "centre" or clip.cropped:
        return None
    crop = Crop(margin=cutting.margin, align=cutting.align)
    tracker = Tracker(_detector(cutting.detector), crop, every=cutting.every, rate=recording.rate)
    recording.look(tracker)
    tracks = choose_tracks(tracker.tracks(recording.count), cutting.face)
    if not tracks:
        where = "it"
        if recording.count > 1:
            where = f"frames 0 to {recording.count - 1}, of which one in {cutting.every} was looked at"
        raise NoFaceError(f"{clip.sources[0]} (no face was found in {where})")
    return tracks[0]


@functools.cache
def _detector(name: str) -> Detector:
    return load_detector(name)  # once a process: it reads files


def _exact(fps: float) -> Fraction:
    """29.97 is 30000/1001, as television counts; 25 is 25."""
    ntsc = Fraction(round(fps * 1001 / 1000) * 1000, 1001)
    return ntsc if abs(ntsc - fps) < 0.004 and abs(fps - round(fps)) > 0.001 else Fraction(fps).limit_denominator(1000)


def _as_recorded(frames: Iterable[Frame]) -> Iterator[tuple[int, Frame]]:
    for frame in frames:
        yield frame.pts, frame


def _resampled(frames: Iterable[Frame], rate: Fraction, recorded: Fraction) -> Iterator[tuple[int, Frame]]:
    """At evenly spaced times the frame that is nearest, from the first frame's time to the end of the last one's."""
    before: Frame | None = None
    number = 0
    for frame in frames:
        if before is None:
            number = round(frame.time * rate)
        else:
            while number / rate < (before.time + frame.time) / 2:
                yield number, before
                number += 1
        before = frame
    while before is not None and number / rate < before.time + 1 / (2 * recorded):
        yield number, before
        number += 1


def _sound_of(clip: RawClip, recording: _Video | _Pictures, cutting: Cutting) -> Path | None:
    if cutting.sound == "drop":
        return None
    # A video's own sound first: one that lies apart need not begin with the pictures.
    for path in (recording.path if isinstance(recording, _Video) else None, clip.sound):
        try:
            if path is not None and has_sound(path):
                return path
        except ValueError as error:
            if path in clip.sources:
                raise
            raise ValueError(f"{clip.sources[0]} (its sound, {error}; --sound drop does without)") from error
    if cutting.sound == "need" and not (isinstance(recording, _Pictures) and recording.count == 1):
        raise ValueError(f"{clip.sources[0]} (no sound, in it or beside it)")
    return None


def write_png(path: Path, pixels: np.ndarray) -> None:
    with replacing(path) as file:
        Image.fromarray(pixels).save(file, "PNG")


def _write_pictures(path: Path, faces: Iterator[tuple[int, np.ndarray]], sound: Path | None) -> int:
    """A folder of numbered pictures, and the sound beside them; the folder is whole or absent."""
    number = -1
    with _new_folder(path) as folder:
        for number, (_, pixels) in enumerate(faces):
            Image.fromarray(pixels).save(folder / f"{number:06d}.png")
        if sound is not None:
            write_sound(folder / "sound.m4a", sound)
    return number + 1


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    folder = unfinished(path)
    folder.mkdir(parents=True)
    try:
        yield folder
        remove(path)
        os.replace(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
