"""What each part of the supervision contributes: same generator, data and steps for each, judged on paired truth.

direct        loss = 1 − cos(v', that[n, b])                           features must match
differencing  ops.direction_loss                                       changes of features must match
generic       that[n, e] = unit(text_tower(description e))             the same for everyone
personalized  prompts conditioned on the individual, learned in stage 1
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from filelock import FileLock
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from pcmecl_fast import ops
from pcmecl_fast.clip import Clip
from pcmecl_fast.data.base import FrameDataset
from pcmecl_fast.data.emotions import EMOTIONS
from pcmecl_fast.distributed import agree, alone, barrier, from_main, is_main, rank, ranks, source_hash
from pcmecl_fast.evaluate.metrics import Trials, zero_shot_features
from pcmecl_fast.evaluate.style import judge_prompts, judge_style
from pcmecl_fast.files import write_atomically
from pcmecl_fast.models import make_generator
from pcmecl_fast.ops.operator import usable_backend
from pcmecl_fast.prompts import PersonalizedPrompts, PromptBank, Tower, load_prompts
from pcmecl_fast.run import bank_for, load_clip_for, open_data
from pcmecl_fast.run_folder import RunFolder, open_run
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.train.config import AblateConfig, RunConfig, TrainConfig, check_options
from pcmecl_fast.train.generator import criterion_for, train_generator
from pcmecl_fast.train.prompts import frame_features, learn_prompts
from pcmecl_fast.workers import end_with

log = logging.getLogger("pcmecl_fast")

REGIMES = {"every emotion": 0, "scarcity": 2}
"""Emotions that each individual lacks in training; scarcity is judged on exactly these."""

_UNSEEN = 40
"""People that no training run has seen."""
_TRIALS = 1680
"""Edits judged: 40 people × 7 source emotions × 6 target emotions."""

MEASURES = {
    "personal_style_error": "Error of a person's mean action units over all edits to an emotion, against their own",
    "style_correlation": "Correlation of the same means, minus the population mean for the emotion, with the truth's",
    "expression_error": "Mean absolute error of the action units read from the edit, against the true ones",
    "emotion_accuracy": "Edits in which the independent classifier sees the target emotion",
    "identity_similarity": "Cosine of identity vectors read from edit and source",
    "edit_strength": "How far the measured change of action units goes along the true one; 1: just as far",
    "mouth_error": "Mouth openness and spread read from the edit, against the source's speech",
    "direction_top1": "Share of visual changes whose nearest text change is that of the same individual and emotions",
    "direction_cosine": "Mean cosine between a visual change and the same person's matching text change",
    "gap": "Distance between the mean image feature and the mean text feature",
    "gap_of_changes": "The same for unit feature changes: what is left of the gap after differencing",
}

OF_PROMPTS = ("direction_top1", "direction_cosine", "gap", "gap_of_changes")
OF_EDITS = tuple(measure for measure in MEASURES if measure not in OF_PROMPTS)


@dataclass(frozen=True)
class Supervision:
    """One row of the table."""

    name: str
    personalized: bool = True
    differencing: bool = True
    nothing: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """Options of `TrainConfig` that differ from the defaults."""


MAIN = (
    Supervision("none", nothing=True),
    Supervision("generic, direct", personalized=False, differencing=False),
    Supervision("generic, differencing", personalized=False, options={"lengths": "everybody"}),
    Supervision("personalized, direct", differencing=False),
    Supervision("personalized, differencing"),
)
AROUND = (
    Supervision("contrast 0", options={"contrast": 0.0}),
    Supervision("strength 0", options={"strength": 0.0}),
    Supervision("lengths everybody", options={"lengths": "everybody"}),
    Supervision("context per emotion", options={"context": "per-emotion"}),
    Supervision("condition frame", options={"condition": "frame"}),
    Supervision("negatives within", options={"negatives": "within"}),
    Supervision("negatives distinct", options={"negatives": "distinct"}),
    Supervision("lambda_diff 0", options={"lambda_diff": 0.0}),
)


class DirectCriterion(nn.Module):
    """1 − cos(CLIP(edited), bank[n, b]), averaged over samples whose target emotion differs from the source's."""

    def __init__(self, clip: Clip, bank: PromptBank) -> None:
        super().__init__()
        self.clip, self.bank = clip, bank

    def forward(
        self,
        source_frames: Tensor,
        edited_frames: Tensor,  # (B, 3, H, W)
        individual: Tensor,  # (B,)
        source_emotion: Tensor,  # (B,)
        target_emotion: Tensor,  # (B,)
        *,
        source_features: Tensor | None = None,
    ) -> Tensor:
        text = self.bank.lookup(individual, self.clip.device).float()
        text = text[torch.arange(len(text)), target_emotion]
        valid = (source_emotion != target_emotion).float()
        cosine = F.cosine_similarity(self.clip.encode_image(edited_frames).float(), text)
        return ((1 - cosine) * valid).sum() / valid.sum().clamp(min=1)


def run_ablate(config: AblateConfig) -> list[dict[str, Any]]:
    """Train and judge every supervision; writes `summary.json`, `ablation.svg` and one file per training run.

    An interrupted run picks up with the training runs that are missing.
    """
    check_options(config)
    _check_applicable(config)
    config = config.located()
    with open_run(config.out, config, overwrite=config.overwrite, extend=True) as folder:
        usable_backend(config.backend)
        agree({"the version of pcmecl_fast": source_hash(), "the options": repr(config)})
        folder.begin()
        rows = _train_all(config, folder)
    if is_main():
        show(rows)
    return rows


def _check_applicable(config: AblateConfig) -> None:
    """Refuse what the ablation cannot judge, and options that it sets itself for each training run."""
    if make_generator(config.generator, EMOTIONS, config.side, config.generator_options).driven_by != "emotion":
        raise ValueError("generator: the ablation judges generators driven by an emotion, not by a reference")
    if config.data != "synthetic":
        raise ValueError(
            f"data: the ablation judges drawn faces, whose true edits are known; takes synthetic, got {config.data}"
        )
    if config.missing:
        lacking = " and ".join(str(missing) for missing in REGIMES.values())
        raise ValueError(
            f"missing: the ablation trains with {lacking} missing emotions each time; takes no other, "
            f"got {config.missing}"
        )
    if config.prompts is not None:
        raise ValueError(
            f"prompts: the ablation learns the prompts of each training run; takes none, got {config.prompts}"
        )
    known = [each.name for each in (MAIN if config.quick else (*MAIN, *AROUND))]
    unknown = sorted({*(config.only or ())} - {*known})
    if unknown or config.only == []:
        quickly = " with --quick" if config.quick else ""
        raise ValueError(f"only: takes some of {', '.join(map(repr, known))}{quickly}, got {unknown or 'none'}")
    open_data(config)  # which refuses emotions that cannot be drawn
    beside, missing = len({*(config.emotions or EMOTIONS)} - {"neutral"}), max(REGIMES.values())
    if beside <= missing:
        raise ValueError(
            f"emotions: the ablation takes at least {missing + 1} beside neutral, since it trains with {missing} "
            f"missing, got {beside}"
        )


def _train_all(config: AblateConfig, folder: RunFolder) -> list[dict[str, Any]]:
    seeds = range(config.seed, config.seed + (1 if config.quick else config.seeds))
    # The main ones come first, so they can be read before the rest is done. The variations need only one regime.
    plan = [(regime, each, seed) for seed in seeds for regime in REGIMES for each in MAIN]
    if not config.quick:
        around = seeds[: config.around_seeds]
        plan += [(next(iter(REGIMES)), each, seed) for seed in around for each in AROUND]
    plan = [run for run in plan if config.only is None or run[1].name in config.only]
    jobs = [_Job(config, *each) for each in plan]
    measured: dict[int, dict[str, float]] = {}
    for index, measures in tqdm(_measured(config, jobs), total=len(jobs), desc="ablation", unit="training"):
        measured[index] = measures
        results: dict[tuple[str, str], list[dict[str, float]]] = {}
        for k in sorted(measured):
            results.setdefault((jobs[k].regime, jobs[k].supervision.name), []).append(measured[k])
        rows = summarize(results)
        folder.finish(rows)
    if is_main():
        draw(config.out / "ablation.svg", rows)
    return rows


def summarize(results: dict[tuple[str, str], list[dict[str, float]]]) -> list[dict[str, Any]]:
    """One row per regime and supervision: each measure's mean, standard deviation and standard error over seeds."""
    rows = []
    for (regime, name), measured in results.items():
        row: dict[str, Any] = {"regime": regime, "supervision": name, "seeds": len(measured)}
        for measure in measured[0]:
            values = torch.tensor([each[measure] for each in measured], dtype=torch.float64)
            std = float(values.std()) if len(values) > 1 else None
            sem = None if std is None else std / math.sqrt(len(values))
            row[measure] = {"mean": float(values.mean()), "std": std, "sem": sem, "values": values.tolist()}
        rows.append(row)
    regimes = [row["regime"] for row in rows]
    return sorted(rows, key=lambda row: regimes.index(row["regime"]))


def train_and_judge(config: TrainConfig, regime: str, supervision: Supervision) -> dict[str, float]:
    """One training run and all its measures."""
    with ops.use_backend(usable_backend(config.backend)):
        clip = load_clip_for(config)
        dataset, _ = open_data(config)
        assert isinstance(dataset, SyntheticFaces)
        prompts, bank = _bank(clip, dataset, config, supervision)
        criterion = (
            criterion_for(clip, bank, dataset, config) if supervision.differencing else DirectCriterion(clip, bank)
        )
        generator, _ = train_generator(clip, bank, dataset, config, criterion=criterion)
        common: dict[str, Any] = {"emotions": dataset.emotions, "size": config.side, "frames_per_clip": 1}
        emotions = len(dataset.emotions)
        clips = max(1, _TRIALS // (config.individuals * emotions * (emotions - 1)))  # few people, but as many edits
        everyone = SyntheticFaces(config.individuals, clips=clips, seed=2 * config.seed + 1, **common)
        # Different people for each seed, so the error bars cover them too; training seeds are never even.
        unseen = SyntheticFaces(_UNSEEN, clips=1, seed=2 * config.seed + 1000, **common)
        measures = judge_style(generator, everyone, _targets(dataset, everyone, regime), device=clip.device)
        unseen_measures = judge_style(generator, unseen, _targets(None, unseen, regime), device=clip.device)
        measures |= {f"unseen_{name}": value for name, value in unseen_measures.items()}
        held = _generic(clip, unseen) if prompts is None else bank_for(bank, prompts, unseen, clip, config)
        measures |= judge_prompts(held, unseen, frame_features(clip, unseen, config))
    return measures


def show(rows: list[dict[str, Any]]) -> None:
    for regime in dict.fromkeys(row["regime"] for row in rows):
        own = [row for row in rows if row["regime"] == regime]
        for what, measures in (("edits", OF_EDITS), ("prompts", OF_PROMPTS)):
            table = Table(title=f"{regime}: {what} (mean ± standard error over seeds)")
            table.add_column("supervision", no_wrap=True)
            for measure in measures:
                table.add_column(measure.replace("_", " "), justify="right")
            for row in own:
                table.add_row(row["supervision"], *(_cell(row[measure]) for measure in measures))
            Console(width=150).print(table)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Error bars of the two errors the supervision should lower, one panel per regime and measure."""
    shown = ("personal_style_error", "expression_error")
    regimes = {regime: [row for row in rows if row["regime"] == regime] for regime in REGIMES}
    heights = [len(own) for own in regimes.values()]
    figure, axes = plt.subplots(
        len(REGIMES), len(shown), figsize=(10, 2 + 0.3 * sum(heights)), layout="constrained", squeeze=False,
        sharey="row", height_ratios=heights,
    )  # fmt: skip
    for line, (regime, own) in zip(axes, regimes.items(), strict=True):
        least = min(row[shown[-1]]["mean"] for row in own)
        trained = [row for row in own if row[shown[-1]]["mean"] < 1.4 * least]
        for axis, measure in zip(line, shown, strict=True):
            for people, prefix, offset in (
                ("people seen in training", "", -0.1),
                ("people never seen", "unseen_", 0.1),
            ):
                means = [row[prefix + measure]["mean"] for row in trained]
                errors = [row[prefix + measure]["sem"] or 0.0 for row in trained]
                places = [k + offset for k in range(len(trained))]
                axis.errorbar(means, places, xerr=errors, fmt="o", capsize=3, markersize=4, label=people)
            # Far off to the right: they would squeeze all the others together.
            aside = ", ".join(f"{row['supervision']} {row[measure]['mean']:.3f}" for row in own if row not in trained)
            beyond = f"\n(beyond: {aside})" if aside else ""
            axis.set(title=f"{regime}: {measure.replace('_', ' ')}{beyond}", yticks=range(len(trained)))
            axis.title.set_size(10)
            axis.grid(axis="x", alpha=0.3)
        line[0].set_yticklabels([row["supervision"] for row in trained])
        line[0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


@dataclass(frozen=True)
class _Job:
    config: AblateConfig
    regime: str
    supervision: Supervision
    seed: int


def _measured(config: AblateConfig, jobs: list[_Job]) -> Iterator[tuple[int, dict[str, float]]]:
    """Each job's index and measures, in order of completion; over ranks, each trains its share of them."""
    if ranks() > 1:
        mine = jobs[rank() :: ranks()]  # the main ones, which come first, are spread evenly
        with alone():
            for job in mine:
                _kept(job)
        barrier()
        yield from from_main(lambda: [(index, _kept(job)) for index, job in enumerate(jobs)])
        return
    threads = torch.get_num_threads()
    workers = config.workers or (1 if _on_gpu(config) else min(threads, 8))
    if workers == 1:
        for index, job in enumerate(jobs):
            yield index, _kept(job)
        return
    with (
        _silent_children(),
        ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(os.getpid(), max(1, threads // workers)),
        ) as pool,
    ):
        with _deaf_children():
            running = {pool.submit(_kept, job): index for index, job in enumerate(jobs)}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():  # none of them leaves anything half written
                child.terminate()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin(parent: int, threads: int) -> None:
    end_with(parent)
    torch.set_num_threads(threads)


def _on_gpu(config: AblateConfig) -> bool:
    return config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())


@contextmanager
def _silent_children() -> Iterator[None]:
    """Child processes started in this block draw no progress bars: one bar is enough."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Child processes started in this block leave Ctrl-C, which reaches them too, to their parent."""
    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody set this
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _kept(job: _Job) -> dict[str, float]:
    """The measures of one training run: read from its file, or computed now."""
    config, supervision = job.config, job.supervision
    options = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
    name = f"{job.regime} - {supervision.name} - {job.seed}".replace(" ", "-").replace(",", "")
    folder = config.out / "trainings" / name
    trained = replace(
        TrainConfig(**options),
        out=folder,
        features=config.features_folder,
        workers=0,  # the ablation's are training runs
        seed=job.seed,
        steps=config.quick_steps if config.quick else config.steps,
        missing=REGIMES[job.regime],
        **supervision.options,
    )
    if supervision.nothing:
        trained.w_pcmecl = 0.0
    elif not supervision.differencing:
        trained.w_pcmecl = config.w_direct
    trained.prompts = config.out / "prompts" / _digest(trained.stage_one())
    key = _digest(trained)
    file = folder / "measures.json"
    if file.exists() and (kept := json.loads(file.read_text()))["config"] == key:
        return kept["measures"]
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    measures = train_and_judge(trained, job.regime, supervision)
    measures["seconds"] = time.monotonic() - started
    write_atomically(file, json.dumps({"config": key, "measures": measures}, indent=1).encode())
    return measures


def _digest(config: RunConfig) -> str:
    """A hash of everything a training run depends on; the location of its files is not part of it."""
    options = sorted((k, v) for k, v in config.what_counts().items() if k != "prompts")
    return hashlib.blake2b(repr(options).encode(), digest_size=8).hexdigest()


def _bank(
    clip: Clip, dataset: SyntheticFaces, config: TrainConfig, supervision: Supervision
) -> tuple[PersonalizedPrompts | None, PromptBank]:
    if not supervision.personalized:
        return None, _generic(clip, dataset)
    stage1 = config.stage_one()
    stage1.out.mkdir(parents=True, exist_ok=True)
    # Supervisions that share their prompts learn them once, in whichever process gets there first.
    with FileLock(stage1.out / "lock"):
        file = stage1.out / "prompts.safetensors"  # written last
        if not file.exists():
            return learn_prompts(clip, dataset, stage1)[:2]
        prompts, _ = load_prompts(file, clip)
        return prompts, PromptBank.load(stage1.out / "bank.safetensors", clip, on_disk=config.condition == "frame")


def _generic(clip: Clip, dataset: FrameDataset) -> PromptBank:
    features = zero_shot_features(clip, dataset.emotions)
    shared = features.expand(len(dataset.individuals), -1, -1).clone()
    return PromptBank(shared, dataset.individuals, dataset.emotions, tower=Tower.of(clip))


def _targets(trained_on: SyntheticFaces | None, faces: SyntheticFaces, regime: str) -> Trials:
    """Every frame with every other emotion; under scarcity, training people with the emotions they lack in training."""
    emotions = len(faces.emotions)
    index = torch.arange(len(faces)).repeat_interleave(emotions)
    target = torch.arange(emotions).repeat(len(faces))
    wanted = faces.emotion_index[index] != target
    if regime == "scarcity" and trained_on is not None:
        unavailable = ~trained_on.available()
        wanted &= unavailable[faces.individual_index[index], target]
    chosen = wanted.nonzero()[:_TRIALS, 0]  # one person after another, each with all their frames
    return Trials(index[chosen], target[chosen])


def _cell(value: dict[str, float | None]) -> str:
    sem = "" if value["sem"] is None else f" ± {value['sem']:.3f}"
    return f"{value['mean']:.3f}{sem}"
