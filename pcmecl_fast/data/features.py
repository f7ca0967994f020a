"""Unit image features of every frame of a data set, computed once: frozen towers never see the same frame twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pcmecl_fast.data.base import FrameDataset

if TYPE_CHECKING:
    from pcmecl_fast.clip import Clip


@torch.no_grad()
def unit_features(
    clip: Clip,
    dataset: FrameDataset,
    *,
    batch_size: int = 64,
    backend: str | None = None,
) -> Tensor:  # (L, D)
    """Unit image features of all L frames in float32, on the clip's device."""
    if not len(dataset):
        return torch.empty(0, clip.embed_dim, device=clip.device)
    chunks = torch.arange(len(dataset)).split(batch_size)
    bar = tqdm(chunks, desc="image features", disable=len(chunks) < 8, leave=False)
    features = [clip.encode_image(dataset.frames(c).to(clip.device), backend=backend).float() for c in bar]
    return F.normalize(torch.cat(features), dim=-1)


def individual_conditions(
    features: Tensor,  # (L, D) unit
    individual_index: Tensor,  # (L,) int
    individuals: int,
) -> Tensor:  # (N, D)
    """The condition of each individual: the mean of its unit image features, zero for one without frames."""
    index = individual_index.to(features.device)
    total = features.new_zeros(individuals, features.shape[1]).index_add_(0, index, features)
    return total / torch.bincount(index, minlength=individuals).clamp(min=1)[:, None]
