"""Faces from folders of pictures and videos: `<root>/<individual>/<emotion>/<file>`."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from pcmecl_fast.data.base import KNOWN_EMOTIONS, FrameDataset, Indices, as_indices
from pcmecl_fast.data.layout import LAYOUT, check_root
from pcmecl_fast.data.media import decode, is_hidden, is_media, is_video, need_av
from pcmecl_fast.wording import did_you_mean, name_some

logger = logging.getLogger(__name__)


class FolderFaces(FrameDataset):
    """Pictures and videos laid out as `<root>/<individual>/<emotion>/<file>`, as square frames.

    Individuals may have different numbers of files and lack emotions. Individuals and files are in natural order (2
    before 10), emotions in the order of `KNOWN_EMOTIONS`. Hidden names (a leading "." or "__"), files that are neither
    pictures nor videos, and individuals' folders without any are skipped, the last with a warning.

    A frame is turned upright (EXIF, video rotation), composited onto black if transparent, cropped to the centred
    square and resized with an antialiasing Lanczos filter. Every file is decoded once on opening, the only way to find
    truncated ones (but WebM and Matroska files cut between two frames pass for shorter videos). The first frames, up
    to `cache_bytes`, are kept as uint8; the others are decoded again on access, a video from its beginning: long ones
    need memory, or a larger `video_stride`.

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

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is missing or not a folder.
        ImportError: there are videos and PyAV, which reads them, is not installed.
        ValueError: an argument out of range; a folder that is not a known emotion; an emotion without a folder; files
            at the wrong level; broken files, all in one message; nothing to read.
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
        self.size = size
        known = KNOWN_EMOTIONS if emotions is None else tuple(emotions)
        files = _list_files(self.root, known, explicit=emotions is not None, reserve=reserve or emotions is None)
        self._places, self._pixels = _open_all(
            files, size, video_stride, cache_bytes if cache else 0, skip_broken=skip_broken
        )

        found = {place.file.individual for place in self._places}
        shown = {place.file.emotion for place in self._places}
        self.individuals = [name for name in dict.fromkeys(file.individual for file in files) if name in found]
        self.emotions = [name for name in known if emotions is not None or name in shown]
        individual = {name: n for n, name in enumerate(self.individuals)}
        emotion = {name: e for e, name in enumerate(self.emotions)}
        self.individual_index = torch.tensor([individual[place.file.individual] for place in self._places])
        self.emotion_index = torch.tensor([emotion[place.file.emotion] for place in self._places])
        self.keys = [place.key(self.root) for place in self._places]

    def frames(self, indices: Indices) -> Tensor:
        rows = as_indices(indices, len(self))
        pixels = torch.empty(len(rows), self.size, self.size, 3, dtype=torch.uint8)
        cached = rows < len(self._pixels)
        pixels[cached] = self._pixels[rows[cached]]
        self._decode_into(pixels, rows, (~cached).nonzero().squeeze(1).tolist())
        return pixels.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)

    def stamps(self) -> list[str]:
        return [f"{place.stamp} {self.size}" for place in self._places]

    def _decode_into(
        self,
        pixels: Tensor,  # (B, S, S, 3) uint8, written at slots
        rows: Tensor,  # (B,) int64 frames
        slots: list[int],
    ) -> None:
        # One pass over each file, however many of its frames are wanted.
        wanted: dict[Path, dict[int, list[int]]] = {}
        opened: dict[Path, str] = {}
        for slot in slots:
            place = self._places[int(rows[slot])]
            opened[place.file.path] = place.stamp
            wanted.setdefault(place.file.path, {}).setdefault(place.number, []).append(slot)
        for path, numbers in wanted.items():
            for number, frame in decode(path, self.size, sorted(numbers)):
                pixels[numbers.pop(number)] = torch.from_numpy(frame)
            if numbers:
                raise ValueError(f"{path}: changed since the data set was opened, frames {sorted(numbers)} are gone")
            if _stamp(path) != opened[path]:
                raise ValueError(f"{path}: changed since the data set was opened; open it again")


@dataclass(frozen=True)
class _File:
    path: Path
    individual: str
    emotion: str


@dataclass(frozen=True)
class _Place:
    """Where a frame comes from."""

    file: _File
    number: int  # in the file: 0 for a picture
    stamp: str  # the file's, when it was opened

    def key(self, root: Path) -> str:
        name = self.file.path.relative_to(root).as_posix()
        return f"{name}#{self.number}" if is_video(self.file.path) else name


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


def _list_files(root: Path, wanted: tuple[str, ...], *, explicit: bool, reserve: bool) -> list[_File]:
    """All pictures and videos in order, or one error that explains how the layout differs from the expected one."""
    check_root(root)
    _check_no_media(root, "directly in the root folder")
    people = _visible_folders(root)
    known = tuple(dict.fromkeys((*wanted, *KNOWN_EMOTIONS)))
    _check_levels(root, people, known)

    files: list[_File] = []
    unknown: list[Path] = []
    shown: set[str] = set()
    for person in people:
        _check_no_media(person, f"in the folder of individual {person.name!r}, outside an emotion's folder")
        folders = {folder.name: folder for folder in _visible_folders(person)}
        unknown += [folder for name, folder in folders.items() if name not in known]
        shown |= folders.keys()
        for emotion in wanted:
            if emotion in folders:
                _check_flat(folders[emotion])
                files += [_File(path, person.name, emotion) for path in _media(folders[emotion])]
    if unknown:
        raise ValueError(_explain_unknown(root, unknown, wanted, explicit=explicit))
    absent = [emotion for emotion in wanted if emotion not in shown]
    if absent and shown and not reserve:
        raise ValueError(_explain_absent(root, absent, shown))
    if left_out := [emotion for emotion in known if emotion in shown - {*wanted}]:
        logger.info("%s: left out, since emotions= does not name them: the folders of %s", root, name_some(left_out))
    if not files:
        raise ValueError(f"root: {root} holds no pictures or videos; files are expected at {LAYOUT}")
    named = {file.individual for file in files}
    empty = [person.name for person in people if person.name not in named]
    if empty:
        logger.warning("%s: no pictures or videos in %s", root, name_some(empty))
    return files


def _check_no_media(folder: Path, where: str) -> None:
    if media := _media(folder):
        raise ValueError(
            f"root: {name_some([path.name for path in media], 3)} in {folder} lie {where}; expected {LAYOUT}"
        )


def _check_levels(root: Path, people: list[Path], known: tuple[str, ...]) -> None:
    """Find emotions where individuals belong: the root is one level too deep, or the two levels are swapped."""
    for folder in people:
        if folder.name not in known:
            continue
        if _media(folder):
            raise ValueError(
                f"root: {folder} is an emotion's folder with files where an individual's is expected ({LAYOUT}); "
                f"if {root} is one individual, pass its parent folder"
            )
        inner = [child.name for child in _visible_folders(folder)]
        if inner and not any(name in known for name in inner):
            raise ValueError(
                f"root: {folder} is an emotion's folder that holds {name_some(inner, 3)}: the levels are swapped, "
                f"<emotion>/<individual> instead of {LAYOUT}"
            )


def _check_flat(folder: Path) -> None:
    for inner in _visible_folders(folder):
        for path, _, names in os.walk(inner):
            if any(is_media(Path(name)) for name in names):
                raise ValueError(
                    f"root: {path} holds pictures or videos one level too deep; move them up to {folder}, since the "
                    f"layout is {LAYOUT}"
                )


def _explain_unknown(root: Path, unknown: list[Path], known: tuple[str, ...], *, explicit: bool) -> str:
    hints = []
    for name in dict.fromkeys(folder.name for folder in unknown):
        closest = did_you_mean(name.lower(), known)
        hints.append(f"{name!r}" + (f" ({closest})" if closest else ""))
    advice = "" if explicit else "; rename them, or pass emotions= with the names you use"
    where = unknown[0].relative_to(root).as_posix()
    return (
        f"{'emotions' if explicit else 'root'}: folders in {root} that are not known emotions: {name_some(hints)}, "
        f"first at {where}; known: {', '.join(known)}{advice}. Expected {LAYOUT}"
    )


def _explain_absent(root: Path, absent: list[str], shown: set[str]) -> str:
    closest = did_you_mean(absent[0], sorted(shown)) or f"its folders show {name_some(sorted(shown))}"
    return f"emotions: no folder in {root} shows {name_some([repr(name) for name in absent])}; {closest}"


def _visible_folders(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if p.is_dir() and not is_hidden(p)), key=_natural)


def _media(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if is_media(p) and not p.is_dir()), key=_natural)


def _natural(path: Path) -> tuple[list[str | int], str]:
    """Sort key: numbers by value, letters case-insensitively; the name itself breaks ties such as 1.jpg and 01.jpg."""
    parts: list[str | int] = list(re.split(r"([0-9]+)", path.name.casefold()))
    parts[1::2] = [int(digits) for digits in parts[1::2]]
    return parts, path.name


def _open_all(
    files: list[_File], size: int, video_stride: int, cache_bytes: int, *, skip_broken: bool
) -> tuple[list[_Place], Tensor]:
    """Decode every file once: the places of all L frames, and the first K frames, (K, S, S, 3) uint8."""
    need_av([file.path for file in files])
    places: list[_Place] = []
    broken: list[str] = []
    # A bytearray grows in place, so there is never a second copy.
    pixels = bytearray()
    every = range(0, 2**62, video_stride)
    for file in tqdm(files, desc="reading faces", unit="file", disable=len(files) <= 500):
        start, stored, stamp = len(places), len(pixels), _stamp(file.path)
        try:
            for number, frame in decode(file.path, size, every):
                # Once one frame does not fit, later ones do not either: the cached frames are the first ones.
                if len(pixels) + frame.nbytes <= cache_bytes:
                    pixels += frame.tobytes()
                places.append(_Place(file, number, stamp))
        except ValueError as error:
            del places[start:], pixels[stored:]
            broken.append(str(error))
    _report_broken(broken, len(files), skip_broken=skip_broken)
    if not places:
        raise ValueError(f"root: all {len(files)} files are broken: {name_some(broken)}")
    kept = len(pixels) // (3 * size * size)
    if cache_bytes > 0 and kept < len(places):
        logger.info(
            "cache_bytes=%d holds %d of %d frames; the others are decoded again", cache_bytes, kept, len(places)
        )
    shape = (kept, size, size, 3)
    # frombuffer rejects an empty buffer.
    return places, torch.frombuffer(pixels, dtype=torch.uint8).view(shape) if kept else torch.empty(shape).byte()


def _stamp(path: Path) -> str:
    """A file's path, size and modification time: what changes when the file does."""
    try:
        stat = path.stat()
    except OSError:  # decoding reports why
        return ""
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def _report_broken(broken: list[str], total: int, *, skip_broken: bool) -> None:
    if not broken:
        return
    summary = f"{len(broken)} of {total} files are broken: {name_some(broken)}"
    if not skip_broken:
        raise ValueError(f"root: {summary}; repair or remove them, or pass skip_broken=True to leave them out")
    logger.warning("skipped, %s", summary)
