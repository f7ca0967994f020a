"""The commands: each takes a config, works in one output folder, and returns a summary."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pcmecl_fast import ops
from pcmecl_fast.clip import Clip, load_clip
from pcmecl_fast.criterion_parts import LENGTHS, save_lengths
from pcmecl_fast.data.base import FrameDataset, FrameSubset
from pcmecl_fast.data.emotions import EMOTIONS
from pcmecl_fast.data.features import Features, individual_conditions
from pcmecl_fast.data.folder import FolderFaces
from pcmecl_fast.data.splits import split
from pcmecl_fast.data.tracks import Crop
from pcmecl_fast.distributed import agree, from_main, is_main, source_hash
from pcmecl_fast.evaluate.changes import Changes, change_view, changes_table
from pcmecl_fast.evaluate.field.held_out import field_view, summarize_view
from pcmecl_fast.evaluate.field.measures import load_tools
from pcmecl_fast.evaluate.intervals import summarize
from pcmecl_fast.evaluate.metrics import Edit, Trials, clip_view, draw_trials, judge_edits, prompt_view
from pcmecl_fast.evaluate.moving import MovingFaces, moving_faces, save_webp
from pcmecl_fast.evaluate.origin import origin
from pcmecl_fast.evaluate.report import FaceGrid, Report, grid_image, save_grid_png, write_report
from pcmecl_fast.evaluate.results import limits_in_words, prompts_in_words, prompts_table, results_table
from pcmecl_fast.files import content_hash
from pcmecl_fast.lengths import personal_lengths, real_lengths
from pcmecl_fast.machine import command_seconds
from pcmecl_fast.models import Generator, load_generator, make_generator, save_generator
from pcmecl_fast.models.base import generator_config
from pcmecl_fast.ops.operator import usable_backend
from pcmecl_fast.options import from_options, plain_options, read_options
from pcmecl_fast.prompts import PersonalizedPrompts, PromptBank, load_prompts
from pcmecl_fast.run_folder import RunFolder, file_of_run, held_by, open_run
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.towers.precision import tower_dtype
from pcmecl_fast.train.batches import FramesByEmotion, check_emotions
from pcmecl_fast.train.config import (
    EvaluateConfig,
    PromptsConfig,
    RunConfig,
    TrainConfig,
    check_options,
    device_named,
)
from pcmecl_fast.train.generator import check_batch, train_generator
from pcmecl_fast.train.loop import read_checkpoint
from pcmecl_fast.train.prompts import contents_of, frame_features, learn_prompts
from pcmecl_fast.wording import name_some

log = logging.getLogger("pcmecl_fast")

_EVALUATED_FRAMES = 336
_LOOP = 24
"""Frames of drawn faces that are shown as they talk."""
_FEW_FRAMES = 8


def run_prompts(config: PromptsConfig, *, command: str = "") -> dict[str, Any]:
    """Stage 1 alone: `prompts.safetensors`, `bank.safetensors`, `report.html`, `summary.json`.

    Here and below, `command` is what was typed, for the report to repeat.
    """
    started = time.monotonic()
    check_options(config)
    config = config.located()
    with _run_of(config) as folder, ops.use_backend(usable_backend(config.backend)):
        if folder.result is not None:
            return folder.result
        _point_out_faces(config)
        clip = load_clip_for(config)
        dataset, held = open_data(config)
        _point_out_few_frames(dataset)
        _check_checkpoints(config)
        _agree(config, clip, dataset)
        prompts, learned, loop = learn_prompts(clip, dataset, config, begin=folder.begin)

        def judge() -> dict[str, Any]:
            _keep_lengths(clip, learned, dataset, config)
            bank = bank_for(learned, prompts, held, clip, config)
            trials = draw_trials(held, _EVALUATED_FRAMES)
            summary = summarize(prompt_view(clip, bank, held, trials), held.individual_index[trials.index])
            summary |= {"individuals": len(bank.individuals), "seconds": _seconds(started, command)}
            changes = change_view(clip, bank, held, trials)
            nothing = Pictures({}, [])
            _publish(folder, "Personalized prompts", summary, loop.curves, nothing, config, held, command, changes)
            return summary

        return from_main(judge)


def run_train(
    config: TrainConfig, title: str = "Expression editing under PCMECL", *, command: str = ""
) -> dict[str, Any]:
    """Stage 2, preceded by stage 1 if no prompts are given, then evaluation and the report."""
    started = time.monotonic()
    check_options(config)
    # Written out in full, so config.yaml survives changes of defaults.
    options = plain_options(generator_config(config.generator, config.generator_options))
    config = replace(config.located(), generator_options=options)
    with _run_of(config) as folder, ops.use_backend(usable_backend(config.backend)):
        if folder.result is not None:
            return folder.result
        _point_out_faces(config)
        clip = load_clip_for(config)
        dataset, held = open_data(config)
        _agree(config, clip, dataset)
        _check_checkpoints(config)
        check_batch(config)
        # Made once to see whether it can be, before stage 1 spends its time.
        make_generator(config.generator, dataset.emotions, config.side, config.generator_options)
        prompts, bank, curves = _prompts_for(config, clip, dataset, folder.begin)

        def preview(generator: Generator) -> Tensor:
            generator.eval()
            picture = grid_image(_face_grid(generator, held, people=4, references=dataset))
            generator.train()
            return picture

        contents = _prompts_hash(config.stage_one().out)
        agree({"the contents of --prompts": contents})
        generator, loop = train_generator(clip, bank, dataset, config, preview=preview, prompts_hash=contents)
        generator.crop = _crop_of(dataset)

        def judge() -> dict[str, Any]:
            save_generator(config.out / "generator.safetensors", generator)
            summary, pictures = evaluate(generator, clip, prompts, bank, dataset, held, config)
            summary["seconds"] = _seconds(started, command)
            _publish(folder, title, summary, curves | loop.curves, pictures, config, held, command)
            return summary

        return from_main(judge)


def run_evaluate(config: EvaluateConfig, *, command: str = "") -> dict[str, Any]:
    """Evaluate a finished run again, on its own or other data; writes `report.html` and `summary.json`."""
    started = time.monotonic()
    check_options(config)
    trained = _config_of(config.run)
    # Features of the run's own data are in its store already.
    features = trained.features or (config.run if config.data is None else config.folder) / "features"
    places: dict[str, Any] = {"data": config.data or trained.data, "out": config.folder, "features": features}
    trained = replace(trained, device=config.device, backend=config.backend, **places).located()
    stored = replace(config, run=config.run.absolute(), data=config.data and trained.data)
    with (
        open_run(config.folder, stored, overwrite=config.overwrite) as folder,
        ops.use_backend(usable_backend(config.backend)),
    ):
        clip = load_clip_for(trained)
        generator = load_generator(file_of_run("run", config.run, "generator"), clip.device, generator=config.generator)
        trained.emotions, trained.size = generator.emotions, generator.size
        dataset, held = open_data(trained, reserve=True)
        stage1 = trained.prompts or config.run / "prompts"
        prompts, _ = load_prompts(file_of_run("run", stage1, "prompts"), clip)
        bank = PromptBank.load(file_of_run("run", stage1, "bank"), clip)
        _agree(config, clip, held)
        folder.begin()
        frame_features(clip, held, trained)  # computed by all ranks; the first does the rest

        def judge() -> dict[str, Any]:
            summary, pictures = evaluate(generator, clip, prompts, bank, dataset, held, trained, seed=config.seed)
            summary["seconds"] = _seconds(started, command)
            _publish(folder, f"Evaluation of {config.run}", summary, {}, pictures, trained, held, command)
            return summary

        return from_main(judge)


def _agree(config: RunConfig | EvaluateConfig, clip: Clip, dataset: FrameDataset) -> None:
    """Ranks that read other data, or run another version of this code, would come to no one's result."""
    agree(
        {
            "the version of pcmecl_fast": source_hash(),
            "the version of PyTorch": torch.__version__,
            "the options": repr(sorted(plain_options(config).items())),
            **contents_of(clip, dataset),
        }
    )


def _keep_lengths(clip: Clip, bank: PromptBank, dataset: FrameDataset, config: PromptsConfig) -> None:
    """Keep beside the bank how far real changes go, for `PCMECLCriterion.load`; not where the data do not say."""
    measure = real_lengths if bank.condition == "frame" else personal_lengths
    try:
        save_lengths(config.out / LENGTHS, measure(frame_features(clip, dataset, config), dataset, bank), bank)
    except ValueError as error:
        log.info("the lengths of real changes are not kept, since %s", error)


def _run_of(config: PromptsConfig | TrainConfig) -> AbstractContextManager[RunFolder]:
    """The run's folder, provided nothing in it stands in the way."""
    given = getattr(config, "prompts", None)
    if config.overwrite and given is not None and given.is_relative_to(config.out.absolute()):
        raise ValueError(f"--overwrite would remove the prompts in {given}: copy them elsewhere, or give another --out")
    if not is_main():
        return open_run(config.out, config, resume=config.resume, overwrite=config.overwrite)
    inner = held_by(config.stage_one().out) if isinstance(config, TrainConfig) and config.prompts is None else None
    if inner is not None and inner.command:
        folder = config.out / "prompts"
        raise FileExistsError(f"--out: {folder} holds {inner}: use its prompts, --prompts {folder}, or another --out")
    return open_run(config.out, config, resume=config.resume, overwrite=config.overwrite)


def _seconds(started: float, command: str) -> float:
    """How long the command has taken, imports included, or else the call."""
    return (command_seconds() if command else None) or time.monotonic() - started


def _point_out_faces(config: RunConfig) -> None:
    if config.clip == "tiny-face" and config.data != "synthetic":
        log.warning(
            "tiny-face has seen drawn faces only, its features of photographs mean little: "
            "give --clip ViT-B-32 --clip-pretrained openai"
        )


def _point_out_few_frames(dataset: FrameDataset) -> None:
    counts = torch.bincount(dataset.individual_index, minlength=len(dataset.individuals)).tolist()
    few = [name for name, count in zip(dataset.individuals, counts, strict=True) if 0 < count < _FEW_FRAMES]
    if few and not isinstance(dataset, SyntheticFaces):
        log.warning(
            "fewer than %d frames to learn from: %s; what personalizes their prompts is mostly chance",
            _FEW_FRAMES, name_some(few),
        )  # fmt: skip


def _check_checkpoints(config: PromptsConfig | TrainConfig) -> None:
    """Find a broken one before hours are spent on what comes before it."""
    if config.resume:
        for path in (config.out / "prompts/stage-1.ckpt", *sorted(config.out.glob("stage-?.ckpt"))):
            if path.is_file():
                read_checkpoint(path)


def _prompts_hash(folder: Path) -> str:
    return " ".join(content_hash(folder / f"{name}.safetensors") for name in ("prompts", "bank"))


class Pictures(NamedTuple):
    """What there is to look at of a generator's edits."""

    grids: dict[str, FaceGrid]
    clips: list[MovingFaces]


def evaluate(
    generator: Generator,
    clip: Clip,
    prompts: PersonalizedPrompts,
    bank: PromptBank,
    dataset: FrameDataset,
    held: FrameDataset,
    config: RunConfig,
    *,
    seed: int = 0,
) -> tuple[dict[str, Any], Pictures]:
    """The summary of all measures on frames held out of training, and pictures of them."""
    bank = bank_for(bank, prompts, held, clip, config)
    trials = draw_trials(held, _EVALUATED_FRAMES, seed=seed)
    torch.manual_seed(seed)  # for generators that use random numbers
    references = _References(generator, dataset)

    def edit(frames: Tensor, target: Tensor) -> Tensor:
        return generator(frames, references(target, frames.device))

    values = judge_edits(edit, held, trials, device=clip.device) if isinstance(held, SyntheticFaces) else {}
    values |= prompt_view(clip, bank, held, trials) | clip_view(edit, clip, bank, held, trials)
    summary = summarize(values, held.individual_index[trials.index])
    if not isinstance(held, SyntheticFaces):
        _add_field_view(summary, edit, held, trials, clip.device)
    return summary, Pictures(
        {"faces": _face_grid(generator, held, people=8, references=dataset)},
        moving_faces(edit, _talking(held), device=clip.device),
    )


def _add_field_view(
    summary: dict[str, Any], edit: Edit, held: FrameDataset, trials: Trials, device: torch.device
) -> None:
    """Add what networks beside CLIP see in edits of real faces, as far as they are installed."""

    def edit_on_device(frames: Tensor, target: Tensor) -> Tensor:
        return edit(frames.to(device), target.to(device)).cpu()

    tools = load_tools(["identity", "emotion", "lmd"], None, str(device))
    view = field_view(edit_on_device, held, trials, tools)
    field = summarize_view(view, held.individual_index[trials.index])
    summary["intervals"] |= field.pop("intervals")
    summary |= field


def open_data(config: RunConfig, *, reserve: bool = False) -> tuple[FrameDataset, FrameDataset]:
    """(training frames, held-out frames): unseen people where faces are drawn, what `split` names of a folder.

    With `reserve`, a folder may lack some of `config.emotions`.
    """
    if config.data == "synthetic":
        common: dict[str, Any] = {"emotions": config.emotions or EMOTIONS, "size": config.side}
        missing = _missing(config)
        train = SyntheticFaces(
            config.individuals,
            clips=config.clips,
            frames_per_clip=config.frames_per_clip,
            seed=2 * config.seed + 1,  # odd, so that it never draws a held-out person
            missing=missing,
            **common,
        )
        return train, _held_out_people(frames_per_clip=4, **common)
    faces = FolderFaces(
        config.data,
        size=config.side,
        emotions=config.emotions,
        reserve=reserve,
        skip_broken=config.skip_broken,
    )
    return split(faces, by=config.split, fraction=config.holdout)


def _held_out_people(**options: Any) -> SyntheticFaces:
    return SyntheticFaces(12, clips=1, seed=2, **options)


def _talking(held: FrameDataset) -> FrameDataset:
    """Data with clips long enough to be looked at as they play: where faces are drawn, the same people's."""
    if not isinstance(held, SyntheticFaces):
        return held
    return _held_out_people(frames_per_clip=_LOOP, emotions=held.emotions, size=held.size)


def _crop_of(dataset: FrameDataset) -> Crop | None:
    """How `prepare` cut these faces, for `edit` to cut others alike; None where it did not find them."""
    while isinstance(dataset, FrameSubset):
        dataset = dataset.parent
    prepared = dataset.prepared if isinstance(dataset, FolderFaces) else None
    if prepared is None or prepared.get("crop") != "faces":
        return None
    return Crop(prepared["margin"], prepared["align"])


def _missing(config: RunConfig) -> list[tuple[int, int]]:
    emotions = config.emotions or EMOTIONS
    others = [i for i, e in enumerate(emotions) if e != "neutral"]
    if not 0 <= config.missing < len(others):
        raise ValueError(f"missing: takes 0 to {len(others) - 1} emotions, got {config.missing}")
    return [(n, others[(n + k) % len(others)]) for n in range(config.individuals) for k in range(config.missing)]


def load_clip_for(config: RunConfig) -> Clip:
    dtype = tower_dtype(config.tower_dtype, device := device_named(config.device))
    clip = load_clip(config.clip, config.clip_pretrained, device=device, dtype=dtype, like=config.clip_like)
    _ = clip.tokenizer  # fetched now, or rejected before any work is done
    return clip


def _prompts_for(
    config: TrainConfig, clip: Clip, dataset: FrameDataset, begin: Callable[[], None]
) -> tuple[PersonalizedPrompts, PromptBank, dict[str, list[tuple[int, float]]]]:
    """What stage 1 made or makes now; `begin` is called when everything has been checked."""
    if config.prompts is not None:
        prompts, _ = load_prompts(file_of_run("prompts", config.prompts, "prompts"), clip)
        bank = PromptBank.load(file_of_run("prompts", config.prompts, "bank"), clip)
        check_emotions(bank, dataset.emotions)
        begin()
        wanted = dataset.keys if bank.condition == "frame" else dataset.individuals
        if new := len({*wanted} - {*bank.individuals}):
            what = "frames" if bank.condition == "frame" else "individuals"
            log.info(
                f"--prompts: {config.prompts} was learned without {new} of the {len(wanted)} {what} in --data: their "
                "rows of the bank are computed by the same prompts from their own frames"
            )
        return prompts, bank_for(bank, prompts, dataset, clip, config), {}
    prompts, bank, loop = learn_prompts(clip, dataset, config.stage_one(), begin=begin)
    return prompts, bank, loop.curves


def bank_for(
    bank: PromptBank, prompts: PersonalizedPrompts, dataset: FrameDataset, clip: Clip, config: RunConfig
) -> PromptBank:
    """A bank with everyone (or every frame) in `dataset`: missing rows are computed from their frames."""
    wanted = dataset.keys if bank.condition == "frame" else dataset.individuals
    known = set(bank.individuals)
    new = [i for i, name in enumerate(wanted) if name not in known]
    if not new:
        return bank
    kept = bank.selected([name for name in wanted if name in known], clip.device)
    names = [wanted[i] for i in new]
    if bank.condition == "none":
        return kept.extended(prompts, None, names, clip=clip)
    conditions: Features = frame_features(clip, dataset, config)
    if bank.condition == "individual":
        conditions = individual_conditions(conditions, dataset.individual_index, len(dataset.individuals))
    return kept.extended(prompts, conditions[torch.tensor(new)], names, clip=clip)


class _References:
    """What drives the generator to an emotion: its index, or frames of people in the training data who show it."""

    def __init__(self, generator: Generator, dataset: FrameDataset) -> None:
        self.by_frame = generator.driven_by == "reference"
        self.by_emotion = FramesByEmotion(dataset.emotion_index)
        self.dataset = dataset

    def __call__(self, target: Tensor, device: torch.device) -> Tensor:
        if not self.by_frame:
            return target.to(device)
        index = self.by_emotion.draw(target.cpu(), torch.Generator().manual_seed(0))
        return self.dataset.frames(index).to(device)


@torch.no_grad()
def _face_grid(generator: Generator, dataset: FrameDataset, *, people: int, references: FrameDataset) -> FaceGrid:
    """One frame of each of the first few people, showing different emotions in turn, edited to every emotion."""
    device = next(generator.parameters()).device
    driver = _References(generator, references)
    chosen: list[Tensor] = []
    for n in dataset.individual_index.unique().tolist()[:people]:
        own = (dataset.individual_index == n).nonzero()[:, 0]
        # Cycle through the emotions the person shows, so that the grid has varied sources.
        chosen.append(own[(len(own) * len(chosen) // people + len(chosen)) % len(own)])
    index = torch.stack(chosen)
    count, emotions = len(index), len(dataset.emotions)
    source = dataset.frames(index)
    target = torch.arange(emotions).repeat(count)
    repeated = source.repeat_interleave(emotions, 0)
    edited = generator(repeated.to(device), driver(target, device)).cpu().unflatten(0, (count, emotions))
    truth = None
    if isinstance(dataset, SyntheticFaces):
        truth = dataset.truth(index.repeat_interleave(emotions), target).unflatten(0, (count, emotions))
    return FaceGrid(
        "People held out of training" if truth is not None else "Frames held out of training",
        _who_is_shown(count, len(dataset.individual_index.unique()), drawn=truth is not None),
        [dataset.individuals[i] for i in dataset.individual_index[index].tolist()],
        list(dataset.emotions),
        source,
        [dataset.emotions[i] for i in dataset.emotion_index[index].tolist()],
        edited,
        truth,
    )


def _who_is_shown(shown: int, held: int, *, drawn: bool) -> str:
    if held == 1:
        frames = "One frame of one individual"
    else:
        frames = f"One frame of each of {shown} individuals" + (f", of {held}" if shown < held else "")
    if drawn:
        return f"{frames}; the true edit is the same frame drawn with the other emotion."
    return f"{frames}; for real faces there is no true edit to compare with."


def _publish(
    folder: RunFolder,
    title: str,
    summary: dict[str, Any],
    curves: dict[str, list[tuple[int, float]]],
    pictures: Pictures,
    config: RunConfig,
    held: FrameDataset,
    command: str,
    changes: Changes | None = None,
) -> None:
    grids, clips = pictures
    for name, grid in grids.items():
        save_grid_png(folder.path / f"{name}.png", grid)
    for number, moving in enumerate(clips, 1):
        save_webp(folder.path / f"clip-{number}.webp", moving)
    drawn = isinstance(held, SyntheticFaces)
    report = Report(
        title,
        lead="" if grids else "Prompts alone: this run learned them and edited no faces.",
        grids=list(grids.values()),
        clips=clips,
        results=results_table(summary),
        prompts=prompts_table(summary),
        words=prompts_in_words(summary),
        changes=None if changes is None else changes_table(changes),
        confusion=None if changes is None else (changes.emotions, changes.confusion),
        limits=limits_in_words(summary, emotions=len(held.emotions), clip=config.clip, drawn=drawn, edited=bool(grids)),
        curves=curves,
        origin=origin(command, seconds=summary["seconds"], device=device_named(config.device)),
        config=asdict(config),
    )
    write_report(folder.path / "report.html", report)
    folder.finish(summary)


def _config_of(run: Path) -> TrainConfig:
    """The config of a finished run."""
    path = run / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"run: {run} is not the output folder of `pcmecl-fast train` (no config.yaml)")
    options = read_options(path, argument="run")
    if "generator" not in options:
        held = held_by(run)
        wrote = held.command if held is not None and held.command else "prompts"
        raise ValueError(f"run: {run} was written by `pcmecl-fast {wrote}`, not by `pcmecl-fast train`")
    return from_options(TrainConfig, options, source=f"run: {path}")
