"""The command `measure`: a folder of edited clips against one of real faces, by the field's measures.

    <out>/report.html       the numbers, their protocols, the clips at either end of each, and what was left out
    <out>/measures.json     the same for programs;  table.tex for papers
    <out>/measures.jsonl, features/     each clip's own, kept as it is measured: a killed command goes on

Clips are measured one after the other, each in the memory that a few of its frames take (LSE needs a whole clip's).
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from pcmecl_fast.data.media import is_hidden, need_av
from pcmecl_fast.evaluate.field.clips import FaceClip
from pcmecl_fast.evaluate.field.measures import (
    MEASURES,
    OF_GROUPS,
    SAMPLES,
    Tools,
    check_metrics,
    load_tools,
)
from pcmecl_fast.evaluate.field.meter import ClipMeter, Result
from pcmecl_fast.evaluate.field.page import write_page
from pcmecl_fast.evaluate.field.pairs import Pairing, pair_up
from pcmecl_fast.evaluate.field.reading import count_frames
from pcmecl_fast.evaluate.field.records import FEATURES, RECORDS, Records, stamp_of
from pcmecl_fast.evaluate.field.scores import Setting, edited_key, reference_key, score_all
from pcmecl_fast.evaluate.field.table import as_json, as_latex
from pcmecl_fast.evaluate.origin import origin
from pcmecl_fast.files import remove_unfinished, write_atomically
from pcmecl_fast.train.config import MeasureConfig, check_options, device_named
from pcmecl_fast.wording import name_some

log = logging.getLogger("pcmecl_fast")

_LOCK = ".lock"


@dataclass(frozen=True)
class Measured:
    """What `run_measure` found.

    Attributes:
        settings: the numbers of each setting, `evaluate.field.table.table_of` making tables of them.
        not_run: metrics that could not run, and why in one line each.
        clips: edited clips; measured, how many of them in this call rather than in an earlier one.
        out: the folder with the report.
    """

    settings: list[Setting]
    not_run: dict[str, str]
    clips: int
    measured: int
    out: Path


def run_measure(config: MeasureConfig, *, command: str = "") -> Measured:
    """Measure edited clips, going on from what an earlier call has measured in the same output folder.

    Args:
        config: the options.
        command: as typed, for the report.

    Raises:
        BlockingIOError: another process measures into the same folder.
        FileExistsError: `out` holds something else.
        FileNotFoundError, NotADirectoryError: a folder is missing.
        ValueError: an option that does not fit; no clips; nothing that pairs; no metric that can run.
        OSError: the disk is full; what was measured is whole, and the same command goes on.
    """
    check_options(config)
    metrics = check_metrics(config.metrics)
    for option in ("edited", "reference", "sound", "weights"):
        _check_folder(option, getattr(config, option))
    _check_out(config)
    pairing = pair_up(config.edited, config.reference, config.sound)
    _tell_unpaired(pairing)
    need_av([pair.edited.sources[0] for pair in pairing.pairs])
    tools = load_tools(metrics, config.weights, device_named(config.device))
    if not tools.metrics:
        whys = [f"{metric}: {why}" for metric, why in tools.not_run.items()]
        raise ValueError(f"metrics: none of them can run here: {'; '.join(whys)}")
    with _locked(config.out):
        remove_unfinished(config.out / FEATURES)
        jobs = _jobs(pairing, tools, config)
        records = Records(config.out, {job.key: job.stamp for job in jobs})
        try:
            left = [job for job in jobs if job.key not in records]
            if len(left) < len(jobs):
                log.info("%d of %d clips are measured already", len(jobs) - len(left), len(jobs))
            _measure(left, records)
            records.remove_stale()
        finally:
            records.close()
        settings = score_all(pairing, records, tools, protocol=config.protocol, every=config.every)
        _write(settings, pairing, records, tools, config, command)
    ours = {edited_key(pair.edited) for pair in pairing.pairs}
    return Measured(settings, tools.not_run, len(ours), sum(job.key in ours for job in left), config.out)


@dataclass(frozen=True)
class _Job:
    """One clip to measure."""

    key: str
    stamp: str
    frames: int
    do: Callable[[], Result]


def _jobs(pairing: Pairing, tools: Tools, config: MeasureConfig) -> list[_Job]:
    """Every clip with what its numbers depend on, in the order of the folders."""
    meter = ClipMeter(tools, protocol=config.protocol, every=config.every)
    references = [clip for of in pairing.groups.values() for clip in of] if tools.metrics & OF_GROUPS.keys() else []
    counts = {clip: _count(clip) for clip in (*(pair.edited for pair in pairing.pairs), *references)}
    chosen = _chosen(pairing, counts, config.seed) if "csim" in tools.metrics else {}
    weights = sorted(config.weights.iterdir()) if config.weights else []
    options = [sorted(tools.metrics), config.protocol, config.every]
    jobs = []
    for pair in pairing.pairs:
        key, recording = edited_key(pair.edited), pair.recording
        numbers = chosen.get(key, [])
        about = [*options, _labels(pair.edited), recording and _labels(recording), pair.why, numbers]
        files = [*pair.edited.sources, *(recording.sources if recording else ()), *pair.sounds, *weights]
        do = partial(meter.edited, pair, frozenset(numbers))
        jobs.append(_Job(key, stamp_of(about, files), counts[pair.edited], do))
    for clip in references:
        key = reference_key(clip)
        numbers = chosen.get(key, [])
        stamp = stamp_of([*options, _labels(clip), numbers], [*clip.sources, *weights])
        jobs.append(_Job(key, stamp, counts[clip], partial(meter.reference, clip, frozenset(numbers))))
    return jobs


def _labels(clip: FaceClip) -> tuple[object, ...]:
    return clip.file, clip.individual, clip.emotion, clip.name, clip.rate


def _count(clip: FaceClip) -> int:
    try:
        return count_frames(clip)
    except (ValueError, OSError):  # damaged: measuring it says how
        return 0


def _chosen(pairing: Pairing, counts: dict[FaceClip, int], seed: int) -> dict[str, list[int]]:
    """Random frames for CSIM, `SAMPLES` a side, individual and emotion: numbers by clip, the same in every call."""
    groups: dict[str, list[tuple[str, int]]] = {}  # keys of clips and their frames
    for pair in pairing.pairs:
        clip = pair.edited
        if pair.group is not None:
            name = f"edited {clip.setting} {clip.individual} {clip.emotion}"
            groups.setdefault(name, []).append((edited_key(clip), counts[clip]))
    for (who, emotion), clips in pairing.groups.items():
        groups[f"reference {who} {emotion}"] = [(reference_key(clip), counts[clip]) for clip in clips]
    chosen: dict[str, list[int]] = {}
    for name, clips_of_group in groups.items():
        frames = [(key, number) for key, count in clips_of_group for number in range(count)]
        for key, number in random.Random(f"{seed} {name}").sample(frames, min(SAMPLES, len(frames))):
            chosen.setdefault(key, []).append(number)
    return {key: sorted(numbers) for key, numbers in chosen.items()}


def _measure(jobs: list[_Job], records: Records) -> None:
    """Measure clips; each is kept as it is finished."""
    with tqdm(total=sum(job.frames for job in jobs), desc="measuring", unit="frame", disable=not jobs) as progress:
        for job in jobs:
            try:
                result = job.do()
            except (ValueError, OSError) as error:  # of this clip alone
                result = Result()
                result.lacks([measure.key for measure in MEASURES], " ".join(str(error).split()))
                log.warning("not measured: %s", error)
            records.add(job.key, result)
            progress.update(job.frames)


def _write(
    settings: list[Setting], pairing: Pairing, records: Records, tools: Tools, config: MeasureConfig, command: str
) -> None:
    about: dict[str, Any] = {
        "edited": str(config.edited),
        "reference": str(config.reference),
        "protocol": config.protocol,
        "every": config.every,
        "seed": config.seed,
    }
    notes = {
        pair.edited.file: "; ".join(told)
        for pair in pairing.pairs
        if (told := [*(result := records[edited_key(pair.edited)]).notes, *_faceless(result)])
    }
    details = {"notes": notes, "no_clips": pairing.left_out, "reference_unused": pairing.unused}
    table = json.dumps(as_json(settings, tools.not_run, about | details), indent=2, ensure_ascii=False)
    write_atomically(config.out / "measures.json", table.encode("utf-8", "surrogateescape"))
    write_atomically(config.out / "table.tex", as_latex(settings, tools.not_run, about).encode("utf-8", "replace"))
    write_page(config.out / "report.html", settings, pairing, tools.not_run, notes, origin(command))


def _faceless(result: Result) -> list[str]:
    return [f"no face found in {result.faceless} of {result.looked} frames looked at"] if result.faceless else []


def _tell_unpaired(pairing: Pairing) -> None:
    alone = [f"{pair.edited.file} ({pair.why})" for pair in pairing.pairs if pair.recording is None]
    apart = [f"{pair.edited.file} ({pair.why_not})" for pair in pairing.pairs if pair.group is None]
    for names, what in ((alone, "a recording to be compared with frame by frame"), (apart, "real faces to compare")):
        if names:
            log.warning(
                "%d of %d edited clips without %s: %s", len(names), len(pairing.pairs), what, name_some(names, 3)
            )
    if pairing.unused:
        log.info("of the reference, not compared with anything: %s", name_some(pairing.unused, 3))
    if pairing.left_out:
        log.warning("no clips: %s", name_some([f"{file} ({why})" for file, why in pairing.left_out.items()], 3))


def _check_folder(option: str, folder: Path | None) -> None:
    if folder is not None and not folder.exists():
        raise FileNotFoundError(f"{option}: there is no folder {folder}")
    if folder is not None and not folder.is_dir():
        raise NotADirectoryError(f"{option}: {folder} is a file; it takes a folder")


def _check_out(config: MeasureConfig) -> None:
    """Refuse an output folder that is somebody else's, before anything is written."""
    out = config.out.resolve()
    for option in ("edited", "reference"):
        folder = getattr(config, option).resolve()
        if out.is_relative_to(folder) or folder.is_relative_to(out):
            raise ValueError(f"--out: {config.out} lies in --{option}, or around it; name a folder beside it")
    others = [path.name for path in out.iterdir() if not is_hidden(path)] if out.is_dir() else []
    if others and RECORDS not in others:
        raise FileExistsError(
            f"--out: {config.out} holds {name_some(sorted(others), 3)}, not made by `pcmecl-fast measure`; name "
            "another folder"
        )


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Have the output folder for oneself."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"--out: another process measures into {out}; wait for it, or name another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
