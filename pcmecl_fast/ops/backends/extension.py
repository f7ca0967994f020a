"""The compiled extensions: loaded if they exist, explained if not.

`pcmecl_fast._C` holds the CPU kernels, `pcmecl_fast._C_cuda` the GPU's: separate, so the first does not need CUDA. They
know nothing of PyTorch, and fit every version of it; it is imported before them, so that they share its OpenMP threads.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401 - before the extensions, so that its OpenMP is theirs

from pcmecl_fast.ops.backends.native import Driver
from pcmecl_fast.ops.operator import Backend, Limits, Operator

NAME, CUDA_NAME = "pcmecl_fast._C", "pcmecl_fast._C_cuda"
INTERFACE = 4  # as csrc/common/binding.h has it
PACKAGE = Path(__file__).parents[2]
REBUILD = "`make build` in the clone, or pip install --no-deps --force-reinstall ."

NOT_BUILT = (
    "it was not built (no C++ compiler when the package was installed, or PCMECL_EXTENSION=0); with one at hand: "
)
CUDA_NOT_BUILT = (
    "it was not built (no nvcc when the package was installed, or PCMECL_CUDA=0); with one at hand: PCMECL_CUDA=1 "
)

logger = logging.getLogger("pcmecl_fast")


@cache
def load() -> ModuleType | str:
    """The CPU extension, or why there is none and how to get it, which is also logged once."""
    found = _load(_path())
    if isinstance(found, str):
        logger.warning("pcmecl_fast runs without its compiled extension: %s", found)
    return found


@cache
def load_cuda() -> ModuleType | str:
    """The GPU extension, or why there is none and how to get it. It loads on a machine without a GPU."""
    return _load(_path(CUDA_NAME), CUDA_NAME, CUDA_NOT_BUILT)


def add(
    backend: Backend,
    operators: Driver,
    operator: Operator,
    limits: Limits | None,
    *,
    checks_values_on: tuple[str, ...] = (),
) -> None:
    """Add an operator's functions, which `operators` has under its name."""
    forward, backward = (getattr(operators, operator.name + way) for way in ("", "_backward"))
    at_once = getattr(operators, f"{operator.name}_and_gradients", None)
    backend.add(operator, forward, backward, limits, checks_values_on, at_once)


def add_rectangle(backend: Backend, operators: Driver, operator: Operator) -> None:
    """Add the parts that ranks compute of an operator: `<first word of its name>_rectangle_sums` and `_gradients`."""
    name = operator.name.removesuffix("_loss")
    backend.add_rectangle(operator, *(getattr(operators, f"{name}_rectangle_{what}") for what in ("sums", "gradients")))


def _path(name: str = NAME) -> Path | None:
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _load(path: Path | None, name: str = NAME, not_built: str = NOT_BUILT) -> ModuleType | str:
    if path is None:
        if (PACKAGE.parent / "setup.py").is_file() and _path() is None:
            return (
                f"pcmecl_fast is imported from the source tree {PACKAGE.parent}, where it is not built: `make build` "
                "there, or run from another folder"
            )
        why = _recorded(name)
        return not_built + REBUILD if why is None else f"it was not built, because {why}; then {REBUILD}"
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return f"{path.name} does not load ({error}); rebuild it: {REBUILD}"
    if getattr(module, "interface", None) != INTERFACE:
        return f"{path.name} was built for another version of pcmecl_fast; rebuild it: {REBUILD}"
    return module


def _recorded(name: str) -> str | None:
    """Why the extension was not built, as setup.py left it in an installed package."""
    path = PACKAGE / f"{name.rpartition('.')[2]}.not-built"
    return path.read_text().strip() if path.is_file() else None
