"""The command `edit`: pictures and videos through a trained generator, each to a file that is named for what it is."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pcmecl_fast import ops
from pcmecl_fast.data.media import check_media, count_frames, is_hidden, is_media, need_av, read_frames, write_frames
from pcmecl_fast.models import Generator, load_generator
from pcmecl_fast.ops.operator import usable_backend
from pcmecl_fast.run_folder import file_of_run
from pcmecl_fast.train.config import EditConfig, check_options, device_named
from pcmecl_fast.wording import name_some

log = logging.getLogger("pcmecl_fast")

_FRAMES_AT_ONCE = 32


def run_edit(config: EditConfig) -> dict[str, Any]:
    """Edit pictures or videos with a trained generator: `talk.mp4` becomes `talk.happy.mp4` in the output folder.

    Raises:
        FileExistsError: an output exists, or would take the place of an input; nothing has been done.
        ValueError: at the end, files of a folder that could not be read; the others are written.
    """
    check_options(config)
    generator = load_generator(
        file_of_run("run", config.run, "generator"), device_named(config.device), generator=config.generator
    )
    target = _target_of(generator, config)
    files = _files(config, generator.emotions)
    outputs = {file: _output(file, config.emotion, config) for file in files}
    _check_outputs(outputs, config)
    # Said before a progress bar is shown; of a folder, the others are edited.
    alone = None if config.input.is_dir() else _read_alone(config.input, generator.size)
    torch.manual_seed(config.seed)
    frames, broken = 0, []
    with ops.use_backend(usable_backend(config.backend)), _Progress(files) as progress:
        for file, output in outputs.items():
            try:
                rate, source = alone or read_frames(file, generator.size)
            except (OSError, ValueError) as error:
                broken.append(str(error).removeprefix("input: "))
                log.warning("skipped: %s", broken[-1])
                progress.skip(file)
                continue
            progress.expect(file, len(source))
            edited = [_edit(generator, part, target, progress) for part in source.split(_FRAMES_AT_ONCE)]
            write_frames(output, torch.cat(edited), rate)
            frames += len(source)
    if broken:
        done = len(files) - len(broken)
        rest = f"; the other {done} {'is' if done == 1 else 'are'} in {config.out}" if done else ""
        raise ValueError(
            f"--input: {len(broken)} of {len(files)} files could not be read: {name_some(broken, 3)}{rest}"
        )
    return {"files": len(files), "frames": frames, "out": str(config.out)}


def _read_alone(path: Path, size: int) -> tuple[Fraction | None, Tensor]:
    try:
        return read_frames(path, size)
    except ValueError as error:
        raise ValueError(f"input: {str(error).removeprefix('input: ')}") from error


def _target_of(generator: Generator, config: EditConfig) -> Tensor:
    """What drives an edit, for one frame: the emotion's index (1,), or the reference (1, 3, S, S)."""
    if config.emotion not in generator.emotions:
        raise ValueError(f"emotion: this generator knows {', '.join(generator.emotions)}, got {config.emotion!r}")
    device = device_named(config.device)
    if generator.driven_by == "emotion":
        return torch.tensor([generator.emotions.index(config.emotion)], device=device)
    if config.reference is None:
        raise ValueError("reference: this generator is driven by a picture of somebody who shows the emotion")
    return read_frames(config.reference, generator.size)[1][:1].to(device)


def _files(config: EditConfig, emotions: Sequence[str]) -> list[Path]:
    """What is to be edited, in order."""
    if not config.input.is_dir():
        check_media(config.input)
        return [config.input]
    found = sorted(config.input.rglob("*") if config.recursive else config.input.iterdir())
    files = [path for path in found if is_media(path) and path.is_file() and not _is_aside(path, config)]
    if config.out.resolve() == config.input.resolve():  # edits of an earlier call lie between their inputs
        edits = {_output(path, emotion, config).resolve() for path in files for emotion in emotions}
        files = [path for path in files if path.resolve() not in edits]
    if not files:
        deeper = not config.recursive and any(is_media(path) for path in config.input.rglob("*"))
        hint = "; --recursive edits what is in its subfolders" if deeper else ""
        raise ValueError(f"input: {config.input} contains no picture or video{hint}")
    need_av(files)
    return files


def _is_aside(path: Path, config: EditConfig) -> bool:
    """Whether a file is in a hidden folder, or in an output folder that lies inside the input."""
    inside = path.relative_to(config.input).parts[:-1]
    out, source = config.out.resolve(), config.input.resolve()
    edited = out != source and out.is_relative_to(source) and path.resolve().is_relative_to(out)
    return edited or any(is_hidden(Path(part)) for part in inside)


def _output(file: Path, emotion: str, config: EditConfig) -> Path:
    folder = file.parent.relative_to(config.input) if config.input.is_dir() else Path()
    return config.out / folder / f"{file.stem}.{emotion}{file.suffix}"


def _check_outputs(outputs: dict[Path, Path], config: EditConfig) -> None:
    """Before any work: no input is ever written over, and no file that is there without `overwrite`."""
    inputs = {_identity(path) for path in (*outputs, config.reference) if path is not None and path.exists()}
    there = [path for path in outputs.values() if path.exists()]
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


def _edit(generator: Generator, frames: Tensor, target: Tensor, progress: _Progress) -> Tensor:
    edited = generator(frames.to(target.device), target.expand(len(frames), *target.shape[1:])).cpu()
    progress.update(len(frames))
    return edited


class _Progress(tqdm):
    """Frames done and the time left; how long a video is is known for certain when it has been read."""

    def __init__(self, files: list[Path]) -> None:
        self.expected = {file: count_frames(file) for file in files}
        super().__init__(total=sum(self.expected.values()), desc="editing", unit="frame")

    def expect(self, file: Path, frames: int) -> None:
        self.total = (self.total or 0) + frames - self.expected[file]
        self.refresh()

    def skip(self, file: Path) -> None:
        self.expect(file, 0)
