"""csrc/cuda compiled by the C++ compiler with its host harness: the same kernels, run on CPU tensors.

Built once for the sources and the torch at hand, into build/ beside them.
"""

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.cpp_extension import include_paths, library_paths

NAME = "pcmecl_cuda_on_host"
ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for path in (ROOT / "csrc/cuda").iterdir() if path.suffix in (".cu", ".cpp"))
FLAGS = ["-std=c++20", "-O1", "-g0", "-fPIC", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-DPCMECL_ON_HOST"]
FLAGS += ["-march=native", "-ffp-contract=fast"]  # products fused into additions, as on a GPU


def compiler() -> str | None:
    """The C++ compiler, or None if there is none or the sources are missing."""
    command = shlex.split(os.environ.get("CXX", "c++"))[0]
    return command if SOURCES and shutil.which(command) else None


def load() -> ModuleType:
    path = _folder() / f"{NAME}.so"
    if not path.exists():
        _build(path)
    spec = importlib.util.spec_from_file_location(NAME, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _folder() -> Path:
    content = hashlib.sha256(f"{torch.__version__} {FLAGS}".encode())
    for path in [*SOURCES, *sorted((ROOT / "csrc").rglob("*.h"))]:
        content.update(path.read_bytes())
    return ROOT / "build" / f"{NAME}-{content.hexdigest()[:12]}"


def _build(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{folder}" for folder in [*include_paths(), sysconfig.get_path("include")]]
    defines = [f"-DTORCH_EXTENSION_NAME={NAME}", '-DPCMECL_TORCH_VERSION="host"']
    objects = [path.parent / f"{source.name}.o" for source in SOURCES]

    def compile_one(source: Path, target: Path) -> None:
        _run(compiler(), *FLAGS, *includes, *defines, "-x", "c++", "-c", source, "-o", target)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_one, SOURCES, objects))
    libraries = [f"-L{folder}" for folder in library_paths()]
    unfinished = path.with_suffix(f".{os.getpid()}")
    _run(compiler(), "-shared", *objects, *libraries, "-lc10", "-ltorch_cpu", "-ltorch_python", "-o", unfinished)
    unfinished.replace(path)


def _run(*command: object) -> None:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the host harness of csrc/cuda does not compile:\n{result.stderr[-4000:]}")
