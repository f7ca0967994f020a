"""Progress bars: tqdm's, and a way to leave one out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(over: Iterable[Any] | None = None, *, quiet: bool, **options: Any) -> tqdm[Any]:
    """`tqdm(over, …)`, hidden where `quiet`; elsewhere TQDM_DISABLE decides, which `disable=False` would overrule."""
    if quiet:
        options["disable"] = True
    return tqdm(over, **options)
