"""What a layout of raw recordings is: a reader of names that says who shows what in which file.

No layout imports PyTorch or opens a picture, a video or a sound, so that a command sees a wrong folder at once.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from pcmecl_fast.data.emotions import KNOWN_EMOTIONS, emotion_named
from pcmecl_fast.wording import did_you_mean, name_some

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
VIDEOS = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".flv", ".mpg", ".mpeg", ".wmv", ".ts", ".mts", ".3gp", ".ogv"}
)
"""The usual ones of the many containers that PyAV opens."""
SOUNDS = frozenset({".wav", ".m4a", ".aac", ".mp3", ".flac", ".ogg", ".opus"})

_DOCUMENTS = frozenset({".txt", ".md", ".rst", ".pdf", ".csv", ".tsv", ".json", ".xml", ".html", ".yaml", ".yml"})
"""What may lie beside recordings without being one that a layout fails to name."""

_DIGITS = re.compile(r"[0-9]+")


@dataclass(frozen=True, slots=True)
class RawClip:
    """One recording as a data set has it: one person showing one emotion.

    Args:
        individual: who, as the data set names them.
        emotion: a name in `KNOWN_EMOTIONS`.
        name: a file name without a suffix, unique within the individual's clips of the emotion.
        sources: one video, one picture, or several pictures, the frames in order.
        sound: a file with the sound, where it lies apart; None: the sound is the video's own, or there is none.
        level: how strongly the emotion is shown, in the data set's word: "level_3", "strong", "HI".
        view: from where the camera looks, in the data set's word.
        sentence: which sentence is spoken, in the data set's word.
        repetition: which time the same is said, in the data set's word.
        number: the data set's own number of the clip; MEAD has 1 to 40.
        cropped: the frames are faces already, cut out by the data set's own preparation.
        rate: frames a second of a clip given as pictures, where the layout knows it.
    """

    individual: str
    emotion: str
    name: str
    sources: tuple[Path, ...]
    sound: Path | None = None
    level: str | None = None
    view: str | None = None
    sentence: str | None = None
    repetition: str | None = None
    number: int | None = None
    cropped: bool = False
    rate: Fraction | None = None

    @property
    def is_picture(self) -> bool:
        """Whether it is a single picture."""
        return len(self.sources) == 1 and is_picture(self.sources[0])


@dataclass(frozen=True)
class Listing:
    """What a layout found in a folder.

    Attributes:
        clips: by individual and by name in natural order (2 before 10), by emotion in the order of `KNOWN_EMOTIONS`.
        unknown: what the layout cannot name, or would name as it has named another: paths relative to the root, in
            natural order. Of a folder that it cannot name, the folder alone. Hidden names (a leading "." or "__") and
            documents (.txt, .csv, …) are in neither list.
    """

    clips: list[RawClip]
    unknown: list[str]


class Layout(ABC):
    """One data set's way to arrange its recordings in folders. `register` makes it known by its name.

    Attributes:
        name: what a command calls it.
        expects: where the files lie, in a few words.
    """

    name: str
    expects: str

    @abstractmethod
    def evidence(self, root: Path) -> str | None:
        """Why a folder seems to have this layout, with a path in it as an example; None: it does not."""

    @abstractmethod
    def list(self, root: Path) -> Listing:
        """All clips below a folder, by their names alone. Missing people, emotions, levels and clips are normal.

        Raises:
            ValueError: a small text file that the names alone do not replace is missing or damaged.
            OSError: a folder cannot be read.
        """


LAYOUTS: dict[str, Layout] = {}
"""The layouts by name; importing `pcmecl_fast.data.layouts` fills it with those of its folder."""

_Kind = TypeVar("_Kind", bound=type[Layout])


def register(kind: _Kind) -> _Kind:
    """Add a layout to `LAYOUTS`; decorates its class."""
    LAYOUTS[kind.name] = kind()
    return kind


def select(
    clips: Iterable[RawClip],
    individuals: Sequence[str] | None = None,
    emotions: Sequence[str] | None = None,
    views: Sequence[str] | None = None,
    levels: Sequence[str] | None = None,
) -> list[RawClip]:
    """The clips that have one of the values of every list, in their order; None takes all.

    Emotions are known by their usual synonyms, levels also by their number ("3" is "level_3"), and capitals do not
    matter. A neutral clip is of every level: MEAD's has `level_1` alone, RAVDESS's is never strong, CREMA-D's is XX.

    Raises:
        ValueError: a value that no clip has; the message lists those there are.
    """
    clips = list(clips)
    wanted = {"individual": individuals, "emotion": emotions, "view": views, "level": levels}
    # Looked up among all clips: a person who lacks one of the emotions asked for is no mistake.
    values = {field: _values(clips, field, words) for field, words in wanted.items() if words is not None}
    return [clip for clip in clips if all(_has(clip, field, values[field]) for field in values)]


def _has(clip: RawClip, field: str, values: set[str]) -> bool:
    return getattr(clip, field) in values or (field == "level" and clip.emotion == "neutral")


def _values(clips: Sequence[RawClip], field: str, words: Sequence[str]) -> set[str]:
    """The values of a field that are meant by words."""
    if isinstance(words, str):  # itself a sequence of strings, its letters
        raise ValueError(f"{field}s: takes a sequence of names, got {words!r}")
    present = sorted({value for clip in clips if (value := getattr(clip, field)) is not None}, key=natural)
    meant: set[str] = set()
    for word in words:
        name = {"emotion": emotion_named(word), "level": f"level_{word}"}.get(field)
        values = [value for value in present if value.casefold() in (word.casefold(), name)]
        if not values:
            there = f"there are {name_some(present, 30)}" if present else f"these clips have no {field}s"
            close = did_you_mean(word, present)
            raise ValueError(f"{field}s: no clip has {word!r}; {f'{close} ' if close else ''}{there}")
        meant.update(values)
    return meant


# For the layouts


class Gathered:
    """The clips and unknown names of one listing while a layout walks through its folders."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._clips: list[RawClip] = []
        self._unknown: list[str] = []
        self._taken: set[tuple[str, str, str]] = set()

    def is_free(self, individual: str, emotion: str, name: str) -> bool:
        return _identity(individual, emotion, name) not in self._taken

    def add(self, clip: RawClip) -> None:
        """Keep a clip; one whose name is taken, or cannot be a file's, counts as unknown."""
        if any("/" in name or "\\" in name or name in ("", ".", "..") for name in (clip.individual, clip.name)):
            self.cannot_name(*clip.sources)
            return
        identity = _identity(clip.individual, clip.emotion, clip.name)
        if identity in self._taken:
            self.cannot_name(*clip.sources)
        else:
            self._taken.add(identity)
            self._clips.append(clip)

    def cannot_name(self, *paths: Path) -> None:
        self._unknown += [path.relative_to(self._root).as_posix() for path in paths if not is_document(path)]

    def listing(self) -> Listing:
        order = {emotion: place for place, emotion in enumerate(KNOWN_EMOTIONS)}
        clips = sorted(self._clips, key=lambda c: (natural(c.individual), order[c.emotion], natural(c.name)))
        return Listing(clips, sorted(self._unknown, key=natural))


def _identity(individual: str, emotion: str, name: str) -> tuple[str, str, str]:
    # Names that differ only in capitals are the same file on many systems.
    return individual, emotion, name.casefold()


class Entries(NamedTuple):
    """What is in a folder, in natural order and without hidden names."""

    folders: list[Path]
    files: list[Path]


def entries(folder: Path) -> Entries:
    """A folder's content; a folder that is missing is empty."""
    found = Entries([], [])
    for entry in sorted(_visible(folder), key=lambda entry: natural(entry.name)):
        (found.folders if entry.is_dir() else found.files).append(Path(entry.path))
    return found


def folders_of(folder: Path) -> list[Path]:
    """The folders directly in a folder, as in `entries`, but without a look at what may be very many files."""
    return [folder / name for name in sorted((e.name for e in _visible(folder) if e.is_dir()), key=natural)]


def first(folder: Path, accepts: Callable[[str], object]) -> Path | None:
    """The first entry of a folder, in plain order, whose name is accepted: all that `evidence` needs."""
    names = sorted(entry.name for entry in _visible(folder))
    return next((folder / name for name in names if accepts(name)), None)


def sounds_of(folder: Path) -> dict[str, Path]:
    """The sound files directly in a folder by their stems; a folder that is missing has none."""
    return {path.stem: path for path in entries(folder).files if is_sound(path)}


def _visible(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            yield from (entry for entry in found if not is_hidden(entry.name))
    except (FileNotFoundError, NotADirectoryError):
        return


@lru_cache(maxsize=2**16)  # the same names come back in folder after folder
def natural(name: str) -> str:
    """Sort key: numbers by value, letters without regard to capitals; the name itself breaks ties such as 1 and 01."""
    # With its length before it, a number's digits sort as its value does. A text is compared, and kept, at less cost
    # than the list of parts that is usual for this.
    return _DIGITS.sub(_with_length, name.casefold()) + "\0" + name


def _with_length(number: re.Match[str]) -> str:
    digits = number[0].lstrip("0")
    return f"{len(digits):03d}{digits}"


def is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))  # "__" covers __MACOSX and __pycache__


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def is_sound(path: Path) -> bool:
    return path.suffix.lower() in SOUNDS


def is_document(path: Path) -> bool:
    return path.suffix.lower() in _DOCUMENTS
