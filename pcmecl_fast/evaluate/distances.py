"""Distances between sets of features, as the field's metrics define them, in float64."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pcmecl_fast.files import load_tensors, save_tensors

_KIND = "feature statistics"


class RunningStatistics:
    """Mean and covariance of features that come in parts, so that none has to be kept.

    Parts are joined by Chan, Golub and LeVeque's update (1983): exact to rounding whatever their order.

    Args:
        width: D, the number of features.

    Attributes:
        count: N, how many were taken.
        mean: (D,) float64.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)  # Σ (x − mean)(x − mean)ᵀ

    @classmethod
    def of(
        cls,
        features: Tensor,  # (N, D)
    ) -> RunningStatistics:
        """The statistics of features that are all there."""
        statistics = cls(features.shape[-1])
        statistics.add(features)
        return statistics

    def add(
        self,
        features: Tensor,  # (N, D)
    ) -> None:
        """Take more.

        Raises:
            ValueError: another width, or a value that is not finite, such as that of a frame without a face.
        """
        width = len(self.mean)
        if features.ndim != 2 or features.shape[1] != width:
            raise ValueError(f"features: got shape {tuple(features.shape)}; takes (N, {width})")
        values = features.detach().to("cpu", torch.float64)
        if not values.isfinite().all():
            raise ValueError("features: some are not finite; leave out the frames without a face, and count them")
        if len(values):
            mean = values.mean(0)
            around = values - mean
            self._join(len(values), mean, around.T @ around)

    def merge(self, other: RunningStatistics) -> None:
        """Take all that another has taken."""
        if len(other.mean) != len(self.mean):
            raise ValueError(f"other: has {len(other.mean)} features; takes {len(self.mean)}")
        if other.count:
            self._join(other.count, other.mean, other._scatter)

    def covariance(self) -> Tensor:  # (D, D) float64
        """Without bias, over N − 1.

        Raises:
            ValueError: fewer than two were taken.
        """
        if self.count < 2:
            raise ValueError(f"a covariance takes at least 2 frames; got {self.count}")
        return self._scatter / (self.count - 1)

    def save(self, path: str | Path) -> None:
        """Write all of it into one safetensors file."""
        save_tensors(path, _KIND, {"mean": self.mean, "scatter": self._scatter}, {"count": self.count})

    @classmethod
    def load(cls, path: str | Path) -> RunningStatistics:
        """Read what `save` wrote; errors are those of `pcmecl_fast.files.load_tensors`."""
        tensors, header = load_tensors(path, _KIND)
        statistics = cls(len(tensors["mean"]))
        statistics.count = int(header["count"])
        statistics.mean, statistics._scatter = tensors["mean"].clone(), tensors["scatter"].clone()
        return statistics

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        apart = mean - self.mean
        self._scatter = self._scatter + scatter + torch.outer(apart, apart) * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total


def frechet_distance(
    a: Tensor | RunningStatistics,  # (N, D)
    b: Tensor | RunningStatistics,  # (M, D)
) -> float:
    """How far two sets are apart, were each normally distributed:

        ‖μ₁ − μ₂‖² + tr(Σ₁) + tr(Σ₂) − 2 tr √(Σ₁ Σ₂)

    the square of Fréchet's distance, as FID is defined (Heusel et al. 2017). With A Aᵀ = Σ₁ and B Bᵀ = Σ₂, the trace of
    the root is the sum of the singular values of Aᵀ B, which are real. Where there are fewer frames than features, the
    scripts that take the root of Σ₁ Σ₂ itself find it complex, add a constant, or give up.

    Raises:
        ValueError: fewer than two frames, features that are not finite, or different widths.
    """
    first, second = (s if isinstance(s, RunningStatistics) else RunningStatistics.of(s) for s in (a, b))
    if len(first.mean) != len(second.mean):
        raise ValueError(f"a and b: have {len(first.mean)} and {len(second.mean)} features")
    covariances = first.covariance(), second.covariance()
    roots = [_root(covariance) for covariance in covariances]
    shared = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    traces = covariances[0].trace() + covariances[1].trace()
    return float((first.mean - second.mean).square().sum() + traces - 2 * shared)


def _root(covariance: Tensor) -> Tensor:  # both (D, D)
    """A with A Aᵀ the covariance. Eigenvalues that are 0 but for rounding are: their roots would not be small."""
    values, vectors = torch.linalg.eigh(covariance)
    least = values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors * torch.where(values > least, values, 0).sqrt()


def csim(
    a: Tensor,  # (N, D)
    b: Tensor,  # (M, D)
) -> float:
    """The mean cosine over all N·M pairs: the mean unit vectors' product, in float64.

    Raises:
        ValueError: an empty set, different widths, or features that are not finite.
    """
    for name, features in (("a", a), ("b", b)):
        if features.ndim != 2 or not len(features):
            raise ValueError(f"{name}: got shape {tuple(features.shape)}; takes (N, D) with N of at least 1")
        if not features.isfinite().all():
            raise ValueError(f"{name}: some features are not finite; leave out the frames without a face")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b: have {a.shape[1]} and {b.shape[1]} features")
    means = [F.normalize(features.detach().to("cpu", torch.float64), dim=1).mean(0) for features in (a, b)]
    return float(means[0] @ means[1])
