"""PCMECL as one loss that plugs into any model that edits the expression of a talking face."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcmecl_fast import ops
from pcmecl_fast.clip import Clip
from pcmecl_fast.data.base import FrameDataset
from pcmecl_fast.data.features import Features
from pcmecl_fast.prompts.bank import PromptBank


class PCMECLCriterion(nn.Module):
    """direction_loss on frames: CLIP's view of the edit must change as the individual's prompts change.

        loss = direction_loss(CLIP(source), CLIP(edited), bank, individual, a, b)        (ops.direction_loss)
             + strength · mean relu(1 − ⟨unit(CLIP(edited)) − unit(CLIP(source)), unit(d)⟩ / length)
        d      = bank[individual, b] − bank[individual, a]
        length = lengths[individual, a, b], or lengths[a, b] for everybody

    A direction says nothing about how far to go, so whatever keeps the frames as they are shortens the edits for free.
    The second term, off by default, asks for as much of the text's direction as real changes have: those of the same
    individual (`personal_lengths`) or everybody's (`real_lengths`).

    The bank is a buffer (one on disk stays there: a call reads its rows), the clip is frozen; nothing is trained here.
    Gradients reach the edited frames only: source features are computed without a graph.

    Args:
        clip: the model that the bank was made with.
        bank: text features of every individual and emotion.
        contrast: weight of the contrast with the other target emotions, at least 0.
        scale: logit scale of that contrast; None takes CLIP's own.
        strength: weight of edits that fall short of `lengths`, at least 0.
        lengths: how far changes from emotion a to b go, (E, E) or, for each row of the bank, (N, E, E); needed where
            `strength` is not 0.
        backend: which implementation runs; None leaves the choice to `use_backend`.

    Raises:
        ValueError: the bank belongs to another text tower; `lengths` missing, of another shape or not positive.

    Source: the paper's abstract (personalized prompts, feature differencing); contrast and strength are ours.
    """

    features: Tensor  # (N, E, D); without rows where the bank is on disk
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
        self.clip = clip
        rows, emotions = bank.features.shape[:2]
        if strength and lengths is None:
            raise ValueError("lengths: strength needs them; `real_lengths` measures them on a data set")
        if lengths is not None:
            takes = (emotions, emotions), (rows, emotions, emotions)
            if tuple(lengths.shape) not in takes or not bool((lengths > 0).all()):
                raise ValueError(
                    f"lengths: takes {takes[0]} or {takes[1]} positive numbers, got {tuple(lengths.shape)}"
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

    def forward(
        self,
        source_frames: Tensor,  # (B, 3, H, W) or (B, T, 3, H, W) in [-1, 1], any H and W
        edited_frames: Tensor,  # the same shape
        individual: Tensor,  # (B,) int, rows of the bank
        source_emotion: Tensor,  # (B,) int
        target_emotion: Tensor,  # (B,) int
        *,
        source_features: Tensor | None = None,  # (B, D) or (B, T, D): CLIP(source_frames) where it is known
    ) -> Tensor:  # ()
        """The mean loss over samples (and frames of a clip) whose target differs from their source emotion.

        Raises:
            ValueError: frames of another rank or of different shapes, features that do not belong to them.
        """
        if edited_frames.ndim not in (4, 5) or edited_frames.shape[-3] != 3:
            raise ValueError(f"edited_frames: takes (B, 3, H, W) or (B, T, 3, H, W), got {tuple(edited_frames.shape)}")
        if source_frames.shape[:-2] != edited_frames.shape[:-2]:
            raise ValueError(
                f"source_frames: takes as many frames as edited_frames {tuple(edited_frames.shape)}, "
                f"got {tuple(source_frames.shape)}"
            )
        if source_features is not None:
            takes = (*edited_frames.shape[:-3], self.features.shape[-1])
            if source_features.shape != takes:
                raise ValueError(f"source_features: takes {takes}, got {tuple(source_features.shape)}")
            source_features = source_features.detach()
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
            lacking = _lacking(source_features, edited_features, direction, lengths)
            asked = (source_emotion != target_emotion).to(lacking)
            loss = loss + self.strength * (lacking * asked).sum() / asked.sum().clamp(min=1)
        return loss

    @staticmethod
    def _per_frame(name: str, index: Tensor, clips: int, length: int) -> Tensor:
        if index.shape != (clips,):
            raise ValueError(f"{name}: takes one index a clip, ({clips},), got {tuple(index.shape)}")
        return index.repeat_interleave(length)


def _lacking(
    source: Tensor,  # (B, D)
    edited: Tensor,  # (B, D)
    direction: Tensor,  # (B, D)
    lengths: Tensor,  # (B,)
) -> Tensor:  # (B,)
    """The part of each length by which a change falls short along its direction; 0 beyond it."""
    change = F.normalize(edited, dim=-1) - F.normalize(source, dim=-1)
    return F.relu(1 - (change * F.normalize(direction, dim=-1)).sum(-1) / lengths)


@torch.no_grad()
def real_lengths(
    features: Features,  # (L, D) unit image features of the data set's frames
    dataset: FrameDataset,
    bank: PromptBank,
    *,
    individuals: int = 512,
) -> Tensor:  # (E, E)
    """How far real changes of emotion go along the bank's directions: what `PCMECLCriterion` takes as `lengths`.

        lengths[a, b] = mean ⟨v̄[n, b] − v, unit(that[n, b] − that[n, a])⟩

    over the frames v of emotion a by people n who show b too. Frames are unpaired: v̄ is the mean feature of a person's
    frames with an emotion, so that speech and pose average out. A change that never occurs, or goes against its
    direction, takes the mean of the others.

    Args:
        features: of every frame, in the data set's order.
        dataset: whose frames.
        bank: whose directions; it has a row for each individual, or for each frame.
        individuals: how many people of the data set are looked at, the first ones.

    Raises:
        ValueError: no change of emotion in the data set follows the bank's directions.
    """
    emotions = len(dataset.emotions)
    chosen = (dataset.individual_index < individuals).nonzero()[:, 0]
    who, shown = dataset.individual_index[chosen], dataset.emotion_index[chosen]
    v = features[chosen].float()
    who, shown = who.to(v.device), shown.to(v.device)
    count = min(individuals, len(dataset.individuals))
    cell = who * emotions + shown
    frames = torch.bincount(cell, minlength=count * emotions)
    means = v.new_zeros(count * emotions, v.shape[1]).index_add_(0, cell, v) / frames.clamp(min=1)[:, None]
    means, occurs = means.unflatten(0, (count, emotions)), (frames > 0).unflatten(0, (count, emotions))
    rows = (
        bank.rows(dataset.keys)
        if bank.condition == "frame"
        else bank.rows(dataset.individuals)[dataset.individual_index]
    )
    totals, pairs = v.new_zeros(emotions, emotions), v.new_zeros(emotions, emotions)
    for part in torch.arange(len(chosen), device=v.device).split(1024):
        text = bank.lookup(rows[chosen[part.cpu()]], v.device).float()  # (b, E, D)
        a, n = shown[part], who[part]
        directions = F.normalize(text - text[torch.arange(len(part), device=v.device), a][:, None], dim=-1)
        along = ((means[n] - v[part, None]) * directions).sum(-1)
        totals.index_add_(0, a, along * occurs[n])
        pairs.index_add_(0, a, occurs[n].to(v.dtype))
    lengths = totals / pairs.clamp(min=1)
    # The diagonal is no change.
    real = (lengths > 0) & ~torch.eye(emotions, dtype=torch.bool, device=v.device)
    if not bool(real.any()):
        raise ValueError("dataset: shows no change of emotion that follows the bank's directions")
    return torch.where(real, lengths, lengths[real].mean())


@torch.no_grad()
def personal_lengths(
    features: Features,  # (L, D) unit image features of the data set's frames
    dataset: FrameDataset,
    bank: PromptBank,
) -> Tensor:  # (N, E, E), one table for each row of the bank
    """How far each individual's own changes of emotion go along the bank's directions, for `PCMECLCriterion`.

        lengths[n, a, b] = ⟨v̄[n, b] − v̄[n, a], unit(that[n, b] − that[n, a])⟩

    Not every face moves CLIP's features as far as every other with the same expression: by everybody's length
    (`real_lengths`) some would be asked for too much and some for too little. A change that n does not show, or against
    its direction, takes everybody's length times the mean ratio of n's lengths to everybody's. None is below a fifth of
    everybody's; rows of the bank that the data set knows nothing of are everybody's.

    Raises:
        ValueError: the bank has a row for each frame; or as `real_lengths`.
    """
    if bank.condition == "frame":
        raise ValueError("bank: has a row for each frame; lengths of each individual need a bank of individuals")
    everybody = real_lengths(features, dataset, bank)
    emotions = len(everybody)
    rows = bank.rows(dataset.individuals)
    lengths = everybody.repeat(len(bank.individuals), 1, 1)
    change = ~torch.eye(emotions, dtype=torch.bool, device=everybody.device)
    by_individual = dataset.individual_index.argsort(stable=True)
    ends = torch.bincount(dataset.individual_index, minlength=len(rows)).cumsum(0)
    for part in torch.arange(len(rows)).split(256):
        first, last = int(part[0]), int(part[-1])
        frames = by_individual[int(ends[first - 1]) if first else 0 : int(ends[last])]
        v = features[frames].float()
        cell = (dataset.individual_index[frames] - first) * emotions + dataset.emotion_index[frames]
        shown = torch.bincount(cell, minlength=len(part) * emotions).to(v.device)
        means = v.new_zeros(len(shown), v.shape[1]).index_add_(0, cell.to(v.device), v) / shown.clamp(min=1)[:, None]
        means, occurs = means.unflatten(0, (-1, emotions)), (shown > 0).unflatten(0, (-1, emotions))
        text = bank.lookup(rows[part], v.device).float()  # (n, E, D)
        directions = F.normalize(text[:, None] - text[:, :, None], dim=-1)  # (n, E, E, D), from a to b
        along = ((means[:, None] - means[:, :, None]) * directions).sum(-1)
        own = occurs[:, None] & occurs[:, :, None] & change & (along > 0)
        ratio = (along / everybody * own).sum((1, 2)) / own.sum((1, 2)).clamp(min=1)
        ratio = torch.where(own.any(2).any(1), ratio, 1.0)[:, None, None]
        lengths[rows[part].to(lengths.device)] = torch.where(own, along, everybody * ratio).maximum(everybody / 5)
    return lengths


@contextmanager
def _attention_of_training() -> Iterator[None]:
    """Without PyTorch's fused attention for inference, which rounds otherwise than the one that has a gradient.

    An edit that changes nothing would else change 1e-7 of the features, in a direction made of noise, and have the
    huge gradient that goes with so small a change.
    """
    if torch.compiler.is_compiling():  # which cannot trace the switch
        yield
        return
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
