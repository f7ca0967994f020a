"""Where the files of a folder of faces lie. Without PyTorch, so that a command sees a wrong folder at once."""

from __future__ import annotations

from pathlib import Path

LAYOUT = "<root>/<individual>/<emotion>/<file>"


def check_root(root: Path) -> None:
    """Refuse what is no folder.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is missing or no folder.
    """
    if not root.exists():
        raise FileNotFoundError(f"root: {root} does not exist; it takes a folder laid out as {LAYOUT}")
    if not root.is_dir():
        raise NotADirectoryError(f"root: {root} is a file; it takes a folder laid out as {LAYOUT}")
