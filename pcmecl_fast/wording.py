"""Parts of messages that many files need."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def name_some(names: Sequence[str], limit: int = 10) -> str:
    """The first few names, and how many were left out."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> str:
    """A question with the known names that are closest, or nothing where none is close."""
    close = difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
    return f"did you mean {' or '.join(close)}?" if close else ""
