"""How sure a mean over trials is: 95 % intervals from resampled individuals, the same in every run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_RESAMPLES = 2000
_FEWEST_INDIVIDUALS = 5  # fewer say next to nothing about how individuals differ: frames are resampled instead
_Z = 1.959964  # 95 % of a normal distribution


def summarize(
    values: dict[str, Tensor],  # each (T,): float, or bool for what is right or wrong
    individual: Tensor,  # (T,) int
) -> dict[str, Any]:
    """Means over the trials with their intervals and counts.

    The trials of one individual resemble each other, so individuals are resampled, each with all its trials: the
    percentile bootstrap with 2,000 resamples. Below five individuals the trials are. The interval of a rate covers
    Wilson's as well, because a bootstrap of 0 right answers out of 40 would be sure that there never are any.

    Returns:
        the mean of each measure under its name; `intervals`, measure to [low, high]; `counts`, of frames and of
        individuals; and `intervals_over`, what was resampled: "individuals" or "frames".
    """
    individuals, group = individual.cpu().unique(return_inverse=True)
    over = "individuals" if len(individuals) >= _FEWEST_INDIVIDUALS else "frames"
    if over == "frames":
        group = torch.arange(len(individual))
    columns = torch.stack([value.detach().double().cpu() for value in values.values()], 1)  # (T, K)
    means, bounds = columns.mean(0), _bootstrap(columns, group)
    for k, value in enumerate(values.values()):
        if value.dtype == torch.bool:
            low, high = wilson(int(value.sum()), len(value))
            bounds[k] = torch.tensor([min(low, float(bounds[k, 0])), max(high, float(bounds[k, 1]))])
    return {
        **dict(zip(values, means.tolist(), strict=True)),
        "intervals": dict(zip(values, bounds.tolist(), strict=True)),
        "counts": {"frames": len(individual), "individuals": len(individuals)},
        "intervals_over": over,
    }


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate (Wilson 1927): within [0, 1], and wider than nothing at 0 and at 1."""
    rate, z2 = right / count, _Z**2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _bootstrap(
    columns: Tensor,  # (T, K)
    group: Tensor,  # (T,) int in [0, G): trials that are drawn together
) -> Tensor:  # (K, 2)
    groups = int(group.max()) + 1
    sums = columns.new_zeros(groups, columns.shape[1]).index_add_(0, group, columns)
    sizes = torch.bincount(group, minlength=groups).double()
    drawn = torch.randint(groups, (_RESAMPLES, groups), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(_RESAMPLES, groups, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    means = (times @ sums) / (times @ sizes)[:, None]
    return means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), 0).T.contiguous()
