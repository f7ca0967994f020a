"""PCMECL as a single loss that plugs into any model that edits the expression of a talking face."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcmecl_fast import ops
from pcmecl_fast.clip import Clip
from pcmecl_fast.prompts.bank import PromptBank

log = logging.getLogger("pcmecl_fast")

TOLERANCE = 0.05
"""How far outside [-1, 1] frames may be: resizing and rounding take them there."""


class PCMECLCriterion(nn.Module):
    """direction_loss on frames: an edit must change CLIP's image features the way the individual's prompts change.

        loss = direction_loss(CLIP(source), CLIP(edited), bank, individual, a, b)        (ops.direction_loss)
             + strength · mean relu(1 − ⟨unit(CLIP(edited)) − unit(CLIP(source)), unit(d)⟩ / length)
        d      = bank[individual, b] − bank[individual, a]
        length = lengths[individual, a, b], or lengths[a, b] for everyone

    A direction says nothing about how far to go, so any term that preserves the frames shortens the edits at no cost.
    The second term, off by default, asks for edits to go as far along the text's direction as real changes do: the
    individual's own (`personal_lengths`) or the population's (`real_lengths`).

    Frames are RGB in [-1, 1]; others are pointed out once in the log. On a GPU only the first call looks, since looking
    waits for the device.

    The bank is a buffer (one on disk stays there: each call reads the rows it needs), the clip is frozen and nothing
    here is trained. Gradients reach only the edited frames: source features are computed without a graph.

    Args:
        clip: the model the bank was built with.
        bank: text features of every individual and emotion.
        contrast: weight of the contrast with the other target emotions, at least 0.
        scale: logit scale of that contrast; None means CLIP's own.
        strength: weight of the penalty on edits that fall short of `lengths`, at least 0.
        lengths: how far changes from emotion a to b go, (E, E) or, per row of the bank, (N, E, E); required if
            `strength` is not 0.
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
        strength: float = 0.0,
        lengths: Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if bank.tower is not None and bank.tower.text_hash != clip.text_hash():
            raise ValueError(f"bank: made with {bank.tower.name!r} ({bank.tower.pretrained}), not with this clip")
        # Out of sight of `state_dict`, and of a model that the criterion is a part of: what is frozen is not saved.
        self._clip = (clip,)
        rows, emotions = bank.features.shape[:2]
        if strength and lengths is None:
            raise ValueError("lengths: required when strength is not 0; `real_lengths` measures them on a data set")
        if lengths is not None:
            shapes = (emotions, emotions), (rows, emotions, emotions)
            if tuple(lengths.shape) not in shapes or not bool((lengths > 0).all()):
                raise ValueError(
                    f"lengths: takes {shapes[0]} or {shapes[1]} positive numbers, got {tuple(lengths.shape)}"
                )
        self.contrast = contrast
        self.strength = strength
        self.scale = clip.logit_scale if scale is None else scale
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PCMECLCriterion:
        self.clip._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(
        self,
        source_frames: Tensor,  # (B, 3, H, W) or (B, T, 3, H, W), RGB in [-1, 1], any H and W
        edited_frames: Tensor,  # the same shape
        individual: Tensor,  # (B,) int, rows of the bank
        source_emotion: Tensor,  # (B,) int
        target_emotion: Tensor,  # (B,) int
        *,
        source_features: Tensor | None = None,  # (B, D) or (B, T, D): CLIP(source_frames), if already known
    ) -> Tensor:  # ()
        """The mean loss over samples (and frames of a clip) whose target differs from their source emotion.

        Raises:
            TypeError: frames of integers.
            ValueError: frames of the wrong rank or of different shapes, or features that do not match them.
        """
        for name, frames in (("source_frames", source_frames), ("edited_frames", edited_frames)):
            if not frames.is_floating_point():
                raise TypeError(
                    f"{name}: got {frames.dtype}; takes floats in [-1, 1], such as frames.float() / 127.5 - 1"
                )
        if edited_frames.ndim not in (4, 5) or edited_frames.shape[-3] != 3:
            raise ValueError(f"edited_frames: takes (B, 3, H, W) or (B, T, 3, H, W), got {tuple(edited_frames.shape)}")
        if source_frames.shape[:-2] != edited_frames.shape[:-2]:
            raise ValueError(
                f"source_frames: takes as many frames as edited_frames {tuple(edited_frames.shape)}, "
                f"got {tuple(source_frames.shape)}"
            )
        if source_features is not None:
            expected = (*edited_frames.shape[:-3], self.features.shape[-1])
            if source_features.shape != expected:
                raise ValueError(f"source_features: takes {expected}, got {tuple(source_features.shape)}")
            source_features = source_features.detach()
        if not edited_frames.shape[:-3].numel():
            return edited_frames.to(self.features.dtype).sum()  # 0, with a graph
        self._look_at("edited_frames", edited_frames)
        if source_features is None:
            self._look_at("source_frames", source_frames)
        if edited_frames.ndim == 5:
            clips, length = edited_frames.shape[:2]
            source_frames, edited_frames = source_frames.flatten(0, 1), edited_frames.flatten(0, 1)
            individual, source_emotion, target_emotion = (
                self._per_frame(name, index, clips, length)
                for name, index in (
                    ("individual", individual),
                    ("source_emotion", source_emotion),
                    ("target_emotion", target_emotion),
                )
            )
            if source_features is not None:
                source_features = source_features.flatten(0, 1)
        if source_features is None:
            with torch.no_grad(), _attention_of_training():
                source_features = self.clip.encode_image(source_frames, backend=self.backend)
        edited_features = self.clip.encode_image(edited_frames, backend=self.backend)
        bank, row = self.features, individual
        if self._on_disk is not None:
            bank = self._on_disk.lookup(individual, bank.device).to(bank.dtype)
            individual = torch.arange(len(individual), device=bank.device)
        source_features, edited_features = source_features.to(bank.dtype), edited_features.to(bank.dtype)
        loss = ops.direction_loss(
            source_features,
            edited_features,
            bank,
            individual,
            source_emotion,
            target_emotion,
            scale=self.scale,
            contrast=self.contrast,
            backend=self.backend,
        )
        if self.strength and self.lengths is not None:
            lengths = self.lengths[row, source_emotion, target_emotion]
            direction = bank[individual, target_emotion] - bank[individual, source_emotion]
            shortfall = _shortfall(source_features, edited_features, direction, lengths)
            valid = (source_emotion != target_emotion).to(shortfall)
            loss = loss + self.strength * (shortfall * valid).sum() / valid.sum().clamp(min=1)
        return loss

    @torch.no_grad()
    def _look_at(self, name: str, frames: Tensor) -> None:
        """Log what is wrong with the values of frames, once: on a CPU at any call, on a GPU at the first one."""
        if torch.compiler.is_compiling() or self._noted >= {"NaN", "range"} or not frames.numel():
            return
        if frames.device.type != "cpu":
            if name in self._noted or frames.is_meta or (frames.is_cuda and torch.cuda.is_current_stream_capturing()):
                return
            self._noted.add(name)
        kind, wrong = _wrong_values(*(float(value) for value in frames.aminmax()))
        if kind and kind not in self._noted:
            self._noted.add(kind)
            log.warning("%s: %s", name, wrong)

    @staticmethod
    def _per_frame(name: str, index: Tensor, clips: int, length: int) -> Tensor:
        if index.shape != (clips,):
            raise ValueError(f"{name}: takes one index per clip, ({clips},), got {tuple(index.shape)}")
        return index.repeat_interleave(length)


def _shortfall(
    source: Tensor,  # (B, D)
    edited: Tensor,  # (B, D)
    direction: Tensor,  # (B, D)
    lengths: Tensor,  # (B,)
) -> Tensor:  # (B,)
    """The fraction of each length by which a change falls short along its direction; 0 beyond it."""
    change = F.normalize(edited, dim=-1) - F.normalize(source, dim=-1)
    return F.relu(1 - (change * F.normalize(direction, dim=-1)).sum(-1) / lengths)


def _wrong_values(least: float, most: float) -> tuple[str, str]:
    """What kind of mistake these extremes of frames speak of, and what to do; "" where there is none."""
    if math.isnan(least) or math.isnan(most):
        return "NaN", "there are NaN among the frames, and so the loss and its gradients are NaN"
    found = f"values from {least:.3g} to {most:.3g}; takes RGB in [-1, 1]"
    if most > 8:
        return "range", f"{found}: of 8-bit values make frames / 127.5 - 1"
    if least < -1 - TOLERANCE or most > 1 + TOLERANCE:
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
