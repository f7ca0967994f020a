"""A summary as people read it: edited, unedited and true side by side, and in plain words what the prompts did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

Summary = Mapping[str, Any]
"""What `intervals.summarize` returns, and whatever a run adds to it."""


@dataclass(frozen=True)
class Measure:
    """A measure of edits: the summary has it under `key`, and with `_source` and `_truth` for the other columns."""

    key: str
    name: str  # ↑ where more is better, ↓ where less is
    note: str  # what it measures, and its range
    unit: Literal["", "%", "dB"] = ""


MEASURES = [
    Measure(
        "emotion_accuracy",
        "shows the target emotion\N{NO-BREAK SPACE}↑",
        "to a classifier trained apart from CLIP; unedited frames show another emotion, so about 0",
        "%",
    ),
    Measure(
        "expression_error",
        "error of the expression\N{NO-BREAK SPACE}↓",
        "action units against the true ones, 0 to about 1.5",
    ),
    Measure(
        "mouth_error",
        "error of the speech\N{NO-BREAK SPACE}↓",
        "mouth openness and spread against the source’s, part of range",
    ),
    Measure(
        "identity_similarity", "same person as the source\N{NO-BREAK SPACE}↑", "cosine of identity vectors, up to 1"
    ),
    Measure("psnr", "likeness to the true edit\N{NO-BREAK SPACE}↑", "PSNR", "dB"),
    Measure(
        "field_emotion",
        "shows the target emotion\N{NO-BREAK SPACE}↑",
        "to the fer package’s classifier, a weak one, where a face is found",
        "%",
    ),
    Measure(
        "field_identity",
        "same person as the source\N{NO-BREAK SPACE}↑",
        "cosine of dlib’s face features, up to 1",
    ),
    Measure(
        "field_lmd_mouth",
        "movement of the mouth\N{NO-BREAK SPACE}↓",
        "its landmarks against the source’s, in parts of the distance of the outer eye corners",
    ),
    Measure(
        "clip_emotion_accuracy",
        "shows the target emotion to CLIP\N{NO-BREAK SPACE}↑",
        "by the plain descriptions; CLIP supervised the edits, so this flatters them",
        "%",
    ),
    Measure(
        "clip_direction",
        "changes as the prompts say\N{NO-BREAK SPACE}↑",
        "cosine of CLIP’s change and the prompts’, −1 to 1; it was trained on, so this flatters too",
    ),
    Measure("change", "pixels changed", "mean absolute change of a pixel, of a range of 2"),
]
"""In the order of the table. The paired truth of drawn faces comes first, CLIP's own view after it."""

_FEWEST_FRAMES = 20  # that say whether prompts differ

_COLUMNS = {"edited": "", "unedited": "_source", "truth": "_truth"}


@dataclass(frozen=True)
class Cell:
    """One value of a table: how it reads, its 95 % interval, and whether it deserves a second look ("odd")."""

    text: str
    interval: str = ""
    kind: Literal["number", "text", "odd"] = "number"

    @classmethod
    def of(cls, value: object, interval: Sequence[float] | None = None, unit: str = "") -> Cell:
        text, kind = readable(value, unit)
        if kind != "number" or interval is None:
            return cls(text, "", kind)
        low, high = (_as_precisely(text, bound, unit) for bound in interval)
        return cls(text, f"{low} to {high}")


@dataclass(frozen=True)
class Row:
    """One measure: a cell for each column, None where there is nothing to measure."""

    name: str
    cells: list[Cell | None]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Measures by row; every row has a cell for each column."""

    columns: list[str]
    rows: list[Row]
    note: str = ""  # how to read it: how many were measured, and what the intervals are


def results_table(summary: Summary) -> Table:
    """Edited, unedited and true frames side by side: the measures that the summary has, and the columns they fill."""
    measures = [m for m in MEASURES if m.key in summary]
    columns = [name for name, end in _COLUMNS.items() if any(m.key + end in summary for m in measures)]
    rows = [Row(m.name, [_cell(summary, m.key + _COLUMNS[name], m.unit) for name in columns], m.note) for m in measures]
    note = (
        f"Means over {_counted(summary, 'edit')}. {_about_intervals(summary)} ↑ more is better, ↓ less is."
        if rows
        else ""
    )
    if "truth" in columns:
        note += " The column “truth” is the judge on the true edits: what it gets wrong by itself."
    return Table(columns, rows, note)


def prompts_table(summary: Summary) -> Table:
    """How often CLIP names the emotion of unedited frames, by each kind of prompt."""
    kinds = {
        "zero_shot_accuracy": ("plain descriptions", "CLIP as it comes"),
        "prompt_accuracy": ("personalized prompts", "each individual by their own"),
        "others_prompt_accuracy": ("somebody else’s prompts", "each individual by everybody else’s, on average"),
    }
    rows = [Row(name, [_cell(summary, key, "%")], note) for key, (name, note) in kinds.items() if key in summary]
    note = f"Rates over {_counted(summary, 'unedited frame')}. {_about_intervals(summary)}" if rows else ""
    return Table(["names the emotion"], rows, note)


def prompts_in_words(summary: Summary) -> list[str]:
    """What the prompts did for this data, a paragraph each: also where that is nothing."""
    words = [_gain_in_words(summary)] if "prompt_gain" in summary else []
    return words + ([_personal_gain_in_words(summary)] if "personal_gain" in summary else [])


def limits_in_words(summary: Summary, *, emotions: int, clip: str, drawn: bool, edited: bool) -> list[str]:
    """What these results do not say, a paragraph each.

    Args:
        summary: with the measures of `metrics.prompt_view`.
        emotions: how many there are to tell apart.
        clip: the name of the CLIP model.
        drawn: drawn faces, with paired truth, instead of real ones.
        edited: whether the run edited faces, or learned prompts alone.
    """
    words = []
    guess = 1 / emotions
    if emotions > 2 and max(summary["zero_shot_accuracy"], summary["prompt_accuracy"]) < 2 * guess:
        words.append(
            f"Guessing among {emotions} emotions is right in {_percent(guess)}: {clip} hardly sees these emotions, and "
            "no prompt can tell more than CLIP sees."
        )
    if clip == "tiny-face" and not drawn:
        words.append("tiny-face has seen drawn faces only; for real ones, give a larger CLIP with the option --clip.")
    words.append(
        "Training uses the change from one prompt to another rather than the names: how much edits gain from the "
        "prompts is not measured here; the command ablate measures it on drawn faces."
    )
    if left_out := summary.get("left_out"):
        words.append(
            f"No face was found, in the frame or in its edit, in {max(left_out.values())} of "
            f"{summary['counts']['frames']} edits: what is said of faces and landmarks is of the others."
        )
    if edited and not drawn:
        unseen = "" if "field_emotion" in summary else "whether anyone but CLIP sees the emotion, and "
        words.append(
            f"Real faces come without the true edit. So it is not measured either {unseen}whether edits keep the "
            "speech: look at the faces, and measure edited videos with the command measure."
        )
    return words


def _gain_in_words(summary: Summary) -> str:
    before, after = summary["zero_shot_accuracy"], summary["prompt_accuracy"]
    shown = f"CLIP names the emotion in {_percent(before)} of the frames by the plain descriptions"
    if abs(summary["prompt_gain"]) < 1e-6:
        return f"{shown}, and in just as many by the personalized prompts. The prompts made no difference here."
    verdict = _verdict(summary, "prompt_gain", "The prompts", "did worse here than the plain descriptions")
    return f"{shown}, and in {_percent(after)} by the personalized prompts: {verdict}"


def _personal_gain_in_words(summary: Summary) -> str:
    others = summary["others_prompt_accuracy"]
    shown = f"By the prompts of somebody else instead of one’s own it is {_percent(others)}"
    if abs(summary["personal_gain"]) < 1e-6:
        return f"{shown}, the same. Personalizing made no difference here."
    verdict = _verdict(summary, "personal_gain", "Personalizing", "did harm here")
    return f"{shown}; one’s own are worth {verdict}"


def _verdict(summary: Summary, key: str, subject: str, worse: str) -> str:
    """The difference in points with its interval, and what it means."""
    low, high = summary["intervals"][key]
    points = f"{_signed(summary[key])} points (95 % interval {_signed(low)} to {_signed(high)})."
    if summary["counts"]["frames"] < _FEWEST_FRAMES:
        return f"{points} So few frames cannot tell whether that is more than chance."
    if low <= 0 <= high:
        return f"{points} That is within chance: {subject[0].lower()}{subject[1:]} made no difference here."
    return f"{points} {subject} {'helped here' if low > 0 else worse}."


def _cell(summary: Summary, key: str, unit: str) -> Cell | None:
    if key not in summary:
        return None
    return Cell.of(summary[key], summary.get("intervals", {}).get(key), unit)


def _counted(summary: Summary, thing: str) -> str:
    counts = summary["counts"]
    people = "one individual" if counts["individuals"] == 1 else f"{counts['individuals']:,} individuals"
    return f"{counts['frames']:,} {thing}{'s' if counts['frames'] != 1 else ''} of {people}"


def _about_intervals(summary: Summary) -> str:
    if summary["intervals_over"] == "individuals":
        drawn = "resampled individuals (bootstrap)"
    else:
        drawn = "resampled frames (bootstrap), which says nothing about other individuals"
    return f"Below each mean is its 95 % interval, from {drawn}; that of a percentage covers Wilson’s, too."


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def readable(value: object, unit: str = "") -> tuple[str, Literal["number", "text", "odd"]]:
    """How a value reads, and its kind: "number", "text", or "odd" for one that deserves a second look."""
    if value is None:
        return "none", "odd"
    if isinstance(value, bool) or type(value).__name__ == "bool_" or isinstance(value, str):
        return (value if isinstance(value, str) else "yes" if value else "no"), "text"
    if isinstance(value, Integral) and not unit:
        return f"{int(value):,}".replace("-", "−"), "number"
    try:
        number = float(value)  # type: ignore[arg-type]  # whatever has __float__: NumPy and torch scalars too
    except (TypeError, ValueError):
        return str(value), "text"
    if not math.isfinite(number):
        return "NaN" if math.isnan(number) else "∞" if number > 0 else "−∞", "odd"
    if unit == "%":
        return _percent(number), "number"
    return " ".join(filter(None, [three_digits(number), unit])), "number"


def three_digits(number: float) -> str:
    """Three significant digits, but never fewer than the whole part has: 0.0123, 1.23, 12,346, 1.2e−07."""
    if number == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(number)))
    if -4 <= magnitude < 7:
        return _fixed(number, max(0, 2 - magnitude))
    return f"{number:.2e}".replace("-", "−")


def _as_precisely(text: str, bound: float, unit: str) -> str:
    """A bound of an interval with as many decimals as its value is written with."""
    if not math.isfinite(bound):
        return readable(bound)[0]
    if "e" in text or text.split()[0] == "0":
        return three_digits(bound)
    digits = len(text.split()[0].partition(".")[2])
    return _fixed(100 * bound if unit == "%" else bound, digits)


def _fixed(number: float, digits: int) -> str:
    text = f"{number:,.{digits}f}".replace("-", "−")
    return text.lstrip("−") if not text.strip("−0.,") else text  # no −0


def _percent(rate: float) -> str:
    return f"{_fixed(100 * rate, 1)} %"


def _signed(rate: float) -> str:
    text = _fixed(100 * rate, 1)
    return text if text.startswith("−") or not text.strip("0.") else f"+{text}"
