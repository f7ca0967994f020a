"""Builds the package. All metadata is in pyproject.toml; this file builds the compiled extensions:

pcmecl_fast._C, the CPU's kernels, and pcmecl_fast._C_cuda, the GPU's, where there is an nvcc.

They take addresses and numbers, and know nothing of PyTorch: an isolated build needs no torch, and one build fits every
version of it. Environment variables read here:

    PCMECL_EXTENSION      auto (default): build what there is a compiler for, else install without it and say so.
                          1: a CPU extension that fails is an error.  0: build neither.
    PCMECL_CUDA           auto (default), 1 and 0: the same for the CUDA extension.
    PCMECL_CUDA_ARCH      the GPUs to compile for, such as "8.0;9.0;12.0+PTX", or "all": 8.0, 8.6, 8.9, 9.0, 10.0, 12.0
                          and PTX for newer ones, for a wheel. Without it those that are here, and where none is, 8.0,
                          9.0 and PTX. TORCH_CUDA_ARCH_LIST is read where it is not set.
    CUDA_HOME             the CUDA toolkit, if nvcc is not on the PATH: 12.8 or newer. The CUDA runtime is linked into
                          the extension; it needs a driver of the toolkit's major version, so that a build by nvcc 12
                          runs where one by nvcc 13 does, and with older drivers.
    MAX_JOBS              compilers that run at once.
    CXX                   the C++ compiler.

ccache is used where it is installed. What could not be built leaves its reason in the package, where `pcmecl-fast
backends` finds it, since pip shows nothing of what a build prints. The CPU's extension runs on any processor of the
machine's architecture: AVX2 and AVX-512 lie beside the baseline and are chosen at run time (csrc/cpu/kernels.cpp).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

CPU_SOURCES = ["csrc/bindings.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
CUDA_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*.c*") if path.suffix in (".cpp", ".cu"))
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))
FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--resource-usage", "-Xfatbin=-compress-all"]
OLDEST_NVCC = (12, 8)  # the first that knows sm_100 and sm_120
ALL = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
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
    nvcc, cuda_missing = ("", "PCMECL_CUDA=0") if cuda_asked == "0" else _nvcc()
    if cuda_missing is None:
        wanted["pcmecl_fast._C_cuda"] = cuda_asked == "1"
    elif cuda_asked == "1":
        raise SystemExit(f"pcmecl_fast: the CUDA extension cannot be built: {cuda_missing}")
    elif cuda_asked == "auto":
        _say_without_cuda(cuda_missing)
    return _buildable(wanted, nvcc, {"_C_cuda": cuda_missing} if cuda_missing and cuda_asked == "auto" else {})


def _asked(variable: str) -> str:
    asked = os.environ.get(variable, "auto")
    if asked not in ("auto", "0", "1"):
        raise SystemExit(f"{variable}: got {asked!r}; takes auto, 0 or 1")
    return asked


def _missing() -> str | None:
    """Why the extensions cannot be built, or None if they can."""
    if sys.platform == "win32":
        return "it is written for GCC and Clang"
    if shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]) is None:
        return "there is no C++ compiler (c++, or what CXX names); on Debian: apt install g++"
    return None


def _nvcc() -> tuple[str, str | None]:
    """The compiler, and why the CUDA extension cannot be built, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    if nvcc is None:
        where = f"in CUDA_HOME={home}" if home else "on the PATH, and CUDA_HOME is not set"
        return "", f"there is no nvcc {where}; install the CUDA toolkit"
    said = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    if said is None:
        return "", f"{nvcc} does not report its version"
    if (int(said[1]), int(said[2])) < OLDEST_NVCC:
        return "", f"{nvcc} is of CUDA {said[1]}.{said[2]}; it must be {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or newer"
    return nvcc, None


def _architectures() -> tuple[list[str], str]:
    """nvcc's options for the GPUs to compile for, and their names: "8.0 9.0 9.0+PTX"."""
    asked = os.environ.get("PCMECL_CUDA_ARCH") or os.environ.get("TORCH_CUDA_ARCH_LIST") or _visible() or WITHOUT_A_GPU
    options, names = [], []
    for word in re.split(r"[;, ]+", ALL if asked.lower() == "all" else asked.strip()):
        number = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", word, re.IGNORECASE)
        if number is None:
            raise SystemExit(f"PCMECL_CUDA_ARCH: got {word!r}; takes all, or a list such as 8.0;9.0;12.0+PTX")
        code, name = number[1] + number[2] + number[3], f"{number[1]}.{number[2]}{number[3]}"
        options.append(f"-gencode=arch=compute_{code},code=sm_{code}")
        names.append(name)
        if number[4]:
            options.append(f"-gencode=arch=compute_{code},code=compute_{code}")
            names.append(f"{name}+PTX")
    return options, " ".join(names)


def _visible() -> str:
    """The architectures of the GPUs of this machine."""
    if shutil.which("nvidia-smi") is None:
        return ""
    said = _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split()
    return ";".join(sorted({word for word in said if re.fullmatch(r"\d+\.\d", word)}))


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _buildable(wanted: dict[str, bool], nvcc: str, not_built: dict[str, str]) -> dict[str, Any]:
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
    from setuptools.command.build_ext import build_ext

    ParallelCompile("MAX_JOBS", default=len(os.sched_getaffinity(0)), needs_recompile=_needs_recompile).install()

    architectures, names = _architectures() if "pcmecl_fast._C_cuda" in wanted else ([], "")

    class Build(build_ext):
        extensions: list[Any]

        def build_extensions(self) -> None:
            ccache = shutil.which("ccache")
            if ccache and "ccache" not in self.compiler.compiler_so[0]:
                self.compiler.compiler_so = [ccache, *self.compiler.compiler_so]
            self.compiler.src_extensions.append(".cu")
            self._compile_cpp = self.compiler._compile
            self.compiler._compile = self._compile
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

        def _compile(self, obj: str, source: str, ext: str, cc_args: Any, extra: Any, defines: Any) -> None:
            if ext != ".cu":
                self._compile_cpp(obj, source, ext, cc_args, extra, defines)
                return
            self.spawn([nvcc, *NVCC_FLAGS, *architectures, "-c", source, "-o", obj])

    modules = [
        Pybind11Extension(
            "pcmecl_fast._C",
            CPU_SOURCES,
            cxx_std=17,
            depends=HEADERS,
            extra_compile_args=[*FLAGS, "-fopenmp"],
            extra_link_args=["-fopenmp"],
        )
    ]
    if "pcmecl_fast._C_cuda" in wanted:
        home = _toolkit(nvcc)
        modules.append(
            Pybind11Extension(
                "pcmecl_fast._C_cuda",
                CUDA_SOURCES,
                cxx_std=17,
                depends=HEADERS,
                include_dirs=[str(home / "include")],
                library_dirs=[str(home / name) for name in ("lib64", "lib") if (home / name).is_dir()],
                libraries=["cudart_static", "dl", "rt", "pthread"],
                define_macros=[("PCMECL_ARCHITECTURES", f'"{names}"')],
                extra_compile_args=FLAGS,
            )
        )
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": Build, "build_py": _recording(not_built)},
    }


def _toolkit(nvcc: str) -> Path:
    """nvcc may be a wrapper script around another: ask it where its toolkit is."""
    top = re.search(r"TOP=(\S+)", _output(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull))
    return Path(top[1] if top else Path(nvcc).parents[1]).resolve()


def _needs_recompile(obj: str, source: str) -> bool:
    """Whether the object is older than its source or a header."""
    if not Path(obj).exists() or "--force" in sys.argv:
        return True
    made = Path(obj).stat().st_mtime
    return any(Path(path).stat().st_mtime > made for path in (source, "setup.py", *HEADERS))


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
