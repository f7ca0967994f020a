"""Comparisons of stage 2's whole step: generator, critic, reader, criterion and optimisers, and prompts of frames.

The trainer's own step, `train.generator.Step`, against a loop of one's own around the same generator and critic:
"published trainer" runs the individuals' prompts at 77 positions in every step; "careful trainer" takes them from a
bank, and has channels last where that is faster and Adam's foreach. Sources are encoded in every step, since each step
draws new views of them; with `--views 8` a view is drawn again sooner or later, and that side has seen all of them.

Learning rates are 0 and the critic's power iterations begin anew, so that every step is the same.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import rehearsal
from bench.careful import trimmed_prompts
from bench.compare import Candidates, Comparison, Side, backend_sides, comparison, count_operations, those_that_run
from bench.compare_prompts import (
    CAREFUL,
    CRITERION,
    PUBLISHED,
    TOWER,
    backward_to,
    normal,
    random_frames,
    random_prompts,
    tower,
)
from pcmecl_fast import PCMECLCriterion, PersonalizedPrompts, PromptBank, ops
from pcmecl_fast.clip import Clip
from pcmecl_fast.criterion import MIN_CHANGE
from pcmecl_fast.models import Generator, PatchDiscriminator
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.synthetic.reader import load_reader, reading_losses
from pcmecl_fast.train.batches import Batch
from pcmecl_fast.train.config import TrainConfig
from pcmecl_fast.train.generator import Step, identity_loss, learning_below, mouth_loss
from pcmecl_fast.train.players import judged
from pcmecl_fast.train.views import gradients_blurred, half_mirrored, seen_alike

KEPT_VIEWS, OURS = "pcmecl_fast, --views 8", "pcmecl_fast"
STEP = (*CRITERION, "pcmecl_fast/models/*.py", "pcmecl_fast/train/*.py", "pcmecl_fast/synthetic/reader.py")
SEED, VIEWS = 0, 8


@comparison(
    "stage2_step",
    "a whole step of stage 2 on 16 frames of 256 × 256 with ViT-B-32: generator, critic, PCMECL, optimisers",
    sources=STEP,
    targets={"cpu": {CAREFUL: 1.5}},
)
def stage2_step(device: torch.device, dtype: torch.dtype) -> Comparison:
    # Real faces have no reader.
    options: dict[str, Any] = {
        "size": rehearsal.size(256, 32),
        "batch": rehearsal.size(16),
        "w_speech": 0.0,
        "w_person": 0.0,
    }
    return _steps(tower(device, dtype, TOWER), options)


@comparison(
    "stage2_step_tiny",
    "a whole step of the demo: 24 drawn faces of 64 × 64 with tiny-face, the reader among the losses",
    sources=STEP,
    targets={"cpu": {CAREFUL: 1.0}},
)
def stage2_step_tiny(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _steps(tower(device, dtype, "tiny-face"), {"batch": rehearsal.size(24)})


@comparison(
    "stage2_criterion_frames",
    "PCMECL on 16 edited frames, sources encoded and prompts following each source in every step, with backward",
    sources=CRITERION,
)
def stage2_criterion_frames(device: torch.device, dtype: torch.dtype) -> Comparison:
    clip = tower(device, dtype)
    faces = SyntheticFaces(1, clips=1, frames_per_clip=1)
    prompts, emotions = random_prompts(clip, faces.emotions, "shared", 8), len(faces.emotions)
    count = rehearsal.size(16)
    source = random_frames(count, 256, device, dtype)
    edited = (source + 0.1 * normal(*source.shape, device=device, seed=1).to(dtype)).clamp(-1, 1).requires_grad_()
    row = torch.arange(count, device=device)
    shown = row % emotions
    asked = (shown + 1 + row % (emotions - 1)) % emotions
    # Of one frame that no step sees: the criterion's prompts give it the rows of those that it does.
    elsewhere = F.normalize(normal(1, clip.embed_dim, device=device), dim=-1)
    bank = PromptBank.build(prompts, elsewhere, ["elsewhere"], faces.emotions, clip=clip, condition="frame")
    criterion = PCMECLCriterion(clip, bank, prompts=prompts)

    def plain(encode: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with torch.no_grad():
            features = F.normalize(clip.encode_image(source, backend="reference").float(), dim=-1)
            text = encode(features)
        changed = clip.encode_image(edited, backend="reference").float()
        loss = ops.direction_loss(
            features, changed, text, row, shown, asked, min_change=MIN_CHANGE, backend="reference"
        )
        return [loss, backward_to(edited, loss)]

    def ours(backend: str) -> list[Tensor]:
        with ops.use_backend(backend):
            loss = criterion(source, edited, None, shown, asked)
        return [loss, backward_to(edited, loss)]

    published = partial(plain, partial(prompts, backend="reference"))
    candidates: Candidates = {CAREFUL: lambda: partial(plain, trimmed_prompts(prompts))}
    others, skipped = those_that_run(
        candidates | backend_sides(ours, device, "tree_attention", "direction_loss", "clip_frames")
    )
    return Comparison(
        [Side(PUBLISHED, published), *others, Side("trees in each step", partial(ours, "auto"))],
        operations=count_operations(partial(ours, "auto")),
        skipped=skipped,
        as_it_runs=True,
    )


_COMPARED: dict[str, Any] = {"generator": "warp-fields", "w_emotion": 0.0, "average": 0.0}
"""The generator and the critic that the plain loops train: what surrounds them is compared."""


@dataclass
class _Work:
    """What all sides of a step are given."""

    clip: Clip
    config: TrainConfig
    prompts: PersonalizedPrompts
    conditions: Tensor  # (N, D)
    bank: PromptBank
    lengths: Tensor  # (E, E), how far changes go
    batch: Batch  # on the host
    generator: Generator
    critic: PatchDiscriminator


def _steps(clip: Clip, options: dict[str, Any]) -> Comparison:
    faces, bank, prompts, conditions = _people(clip, TrainConfig(**options))
    lengths = torch.full((len(faces.emotions),) * 2, 0.3)

    def trainer(views: int) -> Step:
        config = TrainConfig(
            **options, **_COMPARED, lr=0.0, critic_lr=0.0, views=views, seed=SEED, out=Path(tempfile.mkdtemp())
        )
        criterion = PCMECLCriterion(
            clip,
            bank,
            contrast=config.contrast,
            min_change=config.min_change,
            strength=config.strength,
            lengths=lengths,
            tolerance=1.0,
        )
        torch.manual_seed(0)
        step = Step(clip, bank, faces, config, criterion=criterion)
        _make_visible(step.players.generator)
        return step

    ours, keeping = trainer(0), trainer(VIEWS)
    critic = _critic_of(ours)
    batch = _drawn(ours, faces)
    work = _Work(
        clip, ours.terms_of.config, prompts, conditions, bank, lengths.to(clip.device), batch,
        ours.players.generator, critic,
    )  # fmt: skip
    published, careful = (_Plain(work, careful=careful) for careful in (False, True))  # before any run moves a buffer
    run, keep = _run_of(ours, batch), _run_of(keeping, batch)
    candidates: Candidates = {
        CAREFUL: lambda: careful,
        **backend_sides(run, clip.device, "direction_loss", "clip_frames"),
        KEPT_VIEWS: lambda: partial(keep, "auto"),
    }
    others, skipped = those_that_run(candidates)
    return Comparison(
        [Side(PUBLISHED, published), *others, Side(OURS, partial(run, "auto"))],
        operations=count_operations(partial(run, "auto")),
        skipped=skipped,
        as_it_runs=True,
    )


def _people(clip: Clip, config: TrainConfig) -> tuple[SyntheticFaces, PromptBank, PersonalizedPrompts, Tensor]:
    faces = SyntheticFaces(rehearsal.size(16), clips=1, frames_per_clip=1, size=config.side)
    prompts = random_prompts(clip, faces.emotions, "shared", 8)
    conditions = F.normalize(normal(len(faces.individuals), clip.embed_dim, device=clip.device), dim=-1)
    bank = PromptBank.build(prompts, conditions, faces.individuals, faces.emotions, clip=clip, backend="reference")
    return faces, bank, prompts, conditions


def _drawn(step: Step, faces: SyntheticFaces) -> Batch:
    """A batch, with views that `--views 8` and `--views 0` show alike: numbers whose mirroring is the drawn one."""
    plan = step.draw(step.terms_of.config.batch, torch.Generator().manual_seed(1))
    # Drawing large faces takes minutes.
    large, on_host = faces.size > 64, torch.device("cpu")
    frames = random_frames(len(plan.index), faces.size, on_host, torch.float32) if large else faces.frames(plan.index)
    batch = Batch.of(plan, frames)
    batch.view.copy_(torch.tensor([next(filter(_mirrors_alike, _views_of(k))) for k in plan.index.tolist()]))
    return batch


def _views_of(index: int) -> range:
    return range(index * VIEWS, (index + 1) * VIEWS * 8)


def _mirrors_alike(view: int) -> bool:
    frame, number = random_frames(1, 8, torch.device("cpu"), torch.float32), torch.tensor([view])
    kept, drawn = (seen_alike(frame, frame, number, jitter=0.1, seed=SEED, kept=kept)[0] for kept in (True, False))
    return torch.equal(kept, drawn)


@torch.no_grad()
def _make_visible(generator: Generator) -> None:
    """Edits of a trained generator's size: those of a new one are lost in CLIP's rounding."""
    assert isinstance(generator.flow, Tensor)
    assert isinstance(generator.shade, Tensor)
    generator.flow.mul_(30)
    generator.shade.mul_(30)


def _critic_of(step: Step) -> PatchDiscriminator:
    assert step.players.critic is not None
    assert step.players.critic.patches is not None
    return step.players.critic.patches


def _run_of(step: Step, batch: Batch) -> Callable[[str], list[Tensor]]:
    start = _PowerIterations(_critic_of(step))

    def run(backend: str) -> list[Tensor]:
        start.restore()
        with ops.use_backend(backend):
            terms = step(batch, SEED)
        return _results(terms, step.players.generator)

    return run


class _Plain:
    """A loop of one's own around the same generator and critic, with plain PyTorch in each part."""

    def __init__(self, work: _Work, *, careful: bool) -> None:
        self.work, self.careful = work, careful
        self.generator, self.critic = copy.deepcopy((work.generator, work.critic))
        device, config = work.clip.device, work.config
        with_reader = config.w_speech or config.w_person
        self.reader = load_reader(device) if with_reader else None
        layout = torch.channels_last if careful and device.type == "cpu" else torch.contiguous_format
        for network in (self.critic, self.reader):
            if network is not None:
                network.to(memory_format=layout)
        self.start = _PowerIterations(self.critic)
        foreach = True if careful else None
        self.optimizer, self.critic_optimizer = (
            torch.optim.Adam(network.parameters(), lr=0.0, betas=(0.5, 0.99), foreach=foreach)
            for network in (self.generator, self.critic)
        )

    def __call__(self) -> list[Tensor]:
        self.start.restore()
        batch = self.work.batch.to(self.work.clip.device)
        terms, edited = self._improve_generator(batch)
        terms["critic"] = self._improve_critic(batch.frames, edited)
        return _results(terms, self.generator)

    def _improve_generator(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        config = self.work.config
        self.critic.requires_grad_(False)
        edit = self.generator.edit(batch.frames, batch.drive)
        seen = gradients_blurred(edit.frames)
        views = seen_alike(batch.frames, seen, batch.view, jitter=config.jitter, seed=SEED, kept=False)
        kept = batch.source == batch.target
        unchanged = (edit.frames - batch.frames).abs().flatten(1).mean(1)
        assert edit.shown is not None
        terms = {
            "pcmecl": self._pcmecl(batch, *views),
            "adversarial": -self.critic(judged(self.generator, edit.frames)).mean(),
            "reconstruction": (unchanged * kept).sum() / kept.sum().clamp(min=1),
            "recognition": F.cross_entropy(edit.shown, batch.source),
            **self._fidelity(batch, edit.frames, seen),
        }
        loss = sum(getattr(config, f"w_{name}") * term for name, term in terms.items())
        loss = loss + torch.stack(list(edit.penalties.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.generator.parameters(), 1.0)
        self.optimizer.step()
        return {"loss": loss, **terms}, edit.frames.detach()

    def _pcmecl(self, batch: Batch, source: Tensor, edited: Tensor) -> Tensor:
        clip, config = self.work.clip, self.work.config
        with torch.no_grad():
            before = clip.encode_image(source, backend="reference").float()
            text, row = self.work.bank.features, batch.row
            if not self.careful:
                text = self.work.prompts(self.work.conditions[batch.row], backend="reference")
                row = torch.arange(len(text), device=text.device)
        after = clip.encode_image(edited, backend="reference").float()
        loss = ops.direction_loss(
            before, after, text, row, batch.source, batch.target, scale=clip.logit_scale, contrast=config.contrast,
            min_change=config.min_change, backend="reference",
        )  # fmt: skip
        change = F.normalize(after, dim=-1) - F.normalize(before, dim=-1)
        direction = F.normalize(text[row, batch.target] - text[row, batch.source], dim=-1)
        short = F.relu(1 - (change * direction).sum(-1) / self.work.lengths[batch.source, batch.target])
        changed = batch.source != batch.target
        return loss + config.strength * (short * changed).sum() / changed.sum().clamp(min=1)

    def _fidelity(self, batch: Batch, edited: Tensor, seen: Tensor) -> dict[str, Tensor]:
        source = batch.frames
        if self.reader is None:
            box = self.work.config.mouth_box
            return {"identity": identity_loss(source, edited), "mouth": mouth_loss(source, edited, box)}
        read = half_mirrored(batch.view, source, seen, learning_below(seen, self.work.config.mouth_box))
        return dict(zip(("speech", "person"), reading_losses(self.reader, *read), strict=True))

    def _improve_critic(self, real: Tensor, edited: Tensor) -> Tensor:
        self.critic.requires_grad_(True)
        seen = torch.cat([judged(self.generator, frames) for frames in (real, edited)])
        of_real, of_edited = self.critic(seen).chunk(2)
        loss = F.relu(1 - of_real).mean() + F.relu(1 + of_edited).mean()
        self.critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.critic_optimizer.step()
        return loss


class _PowerIterations:
    """The buffers of a spectrally normalised network as they are now, to begin every step with."""

    def __init__(self, network: nn.Module) -> None:
        self.now = list(network.buffers())
        self.then = [buffer.clone() for buffer in self.now]

    def restore(self) -> None:
        with torch.no_grad():
            for now, then in zip(self.now, self.then, strict=True):
                now.copy_(then)


def _results(terms: dict[str, Tensor], generator: nn.Module) -> list[Tensor]:
    """Losses, and the generator's gradient as one vector."""
    gradient = [x.grad.flatten() for x in generator.parameters() if x.grad is not None]
    return [*(terms[name].detach() for name in ("loss", "pcmecl", "recognition", "critic")), torch.cat(gradient)]
