"""How long `measure` takes for 200 clips, and whether it goes on after kills: `python -m bench.measure_clips`.

Ten drawn people talk with four emotions, five takes of 40 frames each at 256², with sound; the edits are the same takes
in other colours. All networks run, those of the authors with random weights in the authors' format. Linux only.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import tyro
from PIL import Image

from pcmecl_fast.machine import cores
from pcmecl_fast.measure import run_measure
from pcmecl_fast.train.config import MeasureConfig
from tests.field_weights import write_field_weights
from tests.raw_trees import Cast, write_video

EMOTIONS, TAKES, FRAMES, SIZE, DRAWN = ("neutral", "angry", "happy", "sad"), 5, 40, 256, 64
RATE = Fraction(30)


@dataclass
class Options:
    """Measure generated clips, whole and with kills."""

    people: int = 10
    """Drawn people, of 20 clips each."""
    quick: bool = True
    """As with --quick; without, all frames go through all networks."""
    kills: int = 3
    """Kills at random moments of a second run."""
    clips: Path | None = None
    """Where the generated clips are kept for another time; by default they are made anew and removed."""


def main(options: Options) -> None:
    with TemporaryDirectory() as name:
        clips = options.clips or Path(name) / "clips"
        if not (clips / "weights").is_dir():
            _make(clips, options.people)
        began = time.perf_counter()
        _wait(_start(clips, Path(name) / "once", options.quick))
        takes = time.perf_counter() - began
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(
            f"{options.people * len(EMOTIONS) * TAKES} clips on {cores()} cores: {takes:.0f} s, at most {memory:.0f} MB"
        )
        rng = random.Random(0)
        for _ in range(options.kills):
            child = _start(clips, Path(name) / "killed", options.quick)
            time.sleep(rng.uniform(0.1, 0.6) * takes)
            os.kill(child, signal.SIGKILL)
            _wait(child)
        began = time.perf_counter()
        _wait(_start(clips, Path(name) / "killed", options.quick))
        again = time.perf_counter() - began
        same = _numbers(Path(name) / "once") == _numbers(Path(name) / "killed")
        print(f"after {options.kills} kills: {again:.0f} s more, and {'the same numbers' if same else 'OTHER NUMBERS'}")
        sys.exit(not same)


def _make(folder: Path, people: int) -> None:
    write_field_weights(folder / "weights.unfinished")
    with ProcessPoolExecutor(cores()) as pool:
        list(pool.map(_make_person, [folder] * people, range(people)))
    (folder / "weights.unfinished").rename(folder / "weights")  # last: what has it is whole


def _make_person(folder: Path, number: int) -> None:
    torch.set_num_threads(1)
    cast = Cast((f"P{number:03d}",), frames=FRAMES, seed=number, size=DRAWN, takes=TAKES)
    rng = np.random.default_rng(number)
    for emotion in EMOTIONS:
        for k in range(TAKES):
            take = cast.take(f"P{number:03d}", emotion, k)
            faces = np.stack([np.array(Image.fromarray(face).resize((SIZE, SIZE))) for face in take.faces])
            warmer = (faces * rng.uniform(0.85, 1, 3)).astype(np.uint8)
            for root, frames in (("reference", faces), ("edited", warmer)):
                path = folder / root / f"P{number:03d}" / emotion / f"{k:03d}.mp4"
                write_video(path, frames, RATE, take.sound(RATE, 16000), 16000)


def _start(clips: Path, out: Path, quick: bool) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        weights = clips / "weights"
        run_measure(MeasureConfig(clips / "edited", clips / "reference", weights=weights, quick=quick, out=out))
        status = 0
    finally:
        os._exit(status)


def _wait(child: int) -> None:
    os.waitpid(child, 0)


def _numbers(out: Path) -> dict:
    return json.loads((out / "measures.json").read_text())["settings"]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
