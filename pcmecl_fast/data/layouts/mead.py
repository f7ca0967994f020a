"""MEAD as it is published, with a folder for every person, view, emotion and level; and its renamed copies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pcmecl_fast.data.emotions import emotion_named
from pcmecl_fast.data.layouts.base import (
    Gathered,
    Layout,
    Listing,
    RawClip,
    entries,
    first,
    folders_of,
    is_sound,
    is_video,
    register,
    sounds_of,
)

VIEWS = ("down", "front", "left_30", "left_60", "right_30", "right_60", "top")
LEVEL = re.compile(r"level_[1-3]")

_INDIVIDUAL = re.compile(r"[MW]\d{3}")

_NAMES = (
    re.compile(r"(?P<who>[MW]\d{3})_(?P<emotion>[a-z]+)_(?P<level>[1-3])_(?P<clip>\d+)"),  # M003_ang_3_001, of EAT
    re.compile(r"(?P<who>[MW]\d{3})#(?P<emotion>[a-z]+)#level_(?P<level>[1-3])#(?P<clip>\d+)"),  # of EDTalk
    re.compile(r"(?P<who>[MW]\d{3})_(?P<page>\d+)_(?P<level>[1-3])_output_(?P<sentence>\d+)"),  # the first release
)
"""The stems of renamed copies, which have lost the view."""

_PAGES = {
    "angry": range(1, 9),
    "disgusted": range(9, 17),
    "contempt": range(17, 25),
    "fear": range(25, 34),
    "happy": range(34, 44),
    "sad": range(44, 53),
    "surprised": range(53, 62),
    "neutral": range(62, 74),
}
"""The first release's pages of the script: its names have a page where later ones have the emotion."""


@register
class Mead(Layout):
    """`<ID>/video/<view>/<emotion>/<level>/<clip>.mp4`, the sound once for all views in
    `<ID>/audio/<emotion>/<level>/<clip>.m4a`; or renamed files, in the root or in folders of individuals."""

    name = "mead"
    expects = (
        "<M003>/video/<view>/<emotion>/<level_1>/<001>.mp4 with <M003>/audio/<emotion>/<level_1>/<001>.m4a, "
        "or files named M003_ang_3_001, M003#angry#level_3#001 or M003_<page>_3_output_<sentence>"
    )

    def evidence(self, root: Path) -> str | None:
        people = _people(root)
        for person in people:
            if view := first(person / "video", VIEWS.__contains__):
                return f"{view.relative_to(root).as_posix()} is a view in a folder of MEAD's individual {person.name}"
        for folder in (root, *people):
            if file := first(folder, _is_renamed_video):
                return f"{file.relative_to(root).as_posix()} is named as a copy of MEAD names its clips"
        return None

    def list(self, root: Path) -> Listing:
        gathered = Gathered(root)
        folders, files = entries(root)
        _list_renamed(gathered, files)
        for folder in folders:
            if _INDIVIDUAL.fullmatch(folder.name):
                _list_person(gathered, folder)
            else:
                gathered.cannot_name(folder)
        return gathered.listing()


def _people(root: Path) -> list[Path]:
    return [folder for folder in folders_of(root) if _INDIVIDUAL.fullmatch(folder.name)]


def _list_person(gathered: Gathered, person: Path) -> None:
    folders, files = entries(person)
    _list_renamed(gathered, files)
    gathered.cannot_name(*(folder for folder in folders if folder.name not in ("video", "audio")))
    sounds = _sounds(person / "audio")
    views, stray = entries(person / "video")
    gathered.cannot_name(*stray)
    for view in views:
        if view.name not in VIEWS:
            gathered.cannot_name(view)
            continue
        for emotion, level in _levels(gathered, view):
            _list_level(gathered, level, sounds.get((emotion, level.name), {}), (person.name, emotion, view.name))


def _sounds(folder: Path) -> dict[tuple[str, str], dict[str, Path]]:
    """A person's sound files by their stem, for each emotion and level."""
    return {
        (emotion, level.name): sounds_of(level)
        for word in folders_of(folder)
        if (emotion := emotion_named(word.name))
        for level in folders_of(word)
    }


def _levels(gathered: Gathered, view: Path) -> Iterator[tuple[str, Path]]:
    """The folders of a view that hold clips, each with its emotion."""
    words, stray = entries(view)
    gathered.cannot_name(*stray)
    for word in words:
        emotion = emotion_named(word.name)
        if emotion is None:
            gathered.cannot_name(word)
            continue
        levels, stray = entries(word)
        gathered.cannot_name(*stray)
        for level in levels:
            if LEVEL.fullmatch(level.name):
                yield emotion, level
            else:
                gathered.cannot_name(level)


def _list_level(gathered: Gathered, level: Path, sounds: dict[str, Path], labels: tuple[str, str, str]) -> None:
    individual, emotion, view = labels
    folders, files = entries(level)
    gathered.cannot_name(*folders)
    for file in files:
        stem = file.stem
        if is_video(file) and stem.isdecimal():
            gathered.add(
                RawClip(
                    individual,
                    emotion,
                    f"{view}-{level.name}-{stem}",
                    (file,),
                    sound=sounds.get(stem),
                    level=level.name,
                    view=view,
                    number=int(stem),
                )
            )
        else:
            gathered.cannot_name(file)


def _list_renamed(gathered: Gathered, files: list[Path]) -> None:
    sounds = {file.stem: file for file in files if is_sound(file)}
    for file in files:
        clip = _renamed(file, sounds) if is_video(file) or is_sound(file) else None
        if clip is None:
            gathered.cannot_name(file)
        elif is_video(file):
            gathered.add(clip)


def _is_renamed_video(name: str) -> bool:
    # A look at the beginning first: the folder may hold very many other files.
    return bool(_INDIVIDUAL.match(name)) and is_video(Path(name)) and _renamed(Path(name), {}) is not None


def _renamed(file: Path, sounds: dict[str, Path]) -> RawClip | None:
    """A renamed copy by its stem; None where that says nothing."""
    stem = file.stem
    found = next(filter(None, (pattern.fullmatch(stem) for pattern in _NAMES)), None)
    if found is None:
        return None
    parts = found.groupdict()
    level = f"level_{parts['level']}"
    if page := parts.get("page"):
        emotion = next((emotion for emotion, pages in _PAGES.items() if int(page) in pages), None)
        # Sentences are counted within a page, so that only both tell clips apart.
        name, number = f"{level}-page_{page}-{parts['sentence']}", None
    else:
        emotion = emotion_named(parts["emotion"])
        name, number = f"{level}-{parts['clip']}", int(parts["clip"])
    if emotion is None:
        return None
    return RawClip(
        parts["who"],
        emotion,
        name,
        (file,),
        sound=sounds.get(stem),
        level=level,
        sentence=parts.get("sentence"),
        number=number,
    )
