"""PCMECL as a single loss that plugs into any model that edits the expression of a talking face."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcmecl_fast import ops
from pcmecl_fast.clip import Clip
from pcmecl_fast.ops import checks
from pcmecl_fast.prompts.bank import PromptBank

log = logging.getLogger("pcmecl_fast")

MIN_CHANGE = 0.1
"""Of unit features; see `PCMECLCriterion`."""

TOLERANCE = 0.05
"""How far outside [-1, 1] resizing and rounding take frames."""


class PCMECLCriterion(nn.Module):
    """direction_loss on frames: an edit must change CLIP's image features the way the individual's prompts change.

        loss = direction_loss(CLIP(source), CLIP(edited), bank, individual, a, b, min_change)    (ops.direction_loss)
             + strength · mean relu(1 − ⟨unit(CLIP(edited)) − unit(CLIP(source)), unit(d)⟩ / length)
        d      = bank[individual, b] − bank[individual, a]
        length = lengths[individual, a, b], or lengths[a, b] for everyone

    A direction says nothing about how far to go, so any term that preserves the frames shortens the edits at no cost.
    The second term, off by default, asks for edits to go as far along the text's direction as real changes do: the
    individual's own (`personal_lengths`) or the population's (`real_lengths`).

    Nor does a direction say how small a change is: its gradient grows as 1 / |change|, to 1e4 for a generator that
    begins 1e-4 from the identity, where a tower in bfloat16 gives little but rounding (docs/guide.md has the figures).
    So changes are divided by `min_change` at least, and a generator that begins as the identity is told where to go.
    `explain` shows how strong the gradient is beside other losses'.

    Frames are RGB in [-1, 1]; others are pointed out once in the log. On a GPU only the first call looks, since looking
    waits for the device.

    The bank is a buffer (one on disk stays there: each call reads the rows it needs), the clip is frozen and nothing
    here is trained. Gradients reach only the edited frames: source features are computed without a graph.

    Args:
        clip: the model the bank was built with.
        bank: text features of every individual and emotion.
        contrast: weight of the contrast with the other target emotions, at least 0.
        scale: logit scale of that contrast; None means CLIP's own.
        min_change: the length of a change of unit features, at least 0, up to which its cosine grows with it; 0 takes
            changes of any size for directions.
        strength: weight of the penalty on edits that fall short of `lengths`, at least 0.
        lengths: how far changes from emotion a to b go, (E, E) or, per row of the bank, (N, E, E); required if
            `strength` is not 0.
        tolerance: how far outside [-1, 1] frames may be before that is pointed out.
        backend: which implementation runs; None leaves the choice to `use_backend`.

    Raises:
        ValueError: the bank belongs to another text tower; `lengths` is missing, misshapen or not positive.

    Source: the paper's abstract (personalized prompts, feature differencing); contrast and strength are ours.
    """

    features: Tensor  # (N, E, D); no rows if the bank is on disk
    lengths: Tensor | None  # (N, E, E)

    def __init__(
        self,
        clip: Clip,
        bank: PromptBank,
        *,
        contrast: float = 0.0,
        scale: float | None = None,
        min_change: float = MIN_CHANGE,
        strength: float = 0.0,
        lengths: Tensor | None = None,
        tolerance: float = TOLERANCE,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if bank.tower is not None and bank.tower.text_hash != clip.text_hash():
            raise ValueError(f"bank: made with {bank.tower.name!r} ({bank.tower.pretrained}), not with this clip")
        for name, number in (("contrast", contrast), ("strength", strength), ("min_change", min_change)):
            checks.check_at_least_0(name, number)
        # Out of sight of `state_dict`, and of a model that the criterion is a part of: what is frozen is not saved.
        self._clip = (clip,)
        rows, emotions = bank.features.shape[:2]
        if strength and lengths is None:
            raise ValueError("lengths: required when strength is not 0; `personal_lengths` measures them on a data set")
        if lengths is not None:
            shapes = (emotions, emotions), (rows, emotions, emotions)
            if tuple(lengths.shape) not in shapes or not bool((lengths > 0).all()):
                raise ValueError(
                    f"lengths: takes {shapes[0]} or {shapes[1]} positive numbers, got {tuple(lengths.shape)}"
                )
        self.contrast = contrast
        self.min_change = min_change
        self.strength = strength
        self.scale = clip.logit_scale if scale is None else scale
        self.tolerance = tolerance
        self.backend = backend
        self._on_disk = bank if bank.on_disk else None
        features = bank.features.new_empty(0, *bank.features.shape[1:]).float() if bank.on_disk else bank.features
        self.register_buffer("features", features.detach().to(clip.device), persistent=False)
        if lengths is not None:
            lengths = lengths.detach().to(self.features).expand(rows, -1, -1)
        self.register_buffer("lengths", lengths, persistent=False)
        self._noted: set[str] = set()

    @property
    def clip(self) -> Clip:
        return self._clip[0]

    def extra_repr(self) -> str:
        rows, emotions, width = (self._on_disk or self).features.shape
        return (
            f"{self.clip.name} ({self.clip.pretrained}), a bank of {rows} × {emotions} × {width}, "
            f"contrast={self.contrast}, scale={self.scale:g}, min_change={self.min_change}, strength={self.strength}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PCMECLCriterion:
        self.clip._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(
        self,
        source_frames: Tensor,  # (B, 3, H, W) or (B, T, 3, H, W), RGB in [-1, 1], any H and W
        edited_frames: Tensor,  # as many frames, or T for each of the source's
        individual: Tensor,  # (B,) or (B, T) int, rows of the bank
        source_emotion: Tensor,  # (B,) or (B, T) int
        target_emotion: Tensor,  # (B,) or (B, T) int
        *,
        source_features: Tensor | None = None,  # (B, D) or (B, T, D): CLIP(source_frames), if already known
    ) -> Tensor:  # ()
        """The mean loss over samples (and frames of a clip) whose target differs from their source emotion.

        One source frame for T edits, (B, 3, H, W) with (B, T, 3, H, W), is encoded once. Indices are per clip or per
        frame, on any device; frames (B·T, 3, H, W) take B indices for B clips of T consecutive frames, too.

        Raises:
            TypeError: frames of integers.
            ValueError: frames of the wrong rank or of different shapes, or features or indices that do not match them.
        """
        samples = self._samples(
            source_frames, edited_frames, individual, source_emotion, target_emotion, source_features
        )
        if samples is None:
            return edited_frames.to(self.features.dtype).sum()  # 0, with a graph
        return self._loss(samples)

    def explain(
        self,
        source_frames: Tensor,  # as for forward
        edited_frames: Tensor,
        individual: Tensor,
        source_emotion: Tensor,
        target_emotion: Tensor,
        *,
        beside: Mapping[str, Tensor] | None = None,
    ) -> Explanation:
        """What the loss is made of on a batch, and how hard it pulls at the edited frames: for choosing its weight.

        Args:
            beside: other losses, each () and computed from the very tensor `edited_frames`; their graphs are kept.

        Raises:
            ValueError: no frames, or a loss in `beside` that does not depend on `edited_frames`.
        """
        if not edited_frames.requires_grad:
            edited_frames = edited_frames.detach().requires_grad_()
        with torch.enable_grad():
            samples = self._samples(source_frames, edited_frames, individual, source_emotion, target_emotion, None)
            if samples is None:
                raise ValueError(f"edited_frames: got {tuple(edited_frames.shape)}; there is nothing to explain")
            loss = self._loss(samples)
        (gradient,) = torch.autograd.grad(loss, edited_frames)
        norms = {}
        for name, other in (beside or {}).items():
            (of_other,) = torch.autograd.grad(other, edited_frames, retain_graph=True, allow_unused=True)
            if of_other is None:
                raise ValueError(f"beside: {name!r} does not depend on edited_frames")
            norms[name] = float(of_other.norm())
        with torch.no_grad():
            asks = samples.source_emotion != samples.target_emotion
            source, edited = (F.normalize(x[asks], dim=-1) for x in (samples.source, samples.edited))
            lengths = (edited - source).norm(dim=-1)
        return Explanation(loss.item(), float(gradient.norm()), norms, lengths.tolist(), self.min_change)

    def _samples(
        self,
        source_frames: Tensor,
        edited_frames: Tensor,
        individual: Tensor,
        source_emotion: Tensor,
        target_emotion: Tensor,
        source_features: Tensor | None,
    ) -> _Samples | None:
        """Features and indices of each edited frame, None where there are no frames."""
        self._check_frames(source_frames, edited_frames)
        count = edited_frames.shape[:-3]
        indices = [
            _per_frame(name, index, count, self.features.device)
            for name, index in (
                ("individual", individual),
                ("source_emotion", source_emotion),
                ("target_emotion", target_emotion),
            )
        ]
        known = source_frames.shape[:-3]
        if source_features is not None:
            known, width = source_features.shape[:-1], self.features.shape[-1]
            if known not in (count, source_frames.shape[:-3]) or source_features.shape[-1] != width:
                raise ValueError(f"source_features: takes {(*count, width)}, got {tuple(source_features.shape)}")
            source_features = source_features.detach().flatten(0, -2)
        if not count.numel():
            return None
        self._look_at("edited_frames", edited_frames)
        if source_features is None:
            self._look_at("source_frames", source_frames)
            with torch.no_grad(), _attention_of_training():
                source_features = self.clip.encode_image(source_frames.flatten(0, -4), backend=self.backend)
        if known != count:
            source_features = source_features.repeat_interleave(count[1], dim=0)
        edited_features = self.clip.encode_image(edited_frames.flatten(0, -4), backend=self.backend)
        kind = self.features.dtype
        return _Samples(source_features.to(kind), edited_features.to(kind), *indices)

    def _loss(self, samples: _Samples) -> Tensor:  # ()
        source, edited, individual, source_emotion, target_emotion = samples
        bank, row = self.features, individual
        if self._on_disk is not None:
            bank = self._on_disk.lookup(individual, bank.device).to(bank.dtype)
            individual = torch.arange(len(individual), device=bank.device)
        loss = ops.direction_loss(
            source,
            edited,
            bank,
            individual,
            source_emotion,
            target_emotion,
            scale=self.scale,
            contrast=self.contrast,
            min_change=self.min_change,
            backend=self.backend,
        )
        if self.strength and self.lengths is not None:
            lengths = self.lengths[row, source_emotion, target_emotion]
            direction = bank[individual, target_emotion] - bank[individual, source_emotion]
            shortfall = _shortfall(source, edited, direction, lengths)
            valid = (source_emotion != target_emotion).to(shortfall)
            loss = loss + self.strength * (shortfall * valid).sum() / valid.sum().clamp(min=1)
        return loss

    def _check_frames(self, source_frames: Tensor, edited_frames: Tensor) -> None:
        for name, frames in (("source_frames", source_frames), ("edited_frames", edited_frames)):
            if not isinstance(frames, Tensor):
                raise TypeError(f"{name}: got {type(frames).__name__}; takes a tensor, (B, 3, H, W) in [-1, 1]")
            if not frames.is_floating_point():
                raise TypeError(
                    f"{name}: got {frames.dtype}; takes floats in [-1, 1], such as frames.float() / 127.5 - 1"
                )
        if edited_frames.ndim not in (4, 5) or edited_frames.shape[-3] != 3:
            raise ValueError(f"edited_frames: takes (B, 3, H, W) or (B, T, 3, H, W), got {tuple(edited_frames.shape)}")
        count, sources = edited_frames.shape[:-3], source_frames.shape[:-3]
        if source_frames.ndim < 4 or source_frames.shape[-3] != 3 or sources not in (count, count[:1]):
            raise ValueError(
                f"source_frames: takes as many frames as edited_frames {tuple(edited_frames.shape)}, or one for each "
                f"clip of them, got {tuple(source_frames.shape)}"
            )

    @torch.no_grad()
    def _look_at(self, name: str, frames: Tensor) -> None:
        """Log what is wrong with the values of frames, once: on a CPU at any call, on a GPU at the first one."""
        if torch.compiler.is_compiling() or self._noted >= {"NaN", "range"} or not frames.numel():
            return
        if frames.device.type != "cpu":
            if name in self._noted or frames.is_meta or (frames.is_cuda and torch.cuda.is_current_stream_capturing()):
                return
            self._noted.add(name)
        least, most = frames.aminmax()
        kind, wrong = _wrong_values(float(least), float(most), self.tolerance)
        if kind and kind not in self._noted:
            self._noted.add(kind)
            log.warning("%s: %s", name, wrong)


class _Samples(NamedTuple):
    """What the loss is computed from, for each edited frame."""

    source: Tensor  # (B, D)
    edited: Tensor  # (B, D)
    individual: Tensor  # (B,)
    source_emotion: Tensor  # (B,)
    target_emotion: Tensor  # (B,)


@dataclass(frozen=True)
class Explanation:
    """What `PCMECLCriterion.explain` says of a batch; as a string, in words."""

    loss: float
    gradient: float
    """|∂loss/∂edited_frames|, the norm over the whole batch."""
    beside: dict[str, float]
    """The same of the other losses."""
    changes: list[float]
    """|δ| of each frame whose target differs from its source emotion: how far its unit features moved."""
    min_change: float

    def __str__(self) -> str:
        lines = [f"PCMECL {self.loss:.4g}, gradient in the edited frames {self.gradient:.3g}"]
        lines += [
            f"{name}: gradient {norm:.3g}"
            + (f", as strong at a weight of {norm / self.gradient:.3g}" if self.gradient else "")
            for name, norm in self.beside.items()
        ]
        if self.changes:
            short = sum(change < self.min_change for change in self.changes)
            lines.append(
                f"changes of features from {min(self.changes):.2g} to {max(self.changes):.2g}; {short} of "
                f"{len(self.changes)} below min_change {self.min_change:g}, where the cosine grows with them"
            )
        return "\n".join(lines)


def _per_frame(name: str, index: Tensor, frames: torch.Size, device: torch.device) -> Tensor:
    """An index for each of the frames, (B,) or (B, T), on the device: from one for each, or for each clip of them."""
    checks.check_integer(name, index)
    if index.shape == frames:
        return index.flatten().to(device)
    per_clip = index.shape == frames[:1]
    in_a_row = len(frames) == index.ndim == 1 and len(index) > 0 and frames[0] % len(index) == 0
    if not (per_clip or in_a_row):
        raise ValueError(f"{name}: takes one index per clip or frame of {tuple(frames)}, got {tuple(index.shape)}")
    return index.to(device).repeat_interleave(frames.numel() // max(len(index), 1))


def _shortfall(
    source: Tensor,  # (B, D)
    edited: Tensor,  # (B, D)
    direction: Tensor,  # (B, D)
    lengths: Tensor,  # (B,)
) -> Tensor:  # (B,)
    """The fraction of each length by which a change falls short along its direction; 0 beyond it."""
    change = F.normalize(edited, dim=-1) - F.normalize(source, dim=-1)
    return F.relu(1 - (change * F.normalize(direction, dim=-1)).sum(-1) / lengths)


def _wrong_values(least: float, most: float, tolerance: float) -> tuple[str, str]:
    """What kind of mistake these extremes of frames speak of, and what to do; "" where there is none."""
    if math.isnan(least) or math.isnan(most):
        return "NaN", "there are NaN among the frames, and so the loss and its gradients are NaN"
    found = f"values from {least:.3g} to {most:.3g}; takes RGB in [-1, 1]"
    if most > 8:
        return "range", f"{found}: of 8-bit values make frames / 127.5 - 1"
    if least < -1 - tolerance or most > 1 + tolerance:
        return "range", f"{found}: CLIP's mean and deviation belong to the criterion, an unbounded output wants a clamp"
    if least >= 0 and most > 0.5:
        return "range", f"{found}: if these are in [0, 1], make frames * 2 - 1"
    return "", ""


@contextmanager
def _attention_of_training() -> Iterator[None]:
    """Disables PyTorch's fused inference attention, whose rounding differs from that of the differentiable one.

    Otherwise an edit that changes nothing would change features by 1e-7, in a direction made of noise, and get the
    huge gradient that goes with so small a change.
    """
    if torch.compiler.is_compiling():  # the switch cannot be traced
        yield
        return
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
