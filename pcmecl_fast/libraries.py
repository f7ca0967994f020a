"""Libraries that are installed, and what to install when one that the commands need is missing."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

LIBRARIES = {
    **dict.fromkeys(("dacite", "jinja2", "matplotlib", "rich", "tensorboard", "torchmetrics", "tyro", "yaml"), "train"),
    "av": "video",
    "h5py": "metrics",
    **dict.fromkeys(("dlib", "face_recognition_models"), "faces"),
}
"""Modules, and the extra that installs each: pyproject.toml has the versions."""


def missing_library(error: BaseException) -> str | None:
    """A message naming the extra that installs the module that could not be imported; None for other errors."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or name not in LIBRARIES:
        return None
    return f"{name} is not installed; pip install 'pcmecl_fast[{LIBRARIES[name]}]'"


def installed_version(package: str) -> str:
    """An installed package's version, or words that say it is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"
