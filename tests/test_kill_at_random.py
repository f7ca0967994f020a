"""A few kills and full disks of `tests/kill_at_random.py`, whose own run has many."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform != "linux", reason="needs fork and SIGKILL")


@pytest.fixture
def program():
    """In a process of its own: a fork of this one, with its threads, might not come to its end."""

    def run(*options):
        root = Path(__file__).parents[1]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "tests.kill_at_random", *options]
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)

    return run


def test_what_is_killed_is_whole_and_goes_on_to_the_same_result(program):
    result = program("--kills", "3", "--full-disks", "0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kills" in result.stdout
    assert "0 problems" in result.stdout


def test_a_full_disk_leaves_earlier_results_and_a_run_that_goes_on(program):
    result = program("--kills", "0", "--full-disks", "2", "--seed", "3")
    if "run as root" in result.stderr:
        pytest.skip("a small file system cannot be mounted here")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 full disks, 0 problems" in result.stdout
