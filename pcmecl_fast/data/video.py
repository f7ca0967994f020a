"""Videos as frames with exact times: read upright in order or by number, and prepared clips written.

with open_video("talk.mp4") as reader:
    for frame in reader:
        frame.number, frame.pts, frame.rgb()    # 0, 1, …; in units of reader.time_base; (H, W, 3) uint8
"""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from pcmecl_fast.data.containers import check_packet, naming, open_container
from pcmecl_fast.data.sound import Until, has_sound, sound_into
from pcmecl_fast.files import replacing

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer, OutputContainer
    from av.video.stream import VideoStream

HD_LINES = 720
"""From so many lines on, a video that does not say its colours is taken for BT.709, and below for BT.601."""

# Of ITU-T H.273, as FFmpeg numbers them: the matrix of a frame, and swscale's number for it.
_BT709, _SMPTE170M = 1, 6
_SWSCALE_MATRIX = {_BT709: 1, 4: 4, 5: 5, _SMPTE170M: 5, 7: 7, 9: 9, 10: 9}
_LIMITED, _FULL = 1, 2  # ranges: 16–235 and 0–255

_SOON = 12  # frames: fewer are decoded on to, more are sought


@contextlib.contextmanager
def open_video(path: str | Path, *, threads: int = 0) -> Iterator[VideoReader]:
    """A video to be read frame by frame.

    Args:
        path: the file.
        threads: that decode; 0 leaves their number to FFmpeg.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is empty or no video; in the block, when frames are read: it is cut short or damaged.
    """
    with open_container(path) as container:
        with naming(path):
            reader = VideoReader(Path(path), container, threads)
        yield reader  # outside: what goes wrong in the block may be another file's fault


class VideoReader:
    """What `open_video` gives; iterating it decodes the video once, from its first frame to its last.

    Attributes:
        path: the file.
        width, height: of the upright frames, in pixels.
        rotation: degrees counterclockwise that bring stored frames upright: 0, 90, 180 or 270.
        display: the file's display matrix, 9 integers as FFmpeg has them, which says so; None where there is none.
        rate: frames a second on average; 25 where the file does not say.
        time_base: seconds a unit of `pts`.
        count: the number of frames that the file declares; 0 where it does not.
        stream: PyAV's video stream.
        first: the first frame as it was decoded, which tells of pixels and colours.
    """

    def __init__(self, path: Path, container: InputContainer, threads: int = 0) -> None:
        self.path, self.container = path, container
        self.stream = _stream_of(container)
        context = self.stream.codec_context
        context.thread_type, context.thread_count = "AUTO", threads
        self.rate: Fraction = self.stream.average_rate or self.stream.guessed_rate or Fraction(25)
        self.time_base: Fraction = self.stream.time_base or 1 / self.rate
        self.count: int = self.stream.frames or _count_by_duration(self.stream, container)
        # How frames are turned is known with the first of them.
        self._frames = self._decoded()
        first = next(self._frames, None)
        if first is None:
            raise ValueError("it contains no frames")
        self.first: VideoFrame = first
        self.display = _display_matrix(first)
        self.rotation = _rotation(first)
        self.width, self.height = first.width, first.height
        if self.rotation in (90, 270):
            self.width, self.height = self.height, self.width

    def __iter__(self) -> Iterator[Frame]:
        raw: VideoFrame | None = self.first
        number, last = 0, None
        while raw is not None:
            pts = raw.pts
            if pts is None:  # counted on, as raw streams and some AVI files need
                pts = 0 if last is None else last + max(1, round(1 / (self.rate * self.time_base)))
            yield Frame(number, pts, self.time_base, raw, self.rotation)
            number, last = number + 1, pts
            with naming(self.path):
                raw = next(self._frames, None)

    def _decoded(self) -> Iterator[VideoFrame]:
        """All frames as the decoder gives them, in order of display."""
        packets = 0
        for packet in self.container.demux():
            check_packet(packet)  # of sound, too: it may be where the file was cut
            if packet.stream.index != self.stream.index:  # not stream_index: at the end, that is 0 for every stream
                continue
            packets += packet.size > 0
            yield from packet.decode()  # type: ignore[misc]  # of a video stream
        # FFmpeg ends silently where a file ends between two of the frames that its header lists.
        if packets < self.stream.frames and self.container.format.name.startswith(("mov", "avi")):
            raise ValueError(f"cut short: {packets} of {self.stream.frames} frames are there")


@dataclass(frozen=True)
class Frame:
    """One frame of a video.

    Attributes:
        number: 0, 1, … in order of display.
        pts: when it is shown, in units of `time_base`.
        raw: as it was decoded, not turned.
        rotation: degrees counterclockwise that bring it upright.
    """

    number: int
    pts: int
    time_base: Fraction
    raw: VideoFrame
    rotation: int = 0

    @property
    def time(self) -> Fraction:
        """When it is shown, in seconds on the file's clock."""
        return self.pts * self.time_base

    def rgb(self, *, quick: bool = False) -> np.ndarray:  # (H, W, 3) uint8
        """Upright colours by the matrix and range of the stream.

        Args:
            quick: twenty times as fast and up to three levels off, darker: for detectors, not for training.
        """
        return _upright(self.raw, quick=quick)


class Colours(NamedTuple):
    """How a frame's planes are meant: FFmpeg's numbers of its matrix, and whether they use the whole range."""

    matrix: int
    full: bool


def colours_of(raw: VideoFrame) -> Colours:
    """What a frame says of its colours, and where it does not, what its size and format suggest."""
    matrix = int(raw.colorspace)
    if matrix not in _SWSCALE_MATRIX:
        matrix = _BT709 if min(raw.width, raw.height) >= HD_LINES else _SMPTE170M
    return Colours(matrix, int(raw.color_range) == _FULL or raw.format.name.startswith("yuvj"))


def declared_frames(path: str | Path) -> int:
    """How many frames a video says it has, before any is decoded; 0 where it does not say, or cannot be read."""
    try:
        with open_container(path) as container:
            stream = _stream_of(container)
            return stream.frames or _count_by_duration(stream, container)
    except (OSError, ValueError):  # damaged: reading it says how
        return 0


def scan(path: str | Path) -> np.ndarray:  # (T,) int64
    """The times of all frames in order, in the stream's `time_base`; the whole video is decoded for it.

    Raises:
        FileNotFoundError, ValueError: as `open_video`.
    """
    with open_video(path) as reader:
        return np.array([frame.pts for frame in reader], dtype=np.int64)


def read_at(
    path: str | Path,
    numbers: Sequence[int],
    pts: Sequence[int] | np.ndarray,  # (T,) ascending: of all frames, as `scan` gives them
) -> list[np.ndarray]:  # each (H, W, 3) uint8, in the order of `numbers`
    """Frames by number, each decoded from the keyframe before it: one costs at most a group of pictures.

    Raises:
        FileNotFoundError, ValueError: as `open_video`; also where the file has no such frame.
    """
    found: dict[int, np.ndarray] = {}
    with open_container(path, quickly=True) as container, naming(path):
        stream = _stream_of(container)
        stream.codec_context.thread_count = 1
        wanted = deque(sorted(set(numbers)))
        while wanted:
            first = wanted[0]
            for raw in _frames_from(container, stream, int(pts[first])):
                if raw.pts == pts[wanted[0]]:
                    found[wanted.popleft()] = _upright(raw)
                # What follows soon is decoded on, and what is far is sought again.
                if not wanted or wanted[0] - first > _SOON or raw.pts is None or raw.pts > pts[wanted[0]]:
                    break
            if wanted and wanted[0] == first:
                break
    if wanted:  # no seeking in such a file, or times that it does not have
        found |= _read_through(path, set(wanted))
    return [found[number] for number in numbers]


def _read_through(path: str | Path, wanted: set[int]) -> dict[int, np.ndarray]:
    with open_video(path) as reader, naming(path):
        found = {frame.number: frame.rgb() for frame in reader if frame.number in wanted}
        if missing := wanted - found.keys():
            raise ValueError(f"it has no frame {min(missing)}")
    return found


@dataclass(frozen=True)
class Encoder:
    """How frames are compressed.

    Attributes:
        codec: FFmpeg's name.
        options: of the codec.
        threads: 0 leaves their number to the codec; 1 makes bytes that depend on nothing else.
        reproducible: nothing of the file names versions or times.
    """

    codec: str = "libx264"
    options: dict[str, str] = field(default_factory=dict)
    threads: int = 0
    reproducible: bool = False


@dataclass(frozen=True)
class Look:
    """What a file says of its pictures, beside them.

    Attributes:
        width, height: as stored, in pixels.
        pixels: FFmpeg's name of the format, such as "yuv420p".
        matrix, full, primaries, transfer: the colours, by FFmpeg's numbers; 2 is unknown.
        aspect: of a pixel, its width by its height.
        display: the display matrix, if any.
    """

    width: int
    height: int
    pixels: str = "yuv420p"
    matrix: int = _BT709
    full: bool | None = False
    primaries: int = 2
    transfer: int = 2
    aspect: Fraction | None = None
    display: tuple[int, ...] | None = None


@contextlib.contextmanager
def writing_video(
    path: str | Path,
    look: Look,
    encoder: Encoder,
    *,
    time_base: Fraction,
    rate: Fraction,
    sound: str | Path | None = None,
    compress: bool = False,
) -> Iterator[Callable[[VideoFrame, int], None]]:
    """A video file that is whole or absent: it has its name when the block ends without an error.

    Args:
        path: of the file, its suffix naming the container.
        look: what it says of its pictures.
        encoder: how they are compressed.
        time_base: seconds a unit of the frames' times.
        rate: frames a second, a hint for players.
        sound: a file whose sound is taken along, on the same clock as the pictures.
        compress: uncompressed sound becomes AAC.

    Yields:
        A function that takes a frame and its time.

    Raises:
        ValueError: the file with the sound is damaged.
        OSError: the disk is full, or the folder cannot be written; the message names the file.
    """
    import av

    path = Path(path)
    with replacing(path) as file, _naming_output(path), contextlib.ExitStack() as stack:
        options = {"movflags": "+faststart"} if path.suffix.lower() in (".mp4", ".mov", ".m4v") else {}
        if encoder.reproducible:
            options["fflags"] = "+bitexact"
        output = stack.enter_context(av.open(file.name, "w", format=container_format(path), options=options))
        stream = _video_stream(output, look, encoder, time_base, rate)
        until: Until = lambda time: None  # noqa: E731
        if sound is not None:
            until = stack.enter_context(sound_into(output, sound, most=1 if compress else None, compress=compress))
        last: int | None = None

        def write(raw: VideoFrame, pts: int) -> None:
            nonlocal last
            # Encoders refuse two frames at one time, which some files have.
            raw.pts = last = pts if last is None else max(pts, last + 1)
            raw.time_base = time_base
            raw.pict_type = 0
            for packet in stream.encode(raw):
                output.mux(packet)
            until(last * time_base)

        yield write
        if last is None:
            raise ValueError(f"{path} would have no frames")
        output.mux(stream.encode(None))
        until(None)


@contextlib.contextmanager
def _naming_output(path: Path) -> Iterator[None]:
    """What FFmpeg says of the file that it writes, as Python says it, with the file's name."""
    import av

    try:
        yield
    except av.FFmpegError as error:
        if 0 < (error.errno or 0) < 256:  # the system's: a full disk
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise ValueError(f"{path} cannot be written ({error.strerror or error})") from error


def container_format(path: Path) -> str:
    """FFmpeg's name of the container that a file's suffix stands for."""
    suffix = path.suffix.lower()[1:]
    return {"mkv": "matroska", "m4v": "mp4"}.get(suffix, suffix)


def write_clip(
    path: str | Path,
    frames: Iterable[tuple[int, np.ndarray]],  # (pts, (S, S, 3) uint8 RGB), pts ascending
    *,
    time_base: Fraction,
    rate: Fraction | None = None,
    sound: str | Path | None = None,
    crf: float = 14,
    group: int = 8,
) -> None:
    """A prepared clip as MP4: the same frames and sound make the same bytes.

    H.264 in 4:2:0 with BT.709's matrix and limited range, which it says; closed groups of `group` pictures, none of
    which looks ahead, so that `read_at` decodes few to reach any. Sound is copied packet by packet; where it is
    uncompressed or MP4 cannot hold it, it becomes AAC.

    Args:
        path: of the clip, ending in .mp4.
        frames: with their times in units of `time_base`; all of one size, even in both directions.
        time_base: seconds a unit of time.
        rate: frames a second, for players; by default one frame a unit of time.
        sound: a file whose sound is taken along, on the same clock as the frames: neither is shifted.
        crf: x264's quality: lower is better and larger.
        group: pictures a group.

    Raises:
        ValueError: there are no frames, or the file with the sound is damaged or has none.
        OSError: as `writing_video`.
    """
    if sound is not None and not has_sound(sound):
        raise ValueError(f"{sound} has no sound")
    pairs = iter(frames)
    first = next(pairs, None)
    if first is None:
        raise ValueError(f"{path} would have no frames")
    height, width = first[1].shape[:2]
    # Without what takes half of the time to decode, and at such a quality no more bytes.
    options = {
        "preset": "medium",
        "tune": "fastdecode",
        "crf": f"{crf:g}",
        "g": str(group),
        "keyint_min": str(group),
        "bf": "0",
    }
    options |= {"sc_threshold": "0", "x264-params": "scenecut=0:open-gop=0"}
    encoder = Encoder("libx264", options, threads=1, reproducible=True)
    look = Look(width, height, primaries=1, transfer=1)
    clock = {"time_base": time_base, "rate": rate or 1 / time_base}
    with writing_video(path, look, encoder, sound=sound, compress=True, **clock) as write:
        for pts, pixels in itertools.chain([first], pairs):
            write(from_rgb(pixels), pts)


def from_rgb(pixels: np.ndarray) -> VideoFrame:  # (H, W, 3) uint8, contiguous or not
    """A picture as a 4:2:0 frame of BT.709 in limited range."""
    import av
    from av.video.reformatter import ColorRange, Colorspace

    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    return frame.reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG, interpolation=_exactly(),
    )  # fmt: skip


def _upright(raw: VideoFrame, *, quick: bool = False) -> np.ndarray:  # (H, W, 3) uint8
    return np.ascontiguousarray(np.rot90(_to_rgb(raw, quick=quick), _rotation(raw) // 90))


def _to_rgb(raw: VideoFrame, *, quick: bool = False) -> np.ndarray:  # (H, W, 3) uint8
    from av.video.reformatter import ColorRange, Interpolation

    matrix, full = colours_of(raw)
    if raw.format.is_rgb:
        return raw.to_ndarray(format="rgb24")
    frame = raw.reformat(
        format="rgb24", src_colorspace=_SWSCALE_MATRIX[matrix],
        src_color_range=ColorRange.JPEG if full else ColorRange.MPEG, dst_color_range=ColorRange.JPEG,
        interpolation=Interpolation.BILINEAR if quick else _exactly(), threads=1,
    )  # fmt: skip
    return frame.to_ndarray()


def _exactly() -> int:
    """swscale's slow way, bilinear, rounded and in full chroma: without its quick one's mean error, which is darker."""
    bilinear, full_chroma_out, full_chroma_in, accurate, bit_exact = 2, 1 << 13, 1 << 14, 1 << 18, 1 << 19
    return bilinear | full_chroma_out | full_chroma_in | accurate | bit_exact  # PyAV has no names of them before 18


def _video_stream(
    output: OutputContainer, look: Look, encoder: Encoder, time_base: Fraction, rate: Fraction
) -> VideoStream:
    options = encoder.options | {"flags": "+frame_duration" + "+bitexact" * encoder.reproducible}
    stream = cast("VideoStream", output.add_stream(encoder.codec, rate=rate, options=options))
    context = stream.codec_context
    stream.width, stream.height, stream.pix_fmt = look.width, look.height, look.pixels
    stream.time_base = context.time_base = time_base
    context.thread_count = encoder.threads
    context.colorspace, context.color_primaries, context.color_trc = look.matrix, look.primaries, look.transfer
    context.color_range = 0 if look.full is None else _FULL if look.full else _LIMITED
    if look.aspect:
        context.sample_aspect_ratio = look.aspect
    if look.display is not None:
        stream.set_display_matrix(look.display)
    return stream


def _stream_of(container: InputContainer) -> VideoStream:
    from av.stream import Disposition

    # The cover of a sound file is no video.
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise ValueError("it contains no video")
    if streams[0].codec_context is None:
        raise ValueError("the kind of its video is not known to FFmpeg, or it is damaged")
    return streams[0]


def _frames_from(container: InputContainer, stream: VideoStream, pts: int) -> Iterator[VideoFrame]:
    """Frames from the keyframe before a time on; none where that cannot be reached."""
    container.seek(pts, stream=stream, backward=True)
    packets = container.demux(stream)
    first = next(packets, None)
    # Pictures shown before the keyframe that they are stored behind would lack those that they refer to.
    if first is None or not first.is_keyframe or first.pts is None or first.pts > pts:
        return
    for packet in itertools.chain([first], packets):
        check_packet(packet)
        yield from packet.decode()


def _count_by_duration(stream: VideoStream, container: InputContainer) -> int:
    if stream.duration and stream.time_base:
        seconds = stream.duration * stream.time_base
    else:
        seconds = Fraction(container.duration or 0, 1_000_000)  # AV_TIME_BASE
    return round(seconds * (stream.average_rate or 0))


def _rotation(raw: VideoFrame) -> int:
    return round((raw.rotation or 0) / 90) % 4 * 90


def _display_matrix(raw: VideoFrame) -> tuple[int, ...] | None:
    from av.sidedata.sidedata import Type

    matrix = cast(Any, raw.side_data).get(Type.DISPLAYMATRIX)
    return None if matrix is None else struct.unpack("=9i", bytes(matrix)[:36])
