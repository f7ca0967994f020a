"""The numbers on one page, with the clips at either end of each measure as pictures, and all that was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pcmecl_fast.evaluate.field.clips import FaceClip
from pcmecl_fast.evaluate.field.pairs import Pairing
from pcmecl_fast.evaluate.field.reading import count_frames, frame_at
from pcmecl_fast.evaluate.field.scores import Case, Score, Setting
from pcmecl_fast.evaluate.field.table import heading, table_of
from pcmecl_fast.evaluate.origin import Origin
from pcmecl_fast.evaluate.pages import data_uri, template, webp
from pcmecl_fast.evaluate.results import readable
from pcmecl_fast.files import write_atomically

_SIDE = 112
_MOST_NAMES = 500  # of each list on the page


def write_page(
    path: Path,
    settings: Sequence[Setting],
    pairing: Pairing,
    not_run: Mapping[str, str],
    notes: Mapping[str, str],
    made: Origin,
) -> None:
    """Write the page.

    Args:
        path: of the page.
        settings: the numbers.
        pairing: of what they are.
        not_run: metrics that could not run, and why.
        notes: what to know of single clips.
        made: the origin of the numbers.

    Raises:
        OSError: it cannot be written.
    """
    pictures = _Pictures()
    page = template("measure.html").render(
        title="Edits measured as the field does",
        settings=[
            {
                "heading": heading(setting),
                "table": table_of(setting),
                "cases": [_cases(score, pictures) for score in setting.scores if score.best or score.worst],
            }
            for setting in settings
        ],
        side=_SIDE,
        not_run=not_run,
        lists=_lists(settings, pairing, notes),
        origin=made,
    )
    write_atomically(path, page.encode("utf-8", errors="replace"))


def _lists(settings: Sequence[Setting], pairing: Pairing, notes: Mapping[str, str]) -> list[dict[str, Any]]:
    """What was left out and what to know, as titles with lines."""
    left_out: dict[str, list[str]] = {}
    for setting in settings:
        for score in setting.scores:
            for file, why in score.left_out.items():
                left_out.setdefault(f"{file}: {why}", []).append(score.measure.name)
    lists = {
        "Left out of the numbers": [f"{what} ({', '.join(dict.fromkeys(of))})" for what, of in left_out.items()],
        "Notes on clips": [f"{file}: {note}" for file, note in notes.items()],
        "No clips": [f"{file}: {why}" for file, why in pairing.left_out.items()],
        "Of the reference, not compared with anything": pairing.unused,
    }
    return [
        {"title": title, "lines": lines[:_MOST_NAMES], "more": max(0, len(lines) - _MOST_NAMES), "count": len(lines)}
        for title, lines in lists.items()
        if lines
    ]


def _cases(score: Score, pictures: _Pictures) -> dict[str, Any]:
    def shown(cases: Sequence[Case]) -> list[dict[str, Any]]:
        return [
            {
                "file": case.pair.edited.file,
                "value": readable(case.value, score.measure.unit)[0],
                "edited": pictures.middle(case.pair.edited),
                "recording": pictures.middle(case.pair.recording),
            }
            for case in cases
        ]

    return {
        "name": f"{score.measure.name} {score.measure.better}",
        "ends": [("worst", shown(score.worst)), ("best", shown(score.best))],
    }


class _Pictures:
    """The middle frames of clips, each read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, ...], str | None] = {}

    def middle(self, clip: FaceClip | None) -> str | None:
        if clip is None:
            return None
        if clip.sources not in self._known:
            self._known[clip.sources] = self._read(clip)
        return self._known[clip.sources]

    def _read(self, clip: FaceClip) -> str | None:
        try:
            frame = frame_at(clip, count_frames(clip) // 2)
        except (ValueError, OSError):  # damaged: the numbers say so
            return None
        if frame is None:
            return None
        picture = Image.fromarray(frame)
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        return data_uri(webp(picture), "webp")
