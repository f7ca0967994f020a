"""Stage 2: training a generator on unpaired frames, supervised by PCMECL.

    loss = w_pcmecl · PCMECL + w_adversarial · (looks real) + w_cycle · (edits back)
         + w_reconstruction · (nothing asked, nothing changed) + w_recognition · (names the emotion shown)
         + w_person · (same person) + w_speech · (same speech)
         + w_smooth · (simple fields) + w_folding · (skin that stretches) + w_shading · (little paint)

Person and speech are read from drawn faces by the shipped `FaceReader`. Of real faces it knows nothing: there pixel
terms, w_identity and w_mouth, stand for the two. Every eighth target is the source's own emotion: there PCMECL is
silent and the frame must stay as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcmecl_fast.clip import Clip
from pcmecl_fast.criterion import PCMECLCriterion, personal_lengths, real_lengths
from pcmecl_fast.data.base import FrameDataset
from pcmecl_fast.models import ExpressionGenerator, PatchDiscriminator
from pcmecl_fast.ops.backend import choose
from pcmecl_fast.prompts import PromptBank
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.synthetic.reader import FaceReader, load_reader, reading_losses
from pcmecl_fast.train.config import TrainConfig
from pcmecl_fast.train.loop import Loop
from pcmecl_fast.train.prompts import frame_features

log = logging.getLogger("pcmecl_fast")

_FREE_ON_RESUME = {"out", "prompts", "prompt_steps", "resume", "checkpoint_every", "device", "backend", "features"}
_TERMS = (
    "pcmecl",
    "adversarial",
    "cycle",
    "reconstruction",
    "identity",
    "mouth",
    "smooth",
    "folding",
    "shading",
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
    preview: Callable[[ExpressionGenerator], Tensor] | None = None,
) -> tuple[ExpressionGenerator, Loop]:
    """Train the built-in generator on `dataset`; `preview` draws a picture for TensorBoard now and then.

    `criterion` takes the place of PCMECL's, with the same arguments.
    """
    device = clip.device
    torch.manual_seed(config.seed)
    generator = ExpressionGenerator(len(dataset.emotions), config.generator).to(device)
    critic = PatchDiscriminator().to(device)
    by_frame = config.generator.driven_by == "reference"
    draw = _Batches(dataset, bank, with_reference=by_frame)
    criterion = criterion or criterion_for(clip, bank, dataset, config)
    reader = _reader_for(dataset, config, device)
    optimizer = torch.optim.Adam(generator.parameters(), lr=config.lr, betas=(0.5, 0.99))
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=config.critic_lr, betas=(0.5, 0.99))
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    loop = Loop(
        config.out,
        "stage 2",
        {
            "generator": generator,
            "critic": critic,
            "optimizer": optimizer,
            "critic_optimizer": critic_optimizer,
            "scaler": scaler,
        },
        steps=config.steps,
        seed=config.seed,
        every=config.checkpoint_every,
        resume=config.resume,
        signature={
            "clip": clip.text_hash(),
            # Where a run is kept, and on what it runs, may change between a kill and the resumption.
            **{k: v for k, v in vars(config).items() if k not in _FREE_ON_RESUME},
        },
    )
    # A random view of the source has features of its own.
    known = None if config.jitter or choose(None) == "reference" else frame_features(clip, dataset, config)
    weights = {name: getattr(config, f"w_{name}") for name in _TERMS}
    autocast = torch.autocast(
        device.type, dtype=torch.float16 if config.amp == "fp16" else torch.bfloat16, enabled=config.amp != "none"
    )
    for step in loop:
        batch = draw(config.batch, loop.generator(step))
        frames, reference = batch.frames.to(device), batch.reference.to(device)
        row, source, target = batch.row.to(device), batch.source.to(device), batch.target.to(device)
        to, back = (reference, frames) if by_frame else (target, source)
        for group, rate in ((optimizer, config.lr), (critic_optimizer, config.critic_lr)):
            group.param_groups[0]["lr"] = rate * _schedule(step, config.steps)

        critic.requires_grad_(False)
        with autocast:
            edited, flow, shade, shown = generator.edit(frames, to)
            again = generator(edited, back) if config.w_cycle else None
            realism = critic(edited)
            views = _seen_alike(frames, edited, config.jitter, loop.generator(~step))
            source_features = None if known is None else known[batch.index]
            pcmecl = criterion(*views, row, source, target, source_features=source_features)
        same = (source == target)[:, None, None, None]
        terms = {
            "pcmecl": pcmecl,
            "adversarial": -realism.float().mean(),
            "reconstruction": _mean_where((edited - frames).abs(), same),
            "smooth": total_variation(flow.float()) + total_variation(shade.float()),
            "folding": folding(flow.float()),
            "shading": shade.float().abs().mean(),
        }
        if reader is not None:
            terms["speech"], terms["person"] = reading_losses(reader, *(view.float() for view in views))
        else:
            terms["identity"] = identity_loss(frames, edited.float())
            terms["mouth"] = mouth_loss(frames, edited.float(), config.mouth_box)
        if shown is not None:
            terms["recognition"] = F.cross_entropy(shown.float(), source)
        if again is not None:
            terms["cycle"] = F.l1_loss(again, frames)
        loss = sum((weights[name] * term for name, term in terms.items()), torch.zeros((), device=device))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
        scaler.step(optimizer)

        critic.requires_grad_(True)
        with autocast:
            real, fake = critic(frames), critic(edited.detach())
            critic_loss = F.relu(1 - real).float().mean() + F.relu(1 + fake).float().mean()
        critic_optimizer.zero_grad(set_to_none=True)
        scaler.scale(critic_loss).backward()
        scaler.step(critic_optimizer)
        scaler.update()

        loop.record(step, loss=loss, **terms, critic=critic_loss)
        if preview is not None and (step + 1) % max(50, config.steps // 6) == 0:
            loop.picture(step, "edits", preview(generator))
    return generator.eval().requires_grad_(False), loop


def criterion_for(clip: Clip, bank: PromptBank, dataset: FrameDataset, config: TrainConfig) -> PCMECLCriterion:
    """PCMECL's loss as the configuration wants it; the lengths of changes are those of the data set."""
    lengths = None
    if config.strength:
        measure = personal_lengths if config.lengths == "individual" and bank.condition != "frame" else real_lengths
        try:
            lengths = measure(frame_features(clip, dataset, config), dataset, bank)
        except ValueError as error:
            log.warning("stage 2: edits may be of any length (%s)", error)
    strength = 0.0 if lengths is None else config.strength
    return PCMECLCriterion(clip, bank, contrast=config.contrast, strength=strength, lengths=lengths)


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
    """Both under the same random mirroring, shift, zoom and noise: CLIP must see the change wherever it looks."""
    if not jitter:
        return source, edited
    count = len(source)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + jitter * (torch.rand(count, generator=random) * 2 - 1)
    # Mirrored every other time, so that half a face is never enough.
    theta[:, 0, 0] *= 1 - 2 * torch.randint(2, (count,), generator=random)
    theta[:, :, 2] = jitter * (torch.rand(count, 2, generator=random) * 2 - 1)
    noise = jitter * torch.randn(source.shape, generator=random).to(source)
    grid = F.affine_grid(theta.to(source), list(source.shape), align_corners=False)
    seen = [F.grid_sample(x, grid, padding_mode="border", align_corners=False) + noise for x in (source, edited)]
    return seen[0], seen[1]


def identity_loss(
    source: Tensor,  # (B, 3, H, W) in [-1, 1]
    edited: Tensor,  # (B, 3, H, W)
) -> Tensor:
    """L1 of the frames, which lets few pixels change, and twice that of their averages over 8×8 pixels.

    An expression moves lines; colours and shapes as they look from afar are who it is.
    """
    return F.l1_loss(edited, source) + 2 * F.l1_loss(F.avg_pool2d(edited, 8), F.avg_pool2d(source, 8))


def mouth_loss(
    source: Tensor,  # (B, 3, H, W) in [-1, 1]
    edited: Tensor,  # (B, 3, H, W)
    box: list[float],  # left, top, right, bottom as fractions of the frame
) -> Tensor:
    """L1 between the middles of the mouths, where speech opens and closes the lips and expressions hardly reach.

    The strip's columns are averaged first, so that it is the lips' heights that are compared.
    """
    height, width = source.shape[-2:]
    left, right = round(box[0] * width), round(box[2] * width)
    top, bottom = round(box[1] * height), round(box[3] * height)
    strip = (..., slice(top, bottom), slice(left, right))
    return F.l1_loss(edited[strip].mean(-1), source[strip].mean(-1))


def total_variation(
    field: Tensor,  # (B, C, H, W)
) -> Tensor:
    """Mean absolute difference of neighbours, in both directions: simple fields are cheap, busy ones are not."""
    return field.diff(dim=-1).abs().mean() + field.diff(dim=-2).abs().mean()


def folding(
    flow: Tensor,  # (B, 2, H, W) in units of half a side
    *,
    free: float = 0.4,
) -> Tensor:
    """Mean change of the flow from pixel to pixel beyond `free` pixels, in both directions: there skin would tear."""
    steps = ((flow.diff(dim=d) * flow.shape[d] / 2).abs() for d in (-1, -2))
    return torch.stack([F.relu(step - free).mean() for step in steps]).sum()


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    weight = where.to(values.dtype).expand_as(values)
    return (values * weight).sum() / weight.sum().clamp(min=1)


def _schedule(step: int, steps: int) -> float:
    """Full rate, then a linear descent over the last half."""
    return min(1.0, (step + 1) / 20) * min(1.0, 2 * (steps - step) / steps)


@dataclass(frozen=True)
class _Batch:
    index: Tensor  # (B,) frames of the data set
    frames: Tensor  # (B, 3, S, S)
    reference: Tensor  # (B, 3, S, S) frames that show the target; empty where nobody asked
    row: Tensor  # (B,) rows of the bank
    source: Tensor  # (B,) emotions shown
    target: Tensor  # (B,) emotions asked for


class _Batches:
    """Draws frames and target emotions; emotions are drawn evenly, so that rare ones are seen as often."""

    def __init__(self, dataset: FrameDataset, bank: PromptBank, *, with_reference: bool) -> None:
        self.dataset = dataset
        self.with_reference = with_reference
        counts = torch.bincount(dataset.emotion_index, minlength=len(dataset.emotions))
        self.shown = (counts > 0).nonzero()[:, 0]
        self.weight = 1.0 / counts[dataset.emotion_index]
        if bank.emotions != list(dataset.emotions):
            raise ValueError(f"bank: is for the emotions {bank.emotions}, the data set has {dataset.emotions}")
        if bank.condition == "frame":
            self.rows = bank.rows(dataset.keys)
        else:
            self.rows = bank.rows(dataset.individuals)[dataset.individual_index]

    def __call__(self, count: int, generator: torch.Generator) -> _Batch:
        index = torch.multinomial(self.weight, count, replacement=True, generator=generator)
        source = self.dataset.emotion_index[index]
        target = self.shown[torch.randint(len(self.shown), (count,), generator=generator)]
        keep = torch.arange(count) % 8 == 7
        target = torch.where(keep, source, target)
        reference = index[:0]
        if self.with_reference:
            reference = draw_references(self.dataset.emotion_index, target, generator)
        both = self.dataset.frames(torch.cat([index, reference]))
        return _Batch(index, both[:count], both[count:], self.rows[index], source, target)


def draw_references(
    emotion_index: Tensor,  # (L,) int
    target: Tensor,  # (B,) int
    generator: torch.Generator,
) -> Tensor:  # (B,) int
    """For each target a frame of somebody, not necessarily the same person, who shows it."""
    matches = (emotion_index[None] == target[:, None]).float()
    return torch.multinomial(matches, 1, generator=generator)[:, 0]
