"""Stage 2: training a generator on unpaired frames, supervised by PCMECL.

    loss = w_pcmecl · PCMECL + w_adversarial · (looks real) + w_cycle · (edits back)
         + w_reconstruction · (unchanged for its own emotion) + w_recognition · (names the emotion shown)
         + w_person · (same person) + w_speech · (same speech) + Σ (the generator's own penalties)

Person and speech are read from drawn faces by the shipped `FaceReader`. It cannot read real faces: there the pixel
terms w_identity and w_mouth replace the two. Every eighth target is the source's own emotion: there PCMECL contributes
nothing and the frame must not change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcmecl_fast.clip import Clip
from pcmecl_fast.criterion import TOLERANCE, PCMECLCriterion
from pcmecl_fast.criterion_parts import LENGTHS, save_lengths
from pcmecl_fast.data.base import FrameDataset
from pcmecl_fast.data.loading import read_ahead
from pcmecl_fast.lengths import personal_lengths, real_lengths
from pcmecl_fast.models import Edit, Generator, PatchDiscriminator, make_generator
from pcmecl_fast.ops.operator import requested_backend
from pcmecl_fast.options import plain_options
from pcmecl_fast.prompts import PromptBank
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.synthetic.reader import FaceReader, load_reader, reading_losses
from pcmecl_fast.train.config import TrainConfig
from pcmecl_fast.train.loop import Loop, Stateful
from pcmecl_fast.train.prompts import contents_of, frame_features

log = logging.getLogger("pcmecl_fast")

_TERMS = (
    "pcmecl",
    "adversarial",
    "cycle",
    "reconstruction",
    "identity",
    "mouth",
    "speech",
    "person",
    "recognition",
)


def train_generator(
    clip: Clip,
    bank: PromptBank,
    dataset: FrameDataset,
    config: TrainConfig,
    *,
    criterion: nn.Module | None = None,
    preview: Callable[[Generator], Tensor] | None = None,
    prompts_hash: str = "",
) -> tuple[Generator, Loop]:
    """Train the configured generator on `dataset`.

    Args:
        criterion: replaces PCMECL's, with the same arguments.
        preview: draws an occasional picture for TensorBoard.
        prompts_hash: of the files that the bank was loaded from; a checkpoint with another one is refused.
    """
    torch.manual_seed(config.seed)
    generator = make_generator(config.generator, dataset.emotions, config.side, config.generator_options)
    players = _Players(generator.to(clip.device), PatchDiscriminator().to(clip.device), config, clip.device)
    draw = _Plans(dataset, bank, with_reference=generator.driven_by == "reference")
    terms_of = _Terms(players, criterion or criterion_for(clip, bank, dataset, config), clip, dataset, config)
    loop = Loop(
        config.out,
        "stage 2",
        players.states(),
        steps=config.steps,
        seed=config.seed,
        every=config.checkpoint_every,
        resume=config.resume,
        signature=_signature(clip, dataset, generator, config) | {"the contents of --prompts": prompts_hash},
    )
    plans = (draw(config.batch, loop.generator(step)) for step in range(loop.done, config.steps))
    for step, (plan, frames) in zip(
        loop, read_ahead(dataset, plans, _Plan.wanted, workers=config.readers), strict=True
    ):
        # Layers with random draws of their own, such as dropout, must draw the same after resuming.
        torch.manual_seed(loop.generator(step).initial_seed())
        players.set_rates(_schedule(step, config.steps))
        batch = _Batch.of(plan, frames).to(clip.device)
        edited, terms = terms_of(batch, loop.generator(~step))
        loss = players.improve_generator(terms_of.weighted(terms))
        critic_loss = players.improve_critic(batch.frames, edited)
        loop.record(step, loss=loss, **terms, critic=critic_loss)
        if preview is not None and (step + 1) % max(50, config.steps // 6) == 0:
            loop.picture(step, "edits", preview(generator))
    return generator.eval().requires_grad_(False), loop


def _signature(clip: Clip, dataset: FrameDataset, generator: Generator, config: TrainConfig) -> dict[str, object]:
    """What must be the same for a run to be resumed; `prompts_hash` stands for the prompts, wherever they are."""
    kept = {k: v for k, v in config.what_counts().items() if k not in ("prompts", "prompt_steps")}
    return {**kept, "generator_options": plain_options(generator.config), **contents_of(clip, dataset)}


def check_emotions(bank: PromptBank, emotions: Sequence[str]) -> None:
    """Refuse a bank for other emotions than the data's: its columns would mean something else."""
    if bank.emotions != list(emotions):
        raise ValueError(f"bank: has the emotions {bank.emotions}, the data set has {emotions}")


def criterion_for(clip: Clip, bank: PromptBank, dataset: FrameDataset, config: TrainConfig) -> PCMECLCriterion:
    """PCMECL's loss as configured; the lengths of changes are measured on the data set."""
    lengths = None
    if config.strength:
        measure = personal_lengths if config.lengths == "individual" and bank.condition != "frame" else real_lengths
        try:
            lengths = measure(frame_features(clip, dataset, config), dataset, bank)
            save_lengths(config.out / LENGTHS, lengths, bank)
        except ValueError as error:
            log.warning("strength=%s: the length of edits is not constrained, since %s", config.strength, error)
    strength = 0.0 if lengths is None else config.strength
    return PCMECLCriterion(
        clip,
        bank,
        contrast=config.contrast,
        min_change=config.min_change,
        strength=strength,
        lengths=lengths,
        tolerance=TOLERANCE + 6 * config.jitter,  # the noise of `_seen_alike`, as far as it reaches
    )


def _schedule(step: int, steps: int) -> float:
    """Full learning rate, then a linear decay over the second half."""
    return min(1.0, (step + 1) / 20) * min(1.0, 2 * (steps - step) / steps)


class _Players:
    """The generator and its critic, each with its optimiser; they are updated in turn."""

    def __init__(
        self, generator: Generator, critic: PatchDiscriminator, config: TrainConfig, device: torch.device
    ) -> None:
        self.generator, self.critic = generator, critic
        self.optimizer = torch.optim.Adam(generator.parameters(), lr=config.lr, betas=(0.5, 0.99))
        self.critic_optimizer = torch.optim.Adam(critic.parameters(), lr=config.critic_lr, betas=(0.5, 0.99))
        self.rates = (config.lr, config.critic_lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        half = torch.float16 if config.amp == "fp16" else torch.bfloat16
        self.autocast = torch.autocast(device.type, dtype=half, enabled=config.amp != "none")

    def states(self) -> dict[str, Stateful]:
        names = ("generator", "critic", "optimizer", "critic_optimizer", "scaler")
        return {name: getattr(self, name) for name in names}

    def set_rates(self, part: float) -> None:
        for optimizer, rate in zip((self.optimizer, self.critic_optimizer), self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * part

    def improve_generator(self, loss: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.generator.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        return loss

    def improve_critic(self, frames: Tensor, edited: Tensor) -> Tensor:
        self.critic.requires_grad_(True)
        with self.autocast:
            real, fake = self.critic(frames), self.critic(edited.detach())
            loss = F.relu(1 - real).float().mean() + F.relu(1 + fake).float().mean()
        self.critic_optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.critic_optimizer)
        self.scaler.update()
        return loss


class _Terms:
    """The terms of the generator's loss on a batch."""

    def __init__(
        self, players: _Players, criterion: nn.Module, clip: Clip, dataset: FrameDataset, config: TrainConfig
    ) -> None:
        self.players, self.criterion, self.config = players, criterion, config
        self.reader = _reader_for(dataset, config, clip.device)
        # A random view of the source has different features, so stored ones do not apply.
        live = config.jitter or requested_backend(None) == "reference"
        self.features = None if live else frame_features(clip, dataset, config)
        self.weights = {name: getattr(config, f"w_{name}") for name in _TERMS}

    def __call__(self, batch: _Batch, random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """(edited frames, terms); unweighted, except for the generator's own penalties."""
        self.players.critic.requires_grad_(False)
        with self.players.autocast:
            edit = self.players.generator.edit(batch.frames, batch.drive)
            _check(edit, batch.frames)
            again = self.players.generator(edit.frames, batch.back) if self.config.w_cycle else None
            realism = self.players.critic(edit.frames)
            views = _seen_alike(batch.frames, edit.frames, self.config.jitter, random)
            known = None if self.features is None else self.features[batch.index]
            pcmecl = self.criterion(*views, batch.row, batch.source, batch.target, source_features=known)
        same = (batch.source == batch.target)[:, None, None, None]
        terms = {
            "pcmecl": pcmecl,
            "adversarial": -realism.float().mean(),
            "reconstruction": _mean_where((edit.frames - batch.frames).abs(), same),
            **edit.penalties,
            **self._fidelity(batch.frames, edit.frames, views),
        }
        if edit.shown is not None:
            terms["recognition"] = F.cross_entropy(edit.shown.float(), batch.source)
        if again is not None:
            terms["cycle"] = F.l1_loss(again, batch.frames)
        return edit.frames, terms

    def weighted(self, terms: dict[str, Tensor]) -> Tensor:
        """The loss. The generator's penalties are already weighted."""
        start = torch.zeros((), device=terms["pcmecl"].device)
        return sum((self.weights.get(name, 1.0) * term for name, term in terms.items()), start)

    def _fidelity(self, source: Tensor, edited: Tensor, views: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Speech and person, read from the faces if the reader can, else compared by pixels."""
        if self.reader is None:
            identity = identity_loss(source, edited.float())
            return {"identity": identity, "mouth": mouth_loss(source, edited.float(), self.config.mouth_box)}
        speech, person = reading_losses(self.reader, *(view.float() for view in views))
        return {"speech": speech, "person": person}


def _check(edit: Edit, frames: Tensor) -> None:
    """Catch mistakes of a user's generator before they become a loss of the wrong shape or name."""
    if not isinstance(edit, Edit):
        raise TypeError(f"generator: edit returns Edit(frames, penalties), got {type(edit).__name__}")
    if edit.frames.shape != frames.shape:
        raise ValueError(f"generator: edit was given frames {tuple(frames.shape)}, returned {tuple(edit.frames.shape)}")
    for name, penalty in edit.penalties.items():
        if name in (*_TERMS, "loss", "critic", "step"):
            raise ValueError(f"generator: the trainer has a {name!r} of its own; call the penalty something else")
        if not isinstance(penalty, Tensor) or penalty.numel() != 1:
            raise ValueError(f"generator: the penalty {name!r} must be a tensor of one number, got {penalty}")


def _reader_for(dataset: FrameDataset, config: TrainConfig, device: torch.device) -> FaceReader | None:
    if isinstance(dataset, SyntheticFaces):
        return load_reader(device) if config.w_speech or config.w_person else None
    log.info("stage 2: the reader knows drawn faces only; here pixel terms alone keep speech and identity")
    return None


def _seen_alike(
    source: Tensor,  # (B, 3, H, W)
    edited: Tensor,  # (B, 3, H, W)
    jitter: float,
    random: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Both frames under the same random mirroring, shift, zoom and noise: CLIP must see the change in every view."""
    if not jitter:
        return source, edited
    count = len(source)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + jitter * (torch.rand(count, generator=random) * 2 - 1)
    # Mirrored half the time, so that changing half a face is never enough.
    theta[:, 0, 0] *= 1 - 2 * torch.randint(2, (count,), generator=random)
    theta[:, :, 2] = jitter * (torch.rand(count, 2, generator=random) * 2 - 1)
    noise = jitter * torch.randn(source.shape, generator=random).to(source)
    grid = F.affine_grid(theta.to(source), list(source.shape), align_corners=False)
    seen = [F.grid_sample(x, grid, padding_mode="border", align_corners=False) + noise for x in (source, edited)]
    return seen[0], seen[1]


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    weight = where.to(values.dtype).expand_as(values)
    return (values * weight).sum() / weight.sum().clamp(min=1)


def identity_loss(
    source: Tensor,  # (B, 3, H, W) in [-1, 1]
    edited: Tensor,  # (B, 3, H, W)
) -> Tensor:
    """L1 of the frames, which favours changing few pixels, plus twice that of their averages over 8×8 pixels.

    An expression moves lines; coarse colours and shapes make the identity.
    """
    return F.l1_loss(edited, source) + 2 * F.l1_loss(F.avg_pool2d(edited, 8), F.avg_pool2d(source, 8))


def mouth_loss(
    source: Tensor,  # (B, 3, H, W) in [-1, 1]
    edited: Tensor,  # (B, 3, H, W)
    box: list[float],  # left, top, right, bottom as fractions of the frame
) -> Tensor:
    """L1 between the middles of the mouths, where speech opens and closes the lips and expressions hardly reach.

    The strip's columns are averaged first, so that only the lips' heights are compared.
    """
    height, width = source.shape[-2:]
    left, right = round(box[0] * width), round(box[2] * width)
    top, bottom = round(box[1] * height), round(box[3] * height)
    strip = (..., slice(top, bottom), slice(left, right))
    return F.l1_loss(edited[strip].mean(-1), source[strip].mean(-1))


@dataclass(frozen=True)
class _Plan:
    """What a step trains on, before its frames are read."""

    index: Tensor  # (B,) frames of the data set
    reference: Tensor | None  # (B,) frames that show the targets, for a generator driven by them
    row: Tensor  # (B,) rows of the bank
    source: Tensor  # (B,) emotions shown
    target: Tensor  # (B,) target emotions

    def wanted(self) -> Tensor:
        """All frames to read, (B,) or (2 B,)."""
        return self.index if self.reference is None else torch.cat([self.index, self.reference])


@dataclass(frozen=True)
class _Batch:
    index: Tensor  # (B,) frames of the data set
    frames: Tensor  # (B, 3, S, S)
    drive: Tensor  # (B,) the target emotions, or (B, 3, S, S) frames that show them
    back: Tensor  # of the same kind: leads back to the source
    row: Tensor  # (B,) rows of the bank
    source: Tensor  # (B,) emotions shown
    target: Tensor  # (B,) target emotions

    @classmethod
    def of(cls, plan: _Plan, frames: Tensor) -> _Batch:
        drive, back = plan.target, plan.source
        if plan.reference is not None:
            frames, drive = frames.split(len(plan.index))
            back = frames
        return cls(plan.index, frames, drive, back, plan.row, plan.source, plan.target)

    def to(self, device: torch.device) -> _Batch:
        """On the device, except `index`, which is used to read features from disk."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "index"}
        return replace(self, **moved)


class _Plans:
    """Draws frames and target emotions; emotions are drawn evenly, so that rare ones are seen as often."""

    def __init__(self, dataset: FrameDataset, bank: PromptBank, *, with_reference: bool) -> None:
        self.dataset = dataset
        self.with_reference = with_reference
        counts = torch.bincount(dataset.emotion_index, minlength=len(dataset.emotions))
        self.shown = (counts > 0).nonzero()[:, 0]
        # PyTorch adds weights up in float32, in which some of millions would never be drawn: of many frames, first the
        # emotion is drawn and then the frame.
        self.weight = 1.0 / counts[dataset.emotion_index] if len(dataset) <= 2**18 else None
        self.by_emotion = FramesByEmotion(dataset.emotion_index)
        check_emotions(bank, dataset.emotions)
        if bank.condition == "frame":
            self.rows = bank.rows(dataset.keys)
        else:
            self.rows = bank.rows(dataset.individuals)[dataset.individual_index]

    def __call__(self, count: int, generator: torch.Generator) -> _Plan:
        if self.weight is None:
            shown = self.shown[torch.randint(len(self.shown), (count,), generator=generator)]
            index = self.by_emotion.draw(shown, generator)
        else:
            index = torch.multinomial(self.weight, count, replacement=True, generator=generator)
        source = self.dataset.emotion_index[index]
        target = self.shown[torch.randint(len(self.shown), (count,), generator=generator)]
        keep = torch.arange(count) % 8 == 7
        target = torch.where(keep, source, target)
        reference = self.by_emotion.draw(target, generator) if self.with_reference else None
        return _Plan(index, reference, self.rows[index], source, target)


class FramesByEmotion:
    """Draws frames of given emotions, of anybody who shows them."""

    def __init__(
        self,
        emotion_index: Tensor,  # (L,) int
    ) -> None:
        self.order = emotion_index.argsort(stable=True)
        self.counts = torch.bincount(emotion_index)
        self.starts = self.counts.cumsum(0) - self.counts

    def draw(
        self,
        emotion: Tensor,  # (B,) int, each shown by some frame
        generator: torch.Generator,
    ) -> Tensor:  # (B,) int
        # In float64: of many frames, float32 would never draw some.
        place = torch.rand(len(emotion), generator=generator, dtype=torch.float64) * self.counts[emotion]
        return self.order[self.starts[emotion] + place.long()]
