"""The command `measure`: a folder of edited clips against one of real faces, by the field's measures.

    <out>/report.html       the numbers, their protocols, the clips at either end of each, and what was left out
    <out>/measures.json     the same for programs;  table.tex for papers
    <out>/measures.jsonl, features/     each clip's own, kept as it is measured: a killed command goes on

Clips are measured in worker processes, each in the memory that a few of its frames take (LSE needs a whole clip's).
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pcmecl_fast.data.media import is_hidden, need_av
from pcmecl_fast.evaluate.field.clips import FaceClip
from pcmecl_fast.evaluate.field.measures import (
    MEASURES,
    OF_GROUPS,
    SAMPLES,
    Sampling,
    Tools,
    check_metrics,
    load_tools,
)
from pcmecl_fast.evaluate.field.meter import Chosen, ClipMeter, Result
from pcmecl_fast.evaluate.field.page import write_page
from pcmecl_fast.evaluate.field.pairs import Pair, Pairing, pair_up
from pcmecl_fast.evaluate.field.reading import count_frames
from pcmecl_fast.evaluate.field.records import FEATURES, RECORDS, Records, stamp_of
from pcmecl_fast.evaluate.field.scores import Setting, edited_key, reference_key, score_all
from pcmecl_fast.evaluate.field.table import as_json, as_latex, heading, table_of
from pcmecl_fast.evaluate.origin import origin
from pcmecl_fast.files import remove_unfinished, write_atomically
from pcmecl_fast.machine import cores
from pcmecl_fast.progress import progress_bar
from pcmecl_fast.run_folder import locked
from pcmecl_fast.train.config import MeasureConfig, check_options, device_named
from pcmecl_fast.wording import name_some
from pcmecl_fast.workers import in_workers

log = logging.getLogger("pcmecl_fast")


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
    with locked(config.out, config.command):
        remove_unfinished(config.out / FEATURES)
        jobs = _jobs(pairing, tools, config)
        records = Records(config.out, {job.key: job.stamp for job in jobs})
        try:
            left = [job for job in jobs if job.key not in records]
            if len(left) < len(jobs):
                log.info("%d of %d clips are measured already", len(jobs) - len(left), len(jobs))
            _measure(left, records, tools, config)
            records.remove_stale()
        finally:
            records.close()
        sampling = Sampling.of(config.every, quick=config.quick)
        settings = score_all(pairing, records, tools, protocol=config.protocol, sampling=sampling)
        _write(settings, pairing, records, tools, config, command)
    ours = {edited_key(pair.edited) for pair in pairing.pairs}
    return Measured(settings, tools.not_run, len(ours), sum(job.key in ours for job in left), config.out)


def print_measured(measured: Measured, console: Console) -> None:
    """The numbers as tables, each with how they were taken and of what; what could not run, and where the page is."""
    for setting in measured.settings:
        content = table_of(setting)
        table = Table("", title=heading(setting), title_justify="left")
        for column in content.columns:
            table.add_column(column, justify="right")
        for row in content.rows:
            cells = ("–" if cell is None else f"{cell.text}\n{cell.interval}".strip() for cell in row.cells)
            table.add_row(row.name, *cells)
        console.print(
            table, *(f"{row.name}: {row.note}" for row in content.rows), sep="\n", highlight=False, markup=False
        )
        console.print(content.note, end="\n\n", highlight=False, markup=False)
    for metric, why in measured.not_run.items():
        console.print(f"not run, {metric}: {why}", highlight=False, markup=False)
    page = measured.out / "report.html"
    console.print(f"the clips at either end of each measure: {page}", soft_wrap=True, highlight=False, markup=False)


@dataclass(frozen=True)
class _Job:
    """One clip to measure: an edited one with its pair, or one of the reference's."""

    key: str
    stamp: str
    frames: int
    clip: Pair | FaceClip
    chosen: Chosen
    heard: bool = True


def _jobs(pairing: Pairing, tools: Tools, config: MeasureConfig) -> list[_Job]:
    """Every clip with what its numbers depend on, in the order of the folders."""
    references = [clip for of in pairing.groups.values() for clip in of] if tools.metrics & OF_GROUPS.keys() else []
    counts = {clip: _count(clip) for clip in (*(pair.edited for pair in pairing.pairs), *references)}
    sampling = Sampling.of(config.every, quick=config.quick)
    chosen = _drawn_frames(pairing, references, counts, tools, sampling, config.seed)
    heard = _drawn_clips(pairing, sampling.clips, config.seed)
    weights = sorted(config.weights.iterdir()) if config.weights else []
    options = [_MEANING, sorted(tools.metrics), config.protocol, sampling]
    jobs = []
    for pair in pairing.pairs:
        key, recording = edited_key(pair.edited), pair.recording
        job = _Job(key, "", counts[pair.edited], pair, chosen[key], key in heard)
        about = [*options, _labels(pair.edited), recording and _labels(recording), pair.why, job.chosen, job.heard]
        files = [*pair.edited.sources, *(recording.sources if recording else ()), *pair.sounds, *weights]
        jobs.append(replace(job, stamp=stamp_of(about, files)))
    for clip in references:
        key = reference_key(clip)
        job = _Job(key, "", counts[clip], clip, chosen[key])
        stamp = stamp_of([*options, _labels(clip), job.chosen], [*clip.sources, *weights])
        jobs.append(replace(job, stamp=stamp))
    return jobs


_MEANING = 2
"""Raised when a number comes to mean something else, so that clips whose records are older are measured again."""


def _labels(clip: FaceClip) -> tuple[object, ...]:
    return clip.file, clip.individual, clip.emotion, clip.name, clip.rate


def _count(clip: FaceClip) -> int:
    try:
        return count_frames(clip)
    except (ValueError, OSError):  # damaged: measuring it says how
        return 0


def _drawn_frames(
    pairing: Pairing,
    references: list[FaceClip],
    counts: dict[FaceClip, int],
    tools: Tools,
    sampling: Sampling,
    seed: int,
) -> dict[str, dict[str, list[int]]]:
    """Random frames, the same in every call: by clip and network, sorted numbers.

    CSIM's are drawn a side, individual and emotion; FAD's and FID's, where not all are taken, a side and emotion.
    """
    clips = [(f"edited {p.edited.setting}", p.edited, edited_key(p.edited)) for p in pairing.pairs if p.group]
    clips += [("reference", clip, reference_key(clip)) for clip in references]
    keys = [edited_key(pair.edited) for pair in pairing.pairs] + [reference_key(clip) for clip in references]
    limits = dict.fromkeys(("fad", "fid"), sampling.frames) | {"csim": SAMPLES}
    chosen: dict[str, dict[str, list[int]]] = {key: {} for key in keys}
    for metric in sorted(tools.metrics & OF_GROUPS.keys()):
        most = limits[metric]
        if most is None:
            continue
        groups: dict[str, list[tuple[str, int]]] = {}
        for side, clip, key in clips:
            who = clip.individual if metric == "csim" else ""
            groups.setdefault(f"{metric} {side} {who} {clip.emotion}", []).append((key, counts[clip]))
        for key in keys:
            chosen[key][OF_GROUPS[metric]] = []
        for name, of in groups.items():
            frames = [(key, number) for key, count in of for number in range(count)]
            for key, number in sorted(random.Random(f"{seed} {name}").sample(frames, min(most, len(frames)))):
                chosen[key][OF_GROUPS[metric]].append(number)
    return chosen


def _drawn_clips(pairing: Pairing, most: int | None, seed: int) -> set[str]:
    """The keys of the edited clips that LSE is taken of: at most so many random ones a setting and emotion."""
    groups: dict[str, list[str]] = {}
    for pair in pairing.pairs:
        clip = pair.edited
        groups.setdefault(f"lse {clip.setting} {clip.emotion}", []).append(edited_key(clip))
    if most is None:
        return {key for keys in groups.values() for key in keys}
    drawn = (random.Random(f"{seed} {name}").sample(keys, min(most, len(keys))) for name, keys in groups.items())
    return {key for keys in drawn for key in keys}


def _measure(jobs: list[_Job], records: Records, tools: Tools, config: MeasureConfig) -> None:
    """Measure clips; each is kept as it is finished."""
    # A process that has begun with a GPU cannot be forked; and one keeps it busy.
    workers = min(config.workers or cores(), max(1, len(jobs))) if device_named(config.device) == "cpu" else 1
    with contextlib.ExitStack() as stack:
        done: Iterable[tuple[_Job, Result]]
        if workers == 1:
            _begin(tools, config)
            done = map(_do, jobs)
        else:
            # Of the parent, they have the networks; their memory is shared as long as nobody writes it.
            done = in_workers(_do, jobs, workers, begin=_begin, arguments=(tools, config))
        total = sum(job.frames for job in jobs)
        progress = stack.enter_context(progress_bar(total=total, desc="measuring", unit="frame", quiet=not jobs))
        for job, result in done:
            if broken := result.why.get(_BROKEN):
                log.warning("not measured: %s", broken)
            records.add(job.key, result)
            progress.update(job.frames)


_BROKEN = "clip"
"""In place of a measure, why a clip could not be read at all."""
_meter: ClipMeter | None = None  # of this process


def _begin(tools: Tools, config: MeasureConfig) -> None:
    global _meter
    sampling = Sampling.of(config.every, quick=config.quick)
    _meter = ClipMeter(tools, protocol=config.protocol, sampling=sampling)


def _do(job: _Job) -> tuple[_Job, Result]:
    """Measure one clip; one that is damaged gives a result that says why."""
    assert _meter is not None
    try:
        if isinstance(job.clip, Pair):
            result = _meter.edited(job.clip, job.chosen, heard=job.heard)
        else:
            result = _meter.reference(job.clip, job.chosen)
    except (ValueError, OSError) as error:
        result = Result()
        result.lacks([_BROKEN, *(measure.key for measure in MEASURES)], " ".join(str(error).split()))
    if not job.heard:
        result.lacks(["lse_d", "lse_c"], "a quick look takes LSE of some clips only")
    return job, result


def _write(
    settings: list[Setting], pairing: Pairing, records: Records, tools: Tools, config: MeasureConfig, command: str
) -> None:
    about: dict[str, Any] = {
        "edited": str(config.edited),
        "reference": str(config.reference),
        "protocol": config.protocol,
        "every": config.every,
        "quick": config.quick,
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
