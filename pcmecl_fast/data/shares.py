"""A data set prepared in shares, by several machines or processes: each has its clips, and an index of its own.

    <out>/<individual>/<emotion>/<clip>.mp4     as ever
    <out>/index-00003-of-00016.jsonl            what is in the clips of the third share of sixteen

Shares may work in one folder at the same time, or each in a folder of its own; these are copied into one afterwards. No
share writes what is another's, and whoever opens the folder reads all indices as one.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from pcmecl_fast.data.index import INDEX, Entry, read_index
from pcmecl_fast.options import named_differences
from pcmecl_fast.wording import listed, name_some

_NAME = re.compile(r"index-(\d{5})-of-(\d{5})\.jsonl")
_MOST = 99_999
_OWN = ("finished", "list", "data")  # of a share's head: what need not be said of the whole


@dataclass(frozen=True, order=True)
class Share:
    """One of equal parts of a list of recordings; `number` counts from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Share:
        """What `--share 3/16` says; ValueError where it says nothing of the kind."""
        found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
        share = cls(*map(int, found.groups())) if found else None
        if share is None or not 1 <= share.number <= share.of <= _MOST:
            raise ValueError(f"--share: takes a share and how many there are, 1/16 to 16/16, got {text!r}")
        return share

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def index(self) -> str:
        """The name of its index."""
        return f"index-{self.number:05d}-of-{self.of:05d}.jsonl"

    def __call__(self, sizes: Sequence[int]) -> range:
        """Which of a list's recordings are this share's: in a row, and about as many bytes as any other's.

        Args:
            sizes: of the recordings, in bytes.
        """
        costs = [size + 1 for size in sizes]  # opening a recording costs, too
        twice = 2 * sum(costs)
        # A recording belongs to the share in which its middle lies.
        owners = [(2 * end - cost) * self.of // twice for cost, end in zip(costs, accumulate(costs), strict=True)]
        return range(bisect_left(owners, self.number - 1), bisect_right(owners, self.number - 1))


def list_hash(files: Iterable[str], sizes: Iterable[int]) -> str:
    """What the shares of a list have in common, in 16 letters: where it differs, they leave gaps."""
    digest = hashlib.blake2b(digest_size=8)
    for file, size in zip(files, sizes, strict=True):
        digest.update(f"{file}\0{size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def shares_in(root: Path) -> list[Share]:
    """The shares whose indices a folder holds, in order."""
    found = (_NAME.fullmatch(path.name) for path in root.glob("index-*.jsonl"))
    return sorted(Share(int(name[1]), int(name[2])) for name in found if name)


@dataclass
class FolderIndex:
    """What a folder's index says, or those of its shares as one.

    Attributes:
        prepared: what `prepare` was given; None where a folder is somebody's own.
        entries: one after the other.
        in_order: whether they come in the order of `in_order`.
        left: what has not been prepared yet, and the way to have it; empty where all has.
    """

    prepared: dict[str, Any] | None
    entries: Iterator[Entry]
    in_order: bool
    left: str


def read_folder(root: Path) -> FolderIndex | None:
    """The index of a folder, or of its shares; None where it has none.

    Raises:
        ValueError: an index is damaged; shares that are not of one data set.
    """
    shares = shares_in(root)
    if shares:
        return _read_shares(root, shares)
    if not (root / INDEX).is_file():
        return None
    prepared, entries = read_index(root / INDEX)
    finished = bool((prepared or {}).get("finished"))
    left = "" if finished else "not all of it has been prepared yet; the same `pcmecl-fast prepare` goes on"
    return FolderIndex(prepared, entries, finished, left)


def entries_of_shares(root: Path, shares: Iterable[Share]) -> Iterator[Entry]:
    """The clips of some shares, each once."""
    seen: set[str] = set()
    for share in shares:
        for entry in read_index(root / share.index)[1]:
            if entry.file not in seen:  # a clip that another share had before the list changed
                seen.add(entry.file)
                yield entry


def _read_shares(root: Path, shares: list[Share]) -> FolderIndex:
    if (root / INDEX).is_file():
        raise ValueError(f"root: {root} holds {INDEX} and {shares[0].index}: prepared at once, and in shares; keep one")
    totals = sorted({share.of for share in shares})
    if len(totals) > 1:
        raise ValueError(
            f"root: {root} holds shares of {listed([str(total) for total in totals])}: they overlap; keep the indices "
            f"of one number of shares (index-*-of-{totals[-1]:05d}.jsonl), and remove the others"
        )
    heads = [read_index(root / share.index)[0] or {} for share in shares]
    _check_same(root, shares, heads)
    absent = sorted({*range(1, totals[0] + 1)} - {share.number for share in shares})
    unfinished = [share.number for share, head in zip(shares, heads, strict=True) if not head.get("finished")]
    left = [_told(absent, totals[0], "missing"), _told(unfinished, totals[0], "not finished")]
    some = (absent + unfinished)[:1]
    way = f"`pcmecl-fast prepare --share {some[0]}/{totals[0]}` goes on with the first" if some else ""
    prepared = heads[0] | {"finished": not some}
    return FolderIndex(
        {key: value for key, value in prepared.items() if key != "list"},
        entries_of_shares(root, shares),
        in_order=False,
        left="; ".join(filter(None, (*left, way))),
    )


def _check_same(root: Path, shares: list[Share], heads: list[dict[str, Any]]) -> None:
    """Refuse shares that are not of one list of recordings, or were not prepared alike."""
    first, *others = ({key: value for key, value in head.items() if key not in _OWN} for head in heads)
    for share, head, other in zip(shares[1:], heads[1:], others, strict=True):
        if differing := named_differences(first, other):
            raise ValueError(
                f"root: {root}: shares {shares[0]} and {share} were prepared with other options: {differing}; "
                "--overwrite prepares one of them again"
            )
        if head.get("list") != heads[0].get("list"):
            raise ValueError(
                f"root: {root}: shares {shares[0]} and {share} are of different lists of recordings, and may leave "
                "some out; run every share again on the same recordings: what is done is kept"
            )


def _told(numbers: Sequence[int], of: int, what: str) -> str:
    """Shares 4 and 7 of 16 are missing."""
    if not numbers:
        return ""
    names = [str(number) for number in numbers]
    some = listed(names) if len(names) <= 10 else name_some(names, 10)
    return f"share{'s' if len(names) > 1 else ''} {some} of {of} {'are' if len(names) > 1 else 'is'} {what}"
