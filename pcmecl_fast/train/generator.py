"""Stage 2: training a generator on unpaired frames, supervised by PCMECL.

    loss = w_pcmecl · PCMECL + w_adversarial · (looks real) + w_cycle · (edits back)
         + w_reconstruction · (unchanged for its own emotion) + w_recognition · (names the emotion shown)
         + w_person · (same person) + w_speech · (same speech) + Σ (the generator's own penalties)

Person and speech are read from drawn faces by the shipped `FaceReader`. It cannot read real faces: there the pixel
terms w_identity and w_mouth replace the two. Every eighth target is the source's own emotion: there PCMECL contributes
nothing and the frame must not change.

Over ranks, and over the parts of --accumulate, each term is the mean over the whole batch: a part's mean counts as much
as the part has samples that the term is about, so that one whose targets all equal their sources dilutes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pcmecl_fast.clip import Clip
from pcmecl_fast.criterion import TOLERANCE, PCMECLCriterion, attention_of_training
from pcmecl_fast.criterion_parts import LENGTHS, save_lengths
from pcmecl_fast.data.base import FrameDataset
from pcmecl_fast.data.loading import read_ahead
from pcmecl_fast.distributed import is_main, rank, ranks, summed
from pcmecl_fast.lengths import personal_lengths, real_lengths
from pcmecl_fast.models import Edit, Generator, PatchDiscriminator, make_generator
from pcmecl_fast.ops.operator import requested_backend
from pcmecl_fast.options import plain_options
from pcmecl_fast.prompts import PromptBank
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.synthetic.reader import FaceReader, load_reader, reading, reading_losses
from pcmecl_fast.train.batches import Batch, Plan, Plans
from pcmecl_fast.train.config import TrainConfig
from pcmecl_fast.train.loop import Loop, Stateful
from pcmecl_fast.train.prompts import contents_of, frame_features
from pcmecl_fast.train.views import FOLDER, KeptViews, seen_alike
from pcmecl_fast.wording import name_some

log = logging.getLogger("pcmecl_fast")

Network = TypeVar("Network", bound=nn.Module)

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
    check_batch(config)
    torch.manual_seed(config.seed)
    generator = make_generator(config.generator, dataset.emotions, config.side, config.generator_options)
    critic = _laid_out(PatchDiscriminator().to(clip.device))
    players = _Players(generator.to(clip.device), critic, config, clip)
    draw = Plans(dataset, bank, with_reference=generator.driven_by == "reference", views=config.views)
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
    if terms_of.kept is not None:
        terms_of.kept.load(loop.done, clip.device)
        loop.before_saving = terms_of.kept.save
    plans = (draw(config.batch, loop.generator(step)).own() for step in range(loop.done, config.steps))
    for step, (plan, frames) in zip(loop, read_ahead(dataset, plans, Plan.wanted, workers=config.readers), strict=True):
        # Layers with random draws of their own, such as dropout, must draw the same after resuming.
        torch.manual_seed(loop.generator(step).initial_seed() + (rank() << 40))
        players.set_rates(_schedule(step, config.steps))
        # Divided before it is moved: counting on the host waits for no device.
        parts = [part.to(clip.device) for part in Batch.of(plan, frames).parts(config.accumulate)]
        edits, terms = players.improve_generator(terms_of, parts, loop.generator(~step).initial_seed())
        critic_loss = players.improve_critic(parts, edits)
        loop.record(step, loss=terms_of.weighted(terms), **terms, critic=critic_loss)
        if preview is not None and is_main() and (step + 1) % max(50, config.steps // 6) == 0:
            loop.picture(step, "edits", preview(generator))
    if terms_of.kept is not None:
        terms_of.kept.remove()
    return generator.eval().requires_grad_(False), loop


def _signature(clip: Clip, dataset: FrameDataset, generator: Generator, config: TrainConfig) -> dict[str, object]:
    """What must be the same for a run to be resumed; `prompts_hash` stands for the prompts, wherever they are."""
    kept = {k: v for k, v in config.what_counts().items() if k not in ("prompts", "prompt_steps")}
    return {**kept, "generator_options": plain_options(generator.config), **contents_of(clip, dataset)}


def check_batch(config: TrainConfig) -> None:
    """Refuse a batch that cannot be divided among ranks and the parts of --accumulate."""
    parts = ranks() * config.accumulate
    if config.batch % parts:
        among = [f"{ranks()} ranks"] * (ranks() > 1) + [f"{config.accumulate} parts"] * (config.accumulate > 1)
        raise ValueError(
            f"batch: {config.batch} frames cannot be divided among {' of '.join(among)}; takes a multiple of {parts}"
        )


def criterion_for(clip: Clip, bank: PromptBank, dataset: FrameDataset, config: TrainConfig) -> PCMECLCriterion:
    """PCMECL's loss as configured; the lengths of changes are measured on the data set."""
    lengths = None
    if config.strength:
        measure = personal_lengths if config.lengths == "individual" and bank.condition != "frame" else real_lengths
        try:
            lengths = measure(frame_features(clip, dataset, config), dataset, bank)
            if is_main():
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
        tolerance=TOLERANCE + 6 * config.jitter,  # the noise of `seen_alike`, as far as it reaches
    )


def _schedule(step: int, steps: int) -> float:
    """Full learning rate, then a linear decay over the second half."""
    return min(1.0, (step + 1) / 20) * min(1.0, 2 * (steps - step) / steps)


class _Players:
    """The generator and its critic, each with its optimiser; they are updated in turn, over all ranks."""

    def __init__(self, generator: Generator, critic: PatchDiscriminator, config: TrainConfig, clip: Clip) -> None:
        self.generator, self.critic = generator, critic
        self.editing = _over_ranks(_Editing(generator, again=bool(config.w_cycle)))
        self.judging = _over_ranks(_Judging(critic))
        self.optimizer = torch.optim.Adam(generator.parameters(), lr=config.lr, betas=(0.5, 0.99), fused=True)
        self.critic_optimizer = torch.optim.Adam(
            critic.parameters(), lr=config.critic_lr, betas=(0.5, 0.99), fused=True
        )
        self.rates = (config.lr, config.critic_lr)
        # Towers in float16 would round gradients of frames, each divided by the batch's size, to 0.
        device, float16 = clip.device, config.amp == "fp16" or clip.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=float16)
        half = torch.float16 if config.amp == "fp16" else torch.bfloat16
        self.autocast = torch.autocast(device.type, dtype=half, enabled=config.amp != "none")

    def states(self) -> dict[str, Stateful]:
        names = ("generator", "critic", "optimizer", "critic_optimizer", "scaler")
        return {name: getattr(self, name) for name in names}

    def set_rates(self, part: float) -> None:
        for optimizer, rate in zip((self.optimizer, self.critic_optimizer), self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * part

    def improve_generator(
        self, terms_of: _Terms, parts: Sequence[Batch], seed: int
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The edited frames of each part, and the terms of the whole batch."""
        self.optimizer.zero_grad(set_to_none=True)
        edits, totals = list[Tensor](), dict[str, Tensor]()
        for number, part in enumerate(parts, 1):
            with _averaging(self.editing, last=number == len(parts)):
                edited, terms = terms_of(part, seed)
                # Ranks' gradients are averaged, and their terms are parts of a sum.
                self.scaler.scale(terms_of.weighted(terms) * ranks()).backward()
            edits.append(edited.detach())
            totals = {name: totals.get(name, 0.0) + term.detach() for name, term in terms.items()}
        self._check_used()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.generator.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        whole = summed(torch.stack([term.to(totals["pcmecl"]) for term in totals.values()]))
        return edits, dict(zip(totals, whole.unbind(), strict=True))

    def improve_critic(self, parts: Sequence[Batch], edits: Sequence[Tensor]) -> Tensor:
        self.critic.requires_grad_(True)
        self.critic_optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=edits[0].device)
        for number, (part, edited) in enumerate(zip(parts, edits, strict=True), 1):
            with _averaging(self.judging, last=number == len(parts)):
                with self.autocast:
                    real, fake = self.judging(part.frames, edited)
                    loss = F.relu(1 - real).float().mean() + F.relu(1 + fake).float().mean()
                loss = loss * part.of_all
                self.scaler.scale(loss * ranks()).backward()
            total += loss.detach()
        self.scaler.step(self.critic_optimizer)
        self.scaler.update()
        return summed(total)

    def _check_used(self) -> None:
        """Over ranks, parameters that no gradient reaches would leave others' gradients unaveraged."""
        if ranks() > 1:
            unused = [name for name, x in self.generator.named_parameters() if x.requires_grad and x.grad is None]
            if unused:
                raise ValueError(
                    f"generator: no gradient reaches {name_some(unused, 3)}: over ranks every parameter takes part in "
                    "every edit; freeze them (requires_grad_(False)) or remove them"
                )


class _Editing(nn.Module):
    """A step's passes of the generator as one, as DistributedDataParallel wants it."""

    def __init__(self, generator: Generator, *, again: bool) -> None:
        super().__init__()
        self.generator, self.again = generator, again

    def forward(self, frames: Tensor, drive: Tensor, back: Tensor) -> tuple[Edit, Tensor | None]:
        """The edit, and the frames edited back where that is wanted."""
        edit = self.generator.edit(frames, drive)
        _check(edit, frames)
        return edit, self.generator(edit.frames, back) if self.again else None


class _Judging(nn.Module):
    """The critic's passes of a step as one."""

    def __init__(self, critic: PatchDiscriminator) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        return self.critic(real), self.critic(fake)


def _over_ranks(module: nn.Module) -> nn.Module:
    return DistributedDataParallel(module, gradient_as_bucket_view=True) if ranks() > 1 else module


def _averaging(module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """A step's last part averages the gradients over ranks; those before only add them up."""
    return nullcontext() if last or not isinstance(module, DistributedDataParallel) else module.no_sync()


class _Terms:
    """The terms of the generator's loss on a part of a batch: what it adds to their means over the whole batch."""

    def __init__(
        self, players: _Players, criterion: nn.Module, clip: Clip, dataset: FrameDataset, config: TrainConfig
    ) -> None:
        self.players, self.criterion, self.clip, self.config = players, criterion, clip, config
        self.reader = _reader_for(dataset, config, clip.device)
        live = requested_backend(None) == "reference"
        # A random view of the source has different features, so stored ones do not apply.
        self.features = None if live or config.jitter else frame_features(clip, dataset, config)
        self.kept = KeptViews(config.out / FOLDER) if config.jitter and config.views and not live else None
        self.weights = {name: getattr(config, f"w_{name}") for name in _TERMS}

    def __call__(self, batch: Batch, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(edited frames, terms); unweighted, except for the generator's own penalties."""
        self.players.critic.requires_grad_(False)
        with self.players.autocast:
            edit, again = self.players.editing(batch.frames, batch.drive, batch.back)
            realism = self.players.critic(edit.frames)
            views = self._views(batch, edit.frames, seed)
            known, read = self._seen_in(views[0], batch)
            pcmecl = self.criterion(*views, batch.row, batch.source, batch.target, source_features=known)
        same = (batch.source == batch.target)[:, None, None, None]
        terms = {
            "pcmecl": pcmecl,
            "adversarial": -realism.float().mean(),
            "reconstruction": _mean_where((edit.frames - batch.frames).abs(), same),
            **edit.penalties,
            **self._fidelity(batch.frames, edit.frames, views, read),
        }
        if edit.shown is not None:
            terms["recognition"] = F.cross_entropy(edit.shown.float(), batch.source)
        if again is not None:
            terms["cycle"] = F.l1_loss(again, batch.frames)
        about = {"pcmecl": batch.of_changed, "reconstruction": batch.of_kept}
        return edit.frames, {name: term * about.get(name, batch.of_all) for name, term in terms.items()}

    def weighted(self, terms: dict[str, Tensor]) -> Tensor:
        """The loss. The generator's penalties are already weighted."""
        start = torch.zeros((), device=terms["pcmecl"].device)
        return sum((self.weights.get(name, 1.0) * term for name, term in terms.items()), start)

    def _views(self, batch: Batch, edited: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """What CLIP and the reader are shown of the sources and of the edits."""
        config = self.config
        kept = config.views > 0
        return seen_alike(
            batch.frames, edited, batch.view, jitter=config.jitter, seed=config.seed if kept else seed, kept=kept
        )

    def _seen_in(self, source: Tensor, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """What is known already of the sources' views: CLIP's features, and what the reader reads."""
        if self.features is not None:
            return self.features[batch.index], None
        if self.kept is None:
            return None, None
        rows = self.kept(batch.view, lambda new: self._look(source[new.to(source.device)]))
        width = self.clip.embed_dim
        return rows[:, :width], None if self.reader is None else rows[:, width:].float()

    @torch.no_grad()
    def _look(self, source: Tensor) -> Tensor:  # (b, W)
        with attention_of_training():
            features = self.clip.encode_image(source)
        if self.reader is None:
            return features
        with torch.autocast(source.device.type, enabled=False):
            return torch.cat([features, reading(self.reader, source.float())], 1)

    def _fidelity(
        self, source: Tensor, edited: Tensor, views: tuple[Tensor, Tensor], read: Tensor | None
    ) -> dict[str, Tensor]:
        """Speech and person, read from the faces if the reader can, else compared by pixels."""
        if self.reader is None:
            identity = identity_loss(source, edited.float())
            return {"identity": identity, "mouth": mouth_loss(source, edited.float(), self.config.mouth_box)}
        speech, person = reading_losses(self.reader, *(view.float() for view in views), read=read)
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
        return _laid_out(load_reader(device)) if config.w_speech or config.w_person else None
    log.info("stage 2: the reader knows drawn faces only; here pixel terms alone keep speech and identity")
    return None


def _laid_out(network: Network) -> Network:
    """Channels last on a CPU, where convolutions would else copy every tensor."""
    on_cpu = all(x.device.type == "cpu" for x in network.parameters())
    return network.to(memory_format=torch.channels_last) if on_cpu else network


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
