"""The commands under torchrun: a rank that is killed, a run that goes on with another number of ranks, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SMALL = [
    *("--individuals", "4", "--clips", "1", "--frames-per-clip", "1", "--size", "32", "--emotions", "neutral", "happy"),
    *("--prompt-steps", "2", "--batch", "4", "--batch-individuals", "4", "--checkpoint-every", "2"),
]


def torchrun(ranks, *words, restarts=0, **environment):
    own = ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    command = [sys.executable, "-m", "torch.distributed.run", *own, "-m", "pcmecl_fast", "--"]
    return subprocess.Popen(
        [*command, *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for ranks in /proc")
def test_a_killed_rank_ends_all_and_the_run_goes_on_with_another_number(tmp_path):
    out = tmp_path / "run"
    words = ["train", "--out", out, *SMALL, "--steps", "400"]
    running = torchrun(2, *words)
    checkpoint = out / "stage-2.ckpt"
    until = time.monotonic() + 240
    while not checkpoint.exists() and running.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    assert checkpoint.exists(), running.communicate()[0]
    os.kill(rank_of(running.pid, 1), signal.SIGKILL)
    told, _ = running.communicate(timeout=120)
    assert running.returncode != 0
    assert "Signal 9" in told  # torchrun names the rank and what ended it
    assert "rank      : 1" in told
    done = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < done < 400
    # A run of as many steps as are done, and a few more, with one rank instead of two.
    options = (out / "config.yaml").read_text()
    assert "steps: 400" in options
    resumed = torchrun(1, "train", "--out", out, *SMALL, "--steps", "400", "--resume", PCMECL_BACKEND="auto")
    told, _ = resumed.communicate(timeout=500)
    assert resumed.returncode == 0, told
    assert f"resumes at step {done} of 400" in " ".join(told.split())
    assert json.loads((out / "summary.json").read_text())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for ranks in /proc")
def test_torchruns_own_restart_goes_on_from_the_checkpoint(tmp_path):
    out = tmp_path / "run"
    running = torchrun(2, "train", "--out", out, *SMALL, "--steps", "60", "--resume", restarts=1)
    checkpoint = out / "stage-2.ckpt"
    until = time.monotonic() + 240
    while not checkpoint.exists() and running.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(rank_of(running.pid, 1), signal.SIGKILL)
    told, _ = running.communicate(timeout=300)
    assert running.returncode == 0, told
    assert "of 60" in told
    assert "stage 2 resumes at step" in " ".join(told.split())
    assert (out / "summary.json").exists()


def rank_of(agent: int, rank: int) -> int:
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                variables = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
                parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == agent and f"RANK={rank}".encode() in variables:
                return int(name)
    raise AssertionError(f"no rank {rank} under {agent}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["edit", "--run", "r", "--input", "v.mp4"], "edit runs as one process; torchrun is for"),
        (["train", "--batch", "7", *SMALL[:-6]], "7 frames cannot be divided among 2 ranks; takes a multiple of 2"),
    ],
)
def test_what_ranks_cannot_do_is_said_in_one_line(tmp_path, words, message):
    (tmp_path / "r").mkdir()
    running = torchrun(2, *words, *(["--out", tmp_path / "out"] if words[0] == "train" else []))
    told, _ = running.communicate(timeout=240)
    assert running.returncode != 0
    assert message in " ".join(told.split())
    assert not (tmp_path / "out" / "summary.json").exists()


def test_the_line_is_said_however_late_the_first_rank_starts(tmp_path):
    late = "import os, time\ntime.sleep(6 if os.environ.get('LOCAL_RANK') == '0' else 0)\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    (tmp_path / "r").mkdir()
    running = torchrun(2, "edit", "--run", tmp_path / "r", "--input", "v.mp4", PYTHONPATH=str(tmp_path))
    told, _ = running.communicate(timeout=240)
    assert " ".join(told.split()).count("edit runs as one process; torchrun is for") == 1
