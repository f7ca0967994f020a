"""CREMA-D: all videos in one folder and all sound in another, labelled by their names."""

from __future__ import annotations

import re
from pathlib import Path

from pcmecl_fast.data.emotions import emotion_named
from pcmecl_fast.data.layouts.base import (
    Gathered,
    Layout,
    Listing,
    RawClip,
    entries,
    first,
    is_video,
    register,
    sounds_of,
)

VIDEO, SOUND = "VideoFlash", "AudioWAV"

_STEM = re.compile(
    r"(?P<actor>\d{4})_(?P<sentence>[A-Z]{3})_(?P<emotion>ANG|DIS|FEA|HAP|NEU|SAD)_(?P<level>LO|MD|HI|XX)"
)


@register
class CremaD(Layout):
    """`VideoFlash/<actor>_<sentence>_<emotion>_<level>.flv`, sound in `AudioWAV`. XX: no level was asked for."""

    name = "crema-d"
    expects = f"{VIDEO}/1001_DFA_ANG_XX.flv with {SOUND}/1001_DFA_ANG_XX.wav"

    def evidence(self, root: Path) -> str | None:
        file = first(root / VIDEO, _STEM.match)
        return f"{file.relative_to(root).as_posix()} is named as CREMA-D names its clips" if file else None

    def list(self, root: Path) -> Listing:
        # The rest of the data set (votes, MP3 copies of the sound) lies beside these two folders and holds no clips.
        gathered = Gathered(root)
        sounds = sounds_of(root / SOUND)
        folders, files = entries(root / VIDEO)
        gathered.cannot_name(*folders)
        for file in files:
            parts = _STEM.fullmatch(file.stem)
            if parts and is_video(file) and (emotion := emotion_named(parts["emotion"])):
                gathered.add(
                    RawClip(
                        parts["actor"],
                        emotion,
                        f"{parts['sentence']}-{parts['level']}",
                        (file,),
                        sound=sounds.get(file.stem),
                        level=parts["level"],
                        sentence=parts["sentence"],
                    )
                )
            else:
                gathered.cannot_name(file)
        return gathered.listing()
