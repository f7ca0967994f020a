"""What was measured of many clips as numbers of a table: by emotion and their mean, with 95 % intervals.

The mean of a measure is the mean over the emotions' means, as CDRL's scripts take it. People differ more than the clips
of one person, so where there are five people or more, they are what is resampled, and else the clips.

- Measures of single clips: the percentile bootstrap with 2,000 resamples.
- FAD, CSIM and FID, which compare groups of frames: the delete-a-group jackknife with up to ten groups and Student's t.
  A bootstrap would repeat frames, which makes a covariance smaller than it is and these distances larger.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pcmecl_fast.data.emotions import KNOWN_EMOTIONS
from pcmecl_fast.data.layouts.base import natural
from pcmecl_fast.evaluate.distances import RunningStatistics, frechet_distance
from pcmecl_fast.evaluate.field.clips import FaceClip
from pcmecl_fast.evaluate.field.measures import OF_GROUPS, Measure, Protocol, Sampling, Tools, protocol_of
from pcmecl_fast.evaluate.field.pairs import Pair, Pairing
from pcmecl_fast.evaluate.field.records import Records

UNNAMED = "emotion not named"
CASES = 3
"""Clips shown at either end of a measure."""

_RESAMPLES = 2000
_FEWEST_PEOPLE = 5
_MOST_FOLDS = 10
_WIDEST = 1024  # features: of more, ten covariances would take gigabytes
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's 97.5 %, 1 to 9 degrees of freedom


@dataclass(frozen=True)
class Value:
    """One number.

    Attributes:
        value: the number.
        interval: its 95 % interval; None where there is too little to resample.
        clips: edited clips that it is of.
        frames: of groups, how many frames of the edits and of the reference.
    """

    value: float
    interval: tuple[float, float] | None
    clips: int
    frames: tuple[int, int] | None = None


@dataclass(frozen=True)
class Case:
    """One clip's value, to be looked at."""

    pair: Pair
    value: float


@dataclass
class Score:
    """A measure's numbers.

    Attributes:
        protocol: how they were taken.
        mean: over the emotions; None where nothing was measured.
        by_emotion: in the order of `KNOWN_EMOTIONS`.
        left_out: clips that no number has in it, and why.
        best, worst: clips, the most extreme first.
    """

    measure: Measure
    protocol: str
    mean: Value | None = None
    by_emotion: dict[str, Value] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    best: list[Case] = field(default_factory=list)
    worst: list[Case] = field(default_factory=list)


@dataclass
class Setting:
    """The numbers of the clips of one setting: cross-ID, inter-ID, or "" where names do not tell."""

    name: str
    clips: int
    people: int
    scores: list[Score]
    over: str  # what was resampled: "individuals" or "clips"

    @property
    def emotions(self) -> list[str]:
        shown = {emotion for score in self.scores for emotion in score.by_emotion}
        return [emotion for emotion in (*KNOWN_EMOTIONS, UNNAMED) if emotion in shown]


def edited_key(clip: FaceClip) -> str:
    """A clip's name among the records."""
    return f"edited {clip.file}"


def reference_key(clip: FaceClip) -> str:
    return f"reference {clip.file}"


def score_all(
    pairing: Pairing, records: Records, tools: Tools, *, protocol: Protocol, sampling: Sampling
) -> list[Setting]:
    """The numbers of each setting, from the records of all clips."""
    settings = []
    for name in ("inter-ID", "cross-ID", ""):
        pairs = [pair for pair in pairing.pairs if pair.edited.setting == name]
        if not pairs:
            continue
        people = {pair.edited.individual for pair in pairs}
        over = "individuals" if len(people) >= _FEWEST_PEOPLE else "clips"
        scores = []
        for measure in tools.measures:
            score = Score(measure, protocol_of(measure, protocol, sampling))
            if measure.by == "clip":
                _score_clips(score, pairs, records, over)
            else:
                _score_groups(score, pairs, pairing, records, over)
            scores.append(score)
        settings.append(Setting(name, len(pairs), len(people), scores, over))
    return settings


# ---- Measures of single clips ----------------------------------------------------------------------------------------


def _score_clips(score: Score, pairs: Sequence[Pair], records: Records, over: str) -> None:
    key = score.measure.key
    measured: list[Case] = []
    for pair in pairs:
        result = records[edited_key(pair.edited)]
        if key in result.values:
            measured.append(Case(pair, result.values[key]))
        else:
            score.left_out[pair.edited.file] = result.why.get(key, "not measured")
    if not measured:
        return
    emotions = _in_order(case.pair.edited.emotion or UNNAMED for case in measured)
    column = torch.tensor([emotions.index(case.pair.edited.emotion or UNNAMED) for case in measured])
    units = [case.pair.edited.individual if over == "individuals" else k for k, case in enumerate(measured)]
    unit = torch.tensor([list(dict.fromkeys(units)).index(u) for u in units])
    values = torch.tensor([case.value for case in measured], dtype=torch.float64)
    means, intervals = _bootstrap(values, column, unit)
    sizes = torch.bincount(column).tolist()
    for k, emotion in enumerate(emotions):
        score.by_emotion[emotion] = Value(means[k], intervals[k], sizes[k])
    score.mean = Value(sum(means) / len(means), intervals[-1], len(measured))
    _show_cases(score, measured)


def _bootstrap(
    values: Tensor,  # (n,) float64
    column: Tensor,  # (n,) int, the emotion of each
    unit: Tensor,  # (n,) int, which are drawn together
) -> tuple[list[float], list[tuple[float, float] | None]]:
    """The emotions' means; and their intervals, the last being that of the mean over emotions."""
    units, columns = int(unit.max()) + 1, int(column.max()) + 1
    place = unit * columns + column
    sums = torch.zeros(units * columns, dtype=torch.float64).index_add_(0, place, values).view(units, columns)
    counts = torch.bincount(place, minlength=units * columns).double().view(units, columns)
    means = (sums.sum(0) / counts.sum(0)).tolist()
    drawn = torch.randint(units, (_RESAMPLES, units), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(_RESAMPLES, units, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    resampled = (times @ sums) / (times @ counts)  # NaN where no unit with the emotion was drawn
    resampled = torch.cat([resampled, resampled.nanmean(1, keepdim=True)], 1)
    several = [*((counts > 0).sum(0) > 1).tolist(), units > 1]
    intervals: list[tuple[float, float] | None] = []
    for each, enough in zip(resampled.T, several, strict=True):
        bounds = each[~each.isnan()].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        intervals.append((float(bounds[0]), float(bounds[1])) if enough else None)
    return means, intervals


# ---- Measures of groups ----------------------------------------------------------------------------------------------


def _score_groups(score: Score, pairs: Sequence[Pair], pairing: Pairing, records: Records, over: str) -> None:
    network = OF_GROUPS[score.measure.metric]
    sides = _sides(score, pairs, pairing, records)
    folds = _Folds(sides, over)
    each: dict[str, list[float | None]] = {}  # of all frames, then without each fold
    cases: list[Case] = []
    for emotion, side in sides.items():
        statistic = _Csim(side) if score.measure.by == "person" else _Frechet()
        for number, clips in enumerate((side.edited, side.real)):
            for k, (clip, key) in enumerate(clips):
                features = records.features(key, network)
                if features is not None and len(features):
                    fold = folds.of(clip, k) if features.shape[1] <= _WIDEST else 0
                    statistic.add(number, clip, fold, features)
        used = folds.count if statistic.width <= _WIDEST else 1
        values = [statistic.value(None), *(statistic.value(fold) for fold in range(used) if used > 1)]
        if values[0] is None:
            for clip, _ in side.edited:
                score.left_out.setdefault(clip.file, f"too few frames of {emotion}: {statistic.counts}")
            continue
        each[emotion] = values
        score.by_emotion[emotion] = Value(values[0], _jackknife(values), len(side.edited), statistic.counts)
        cases += statistic.cases(side)
    if each:
        means = [None if None in column else _mean(column) for column in zip(*each.values(), strict=True)]
        count = sum(value.clips for value in score.by_emotion.values())
        score.mean = Value(_mean([values[0] for values in each.values()]), _jackknife(means), count)
    _show_cases(score, cases)


@dataclass
class _Side:
    """The clips that are compared for an emotion, each with its key among the records."""

    edited: list[tuple[FaceClip, str]] = field(default_factory=list)
    real: list[tuple[FaceClip, str]] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)


def _sides(score: Score, pairs: Sequence[Pair], pairing: Pairing, records: Records) -> dict[str, _Side]:
    """By emotion, the edits and the real faces of the same people; what has no counterpart is left out."""
    sides: dict[str, _Side] = defaultdict(_Side)
    for pair in pairs:
        result = records[edited_key(pair.edited)]
        why = result.why.get(score.measure.key) or (pair.why_not if pair.group is None else "")
        if why:
            score.left_out[pair.edited.file] = why
            continue
        side = sides[pair.edited.emotion or UNNAMED]
        side.edited.append((pair.edited, edited_key(pair.edited)))
        side.pairs.append(pair)
    for side in sides.values():
        for group in dict.fromkeys(pair.group for pair in side.pairs if pair.group is not None):
            for clip in pairing.groups[group]:
                broken = records[reference_key(clip)].why.get(score.measure.key)
                if broken:
                    score.left_out[f"reference: {clip.file}"] = broken
                else:
                    side.real.append((clip, reference_key(clip)))
    return {emotion: sides[emotion] for emotion in _in_order(sides)}


class _Folds:
    """Which clips are left out together by the jackknife."""

    def __init__(self, sides: dict[str, _Side], over: str) -> None:
        people = sorted({clip.individual for side in sides.values() for clip, _ in side.edited}, key=natural)
        self._rank = {name: k for k, name in enumerate(people)} if over == "individuals" else None
        least = min((min(len(side.edited), len(side.real)) for side in sides.values()), default=0)
        self.count = min(_MOST_FOLDS, len(people) if self._rank is not None else least)

    def of(self, clip: FaceClip, number: int) -> int:
        return (number if self._rank is None else self._rank[clip.individual]) % max(self.count, 1)


class _Frechet:
    """Fréchet's distance of the features of edited and real frames."""

    def __init__(self) -> None:
        self._statistics: dict[tuple[int, int], RunningStatistics] = {}
        self.width = 0

    @property
    def counts(self) -> tuple[int, int]:
        return self._count(0), self._count(1)

    def add(self, side: int, clip: FaceClip, fold: int, features: Tensor) -> None:
        self.width = features.shape[1]
        self._statistics.setdefault((side, fold), RunningStatistics(self.width)).add(features)

    def value(self, without: int | None) -> float | None:
        merged = RunningStatistics(self.width), RunningStatistics(self.width)
        for (side, fold), statistics in self._statistics.items():
            if fold != without:
                merged[side].merge(statistics)
        return None if min(part.count for part in merged) < 2 else frechet_distance(*merged)

    def cases(self, side: _Side) -> list[Case]:
        return []  # a distance of groups is none of a clip

    def _count(self, side: int) -> int:
        return sum(part.count for (of, _), part in self._statistics.items() if of == side)


class _Csim:
    """The mean cosine of all pairs of features, by individual: the product of the means of unit vectors."""

    def __init__(self, side: _Side) -> None:
        self._sums: dict[tuple[int, str, int], Tensor] = {}  # side, individual, fold: sum of unit features
        self._counts: dict[tuple[int, str, int], int] = defaultdict(int)
        self._of_clip: dict[str, Tensor] = {}
        self._people = list(dict.fromkeys(clip.individual for clip, _ in side.edited))
        self.width = 0

    @property
    def counts(self) -> tuple[int, int]:
        first, second = (sum(n for (of, _, _), n in self._counts.items() if of == side) for side in (0, 1))
        return first, second

    def add(self, side: int, clip: FaceClip, fold: int, features: Tensor) -> None:
        self.width = features.shape[1]
        unit = F.normalize(features.double(), dim=1)
        key = side, clip.individual, fold
        self._sums[key] = self._sums.get(key, torch.zeros(self.width, dtype=torch.float64)) + unit.sum(0)
        self._counts[key] += len(unit)
        if side == 0:
            self._of_clip[clip.file] = unit.mean(0)

    def value(self, without: int | None) -> float | None:
        cosines = []
        for who in self._people:
            ours, theirs = self._mean_unit(0, who, without), self._mean_unit(1, who, without)
            if ours is not None and theirs is not None:
                cosines.append(float(ours @ theirs))
        return _mean(cosines) if cosines else None

    def cases(self, side: _Side) -> list[Case]:
        cases = []
        for pair in side.pairs:
            ours, theirs = self._of_clip.get(pair.edited.file), self._mean_unit(1, pair.edited.individual, None)
            if ours is not None and theirs is not None:
                cases.append(Case(pair, float(ours @ theirs)))
        return cases

    def _mean_unit(self, side: int, who: str, without: int | None) -> Tensor | None:
        keys = [key for key in self._sums if key[:2] == (side, who) and key[2] != without]
        if not keys:
            return None
        return torch.stack([self._sums[key] for key in keys]).sum(0) / sum(self._counts[key] for key in keys)


def _jackknife(values: Sequence[float | None]) -> tuple[float, float] | None:
    """The interval of the first value, given those without each of g groups: ± t √((g−1)/g Σ (θ_j − θ̄)²)."""
    whole, without = values[0], [value for value in values[1:] if value is not None]
    count = len(without)
    if whole is None or count < 2 or count < len(values) - 1:
        return None
    middle = _mean(without)
    error = math.sqrt((count - 1) / count * sum((value - middle) ** 2 for value in without))
    reach = _T[min(count - 1, len(_T)) - 1] * error
    return whole - reach, whole + reach


# ---- Both ------------------------------------------------------------------------------------------------------------


def _show_cases(score: Score, cases: Sequence[Case]) -> None:
    falling = sorted(cases, key=lambda case: (-case.value, case.pair.edited.file))
    best, worst = (falling, falling[::-1]) if score.measure.better == "↑" else (falling[::-1], falling)
    count = min(CASES, (len(cases) + 1) // 2)
    score.best, score.worst = best[:count], worst[: min(count, len(cases) - count)]


def _in_order(emotions: Iterable[str]) -> list[str]:
    shown = set(emotions)
    return [emotion for emotion in (*KNOWN_EMOTIONS, UNNAMED) if emotion in shown]


def _mean(values: Sequence[float | None]) -> float:
    return math.fsum(value for value in values if value is not None) / len(values)
