"""Any folder with a folder for every person and, in it, one for every emotion; CDRL's aligned faces, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pcmecl_fast.data.emotions import emotion_named
from pcmecl_fast.data.layout import LAYOUT
from pcmecl_fast.data.layouts.base import (
    Gathered,
    Layout,
    Listing,
    RawClip,
    entries,
    first,
    folders_of,
    is_picture,
    is_sound,
    is_video,
    register,
)

ALIGNED = "align_img"
"""CDRL puts this folder between a person and the emotions; its pictures are cropped and aligned."""


@register
class Folder(Layout):
    """`<individual>/<emotion>/<file>`: every picture and every video is a clip, and so is a folder of pictures.

    A sound file with the name of a video or of a folder of pictures, beside it, is its sound.
    """

    name = "folder"
    expects = f"{LAYOUT.removeprefix('<root>/')}, where a folder of pictures is one clip"

    def evidence(self, root: Path) -> str | None:
        for person in folders_of(root):
            for folder in (person, person / ALIGNED):
                if emotion := first(folder, lambda name: emotion_named(name) is not None):
                    example = emotion.relative_to(root).as_posix()
                    return f"{example} is a folder of {emotion_named(emotion.name)} faces in an individual's folder"
        return None

    def list(self, root: Path) -> Listing:
        gathered = Gathered(root)
        people, stray = entries(root)
        gathered.cannot_name(*stray)
        for person in people:
            _list_person(gathered, person.name, person, cropped=False)
        return gathered.listing()


def _list_person(gathered: Gathered, individual: str, folder: Path, *, cropped: bool) -> None:
    folders, stray = entries(folder)
    gathered.cannot_name(*stray)
    for inner in folders:
        emotion = emotion_named(inner.name)
        if emotion is not None:
            _list_emotion(gathered, individual, emotion, inner, cropped=cropped)
        elif inner.name == ALIGNED and not cropped:
            _list_person(gathered, individual, inner, cropped=True)
        else:
            gathered.cannot_name(inner)


def _list_emotion(gathered: Gathered, individual: str, emotion: str, folder: Path, *, cropped: bool) -> None:
    folders, files = entries(folder)
    sounds = {file.stem: file for file in files if is_sound(file)}

    def add(place: Path, sources: Sequence[Path], sound: Path | None) -> None:
        names = _names(place, is_file=place == sources[0])
        name = next((name for name in names if gathered.is_free(individual, emotion, name)), place.stem)
        gathered.add(RawClip(individual, emotion, name, tuple(sources), sound=sound, cropped=cropped))

    for inner in folders:
        deeper, within = entries(inner)
        pictures = [file for file in within if is_picture(file)]
        gathered.cannot_name(*deeper, *(file for file in within if not is_picture(file)))
        if pictures:
            add(inner, pictures, sounds.pop(inner.name, None))
    for file in files:
        if is_video(file):
            add(file, [file], sounds.pop(file.stem, None))
        elif is_picture(file):
            add(file, [file], None)
        elif not is_sound(file):
            gathered.cannot_name(file)
    gathered.cannot_name(*sounds.values())


def _names(place: Path, *, is_file: bool) -> Iterator[str]:
    """Names for a clip, the best first: for anger/a.jpg they are a, a-jpg, anger-a and anger-a-jpg."""
    stems = [place.stem, f"{place.stem}-{place.suffix[1:]}"] if is_file else [place.name]
    yield from stems
    yield from (f"{place.parent.name}-{stem}" for stem in stems)
