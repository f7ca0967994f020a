"""The command `edit`: pictures and videos through a trained generator, each to a file that is named for what it is."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pcmecl_fast import ops
from pcmecl_fast.data.media import IMAGES, VIDEOS, is_hidden, read_frames
from pcmecl_fast.data.tracks import Crop
from pcmecl_fast.data.video import declared_frames, open_video
from pcmecl_fast.edit_faces import FaceEditor, Schedule
from pcmecl_fast.edit_media import FaceFinder, MediaEditor, read_picture
from pcmecl_fast.models import Generator, load_generator
from pcmecl_fast.ops.operator import usable_backend
from pcmecl_fast.options import read_options
from pcmecl_fast.run_folder import CONFIG, file_of_run
from pcmecl_fast.train.config import EditConfig, check_options, device_named
from pcmecl_fast.wording import name_some

log = logging.getLogger("pcmecl_fast")

_VIDEOS = VIDEOS | {".m4v", ".flv", ".wmv", ".mpg", ".mpeg", ".ts", ".mts", ".3gp", ".ogv"}
_PICTURES = IMAGES | {".bmp", ".tif", ".tiff"}
_WRITTEN = frozenset({".mp4", ".mkv", ".webm", ".mov", ".m4v", *IMAGES})
_STRONGEST = 1.5


def run_edit(config: EditConfig) -> dict[str, Any]:
    """Edit pictures or videos with a trained generator: `talk.mp4` becomes `talk.happy.mp4` in the output folder.

    Returns:
        files, frames: how many were edited.
        out: the output folder.
        milliseconds: a frame took, by part of the work (decode, detect, edit, encode).

    Raises:
        FileExistsError: an output exists, or would take the place of an input; nothing has been done.
        ValueError: an option that does not fit; or at the end, files of a folder that could not be read, or show no
            face: the others are written.
        OSError: the disk is full, or the folder cannot be written.
    """
    check_options(config)
    if not 0 <= config.strength <= _STRONGEST:
        raise ValueError(f"--strength: takes 0 to {_STRONGEST}, got {config.strength}")
    schedule = _schedule(config)
    generator = load_generator(
        file_of_run("run", config.run, "generator"), device_named(config.device), generator=config.generator
    )
    targets = _targets(generator, schedule, config)
    jobs = _jobs(config, schedule, generator.emotions)
    if config.resume:
        jobs = _missing(jobs, config)
    _check_outputs(jobs, config)
    editor = FaceEditor(generator, targets, schedule, strength=config.strength)
    finder = FaceFinder(
        config.crop, config.face, config.detector, config.every, generator.crop or Crop(), _is_drawn(config.run)
    )
    media = MediaEditor(editor, finder, config.smooth, config.crf)
    alone = not config.input.is_dir()
    if alone:
        _check_readable(config.input)  # said before a progress bar is shown
    torch.manual_seed(config.seed)
    frames, broken = 0, []
    backend = ops.use_backend(usable_backend(config.backend))
    with backend, _few_threads(), _Progress([job.source for job in jobs]) as progress:
        for job in jobs:
            progress.begin()
            try:
                frames += _edit(media, job, progress)
            except ValueError as error:  # an OSError, such as a full disk, is not of this file alone
                if alone:
                    raise ValueError(f"input: {error}") from error
                broken.append(str(error))
                log.warning("skipped: %s", error)
                progress.skip(job.source)
    if broken:
        done = len(jobs) - len(broken)
        rest = f"; the other {done} {'is' if done == 1 else 'are'} in {config.out}" if done else ""
        raise ValueError(
            f"--input: {len(broken)} of {len(jobs)} files could not be edited: {name_some(broken, 3)}{rest}"
        )
    spent = {part: round(1000 * seconds / max(frames, 1), 1) for part, seconds in media.clock.items()}
    return {"files": len(jobs), "frames": frames, "out": str(config.out), "milliseconds": spent}


@dataclass(frozen=True)
class _Job:
    source: Path
    output: Path
    compare: Path | None


def _edit(media: MediaEditor, job: _Job, progress: _Progress) -> int:
    if not _is_video(job.source):
        media.picture(job.source, job.output, job.compare)
        progress.update(1)
        return 1
    frames = media.video(job.source, job.output, job.compare, progress.update)
    progress.expect(job.source, frames)
    return frames


@contextlib.contextmanager
def _few_threads() -> Iterator[None]:
    """Leave the cores to decoder and encoder, whose threads work while PyTorch's do.

    One face is little work, and threads that share it spend their time waiting for cores: on two cores, a video in full
    HD takes a third of the time with one of PyTorch's threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // 4))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _schedule(config: EditConfig) -> Schedule:
    if (config.emotion is None) == (config.at is None):
        raise ValueError("--emotion: takes the emotion to show, or --at those to show from times on: one of the two")
    return Schedule.parse(config.at) if config.at is not None else Schedule.always(config.emotion or "")


def _targets(generator: Generator, schedule: Schedule, config: EditConfig) -> dict[str, Tensor]:
    """What drives an edit to each emotion, for one frame: its index (1,), or the reference (1, 3, S, S)."""
    option = "emotion" if config.at is None else "at"
    for emotion in schedule.emotions:
        if emotion not in generator.emotions:
            raise ValueError(f"{option}: this generator knows {', '.join(generator.emotions)}, got {emotion!r}")
    device = device_named(config.device)
    if generator.driven_by == "emotion":
        return {name: torch.tensor([generator.emotions.index(name)], device=device) for name in schedule.emotions}
    if config.reference is None:
        raise ValueError("reference: this generator is driven by a picture of somebody who shows the emotion")
    if len(schedule.emotions) > 1:
        raise ValueError("at: this generator is driven by one picture, which shows one emotion")
    return dict.fromkeys(schedule.emotions, read_frames(config.reference, generator.size)[1][:1].to(device))


def _is_drawn(run: Path) -> bool:
    """Whether a run was trained on drawn faces, as far as its folder says."""
    return (run / CONFIG).is_file() and read_options(run / CONFIG, argument="run").get("data") == "synthetic"


def _jobs(config: EditConfig, schedule: Schedule, emotions: Sequence[str]) -> list[_Job]:
    """What is to be edited, in order, and where it goes."""
    if not config.input.is_dir():
        _check_media(config.input)
        files = [config.input]
    else:
        files = _files_of_folder(config, emotions)
    jobs = []
    for file in files:
        folder = config.out / (file.parent.relative_to(config.input) if config.input.is_dir() else Path())
        name, suffix = f"{file.stem}.{'-'.join(schedule.emotions)}", _suffix(file, config)
        compare = folder / f"{name}.compare{suffix}" if config.compare else None
        jobs.append(_Job(file, folder / f"{name}{suffix}", compare))
    return jobs


def _missing(jobs: list[_Job], config: EditConfig) -> list[_Job]:
    """Those whose edits are not there: every edit is whole or absent."""
    if config.overwrite:
        raise ValueError("--resume edits what is missing and --overwrite replaces what is there: give one of them")
    left = [job for job in jobs if not job.output.exists()]
    if len(left) < len(jobs):
        log.info("%d of %d files are edited already", len(jobs) - len(left), len(jobs))
    for job in left:  # a comparison has its name just before its edit has
        if job.compare is not None:
            job.compare.unlink(missing_ok=True)
    return left


def _suffix(file: Path, config: EditConfig) -> str:
    pictures = config.format in ("png", "jpg")
    if config.format is not None and pictures != _is_video(file):
        return f".{config.format}"
    if config.format is not None and not config.input.is_dir():
        takes = "mp4, mkv, webm or mov" if _is_video(file) else "png or jpg"
        raise ValueError(f"--format: {file} becomes {takes}, not {config.format}")
    if file.suffix.lower() in _WRITTEN:
        return file.suffix
    return ".mp4" if _is_video(file) else ".png"


def _files_of_folder(config: EditConfig, emotions: Sequence[str]) -> list[Path]:
    found = sorted(config.input.rglob("*") if config.recursive else config.input.iterdir())
    files = [path for path in found if _is_media(path) and path.is_file() and not _is_aside(path, config)]
    if config.out.resolve() == config.input.resolve():  # edits of an earlier call lie between their inputs
        names = {path.parent / path.stem for path in files}
        files = [path for path in files if not _is_edit(path, names, emotions)]
    if not files:
        deeper = not config.recursive and any(_is_media(path) for path in config.input.rglob("*"))
        hint = "; --recursive edits what is in its subfolders" if deeper else ""
        raise ValueError(f"input: {config.input} contains no picture or video{hint}")
    return files


def _is_edit(path: Path, names: set[Path], emotions: Sequence[str]) -> bool:
    """Whether a file is named as an edit of one beside it."""
    source, _, shown = path.stem.removesuffix(".compare").rpartition(".")
    return path.parent / source in names and set(shown.split("-")) <= set(emotions)


def _is_aside(path: Path, config: EditConfig) -> bool:
    """Whether a file is in a hidden folder, or in an output folder that lies inside the input."""
    inside = path.relative_to(config.input).parts[:-1]
    out, source = config.out.resolve(), config.input.resolve()
    edited = out != source and out.is_relative_to(source) and path.resolve().is_relative_to(out)
    return edited or any(is_hidden(Path(part)) for part in inside)


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in _VIDEOS


def _is_media(path: Path) -> bool:
    return path.suffix.lower() in _VIDEOS | _PICTURES and not is_hidden(path)


def _check_media(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"input: there is no file {path}")
    if not _is_media(path):
        raise ValueError(f"input: {path} is not a picture or video; takes {', '.join(sorted(_PICTURES | _VIDEOS))}")


def _check_readable(path: Path) -> None:
    """Say of a file that is edited alone what its beginning says."""
    try:
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty")
        if not _is_video(path):
            read_picture(path)
            return
        with open_video(path):
            pass
    except ValueError as error:
        raise ValueError(f"input: {error}") from error


def _check_outputs(jobs: list[_Job], config: EditConfig) -> None:
    """Before any work: no input is ever written over, no file twice, and none that is there without `overwrite`."""
    sources = [job.source for job in jobs]
    outputs = [path for job in jobs for path in (job.output, job.compare) if path is not None]
    twice = [str(path) for path, times in Counter(outputs).items() if times > 1]
    if twice:
        raise ValueError(f"--format: several inputs would become {name_some(twice, 3)}; edit them one by one")
    inputs = {_identity(path) for path in (*sources, config.reference) if path is not None and path.exists()}
    there = [path for path in outputs if path.exists()]
    taken = [str(path) for path in there if _identity(path) in inputs]
    if taken:
        raise FileExistsError(f"--out: {name_some(taken, 3)} would be written over, an input; name another folder")
    if there and not config.overwrite:
        names, one = name_some([str(path) for path in there], 3), len(there) == 1
        exist, them = ("exists", "it") if one else ("exist", "them")
        raise FileExistsError(
            f"--out: {names} {exist} already; --overwrite replaces {them}, another --out keeps {them}"
        )


def _identity(path: Path) -> tuple[int, int]:
    """The same for every name of a file."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


class _Progress(tqdm):
    """The work done and the time left, over both readings of a video; how long that is is known when it was read."""

    def __init__(self, files: list[Path]) -> None:
        self.expected = {file: declared_frames(file) if _is_video(file) else 1 for file in files}
        bar = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
        super().__init__(total=sum(self.expected.values()), desc="editing", bar_format=bar)

    def begin(self) -> None:
        self.begun = self.n

    def expect(self, file: Path, frames: int) -> None:
        self.total = (self.total or 0) + frames - self.expected[file]
        self.expected[file] = frames
        self.n = min(self.n, self.total)
        self.refresh()

    def skip(self, file: Path) -> None:
        self.n = self.begun
        self.expect(file, 0)

    def update(self, n: float | None = 1) -> bool | None:
        # A file may have more frames than it says.
        return super().update(min(n or 0, (self.total or 0) - self.n))
