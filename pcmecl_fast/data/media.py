"""Reading and writing pictures and videos, one square face per frame."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pcmecl_fast.data.layouts.base import PICTURES as IMAGES
from pcmecl_fast.data.layouts.base import VIDEOS
from pcmecl_fast.files import write_atomically
from pcmecl_fast.wording import name_some

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer


def read_frames(path: Path, size: int) -> tuple[Fraction | None, Tensor]:
    """All frames of a picture or video, centre-cropped to squares: (frame rate or None, (T, 3, S, S) in [-1, 1]).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is neither a picture nor a video, or it is broken.
        ImportError: the file is a video and PyAV is not installed.
    """
    check_media(path)
    frames = [torch.from_numpy(pixels) for _, pixels in decode(path, size, range(2**62))]
    return _rate(path), torch.stack(frames).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def check_media(path: Path) -> None:
    """Refuse what is seen to be no picture or video before anything is decoded, with the errors of `read_frames`."""
    if not path.is_file():
        raise FileNotFoundError(f"input: there is no file {path}")
    if not is_media(path):
        raise ValueError(f"input: {path} is not a picture or video; takes {', '.join(sorted(IMAGES | VIDEOS))}")
    if path.stat().st_size == 0:
        raise ValueError(f"input: {path} is empty")
    need_av([path])


def write_frames(
    path: Path,
    frames: Tensor,  # (T, 3, H, W) in [-1, 1]
    rate: Fraction | None,
) -> None:
    """Write a picture (rate None, T = 1) or a video, in the format given by the suffix."""
    pixels = ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    buffer = io.BytesIO()
    if rate is None:
        picture = {".jpg": "JPEG", ".jpeg": "JPEG"}.get(path.suffix.lower(), path.suffix[1:].upper())
        Image.fromarray(pixels[0]).save(buffer, picture, quality=95)
    else:
        _encode_video(buffer, path, pixels, rate)
    write_atomically(path, buffer.getvalue())


def count_frames(path: Path) -> int:
    """How many frames a file says it has, before any is decoded: 1 for a picture, 0 where it does not say."""
    if not is_video(path):
        return 1
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            seconds = (container.duration or 0) / av.time_base
            return stream.frames or round(seconds * (stream.average_rate or 0))
    except Exception:  # damaged: reading it says how
        return 0


def decode(
    path: Path,
    size: int,
    numbers: Sequence[int],  # ascending: the frames wanted
) -> Iterator[tuple[int, np.ndarray]]:
    """The wanted frames of a file with their numbers, each (S, S, 3) uint8; ValueError names a broken file."""
    try:
        if path.stat().st_size == 0:
            raise ValueError("empty file")
        images = _read_video(path, numbers) if is_video(path) else _read_picture(path, size)
        for number, image in images:
            yield number, np.array(_square(image, size))
    # A damaged header can make decoders raise anything: OSError, SyntaxError, struct.error, …
    except Exception as error:
        raise ValueError(f"{path} ({error})") from error


def read_picture(path: Path) -> np.ndarray:  # (H, W, 3) uint8
    """A picture, upright and whole; ValueError names a broken one."""
    try:
        if path.stat().st_size == 0:
            raise ValueError("empty file")
        with Image.open(path) as image:
            return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # as in decode
        raise ValueError(f"{path} ({error})") from error


def check_picture(path: Path) -> None:
    """Decode a picture once, as small as its format allows: ValueError says why one is broken."""
    for _ in decode(path, 1, [0]):
        pass


def _read_picture(path: Path, size: int) -> Iterator[tuple[int, Image.Image]]:
    with Image.open(path) as image:
        # JPEG only: decode at 1/2, 1/4 or 1/8 scale if that still leaves three times the side.
        image.draft(None, (3 * size, 3 * size))
        yield 0, _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits: Pillow's own conversion clips at 255 instead of scaling.
        grey = np.asarray(image).astype(np.int64) // 257
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        # The colours of transparent pixels are arbitrary, and dropping alpha would reveal them.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image.convert("RGB")


def _read_video(path: Path, numbers: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it contains no video")
        number = -1
        for number, frame in enumerate(_video_frames(container)):
            if number in numbers:
                image = frame.to_image()
                # Phones store frames sideways with a counterclockwise angle, which PyAV exposes since version 14.
                angle = getattr(frame, "rotation", 0)
                yield number, image.rotate(angle, expand=True) if angle else image
            if number >= numbers[-1]:
                return
        if number < 0:
            raise ValueError("it contains no frames")


def _video_frames(container: InputContainer) -> Iterator[VideoFrame]:
    for packet in container.demux(container.streams.video[0]):
        # Decoders silently ignore the partial packet at the end of a truncated file.
        if packet.is_corrupt:
            raise ValueError("cut short, or damaged")
        yield from packet.decode()


def square(
    picture: np.ndarray,  # (H, W, 3) uint8
    size: int,
) -> np.ndarray:  # (S, S, 3) uint8
    """The centred square of a picture, resized."""
    if picture.shape[:2] == (size, size):
        return picture
    return np.array(_square(Image.fromarray(picture), size))


def _square(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Cropped first: resize(box=…) would let the filter reach across the crop's border.
    face = image.crop((left, top, left + side, top + side))
    return face.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)


def need_av(files: Sequence[Path]) -> None:
    """Raise ImportError, saying what to install, if there are videos and PyAV is missing."""
    videos = [file.name for file in files if is_video(file)]
    if videos and importlib.util.find_spec("av") is None:
        raise ImportError(
            f"{len(videos)} of {len(files)} files are videos ({name_some(videos, 3)}) and PyAV, which reads them, is "
            'not installed: pip install "pcmecl_fast[video]"'
        )


def is_media(path: Path) -> bool:
    return path.suffix.lower() in IMAGES | VIDEOS and not is_hidden(path)


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def is_hidden(path: Path) -> bool:
    # "__" covers __MACOSX and __pycache__.
    return path.name.startswith((".", "__"))


def _rate(path: Path) -> Fraction | None:
    if not is_video(path):
        return None
    import av

    with av.open(str(path)) as container:
        return container.streams.video[0].average_rate or Fraction(25)


def _encode_video(buffer: io.BytesIO, path: Path, pixels: np.ndarray, rate: Fraction) -> None:
    import av

    suffix = path.suffix.lower()
    container_format = {".mkv": "matroska"}.get(suffix, suffix[1:])
    with av.open(buffer, "w", format=container_format) as container:
        stream = container.add_stream("libvpx-vp9" if suffix == ".webm" else "libx264", rate=rate)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in pixels:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
