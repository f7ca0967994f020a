"""The commands: each reads a config, does its work in one output folder, and returns its summary."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcmecl_fast import ops
from pcmecl_fast.clip import Clip, load_clip
from pcmecl_fast.data.base import EMOTIONS, FrameDataset, split
from pcmecl_fast.data.features import Features, individual_conditions
from pcmecl_fast.data.folder import FolderFaces
from pcmecl_fast.evaluate.metrics import NOTES, clip_view, draw_trials, judge_edits
from pcmecl_fast.evaluate.report import FaceGrid, Report, grid_image, save_grid_png, write_report
from pcmecl_fast.files import content_hash
from pcmecl_fast.models import Generator, load_generator, make_generator, save_generator
from pcmecl_fast.models.base import generator_config
from pcmecl_fast.ops.operator import usable_backend
from pcmecl_fast.options import from_options, plain_options, read_options
from pcmecl_fast.prompts import PersonalizedPrompts, PromptBank, load_prompts
from pcmecl_fast.run_folder import RunFolder, file_of_run, held_by, open_run
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.train.config import (
    EvaluateConfig,
    PromptsConfig,
    RunConfig,
    TrainConfig,
    check_options,
    device_named,
)
from pcmecl_fast.train.generator import check_emotions, draw_references, train_generator
from pcmecl_fast.train.loop import read_checkpoint
from pcmecl_fast.train.prompts import frame_features, learn_prompts

_EVALUATED_FRAMES = 336


def run_prompts(config: PromptsConfig) -> dict[str, Any]:
    """Stage 1 alone: `prompts.safetensors`, `bank.safetensors`, `report.html`, `summary.json`."""
    started = time.monotonic()
    check_options(config)
    config = config.located()
    with _run_of(config) as folder, ops.use_backend(usable_backend(config.backend)):
        if folder.result is not None:
            return folder.result
        clip = load_clip_for(config)
        dataset, held = open_data(config)
        _check_checkpoints(config)
        prompts, bank, loop = learn_prompts(clip, dataset, config, begin=folder.begin)
        bank = bank_for(bank, prompts, held, clip, config)
        trials = draw_trials(held, _EVALUATED_FRAMES)
        seen = clip_view(lambda frames, target: frames, clip, bank, held, trials)
        summary: dict[str, Any] = {k: seen[k] for k in ("zero_shot_accuracy", "prompt_accuracy")}
        summary |= {"individuals": len(bank.individuals), "seconds": time.monotonic() - started}
        report = Report("Personalized prompts", summary, NOTES, loop.curves, [], asdict(config))
        write_report(config.out / "report.html", report)
        folder.finish(summary)
    return summary


def run_train(config: TrainConfig, title: str = "Expression editing under PCMECL") -> dict[str, Any]:
    """Stage 2, and stage 1 where no prompts are given, then evaluation and the report."""
    started = time.monotonic()
    check_options(config)
    # Written out in full, so that config.yaml outlives other defaults.
    options = plain_options(generator_config(config.generator, config.generator_options))
    config = replace(config.located(), generator_options=options)
    with _run_of(config) as folder, ops.use_backend(usable_backend(config.backend)):
        if folder.result is not None:
            return folder.result
        clip = load_clip_for(config)
        dataset, held = open_data(config)
        _check_checkpoints(config)
        # Made once to see whether it can be, before stage 1 spends its time.
        make_generator(config.generator, dataset.emotions, config.size, config.generator_options)
        prompts, bank, curves = _prompts_for(config, clip, dataset, folder.begin)

        def preview(generator: Generator) -> Tensor:
            generator.eval()
            picture = grid_image(_face_grid(generator, held, people=4, references=dataset))
            generator.train()
            return picture

        contents = _prompts_hash(config.stage_one().out)
        generator, loop = train_generator(clip, bank, dataset, config, preview=preview, prompts_hash=contents)
        save_generator(config.out / "generator.safetensors", generator)
        curves |= loop.curves
        summary, grids = evaluate(generator, clip, prompts, bank, dataset, held, config)
        summary["seconds"] = time.monotonic() - started
        _publish(folder, title, summary, curves, grids, config)
    return summary


def run_evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Judge a finished run again, on its own data or on other data; writes `report.html` and `summary.json`."""
    started = time.monotonic()
    check_options(config)
    trained = _config_of(config.run)
    out = config.out or config.run / "evaluation"
    # Features of the run's own data are in its store already.
    features = trained.features or (config.run if config.data is None else out) / "features"
    trained = replace(
        trained, data=config.data or trained.data, device=config.device, out=out, features=features
    ).located()
    config = replace(config, run=config.run.absolute(), data=config.data and trained.data)
    with (
        open_run(out, config, overwrite=config.overwrite) as folder,
        ops.use_backend(usable_backend(config.backend)),
    ):
        clip = load_clip_for(trained)
        generator = load_generator(file_of_run("run", config.run, "generator"), clip.device)
        trained.emotions, trained.size = generator.emotions, generator.size
        dataset, held = open_data(trained)
        stage1 = trained.prompts or config.run / "prompts"
        prompts, _ = load_prompts(file_of_run("run", stage1, "prompts"), clip)
        bank = PromptBank.load(file_of_run("run", stage1, "bank"), clip)
        folder.begin()
        summary, grids = evaluate(generator, clip, prompts, bank, dataset, held, trained, seed=config.seed)
        summary["seconds"] = time.monotonic() - started
        _publish(folder, "Evaluation", summary, {}, grids, trained)
    return summary


def _run_of(config: PromptsConfig | TrainConfig) -> AbstractContextManager[RunFolder]:
    """The run's folder, once nothing in it stands in the way of the run."""
    inner = held_by(config.stage_one().out) if isinstance(config, TrainConfig) and config.prompts is None else None
    if inner is not None and inner.command:
        folder = config.out / "prompts"
        raise FileExistsError(f"--out: {folder} holds {inner}: take its prompts, --prompts {folder}, or another --out")
    return open_run(config.out, config, resume=config.resume, overwrite=config.overwrite)


def _check_checkpoints(config: PromptsConfig | TrainConfig) -> None:
    """Find a broken one before hours are spent on what comes before it."""
    if config.resume:
        for path in sorted(config.out.glob("**/stage-?.ckpt")):
            read_checkpoint(path)


def _prompts_hash(folder: Path) -> str:
    return " ".join(content_hash(folder / f"{name}.safetensors") for name in ("prompts", "bank"))


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
) -> tuple[dict[str, Any], dict[str, FaceGrid]]:
    """All measures on frames held out of training, and pictures of them."""
    bank = bank_for(bank, prompts, held, clip, config)
    trials = draw_trials(held, _EVALUATED_FRAMES, seed=seed)
    torch.manual_seed(seed)  # for generators that draw at random
    references = _References(generator, dataset)

    def edit(frames: Tensor, target: Tensor) -> Tensor:
        return generator(frames, references(target, frames.device))

    summary: dict[str, Any] = {}
    if isinstance(held, SyntheticFaces):
        summary |= judge_edits(edit, held, trials, device=clip.device)
    summary |= clip_view(edit, clip, bank, held, trials)
    return summary, {"faces": _face_grid(generator, held, people=8, references=dataset)}


def open_data(config: RunConfig) -> tuple[FrameDataset, FrameDataset]:
    """(training frames, held-out frames): unseen people where faces are drawn, unseen frames of a folder."""
    if config.data == "synthetic":
        common: dict[str, Any] = {"emotions": config.emotions or EMOTIONS, "size": config.size}
        lacking = _lacking(config)
        train = SyntheticFaces(
            config.individuals,
            clips=config.clips,
            frames_per_clip=config.frames_per_clip,
            seed=2 * config.seed + 1,  # odd, so that nobody held out is ever among them
            missing=lacking,
            **common,
        )
        return train, SyntheticFaces(12, clips=1, frames_per_clip=4, seed=2, **common)
    folder = FolderFaces(config.data, size=config.size, emotions=config.emotions, skip_broken=config.skip_broken)
    return split(folder, by="frame", fraction=config.holdout)


def _lacking(config: RunConfig) -> list[tuple[int, int]]:
    emotions = config.emotions or EMOTIONS
    others = [i for i, e in enumerate(emotions) if e != "neutral"]
    if not 0 <= config.missing < len(others):
        raise ValueError(f"missing: takes 0 to {len(others) - 1} emotions, got {config.missing}")
    return [(n, others[(n + k) % len(others)]) for n in range(config.individuals) for k in range(config.missing)]


def load_clip_for(config: RunConfig) -> Clip:
    return load_clip(config.clip, config.clip_pretrained, device=device_named(config.device))


def _prompts_for(
    config: TrainConfig, clip: Clip, dataset: FrameDataset, begin: Callable[[], None]
) -> tuple[PersonalizedPrompts, PromptBank, dict[str, list[tuple[int, float]]]]:
    """What stage 1 made or makes now; `begin` is called when everything has been checked."""
    if config.prompts is not None:
        prompts, _ = load_prompts(file_of_run("prompts", config.prompts, "prompts"), clip)
        bank = PromptBank.load(file_of_run("prompts", config.prompts, "bank"), clip)
        check_emotions(bank, dataset.emotions)
        begin()
        return prompts, bank_for(bank, prompts, dataset, clip, config), {}
    prompts, bank, loop = learn_prompts(clip, dataset, config.stage_one(), begin=begin)
    return prompts, bank, loop.curves


def bank_for(
    bank: PromptBank, prompts: PersonalizedPrompts, dataset: FrameDataset, clip: Clip, config: RunConfig
) -> PromptBank:
    """A bank that knows everyone (or every frame) in `dataset`: rows that it lacks are made from their frames."""
    wanted = dataset.keys if bank.condition == "frame" else dataset.individuals
    known = set(bank.individuals)
    new = [i for i, name in enumerate(wanted) if name not in known]
    if not new:
        return bank
    conditions: Features = frame_features(clip, dataset, config)
    if bank.condition == "individual":
        conditions = individual_conditions(conditions, dataset.individual_index, len(dataset.individuals))
    kept = bank.selected([name for name in wanted if name in known], clip.device)
    return kept.extended(prompts, conditions[torch.tensor(new)], [wanted[i] for i in new], clip=clip)


class _References:
    """What drives the generator to an emotion: its index, or frames of people in the training data who show it."""

    def __init__(self, generator: Generator, dataset: FrameDataset) -> None:
        self.by_frame = generator.driven_by == "reference"
        self.dataset = dataset

    def __call__(self, target: Tensor, device: torch.device) -> Tensor:
        if not self.by_frame:
            return target.to(device)
        random = torch.Generator().manual_seed(0)
        index = draw_references(self.dataset.emotion_index, target.cpu(), random)
        return self.dataset.frames(index).to(device)


@torch.no_grad()
def _face_grid(generator: Generator, dataset: FrameDataset, *, people: int, references: FrameDataset) -> FaceGrid:
    """One frame of each of the first people, in turns showing another emotion, edited to every emotion."""
    device = next(generator.parameters()).device
    driver = _References(generator, references)
    chosen: list[Tensor] = []
    for n in dataset.individual_index.unique().tolist()[:people]:
        own = (dataset.individual_index == n).nonzero()[:, 0]
        # Spread over what the person shows, so that the grid has different sources.
        chosen.append(own[(len(own) * len(chosen) // people + len(chosen)) % len(own)])
    index = torch.stack(chosen)
    count, emotions = len(index), len(dataset.emotions)
    source = dataset.frames(index)
    target = torch.arange(emotions).repeat(count)
    repeated = source.repeat_interleave(emotions, 0)
    edited = generator(repeated.to(device), driver(target, device)).cpu().unflatten(0, (count, emotions))
    truth = None
    caption = "Top row of each person: edited. The source is on the left."
    if isinstance(dataset, SyntheticFaces):
        truth = dataset.truth(index.repeat_interleave(emotions), target).unflatten(0, (count, emotions))
        caption = "Each person: edited above, and below it the same frame drawn with that emotion. Source on the left."
    return FaceGrid(
        "People held out of training" if truth is not None else "Frames held out of training",
        caption,
        [dataset.individuals[i] for i in dataset.individual_index[index].tolist()],
        list(dataset.emotions),
        source,
        [dataset.emotions[i] for i in dataset.emotion_index[index].tolist()],
        edited,
        truth,
    )


def _publish(
    folder: RunFolder,
    title: str,
    summary: dict[str, Any],
    curves: dict[str, list[tuple[int, float]]],
    grids: dict[str, FaceGrid],
    config: RunConfig,
) -> None:
    for name, grid in grids.items():
        save_grid_png(folder.path / f"{name}.png", grid)
    report = Report(title, summary, NOTES, curves, list(grids.values()), asdict(config))
    write_report(folder.path / "report.html", report)
    folder.finish(summary)


def _config_of(run: Path) -> TrainConfig:
    """What a finished run was told."""
    path = run / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"run: {run} is not the output folder of `pcmecl-fast train` (no config.yaml)")
    options = read_options(path, argument="run")
    if "generator" not in options:
        held = held_by(run)
        wrote = held.command if held is not None and held.command else "prompts"
        raise ValueError(f"run: {run} was written by `pcmecl-fast {wrote}`, not by `pcmecl-fast train`")
    return from_options(TrainConfig, options, source=f"run: {path}")
