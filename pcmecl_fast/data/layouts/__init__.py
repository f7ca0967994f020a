"""Raw recordings as data sets have them on disk: which file shows whom with which emotion, read off the names.

Each data set is one file of this folder, found by itself: a subclass of `Layout`, decorated with `register`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from pcmecl_fast.data.layout import check_root
from pcmecl_fast.data.layouts.base import LAYOUTS, Layout, Listing, RawClip, register, select
from pcmecl_fast.wording import did_you_mean, listed

__all__ = ["LAYOUTS", "Layout", "Listing", "RawClip", "find_layout", "register", "select"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def find_layout(root: str | Path, name: str = "auto") -> tuple[Layout, str]:
    """The layout of a folder, and why, in a sentence with a path as an example.

    Args:
        root: a folder of raw recordings.
        name: a name in `LAYOUTS`, or "auto": the one that has evidence in the folder.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is missing or no folder.
        ValueError: an unknown name; or no layout, or more than one, has evidence.
    """
    root = Path(root)
    if name != "auto" and name not in LAYOUTS:
        close = did_you_mean(name.lower(), LAYOUTS)
        raise ValueError(
            f"layout: no layout is named {name!r}; {f'{close} ' if close else ''}known: auto, {', '.join(LAYOUTS)}"
        )
    check_root(root, raw=True)
    if name != "auto":
        layout = LAYOUTS[name]
        return layout, layout.evidence(root) or f"as asked for, though nothing in {root} lies as {layout.expects}"

    seen = {name: why for name, layout in LAYOUTS.items() if (why := layout.evidence(root)) is not None}
    if len(seen) == 1:
        [(name, why)] = seen.items()
        return LAYOUTS[name], why
    every = "; ".join(f"{name} expects {layout.expects}" for name, layout in LAYOUTS.items())
    if seen:
        both = listed([f"{name} ({why})" for name, why in seen.items()])
        raise ValueError(f"root: {root} could be {both}; name the layout, or pass the folder of one of them. {every}")
    raise ValueError(f"root: {root} has no layout known here. {every}")
