"""Builds the package. All metadata is in pyproject.toml; this file builds the compiled extensions:

pcmecl_fast._C, the CPU's kernels, and pcmecl_fast._C_cuda, the GPU's, where there is an nvcc and a torch with CUDA.

Environment variables read here:

    PCMECL_EXTENSION      auto (default): build what there is a compiler for, else install without it and say so.
                          1: a CPU extension that fails is an error.  0: build neither.
    PCMECL_CUDA           auto (default), 1 and 0: the same for the CUDA extension.
    TORCH_CUDA_ARCH_LIST  the GPUs to compile for, such as "8.0;9.0;12.0+PTX"; without it those that are visible, and
                          where none is, 8.0, 9.0 and PTX for newer ones.
    CUDA_HOME             the CUDA toolkit, if nvcc is not on the PATH. Its major version has to be that of torch.
    MAX_JOBS              compilers that ninja starts at once.
    CXX                   the C++ compiler.

ccache is used where it is installed. The extensions are compiled against the torch that they will run with, the one in
the environment that is installed into: pip's isolated build cannot see it and is shown it here; an isolated build of
another kind (uv, build) needs --no-build-isolation. What could not be built leaves its reason in the package, where
`pcmecl-fast backends` finds it, since pip shows nothing of what a build prints. A wheel's local version names its
torch and CUDA, as in 0.1.0+torch2.15cu132. The CPU's runs on any processor of the machine's architecture: AVX2 and
AVX-512 lie beside the baseline and are chosen at run time (csrc/cpu/kernels.cpp).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

CPU_SOURCES = ["csrc/bindings.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
CUDA_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*.c*") if path.suffix in (".cpp", ".cu"))
FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas"]
OLDEST_NVCC = (12, 4)
WITHOUT_A_GPU = "8.0;9.0+PTX"
LITTLE_SPACE = 500  # MB; a build takes about half of it


def extensions() -> dict[str, Any]:
    """The arguments of `setup` that build the extensions, or none."""
    asked, cuda_asked = _asked("PCMECL_EXTENSION"), _asked("PCMECL_CUDA")
    if asked == "0":
        return {}
    missing = _missing()
    if missing is not None:
        if asked == "1":
            raise SystemExit(f"pcmecl_fast: the extension cannot be built: {missing}")
        _say(missing)
        return {"cmdclass": {"build_py": _recording({"_C": missing, "_C_cuda": missing})}}

    wanted = {"pcmecl_fast._C": asked == "1"}  # and whether a failure is an error
    cuda_missing = "PCMECL_CUDA=0" if cuda_asked == "0" else _cuda_missing()
    if cuda_missing is None:
        wanted["pcmecl_fast._C_cuda"] = cuda_asked == "1"
    elif cuda_asked == "1":
        raise SystemExit(f"pcmecl_fast: the CUDA extension cannot be built: {cuda_missing}")
    elif cuda_asked == "auto":
        _say_without_cuda(cuda_missing)
    return _buildable(wanted, {"_C_cuda": cuda_missing} if cuda_missing and cuda_asked == "auto" else {})


def _asked(variable: str) -> str:
    asked = os.environ.get(variable, "auto")
    if asked not in ("auto", "0", "1"):
        raise SystemExit(f"{variable}: got {asked!r}; takes auto, 0 or 1")
    return asked


def _missing() -> str | None:
    """Why the extensions cannot be built, or None if they can."""
    try:
        _import_torch()
    except ImportError as error:
        return (
            f"there was no torch to build it against ({error}): install torch before this package, and where a build "
            "is isolated from it, show it by pip's --no-build-isolation"
        )
    if sys.platform == "win32":
        return "it is written for GCC and Clang"
    if shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]) is None:
        return "there is no C++ compiler (c++, or what CXX names); on Debian: apt install g++"
    return None


def _import_torch() -> None:
    """Make `import torch` find the torch of the environment that is installed into."""
    try:
        import torch
    except ImportError:
        # pip hides the environment's own packages from a build, but it is still run by its interpreter.
        installed = sysconfig.get_path("purelib")
        if installed in sys.path or not Path(installed, "torch").is_dir():
            raise
        sys.path.append(installed)
        import torch  # noqa: F401


def _cuda_missing() -> str | None:
    """Why the CUDA extension cannot be built, or None; if it can, sets the variables that the build reads."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    major = int(torch.version.cuda.split(".")[0])
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    if nvcc is None:
        where = f"in CUDA_HOME={home}" if home else "on the PATH, and CUDA_HOME is not set"
        return f"there is no nvcc {where}; install the CUDA toolkit {major}.x"
    said = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    if said is None:
        return f"{nvcc} does not report its version"
    version = int(said[1]), int(said[2])
    if version[0] != major:
        return (
            f"{nvcc} is of CUDA {version[0]}.{version[1]} and torch {torch.__version__} of CUDA {torch.version.cuda}; "
            f"the major versions must agree: install the toolkit {major}.x, or a torch for CUDA {version[0]}"
        )
    if version < OLDEST_NVCC:
        return f"{nvcc} is of CUDA {version[0]}.{version[1]}; it must be {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or newer"

    # nvcc may be a wrapper script around another: ask it where its toolkit is.
    top = re.search(r"TOP=(\S+)", _output(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull))
    os.environ["CUDA_HOME"] = str(Path(top[1] if top else Path(nvcc).parents[1]).resolve())
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = WITHOUT_A_GPU
    return None


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr  # a dry run prints to stderr


def _buildable(wanted: dict[str, bool], not_built: dict[str, str]) -> dict[str, Any]:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        extensions: list[Any]

        def build_extensions(self) -> None:
            asked: list[Any] = self.extensions
            built: list[Any] = []
            for extension in asked:  # one by one, so that the GPU's can fail alone
                self.extensions = [extension]
                try:
                    super().build_extensions()
                    built.append(extension)
                except Exception as error:
                    if wanted[extension.name]:
                        raise
                    why = _failed(error)
                    if not self.inplace:
                        _record(Path(self.build_lib), {extension.name.rpartition(".")[2]: why})
                    if extension.name == "pcmecl_fast._C":
                        _say(why)
                        break
                    _say_without_cuda(why)
            asked[:] = built  # only what was built is copied next to the sources
            self.extensions = asked

    version = f'-DPCMECL_TORCH_VERSION="{torch.__version__}"'
    headers = [str(path) for path in Path("csrc").rglob("*.h")]
    modules = [
        CppExtension(
            "pcmecl_fast._C",
            CPU_SOURCES,
            depends=headers,
            extra_compile_args=[*FLAGS, "-fopenmp", version],
            extra_link_args=["-fopenmp"],
        )
    ]
    if "pcmecl_fast._C_cuda" in wanted:
        modules.append(
            CUDAExtension(
                "pcmecl_fast._C_cuda",
                CUDA_SOURCES,
                depends=headers,
                extra_compile_args={"cxx": [*FLAGS, version], "nvcc": ["-O3", "--resource-usage"]},
            )
        )
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": Build, "build_py": _recording(not_built)},
        "distclass": _ForOneTorch,
    }


class _ForOneTorch(Distribution):
    """The local version of a wheel with extensions names the torch and the CUDA it was built for."""

    def parse_config_files(self, *args: Any, **kwargs: Any) -> None:
        super().parse_config_files(*args, **kwargs)
        if {"bdist_wheel", "dist_info", "editable_wheel"} & set(sys.argv):
            self.metadata.version = f"{self.metadata.version}+{_local_version()}"


def _local_version() -> str:
    import torch

    number = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    return f"torch{number}" + (f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu")


def _recording(not_built: dict[str, str]) -> type[build_py]:
    """The command that gathers the package, with the reasons for what is missing in it."""

    class Recording(build_py):
        def run(self) -> None:
            super().run()
            if not self.editable_mode:
                _record(Path(self.build_lib), not_built)

    return Recording


def _record(folder: Path, not_built: dict[str, str]) -> None:
    for name, why in not_built.items():
        (folder / "pcmecl_fast" / f"{name}.not-built").write_text(f"{why}\n")


def _failed(error: Exception) -> str:
    left = shutil.disk_usage(".").free >> 20
    space = f"; only {left} MB are left on this disk" if left < LITTLE_SPACE else ""
    return f"the compiler failed: {error}{space}"


def _say(why: str) -> None:
    print(f"pcmecl_fast: installed without its compiled extension, because {why}.", file=sys.stderr)
    print("pcmecl_fast: everything works, on the reference backend; `pcmecl-fast backends` says more.", file=sys.stderr)


def _say_without_cuda(why: str) -> None:
    print(f"pcmecl_fast: installed without its CUDA extension, because {why}.", file=sys.stderr)


setup(**extensions())
