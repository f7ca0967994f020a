"""A prepared folder on one page: a face of every individual and emotion, and what could not be prepared."""

from __future__ import annotations

import collections
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pcmecl_fast.data.emotions import KNOWN_EMOTIONS
from pcmecl_fast.data.index import Entry, unpacked_pts
from pcmecl_fast.data.media import read_picture
from pcmecl_fast.data.video import read_at
from pcmecl_fast.evaluate.pages import data_uri, template, webp
from pcmecl_fast.files import write_atomically

log = logging.getLogger("pcmecl_fast")

POOR = 0.8
"""Clips whose face was found in a smaller part of the frames looked at are pointed out."""

_SIDE = 112
_MOST_NAMES = 500  # of each list on the page


def write_contact_sheet(
    root: Path, entries: Sequence[Entry], prepared: dict[str, Any], why: str, unknown: Sequence[str]
) -> None:
    """Write `report.html` into a prepared folder.

    Each individual and emotion is shown by the middle frame of its clip in which the face was found least often: bad
    crops are seen at a glance.

    Args:
        root: the folder.
        entries: its index.
        prepared: with what it was prepared.
        why: why the layout was taken.
        unknown: files that are not of the data set, by their names.

    Raises:
        OSError: the page cannot be written.
    """
    whole = [entry for entry in entries if not entry.broken]
    shown = {entry.emotion for entry in whole}
    emotions = [name for name in KNOWN_EMOTIONS if name in shown]
    people: dict[str, dict[str, list[Entry]]] = {}
    for entry in whole:
        people.setdefault(entry.individual, collections.defaultdict(list))[entry.emotion].append(entry)
    page = template("contact_sheet.html").render(
        title=f"Faces prepared from {prepared['layout']}",
        prepared={name: value for name, value in prepared.items() if value is not None},
        why=why,
        counts=_counts(whole),
        emotions=emotions,
        rows=[(who, [_cell(root, theirs.get(emotion, [])) for emotion in emotions]) for who, theirs in people.items()],
        side=_SIDE,
        looked_for=any(entry.found is not None for entry in whole),
        poor=[e for e in whole if _is_poor(e)][:_MOST_NAMES],
        broken=[e.broken for e in entries if e.broken][:_MOST_NAMES],
        unknown=list(unknown)[:_MOST_NAMES],
        totals={
            "poor": sum(map(_is_poor, whole)),
            "broken": len(entries) - len(whole),
            "unknown": len(unknown),
        },
    )
    write_atomically(root / "report.html", page.encode("utf-8", errors="replace"))


def _counts(whole: Sequence[Entry]) -> dict[str, str]:
    people = len({entry.individual for entry in whole})
    return {"clips": f"{len(whole):,}", "frames": f"{sum(e.frames for e in whole):,}", "individuals": f"{people:,}"}


def _is_poor(entry: Entry) -> bool:
    return entry.found is not None and entry.found < POOR


def _cell(root: Path, entries: Sequence[Entry]) -> dict[str, Any] | None:
    """One face for some clips of an individual and emotion; None where there are none."""
    if not entries:
        return None
    entry = min(entries, key=lambda e: 1.0 if e.found is None else e.found)  # of equals the first
    uri = None
    try:
        face = Image.fromarray(_middle_frame(root, entry))
        face.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        uri = data_uri(webp(face), "webp")
    except (ValueError, OSError) as error:
        log.warning("a prepared clip is damaged: %s; remove it, and the same command prepares it again", error)
    return {
        "uri": uri,
        "file": entry.file,
        "found": None if entry.found is None else f"{entry.found:.0%}",
        "poor": _is_poor(entry),
        "clips": len(entries),
    }


def _middle_frame(root: Path, entry: Entry) -> Any:
    path, number = root / entry.file, entry.frames // 2
    if entry.pts is not None:
        return read_at(path, [number], unpacked_pts(entry.pts, entry.frames))[0]
    return read_picture(path / f"{number:06d}.png" if entry.form == "pictures" else path)
