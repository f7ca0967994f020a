"""A command's output folder: one run at a time works in it, and what it holds is neither lost nor made false.

with open_run(config.out, config, resume=config.resume, overwrite=config.overwrite) as folder:
    if folder.result is not None:      # of a finished run that --resume found
        return folder.result
    …                                  # every check: data, options, prompts
    folder.begin()                     # only now is anything in the folder touched
    …                                  # the work
    folder.finish(summary)             # the last file: whoever sees it sees a whole run
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from pcmecl_fast.distributed import from_main, is_main
from pcmecl_fast.files import remove_unfinished, write_atomically
from pcmecl_fast.options import from_options, named_differences, plain_options, read_options
from pcmecl_fast.prompts.shards import remove_files
from pcmecl_fast.train.config import FREE_ON_RESUME, Command

log = logging.getLogger("pcmecl_fast")

CONFIG, SUMMARY = "config.yaml", "summary.json"
_HEADER = "# pcmecl-fast "  # … and the command: the first line of a config.yaml
_LOCK, _HOLDER = ".lock", ".in-use"
_ONE_FAMILY = {"demo": "train"}
# The rest of what commands write: files, the folders that are theirs alone, and folders of files such as these.
_FILES = (
    *("report.html", "faces.png", "clip-1.webp", "clip-2.webp"),
    *("ablation.svg", "generator.safetensors", "prompts.safetensors", "bank.safetensors", "lengths.safetensors"),
    *("stage-1.ckpt", "stage-2.ckpt"),
)
_FOLDERS = ("tensorboard", "trainings", "views")
_INNER = ("prompts", "evaluation")


@dataclass(frozen=True)
class Held:
    """What a folder holds already.

    Attributes:
        command: that wrote it; "" where the folder does not say.
        finished: whether its last file is there.
        options: its config.yaml.
        files: the names of its files.
    """

    command: str
    finished: bool
    options: dict[str, Any]
    files: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.command:
            return f"files of an earlier run ({', '.join(self.files[:3])})"
        steps = f", {self.options['steps']} steps" if "steps" in self.options else ""
        return f"{'a finished' if self.finished else 'an unfinished'} run of `pcmecl-fast {self.command}`{steps}"


def held_by(folder: Path) -> Held | None:
    """What a folder holds, None where that is no run.

    Raises:
        ValueError: its config.yaml is broken.
    """
    config = folder / CONFIG
    files = [name for name in (CONFIG, SUMMARY, *_FILES) if (folder / name).exists()]
    if not files:
        return None
    if not config.is_file():
        return Held("", (folder / SUMMARY).is_file(), {}, files)
    options = read_options(config, argument="--out")
    first = config.read_text().partition("\n")[0]
    command = first.removeprefix(_HEADER).partition(":")[0] if first.startswith(_HEADER) else ""
    if not command and "n_ctx" in options:  # somebody took the comment away
        command = "train" if "generator" in options else "prompts"
    return Held(command, SUMMARY in files, options, files)


def file_of_run(argument: str, folder: Path, name: str) -> Path:
    """A file of a finished run; FileNotFoundError names the argument that led to it."""
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: {folder} holds no {path.name}; it takes the folder of a finished run")
    return path


class RunFolder:
    """What `open_run` gives: the folder, locked.

    Attributes:
        path: the folder.
        result: the summary of a finished run with the same options, which `resume` asks for: nothing is left to do.
    """

    def __init__(self, path: Path, config: Command, *, replaces: bool, resumes: bool) -> None:
        self.path, self.config = path, config
        self._replaces, self._resumes = replaces, resumes
        self.result: dict[str, Any] | None = None

    def begin(self) -> None:
        """Every check has passed: what is to be overwritten goes, and the configuration is written.

        All ranks come here; the first alone writes, and the others wait for it.
        """
        from_main(self._begin)

    def _begin(self) -> None:
        if self._replaces:
            _remove_run(self.path)
        if not (self._resumes and (self.path / CONFIG).exists()):
            self._write_config()

    def _write_config(self) -> None:
        options = {k: v for k, v in plain_options(self.config).items() if k not in ("resume", "overwrite")}
        if options["out"] is not None:  # whole, like the other paths: from another folder, too, it says which run
            options["out"] = str(self.path.absolute())
        repeat = f"{_HEADER}{self.config.command}: --config {CONFIG} repeats it\n"
        write_atomically(self.path / CONFIG, (repeat + yaml.safe_dump(options, sort_keys=False)).encode())

    def finish(self, summary: Any) -> None:
        """Write the summary, after everything else."""
        write_atomically(self.path / SUMMARY, (json.dumps(_finite(summary), indent=2) + "\n").encode())


class _AnothersFolder(RunFolder):
    """The folder as a rank sees it that does not write there."""

    def begin(self) -> None:
        from_main(lambda: None)

    def finish(self, summary: Any) -> None:
        pass


@contextlib.contextmanager
def open_run(
    path: Path, config: Command, *, resume: bool = False, overwrite: bool = False, extend: bool = False
) -> Iterator[RunFolder]:
    """Have a folder for oneself as long as the block runs; nothing but the lock is written before `begin`.

    Of several ranks, the first has it, and the others learn from it whether there is anything to do.

    Args:
        path: the folder; made where it is missing, and removed again where the block leaves it empty.
        config: the command's options.
        resume: go on with the run that the folder holds.
        overwrite: replace it.
        extend: the command itself knows what is done and what is left, as `ablate` does.

    Raises:
        BlockingIOError: another process works in the folder.
        FileExistsError: the folder holds a run, and nothing says what to do with it.
        ValueError: the run that is to be resumed had other options.
    """
    if not is_main():
        anothers = _AnothersFolder(path, config, replaces=False, resumes=resume)
        anothers.result = from_main(lambda: None)
        yield anothers
        return
    with locked(path, config.command):
        held = held_by(path)
        _check_held(path, config, held, resume=resume, overwrite=overwrite, extend=extend)
        for inner in (path, *path.glob("prompts"), *path.glob("prompts/*"), *path.glob("trainings/*")):
            remove_unfinished(inner)
        folder = RunFolder(path, config, replaces=held is not None and overwrite, resumes=resume)
        if held is None and resume:
            log.info("%s holds nothing to resume: a new run begins", path)
        if held is not None and held.finished and resume:
            log.info("%s holds %s: nothing is left to do; --overwrite runs it again", path, held)
            folder.result = json.loads((path / SUMMARY).read_text())
        from_main(lambda: folder.result)
        yield folder


def _check_held(path: Path, config: Command, held: Held | None, *, resume: bool, overwrite: bool, extend: bool) -> None:
    """Refuse to lose or to mix what the folder holds."""
    if resume and overwrite:
        raise ValueError("--resume goes on with a run and --overwrite replaces it: give one of them")
    if held is None:
        return
    family = _ONE_FAMILY.get(config.command, config.command)
    # Files without a config.yaml are a part of another run, such as the prompts inside it.
    if _ONE_FAMILY.get(held.command, held.command) != family:
        raise FileExistsError(f"--out: {path} holds {held}; name another folder")
    if overwrite or extend:
        return
    if not resume:
        raise FileExistsError(f"--out: {path} holds {held}: {_choices(config, held)}, and another --out keeps it")
    if held.options:
        before = from_options(type(config), held.options, source=f"--resume: {path / CONFIG}")
        was, now = ({k: v for k, v in plain_options(c).items() if k not in FREE_ON_RESUME} for c in (before, config))
        if differing := named_differences(was, now):
            raise ValueError(
                f"--resume: {path} holds {held}, with other options: {differing}; --overwrite replaces it, and "
                "another --out keeps it"
            )


def _choices(config: Command, held: Held) -> str:
    if not hasattr(config, "resume"):
        return "--overwrite replaces it"
    resumed = "shows its result again" if held.finished else "goes on with it"
    return f"--resume {resumed}, --overwrite replaces it"


@contextlib.contextmanager
def locked(path: Path, command: str) -> Iterator[None]:
    """Have a folder for oneself as long as the block runs; made where it is missing, removed where it is left empty.

    Raises:
        BlockingIOError: another process works in it; the message says which.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    # The system frees it with the process, however that ends; so it may stay where it is.
    lock = FileLock(path / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(f"--out: {path} is in use{_holder(path)}; wait for it, or name another folder") from None
    try:
        # Beside the lock and not in it, which whoever tries it empties.
        holder = f"process {os.getpid()} on {socket.gethostname()}, pcmecl-fast {command} since {time.strftime('%X')}"
        with contextlib.suppress(OSError):  # a courtesy
            (path / _HOLDER).write_text(holder)
        yield
    finally:
        (path / _HOLDER).unlink(missing_ok=True)
        if not [name for name in os.listdir(path) if name != _LOCK]:
            (path / _LOCK).unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # not empty: the run has begun
            for folder in made:
                folder.rmdir()


def _holder(path: Path) -> str:
    try:
        return f" by {(path / _HOLDER).read_text()}"
    except OSError:  # it has just gone, or has just come
        return ""


def _remove_run(path: Path) -> None:
    """Remove what commands wrote in a folder, and nothing else; image features stay, since they are never outdated."""
    # The summary first: from here on, whoever looks sees an unfinished run.
    for name in (SUMMARY, *_FILES):
        (path / name).unlink(missing_ok=True)
    remove_files(path / "bank.safetensors")
    for name in _FOLDERS:
        shutil.rmtree(path / name, ignore_errors=True)
    for inner in (*(path / "prompts").glob("*/"), *(path / name for name in _INNER)):
        held = held_by(inner) if inner.is_dir() else None
        # A run of its own, that somebody keeps here, is not this one's.
        if held is not None and held.command in ("", "evaluate"):
            _remove_run(inner)
        with contextlib.suppress(OSError):
            inner.rmdir()
    (path / CONFIG).unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: None."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
