"""Where the files of a folder of faces lie. Without PyTorch, so that a command sees a wrong folder at once."""

from __future__ import annotations

from pathlib import Path

LAYOUT = "<root>/<individual>/<emotion>/<file>"


def check_root(root: Path, *, raw: bool = False) -> None:
    """Refuse what is no folder; `raw`: one of recordings, laid out in any way.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is missing or no folder.
    """
    takes = "it takes a folder of recordings" if raw else f"it takes a folder laid out as {LAYOUT}"
    if not root.exists():
        raise FileNotFoundError(f"root: {root} does not exist; {takes}")
    if not root.is_dir():
        raise NotADirectoryError(f"root: {root} is a file; {takes}")
