"""The compiled extensions: loaded if they exist and were built with this torch, explained if not.

`pcmecl_fast._C` holds the CPU kernels, `pcmecl_fast._C_cuda` the GPU's: separate, so the first does not need CUDA.

An extension built with another torch fails to load or, worse, loads. So its version is read from the file beforehand.
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

from pcmecl_fast.ops.operator import Backend, Limits, Operator

NAME, CUDA_NAME = "pcmecl_fast._C", "pcmecl_fast._C_cuda"
PACKAGE = Path(__file__).parents[2]
REBUILD = "`make build` in the clone, or pip install --no-build-isolation --no-deps --force-reinstall ."

NOT_BUILT = (
    "it was not built (no C++ compiler when the package was installed, or PCMECL_EXTENSION=0); with one at hand: "
)
CUDA_NOT_BUILT = (
    "it was not built (no nvcc or a torch without CUDA when the package was installed, or PCMECL_CUDA=0); "
    "with both at hand: PCMECL_CUDA=1 "
)

logger = logging.getLogger("pcmecl_fast")


@cache
def load() -> ModuleType | str:
    """The CPU extension, or why there is none and how to get it, which is also logged once."""
    found = _load(_path(), torch.__version__)
    if isinstance(found, str):
        logger.warning("pcmecl_fast runs without its compiled extension: %s", found)
    return found


@cache
def load_cuda() -> ModuleType | str:
    """The GPU extension, or why there is none and how to get it. It loads on a machine without a GPU."""
    return _load(_path(CUDA_NAME), torch.__version__, CUDA_NAME, CUDA_NOT_BUILT)


def add(
    backend: Backend,
    operator: Operator,
    module: ModuleType,
    limits: Limits | None,
    *,
    checks_values_on: tuple[str, ...] = (),
) -> None:
    """Add an operator's functions, which the module has under its name (csrc/common/binding.h)."""
    forward, backward = (getattr(module, operator.name + way) for way in ("", "_backward"))
    differentiable = getattr(module, f"{operator.name}_differentiable", None)
    backend.add(operator, forward, backward, limits, checks_values_on, differentiable)


def add_rectangle(backend: Backend, operator: Operator, module: ModuleType) -> None:
    """Add the parts that ranks compute of an operator: `<first word of its name>_rectangle_sums` and `_gradients`."""
    name = operator.name.removesuffix("_loss")
    backend.add_rectangle(operator, *(getattr(module, f"{name}_rectangle_{what}") for what in ("sums", "gradients")))


def _path(name: str = NAME) -> Path | None:
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _load(path: Path | None, version: str, name: str = NAME, not_built: str = NOT_BUILT) -> ModuleType | str:
    if path is None:
        if (PACKAGE.parent / "setup.py").is_file() and _path() is None:
            return (
                f"pcmecl_fast is imported from the source tree {PACKAGE.parent}, where it is not built: `make build` "
                "there, or run from another folder"
            )
        why = _recorded(name)
        return not_built + REBUILD if why is None else f"it was not built, because {why}; then {REBUILD}"
    built_with = _built_with(path)
    if built_with != version:
        return f"{path.name} was built with torch {built_with}, this is torch {version}; rebuild it: {REBUILD}"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return f"{path.name} does not load ({error}); rebuild it: {REBUILD}"


def _recorded(name: str) -> str | None:
    """Why the extension was not built, as setup.py left it in an installed package."""
    path = PACKAGE / f"{name.rpartition('.')[2]}.not-built"
    return path.read_text().strip() if path.is_file() else None


def _built_with(path: Path) -> str:
    """The torch version that bindings.cpp embeds in the file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        mark = re.search(rb"pcmecl_fast built with torch ([^;\0]+);", content)
        return mark[1].decode() if mark else "of an unknown version"
