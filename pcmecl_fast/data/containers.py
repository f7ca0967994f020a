"""Files of video and sound opened so that whatever is wrong with them is said in one line with their name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer

CUT_SHORT = "cut short, or damaged"


@contextlib.contextmanager
def open_container(path: str | Path, *, quickly: bool = False) -> Iterator[InputContainer]:
    """A file of video or sound, open to be read.

    Args:
        path: the file.
        quickly: decode nothing to see what it holds, which takes most of the time: for files whose header says it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is empty, or nothing that FFmpeg knows.
        ImportError: PyAV is not installed.
    """
    import av

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    with naming(path):
        _check_end(path)
        # Of the first stream alone, and for the look at the file alone: what is read later is decoded as ever.
        look = [{"skip_frame": "all"}] if quickly else None
        container = av.open(str(path), metadata_errors="replace", stream_options=look)  # type: ignore[arg-type]
    with container:
        yield container


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Whatever a damaged file makes its readers raise becomes a ValueError that names the file."""
    import av

    try:
        yield
    except (av.FFmpegError, ValueError, ArithmeticError, LookupError, UnicodeError) as error:
        # Nested uses, and errors of another file, have named theirs.
        if isinstance(error, NamedFileError):
            raise
        why = getattr(error, "strerror", None) or error
        if isinstance(error, av.InvalidDataError | EOFError):
            why = f"{CUT_SHORT}: {why}"
        raise NamedFileError(f"{path} ({why})") from error


class NamedFileError(ValueError):
    """What is wrong with a file, in words that name it."""


def check_packet(packet: Packet) -> None:
    """ValueError for a packet that its file does not hold whole: decoders take what there is of it without a word."""
    if packet.is_corrupt:
        raise ValueError(CUT_SHORT)


def _check_end(path: Path) -> None:
    """ValueError for a Matroska or WebM file that is shorter than it says: FFmpeg reads what there is of it.

    Such a file is a small header and one segment, each an identifier, a length in one to eight bytes whose leading
    zeros count them, and so many bytes; recordings that were not ended properly leave the length at "unknown".
    """
    with open(path, "rb") as file:
        for identifier in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
            if file.read(4) != identifier:
                return
            first = file.read(1)
            width = 9 - first[0].bit_length() if first else 9
            if width == 9:
                return
            length = int.from_bytes(first + file.read(width - 1), "big") & (2 ** (7 * width) - 1)
            if length == 2 ** (7 * width) - 1:
                return
            if file.tell() + length > path.stat().st_size:
                raise ValueError(CUT_SHORT)
            file.seek(length, 1)
