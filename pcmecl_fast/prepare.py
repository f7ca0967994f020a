"""The command `prepare`: faces cut out of a raw data set, in a folder that anyone can open, and `train` in seconds.

    <out>/<individual>/<emotion>/<clip>.mp4     256 × 256, sound and all;  a picture becomes <name>.png
    <out>/index.jsonl                           what is in each, and where the face was: data/index.py
    <out>/report.html                           every individual and emotion at a glance, and what could not be prepared

The index grows as clips are finished, each under its name only when it is whole. So a killed command goes on where it
was, and ends with the files that one run through would have made, byte for byte. With `--share` a command prepares a
part of the clips and writes an index of its own, while others prepare the rest: data/shares.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from pcmecl_fast.data.cutting import SUFFIXES, Cutting, NoFaceError, cut_clip, hash_of
from pcmecl_fast.data.emotions import KNOWN_EMOTIONS
from pcmecl_fast.data.faces import load_detector
from pcmecl_fast.data.index import (
    INDEX,
    Entry,
    Form,
    IndexWriter,
    in_order,
    mark_finished,
    read_index,
    rewrite_index,
)  # fmt: skip
from pcmecl_fast.data.layouts import Listing, RawClip, find_layout, select
from pcmecl_fast.data.media import is_hidden, need_av
from pcmecl_fast.data.shares import Share, entries_of_shares, list_hash, read_folder, shares_in
from pcmecl_fast.distributed import barrier, launched
from pcmecl_fast.evaluate.contact_sheet import write_contact_sheet
from pcmecl_fast.files import remove, remove_unfinished, unfinished
from pcmecl_fast.machine import cores
from pcmecl_fast.options import named_differences
from pcmecl_fast.progress import progress_bar
from pcmecl_fast.run_folder import locked
from pcmecl_fast.train.config import PrepareConfig, check_options
from pcmecl_fast.wording import name_some
from pcmecl_fast.workers import WorkerEndedError, in_workers

log = logging.getLogger("pcmecl_fast")


def run_prepare(config: PrepareConfig) -> dict[str, Any]:
    """Prepare every clip of a raw data set that is not prepared yet.

    Raises:
        BlockingIOError: another process prepares the same folder.
        FileExistsError: `out` holds something else, clips prepared with other options, or shares of another number.
        ValueError: no share is written so; nothing to prepare, an unknown layout, individual, emotion, view or level;
            recordings that have changed since they were prepared; and at the end, recordings that could not be
            prepared: the others are.
        OSError: the disk is full; what was prepared is whole, and the same command goes on.
    """
    share = _share(config)
    _check(config, share)
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
    cutting = Cutting(**{f.name: getattr(config, f.name) for f in fields(Cutting)})
    all_jobs = _jobs(clips, listing, config)
    jobs, of_share = _own(all_jobs, share)
    sources = {clip.sources[0].relative_to(config.data).as_posix() for clip in listing.clips}
    prepared = {"layout": layout.name, "data": os.path.realpath(config.data), **of_share, **asdict(cutting)}
    index = config.out / (INDEX if share is None else share.index)
    elsewhere = {job.file for job in all_jobs} - {job.file for job in jobs}
    # A share has its own lock: the others work beside it.
    with locked(config.out if share is None else config.out / f".{index.stem}", config.command):
        left = _left_to_do(config, index, prepared, jobs, elsewhere, sources)
        if len(left) < len(jobs):
            log.info("%d of %d clips are done already", len(jobs) - len(left), len(jobs))
        _check_tools(cutting, left)
        _prepare(left, cutting, config, index, prepared)
        entries = rewrite_index(index, prepared, order=in_order)
        asked = {job.file for job in jobs}
        _write_report(config.out, entries, share, prepared, why, listing.unknown)
        mark_finished(index)  # last: who sees it sees all
    barrier()  # under torchrun, which ends all when one has an error
    broken = [entry for entry in entries if entry.broken and entry.file in asked]
    if broken:
        _report_broken(broken, len(jobs), config)
    return _summary(entries, config.out, share)


@dataclass(frozen=True)
class _Job:
    """One clip to prepare."""

    clip: RawClip
    file: str  # of the prepared clip, in the output folder
    form: Form
    source: str  # of the recording, in the raw folder
    stamp: str
    replaces: bool = False  # what an earlier call made of the recording as it was


def _share(config: PrepareConfig) -> Share | None:
    """The share to prepare: the one asked for, or under torchrun this process's; None where all are."""
    if config.share is not None:
        if launched():
            raise ValueError("--share: under torchrun each process takes a share of its own; leave it out")
        return Share.parse(config.share)
    return Share(int(os.environ["RANK"]) + 1, int(os.environ["WORLD_SIZE"])) if launched() else None


def _check(config: PrepareConfig, share: Share | None) -> None:
    """Refuse what would fail clip by clip, and an output folder that is somebody else's, before anything is written."""
    check_options(config)
    for name in ("individuals", "emotions", "views", "levels"):
        if getattr(config, name) == []:
            raise ValueError(f"--{name}: takes one name or more; without it, all are prepared")
    if config.frames == "mp4" and config.size % 2:
        raise ValueError(f"--size: takes an even number, as videos do, got {config.size}; --frames png takes any")
    out, data = config.out.resolve(), config.data.resolve()
    if out.is_relative_to(data) or data.is_relative_to(out):
        raise ValueError(f"--out: {config.out} lies in --data, or around it; name a folder beside it")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out: {config.out} is a file; name a folder")
    others = [path.name for path in out.iterdir() if not is_hidden(path)] if out.is_dir() else []
    known = shares_in(out)
    if others and INDEX not in others and not known:
        raise FileExistsError(
            f"--out: {config.out} holds {name_some(sorted(others), 3)}, not made by `pcmecl-fast prepare`; name "
            "another folder"
        )
    if share is not None and INDEX in others:
        raise FileExistsError(
            f"--out: {config.out} was prepared at once; without --share the same command goes on, and another --out "
            "takes shares"
        )
    if known and (share is None or known[0].of != share.of):
        asked = "all at once" if share is None else f"share {share}"
        raise FileExistsError(
            f"--out: {config.out} is prepared in {known[0].of} shares, and not {asked}; --share 1/{known[0].of} and so "
            "on go on with it, and another --out keeps it"
        )


def _jobs(clips: Sequence[RawClip], listing: Listing, config: PrepareConfig) -> list[_Job]:
    """The clips with their places in the output folder, in the order of the index."""
    if not clips:
        why = "the options leave none of its recordings" if listing.clips else "it holds no recordings"
        raise ValueError(f"--data: {config.data}: {why}")
    jobs: dict[str, _Job] = {}
    for clip in clips:
        form: Form = "picture" if clip.is_picture else "pictures" if config.frames == "png" else "video"
        file = f"{clip.individual}/{clip.emotion}/{clip.name}{SUFFIXES[form]}"
        source = clip.sources[0].relative_to(config.data).as_posix()
        if file in jobs:
            raise ValueError(f"--data: {jobs[file].source} and {source} would both become {file}; rename one of them")
        jobs[file] = _Job(clip, file, form, source, _stamp(clip))
    return list(jobs.values())


def _own(jobs: list[_Job], share: Share | None) -> tuple[list[_Job], dict[str, str]]:
    """The jobs of a share, and what its index says of the list that it is a part of."""
    if share is None:
        return jobs, {}
    sizes = [_bytes(job.clip) for job in jobs]
    own = [jobs[i] for i in share(sizes)]
    log.info("share %s: %d of %d clips", share, len(own), len(jobs))
    return own, {"list": list_hash([job.file for job in jobs], sizes)}


def _bytes(clip: RawClip) -> int:
    size = 0
    for path in clip.sources:
        with contextlib.suppress(OSError):  # a link that leads nowhere
            size += path.stat().st_size
    return size


def _stamp(clip: RawClip) -> str:
    """What changes when a recording does: the sizes and time stamps of its files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in (*clip.sources, *filter(None, [clip.sound])):
        try:
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        except OSError:  # a link that leads nowhere, which reading it will say
            digest.update(f"{path.name} is not there\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _left_to_do(
    config: PrepareConfig,
    index: Path,
    prepared: dict[str, Any],
    jobs: list[_Job],
    elsewhere: set[str],
    sources: set[str],
) -> list[_Job]:
    """The jobs that no earlier call has done, or found broken; refuses to mix or to lose what one has done.

    Args:
        config: the command's options.
        index: of what earlier calls have done.
        prepared: its head.
        jobs: what is to be done.
        elsewhere: the files that other shares prepare.
        sources: all recordings in the raw folder, by name.
    """
    if not index.exists():
        return jobs
    before, read = read_index(index)
    if before is None:
        raise FileExistsError(f"--out: {config.out} holds an index that `pcmecl-fast prepare` did not write")
    if before.get("data") != prepared["data"]:
        raise FileExistsError(f"--out: {config.out} holds faces out of {before.get('data')}; name another folder")
    was, now = ({k: v for k, v in head.items() if k not in ("finished", "list")} for head in (before, prepared))
    if differing := named_differences(was, now):
        if not config.overwrite:
            raise FileExistsError(
                f"--out: {config.out} was prepared with other options: {differing}; --overwrite prepares it again, "
                "and another --out keeps it"
            )
        _remove(config.out, read, folders=not elsewhere)
        index.unlink()
        return jobs
    stamps = {job.file: job.stamp for job in jobs}
    known = {entry.file: replace(entry, track=None) for entry in read}
    changed = {e.file for e in known.values() if stamps.get(e.file, e.stamp) != e.stamp}
    again = [e for e in known.values() if e.file in changed and not e.broken]
    gone = [entry for entry in known.values() if entry.source not in sources]
    if again and not config.overwrite:
        names = name_some([str(config.data / entry.source) for entry in again], 3)
        raise ValueError(
            f"--data: {names} changed since {'they were' if len(again) > 1 else 'it was'} prepared; --overwrite "
            "prepares what has changed again, and another --out keeps what there is"
        )
    if gone:
        names, is_are = name_some([entry.file for entry in gone], 3), "are" if len(gone) > 1 else "is"
        if config.overwrite:
            _remove(config.out, gone, folders=not elsewhere)
        log.warning(
            "%s: the recordings of %s %s no longer in --data%s", config.out, names, is_are,
            ": removed" if config.overwrite else "; --overwrite removes what was prepared of them",
        )  # fmt: skip

    def stands(entry: Entry) -> bool:
        if entry.file in changed | elsewhere or (config.overwrite and (entry.broken or entry.source not in sources)):
            return False
        return bool(entry.broken) or _is_there(config.out, entry)

    standing = {entry.file for entry in known.values() if stands(entry)}
    left = [replace(job, replaces=job.file in known) for job in jobs if job.file not in standing]
    if len(standing) < len(known) or (left and before.get("finished")):
        rewrite_index(index, prepared, keep=lambda entry: entry.file in standing)
    return left


def _is_there(out: Path, entry: Entry) -> bool:
    path = out / entry.file
    try:
        if entry.form == "pictures":
            return sum(name.endswith(".png") for name in os.listdir(path)) == entry.frames
        return path.stat().st_size == entry.bytes
    except OSError:
        return False


def _remove(out: Path, entries: Iterable[Entry], *, folders: bool) -> None:
    """Remove prepared clips, and the folders that this leaves empty, unless others are about to write there."""
    for entry in entries:
        path = out / entry.file
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        for folder in path.parents[:2] if folders else ():
            with contextlib.suppress(OSError):
                folder.rmdir()


def _check_tools(cutting: Cutting, jobs: list[_Job]) -> None:
    """See that what the work needs is installed before it begins."""
    need_av([Path(job.file) if job.form == "video" else job.clip.sources[0] for job in jobs])
    if cutting.crop == "faces" and any(not job.clip.cropped for job in jobs):
        load_detector(cutting.detector)


def _prepare(jobs: list[_Job], cutting: Cutting, config: PrepareConfig, index: Path, prepared: dict[str, Any]) -> None:
    """Prepare all clips in worker processes; each is entered into the index as it is finished."""
    names: dict[Path, set[str]] = {}
    for job in jobs:
        path = config.out / job.file
        names.setdefault(path.parent, set()).add(path.name)
    for folder, own in names.items():
        remove_unfinished(folder, names=own)
    writer = IndexWriter(index, prepared)
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1
    workers = min(config.workers or max(1, cores() // beside), max(1, len(jobs)))
    done = in_workers(partial(_do, cutting=cutting, out=config.out), jobs, workers)
    try:
        for entry in progress_bar(done, total=len(jobs), desc="preparing", unit="clip", quiet=not jobs):
            writer.append(entry)
            if entry.broken:
                log.warning("not prepared: %s", entry.broken)
    except WorkerEndedError as error:
        raise RuntimeError(f"--workers: {error}; with fewer, the same command goes on") from error
    finally:
        writer.close()


def _do(job: _Job, *, cutting: Cutting, out: Path) -> Entry:
    """Prepare one clip, in a worker; a recording that cannot be prepared gives an entry that says why.

    Raises:
        FileExistsError: what lies in its place is not what becomes of the recording.
        ValueError, OSError: an error that is not of this recording.
    """
    path = out / job.file
    try:
        if path.exists() and not job.replaces:
            entry = _cut_beside(job, cutting, path)
        else:
            entry = cut_clip(job.clip, cutting, job.form, path)
    except (ValueError, OSError) as error:
        if isinstance(error, FileExistsError) or not _is_of(error, job.clip):
            raise
        entry = Entry("", job.clip.individual, job.clip.emotion, 0, broken=" ".join(str(error).split()))
    entry.file, entry.form, entry.source, entry.stamp = job.file, job.form, job.source, job.stamp
    return entry


def _cut_beside(job: _Job, cutting: Cutting, path: Path) -> Entry:
    """Prepare a clip whose place is taken: by the same, of a command killed before its index had it, or by another."""
    folder = unfinished(path)
    folder.mkdir()
    try:
        entry = cut_clip(job.clip, cutting, job.form, folder / path.name)
        if hash_of(path) != entry.checksum:
            raise FileExistsError(f"--out: {path} is there, and is not what becomes of {job.source}; move it away")
    finally:
        remove(folder)
    return entry


def _is_of(error: Exception, clip: RawClip) -> bool:
    """Whether an error speaks of a recording, and not of the disk or the encoder."""
    files = (*clip.sources, *filter(None, [clip.sound]))
    return isinstance(error, NoFaceError) or any(str(path) in str(error) for path in files)


def _write_report(
    out: Path, entries: list[Entry], share: Share | None, prepared: dict[str, Any], why: str, unknown: Sequence[str]
) -> None:
    """The report of the folder; of shares it shows what there is of all, and the last has everything."""
    if share is None:
        write_contact_sheet(out, entries, prepared, why, unknown)
        return
    with FileLock(out / ".lock"):
        entries = [replace(entry, track=None) for entry in entries_of_shares(out, shares_in(out))]
        about = {key: value for key, value in prepared.items() if key != "list"}
        write_contact_sheet(out, sorted(entries, key=in_order), about, why, unknown)


def _report_broken(broken: list[Entry], total: int, config: PrepareConfig) -> None:
    summary = (
        f"{len(broken)} of {total} recordings could not be prepared: {name_some([e.broken for e in broken], 3)}; "
        f"{config.out / 'report.html'} lists them"
    )
    if not config.skip_broken:
        raise ValueError(
            f"--data: {summary}, the others are prepared; --skip-broken leaves them out without an error, and "
            "--overwrite tries them again"
        )
    log.warning("left out, %s", summary)


def _summary(entries: list[Entry], out: Path, share: Share | None) -> dict[str, Any]:
    whole = [entry for entry in entries if not entry.broken]
    shares = {} if share is None else {"share": str(share), "of the others": _others(out)}
    return shares | {
        "clips": len(whole),
        "frames": sum(entry.frames for entry in whole),
        "individuals": len({entry.individual for entry in whole}),
        "emotions": ", ".join(name for name in KNOWN_EMOTIONS if name in {entry.emotion for entry in whole}),
        "not prepared": len(entries) - len(whole),
        "faces at a glance": str(out / "report.html"),
        "next": f"pcmecl-fast train --data {out}",
    }


def _others(out: Path) -> str:
    try:
        index = read_folder(out)
    except ValueError as error:
        return str(error)
    return (index and index.left) or "all are there"
