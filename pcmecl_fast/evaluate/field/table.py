"""The numbers for people and papers: lines for a console, `measures.json`, and `table.tex` with booktabs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pcmecl_fast.evaluate.field.scores import Score, Setting, Value
from pcmecl_fast.evaluate.results import Cell, Row, Table, readable

MEAN = "mean"


def heading(setting: Setting) -> str:
    """What a setting is, and how much of it there is."""
    names = {
        "inter-ID": "inter-ID: the emotion is the same person’s",
        "cross-ID": "cross-ID: the emotion is another person’s",
        "": "edits whose names tell nobody who lent the emotion",
    }
    clips = f"{setting.clips:,} clip{'s' * (setting.clips != 1)}"
    people = f"{setting.people:,} individual{'s' * (setting.people != 1)}"
    return f"{names[setting.name]}; {clips} of {people}"


def table_of(setting: Setting) -> Table:
    """Measures by row, emotions and their mean by column; each row says how it was taken, and of how much."""
    emotions = setting.emotions
    rows = []
    for score in setting.scores:
        values = [score.mean, *(score.by_emotion.get(emotion) for emotion in emotions)]
        cells = [None if value is None else _cell(value, score.measure.unit) for value in values]
        rows.append(Row(f"{score.measure.name} {score.measure.better}", cells, f"{score.protocol}. {counted(score)}"))
    note = (
        f"Below each number its 95 % interval, from resampled {setting.over}: the bootstrap’s; of FAD, CSIM and FID "
        "the jackknife’s. The mean is over the emotions. ↑ more is better, ↓ less is."
    )
    return Table([MEAN, *emotions], rows, note)


def counted(score: Score) -> str:
    """Of how many clips a measure's numbers are, and how many were left out for which reasons."""
    if score.mean is None:
        words = "Of no clip"
    else:
        each = ", ".join(f"{emotion} {value.clips:,}" for emotion, value in score.by_emotion.items())
        words = f"Of {score.mean.clips:,} clip{'s' * (score.mean.clips != 1)} ({each})"
        frames = [value.frames for value in score.by_emotion.values() if value.frames is not None]
        if frames:
            ours, theirs = (sum(pair[side] for pair in frames) for side in (0, 1))
            words += f", {ours:,} edited and {theirs:,} real frames"
    if not score.left_out:
        return f"{words}; none left out"
    return f"{words}; left out {len(score.left_out):,}: {'; '.join(reasons(score.left_out.values()))}"


def reasons(why: Sequence[str] | Any, most: int = 3) -> list[str]:
    """Reasons with how often each was given, the most frequent first."""
    counts: dict[str, int] = {}
    for reason in why:
        counts[reason] = counts.get(reason, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    words = [f"{count} × {reason}" for reason, count in ordered[:most]]
    return words + ([f"{len(ordered) - most} other reasons"] if len(ordered) > most else [])


def as_json(settings: Sequence[Setting], not_run: Mapping[str, str], about: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers with their intervals, counts, protocols, and what was left out."""
    return {
        **about,
        "not_run": dict(not_run),
        "settings": [
            {
                "setting": setting.name or "not named",
                "clips": setting.clips,
                "individuals": setting.people,
                "intervals_over": setting.over,
                "measures": {score.measure.key: _score_json(score) for score in setting.scores},
            }
            for setting in settings
        ],
    }


def as_latex(settings: Sequence[Setting], not_run: Mapping[str, str], about: Mapping[str, Any]) -> str:
    """One table, to be \\input where booktabs is loaded; the protocols stand in comments."""
    emotions = list(dict.fromkeys(emotion for setting in settings for emotion in setting.emotions))
    lines = [f"% {key}: {value}" for key, value in about.items() if isinstance(value, str | int | float)]
    lines += [
        f"\\begin{{tabular}}{{l{'r' * (len(emotions) + 1)}}}",
        "\\toprule",
        " & ".join(["", *map(_tex, [*emotions, MEAN])]) + " \\\\",
    ]
    for setting in settings:
        lines.append("\\midrule")
        if len(settings) > 1 or setting.name:
            lines.append(f"\\multicolumn{{{len(emotions) + 2}}}{{l}}{{{_tex(setting.name or 'not named')}}} \\\\")
        for score in setting.scores:
            arrow = {"↑": "$\\uparrow$", "↓": "$\\downarrow$"}[score.measure.better]
            unit = f" ({_tex(score.measure.unit)})" if score.measure.unit else ""
            values = [*(score.by_emotion.get(emotion) for emotion in emotions), score.mean]
            cells = [_tex_value(value, score.measure.unit) for value in values]
            lines.append(" & ".join([f"{_tex(score.measure.name)}{unit} {arrow}", *cells]) + " \\\\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    for setting in settings:
        for score in setting.scores:
            lines.append(f"% {setting.name} {score.measure.name}: {score.protocol}. {counted(score)}")
    lines += [f"% not run, {metric}: {why}" for metric, why in not_run.items()]
    return "\n".join(" ".join(line.split()) for line in lines) + "\n"


def _cell(value: Value, unit: str) -> Cell:
    return Cell.of(value.value, value.interval, unit)


def _score_json(score: Score) -> dict[str, Any]:
    return {
        "mean": None if score.mean is None else _value_json(score.mean),
        "by_emotion": {emotion: _value_json(value) for emotion, value in score.by_emotion.items()},
        "better": "more" if score.measure.better == "↑" else "less",
        "unit": score.measure.unit,
        "protocol": score.protocol,
        "left_out": score.left_out,
        "worst": {case.pair.edited.file: case.value for case in score.worst},
        "best": {case.pair.edited.file: case.value for case in score.best},
    }


def _value_json(value: Value) -> dict[str, Any]:
    known = {"value": value.value, "interval": value.interval, "clips": value.clips, "frames": value.frames}
    return {name: thing for name, thing in known.items() if thing is not None}


def _tex_value(value: Value | None, unit: str) -> str:
    if value is None or not math.isfinite(value.value):
        return "--"
    text = readable(value.value, "%" if unit == "%" else "")[0].removesuffix(" %")
    return text.replace("−", "$-$")


def _tex(text: str) -> str:
    special = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}"}
    return "".join(special.get(c, c) for c in text)
