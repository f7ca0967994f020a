"""What to install when a library the commands need is missing: the package itself needs none of them."""

from __future__ import annotations

LIBRARIES = {
    **dict.fromkeys(("dacite", "jinja2", "matplotlib", "rich", "tensorboard", "torchmetrics", "tyro", "yaml"), "train"),
    "av": "video",
}
"""Modules, and the extra that installs each: pyproject.toml has the versions."""


def missing_library(error: BaseException) -> str | None:
    """A message naming the extra that installs the module that could not be imported; None for other errors."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or name not in LIBRARIES:
        return None
    return f"{name} is not installed; pip install 'pcmecl_fast[{LIBRARIES[name]}]'"
