"""bench/gpu.sh is ready for a GPU: its dry run walks everything, and a run on a stand-in keeps to its times."""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from bench import compare

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench" / "gpu.sh"
PARTS = re.findall(r"^    (\w+):(\d+)", SCRIPT.read_text(), re.MULTILINE)


def run(script, *arguments, **environment):
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """What the dry run prints, and its results."""
    out = tmp_path_factory.mktemp("dry")
    done = run(SCRIPT, "--dry-run", PYTHON=sys.executable, OUT=str(out), PARTS="")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((out / "compare.json").read_text())


def test_the_dry_run_names_every_part_and_its_share(dry):
    ends = 0
    for part, seconds in PARTS:
        ends += int(seconds)
        assert f"==== {part}: {seconds} s, over by {ends} s of 600\n" in dry[0]
    assert ends <= 570  # the rest is a reserve


def test_the_dry_run_names_every_comparison_and_side_and_its_share(dry):
    compare.load_all()
    printed = defaultdict(str)
    for name, sides in re.findall(r"^(\w+): [\d.]+ s, besides .*\n((?:  .+\n)+)", dry[0], re.MULTILINE):
        printed[name] += sides
    assert printed.keys() == compare.COMPARISONS.keys()
    for key, result in dry[1].items():
        for row in result["rows"]:
            share = rf"^  {re.escape(row['side'])}: (not run: .+|[\d.]+ s.*)$"
            assert re.search(share, printed[key.rsplit(" ", 1)[0]], re.MULTILINE)


def test_the_dry_run_has_every_gpu_backend_in_every_comparison(dry):
    for key, result in dry[1].items():
        sides = {row["side"] for row in result["rows"]}
        # No operator takes part in an image tower.
        assert key.startswith("image_tower") != ({"backend=cuda", "backend=triton"} <= sides)
        assert "backend=xformers" in sides or not key.startswith("tree_attention")
        assert (result["kind"], result["device"]) == ("cuda", "a rehearsal without a GPU")


def test_the_dry_run_finds_the_tests_and_what_the_sanitizers_select(dry):
    for file in ("test_ops_cuda", "test_kernels", "test_cuda_kernels", "test_graphs"):
        assert re.search(rf"tests/{file}\.py: \d+", dry[0])
    selected = dry[0].partition("==== sanitizers")[2].partition("====")[0]
    assert re.search(r"tests/test_ops_cuda\.py: \d+", selected)
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        assert f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool {tool} " in selected


@pytest.mark.parametrize(
    ("arguments", "parts", "says"),
    [
        (["--dry-run"], "nonsense", "PARTS: got nonsense; takes build tests"),
        (["--wheels"], "", "--wheels needs a FOLDER"),
        (["no-such-folder"], "", "no-such-folder: got no folder with wheels"),
    ],
)
def test_a_wrong_word_is_refused_at_once(arguments, parts, says):
    done = run(SCRIPT, *arguments, PARTS=parts)
    assert done.returncode != 0
    assert not done.stdout
    assert says in done.stderr
    assert "bench/gpu.sh --dry-run [FOLDER]" in run(SCRIPT, "--help").stdout


def test_a_run_keeps_to_its_times_and_goes_on_after_a_part_that_hangs(tmp_path):
    """Only bench.steps keeps its stand-in of a Python busy."""
    script = tmp_path / "bench" / "gpu.sh"
    script.parent.mkdir()
    seconds = {"steps": "1", "scaling": "60"}  # and none for what comes before
    script.write_text(
        re.sub(r"(?m)^    (\w+):\d+", lambda match: f"    {match[1]}:{seconds.get(match[1], '0')}", SCRIPT.read_text())
    )
    python, calls = stand_in(tmp_path, 'case "$*" in *bench.steps*) exec sleep 600 ;; esac')
    done = run(script, PYTHON=str(python), PARTS="towers steps scaling")
    assert done.returncode == 1
    assert "bench.compare" not in calls.read_text()  # there was no time for it
    assert re.search(r"-m bench.steps .*\n== status 124\n", done.stdout)
    assert re.search(r"-m bench.scaling .*--device cuda .*\nSome-GPU\n== status 0\n", done.stdout)
    assert (tmp_path / "bench/results/Some-GPU/scaling.txt").read_text() == "Some-GPU\n"


@pytest.mark.parametrize("xdist", [True, False])
def test_tests_run_in_several_processes(tmp_path, xdist):
    failing = "*test_graphs*" if xdist else "*test_graphs*|*xdist*"
    python, calls = stand_in(tmp_path, f'case "$*" in {failing}) exit 1 ;; esac')
    done = run(SCRIPT, PYTHON=str(python), PARTS="tests", OUT=str(tmp_path / "out"))
    ran = [line for line in calls.read_text().splitlines() if "-m pytest" in line]
    assert len(ran) == (1 if xdist else 4)
    assert ("-n " in ran[0]) == xdist
    assert done.returncode == 1


def stand_in(folder, does):
    """An interpreter that notes its arguments, and the file that it notes them in."""
    python, calls = folder / "python", folder / "calls"
    python.write_text(f'#!/bin/sh\necho "$*" >>{calls}\n{does}\necho Some-GPU\n')
    python.chmod(0o755)
    return python, calls


def test_what_the_package_depends_on_travels_along():
    """Besides torch and Triton, which the machine has."""
    wheels = set(re.findall(r"^[\w-]+", (ROOT / "bench/wheels.txt").read_text(), re.MULTILINE))
    dependencies = (ROOT / "pyproject.toml").read_text().partition("dependencies = [")[2].partition("]")[0]
    assert set(re.findall(r'"([\w-]+)', dependencies)) - {"torch"} <= wheels
    assert not {"torch", "triton"} & wheels
