"""The compiled extension, `pcmecl_fast._C`: loaded if it is there and was built with this torch, explained if not.

One that was built with another torch does not load, or worse, does. So the version is read from the file beforehand.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import mmap
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

NAME = "pcmecl_fast._C"
REBUILD = "`make build` in the clone, or pip install --no-build-isolation --no-deps --force-reinstall ."

logger = logging.getLogger("pcmecl_fast")


@cache
def load() -> ModuleType | str:
    """The extension, or why there is none and how to get it; said once in the log."""
    found = _load(_path(), torch.__version__)
    if isinstance(found, str):
        logger.warning("pcmecl_fast runs without its compiled extension: %s", found)
    return found


def _path() -> Path | None:
    spec = importlib.util.find_spec(NAME)
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _load(path: Path | None, version: str) -> ModuleType | str:
    if path is None:
        return (
            "it was not built (no C++ compiler when the package was installed, or PCMECL_EXTENSION=0); "
            f"with one at hand: {REBUILD}"
        )
    built_with = _built_with(path)
    if built_with != version:
        return f"{path.name} was built with torch {built_with}, this is torch {version}; rebuild it: {REBUILD}"
    try:
        return importlib.import_module(NAME)
    except ImportError as error:
        return f"{path.name} does not load ({error}); rebuild it: {REBUILD}"


def _built_with(path: Path) -> str:
    """The torch version that bindings.cpp left in the file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        mark = re.search(rb"pcmecl_fast built with torch ([^;\0]+);", content)
        return mark[1].decode() if mark else "of an unknown version"
