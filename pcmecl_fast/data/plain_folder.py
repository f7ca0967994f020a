"""A folder of faces that somebody made by hand: `<root>/<individual>/<emotion>/<file>`, listed, checked and indexed.

Every file is decoded once, the only way to find truncated ones. What was seen is kept in `.index.jsonl` beside the
individuals where it took a while, so that the next time only new and changed files are decoded.
"""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pcmecl_fast.data.emotions import KNOWN_EMOTIONS
from pcmecl_fast.data.index import Entry, packed_pts, read_index, write_index
from pcmecl_fast.data.layout import LAYOUT, check_root
from pcmecl_fast.data.layouts.base import natural
from pcmecl_fast.data.media import check_picture, is_hidden, is_media, is_video, need_av
from pcmecl_fast.data.video import scan
from pcmecl_fast.machine import cores
from pcmecl_fast.progress import progress_bar
from pcmecl_fast.wording import did_you_mean, name_some

logger = logging.getLogger(__name__)

KEPT = ".index.jsonl"
_WORTH_KEEPING = 2.0  # seconds that indexing took
_KEEP_EVERY = 60.0  # seconds: what an interruption loses at most, besides the files at work
_AT_ONCE = 1024  # files
_BAR_FROM = 500  # files


@dataclass(frozen=True)
class File:
    """One picture or video of a folder that is not indexed."""

    path: Path
    individual: str
    emotion: str


def plain_entries(root: Path, wanted: tuple[str, ...], *, explicit: bool, reserve: bool) -> list[Entry]:
    """The entries of all files, in order; of broken ones they say why.

    Args:
        root: the folder of individuals.
        wanted: the emotions to list, in order.
        explicit: whether somebody named them, for the words of an error.
        reserve: whether one may have no folder.

    Raises:
        ImportError: there are videos and PyAV, which reads them, is not installed.
        ValueError: how the folder differs from the layout that is expected, with the way out.
    """
    files = _list_files(root, wanted, explicit=explicit, reserve=reserve)
    need_av([file.path for file in files])
    began = kept = time.monotonic()
    known = _kept(root / KEPT)
    entries = [_seen_before(known, root, file) for file in files]
    new = [i for i, entry in enumerate(entries) if entry is None]
    with (
        ThreadPoolExecutor(cores()) as pool,
        progress_bar(total=len(new), desc="indexing faces", unit="file", quiet=len(new) <= _BAR_FROM) as bar,
    ):
        for begin in range(0, len(new), _AT_ONCE):
            some = new[begin : begin + _AT_ONCE]
            for i, entry in zip(some, pool.map(lambda i: _look(root, files[i]), some), strict=True):
                entries[i] = entry
                bar.update()
            if time.monotonic() - kept > _KEEP_EVERY:
                _keep(root / KEPT, entries, known)
                kept = time.monotonic()
    if new and time.monotonic() - began > _WORTH_KEEPING:
        _keep(root / KEPT, entries, known)
    return [entry for entry in entries if entry is not None]


def _kept(path: Path) -> dict[str, Entry]:
    """What an earlier call has seen; nothing where its file is not there or not whole."""
    try:
        _, entries = read_index(path)
        return {entry.file: entry for entry in entries}
    except (OSError, ValueError):
        return {}


def _keep(path: Path, entries: list[Entry | None], known: dict[str, Entry]) -> None:
    """Keep what has been seen, now and before."""
    found = {entry.file: entry for entry in entries if entry is not None}
    try:
        write_index(path, (known | found).values(), None)
    except OSError as error:
        logger.info("the index of these faces is not kept, and will be made again: %s", error)


def _seen_before(known: dict[str, Entry], root: Path, file: File) -> Entry | None:
    entry = known.get(file.path.relative_to(root).as_posix())
    if entry is None:
        return None
    try:
        stat = file.path.stat()
    except OSError:
        return None
    same = (entry.bytes, entry.mtime) == (stat.st_size, stat.st_mtime_ns)
    return entry if same and not entry.broken else None


def _look(root: Path, file: File) -> Entry:
    """Decode a file once."""
    entry = Entry(file.path.relative_to(root).as_posix(), file.individual, file.emotion, 0)
    try:
        stat = file.path.stat()
        entry.bytes, entry.mtime = stat.st_size, stat.st_mtime_ns
        if is_video(file.path):
            entry.form, pts = "video", scan(file.path).tolist()
            entry.frames, entry.pts = len(pts), packed_pts(pts)
        else:
            check_picture(file.path)
            entry.form, entry.frames = "picture", 1
    except (OSError, ValueError) as error:
        entry.broken = str(error)
    return entry


def _list_files(root: Path, wanted: tuple[str, ...], *, explicit: bool, reserve: bool) -> list[File]:
    """All pictures and videos in order, or one error that explains how the layout differs from the expected one."""
    check_root(root)
    _check_no_media(root, "directly in the root folder")
    people = _visible_folders(root)
    known = tuple(dict.fromkeys((*wanted, *KNOWN_EMOTIONS)))
    _check_levels(root, people, known)

    files: list[File] = []
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
                files += [File(path, person.name, emotion) for path in _media(folders[emotion])]
    if unknown:
        raise ValueError(_explain_unknown(root, unknown, wanted, explicit=explicit))
    absent = [emotion for emotion in wanted if emotion not in shown]
    if absent and shown and not reserve:
        raise ValueError(explain_absent(root, absent, shown))
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


def explain_absent(root: Path, absent: list[str], shown: set[str]) -> str:
    closest = did_you_mean(absent[0], sorted(shown)) or f"its folders show {name_some(sorted(shown))}"
    return f"emotions: no folder in {root} shows {name_some([repr(name) for name in absent])}; {closest}"


def _visible_folders(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if p.is_dir() and not is_hidden(p)), key=lambda path: natural(path.name))


def _media(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if is_media(p) and not p.is_dir()), key=lambda path: natural(path.name))
