"""RAVDESS: a folder for every actor, and seven numbers in every file's name."""

from __future__ import annotations

import re
from pathlib import Path

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
)

CHANNELS = {"01": "speech", "02": "song"}
EMOTIONS = {
    "01": "neutral",
    "02": "calm",
    "03": "happy",
    "04": "sad",
    "05": "angry",
    "06": "fear",
    "07": "disgusted",
    "08": "surprised",
}
LEVELS = {"01": "normal", "02": "strong"}

_STEM = re.compile(r"(0[1-3])-(0[12])-(0[1-8])-(0[12])-(\d\d)-(\d\d)-(\d\d)")
_ACTOR = re.compile(r"(?:.*_)?Actor_\d\d")  # also Video_Speech_Actor_01, as its zips unpack
_WHOLE = "01"
"""The first number of files with picture and sound. The same takes lie beside them as 02, without sound, and 03,
without picture: with those, every take would count twice."""


@register
class Ravdess(Layout):
    """`Actor_NN/MM-VV-EE-II-SS-RR-AA.mp4`, in the root or in folders of each zip; or the files in the root."""

    name = "ravdess"
    expects = "Actor_01/01-01-05-02-01-02-01.mp4, also inside Video_Speech_Actor_01 and Video_Song_Actor_01"

    def evidence(self, root: Path) -> str | None:
        actors = [folder for folder in folders_of(root) if _ACTOR.fullmatch(folder.name)]
        for folder in (root, *actors, *(inner for actor in actors for inner in folders_of(actor))):
            if file := first(folder, _STEM.match):
                return f"{file.relative_to(root).as_posix()} is named by RAVDESS's seven numbers"
        return None

    def list(self, root: Path) -> Listing:
        gathered = Gathered(root)
        _list_folder(gathered, root, deeper=2)
        return gathered.listing()


def _list_folder(gathered: Gathered, folder: Path, *, deeper: int) -> None:
    folders, files = entries(folder)
    for inner in folders:
        if deeper and _ACTOR.fullmatch(inner.name):
            _list_folder(gathered, inner, deeper=deeper - 1)
        else:
            gathered.cannot_name(inner)
    for file in files:
        numbers = _STEM.fullmatch(file.stem)
        if numbers is None or not (is_video(file) or is_sound(file)):
            gathered.cannot_name(file)
            continue
        modality, channel, emotion, level, sentence, repetition, actor = numbers.groups()
        if modality == _WHOLE and is_video(file):
            gathered.add(
                RawClip(
                    f"Actor_{actor}",
                    EMOTIONS[emotion],
                    f"{CHANNELS[channel]}-{LEVELS[level]}-{sentence}-{repetition}",
                    (file,),
                    level=LEVELS[level],
                    sentence=sentence,
                    repetition=repetition,
                )
            )
