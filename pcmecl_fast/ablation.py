"""What each idea of the supervision is worth: the same generator, data and steps under each, judged on paired truth.

direct        loss = 1 − cos(v', that[n, b])                           features must match
differencing  ops.direction_loss                                       changes of features must match
generic       that[n, e] = unit(text_tower(description e))             the same for everybody
personalized  prompts conditioned on the individual, learned in stage 1
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from pcmecl_fast import ops
from pcmecl_fast.clip import Clip
from pcmecl_fast.data.base import EMOTIONS, FrameDataset
from pcmecl_fast.data.features import individual_conditions
from pcmecl_fast.data.synthetic import SyntheticFaces
from pcmecl_fast.evaluate.judge import load_judge
from pcmecl_fast.evaluate.metrics import zero_shot_features
from pcmecl_fast.files import write_atomically
from pcmecl_fast.models import ExpressionGenerator
from pcmecl_fast.prompts import PersonalizedPrompts, PromptBank, Tower
from pcmecl_fast.run import bank_for, load_clip_for, open_data
from pcmecl_fast.train.config import AblateConfig, PromptsConfig, TrainConfig
from pcmecl_fast.train.generator import criterion_for, train_generator
from pcmecl_fast.train.prompts import frame_features, learn_prompts

log = logging.getLogger("pcmecl_fast")

REGIMES = {"every emotion": 0, "scarcity": 2}
"""Emotions that each individual lacks in training; scarcity is judged on exactly these."""

MEASURES = {
    "personal_style_error": "Error of the edit's action units less everybody's mean for that emotion",
    "expression_error": "Mean absolute error of the action units read from the edit, against the true ones",
    "emotion_accuracy": "Edits in which the independent classifier sees the target emotion",
    "identity_similarity": "Cosine of identity vectors read from edit and source",
    "mouth_error": "Mouth openness and spread read from the edit, against the source's speech",
    "direction_top1": "Visual changes whose own individual's and emotion's text change is the nearest of all",
    "gap": "Distance of the mean image feature from the mean text feature",
    "gap_of_changes": "The same of unit changes of features: what is left of the gap after differencing",
}


@dataclass(frozen=True)
class Supervision:
    """One row of the table."""

    name: str
    personalized: bool = True
    differencing: bool = True
    nothing: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """Of `TrainConfig`, other than the defaults."""


MAIN = (
    Supervision("none", nothing=True),
    Supervision("generic, direct", personalized=False, differencing=False),
    Supervision("generic, differencing", personalized=False),
    Supervision("personalized, direct", differencing=False),
    Supervision("personalized, differencing"),
)
AROUND = (
    Supervision("contrast 0", options={"contrast": 0.0}),
    Supervision("context per emotion", options={"context": "per-emotion"}),
    Supervision("condition frame", options={"condition": "frame"}),
    Supervision("negatives within", options={"negatives": "within"}),
    Supervision("negatives distinct", options={"negatives": "distinct"}),
    Supervision("lambda_diff 0", options={"lambda_diff": 0.0}),
)


class DirectCriterion(nn.Module):
    """1 − cos(CLIP(edited), bank[n, b]), the mean over samples whose target is another emotion than the source's."""

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
        wanted = self.bank.lookup(individual, self.clip.device).float()
        wanted = wanted[torch.arange(len(wanted)), target_emotion]
        asked = (source_emotion != target_emotion).float()
        cosine = F.cosine_similarity(self.clip.encode_image(edited_frames).float(), wanted)
        return ((1 - cosine) * asked).sum() / asked.sum().clamp(min=1)


def run_ablate(config: AblateConfig) -> list[dict[str, Any]]:
    """Train and judge every supervision; writes `summary.json`, `ablation.svg` and one file for each training.

    A run that was killed goes on with the trainings that are missing.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    supervisions = MAIN if config.quick else (*MAIN, *AROUND)
    seeds = range(1 if config.quick else config.seeds)
    jobs = [(regime, s, seed) for seed in seeds for regime in REGIMES for s in supervisions]
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    for regime, supervision, seed in tqdm(jobs, desc="ablation", unit="training"):
        results.setdefault((regime, supervision.name), []).append(_kept(config, regime, supervision, seed))
        rows = summarize(results)
        write_atomically(config.out / "summary.json", (json.dumps(rows, indent=1) + "\n").encode())
    show(rows)
    draw(config.out / "ablation.svg", rows)
    return rows


def summarize(results: dict[tuple[str, str], list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A row for each regime and supervision: mean and standard error over the seeds of every measure."""
    rows = []
    for (regime, name), measured in results.items():
        row: dict[str, Any] = {"regime": regime, "supervision": name, "seeds": len(measured)}
        for measure in measured[0]:
            values = torch.tensor([each[measure] for each in measured], dtype=torch.float64)
            sem = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
            row[measure] = {"mean": float(values.mean()), "sem": sem}
        rows.append(row)
    return rows


def train_and_judge(config: TrainConfig, regime: str, supervision: Supervision) -> dict[str, float]:
    """One training, and every measure of it."""
    with ops.use_backend(config.backend):
        clip = load_clip_for(config)
        dataset, unseen = open_data(config)
        assert isinstance(dataset, SyntheticFaces)
        assert isinstance(unseen, SyntheticFaces)
        prompts, bank = _bank(clip, dataset, config, supervision)
        criterion = (
            criterion_for(clip, bank, dataset, config) if supervision.differencing else DirectCriterion(clip, bank)
        )
        generator, _ = train_generator(clip, bank, dataset, config, criterion=criterion)
        everyone = SyntheticFaces(
            config.individuals, clips=1, frames_per_clip=2, seed=2 * config.seed + 1, size=config.size
        )
        measures = judge_style(generator, everyone, _targets(dataset, everyone, regime))
        unseen_measures = judge_style(generator, unseen, _targets(None, unseen, regime))
        measures |= {f"unseen_{name}": value for name, value in unseen_measures.items()}
        if prompts is not None:
            held = bank_for(bank, prompts, unseen, clip, config)
            measures |= judge_prompts(clip, held, unseen, config)
        else:
            measures |= judge_prompts(clip, _generic(clip, unseen), unseen, config)
    return measures


@torch.no_grad()
def judge_style(
    generator: ExpressionGenerator,
    faces: SyntheticFaces,
    trials: tuple[Tensor, Tensor],  # frames (T,) and the emotions they shall show (T,)
) -> dict[str, float]:
    """Measures of edits against paired truth, personal style among them."""
    judge, device = load_judge(), next(generator.parameters()).device
    read_units, true_units, sums = (
        [],
        [],
        dict.fromkeys(("emotion_accuracy", "identity_similarity", "mouth_error"), 0.0),
    )
    for index, target in zip(*(part.split(128) for part in trials), strict=True):
        frames = faces.frames(index)
        edited = generator(frames.to(device), target.to(device)).cpu()
        seen, source = judge(edited), judge(frames)
        read_units.append(seen.action_units)
        true_units.append(faces.true_action_units(index, target))
        sums["emotion_accuracy"] += float((seen.emotion.argmax(1) == target).sum())
        sums["identity_similarity"] += float(F.cosine_similarity(seen.identity, source.identity).sum())
        error = (seen.speech - faces.parameters.speech[index]).abs() / torch.tensor([1.0, 2.0])
        sums["mouth_error"] += float(error.mean(1).sum())
    read, true, target = torch.cat(read_units), torch.cat(true_units), trials[1]
    style = _less_the_mean(read, target) - _less_the_mean(true, target)
    return {
        "personal_style_error": float(style.abs().mean()),
        "expression_error": float((read - true).abs().mean()),
        **{name: value / len(target) for name, value in sums.items()},
    }


@torch.no_grad()
def judge_prompts(clip: Clip, bank: PromptBank, faces: SyntheticFaces, config: TrainConfig) -> dict[str, float]:
    """Measures of a bank alone, on people that it was not learned on."""
    features = frame_features(clip, faces, config)
    emotions, count = len(faces.emotions), len(faces.individuals)
    cell = faces.individual_index * emotions + faces.emotion_index
    visual = individual_conditions(features, cell, count * emotions).view(count, emotions, -1)
    visual = F.normalize(visual, dim=-1)
    names = faces.individuals
    if bank.condition == "frame":
        first = [int((faces.individual_index == n).nonzero()[0, 0]) for n in range(count)]
        names = [faces.keys[i] for i in first]
    text = bank.lookup(bank.rows(names), visual.device).float()
    before, after = ops.reference.ordered_pairs(emotions, visual.device)
    visual_change, text_change = (F.normalize(x[:, after] - x[:, before], dim=-1).flatten(0, 1) for x in (visual, text))
    nearest = (visual_change @ text_change.T).argmax(1)
    once = (before < after).repeat(count)  # both ways of every change would cancel
    return {
        "direction_top1": float((nearest == torch.arange(len(nearest), device=nearest.device)).float().mean()),
        "gap": float((visual.flatten(0, 1).mean(0) - text.flatten(0, 1).mean(0)).norm()),
        "gap_of_changes": float((visual_change[once].mean(0) - text_change[once].mean(0)).norm()),
    }


def show(rows: list[dict[str, Any]]) -> None:
    measures = [m for m in MEASURES if m in rows[0]]
    for regime in dict.fromkeys(row["regime"] for row in rows):
        table = Table(title=f"Regime: {regime} (mean ± standard error over seeds)")
        for column in ("supervision", *measures):
            table.add_column(column.replace("_", " "), justify="left" if column == "supervision" else "right")
        for row in rows:
            if row["regime"] == regime:
                table.add_row(row["supervision"], *(_cell(row[measure]) for measure in measures))
        Console(width=160).print(table)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Error bars of the two errors that the supervision is to lower, one panel for each regime and measure."""
    shown = ("personal_style_error", "expression_error")
    figure, axes = plt.subplots(
        len(REGIMES), len(shown), figsize=(9, 1.4 + 0.32 * len(rows)), layout="constrained", squeeze=False
    )
    for line, regime in zip(axes, REGIMES, strict=True):
        own = [row for row in rows if row["regime"] == regime]
        for axis, measure in zip(line, shown, strict=True):
            for people, prefix, offset in (("seen people", "", -0.1), ("unseen people", "unseen_", 0.1)):
                means = [row[prefix + measure]["mean"] for row in own]
                errors = [row[prefix + measure]["sem"] or 0.0 for row in own]
                places = [k + offset for k in range(len(own))]
                axis.errorbar(means, places, xerr=errors, fmt="o", capsize=3, markersize=4, label=people)
            axis.set(title=f"{regime}: {measure.replace('_', ' ')}", yticks=range(len(own)))
            axis.set_yticklabels([row["supervision"] for row in own])
            axis.invert_yaxis()
    axes[0, 0].legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def _kept(config: AblateConfig, regime: str, supervision: Supervision, seed: int) -> dict[str, float]:
    """The measures of one training: from its file, or made now."""
    options = {f.name: getattr(config, f.name) for f in TrainConfig.__dataclass_fields__.values()}
    steps = config.quick_steps if config.quick else config.steps
    folder = config.out / "trainings" / f"{regime} - {supervision.name} - {seed}".replace(" ", "-").replace(",", "")
    trained = replace(
        TrainConfig(**options),
        out=folder, features=config.out / "features", seed=seed, steps=steps, missing=REGIMES[regime],
        **supervision.options,
    )  # fmt: skip
    if supervision.nothing:
        trained.w_pcmecl = 0.0
    key = hashlib.blake2b(repr(sorted(asdict(trained).items())).encode(), digest_size=8).hexdigest()
    file = folder / "measures.json"
    if file.exists() and (kept := json.loads(file.read_text()))["config"] == key:
        return kept["measures"]
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    measures = train_and_judge(trained, regime, supervision)
    measures["seconds"] = time.monotonic() - started
    write_atomically(file, json.dumps({"config": key, "measures": measures}, indent=1).encode())
    return measures


def _bank(
    clip: Clip, dataset: SyntheticFaces, config: TrainConfig, supervision: Supervision
) -> tuple[PersonalizedPrompts | None, PromptBank]:
    if not supervision.personalized:
        return None, _generic(clip, dataset)
    shared = {k: v for k, v in vars(config).items() if k in PromptsConfig.__dataclass_fields__}
    shared |= {"steps": config.prompt_steps, "out": config.out / "prompts"}
    prompts, bank, _ = learn_prompts(clip, dataset, PromptsConfig(**shared))
    return prompts, bank


def _generic(clip: Clip, dataset: FrameDataset) -> PromptBank:
    features = zero_shot_features(clip, dataset.emotions)
    everybody = features.expand(len(dataset.individuals), -1, -1).clone()
    return PromptBank(everybody, dataset.individuals, dataset.emotions, tower=Tower.of(clip))


def _targets(trained_on: SyntheticFaces | None, faces: SyntheticFaces, regime: str) -> tuple[Tensor, Tensor]:
    """Every frame with every other emotion; under scarcity, people of the training with those that they lack there."""
    emotions = len(faces.emotions)
    index = torch.arange(len(faces)).repeat_interleave(emotions)
    target = torch.arange(emotions).repeat(len(faces))
    wanted = faces.emotion_index[index] != target
    if regime == "scarcity" and trained_on is not None:
        lacks = ~trained_on.available()
        wanted &= lacks[faces.individual_index[index], target]
    chosen = wanted.nonzero()[:, 0]
    # A few hundred say enough; spread over everybody.
    chosen = chosen[torch.linspace(0, len(chosen) - 1, min(len(chosen), 840)).long()]
    return index[chosen], target[chosen]


def _less_the_mean(
    units: Tensor,  # (T, A, 2)
    target: Tensor,  # (T,)
) -> Tensor:
    """Each trial's action units less the mean of its target's: what is personal in them."""
    flat = units.flatten(1)
    total = torch.zeros(len(EMOTIONS), flat.shape[1]).index_add_(0, target, flat)
    mean = total / torch.bincount(target, minlength=len(EMOTIONS)).clamp(min=1)[:, None]
    return flat - mean[target]


def _cell(value: dict[str, float | None]) -> str:
    sem = "" if value["sem"] is None else f" ± {value['sem']:.3f}"
    return f"{value['mean']:.3f}{sem}"
