"""Shared fixtures: the built-in CLIP model, loaded once, another tower, and a few drawn people."""

import os
from functools import partial

import cuda_on_host
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from ranks import Crew

from pcmecl_fast import load_clip, ops
from pcmecl_fast.clip import Clip, tiny_face_config, tiny_face_model
from pcmecl_fast.ops.backends import cuda
from pcmecl_fast.ops.operator import BACKENDS, Backend
from pcmecl_fast.preprocessing import Preprocessing
from pcmecl_fast.synthetic import SyntheticFaces

# The backends that run on CPU tensors here: every operator test runs on each of them. The CUDA kernels run under their
# host harness.
ON_CPU = [status.name for status in ops.backend_status() if status.available and status.name in ("reference", "cpu")]
ON_CPU += ["cuda"] if cuda_on_host.compiler() else []
if os.environ.get("TRITON_INTERPRET") == "1":  # in the processes of test_kernels_interpreted.py
    ON_CPU = ["triton"]


@pytest.fixture(scope="session")
def clip():
    return load_clip()


@pytest.fixture(scope="session")
def other_clip():
    """A tower of the same size with different weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = tiny_face_model()
    config = tiny_face_config()
    return Clip(model, "other-face", "by hand", Preprocessing(config["mean"], config["std"]), SimpleTokenizer)


@pytest.fixture(scope="session")
def few_faces():
    """A factory of data sets with a few small frames."""
    return partial(SyntheticFaces, 3, emotions=["neutral", "happy", "sad"], clips=1, frames_per_clip=2, size=32)


@pytest.fixture(scope="module")
def crew():
    """Up to four ranks of a gloo group: `crew(ranks, function, *arguments)` gives what each returns.

    Each file has its own: functions may change what they find in their process, and end it.
    """
    crew = Crew()
    yield crew
    crew.close()


@pytest.fixture
def no_report(monkeypatch):
    """Drawing it would take most of the time; it has its own tests."""
    monkeypatch.setattr("pcmecl_fast.run.write_report", lambda path, report: None)
    monkeypatch.setattr("pcmecl_fast.run.save_grid_png", lambda path, grid: None)


@pytest.fixture(params=ON_CPU)
def each_backend(request):
    """The test's calls run on this backend; on a CPU, only the reference supports float16."""
    if request.param == "cpu" and request.node.callspec.params.get("dtype") == torch.float16:
        pytest.skip("the cpu backend takes float32, float64 and bfloat16")
    if request.param == "cuda":
        request.getfixturevalue("cuda_kernels_on_host")
    with ops.use_backend(request.param):
        yield request.param


@pytest.fixture
def cuda_kernels_on_host(monkeypatch):
    """The backend "cuda" runs on CPU tensors; tests with unsupported arguments are skipped."""
    on_host = SkippingBackend("cuda", missing=lambda: None)
    cuda.add_kernels(on_host, cuda_on_host.load(), device="cpu")
    monkeypatch.setitem(BACKENDS, "cuda", on_host)


class SkippingBackend(Backend):
    """A backend that skips the test when given unsupported arguments."""

    def unsupported_reason(self, operator, arguments):
        reason = super().unsupported_reason(operator, arguments)
        if reason is not None:
            pytest.skip(f"the {self.name} backend does not support this: {reason}")


@pytest.fixture(params=[name for name in ON_CPU if name not in ("reference", "cuda")])
def compiled_backend(request):
    """The test's calls run on this backend."""
    with ops.use_backend(request.param):
        yield request.param
