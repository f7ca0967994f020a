"""How far real changes of emotion go along a prompt bank's directions: the `lengths` of `PCMECLCriterion` (ours)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pcmecl_fast.data.base import FrameDataset
from pcmecl_fast.data.features import Features
from pcmecl_fast.prompts.bank import PromptBank


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

    over the frames v of emotion a of people n who also show b. Frames are unpaired: v̄ is a person's mean feature for
    an emotion, so speech and pose average out. A change that never occurs, or goes against its direction,
    gets the mean of the others.

    Args:
        features: features of every frame, in the data set's order.
        dataset: the data set they come from.
        bank: the prompt bank; it has a row for each individual, or for each frame.
        individuals: how many people to look at, counted from the data set's first.

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

    The same expression moves CLIP's features further on some faces than on others: the population's lengths
    (`real_lengths`) would ask too much of some and too little of others. A change that n does not show, or that goes
    against its direction, gets the population's length times the mean ratio of n's lengths to the population's. None is
    below a fifth of the population's; rows of the bank that are not in the data set get the population's.

    Raises:
        ValueError: the bank has a row for each frame; or as for `real_lengths`.
    """
    if bank.condition == "frame":
        raise ValueError("bank: has a row for each frame; personal lengths need a bank of individuals")
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
