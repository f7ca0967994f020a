"""The clips of a folder, and what their names say: who is seen, what they show, and whose expression it was.

The names of the field's projects are known, in any order of the folders:

    M003/happy/001.mp4, M003/happy/001/000000.png     individual, emotion, clip, as `pcmecl-fast prepare` writes them
    M003/neutral/001.happy.mp4                        as `pcmecl-fast edit` writes them: 001, neutral, made happy
    M003/align_img/happy/001/000000.jpg               as CDRL prepares them; happy/M003/000000.png, as it compares them
    Tom/happy/faces_aligned/000000.png                as NED writes its experiments
    Tom/ref_on_angry_Ann_x/faces_aligned/000000.png   as CDRL calls an experiment: angry as Ann is, on Tom
    M003_ang_3_001.mp4, M003#angry#level_1#001.mp4    EAT's and EDTalk's copies of MEAD

A video is a clip, and so are a folder's numbered pictures; any other picture is a clip of one frame.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from pcmecl_fast.data.emotions import emotion_named
from pcmecl_fast.data.index import Entry
from pcmecl_fast.data.layouts.base import Entries, entries, is_picture, is_sound, is_video, natural
from pcmecl_fast.data.shares import read_folder

COMPARISON = ".compare"
"""How `pcmecl-fast edit` ends the names of videos that show source and edit side by side."""


@dataclass(frozen=True)
class FaceClip:
    """Frames of one face, and what their names say.

    Attributes:
        file: its path in the folder, with "/"; of numbered pictures, that of their folder.
        sources: one video, or the pictures in order.
        individual: who is seen; "" where no name says it.
        emotion: what is shown, of an edit what it was made to show; None where no name says it.
        name: the recording's, unique within the individual's clips of an emotion.
        was: the emotion of the recording that was edited, where the names say both.
        driver: who lent the emotion, where a name says it.
        rate: frames a second of pictures, where an index knows it; a video has its own.
        sound: a file beside it with its sound.
    """

    file: str
    sources: tuple[Path, ...]
    individual: str
    emotion: str | None
    name: str
    was: str | None = None
    driver: str | None = None
    rate: Fraction | None = None
    sound: Path | None = None

    @property
    def setting(self) -> str:
        """Whether another person lent the emotion, "cross-ID", or the same, "inter-ID"; "" where no name says it."""
        if self.driver is None:
            return ""
        return "inter-ID" if self.driver == self.individual else "cross-ID"


@dataclass
class Listing:
    """The clips of a folder in natural order, and what of it is no clip: path in the folder, and why."""

    clips: list[FaceClip] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def people(self) -> set[str]:
        return {clip.individual for clip in self.clips} - {""}


def list_clips(root: Path, people: Collection[str] = ()) -> Listing:
    """The clips of a folder, by their names alone; of a prepared one, by its index.

    Args:
        root: the folder.
        people: names of individuals from elsewhere, by which the names of folders are read: in
            `ref_on_angry_Actor_06_x`, that `Actor_06` is a person.

    Raises:
        ValueError: a damaged index.
        OSError: a folder cannot be read.
    """
    listing = Listing()
    index = read_folder(root)
    if index is not None:
        _list_index(root, index.entries, listing)
        return listing
    found = list(_walk(root, root, listing))
    known = {_labels(parts, is_file, ()).individual for _, _, parts, is_file in found} | {*people}
    for file, sources, parts, is_file in found:
        labels = _labels(parts, is_file, known - {""})
        listing.clips.append(FaceClip(file, sources, *labels, sound=_sound_beside(root / file)))
    listing.clips.sort(key=lambda clip: natural(clip.file))
    return listing


def sounds_of(root: Path) -> list[FaceClip]:
    """The files of a folder that may hold sound, sound files and videos, labelled as clips are."""
    found = [(path, path.relative_to(root)) for path in _all_files(root) if is_sound(path) or is_video(path)]
    return [
        FaceClip(inner.as_posix(), (path,), *_labels([*inner.parts[:-1], inner.stem], True, ()))
        for path, inner in found
    ]


# ---- Folders ---------------------------------------------------------------------------------------------------------

_Found = tuple[str, tuple[Path, ...], list[str], bool]  # file, sources, the parts of its name, whether it is a file

FRAME_INFO = "videos/_frame_info.txt"
"""SSERD's and SCMCL's list of what each of NED's pictures is a frame of: lines `<recording>_<frame> <picture>`."""

_ALIGNED = "faces_aligned"
_OF_NED = {
    *("images", "full_frames", "faces", "masks", "masks_aligned", "nmfcs", "nmfcs_aligned", "shapes"),
    *("shapes_aligned", "eye_landmarks", "eye_landmarks_aligned", "align_transforms", "DECA"),
}
"""What NED keeps beside the aligned faces, which are what is measured."""
_SILENT = {_ALIGNED, *_OF_NED, "align_img", "frames", "gen", "fake", "real", "test", "ref", "videos"}
_SILENT |= {"audio", "audios", "sound", "reference"}
"""Folders whose names say nothing of what is seen."""

_NUMBERED = re.compile(r"(?:frame|img|image)?[-_]?\d+", re.IGNORECASE)
_CHUNK = re.compile(r"\d{6}")
_LINE = re.compile(r"(?P<recording>.+)_(?P<frame>\d+)\s+(?P<picture>\d+)")


def _walk(root: Path, folder: Path, listing: Listing) -> Iterator[_Found]:
    within = entries(folder)
    names = {path.name for path in within.folders}
    chunks = [path for path in within.folders if _CHUNK.fullmatch(path.name) and folder.name in _SILENT]
    for file in within.files:
        if is_video(file):
            if file.stem.endswith(COMPARISON):
                listing.left_out[file.relative_to(root).as_posix()] = "a comparison side by side"
                continue
            inner = file.relative_to(root)
            yield inner.as_posix(), (file,), [*inner.parts[:-1], file.stem], True
    yield from _pictures(root, folder, within, chunks)
    for inner_folder in within.folders:
        if inner_folder in chunks or (_ALIGNED in names and inner_folder.name in _OF_NED):
            continue
        yield from _walk(root, inner_folder, listing)


def _pictures(root: Path, folder: Path, within: Entries, chunks: Sequence[Path]) -> Iterator[_Found]:
    pictures = [file for file in within.files if is_picture(file)]
    pictures += [file for chunk in chunks for file in entries(chunk).files if is_picture(file)]
    numbered = [file for file in pictures if _NUMBERED.fullmatch(file.stem)]
    for file in pictures:
        if file not in numbered:
            inner = file.relative_to(root)
            yield inner.as_posix(), (file,), [*inner.parts[:-1], file.stem], True
    if not numbered:
        return
    parts = list(folder.relative_to(root).parts)
    place = "/".join(parts) or "."
    recordings = _recordings(root, folder, numbered)
    if recordings is None:
        yield place, tuple(numbered), parts, False
        return
    for recording, of in recordings.items():
        yield f"{place}#{recording}", tuple(of), [*parts, recording], True


def _recordings(root: Path, folder: Path, pictures: Sequence[Path]) -> dict[str, list[Path]] | None:
    """The pictures by recording, where NED's numbers run over several and a list says which is which."""
    above = [folder, *folder.parents]
    near = above[: above.index(root) + 1][:3]
    info = next((place / FRAME_INFO for place in near if (place / FRAME_INFO).is_file()), None)
    if info is None:
        return None
    by_number = {int(re.sub(r"\D", "", file.stem)): file for file in pictures}
    recordings: dict[str, list[tuple[int, Path]]] = {}
    for line in info.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        parts = _LINE.fullmatch(line.strip())
        if parts and (file := by_number.get(int(parts["picture"]))):
            recordings.setdefault(parts["recording"], []).append((int(parts["frame"]), file))
    return {name: [file for _, file in sorted(of)] for name, of in recordings.items()} or None


def _list_index(root: Path, clips: Iterable[Entry], listing: Listing) -> None:
    for entry in clips:
        if entry.broken:
            listing.left_out[entry.file] = entry.broken
            continue
        path = root / entry.file
        sources = (path,) if path.suffix else tuple(file for file in entries(path).files if is_picture(file))
        rate = Fraction(entry.rate) if entry.rate else None
        sound = _sound_beside(path)
        name = Path(entry.file).stem if path.suffix else Path(entry.file).name
        listing.clips.append(
            FaceClip(entry.file, sources, entry.individual, entry.emotion, name, rate=rate, sound=sound)
        )


def _sound_beside(path: Path) -> Path | None:
    """A sound file with a clip's name, as `prepare` lays it beside pictures."""
    beside = [path.with_name(f"{stem}{suffix}") for stem in {path.name, path.stem} for suffix in (".m4a", ".wav")]
    return next((file for file in beside if file != path and file.is_file()), None)


def _all_files(folder: Path) -> Iterator[Path]:
    within = entries(folder)
    yield from within.files
    for inner in within.folders:
        yield from _all_files(inner)


# ---- Names -----------------------------------------------------------------------------------------------------------


class _Labels(NamedTuple):
    """As `FaceClip` has them, in its order."""

    individual: str
    emotion: str | None
    name: str
    was: str | None
    driver: str | None


_REFERENCE = re.compile(r"ref_on_(.+)", re.IGNORECASE)


def _labels(parts: Sequence[str], is_file: bool, people: Collection[str]) -> _Labels:
    """What the parts of a path say; of a file, the last is its name without suffix."""
    parts = list(parts)
    emotions: list[str] = []
    individual, driver, rest = "", None, []
    target = _target_of_edit(parts[-1]) if parts else None
    if target:
        parts[-1] = parts[-1].rpartition(".")[0]
    for number, part in enumerate(parts):
        is_name = is_file and number == len(parts) - 1
        if part in _SILENT and not is_name:
            continue
        if (emotion := emotion_named(part)) and not is_name:
            emotions.append(emotion)
        elif lent := _REFERENCE.fullmatch(part):
            shown, driver = _lent(lent[1], people)
            emotions += [shown] if shown else []
        elif is_name and not emotions and (tokens := _around_emotion(part)):
            before, emotion, after = tokens
            emotions.append(emotion)
            if not individual:
                individual, before = _person_first(before)
            rest.append("_".join([*before, *after]))
        elif is_name and (tokens := _around_emotion(part)) and not tokens[0]:
            emotions.insert(0, tokens[1])  # NED's recordings begin with the emotion that they show
            rest.append("_".join(tokens[2]))
        elif not individual and not is_name:
            individual = part
        elif not is_name and (tokens := _around_emotion(part)) and "_".join(tokens[0] + tokens[2]) in people:
            emotions.append(tokens[1])
            driver = "_".join(tokens[0] + tokens[2])
        else:
            rest.append(part)
    if target:
        emotions.append(target)
    shown_last, before_it = ([None, None, *emotions][-1], [None, None, *emotions][-2])
    if target == _SEVERAL:
        shown_last = None  # what is shown changes within the clip
    return _Labels(individual, shown_last, "/".join(rest), before_it, driver)


_SEVERAL = "several"


def _target_of_edit(stem: str) -> str | None:
    """The emotion in a name of `pcmecl-fast edit`, `talk.happy`; of `talk.happy-neutral`, that there are several."""
    named = [emotion_named(word) for word in stem.rpartition(".")[2].split("-")] if "." in stem else []
    if not named or None in named:
        return None
    return named[0] if len(named) == 1 else _SEVERAL


def _around_emotion(text: str) -> tuple[list[str], str, list[str]] | None:
    """The words before an emotion in a name, the emotion, and those after it."""
    words = re.split(r"[_#]", text)
    for k, word in enumerate(words):
        if emotion := emotion_named(word):
            return words[:k], emotion, words[k + 1 :]
    return None


def _person_first(words: list[str]) -> tuple[str, list[str]]:
    """A person at the beginning of a name, M003 or Actor_01, and the words after it."""
    if not words:
        return "", []
    many = 2 if len(words) > 1 and words[0].isalpha() and words[1].isdigit() else 1
    return "_".join(words[:many]), words[many:]


def _lent(text: str, people: Collection[str]) -> tuple[str | None, str | None]:
    """What `ref_on_…` says: the emotion, if any, and who lent it."""
    around = _around_emotion(text)
    emotion, text = (around[1], "_".join(around[0] + around[2])) if around else (None, text)
    known = [name for name in people if text == name or text.startswith(f"{name}_")]
    return emotion, max(known, key=len) if known else _person_first(text.split("_"))[0] or None
