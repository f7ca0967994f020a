"""`prepare` killed at random moments: whatever is in the folder is whole, and in the end it is as if nothing had been.

    python -m tests.kill_prepare [--kills 20]

A raw tree with gaps and broken files is prepared once to the end. Then again and again into another folder, by a fork
of this process that is killed (SIGKILL, its workers with it or without) at a random moment and started again. After
each kill every file that the index names has to be whole; at the end the folder has to hold the first one's bytes.
Linux only.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from pcmecl_fast.commands import run_command
from pcmecl_fast.data.index import INDEX, read_index
from pcmecl_fast.files import content_hash
from tests.raw_trees import mead_tree, ravdess_tree


@dataclass
class Options:
    """Kill `prepare` at random moments, and look whether anything is lost or done twice."""

    kills: int = 20
    """Kills in all."""
    seed: int = 0
    """Of the moments."""


def main(options: Options) -> int:
    rng = random.Random(options.seed)
    problems: list[str] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        done = 0
        for tree, form in ((mead_tree(folder / "mead", frames=40), "mp4"), (ravdess_tree(folder / "ravdess"), "png")):
            began = time.monotonic()
            _wait(_start(tree.root, folder / f"once-{form}", form))
            once, takes = _content(folder / f"once-{form}"), time.monotonic() - began
            wanted = options.kills // 2 if form == "mp4" else options.kills - done
            killed = folder / f"killed-{form}"
            for _ in range(wanted):
                child = _start(tree.root, killed, form)
                time.sleep(rng.uniform(0, takes))
                # With its workers, as a machine that goes down, or alone, as the system that runs out of memory.
                (os.killpg if rng.random() < 0.5 else os.kill)(child, signal.SIGKILL)
                _wait(child)
                done += 1
                problems += _damage(killed)
                if (killed / INDEX).exists() and '"finished"' in (killed / INDEX).open().readline():
                    problems += [] if _content(killed) == once else [f"{killed}: finished, and not the same"]
                    shutil.rmtree(killed)
            time.sleep(1)  # workers whose parent was killed end, too
            _wait(_start(tree.root, killed, form))
            problems += _differences(once, _content(killed))
            litter = [str(p) for p in killed.rglob(".*") if p.name != ".lock"]
            problems += [f"left behind: {path}" for path in litter]
    print("\n".join(problems))
    print(f"{done} kills, {len(problems)} problems")
    return bool(problems)


def _start(root: Path, out: Path, form: str) -> int:
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    words = ["--data", str(root), "--out", str(out), "--crop", "centre", "--frames", form, "--skip-broken"]
    os._exit(run_command(["prepare", *words, "--size", "64", "--workers", "2"]))


def _wait(child: int) -> None:
    os.waitpid(child, 0)


def _content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", ".in-use"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _damage(folder: Path) -> list[str]:
    """What the index names and is not there as it says."""
    if not (folder / INDEX).exists():
        return []
    found = []
    for entry in read_index(folder / INDEX)[1]:
        path = folder / entry.file
        if not entry.broken and path.suffix and content_hash(path) != entry.checksum:
            found.append(f"{path}: not what the index says")
        if not entry.broken and not path.suffix and len(list(path.glob("*.png"))) != entry.frames:
            found.append(f"{path}: not all of its pictures")
    return found


def _differences(once: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    names = sorted(name for name in {**once, **after} if once.get(name) != after.get(name))
    return [f"{name}: differs from one run through" for name in names]


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
