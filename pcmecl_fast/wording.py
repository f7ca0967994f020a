"""Parts of messages that many files need."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence


def name_some(names: Sequence[str], limit: int = 10) -> str:
    """The first few names, and how many were left out."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> str:
    """A question with the known names that are closest, or nothing where none is close."""
    close = difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
    return f"did you mean {' or '.join(close)}?" if close else ""


def one_line(error: BaseException) -> str:
    """The kind of an error and its whole message, on one line; of long lists of quoted names, the first."""
    text = " ".join(str(error).split()) or "no message"
    names = re.compile(r'"[^"]+"(?:, "[^"]+"){3,}')
    text = names.sub(lambda found: name_some(found[0].split(", "), 2), text)
    return f"{type(error).__name__}: {text}"
