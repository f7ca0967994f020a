"""Kills and full disks at random moments: every file stays whole, no lock stays behind, and the result is the same.

    python -m tests.kill_at_random [--kills 100] [--full-disks 40]

Four jobs are run once to the end, then again and again: learning prompts, both stages of a training, building a bank,
filling a feature store. Each time one is killed (SIGKILL) at a random moment, every file that it left is read, and the
job is resumed, or started again where it had not begun; its result must be the first one's, bit for bit. On a full
disk, one of a random size that is smaller than the job needs, the job has to stop with a message that names a file, an
earlier result on the same disk has to stay as it is, and with space again the job has to come to the same result.

A job runs in a fork of this process, so that a kill hits its work and not the imports. Linux only.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
import yaml
from safetensors.torch import load_file

from pcmecl_fast import PersonalizedPrompts, PromptBank, files, load_clip, run
from pcmecl_fast.cli import main as command
from pcmecl_fast.data.features import FeatureStore, LiveFeatures
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.train.loop import read_checkpoint

DATA = ["--individuals", "3", "--clips", "1", "--frames-per-clip", "2", "--emotions", "neutral", "happy", "sad"]
SMALL = [*DATA, "--size", "32", "--device", "cpu", "--n-ctx", "4", "--checkpoint-every", "2"]
PROMPTS = ["prompts", *SMALL, "--steps", "12"]
GENERATOR = ["--batch", "4", "--generator-options", "fields=4", "hidden=16"]
TRAIN = ["train", *SMALL, "--prompt-steps", "6", "--steps", "8", *GENERATOR]
LOST = ("seconds",)  # of a summary: what no two runs share


@dataclass
class Options:
    """Kill runs and fill disks at random moments, and look whether anything is lost."""

    kills: int = 100
    """Kills, shared out among the jobs."""
    full_disks: int = 40
    """Full disks, shared out among the jobs."""
    seed: int = 0
    """Of the moments and sizes."""


@dataclass
class Counts:
    kills: int = 0
    in_the_middle: int = 0  # of them, how many hit the work rather than its first or last instant
    full_disks: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills ({self.in_the_middle} with files there already), {self.full_disks} full disks, "
            f"{len(self.problems)} problems"
        )


# ---- Jobs ------------------------------------------------------------------------------------------------------------


def prompts(folder: Path) -> int:
    return command([*PROMPTS, "--out", str(folder), "--resume"])


def train(folder: Path) -> int:
    return command([*TRAIN, "--out", str(folder), "--resume"])


def bank(folder: Path) -> int:
    """A bank of many rows, written as they are made."""
    clip, faces = load_clip(), SyntheticFaces(8, emotions=["neutral", "happy"], clips=2, frames_per_clip=2, size=32)
    torch.manual_seed(0)
    learned = PersonalizedPrompts(clip, faces.emotions, n_ctx=4)
    conditions = LiveFeatures(clip, faces)[torch.arange(len(faces))]
    path = folder / "bank.safetensors"
    options = {"condition": "frame", "batch_size": 4, "path": path}
    PromptBank.build(learned, conditions, faces.keys, faces.emotions, clip=clip, **options)
    return 0


def store(folder: Path) -> int:
    """A feature store of many shards."""
    faces = SyntheticFaces(8, emotions=["neutral", "happy"], clips=2, frames_per_clip=4, size=32)
    features = FeatureStore(folder, load_clip(), shard_frames=8)(faces, batch_size=4)
    files.save_tensors(folder / "all.safetensors", "features", {"all": features[torch.arange(len(faces))]}, {})
    return 0


JOBS: dict[str, Callable[[Path], int]] = {"prompts": prompts, "train": train, "bank": bank, "store": store}


def result_of(job: str, folder: Path) -> dict[str, object]:
    """What must be the same whatever happened on the way."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).as_posix()
        # A store's shards have random names, and end where it was killed.
        if "/" not in name or name.startswith("prompts/"):
            found[name] = path.read_bytes()
    for path in sorted(folder.rglob("summary.json")):
        summary = json.loads(path.read_text())
        found[path.name] = {key: value for key, value in summary.items() if key not in LOST}
    for path in sorted(folder.rglob("config.yaml")):
        found[path.name] = {k: v for k, v in yaml.safe_load(path.read_text()).items() if k != "out"}
    return found


def compare(found: dict[str, object], expected: dict[str, object], what: str, counts: Counts) -> None:
    differing = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if differing:
        counts.problems.append(f"{what}: another result in {', '.join(differing)}")


# ---- Kills -----------------------------------------------------------------------------------------------------------


def kill_at_random(job: str, count: int, place: Path, chance: random.Random, counts: Counts) -> None:
    whole = place / f"{job}-whole"
    seconds = timed(lambda: work(job, whole, counts))
    expected = result_of(job, whole)
    for number in range(count):
        folder = place / f"{job}-{number}"
        pid = start(job, folder)
        # A little beyond the end, because no two runs take the same time.
        time.sleep(chance.uniform(0, 1.05 * seconds))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        counts.kills += 1
        counts.in_the_middle += folder.exists() and any(path.is_file() for path in folder.rglob("*"))
        check_whole(folder, f"{job} {number}, after its kill", counts)
        work(job, folder, counts)
        compare(result_of(job, folder), expected, f"{job} {number}, after its kill", counts)
        check_nothing_left(folder, f"{job} {number}", counts)
        shutil.rmtree(folder)


def check_whole(folder: Path, what: str, counts: Counts) -> None:
    """Read every file under its own name; temporary ones may be anything."""
    readers = {".safetensors": load_file, ".ckpt": read_checkpoint, ".json": read_json, ".yaml": read_yaml}
    for path in sorted(folder.rglob("*")):
        if path.suffix in readers:
            try:
                readers[path.suffix](path)
            except Exception as error:
                counts.problems.append(f"{what}: {path.name} is not whole ({error})")


def read_json(path: Path) -> object:
    return json.loads(path.read_text())


def read_yaml(path: Path) -> object:
    options = yaml.safe_load(path.read_text())
    if not isinstance(options, dict):
        raise ValueError("no options")
    return options


def check_nothing_left(folder: Path, what: str, counts: Counts) -> None:
    """The next run has cleared away what the killed one was writing. A bank alone has no folder to clear."""
    left = [path.name for path in folder.rglob("*") if path.name.endswith(".unfinished") or path.name == ".in-use"]
    if left and folder.name.split("-")[0] != "bank":
        counts.problems.append(f"{what}: left {', '.join(left)}")


# ---- Full disks ------------------------------------------------------------------------------------------------------


def fill_disks(job: str, count: int, place: Path, chance: random.Random, counts: Counts) -> None:
    whole = place / f"{job}-whole"
    work(job, whole, counts)
    expected, size = result_of(job, whole), size_of(whole)
    for number in range(count):
        with disk(place / "disk", 2 * size) as mounted:
            earlier = shutil.copytree(whole, mounted / "earlier")
            before = {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()}
            # A file that takes the space which the job will lack.
            free = chance.randrange(4096, int(0.95 * size))
            ballast = mounted / "ballast"
            fill(ballast, leave=free)
            said = place / "said"
            status = wait(start(job, mounted / "out", said=said))
            message = said.read_text()
            counts.full_disks += 1
            what = f"{job} on full disk {number} ({free} of {size} bytes free)"
            if status == 0:
                pass  # it fitted after all: a store or a log may take less the second time
            elif status != 1 or str(mounted) not in message:
                counts.problems.append(f"{what}: ended with {status}: {message[-300:]}")
            if {path: path.read_bytes() for path in before} != before:
                counts.problems.append(f"{what}: an earlier result was changed")
            check_whole(mounted / "out", what, counts)
            ballast.unlink()
            shutil.rmtree(earlier)
            work(job, mounted / "out", counts)
            compare(result_of(job, mounted / "out"), expected, f"{what}, with space again", counts)


@contextlib.contextmanager
def disk(path: Path, size: int) -> Iterator[Path]:
    """A file system of its own in memory; needs the right to mount."""
    path.mkdir()
    if os.system(f"mount -t tmpfs -o size={size + 2**20} tmpfs {path}") != 0:
        raise PermissionError(
            "--full-disks: a small file system cannot be mounted here; run as root, or --full-disks 0"
        )
    try:
        yield path
    finally:
        os.system(f"umount {path}")
        path.rmdir()


def fill(path: Path, *, leave: int) -> None:
    room = shutil.disk_usage(path.parent).free
    with open(path, "wb") as file:
        file.write(bytes(max(0, room - leave)))


def size_of(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


# ---- Processes -------------------------------------------------------------------------------------------------------


def start(job: str, folder: Path, *, said: Path | None = None) -> int:
    """A fork of this process that does a job; what it prints goes to `said`."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        out = os.open(said or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        torch.set_num_threads(1)
        status = JOBS[job](folder)
    except OSError as error:
        print(error, flush=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def work(job: str, folder: Path, counts: Counts) -> None:
    """The job to its end, which must be a good one."""
    said = folder.parent / "said"
    if wait(start(job, folder, said=said)) != 0:
        counts.problems.append(f"{job} in {folder.name}: did not come to its end: {said.read_text()[-400:]}")


def timed(act: Callable[[], object]) -> float:
    started = time.monotonic()
    act()
    return time.monotonic() - started


def main(options: Options) -> Counts:
    run._EVALUATED_FRAMES = 12
    chance, counts = random.Random(options.seed), Counts()
    for number, job in enumerate(JOBS):
        with TemporaryDirectory() as place:
            share = [total // len(JOBS) + (number < total % len(JOBS)) for total in (options.kills, options.full_disks)]
            if share[0]:
                kill_at_random(job, share[0], Path(place), chance, counts)
            if share[1]:
                fill_disks(job, share[1], Path(place), chance, counts)
        print(f"{job}: so far {counts}", flush=True)
    for problem in counts.problems:
        print(problem)
    return counts


if __name__ == "__main__":
    sys.exit(1 if main(tyro.cli(Options)).problems else 0)
