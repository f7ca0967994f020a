"""csrc/cuda compiled by the C++ compiler with its host harness: the same kernels, run on CPU tensors.

`load()` gives the operators that every operator's tests run on: the drivers of the backend "cuda", on the module that
is compiled here. `load(checked=True)` gives the same operators with every access to memory watched: races, conflicts
between blocks, misalignment, bounds and memory that nothing has written, which the outputs must not be
(csrc/cuda/host/shadow.cpp). Objects are built once for the sources, into build/ beside them; shadow.cpp, which alone
includes PyTorch to stand in for its allocator, for the torch at hand, too.
"""

import ctypes
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import get_ident
from types import ModuleType
from typing import Any

import pybind11
import torch
from torch import Tensor
from torch.utils import deterministic
from torch.utils.cpp_extension import include_paths, library_paths

from pcmecl_fast.ops.backends.cuda import Operators

NAME = "pcmecl_cuda_on_host"
ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / NAME
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
HOST, SHADOW = CSRC / "cuda/host", CSRC / "cuda/host/shadow.cpp"
OTHERS = [*sorted((CSRC / "cuda").glob("*.cpp")), HOST / "harness.cpp", HOST / "tensor_cores.cpp"]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
FLAGS += ["-march=native", "-ffp-contract=fast"]  # products fused into additions, as on a GPU
FLAGS += ["-DPCMECL_ON_HOST", f"-DPCMECL_MODULE={NAME}"]
INCLUDES = [f"-I{folder}" for folder in (pybind11.get_include(), sysconfig.get_path("include"))]
# Every access calls a function, and one of 16 bytes stays one; lines for reports.
WATCHED = ["-fsanitize=thread", "-fno-tree-sra", "-g1"]


def compiler() -> str | None:
    """The C++ compiler, or None if there is none or the sources are missing."""
    command = shlex.split(os.environ.get("CXX", "c++"))[0]
    return command if KERNELS and shutil.which(command) else None


def checks_accesses() -> bool:
    """Whether `load(checked=True)` works: shadow.cpp answers the calls that GCC inserts."""
    if not compiler():
        return False
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout
    return "Free Software Foundation" in version


def load(*, checked: bool = False) -> Any:
    """The operators."""
    sources = [(source, checked) for source in KERNELS] + [(source, False) for source in OTHERS]
    sources += [(SHADOW, False)] if checked else []
    with compilers() as pool:
        path = link(list(pool.map(compiled, *zip(*sources, strict=True))))
    return Checked(path) if checked else Operators(import_from(path))


def load_with(kernels: Sequence[Path]) -> "Checked":
    """The checked module with other kernels in place of the files of the same names; what they lack stays as it is."""
    unchanged = [compiled(source, True) for source in KERNELS] + [compiled(source) for source in [*OTHERS, SHADOW]]
    return Checked(link([*[compiled(source, True) for source in kernels], *unchanged]))


class Checked:
    """The operators of a watched module. A report is a RuntimeError."""

    def __init__(self, path: Path) -> None:
        self._operators = Operators(import_from(path))
        self._checks = ctypes.CDLL(str(path))

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        return partial(self._call, getattr(self._operators, operator))

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        fills = deterministic.fill_uninitialized_memory
        deterministic.fill_uninitialized_memory = False  # it would hide what is never written
        self._checks.pcmecl_begin_checks()
        try:
            results = function(*[self._copy(i, x) if isinstance(x, Tensor) else x for i, x in enumerate(arguments)])
        finally:
            self._checks.pcmecl_end_checks()
            deterministic.fill_uninitialized_memory = fills
        for number, result in enumerate(results if isinstance(results, (list, tuple)) else [results]):
            if result is not None:
                _require_written(result, f"result {number} of {function.__name__}")
        return results

    def _copy(self, number: int, x: Tensor) -> Tensor:
        """An argument where its bounds are known, as much aligned as it was."""
        self._checks.pcmecl_name_next(f"argument {number}".encode(), ctypes.c_size_t(x.data_ptr() % 64))
        return torch.empty_like(x).copy_(x)


def _require_written(x: Tensor, name: str) -> None:
    raw = x.reshape(-1).view(torch.uint8).view(-1, x.element_size())
    unwritten = (raw == 0xFF).all(1).nonzero()
    if len(unwritten):
        first = int(unwritten[0])
        raise RuntimeError(
            f"host harness: output not written: {len(unwritten)} of {len(raw)} numbers of {name}, the first at {first}"
        )


def compilers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)))


def compiled(source: Path, watched: bool = False) -> Path:
    """The object of a source file, which finds its headers from where it lies; `watched` if its accesses are."""
    flags = [*FLAGS, *(WATCHED if watched else ["-g0"]), *INCLUDES]
    if source.name == SHADOW.name:
        flags += [*(f"-I{folder}" for folder in include_paths()), "-std=c++20", f'-DTORCH="{torch.__version__}"']
    content = hashlib.sha256(str(flags).encode())
    for path in [source, *sorted(source.parents[1].rglob("*.h"))]:
        content.update(path.read_bytes())
    target = BUILD / f"{source.name}-{content.hexdigest()[:12]}.o"
    return _made(target, *flags, "-x", "c++", "-c", source)


def link(objects: Sequence[Path]) -> Path:
    """The shared library of the objects; of a function that several have, the first is taken."""
    target = BUILD / f"{NAME}-{hashlib.sha256(str(objects).encode()).hexdigest()[:12]}.so"
    libraries = [f"-L{folder}" for folder in library_paths()] + ["-Wl,--as-needed", "-lc10"]  # for shadow.cpp
    return _made(target, "-shared", "-Wl,-z,muldefs", *objects, *libraries)


def import_from(path: Path) -> ModuleType:
    # pybind11 keeps modules by their full name, Python finds the module's entry by the part after the last dot.
    spec = importlib.util.spec_from_file_location(f"{path.stem}.{NAME}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _made(target: Path, *arguments: object) -> Path:
    """`target`, made by the compiler unless it exists."""
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}-{get_ident()}")
        command = [str(word) for word in (compiler(), *arguments, "-o", unfinished)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"the host harness of csrc/cuda does not compile:\n{result.stderr[-4000:]}")
        unfinished.replace(target)
    return target
