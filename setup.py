"""Builds the package. All metadata is in pyproject.toml; this file builds the compiled extension, pcmecl_fast._C.

Environment variables read here:

    PCMECL_EXTENSION  auto (default): build it where there is a C++ compiler, else install without it and say so.
                      1: a build that fails is an error.  0: do not build it.
    MAX_JOBS          compilers that ninja starts at once.
    CXX               the compiler.

The extension is compiled against the torch that is installed (hence pip's --no-build-isolation), for any processor of
the machine's architecture: AVX2 and AVX-512 lie beside the baseline and are chosen at run time (csrc/cpu/kernels.cpp).
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

SOURCES = ["csrc/bindings.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
FLAGS = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas"]


def extension() -> dict[str, Any]:
    """The arguments of `setup` that build the extension, or none."""
    asked = os.environ.get("PCMECL_EXTENSION", "auto")
    if asked not in ("auto", "0", "1"):
        raise SystemExit(f"PCMECL_EXTENSION: got {asked!r}; takes auto, 0 or 1")
    if asked == "0":
        return {}
    missing = _missing()
    if missing is not None:
        if asked == "1":
            raise SystemExit(f"pcmecl_fast: the extension cannot be built: {missing}")
        _say(missing)
        return {}
    return _buildable(optional=asked == "auto")


def _missing() -> str | None:
    """Why there is nothing to build with."""
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported ({error}); install it first and use pip's --no-build-isolation"
    if sys.platform != "win32" and shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]) is None:
        return "there is no C++ compiler (c++, or what CXX names); on Debian: apt install g++"
    if sys.platform == "win32":
        return "it is written for GCC and Clang"
    return None


def _buildable(*, optional: bool) -> dict[str, Any]:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if not optional:
                    raise
                self.extensions.clear()  # nothing was built, so there is nothing to copy beside the sources
                _say(f"the compiler failed: {error}")

    version = f'-DPCMECL_TORCH_VERSION="{torch.__version__}"'
    module = CppExtension(
        "pcmecl_fast._C",
        SOURCES,
        depends=[str(path) for path in Path("csrc").rglob("*.h")],
        extra_compile_args=[*FLAGS, version],
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


def _say(why: str) -> None:
    print(f"pcmecl_fast: installed without its compiled extension, because {why}.", file=sys.stderr)
    print("pcmecl_fast: everything works, on the reference backend; `pcmecl-fast backends` says more.", file=sys.stderr)


setup(**extension())
