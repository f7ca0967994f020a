"""The command `prepare`: faces cut out of a raw data set, in a folder that anyone can open, and `train` in seconds.

    <out>/<individual>/<emotion>/<clip>.mp4     256 × 256, sound and all;  a picture becomes <name>.png
    <out>/index.jsonl                           what is in each, and where the face was: data/index.py
    <out>/report.html                           every individual and emotion at a glance, and what could not be prepared

The index grows as clips are finished, each under its name only when it is whole. So a killed command goes on where it
was, and ends with the files that one run through would have made, byte for byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from pcmecl_fast.data.cutting import Cutting, cut_clip
from pcmecl_fast.data.emotions import KNOWN_EMOTIONS
from pcmecl_fast.data.faces import load_detector
from pcmecl_fast.data.index import INDEX, Entry, IndexWriter, read_index, write_index
from pcmecl_fast.data.layouts import RawClip, find_layout, select
from pcmecl_fast.data.layouts.base import natural
from pcmecl_fast.data.media import is_hidden, need_av
from pcmecl_fast.evaluate.contact_sheet import write_contact_sheet
from pcmecl_fast.files import remove_unfinished
from pcmecl_fast.machine import cores
from pcmecl_fast.options import named_differences
from pcmecl_fast.train.config import PrepareConfig, check_options
from pcmecl_fast.wording import name_some

log = logging.getLogger("pcmecl_fast")

_AHEAD = 4  # clips that wait for each worker
_LOCK = ".lock"


def run_prepare(config: PrepareConfig) -> dict[str, Any]:
    """Prepare every clip of a raw data set that is not prepared yet.

    Raises:
        BlockingIOError: another process prepares the same folder.
        FileExistsError: `out` holds something else, or clips prepared with other options.
        ValueError: nothing to prepare, an unknown layout, individual, emotion, view or level; recordings that have
            changed since they were prepared; and at the end, recordings that could not be prepared: the others are.
        OSError: the disk is full; what was prepared is whole, and the same command goes on.
    """
    check_options(config)
    layout, why = find_layout(config.data, config.layout)
    log.info("%s is laid out as %s: %s", config.data, layout.name, why)
    listing = layout.list(config.data)
    clips = select(
        listing.clips,
        individuals=config.individuals,
        emotions=config.emotions,
        views=config.views,
        levels=config.levels,
    )
    if listing.unknown:
        log.warning("not of this data set, by their names: %s", name_some(listing.unknown, 5))
    cutting = _cutting(config)
    jobs = _jobs(clips, config)
    _check_out(config)
    prepared = {"layout": layout.name, "data": os.path.abspath(config.data), **asdict(cutting)}
    with _locked(config.out):
        done = _done_before(config, prepared, jobs)
        left = [job for job in jobs if job.file not in done]
        if len(left) < len(jobs):
            log.info("%d of %d clips are prepared already", len(jobs) - len(left), len(jobs))
        _check_tools(cutting, left)
        _prepare(left, cutting, config, prepared)
        entries = _in_order(config.out / INDEX)
        asked = {job.file for job in jobs}
        write_contact_sheet(config.out, entries, prepared, why, listing.unknown)
        write_index(config.out / INDEX, entries, prepared | {"finished": True})  # last: who sees it sees all
    broken = [entry for entry in entries if entry.broken and entry.file in asked]
    if broken:
        _report_broken(broken, len(jobs), config)
    return _summary(entries, config.out)


@dataclass(frozen=True)
class _Job:
    """One clip to prepare."""

    clip: RawClip
    file: str  # of the prepared clip, in the output folder
    source: str  # of the recording, in the raw folder
    stamp: str


def _cutting(config: PrepareConfig) -> Cutting:
    return Cutting(**{f.name: getattr(config, f.name) for f in fields(Cutting)})


def _jobs(clips: Iterable[RawClip], config: PrepareConfig) -> list[_Job]:
    """The clips with their places in the output folder, in the order of the index."""
    if not clips:
        raise ValueError(f"--data: {config.data} holds no recordings")
    jobs: dict[str, _Job] = {}
    for clip in clips:
        suffix = ".png" if clip.is_picture else "" if config.frames == "png" else ".mp4"
        file = f"{clip.individual}/{clip.emotion}/{clip.name}{suffix}"
        jobs[file] = _Job(clip, file, clip.sources[0].relative_to(config.data).as_posix(), _stamp(clip))
    return list(jobs.values())


def _stamp(clip: RawClip) -> str:
    """What changes when a recording does: the sizes and time stamps of its files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in (*clip.sources, *filter(None, [clip.sound])):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Have the output folder for oneself."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(f"--out: another process prepares {out}; wait for it, or name another folder") from None
    try:
        yield
    finally:
        lock.release()


def _check_out(config: PrepareConfig) -> None:
    """Refuse an output folder that is somebody else's, before anything is written."""
    out, data = config.out.resolve(), config.data.resolve()
    if out.is_relative_to(data) or data.is_relative_to(out):
        raise ValueError(f"--out: {config.out} lies in --data, or around it; name a folder beside it")
    others = [path.name for path in out.iterdir() if not is_hidden(path)] if out.is_dir() else []
    if others and INDEX not in others:
        raise FileExistsError(
            f"--out: {config.out} holds {name_some(sorted(others), 3)}, not made by `pcmecl-fast prepare`; name "
            "another folder"
        )


def _done_before(config: PrepareConfig, prepared: dict[str, Any], jobs: list[_Job]) -> dict[str, Entry]:
    """What an earlier call has prepared, or found broken, as far as it still stands; refuses to mix or to lose it."""
    index = config.out / INDEX
    if not index.exists():
        return {}
    before, read = read_index(index)
    entries = {entry.file: entry for entry in read}
    was = {k: v for k, v in (before or {}).items() if k != "finished"}
    if differing := named_differences(was, prepared):
        if not config.overwrite:
            raise FileExistsError(
                f"--out: {config.out} was prepared with other options: {differing}; --overwrite prepares it again, "
                "and another --out keeps it"
            )
        _remove(config.out, entries.values())
        index.unlink()
        return {}
    stamps = {job.file: job.stamp for job in jobs}
    changed = [e for e in entries.values() if not e.broken and stamps.get(e.file, e.stamp) != e.stamp]
    if changed and not config.overwrite:
        names = name_some([str(config.data / entry.source) for entry in changed], 3)
        raise ValueError(
            f"--data: {names} changed since {'they were' if len(changed) > 1 else 'it was'} prepared; --overwrite "
            "prepares what has changed again, and another --out keeps what there is"
        )
    kept = {e.file: e for e in entries.values() if stamps.get(e.file, e.stamp) == e.stamp and _is_there(config.out, e)}
    if len(kept) < len(entries):
        write_index(index, kept.values(), prepared)
    return kept


def _is_there(out: Path, entry: Entry) -> bool:
    if entry.broken:
        return True
    try:
        path = out / entry.file
        return path.is_dir() if not path.suffix else path.stat().st_size == entry.bytes
    except OSError:
        return False


def _remove(out: Path, entries: Iterable[Entry]) -> None:
    """Remove prepared clips, and the folders that this leaves empty."""
    for entry in entries:
        path = out / entry.file
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        for folder in path.parents[:2]:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _check_tools(cutting: Cutting, jobs: list[_Job]) -> None:
    """See that what the work needs is installed before it begins."""
    need_av([job.clip.sources[0] for job in jobs])
    if cutting.crop == "faces" and any(not job.clip.cropped for job in jobs):
        load_detector(cutting.detector)


def _prepare(jobs: list[_Job], cutting: Cutting, config: PrepareConfig, prepared: dict[str, Any]) -> None:
    """Prepare all clips in worker processes; each is entered into the index as it is finished."""
    for folder in {(config.out / job.file).parent for job in jobs}:
        remove_unfinished(folder)
    writer = IndexWriter(config.out / INDEX, prepared)
    workers = config.workers or cores()
    try:
        with _pool(min(workers, max(1, len(jobs)))) as pool:
            done = _in_workers(pool, jobs, cutting, config.out, ahead=_AHEAD * workers)
            # The pool has its processes before the bar has its thread.
            for entry in tqdm(done, total=len(jobs), desc="preparing", unit="clip", disable=not jobs):
                writer.append(entry)
                if entry.broken:
                    log.warning("not prepared: %s", entry.broken)
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"--workers: one of {workers} processes was ended by the system, perhaps for want of memory; with "
            "fewer, the same command goes on"
        ) from error
    finally:
        writer.close()


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that end with this one, however it ends."""
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(os.getpid(),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _in_workers(
    pool: ProcessPoolExecutor, jobs: list[_Job], cutting: Cutting, out: Path, *, ahead: int
) -> Iterator[Entry]:
    """The entries of the jobs as they are finished, with few of them waiting at any time."""
    waiting: set[Future[Entry]] = set()
    left = iter(jobs)
    first = list(itertools.islice(left, ahead))
    waiting |= {pool.submit(_do, job, cutting, out) for job in first}
    while waiting:
        finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        waiting |= {pool.submit(_do, job, cutting, out) for job in itertools.islice(left, len(finished))}
        for future in finished:
            yield future.result()


def _begin_worker(parent: int) -> None:
    # Ctrl-C reaches every process of a terminal; this one ends with its parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _do(job: _Job, cutting: Cutting, out: Path) -> Entry:
    """Prepare one clip, in a worker; a recording that cannot be prepared gives an entry that says why."""
    try:
        entry = cut_clip(job.clip, cutting, out / job.file)
    except (ValueError, FileNotFoundError) as error:
        entry = Entry("", job.clip.individual, job.clip.emotion, 0, broken=" ".join(str(error).split()))
    entry.file, entry.source, entry.stamp = job.file, job.source, job.stamp
    return entry


def _in_order(index: Path) -> list[Entry]:
    """The entries as they are listed, however their lines came about."""
    rank = {name: i for i, name in enumerate(KNOWN_EMOTIONS)}
    return sorted(read_index(index)[1], key=lambda e: (natural(e.individual), rank[e.emotion], natural(e.file)))


def _report_broken(broken: list[Entry], total: int, config: PrepareConfig) -> None:
    summary = (
        f"{len(broken)} of {total} recordings could not be prepared: {name_some([e.broken for e in broken], 3)}; "
        f"{config.out / 'report.html'} lists them"
    )
    if not config.skip_broken:
        raise ValueError(f"--data: {summary}, the others are prepared; --skip-broken leaves them out without an error")
    log.warning("left out, %s", summary)


def _summary(entries: list[Entry], out: Path) -> dict[str, Any]:
    whole = [entry for entry in entries if not entry.broken]
    return {
        "clips": len(whole),
        "frames": sum(entry.frames for entry in whole),
        "individuals": len({entry.individual for entry in whole}),
        "emotions": ", ".join(name for name in KNOWN_EMOTIONS if name in {entry.emotion for entry in whole}),
        "left out": len(entries) - len(whole),
        "faces at a glance": str(out / "report.html"),
        "next": f"pcmecl-fast train --data {out}",
    }
