"""Faces cut out and numbered by NED's preparation, with the list of frames that SSERD and SCMCL add to it."""

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
    folders_of,
    is_picture,
    register,
)
from pcmecl_fast.wording import name_some

IMAGES, FRAMES = "images", "videos/_frame_info.txt"

_NUMBER = re.compile(r"\d{6,}")
_NUMBERED = re.compile(r"\d{6,}(\.png)?", re.IGNORECASE)
_LINE = re.compile(r"(?P<clip>.+)_(?P<frame>\d+)\s+(?P<number>\d+)")


@register
class Ned(Layout):
    """One actor's folder, or the parent of several.

    The face number g is `images/{g//50:06d}/{g:06d}.png` (training) or `images/{g:06d}.png` (test), g running over all
    videos; a line `<video>_<frame> <g>` of `videos/_frame_info.txt` says which frame it is, and the video's name up to
    its first "_" is the emotion.
    """

    name = "ned"
    expects = (
        f"{IMAGES}/000000/000000.png or {IMAGES}/000000.png with {FRAMES}, in the root or in folders of individuals"
    )

    def evidence(self, root: Path) -> str | None:
        for actor in _actors(root):
            if found := first(actor / IMAGES, _NUMBERED.fullmatch):
                return f"{found.relative_to(root).as_posix()} is numbered as NED numbers its prepared faces"
        return None

    def list(self, root: Path) -> Listing:
        """As `Layout.list`.

        Raises:
            ValueError: an actor lacks `videos/_frame_info.txt`, without which the emotions are unknown.
        """
        actors = _actors(root)
        if without := [actor for actor in actors if not (actor / FRAMES).is_file()]:
            raise ValueError(
                f"root: there is no {name_some([str(actor / FRAMES) for actor in without], 3)}, and NED's preparation "
                "itself keeps no emotions; the layout needs this file with a line <emotion>_…_<frame> <image's number> "
                "for every image, as SSERD and SCMCL write it"
            )
        gathered = Gathered(root)
        for actor in actors:
            _list_actor(gathered, actor, root.resolve().name if actor == root else actor.name)
        if root not in actors:
            folders, files = entries(root)
            gathered.cannot_name(*(folder for folder in folders if folder not in actors), *files)
        return gathered.listing()


def _actors(root: Path) -> list[Path]:
    if (root / IMAGES).is_dir():
        return [root]
    return [folder for folder in folders_of(root) if (folder / IMAGES).is_dir()]


def _list_actor(gathered: Gathered, actor: Path, individual: str) -> None:
    images = _images(gathered, actor / IMAGES)
    clips: dict[str, list[tuple[int, Path]]] = {}  # frames of each video; those without an image are gaps
    for line in (actor / FRAMES).read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        parts = _LINE.fullmatch(line.strip())
        if parts and (image := images.pop(int(parts["number"]), None)):
            clips.setdefault(parts["clip"], []).append((int(parts["frame"]), image))
    gathered.cannot_name(*images.values())
    for name, frames in clips.items():
        emotion = emotion_named(name.partition("_")[0])
        sources = tuple(image for _, image in sorted(frames))
        if emotion is None:
            gathered.cannot_name(*sources)
        else:
            gathered.add(RawClip(individual, emotion, name, sources, cropped=True))


def _images(gathered: Gathered, folder: Path) -> dict[int, Path]:
    """The numbered pictures of both forms: in the folder itself, and in numbered folders of it."""
    folders, files = entries(folder)
    for inner in folders:
        if _NUMBER.fullmatch(inner.name):
            deeper, more = entries(inner)
            gathered.cannot_name(*deeper)
            files += more
        else:
            gathered.cannot_name(inner)
    images: dict[int, Path] = {}
    for file in files:
        if not (is_picture(file) and _NUMBER.fullmatch(file.stem)) or images.setdefault(int(file.stem), file) != file:
            gathered.cannot_name(file)
    return images
