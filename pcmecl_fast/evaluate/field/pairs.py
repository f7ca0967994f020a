"""Which reference an edited clip is compared with: its recording frame by frame, and real faces of what it shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pcmecl_fast.data.layouts.base import is_video
from pcmecl_fast.evaluate.field.clips import FaceClip, Listing, list_clips, sounds_of
from pcmecl_fast.wording import name_some

Group = tuple[str, str | None]
"""An individual and an emotion."""


@dataclass(frozen=True)
class Pair:
    """An edited clip with what it is compared with.

    Attributes:
        edited: the clip.
        recording: the reference's clip of the same recording, to be compared frame by frame.
        why: why there is none; "" where there is.
        group: of the reference's clips, the individual and the emotion that are real faces of what the edit shows.
        why_not: why there is no such group.
        sounds: the files that may have its sound, the first that has any being taken.
    """

    edited: FaceClip
    recording: FaceClip | None
    why: str
    group: Group | None
    why_not: str
    sounds: tuple[Path, ...]


@dataclass
class Pairing:
    """Two folders paired.

    Attributes:
        pairs: one for each edited clip, in order.
        groups: the reference's clips by individual and emotion, as far as an edit is compared with them.
        unused: the reference's clips that nothing is compared with.
        left_out: what of either folder is no clip: path, and why.
    """

    pairs: list[Pair]
    groups: dict[Group, list[FaceClip]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def pair_up(edited: Path, reference: Path, sound: Path | None = None) -> Pairing:
    """Pair the clips of two folders by their names.

    A clip's recording is the reference's clip of the same individual and name, and of the emotion that it had before
    the edit; where names do not tell that one, of the emotion that it shows; else the neutral one. The group of
    real faces that it is compared with is the individual's clips of the emotion that it shows, or where the names of
    the reference tell no emotions of this individual, all.

    Raises:
        ValueError: a folder without clips, or two folders of which nothing pairs; the message names some of each.
        OSError: a folder cannot be read.
    """
    ours, theirs = list_clips(edited), list_clips(reference)
    people = ours.people | theirs.people
    ours, theirs = list_clips(edited, people), list_clips(reference, people)
    for option, root, listing in (("edited", edited, ours), ("reference", reference, theirs)):
        if not listing.clips:
            why = f" ({name_some([f'{k}: {v}' for k, v in listing.left_out.items()], 3)})" if listing.left_out else ""
            raise ValueError(f"{option}: {root} contains no video and no picture{why}")
    finder = _Finder(theirs.clips, [] if sound is None else sounds_of(sound))
    pairs = [finder.pair(clip) for clip in ours.clips]
    if all(pair.recording is None and pair.group is None for pair in pairs):
        raise ValueError(
            f"reference: nothing in {reference} pairs with {edited} by its name: there "
            f"{name_some([clip.file for clip in theirs.clips], 3)}, here {name_some([c.file for c in ours.clips], 3)}; "
            "both take <individual>/<emotion>/<clip>, or the names that `pcmecl-fast edit` writes"
        )
    groups = {pair.group: finder.groups[pair.group] for pair in pairs if pair.group is not None}
    used = {clip.file for of in groups.values() for clip in of} | {p.recording.file for p in pairs if p.recording}
    unused = [clip.file for clip in theirs.clips if clip.file not in used]
    return Pairing(pairs, groups, unused, _left_out(edited, ours) | _left_out(reference, theirs))


def _left_out(root: Path, listing: Listing) -> dict[str, str]:
    return {str(root / file): why for file, why in listing.left_out.items()}


class _Finder:
    """What belongs to an edited clip."""

    def __init__(self, references: Sequence[FaceClip], sounds: Iterable[FaceClip]) -> None:
        self.groups: dict[Group, list[FaceClip]] = defaultdict(list)
        self._named: dict[tuple[str, str], list[FaceClip]] = defaultdict(list)
        for clip in references:
            self.groups[clip.individual, clip.emotion].append(clip)
            self._named[clip.individual, clip.name].append(clip)
        self._people = {clip.individual for clip in references}
        self._sounds: dict[tuple[str, str], list[FaceClip]] = defaultdict(list)
        for clip in sounds:
            for key in {(clip.individual, clip.name), ("", clip.name)}:
                self._sounds[key].append(clip)

    def pair(self, edited: FaceClip) -> Pair:
        recording, why = self._recording(edited)
        group, why_not = self._group(edited)
        return Pair(edited, recording, why, group, why_not, self._sounds_of(edited, recording))

    def _recording(self, edited: FaceClip) -> tuple[FaceClip | None, str]:
        found = self._named.get((edited.individual, edited.name), [])
        if not found:
            of = f" of {edited.individual}" if edited.individual else ""
            return None, f"the reference has no recording {edited.name or 'without a name'!r}{of}"
        best = _best(edited, found)
        if best is None:
            return None, f"the reference has {name_some([c.file for c in found], 3)}, and no name says that it is that"
        return best, ""

    def _group(self, edited: FaceClip) -> tuple[Group | None, str]:
        who = edited.individual
        if who not in self._people:
            return None, f"the reference has no clip of {who or 'a person without a name'}"
        if edited.emotion is None:
            return None, "no name says which emotion it shows, or it shows several"
        if (who, edited.emotion) in self.groups:
            return (who, edited.emotion), ""
        if {emotion for person, emotion in self.groups if person == who} == {None}:
            return (who, None), ""
        return None, f"the reference has no {edited.emotion} clip of {who or 'this person'}"

    def _sounds_of(self, edited: FaceClip, recording: FaceClip | None) -> tuple[Path, ...]:
        """What --sound has for it, else what lies beside the clip or in it, else its recording's."""
        found = self._sounds.get((edited.individual, edited.name)) or self._sounds.get(("", edited.name), [])
        best = _best(edited, found) if found else None
        files = list(best.sources) if best is not None else []
        for clip in filter(None, (edited, recording)):
            files += [clip.sound] if clip.sound is not None else []
            files += clip.sources if is_video(clip.sources[0]) else ()
        return tuple(files)


def _best(edited: FaceClip, found: Sequence[FaceClip]) -> FaceClip | None:
    """Of clips of the same individual and name, the one that was edited; None where names do not tell it.

    Clips of two emotions may have one name, as MEAD's numbers, and be different recordings all the same. Only a
    neutral one, from which edits usually start, and one whose names tell no emotion are taken for the edited one.
    """
    known = [emotion for emotion in (edited.was, edited.emotion) if emotion is not None]
    for emotion in (*known, "neutral", None):
        of = [clip for clip in found if clip.emotion == emotion]
        if len(of) == 1:
            return of[0]
    return found[0] if len(found) == 1 and not known else None
