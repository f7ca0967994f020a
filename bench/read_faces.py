"""How fast a prepared folder opens, and how fast random frames are read from its videos: `python -m bench.read_faces`.

Opening: an index of a million frames in 100,000 clips, tracks and all; seconds, and the memory of the whole process.
Reading: batches of 24 frames drawn at random from videos at 256², as training reads them, by 0, 1 and 2 workers.
"""

from __future__ import annotations

import itertools
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.data import astronaut

from pcmecl_fast.data.cutting import GROUP
from pcmecl_fast.data.emotions import EMOTIONS
from pcmecl_fast.data.folder import FolderFaces
from pcmecl_fast.data.index import INDEX, Entry, packed_pts, write_index
from pcmecl_fast.data.loading import read_ahead
from pcmecl_fast.data.splits import split
from pcmecl_fast.data.video import scan, write_clip
from pcmecl_fast.files import content_hash

CLIPS, FRAMES, INDIVIDUALS = 100_000, 10, 50
BATCH, BATCHES, VIDEOS, LENGTH = 24, 40, 48, 90


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = _megabytes()
        _write_large_index(folder / "large")
        began = time.perf_counter()
        faces = FolderFaces(folder / "large", size=256)
        opened = time.perf_counter() - began
        train, held = split(faces, by="clip")
        done = time.perf_counter() - began
        print(f"{len(faces):,} frames in {CLIPS:,} clips: opened in {opened:.1f} s, and split by clip in {done:.1f} s")
        print(f"memory of the process: {before:.0f} MB before, at most {_megabytes():.0f} MB; {len(held):,} held out")
        del faces, train, held
        _write_videos(folder / "videos")
        for workers in (0, 1, 2):
            print(f"{workers} workers: {_frames_per_second(folder / 'videos', workers):.0f} frames a second")


def _write_large_index(root: Path) -> None:
    root.mkdir()
    squares = [[128.25 + t, 130.5 - t, 200.75, 0.0] for t in range(3)]
    track = {"at": [0, 5, 10], "squares": squares, "found": 1.0, "missing": []}

    def entries() -> Iterator[Entry]:
        names = itertools.product(range(INDIVIDUALS), EMOTIONS, range(CLIPS))
        for i, (n, emotion, clip) in enumerate(itertools.islice(_spread_evenly(names), CLIPS)):
            file = f"M{n:03d}/{emotion}/front-level_3-{clip:05d}.mp4"
            yield Entry(
                file, f"M{n:03d}", emotion, FRAMES, "video", 50_000, pts={"first": 0, "step": 512}, rate="30",
                checksum=f"{i:016x}", source=f"M{n:03d}/video/front/{emotion}/level_3/{clip:05d}.mp4",
                stamp=f"{i:016x}", level="level_3", view="front", number=clip, found=1.0, track=track,
            )  # fmt: skip

    write_index(root / INDEX, entries(), {"layout": "mead", "finished": True})


def _spread_evenly(names: Iterator[tuple[int, str, int]]) -> Iterator[tuple[int, str, int]]:
    each = CLIPS // (INDIVIDUALS * len(EMOTIONS)) + 1
    return (name for name in names if name[2] < each)


def _write_videos(root: Path) -> None:
    """A face that sways, with a camera's noise: what a prepared clip holds (scikit-image's astronaut)."""
    random = np.random.default_rng(0)
    picture = np.asarray(Image.fromarray(astronaut()).resize((1024, 1024)), dtype=np.float32)
    entries = []
    for video in range(VIDEOS):
        file = f"p{video % 6}/{EMOTIONS[video % 7]}/{video}.mp4"
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, enumerate(_swaying(picture, video, random)), time_base=Fraction(1, 30), group=GROUP)
        pts = packed_pts(scan(path).tolist())
        entry = Entry(file, f"p{video % 6}", EMOTIONS[video % 7], LENGTH, "video", path.stat().st_size, pts=pts)
        entries.append(replace(entry, checksum=content_hash(path)))
    write_index(root / INDEX, entries, {"layout": "folder", "finished": True})


def _swaying(picture: np.ndarray, phase: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    for t in range(LENGTH):
        x, y = int(320 + 20 * np.sin(t / 9 + phase)), int(105 + 12 * np.cos(t / 7 + phase))
        noise = random.normal(0, 2.5, (256, 256, 3))
        yield (picture[y : y + 256, x : x + 256] + noise).clip(0, 255).astype(np.uint8)


def _frames_per_second(root: Path, workers: int) -> float:
    faces = FolderFaces(root, size=256, cache=False)
    generator = torch.Generator().manual_seed(0)
    plans = [torch.randint(len(faces), (BATCH,), generator=generator) for _ in range(BATCHES)]
    batches = iter(read_ahead(faces, plans, lambda plan: plan, workers=workers))
    next(batches)  # the workers have begun
    began = time.perf_counter()
    count = sum(len(frames) for _, frames in batches)
    return count / (time.perf_counter() - began)


def _megabytes() -> float:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10


if __name__ == "__main__":
    main()
