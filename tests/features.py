"""Image features as the tests expect them."""

import torch

from pcmecl_fast.data.features import LiveFeatures


def unit_features(clip, dataset, *, batch_size=64):  # (L, D)
    """Of every frame, without a store."""
    live = LiveFeatures(clip, dataset)
    return torch.cat([live[index] for index in torch.arange(len(dataset)).split(batch_size)])
