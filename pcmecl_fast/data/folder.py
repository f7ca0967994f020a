"""Faces from folders of pictures and videos: those that `pcmecl-fast prepare` makes, or any laid out like them."""

from __future__ import annotations

import hashlib
import logging
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pcmecl_fast.data.base import Clips, FrameDataset, Indices, as_frames, as_indices
from pcmecl_fast.data.emotions import KNOWN_EMOTIONS
from pcmecl_fast.data.index import Entry, Form, in_order, unpacked_pts
from pcmecl_fast.data.layout import check_root
from pcmecl_fast.data.media import decode, need_av, square
from pcmecl_fast.data.plain_folder import explain_absent, plain_entries
from pcmecl_fast.data.shares import read_folder
from pcmecl_fast.data.video import read_at
from pcmecl_fast.files import content_hash
from pcmecl_fast.wording import name_some

logger = logging.getLogger(__name__)

LEFT_OUT = "left_out.txt"
"""In a prepared folder: its clips that are not to be used, one a line, as `index.jsonl` names them."""


class FolderFaces(FrameDataset):
    """Pictures and videos laid out as `<root>/<individual>/<emotion>/<file>`, as square frames.

    A folder that `pcmecl-fast prepare` made has an index, and opens without a file being touched: a million frames in
    seconds. What is added by hand is not seen, and what `left_out.txt` names, one clip a line, is not used. Of one that
    was prepared in shares all indices are read as one, and a share that is missing or not finished is told.

    Any other folder is indexed first, in parallel and with a progress bar, by decoding every file once, the only way to
    find truncated ones (but WebM and Matroska files cut between two frames pass for shorter videos); where that takes a
    while, the index stays in the folder as `.index.jsonl`, and only new and changed files are looked at again.

    Individuals may have different numbers of files and lack emotions. Individuals and files are in natural order (2
    before 10), emotions in the order of `KNOWN_EMOTIONS`. Hidden names (a leading "." or "__"), files that are neither
    pictures nor videos, and individuals' folders without any are skipped, the last with a warning.

    A frame is turned upright (EXIF, video rotation), composited onto black if transparent, cropped to the centred
    square and resized with an antialiasing Lanczos filter. Frames are decoded when they are asked for, in videos from
    the last key frame before them: fast in prepared ones, slow in those with seconds between key frames. The first
    frames, up to `cache_bytes`, are kept as uint8 once decoded, in memory that worker processes share.

    Args:
        root: the folder of individuals.
        size: S, a frame's side in pixels.
        emotions: the emotions in order, from `KNOWN_EMOTIONS` or any other names of folders. Folders of known emotions
            that are not among them are left out, which is logged. By default those of `KNOWN_EMOTIONS` with frames.
        reserve: of `emotions`, give one that no folder shows its index all the same, instead of raising.
        skip_broken: skip broken files, with a warning that names them, instead of raising.
        video_stride: k takes frames 0, k, 2k, … of a video.
        cache: keep decoded frames in memory.
        cache_bytes: maximum size of that cache (a frame takes 3·S² bytes).

    Attributes:
        prepared: the options of the `pcmecl-fast prepare` that made the folder; None for any other.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is missing or not a folder.
        ImportError: there are videos and PyAV, which reads them, is not installed.
        ValueError: an argument out of range; a folder that is not a known emotion; an emotion without a folder; files
            at the wrong level; broken files, all in one message; nothing to read; a damaged index. On access, a file
            that has changed since it was indexed (of a folder of pictures, one that is gone or broken).
    """

    def __init__(
        self,
        root: str | Path,
        *,
        size: int,
        emotions: Sequence[str] | None = None,
        reserve: bool = False,
        skip_broken: bool = False,
        video_stride: int = 1,
        cache: bool = True,
        cache_bytes: int = 2**30,
    ) -> None:
        _check_arguments(size, emotions, video_stride, cache_bytes)
        self.root = Path(root)
        self.size, self.stride = size, video_stride
        wanted = KNOWN_EMOTIONS if emotions is None else tuple(emotions)
        check_root(self.root)
        self.prepared: dict[str, Any] | None = None
        index = read_folder(self.root)
        if index is not None:
            self.prepared = index.prepared
            # Of recordings that could not be prepared there are no files; `prepare` has named them.
            whole = _without_left_out(self.root, filter(_is_whole, index.entries))
            entries = _chosen(self.root, whole, wanted, reserve=reserve or emotions is None)
            if index.left:
                logger.warning("%s: %s", self.root, index.left)
            if not index.in_order:
                entries.sort(key=in_order)
        else:
            entries = plain_entries(
                self.root, wanted, explicit=emotions is not None, reserve=reserve or emotions is None
            )
        self._place(_whole(self.root, entries, skip_broken=skip_broken), wanted, every=emotions is not None)
        self._cache = _Cache(min(len(self), cache_bytes // (3 * size * size) if cache else 0), size)

    def _place(self, entries: list[Entry], wanted: tuple[str, ...], *, every: bool) -> None:
        """Give every frame its labels and its file."""
        shown = {entry.emotion for entry in entries}
        self.emotions = [name for name in wanted if every or name in shown]
        emotion = {name: e for e, name in enumerate(self.emotions)}
        names = dict.fromkeys(entry.individual for entry in entries)
        individual = {name: n for n, name in enumerate(names)}
        self.individuals = list(individual)
        entries.sort(key=lambda entry: (individual[entry.individual], emotion[entry.emotion]))  # stable
        self._files = [_File.of(entry) for entry in entries]
        counts = torch.tensor([-(-entry.frames // self.stride) for entry in entries], dtype=torch.int64)
        self._ends = counts.cumsum(0)
        self.individual_index = _spread([individual[entry.individual] for entry in entries], counts)
        self.emotion_index = _spread([emotion[entry.emotion] for entry in entries], counts)
        self._numbers = [entry.number for entry in entries]
        self._rates = [float(Fraction(entry.rate)) / self.stride if entry.rate else None for entry in entries]

    @cached_property
    def keys(self) -> list[str]:  # type: ignore[override]  # made when somebody asks: there may be millions
        return [key for file in self._files for key in file.keys(self.stride)]

    def clips(self) -> Clips:
        counts = self._ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
        names = [file.name for file in self._files]
        return Clips(names, _spread(range(len(names)), counts), self._numbers, self._rates)

    def labels_hash(self) -> str:
        # Of files and not of frames: there may be millions.
        digest = hashlib.blake2b(repr((self.individuals, self.emotions, self.stride)).encode(), digest_size=8)
        for file in self._files:
            digest.update(f"{file.name}\0{file.frames}\0".encode("utf-8", "surrogateescape"))
        digest.update(self.individual_index.numpy().tobytes() + self.emotion_index.numpy().tobytes())
        return digest.hexdigest()

    def frames(self, indices: Indices) -> Tensor:
        return as_frames(self.pixels(indices))

    def pixels(self, indices: Indices) -> Tensor:
        rows = as_indices(indices, len(self))
        pixels = torch.empty(len(rows), self.size, self.size, 3, dtype=torch.uint8)
        missing = self._cache.copy_known(rows, pixels)
        self._decode_into(pixels, rows, missing.tolist())
        self._cache.keep(rows[missing], pixels[missing])
        return pixels

    def stamps(self) -> list[str]:
        # One string for all frames of a file: there may be millions.
        stamps = []
        for file in self._files:
            of_file = f"{file.stamp(self.root)} {self.size}"
            stamps += [of_file] * -(-file.frames // self.stride)
        return stamps

    def _decode_into(
        self,
        pixels: Tensor,  # (B, S, S, 3) uint8, written at slots
        rows: Tensor,  # (B,) int64 frames
        slots: list[int],
    ) -> None:
        # Each file is opened once, however many of its frames are wanted.
        wanted: dict[int, dict[int, list[int]]] = {}
        of_file = torch.searchsorted(self._ends, rows, right=True)
        for slot in slots:
            f = int(of_file[slot])
            begin = int(self._ends[f - 1]) if f else 0
            number = (int(rows[slot]) - begin) * self.stride
            wanted.setdefault(f, {}).setdefault(number, []).append(slot)
        for f, numbers in wanted.items():
            file = self._files[f]
            for number, frame in file.read(self.root, sorted(numbers), self.size):
                pixels[numbers.pop(number)] = torch.from_numpy(frame)
            if numbers:
                raise ValueError(
                    f"{self.root / file.name}: changed since it was indexed, frames {sorted(numbers)} are gone"
                )
            file.check_unchanged(self.root)


@dataclass(slots=True)
class _File:
    """What reading a file takes: of an entry, what fits a million times into memory."""

    name: str
    frames: int
    form: Form
    bytes: int
    mtime: int
    pts: dict[str, int] | list[int] | None
    checksum: str

    @classmethod
    def of(cls, entry: Entry) -> _File:
        return cls(entry.file, entry.frames, entry.form, entry.bytes, entry.mtime, entry.pts, entry.checksum)

    def keys(self, stride: int) -> Iterable[str]:
        if self.form == "picture":
            return (self.name,)
        return (f"{self.name}#{number}" for number in range(0, self.frames, stride))

    def stamp(self, root: Path) -> str:
        return self.checksum or f"{(root / self.name).resolve()} {self.bytes} {self.mtime}"

    def read(self, root: Path, numbers: list[int], size: int) -> Iterator[tuple[int, np.ndarray]]:
        """The frames of these numbers, ascending, each (S, S, 3) uint8."""
        path = root / self.name
        if self.pts is not None:
            for number, frame in zip(numbers, read_at(path, numbers, unpacked_pts(self.pts, self.frames)), strict=True):
                yield number, square(frame, size)
        elif self.form == "picture":
            yield from decode(path, size, numbers)
        else:
            for number in numbers:
                for _, frame in decode(path / f"{number:06d}.png", size, [0]):
                    yield number, frame

    def check_unchanged(self, root: Path) -> None:
        """Refuse a file that is no longer what was indexed; of copies, whose time stamps differ, the content counts."""
        if self.form == "pictures":  # hashing all of them would take longer than what is read of them
            return
        path = root / self.name
        stat = path.stat()
        if (stat.st_size, stat.st_mtime_ns) == (self.bytes, self.mtime):
            return
        if self.checksum and stat.st_size == self.bytes and content_hash(path) == self.checksum:
            self.mtime = stat.st_mtime_ns
            return
        if self.checksum:
            raise ValueError(f"{path}: changed since it was prepared; remove it and prepare the folder again")
        raise ValueError(f"{path}: changed since the data set was opened; open it again")


class _Cache:
    """The first K frames, once they have been decoded, in memory that processes forked from this one share."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self._size = count, size
        # Not a tensor's shared memory: that lies in /dev/shm, of which containers have little.
        shared = mmap.mmap(-1, max(1, count * (3 * size * size + 1)))
        whole = torch.frombuffer(shared, dtype=torch.uint8)
        self._known = whole[:count]
        self._pixels = whole[count : count * (3 * size * size + 1)].view(count, size, size, 3)

    def __reduce__(self) -> tuple[type[_Cache], tuple[int, int]]:
        return _Cache, (self.count, self._size)

    def copy_known(
        self,
        rows: Tensor,  # (B,) int64
        pixels: Tensor,  # (B, S, S, 3), written
    ) -> Tensor:
        """Copy what is here; returns the other slots."""
        known = rows < self.count
        known[known.clone()] = self._known[rows[known]].bool()
        pixels[known] = self._pixels[rows[known]]
        return (~known).nonzero().squeeze(1)

    def keep(
        self,
        rows: Tensor,  # (B,) int64
        pixels: Tensor,  # (B, S, S, 3)
    ) -> None:
        fits = rows < self.count
        self._pixels[rows[fits]] = pixels[fits]
        self._known[rows[fits]] = 1  # last: another process may look at any moment


def _spread(labels: Iterable[int], counts: Tensor) -> Tensor:
    """Each file's label for each of its frames, (L,) int64."""
    return torch.tensor(list(labels), dtype=torch.int64).repeat_interleave(counts)


def _check_arguments(size: int, emotions: Sequence[str] | None, video_stride: int, cache_bytes: int) -> None:
    if size < 1:
        raise ValueError(f"size: takes a side of at least 1 pixel, got {size}")
    if video_stride < 1:
        raise ValueError(f"video_stride: takes 1 or more, got {video_stride}")
    if cache_bytes < 0:
        raise ValueError(f"cache_bytes: takes 0 or more, got {cache_bytes}")
    # A string is itself a sequence of strings, its letters.
    if emotions is not None and (isinstance(emotions, str) or not emotions or len(set(emotions)) != len(emotions)):
        raise ValueError(f"emotions: takes a sequence of different names, at least one, got {emotions!r}")


def _without_left_out(root: Path, entries: Iterator[Entry]) -> Iterator[Entry]:
    """The entries but those that `left_out.txt` names, one a line: wrong crops, which somebody has seen."""
    try:
        named = {line.strip() for line in (root / LEFT_OUT).read_text().splitlines()} - {""}
    except FileNotFoundError:
        yield from entries
        return
    found = set()
    for entry in entries:
        if entry.file in named:
            found.add(entry.file)
        else:
            yield entry
    if unknown := sorted(named - found):
        logger.warning("%s names clips that are not in the folder: %s", root / LEFT_OUT, name_some(unknown))


def _chosen(root: Path, entries: Iterator[Entry], wanted: tuple[str, ...], *, reserve: bool) -> list[Entry]:
    """The entries of an index that show one of the wanted emotions."""
    chosen: list[Entry] = []
    others: set[str] = set()
    for entry in entries:
        entry.track = None  # by far the largest part
        if entry.emotion in wanted:
            chosen.append(entry)
        else:
            others.add(entry.emotion)
    shown = {entry.emotion for entry in chosen}
    absent = [emotion for emotion in wanted if emotion not in shown]
    if absent and not reserve:
        raise ValueError(explain_absent(root, absent, shown | others))
    if others:
        left_out = [name for name in KNOWN_EMOTIONS if name in others] + sorted(others - {*KNOWN_EMOTIONS})
        logger.info("%s: left out, since emotions= does not name them: %s", root, name_some(left_out))
    if not chosen:
        raise ValueError(f"root: the index of {root} names no clips of {name_some(wanted)}")
    need_av([Path(entry.file) for entry in chosen if entry.pts is not None])
    return chosen


def _is_whole(entry: Entry) -> bool:
    return not entry.broken


def _whole(root: Path, entries: list[Entry], *, skip_broken: bool) -> list[Entry]:
    """The entries without those of broken files."""
    whole = list(filter(_is_whole, entries))
    broken = [entry.broken for entry in entries if entry.broken]
    if broken:
        summary = f"{len(broken)} of {len(entries)} files are broken: {name_some(broken)}"
        if not skip_broken:
            raise ValueError(f"root: {summary}; repair or remove them, or pass skip_broken=True to leave them out")
        if not whole:
            raise ValueError(f"root: all {len(entries)} files are broken: {name_some(broken)}")
        logger.warning("skipped, %s", summary)
    return whole
