"""The compiled extension: built if possible, and explained if it is missing or belongs to another torch."""

import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import torch

from pcmecl_fast.ops import backend_status
from pcmecl_fast.ops.backends import extension
from pcmecl_fast.ops.operator import BACKENDS, Backend

ROOT = Path(__file__).parents[1]
RUN = "runpy.run_path('setup.py', run_name='__main__')"
built = pytest.mark.skipif(isinstance(extension.load(), str), reason="the extension was not built")


@pytest.fixture
def built_file(tmp_path):
    """Writes a file like the extension's, built with another torch."""

    def write(version: str) -> Path:
        path = tmp_path / "_C.so"
        path.write_bytes(b"\x7fELF and so on\0pcmecl_fast built with torch " + version.encode() + b";\0and on")
        return path

    return write


@built
def test_the_extension_says_what_it_was_built_with_and_what_it_runs_on():
    assert extension._built_with(extension._path()) == torch.__version__
    assert extension.load().cpu_capability() in ("portable", "avx2", "avx512")
    assert {status.name: status.available for status in backend_status()}["cpu"]


def test_an_installed_package_says_why_it_was_not_built(tmp_path, monkeypatch):
    (tmp_path / "_C.not-built").write_text("there is no C++ compiler\n")
    monkeypatch.setattr(extension, "PACKAGE", tmp_path)
    reason = extension._load(None, torch.__version__)
    assert reason.startswith("it was not built, because there is no C++ compiler; then `make build`")
    assert "no nvcc" in extension._load(None, torch.__version__, extension.CUDA_NAME, extension.CUDA_NOT_BUILT)


def test_a_source_tree_that_hides_the_installed_package_is_named(tmp_path, monkeypatch):
    # As in a clone after `pip install .`: Python finds the folder that it was started in first.
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(extension, "PACKAGE", tmp_path / "pcmecl_fast")
    monkeypatch.setattr(extension, "_path", lambda name=extension.NAME: None)
    said = f"pcmecl_fast is imported from the source tree {tmp_path}, where it is not built: `make build` there, or run"
    assert extension._load(None, torch.__version__).startswith(said)
    assert extension._load(None, torch.__version__, extension.CUDA_NAME, extension.CUDA_NOT_BUILT).startswith(said)


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
    assert "it was not built" in extension._load(None, torch.__version__)
    assert "make build" in extension._load(None, torch.__version__)


def test_one_built_with_another_torch_is_not_loaded_and_says_how_to_rebuild_it(built_file):
    reason = extension._load(built_file("2.11.0+cu130"), "2.15.0")
    assert reason.startswith("_C.so was built with torch 2.11.0+cu130, this is torch 2.15.0; rebuild it: `make build`")


def test_a_file_that_is_not_an_extension_has_an_unknown_version(tmp_path):
    (tmp_path / "_C.so").write_bytes(b"\x7fELF")
    assert "built with torch of an unknown version" in extension._load(tmp_path / "_C.so", "2.15.0")


def test_one_that_does_not_load_says_how_to_rebuild_it(built_file, monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: _ZN2at")

    monkeypatch.setattr(extension.importlib, "import_module", broken)
    reason = extension._load(built_file(torch.__version__), torch.__version__)
    assert reason.startswith("_C.so does not load (undefined symbol: _ZN2at); rebuild it: `make build`")


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
    assert (package / "ops" / "backends" / "cpu.py").exists()
    assert not list(package.glob("*.so"))
    recorded = package / "_C.not-built"
    assert recorded.is_file() == bool(says)
    assert not says or says in recorded.read_text()


def test_a_build_that_sees_no_torch_says_so_and_leaves_its_reason(tmp_path):
    done = build(tmp_path, {}, "import sys; sys.modules['torch'] = None")
    assert done.returncode == 0, done.stderr
    assert "without its compiled extension, because there was no torch to build it against" in done.stderr
    (package,) = tmp_path.glob("build/lib*/pcmecl_fast")
    for name in ("_C", "_C_cuda"):
        assert "pip's --no-build-isolation" in (package / f"{name}.not-built").read_text()


@pytest.mark.skipif(
    not Path(sysconfig.get_path("purelib"), "torch").is_dir(), reason="torch lies elsewhere than packages do"
)
def test_pips_isolated_build_is_shown_the_torch_that_is_installed(tmp_path):
    # As pip does it: a build's own requirements come first, the environment's packages are hidden.
    hidden = "import sys, sysconfig, setuptools; sys.path.remove(sysconfig.get_path('purelib'))"
    done = build(tmp_path, {"CXX": "no-such-compiler"}, hidden)
    assert done.returncode == 0, done.stderr
    assert "because there is no C++ compiler" in done.stderr


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


with_cuda = pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch that was built with CUDA")


@with_cuda
def test_a_cuda_build_that_must_succeed_says_that_there_is_no_nvcc(tmp_path):
    done = build(tmp_path, {"PCMECL_CUDA": "1", "CUDA_HOME": str(tmp_path)})
    assert done.returncode != 0
    assert f"there is no nvcc in CUDA_HOME={tmp_path}; install the CUDA toolkit" in done.stderr


@with_cuda
def test_a_cuda_build_that_must_succeed_says_that_nvcc_is_of_another_major_version(tmp_path):
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 9.2, V9.2.148\n")
    nvcc.chmod(0o755)
    done = build(tmp_path, {"PCMECL_CUDA": "1", "CUDA_HOME": str(tmp_path / "toolkit")})
    assert done.returncode != 0
    assert f"is of CUDA 9.2 and torch {torch.__version__} of CUDA {torch.version.cuda}; the major" in done.stderr


def test_a_missing_cuda_extension_says_how_to_build_it(tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "PACKAGE", tmp_path / "site-packages" / "pcmecl_fast")
    reason = extension._load(None, torch.__version__, extension.CUDA_NAME, extension.CUDA_NOT_BUILT)
    assert "no nvcc or a torch without CUDA" in reason
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
