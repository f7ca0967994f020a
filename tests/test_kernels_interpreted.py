"""Runs the Triton kernels' tests in its interpreter, in a process where that is set before Triton is imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels' tests run on the CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="they run in this process"),
]
HERE = Path(__file__).parent


@pytest.mark.parametrize("operator", ["direction", "rectangle", "correlation", "attention", "frames", "rest"])
def test_kernels_in_the_interpreter(operator):
    words = ["direction", "rectangle", "correlation", "attention", "frames"]
    wanted = operator if operator in words else " and ".join(f"not {word}" for word in words)
    names = ("test_kernels.py", "test_rectangles_triton.py", "test_ops_direction_limits.py")
    files = [str(HERE / name) for name in names]
    command = [sys.executable, "-m", "pytest", "-x", *files, "-k", wanted]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
