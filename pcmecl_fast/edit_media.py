"""One picture or video edited: its faces found, edited and laid back, and everything else of it kept.

A video is read twice, first to find the faces, then to edit them: of the first reading, only squares stay in memory.
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pcmecl_fast.data.canvas import FrameCanvas, PictureCanvas, changeable, closest_layout, planes
from pcmecl_fast.data.faces import Detector, load_detector
from pcmecl_fast.data.tracks import Choice, Crop, Track, Tracker, centre_track, choose_tracks
from pcmecl_fast.data.video import Encoder, Frame, Look, VideoReader, colours_of, open_video, writing_video
from pcmecl_fast.edit_faces import FaceEditor, Plans, calmed
from pcmecl_fast.files import write_atomically

if TYPE_CHECKING:
    from av import VideoFrame

log = logging.getLogger("pcmecl_fast")

TOO_SMALL = 80
"""Pixels of the shorter side below which no detector finds a face: such a picture is a face already."""
COMPARED = 960
"""Pixels across that each side of a comparison has at most."""

_LOOKING = 0.25
"""The part of the whole work that the first reading is, for the progress bar."""
_VP9 = 8
"""What VP9's quality is numbered higher than x264's, for about the same."""

Advance = Callable[[float], Any]


class Clock(Counter[str]):
    """Seconds spent, by part of the work."""

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self[part] += time.perf_counter() - begin  # type: ignore[assignment]


class NoFaceError(ValueError):
    """There is no face where one was looked for."""


@dataclass
class FaceFinder:
    """Finds the faces to edit.

    Attributes:
        crop: "faces"; "centre", the centred square; "auto", that square only of what no detector can find a face in.
        choice: of several people, whose face.
        detector: a name; loaded when it is needed first.
        every: frames between two looks.
        laid: how a face's square is laid, as in the data that the generator was trained on.
        drawn: whether the generator was trained on drawn faces, which detectors do not take for faces.
    """

    crop: str = "auto"
    choice: Choice = "largest"
    detector: str = "dlib"
    every: int = 5
    laid: Crop = field(default_factory=Crop)
    drawn: bool = False
    _loaded: Detector | None = field(default=None, repr=False)
    _said: set[str] = field(default_factory=set, repr=False)

    def tracker(self, path: Path, width: int, height: int, rate: Fraction | int = 25) -> Tracker | None:
        """What follows faces through a file's pictures; None where its centred square is to be edited.

        Raises:
            ImportError: the detector is not installed, and the file is not framed already.
        """
        if self.crop == "centre":
            return None
        if self.crop == "auto" and min(width, height) < TOO_SMALL:
            self._say_once(
                "small", f"{path} has below {TOO_SMALL} pixels, too few to find a face: its centre is edited"
            )
            return None
        try:
            self._loaded = self._loaded or load_detector(self.detector)
        except ImportError as error:
            if self.crop == "auto" and (self.drawn or width == height):
                self._say_once("none", f"{path} is taken for a face as it is, for none can be looked for: {error}")
                return None
            raise ImportError(f"{error}; --crop centre edits the centred square") from error
        return Tracker(self._loaded, self.laid, every=self.every, rate=rate)

    def tracks(self, path: Path, tracker: Tracker, frames: int, width: int, height: int) -> list[Track]:
        """The tracks to edit.

        Raises:
            NoFaceError: there are none; the message names the file and the way out.
        """
        tracks = choose_tracks(tracker.tracks(frames), self.choice)
        if tracks:
            return tracks
        if self.crop == "auto" and self.drawn:
            self._say_once("drawn", f"no face is found in {path}, as in drawn ones: the centred square is edited")
            return [centre_track(width, height)]
        where = f"any of its {frames} frames" if frames > 1 else "it"
        raise NoFaceError(f"{path}: no face is found in {where}; --crop centre edits the centred square")

    def _say_once(self, reason: str, what: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            log.info(what)


@dataclass
class MediaEditor:
    """Edits files.

    Attributes:
        editor: of the faces in them.
        finder: of these faces.
        smooth: seconds over which edits of a video are averaged.
        crf: quality, as x264 counts it.
        clock: seconds spent, by part.
    """

    editor: FaceEditor
    finder: FaceFinder
    smooth: float = 0.2
    crf: float = 16
    clock: Clock = field(default_factory=Clock)

    def picture(self, source: Path, output: Path, compare: Path | None = None) -> None:
        """Edit a picture: upright, at its size, with its transparency and its colour profile.

        Raises:
            ValueError: it is damaged, or no face is found in it.
            OSError: the disk is full, or the folder cannot be written.
        """
        with self.clock("decode"):
            image, alpha, kept = read_picture(source)
        before = np.array(image)
        canvas = PictureCanvas(before.copy())
        tracker = self.finder.tracker(source, image.width, image.height)
        tracks = [centre_track(image.width, image.height)]
        if tracker is not None:
            with self.clock("detect"):
                tracker.look(0, before)
            tracks = self.finder.tracks(source, tracker, 1, image.width, image.height)
        with self.clock("edit"):
            for planned in [self.editor.plan(canvas, track.square(0), 0.0) for track in tracks]:
                self.editor.carry_out(canvas, planned)
        with self.clock("encode"):
            edited = Image.fromarray(canvas.pixels)
            if alpha is not None:
                edited.putalpha(alpha)
            write_picture(output, edited, **kept)
            if compare is not None:
                write_picture(compare, _side_by_side(before, canvas.pixels))

    def video(self, source: Path, output: Path, compare: Path | None = None, advance: Advance = lambda by: None) -> int:
        """Edit a video: its size, times, colours and rotation stay, and its sound is copied packet by packet.

        Args:
            source: the video.
            output: where its edit goes, the suffix naming the container.
            compare: where source and edit go side by side, if anywhere.
            advance: is told how many frames' work has been done since the last call.

        Returns:
            The number of frames.

        Raises:
            ValueError: it is damaged, or no face is found in it.
            OSError: the disk is full, or the folder cannot be written.
        """
        tracks, looked = self._look(source, advance)
        count, edited = 0, False
        with open_video(source) as reader, contextlib.ExitStack() as stack:
            encoder = encoder_for(output, self.crf)
            pixels = closest_layout(reader.first, even=encoder.codec == "libx264")
            write, write_both = self._outputs(stack, reader, output, compare, encoder, pixels)
            for (frame, canvas), plans in calmed(self._planned(reader, tracks, pixels), self.smooth):
                with self.clock("edit"):
                    for planned in plans.values():
                        self.editor.carry_out(canvas, planned)
                        edited = edited or planned.plan is not None
                with self.clock("encode"):
                    if write_both is not None:
                        write_both(_joined(frame, canvas.raw), frame.pts)
                    write(canvas.raw, frame.pts)
                count += 1
                advance(1 - _LOOKING if looked else 1)
        if not edited and self.editor.strength:
            log.warning("%s: nothing in it is edited: it ends before the first time in --at", source)
        return count

    def _look(self, source: Path, advance: Advance) -> tuple[list[Track], bool]:
        """The tracks of a video's faces, and whether it was read for them."""
        with open_video(source) as reader:
            width, height = reader.width, reader.height
            tracker = self.finder.tracker(source, width, height, reader.rate)
            if tracker is None:
                return [centre_track(width, height)], False
            frames = 0
            for frame in self._timed(reader):
                if tracker.wants(frame.number):
                    with self.clock("detect"):
                        tracker.look(frame.number, frame.rgb(quick=True))
                frames += 1
                advance(_LOOKING)
            tracks = self.finder.tracks(source, tracker, frames, width, height)
        missing = [] if len(tracks) > 1 else [f"{first}–{last}" for first, last in tracks[0].missing]
        if missing and tracks[0].found < 1:
            log.info(
                "%s: the face is not seen in frames %s", source, ", ".join(missing[:5]) + " …" * (len(missing) > 5)
            )
        return tracks, True

    def _planned(
        self, reader: VideoReader, tracks: list[Track], pixels: str
    ) -> Iterator[tuple[float, tuple[Frame, FrameCanvas], Plans]]:
        begin: Fraction | None = None
        for frame in self._timed(reader):
            begin = frame.time if begin is None else begin
            with self.clock("edit"):
                canvas = FrameCanvas(changeable(frame.raw, pixels), frame.rotation)
                seconds = float(frame.time - begin)
                plans: Plans = {
                    number: self.editor.plan(canvas, track.square(frame.number), seconds)
                    for number, track in enumerate(tracks)
                    if _is_present(track, frame.number, self.finder.every)
                }
            yield seconds, (frame, canvas), plans

    def _outputs(
        self,
        stack: contextlib.ExitStack,
        reader: VideoReader,
        output: Path,
        compare: Path | None,
        encoder: Encoder,
        pixels: str,
    ) -> tuple[Callable[[VideoFrame, int], None], Callable[[VideoFrame, int], None] | None]:
        """What writes the edited frames, and what the comparisons, if anything: files that end with the stack."""
        first = reader.first
        if pixels != first.format.name.replace("yuvj", "yuv"):
            log.info("%s: its pixels are %s, which become %s", reader.path, first.format.name, pixels)
        full = True if colours_of(first).full else {1: False}.get(int(first.color_range))
        context = reader.stream.codec_context
        look = Look(
            first.width, first.height, pixels, int(first.colorspace), full, int(context.color_primaries),
            int(context.color_trc), reader.stream.sample_aspect_ratio, reader.display,
        )  # fmt: skip
        if encoder.codec != "libx264" and look.aspect not in (None, 1):
            log.info(
                "%s: WebM takes its pixels, of shape %s, for square ones; --format mkv keeps them",
                reader.path,
                look.aspect,
            )
        clock: dict[str, Any] = {"time_base": reader.time_base, "rate": reader.rate, "sound": reader.path}
        write = stack.enter_context(writing_video(output, look, encoder, **clock))
        if compare is None:
            return write, None
        width, height = _compared_size(reader.width, reader.height)
        both = Look(2 * width, height, "yuv420p", int(first.colorspace), full)
        return write, stack.enter_context(writing_video(compare, both, encoder_for(compare, self.crf + 4), **clock))

    def _timed(self, reader: VideoReader) -> Iterator[Frame]:
        frames = iter(reader)
        while True:
            with self.clock("decode"):
                frame = next(frames, None)
            if frame is None:
                return
            yield frame


def encoder_for(path: Path, crf: float) -> Encoder:
    """How a video is compressed that goes into the container which a path's suffix names."""
    if path.suffix.lower() == ".webm":
        options = {
            "crf": f"{min(crf + _VP9, 63):.0f}",
            "b:v": "0",
            "deadline": "realtime",
            "cpu-used": "6",
            "row-mt": "1",
        }
        return Encoder("libvpx-vp9", options)
    return Encoder("libx264", {"preset": "veryfast", "crf": f"{crf:g}"})


def read_picture(path: Path) -> tuple[Image.Image, Image.Image | None, dict[str, Any]]:
    """A picture upright in RGB, its transparency if it has any, and what is to be written with its edit.

    Raises:
        ValueError: it is damaged; the message names it.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            kept = {"icc_profile": file.info.get("icc_profile"), "exif": image.getexif().tobytes() or None}
            if image.mode.startswith("I"):  # 16 bits
                image = Image.fromarray((np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype(np.uint8))
            see_through = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
            alpha = image.convert("RGBA").getchannel("A") if see_through else None
            if image.mode == "CMYK":
                del kept["icc_profile"]  # of other colours than those written
            rgb = image.convert("RGB")
    # A damaged header can make decoders raise anything: OSError, SyntaxError, struct.error, …
    except Exception as error:
        raise ValueError(f"{path} ({error})") from error
    return rgb, alpha, {name: value for name, value in kept.items() if value}


def write_picture(path: Path, image: Image.Image, **kept: Any) -> None:
    """A picture in the format that its suffix names, whole or not at all."""
    buffer = io.BytesIO()
    name = {".jpg": "JPEG", ".jpeg": "JPEG"}.get(path.suffix.lower(), path.suffix[1:].upper())
    if name == "JPEG":
        image, kept = image.convert("RGB"), {"subsampling": 0, **kept}
    image.save(buffer, name, quality=95, **kept)
    write_atomically(path, buffer.getvalue())


def _is_present(track: Track, number: int, every: int) -> bool:
    """Whether a frame lies between the first and the last in which a face was found, or next to them."""
    if not track.found:  # looked for nowhere: the centred square
        return True
    return track.at[0] - every // 2 <= number < track.at[-1] + every


def _compared_size(width: int, height: int) -> tuple[int, int]:
    scale = min(1.0, COMPARED / width)
    return 2 * round(width * scale / 2), 2 * round(height * scale / 2)


def _joined(frame: Frame, edited: VideoFrame) -> VideoFrame:
    """Source and edit side by side, upright, with their names."""
    import av

    upright = frame.rotation // 90
    size = _compared_size(
        *((frame.raw.height, frame.raw.width) if upright % 2 else (frame.raw.width, frame.raw.height))
    )
    joined = av.VideoFrame(2 * size[0], size[1], "yuv420p")
    stored = size[::-1] if upright % 2 else size
    halves = [
        one.reformat(*stored, format="yuv420p", threads=1)
        for one in (changeable(frame.raw, edited.format.name), edited)
    ]
    for both, *each in zip(planes(joined), *map(planes, halves), strict=True):
        both[:] = np.concatenate([np.rot90(plane, upright) for plane in each], axis=1)
    for left, text in ((0, "source"), (size[0], "edited")):
        label = _label(text)[: size[1]]
        grey = np.full_like(label[::2, ::2], 128)
        for plane, part, step in zip(planes(joined), (label, grey, grey), (1, 2, 2), strict=True):
            corner = plane[: part.shape[0], left // step : (left + size[0]) // step][:, : part.shape[1]]
            corner[:] = part[:, : corner.shape[1]]
    return joined


def _side_by_side(source: np.ndarray, edited: np.ndarray) -> Image.Image:
    both = np.concatenate([source, edited], axis=1)
    for left, text in ((0, "source"), (source.shape[1], "edited")):
        label = _label(text)[: len(source), : source.shape[1]]
        both[: label.shape[0], left : left + label.shape[1]] = label[:, :, None]
    return Image.fromarray(both)


def _label(text: str) -> np.ndarray:  # (h, w) uint8, even
    """Light letters on a dark ground."""
    font = ImageFont.load_default(20)
    image = Image.new("L", (2 * round(font.getlength(text) / 2) + 16, 32), 24)
    ImageDraw.Draw(image).text((8, 24), text, fill=235, font=font, anchor="ls")
    return np.array(image)
