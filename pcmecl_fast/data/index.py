"""The index of a folder of faces: what is in each of its files, so that a million frames open without one decoded.

`<folder>/index.jsonl` is text. Its first line says what the folder is:

    {"pcmecl_fast": "index", "version": 1, "prepared": {…} or null}

`prepared` holds the options of `pcmecl-fast prepare`, which made the folder, or null where the folder is somebody's own
and the index only remembers what was seen in it. Every other line is one `Entry`. Lines are appended as clips are
finished, so that a process may be killed at any moment: a last line without its end is not read. A folder that was
prepared in shares holds an index of each instead: data/shares.py.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pcmecl_fast.data.emotions import KNOWN_EMOTIONS
from pcmecl_fast.data.layouts.base import natural
from pcmecl_fast.files import naming_damage, replacing, write_atomically

INDEX = "index.jsonl"
Form = Literal["", "video", "picture", "pictures"]
_VERSION = 1


@dataclass
class Entry:
    """One file, or one folder of numbered pictures, and what is in it.

    Attributes:
        file: its path in the folder, with "/": `<individual>/<emotion>/<name>`.
        frames: how many frames it holds.
        form: "video"; "picture"; or "pictures", a folder of PNGs numbered from 000000.
        bytes, mtime: its size, and its time stamp in ns, when it was indexed; 0 for a folder of pictures.
        pts: the time stamps of a video's frames in units of its time base, as they are presented; one that begins at
            `first` and advances by `step` is written as {"first": 0, "step": 512}. None for pictures.
        rate: frames a second, as "30" or "30000/1001".
        broken: why the file cannot be read; empty where it can.
        checksum: of the file's content, where `prepare` wrote it: "" elsewhere.
        source: the recording that it was prepared from, in the raw data set's folder.
        stamp: of that recording: another one means that it has changed since.
        level, view, sentence, repetition, number: what the data set's names say of the clip.
        found: the part of the frames looked at in which the face was found.
        track: where the face was, `faces.Track` as JSON.
    """

    file: str
    individual: str
    emotion: str
    frames: int
    form: Form = ""
    bytes: int = 0
    mtime: int = 0
    pts: dict[str, int] | list[int] | None = None
    rate: str | None = None
    broken: str = ""
    checksum: str = ""
    source: str = ""
    stamp: str = ""
    level: str | None = None
    view: str | None = None
    sentence: str | None = None
    repetition: str | None = None
    number: int | None = None
    found: float | None = None
    track: Any = field(default=None, repr=False)

    def line(self) -> str:
        """The entry as one line of JSON, without what is not known."""
        known = {f.name: value for f in _FIELDS if (value := getattr(self, f.name)) != f.default}
        return json.dumps(known, separators=(",", ":"), ensure_ascii=False) + "\n"


_FIELDS = fields(Entry)
_NAMES = {f.name for f in _FIELDS}


def packed_pts(pts: Sequence[int]) -> dict[str, int] | list[int]:
    """Time stamps as `Entry.pts` keeps them: the first and the step where all steps are alike."""
    steps = {b - a for a, b in itertools.pairwise(pts)}
    return {"first": pts[0], "step": next(iter(steps), 1)} if len(steps) <= 1 else list(pts)


def unpacked_pts(pts: dict[str, int] | list[int], frames: int) -> Sequence[int]:
    """All time stamps of what `packed_pts` made."""
    if isinstance(pts, dict):
        return range(pts["first"], pts["first"] + frames * pts["step"], pts["step"])
    return pts


def in_order(entry: Entry) -> Any:
    """Sort key: individuals and files in natural order (2 before 10), emotions as in `KNOWN_EMOTIONS`."""
    rank = KNOWN_EMOTIONS.index(entry.emotion) if entry.emotion in KNOWN_EMOTIONS else len(KNOWN_EMOTIONS)
    return natural(entry.individual), rank, natural(entry.file)


def write_index(path: Path, entries: Iterable[Entry], prepared: dict[str, Any] | None) -> None:
    """Write a whole index, in place of an old one."""
    write_atomically(path, (_head(prepared) + "".join(entry.line() for entry in entries)).encode(*_CODEC))


class IndexWriter:
    """Appends entries to an index; whatever was appended is whole, also after a kill or on a full disk.

    Args:
        path: the index; made if it is missing. Where its last line was cut, that line goes first.
        prepared: the head's, for a new index.
    """

    def __init__(self, path: Path, prepared: dict[str, Any] | None) -> None:
        self.path = path
        if not path.exists():
            write_index(path, [], prepared)
        whole = _whole_length(path)
        if whole < path.stat().st_size:
            os.truncate(path, whole)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def append(self, entry: Entry) -> None:
        line = entry.line().encode(*_CODEC)
        before = self._file.tell()
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(28, "No space left on device")
        except OSError as error:
            os.truncate(self.path, before)
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        self._file.close()


def rewrite_index(
    path: Path,
    prepared: dict[str, Any],
    *,
    keep: Callable[[Entry], bool] = lambda entry: True,
    order: Callable[[Entry], Any] | None = None,
) -> list[Entry]:
    """Write an index again: only the entries that are kept, and in order. Returns them, without their tracks."""
    kept: list[tuple[Entry, str]] = []
    for number, line in enumerate(itertools.islice(_lines(path), 1, None), 2):
        entry = _entry(path, number, line)
        entry.track = None  # by far the largest part; its text is kept
        if keep(entry):
            kept.append((entry, line))
    if order is not None:
        kept.sort(key=lambda pair: order(pair[0]))
    with replacing(path) as file:
        file.write(_head(prepared).encode(*_CODEC))
        file.writelines(line.encode(*_CODEC) for _, line in kept)
    return [entry for entry, _ in kept]


def mark_finished(path: Path) -> None:
    """Say in an index's first line that all of it has been prepared."""
    with open(path, "rb") as old, replacing(path) as file:
        head = json.loads(old.readline())
        file.write(_head(head["prepared"] | {"finished": True}).encode(*_CODEC))
        shutil.copyfileobj(old, file)


def read_index(path: Path) -> tuple[dict[str, Any] | None, Iterator[Entry]]:
    """What the folder was prepared with, or None, and its entries one after the other.

    Raises:
        ValueError: the file is no index, or damaged; the entries raise it, too.
    """
    lines = _lines(path)
    with naming_damage(path):
        head = json.loads(next(lines, "null"))
        if not isinstance(head, dict) or head.get("pcmecl_fast") != "index":
            raise ValueError("its first line is not that of an index")
    if head.get("version") != _VERSION:
        raise ValueError(
            f"path: {path} was written by another version of pcmecl_fast: an index of version {head.get('version')}, "
            f"while this one reads {_VERSION}; prepare the faces again, into another folder"
        )
    with naming_damage(path):
        prepared = head["prepared"]
        if not (prepared is None or isinstance(prepared, dict)):
            raise ValueError("its first line says nothing of how it was prepared")
    return prepared, _entries(path, lines)


def _entries(path: Path, lines: Iterator[str]) -> Iterator[Entry]:
    for number, line in enumerate(lines, 2):
        yield _entry(path, number, line)


def _entry(path: Path, number: int, line: str) -> Entry:
    with naming_damage(f"{path}, line {number}"):
        values = json.loads(line)
        entry = Entry(**{name: value for name, value in values.items() if name in _NAMES})
        if not (isinstance(entry.file, str) and isinstance(entry.frames, int) and entry.frames >= 0):
            raise ValueError(f"a file {entry.file!r} of {entry.frames!r} frames")
        # Files are read and removed by what stands here: never outside the folder.
        if {"", ".", ".."} & {*entry.file.split("/")}:
            raise ValueError(f"a file {entry.file!r} that is not in the folder")
    return entry


_CODEC = ("utf-8", "surrogateescape")  # names of files need not be valid UTF-8


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding=_CODEC[0], errors=_CODEC[1], newline="\n") as file:
        for line in file:
            if line.endswith("\n"):
                yield line


def _head(prepared: dict[str, Any] | None) -> str:
    return json.dumps({"pcmecl_fast": "index", "version": _VERSION, "prepared": prepared}) + "\n"


def _whole_length(path: Path) -> int:
    """The length of the lines that have an end."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - 65536)
            file.seek(begin)
            found = file.read(end - begin).rfind(b"\n")
            if found >= 0:
                return begin + found + 1
            end = begin
    return 0
