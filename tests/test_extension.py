"""The compiled extensions: built where there is a compiler, for every torch, and explained where they are missing."""

import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from pcmecl_fast.ops import backend_status
from pcmecl_fast.ops.backends import cuda, extension
from pcmecl_fast.ops.operator import BACKENDS, Backend

ROOT = Path(__file__).parents[1]
RUN = "runpy.run_path('setup.py', run_name='__main__')"
built = pytest.mark.skipif(isinstance(extension.load(), str), reason="the extension was not built")


@built
def test_the_extension_says_what_it_runs_on():
    assert extension.load().cpu_capability() in ("portable", "avx2", "avx512")
    assert {status.name: status.available for status in backend_status()}["cpu"]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
@pytest.mark.parametrize("name", [extension.NAME, extension.CUDA_NAME])
def test_no_symbol_is_pytorchs(name):
    path = extension._path(name)
    if path is None:
        pytest.skip("it was not built")
    needed = subprocess.run(["nm", "-DC", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    assert "Py" in needed
    assert [line for line in needed.splitlines() if re.search(r"\b(at|c10|torch|caffe2|aoti_\w*)\b", line)] == []
    libraries = subprocess.run(["objdump", "-p", path], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"NEEDED\s+(\w+)", libraries)) <= {
        "libstdc", "libm", "libgomp", "libgcc_s", "libpthread", "libc", "libdl", "librt", "ld"
    }  # fmt: skip


@built
def test_it_runs_on_pytorchs_own_threads():
    """In a process of its own: one libgomp is loaded, and no thread beside those that PyTorch has started."""
    script = """
import os, re, torch
from pcmecl_fast import ops
torch.set_num_threads(2)
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
before = len(os.listdir("/proc/self/task"))
x = torch.randn(200, 7, 64, requires_grad=True)
ops.correlation_loss(x, torch.randn(200, 7, 64), scale=20.0, backend="cpu").backward()
pools = set(re.findall(r"\\S*libgomp\\S*", open("/proc/self/maps").read()))
print(len(pools), len(os.listdir("/proc/self/task")) - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("looks into /proc")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "0"], done.stderr


@built
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_computes_as_well():
    """Where OpenMP's threads are gone: DataLoader's workers."""
    script = """
import os, signal, torch
from pcmecl_fast import ops
torch.set_num_threads(2)
x, y = torch.randn(64, 7, 64), torch.randn(64, 7, 64)
expected = ops.direction_logits(x[:, 0], x[:, 1], y, torch.arange(64), torch.zeros(64, dtype=torch.long), backend="cpu")
child = os.fork()
if child == 0:
    signal.alarm(60)
    z = torch.zeros(64, dtype=torch.long)
    found = ops.direction_logits(x[:, 0], x[:, 1], y, torch.arange(64), z, backend="cpu")
    os._exit(0 if torch.equal(found, expected) else 1)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["0"], done.stderr


@pytest.mark.parametrize(
    ("architectures", "capability", "fits"),
    [
        ("8.0 9.0", (8, 0), True),
        ("8.0 9.0", (8, 9), True),
        ("8.0 9.0", (7, 5), False),
        ("8.0 9.0", (12, 0), False),
        ("8.6", (8, 0), False),
        ("8.0 9.0 9.0+PTX", (12, 0), True),
        ("8.0 9.0 9.0+PTX", (7, 5), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("10.0 12.0", (12, 1), True),
    ],
)
def test_which_gpus_the_code_runs_on(architectures, capability, fits):
    assert cuda.runs_on(architectures, capability) == fits


@pytest.mark.parametrize(
    ("driver", "capability", "says"),
    [
        (13000, (9, 0), None),
        (13020, (9, 0), None),
        (12040, (9, 0), "the driver is of CUDA 12.4, and the extension was built by CUDA 13.0: update the driver, or"),
        (13000, (7, 5), "the GPU has compute capability 7.5, and the extension code for 8.0 9.0 9.0+PTX: rebuild it"),
    ],
)
def test_a_driver_or_gpu_that_the_code_does_not_fit_is_named(monkeypatch, driver, capability, says):
    held = SimpleNamespace(toolkit=13000, architectures="8.0 9.0 9.0+PTX", driver=lambda: driver)
    monkeypatch.setattr(cuda, "_module", held)
    monkeypatch.setattr(cuda.torch.cuda, "get_device_capability", lambda: capability)
    reason = cuda._unfit.__wrapped__()
    assert reason is None if says is None else reason.startswith(says)


def test_an_installed_package_says_why_it_was_not_built(tmp_path, monkeypatch):
    (tmp_path / "_C.not-built").write_text("there is no C++ compiler\n")
    monkeypatch.setattr(extension, "PACKAGE", tmp_path)
    reason = extension._load(None)
    assert reason.startswith("it was not built, because there is no C++ compiler; then `make build`")
    assert "no nvcc" in extension._load(None, extension.CUDA_NAME, extension.CUDA_NOT_BUILT)


def test_a_source_tree_that_hides_the_installed_package_is_named(tmp_path, monkeypatch):
    # As in a clone after `pip install .`: Python finds the folder that it was started in first.
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(extension, "PACKAGE", tmp_path / "pcmecl_fast")
    monkeypatch.setattr(extension, "_path", lambda name=extension.NAME: None)
    said = f"pcmecl_fast is imported from the source tree {tmp_path}, where it is not built: `make build` there, or run"
    assert extension._load(None).startswith(said)
    assert extension._load(None, extension.CUDA_NAME, extension.CUDA_NOT_BUILT).startswith(said)


def test_nothing_is_measured_without_the_extension(monkeypatch, capsys):
    from bench import compare

    monkeypatch.setitem(BACKENDS, "cpu", Backend("cpu", missing=lambda: "it was not built"))
    monkeypatch.setattr(compare, "compare", lambda *of, **options: pytest.fail("it was measured"))
    monkeypatch.setattr(sys, "argv", ["compare", "direction_loss", "--device", "cpu"])
    assert compare.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("without the extension: it was not built")


def test_without_the_file_it_says_how_to_build_it(tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "PACKAGE", tmp_path / "site-packages" / "pcmecl_fast")
    assert "it was not built" in extension._load(None)
    assert "make build" in extension._load(None)


def test_one_that_was_left_from_another_version_says_how_to_rebuild_it(tmp_path, monkeypatch):
    monkeypatch.setattr(extension.importlib, "import_module", lambda name: ModuleType(name))
    reason = extension._load(tmp_path / "_C.so")
    assert reason.startswith("_C.so was built for another version of pcmecl_fast; rebuild it: `make build`")


def test_one_that_does_not_load_says_how_to_rebuild_it(tmp_path, monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: PyLong_New")

    monkeypatch.setattr(extension.importlib, "import_module", broken)
    reason = extension._load(tmp_path / "_C.so")
    assert reason.startswith("_C.so does not load (undefined symbol: PyLong_New); rebuild it: `make build`")


def test_a_missing_extension_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(extension, "_path", lambda: None)
    monkeypatch.setattr(extension, "PACKAGE", Path("elsewhere/pcmecl_fast"))
    load = extension.cache(extension.load.__wrapped__)
    with caplog.at_level(logging.WARNING, logger="pcmecl_fast"):
        load()
        load()
    (record,) = caplog.records
    assert "runs without its compiled extension: it was not built" in record.getMessage()


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"CXX": "no-such-compiler"}, "there is no C++ compiler"),
        ({"CXX": "false"}, "the compiler failed"),
        ({"PCMECL_EXTENSION": "0"}, ""),
    ],
)
def test_without_a_compiler_the_package_builds_and_says_so_once(tmp_path, variables, says):
    done = build(tmp_path, variables)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("installed without its compiled extension") == bool(says)
    assert says in done.stderr
    (package,) = tmp_path.glob("build/lib*/pcmecl_fast")
    assert (package / "ops" / "backends" / "cpu" / "__init__.py").exists()
    assert not list(package.glob("*.so"))
    recorded = package / "_C.not-built"
    assert recorded.is_file() == bool(says)
    assert not says or says in recorded.read_text()


def test_a_build_needs_no_torch(tmp_path):
    done = build(tmp_path, {"CXX": "false"}, "import sys; sys.modules['torch'] = None")
    assert done.returncode == 0, done.stderr
    assert "without its compiled extension, because the compiler failed" in done.stderr


def test_an_sdist_has_what_it_takes_to_build_test_measure_and_read(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a clone")
    files = set(listed.stdout.split("\n")) - {""}
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    made = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist"],
        cwd=tmp_path,
        env=os.environ | {"PCMECL_EXTENSION": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    (path,) = tmp_path.glob("dist/*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {"docs/guide.md", "bench/compare.py", "pcmecl_fast/kernels/__init__.py"} <= packed
    assert {name for name in files - packed if not name.startswith((".ci/", ".git"))} == set()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_a_build_that_must_succeed_fails_without_a_compiler(tmp_path, compiler):
    assert build(tmp_path, {"CXX": compiler, "PCMECL_EXTENSION": "1"}).returncode != 0


def test_a_cuda_build_that_must_succeed_says_that_there_is_no_nvcc(tmp_path):
    done = build(tmp_path, {"PCMECL_CUDA": "1", "CUDA_HOME": str(tmp_path)})
    assert done.returncode != 0
    assert f"there is no nvcc in CUDA_HOME={tmp_path}; install the CUDA toolkit" in done.stderr


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, "is of CUDA 9.2; it must be 12.8 or newer"),
        (
            {"PCMECL_CUDA_ARCH": "hopper"},
            "PCMECL_CUDA_ARCH: got 'hopper'; takes all, or a list such as 8.0;9.0;12.0+PTX",
        ),
    ],
)
def test_a_cuda_build_that_must_succeed_says_what_is_wrong(tmp_path, variables, says):
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    release = "9.2, V9.2.148" if not variables else "13.0, V13.0.88"
    nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}\n")
    nvcc.chmod(0o755)
    # A compiler that makes empty files, so that the build comes to nvcc.
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$#" -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done\n')
    compiler.chmod(0o755)
    own = {"CXX": str(compiler), "CC": str(compiler), "PCMECL_CUDA": "1", "CUDA_HOME": str(tmp_path / "toolkit")}
    done = build(tmp_path, own | variables)
    assert done.returncode != 0
    assert says in done.stderr


def test_a_missing_cuda_extension_says_how_to_build_it(tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "PACKAGE", tmp_path / "site-packages" / "pcmecl_fast")
    reason = extension._load(None, extension.CUDA_NAME, extension.CUDA_NOT_BUILT)
    assert "no nvcc when the package was installed" in reason
    assert "PCMECL_CUDA=1 `make build`" in reason


def build(folder: Path, variables: dict[str, str], before: str = "") -> subprocess.CompletedProcess:
    """`setup.py build` of a copy of the sources, in a Python that has run the lines `before`."""
    for name in ("csrc", "kernels", "pcmecl_fast"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return subprocess.run(
        [sys.executable, "-c", f"{before}\nimport runpy, sys; sys.argv[:] = ['setup.py', 'build']; {RUN}"],
        cwd=folder,
        env=os.environ | {"PCMECL_EXTENSION": "auto"} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
