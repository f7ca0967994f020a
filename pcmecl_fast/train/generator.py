"""Stage 2: training a generator on unpaired frames, supervised by PCMECL.

    loss = w_pcmecl · PCMECL + w_adversarial · (looks real) + w_emotion · (looks like a real frame of the target)
         + w_emotion_mouth · (its mouth does) + w_cycle · (edits back)
         + w_reconstruction · (unchanged for its own emotion)
         + w_recognition · (names the emotion shown) + w_person · (same person) + w_speech · (same speech)
         + Σ (the generator's own penalties)

The critics' three terms, and the losses that they learn from, are those of `models/discriminator.py`. A term whose
weight is 0 is not computed, and a critic whose term has none is not made. What is evaluated and saved is a running
average of the generator's weights.

Person and speech are read from drawn faces by the shipped `FaceReader`. It cannot read real faces: there the pixel
terms w_identity and w_mouth replace the two. With --keep-from these terms begin late, and are not computed before: kept
from the first step on, a mouth learns to stay before it learns to smile. What speech has to say of an edit reaches
mouth and chin alone: the rest of a face can be drawn so that any mouth is taken for a still one, and was, in faint
lines across the cheeks. What CLIP and the reader have to say is blurred by a pixel (`gradients_blurred`): twice as many
steps make edits better with it, and draw lines all over them without. Every eighth target is the source's own emotion:
there PCMECL contributes nothing and the frame must not change.

Over ranks, and over the parts of --accumulate, each term is the mean over the whole batch: a part's mean counts as much
as the part has samples that the term is about, so that one whose targets all equal their sources dilutes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcmecl_fast.clip import Clip
from pcmecl_fast.criterion import TOLERANCE, PCMECLCriterion, attention_of_training
from pcmecl_fast.criterion_parts import LENGTHS, save_lengths
from pcmecl_fast.data.base import FrameDataset
from pcmecl_fast.data.loading import read_ahead
from pcmecl_fast.distributed import is_main, rank, ranks
from pcmecl_fast.lengths import personal_lengths, real_lengths
from pcmecl_fast.models import Generator, make_generator
from pcmecl_fast.models.discriminator import MOUTH_WIDTH, columns_around
from pcmecl_fast.ops.operator import requested_backend
from pcmecl_fast.options import plain_options
from pcmecl_fast.prompts import PromptBank
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.synthetic.reader import FaceReader, load_reader, reading_losses
from pcmecl_fast.train.batches import Batch, Plan, Plans
from pcmecl_fast.train.config import TrainConfig
from pcmecl_fast.train.loop import Loop
from pcmecl_fast.train.players import TERMS, Players, laid_out
from pcmecl_fast.train.prompts import contents_of, frame_features
from pcmecl_fast.train.views import FOLDER, KeptViews, gradients_blurred, half_mirrored, seen_alike

log = logging.getLogger("pcmecl_fast")

_KEEPING = ("person", "speech", "identity", "mouth")
_GROWING = 0.25  # part of the steps
_EARLY, _FADING = 0.5, 0.15  # parts of the steps


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
    """Train the configured generator on `dataset`: the running average of its weights, and the curves.

    Args:
        criterion: replaces PCMECL's, with the same arguments.
        preview: draws an occasional picture for TensorBoard.
        prompts_hash: of the files that the bank was loaded from; a checkpoint with another one is refused.
    """
    check_batch(config)
    torch.manual_seed(config.seed)
    step_on = Step(clip, bank, dataset, config, criterion=criterion)
    average, kept = step_on.players.average.generator, step_on.terms_of.kept
    loop = Loop(
        config.out,
        "stage 2",
        step_on.players.states(),
        steps=config.steps,
        seed=config.seed,
        every=config.checkpoint_every,
        resume=config.resume,
        signature=_signature(clip, dataset, average, config) | {"the contents of --prompts": prompts_hash},
    )
    if kept is not None:
        kept.load(loop.done, clip.device)
        loop.before_saving = kept.save
    plans = (
        step_on.draw(_frames_at(step, config), loop.generator(step)).own() for step in range(loop.done, config.steps)
    )
    for step, (plan, frames) in zip(loop, read_ahead(dataset, plans, Plan.wanted, workers=config.readers), strict=True):
        # Layers with random draws of their own, such as dropout, must draw the same after resuming.
        torch.manual_seed(loop.generator(step).initial_seed() + (rank() << 40))
        step_on.players.set_rates(_schedule(step, config.steps))
        step_on.terms_of.counting = _counting(step, config)
        loop.record(step, **step_on(Batch.of(plan, frames), loop.generator(~step).initial_seed()))
        if preview is not None and is_main() and (step + 1) % max(50, config.steps // 6) == 0:
            loop.picture(step, "edits", preview(average))
    if kept is not None:
        kept.remove()
    return average.eval().requires_grad_(False), loop


class Step:
    """A step of stage 2 on a batch that is read: the generator improves, then its critic.

    Args:
        clip, bank, dataset, config, criterion: as for `train_generator`.

    Attributes:
        draw: draws what a step trains on (`Plans`).
        players: the generator and its critic, with their optimisers.
    """

    def __init__(
        self,
        clip: Clip,
        bank: PromptBank,
        dataset: FrameDataset,
        config: TrainConfig,
        *,
        criterion: nn.Module | None = None,
    ) -> None:
        self.device, self.accumulate = clip.device, config.accumulate
        generator = make_generator(config.generator, dataset.emotions, config.side, config.generator_options)
        self.players = Players(generator.to(clip.device), config, clip.device)
        self.draw = Plans(dataset, bank, with_reference=generator.driven_by == "reference", views=config.views)
        criterion = criterion or criterion_for(clip, bank, dataset, config)
        self.terms_of = _Terms(self.players, criterion, clip, dataset, config)

    def __call__(
        self,
        batch: Batch,  # this rank's, on the host
        seed: int,  # of the views, where each is new
    ) -> dict[str, Tensor]:
        """The loss, its terms and, with a critic, the critic's loss, (), over all ranks."""
        # Divided before it is moved: counting on the host waits for no device.
        parts = [part.to(self.device) for part in batch.parts(self.accumulate)]
        terms = self.players.improve(lambda part: self.terms_of(part, seed), parts)
        return {"loss": self.terms_of.weighted(terms), **terms}


def _signature(clip: Clip, dataset: FrameDataset, generator: Generator, config: TrainConfig) -> dict[str, object]:
    """What must be the same for a run to be resumed; `prompts_hash` stands for the prompts, wherever they are."""
    kept = {k: v for k, v in config.what_counts().items() if k not in ("prompts", "prompt_steps")}
    return {**kept, "generator_options": plain_options(generator.config), **contents_of(clip, dataset)}


def check_batch(config: TrainConfig) -> None:
    """Refuse a batch that cannot be divided among ranks and the parts of --accumulate."""
    parts = ranks() * config.accumulate
    for name in ("batch", "batch_early"):
        frames = getattr(config, name)
        if frames % parts:
            among = [f"{ranks()} ranks"] * (ranks() > 1) + [f"{config.accumulate} parts"] * (config.accumulate > 1)
            raise ValueError(
                f"{name}: {frames} frames cannot be divided among {' of '.join(among)}; takes a multiple of {parts}"
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


def _frames_at(step: int, config: TrainConfig) -> int:
    """How many frames a step takes: while the learning rate is full, noise in the gradients does little harm."""
    return config.batch_early if config.batch_early and 2 * step < config.steps else config.batch


def _counting(step: int, config: TrainConfig) -> dict[str, float]:
    """How much of its weight a term has in a step: of those that keep person and speech, and of the critic of mouths'.

    Terms that are not in it have their own weight in every step.
    """
    done, parts = (step + 1) / config.steps, dict[str, float]()
    if config.keep_from:
        parts |= dict.fromkeys(_KEEPING, min(1.0, max(0.0, (done - config.keep_from) / _GROWING)))
    if config.emotion_mouth_early != 1:
        early = min(1.0, max(0.0, 1 - (done - _EARLY) / _FADING))
        parts["emotion_mouth"] = 1 + (config.emotion_mouth_early - 1) * early
    return parts


class _Terms:
    """The terms of the generator's loss on a part of a batch: what it adds to their means over the whole batch."""

    def __init__(
        self, players: Players, criterion: nn.Module, clip: Clip, dataset: FrameDataset, config: TrainConfig
    ) -> None:
        self.players, self.criterion, self.clip, self.config = players, criterion, clip, config
        self.reader = _reader_for(dataset, config, clip.device)
        live = requested_backend(None) == "reference"
        # A random view of the source has different features, so stored ones do not apply.
        self.features = None if live or config.jitter else frame_features(clip, dataset, config)
        self.kept = KeptViews(config.out / FOLDER) if config.jitter and config.views and not live else None
        self._full = {name: getattr(config, f"w_{name}") for name in TERMS}
        self.counting: dict[str, float] = {}

    @property
    def weights(self) -> dict[str, float]:
        """Those of a step: `counting` says how much of a full weight is left."""
        return {name: full * self.counting.get(name, 1.0) for name, full in self._full.items()}

    def __call__(self, batch: Batch, seed: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """(edited frames, terms, loss); terms are unweighted, except for the generator's own penalties."""
        weights = self.weights
        with self.players.autocast:
            edit, again = self.players.editing(batch.frames, batch.drive, batch.back)
            terms: dict[str, Tensor] = {}
            seen = gradients_blurred(edit.frames)
            if weights["pcmecl"]:
                views = self._views(batch, seen, seed)
                known = self._known(views[0], batch)
                terms["pcmecl"] = self.criterion(*views, batch.row, batch.source, batch.target, source_features=known)
            terms |= self.players.of_critic(edit.frames, batch.target)
            terms |= {name: penalty.reshape(()) for name, penalty in edit.penalties.items()}
        if self.reader is None:
            terms |= self._pixels(batch.frames, edit.frames.float())
        elif weights["speech"] or weights["person"]:
            # Not in CLIP's views: in their noise it reads mouths less exactly, and edits follow its errors.
            edited = seen.float()
            read = half_mirrored(batch.view, batch.frames, edited, learning_below(edited, self.config.mouth_box))
            terms["speech"], terms["person"] = reading_losses(self.reader, *read)
        if weights["reconstruction"]:
            same = (batch.source == batch.target)[:, None, None, None]
            terms["reconstruction"] = _mean_where((edit.frames - batch.frames).abs(), same)
        if edit.shown is not None:  # without a weight, too: over ranks every parameter takes part
            terms["recognition"] = F.cross_entropy(edit.shown.float(), batch.source)
        if again is not None:
            terms["cycle"] = F.l1_loss(again, batch.frames)
        about = {"pcmecl": batch.of_changed, "reconstruction": batch.of_kept}
        terms = {name: term * about.get(name, batch.of_all) for name, term in terms.items()}
        return edit.frames, terms, self.weighted(terms)

    def weighted(self, terms: dict[str, Tensor]) -> Tensor:
        """The loss. The generator's penalties are already weighted; the critic's own loss is not part of it."""
        start = torch.zeros((), device=self.clip.device)
        weights = self.weights
        weighted = (weights.get(name, 1.0) * term for name, term in terms.items() if name != "critic")
        return sum(weighted, start)

    def _views(self, batch: Batch, edited: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """What CLIP is shown of the sources and of the edits."""
        config = self.config
        kept = config.views > 0
        return seen_alike(
            batch.frames, edited, batch.view, jitter=config.jitter, seed=config.seed if kept else seed, kept=kept
        )

    def _known(self, source: Tensor, batch: Batch) -> Tensor | None:
        """CLIP's features of the sources' views, where they are known already."""
        if self.features is not None:
            return self.features[batch.index]
        if self.kept is None:
            return None
        return self.kept(batch.view, lambda new: self._look(source[new.to(source.device)]))

    @torch.no_grad()
    def _look(self, source: Tensor) -> Tensor:  # (b, D)
        with attention_of_training():
            return self.clip.encode_image(source)

    def _pixels(self, source: Tensor, edited: Tensor) -> dict[str, Tensor]:
        """What keeps person and speech where no reader can tell."""
        losses, weights = {}, self.weights
        if weights["identity"]:
            losses["identity"] = identity_loss(source, edited)
        if weights["mouth"]:
            losses["mouth"] = mouth_loss(source, edited, self.config.mouth_box)
        return losses


def _reader_for(dataset: FrameDataset, config: TrainConfig, device: torch.device) -> FaceReader | None:
    if isinstance(dataset, SyntheticFaces):
        return laid_out(load_reader(device)) if config.w_speech or config.w_person else None
    log.info("stage 2: the reader knows drawn faces only; here pixel terms alone keep speech and identity")
    return None


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    weight = where.to(values.dtype).expand_as(values)
    return (values * weight).sum() / weight.sum().clamp(min=1)


def learning_below(
    frames: Tensor,  # (B, 3, H, W)
    box: list[float],  # left, top, right, bottom of the middle of the mouth, as fractions of the frame
) -> Tensor:
    """The frames, whose gradients are those of the mouth and the chin.

    Their top is that of the box; they are `MOUTH_WIDTH` times as wide and end where the frame does. On cheeks, which
    say nothing, gradients of what reads mouths draw lines.
    """
    height, width = frames.shape[-2:]
    below = torch.zeros(height, width, dtype=torch.bool, device=frames.device)
    below[round(box[1] * height) :, columns_around(box, MOUTH_WIDTH, width)] = True
    return torch.where(below, frames, frames.detach())


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
