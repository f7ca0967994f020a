"""Every operator a second time: NumPy in float64, one vector at a time, with derivatives worked out by hand.

Written from the docstrings and shares no line with `ops/reference.py`. Each function returns the value and `gradients`,
a function of the gradient of that value which gives those of the differentiable arguments, in the operator's order.
`test_fuzz.py` checks the derivatives against central differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
EPS = 1e-8


class Result(NamedTuple):
    value: Array
    gradients: Callable[[Array], tuple[Array, ...]]


def direction_logits(
    source: Array,  # (B, D)
    edited: Array,  # (B, D)
    bank: Array,  # (N, E, D)
    individual: Sequence[int],  # (B,)
    shown: Sequence[int],  # (B,)
    *,
    normalize: bool,
    min_change: float,
) -> Result:  # (B, E)
    samples = [
        _Cosines(source[i], edited[i], bank[n], a, normalize, min_change)
        for i, (n, a) in enumerate(zip(individual, shown, strict=True))
    ]
    value = np.array([sample.value for sample in samples]).reshape(len(samples), bank.shape[1])

    def gradients(upstream: Array) -> tuple[Array, ...]:
        return _direction_gradients(samples, upstream, source, bank, individual)

    return Result(value, gradients)


def direction_loss(
    source: Array,  # (B, D)
    edited: Array,  # (B, D)
    bank: Array,  # (N, E, D)
    individual: Sequence[int],  # (B,)
    shown: Sequence[int],  # (B,)
    asked: Sequence[int],  # (B,)
    *,
    scale: float,
    contrast: float,
    normalize: bool,
    min_change: float,
    reduction: str,
) -> Result:  # () or (B,)
    losses = np.zeros(len(source))
    by_cosine = np.zeros((len(source), bank.shape[1]))  # derivative of each sample's loss
    by_scale = np.zeros(len(source))
    samples = []
    for i, (n, a, b) in enumerate(zip(individual, shown, asked, strict=True)):
        sample = _Cosines(source[i], edited[i], bank[n], a, normalize, min_change)
        samples.append(sample)
        if a == b:
            continue
        others = [e for e in range(bank.shape[1]) if e != a]
        cosines = sample.value[others]
        log_sum, shares = _log_sum_exp(scale * cosines)
        losses[i] = 1 - sample.value[b] + contrast * (log_sum - scale * sample.value[b])
        by_cosine[i, others] = contrast * scale * shares
        by_cosine[i, b] -= 1 + contrast * scale
        by_scale[i] = contrast * (shares @ cosines - sample.value[b])
    count = sum(a != b for a, b in zip(shown, asked, strict=True))
    weight = 1 / max(count, 1) if reduction == "mean" else 1.0
    value = losses if reduction == "none" else np.array(weight * losses.sum())

    def gradients(upstream: Array) -> tuple[Array, ...]:
        each = upstream * weight * np.ones(len(source))
        of_features = _direction_gradients(samples, each[:, None] * by_cosine, source, bank, individual)
        return *of_features, np.array(each @ by_scale)

    return Result(value, gradients)


def correlation_loss(
    visual: Array,  # (N, E, D)
    text: Array,  # (N, E, D)
    *,
    scale: float,
    mask: NDArray[np.bool_] | None,  # (N, E)
    negatives: str,
) -> Result:  # ()
    people, emotions, _ = visual.shape
    directions = [
        (i, a, b)
        for i in range(people)
        for a in range(emotions)
        for b in range(emotions)
        if a != b and (mask is None or (mask[i, a] and mask[i, b]))
    ]
    seen = [_Unit(visual[i, b] - visual[i, a]) for i, a, b in directions]
    said = [_Unit(text[i, b] - text[i, a]) for i, a, b in directions]
    count = len(directions)
    cosines = np.array([[v.value @ t.value for t in said] for v in seen]).reshape(count, count)
    loss = 0.0
    by_logit = np.zeros((count, count))
    for row, one in enumerate(directions):
        rivals = [column for column, other in enumerate(directions) if _compared(one, other, negatives)]
        for at in ((row, rivals), (rivals, row)):  # its row, then its column
            log_sum, shares = _log_sum_exp(scale * cosines[at])
            loss += 0.5 / count * (log_sum - scale * cosines[row, row])
            by_logit[at] += 0.5 / count * shares
            by_logit[row, row] -= 0.5 / count

    def gradients(upstream: Array) -> tuple[Array, ...]:
        by_visual, by_text = np.zeros_like(visual), np.zeros_like(text)
        by_cosine = upstream * scale * by_logit
        for k, (i, a, b) in enumerate(directions):
            of_seen = seen[k].gradient(sum(by_cosine[k, j] * said[j].value for j in range(count)))
            of_said = said[k].gradient(sum(by_cosine[j, k] * seen[j].value for j in range(count)))
            by_visual[i, b] += of_seen
            by_visual[i, a] -= of_seen
            by_text[i, b] += of_said
            by_text[i, a] -= of_said
        return by_visual, by_text, np.array(upstream * (by_logit * cosines).sum())

    return Result(np.array(loss), gradients)


def tree_attention(
    qkv: Array,  # (N, S, 3, H, d)
    *,
    prefix: int,
    segment_lengths: Sequence[int],
) -> Result:  # (N, S, H, d)
    people, _, _, heads, width = qkv.shape
    out = np.zeros((people, qkv.shape[1], heads, width))
    sees = _visible(prefix, segment_lengths)
    shares = {}
    for n, h in np.ndindex(people, heads):
        query, key, value = (qkv[n, :, part, h] for part in range(3))
        for token, keys in enumerate(sees):
            _, shares[n, h, token] = _log_sum_exp(key[keys] @ query[token] / math.sqrt(width))
            out[n, token, h] = shares[n, h, token] @ value[keys]

    def gradients(upstream: Array) -> tuple[Array, ...]:
        grad = np.zeros_like(qkv)
        for (n, h, token), share in shares.items():
            keys = sees[token]
            query, key, value = qkv[n, token, 0, h], qkv[n, keys, 1, h], qkv[n, keys, 2, h]
            above = upstream[n, token, h]
            by_logit = share * (value @ above - out[n, token, h] @ above) / math.sqrt(width)
            grad[n, token, 0, h] += by_logit @ key
            grad[n, keys, 1, h] += by_logit[:, None] * query
            grad[n, keys, 2, h] += share[:, None] * above
        return (grad,)

    return Result(out, gradients)


def clip_frames(
    frames: Array,  # (B, 3, H, W)
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
) -> Result:  # (B, 3, size, size)
    weight = {"bicubic": _keys, "bilinear": lambda x: max(0.0, 1 - abs(x))}[interpolation]
    down, across = _resize(frames.shape[2], size, weight), _resize(frames.shape[3], size, weight)
    value = np.zeros((len(frames), 3, size, size))
    for i, c in np.ndindex(len(frames), 3):
        value[i, c] = (down @ ((frames[i, c] + 1) / 2) @ across.T - mean[c]) / std[c]

    def gradients(upstream: Array) -> tuple[Array, ...]:
        grad = np.zeros_like(frames)
        for i, c in np.ndindex(len(frames), 3):
            grad[i, c] = down.T @ upstream[i, c] @ across / (2 * std[c])
        return (grad,)

    return Result(value, gradients)


class _Unit:
    """x / max(|x|, least), and the gradient through it; both 0 where that is at most ε."""

    def __init__(self, x: Array, least: float = 0.0) -> None:
        self.norm = math.sqrt(math.fsum(x * x))
        self.length = max(self.norm, least)
        self.value = x / self.length if self.length > EPS else np.zeros_like(x)

    def gradient(self, upstream: Array) -> Array:
        if self.length <= EPS:
            return np.zeros_like(self.value)
        if self.norm < self.length:
            return upstream / self.length
        return (upstream - self.value * (self.value @ upstream)) / self.norm


class _Cosines:
    """c[e] of one sample for all e, and its gradients."""

    def __init__(
        self, source: Array, edited: Array, texts: Array, shown: int, normalize: bool, min_change: float
    ) -> None:
        self.ends = (_Unit(source), _Unit(edited)) if normalize else None
        first, second = (end.value for end in self.ends) if self.ends else (source, edited)
        self.edit = _Unit(second - first, min_change)
        self.changes = [_Unit(text - texts[shown]) for text in texts]
        self.shown = shown
        self.value = np.array([self.edit.value @ change.value for change in self.changes])

    def gradients(self, upstream: Array) -> tuple[Array, Array, Array]:
        """Of the source, of the edited and of the individual's texts."""
        by_delta = self.edit.gradient(sum(g * change.value for g, change in zip(upstream, self.changes, strict=True)))
        by_source, by_edited = -by_delta, by_delta
        if self.ends:
            by_source, by_edited = self.ends[0].gradient(by_source), self.ends[1].gradient(by_edited)
        by_texts = np.array([c.gradient(g * self.edit.value) for g, c in zip(upstream, self.changes, strict=True)])
        by_texts[self.shown] -= by_texts.sum(axis=0)
        return by_source, by_edited, by_texts


def _direction_gradients(
    samples: list[_Cosines], by_cosine: Array, source: Array, bank: Array, individual: Sequence[int]
) -> tuple[Array, Array, Array]:
    by_source, by_edited, by_bank = np.zeros_like(source), np.zeros_like(source), np.zeros_like(bank)
    for i, (sample, n) in enumerate(zip(samples, individual, strict=True)):
        by_source[i], by_edited[i], by_texts = sample.gradients(by_cosine[i])
        by_bank[n] += by_texts
    return by_source, by_edited, by_bank


def _compared(one: tuple[int, int, int], other: tuple[int, int, int], negatives: str) -> bool:
    if negatives == "within":
        return one[0] == other[0]
    if negatives == "distinct":
        return one[0] == other[0] or one[1:] != other[1:]
    return True


def _visible(prefix: int, segment_lengths: Sequence[int]) -> list[list[int]]:
    """The tokens that each token sees."""
    sees = [list(range(token + 1)) for token in range(prefix)]
    for length in segment_lengths:
        begin = len(sees)
        sees += [[*range(prefix), *range(begin, token + 1)] for token in range(begin, begin + length)]
    return sees


def _resize(size: int, out: int, weight: Callable[[float], float]) -> Array:
    """The antialiased resize of one side, as a matrix (out, size): the filter is widened to shrink."""
    stretch = max(size / out, 1.0)
    weights = np.zeros((out, size))
    for i in range(out):
        centre = (i + 0.5) * size / out
        for j in range(size):
            weights[i, j] = weight((j + 0.5 - centre) / stretch)
    return weights / weights.sum(axis=1, keepdims=True)


def _keys(x: float) -> float:
    """Keys' cubic with a = −1/2."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def _log_sum_exp(logits: Array) -> tuple[float, Array]:
    """The log of the sum, and each one's share of it."""
    top = max(logits, default=0.0)
    powers = np.exp(logits - top)
    return float(top + math.log(powers.sum())), powers / powers.sum()
