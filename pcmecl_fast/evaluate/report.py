"""A run on one page: faces, results, what the prompts did, curves, and its origin, in a single self-contained file.

The page is for reading after a run and for sharing: no scripts, no network, light and dark, printable.
Its look is in `report.html` beside this file and its words and numbers come from `results`; the charts and pictures are
made here.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image, ImageDraw
from torch import Tensor

from pcmecl_fast.evaluate.drawing import fitted, font, wrapped, write_upwards
from pcmecl_fast.evaluate.moving import MovingFaces
from pcmecl_fast.evaluate.origin import Origin
from pcmecl_fast.evaluate.pages import data_uri, png, template, webp
from pcmecl_fast.evaluate.results import Table, readable
from pcmecl_fast.files import write_atomically


@dataclass(frozen=True)
class FaceGrid:
    """Faces edited to each emotion: a row for each of R individuals, a column for each of C target emotions.

    The source frame appears once, at the left of its row; each cell shows the edited frame, above its truth if there is
    one. `layout` says so in words. A frame that is all NaN counts as absent (the truth of an emotion that was never
    recorded) and leaves its cell empty. Frames wider than 256 pixels are shrunk to that.

    Raises:
        ValueError: a tensor's shape, or the number of labels, does not match the rows and columns.
    """

    title: str
    caption: str  # who is shown; `layout` follows it
    rows: list[str]  # R individuals
    columns: list[str]  # C target emotions
    source: Tensor  # (R, 3, S, S) in [-1, 1]
    source_emotions: list[str]  # R emotions that the source frames show
    edited: Tensor  # (R, C, 3, S, S) in [-1, 1]
    truth: Tensor | None = None  # (R, C, 3, S, S) in [-1, 1]

    def __post_init__(self) -> None:
        size = self.source.shape[-1]
        r, c = len(self.rows), len(self.columns)
        expected = {"source": (r, 3, size, size), "edited": (r, c, 3, size, size), "truth": (r, c, 3, size, size)}
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name}: got shape {tuple(tensor.shape)}, takes {shape} for {r} rows, {c} columns and "
                    f"source frames {size} wide"
                )
        if len(self.source_emotions) != r:
            raise ValueError(f"source_emotions: got {len(self.source_emotions)} labels, takes one for each of {r} rows")

    @property
    def layout(self) -> str:
        """Where to find what, in a sentence or two that fit these rows."""
        place = "Left: the source frame and the emotion that it shows."
        if self.truth is None:
            return f"{place} Right: its edit to the emotion of each column."
        return f"{place} Upper row: its edit to the emotion of each column. Lower row: the true edit."


@dataclass(frozen=True)
class Report:
    """What a report shows, in this order. Any part may be empty, and any number may be NaN, infinite or None."""

    title: str
    lead: str = ""  # one paragraph below the title
    grids: list[FaceGrid] = field(default_factory=list)
    clips: list[MovingFaces] = field(default_factory=list)
    results: Table | None = None
    prompts: Table | None = None
    words: list[str] = field(default_factory=list)  # paragraphs: what the prompts did
    changes: Table | None = None  # of each individual, how often a change finds its text
    confusion: tuple[list[str], Tensor] | None = None  # E emotions, and (E, E) frames of a row's named as a column's
    limits: list[str] = field(default_factory=list)  # paragraphs: what the numbers do not say
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # "group/name" -> (step, value)
    origin: Origin | None = None
    config: dict[str, Any] = field(default_factory=dict)  # nested; what YAML has no word for is shown as text


def write_report(path: Path, report: Report) -> None:
    """Write the report as one HTML file; if writing fails, an old file stays as it was.

    Raises:
        OSError: the file cannot be written.
    """
    page = template("report.html").render(
        title=report.title,
        lead=report.lead,
        grids=[_grid_view(grid) for grid in report.grids],
        clips=[_clip_view(clip) for clip in report.clips],
        results=_if_filled(report.results),
        prompts=_if_filled(report.prompts),
        words=report.words,
        changes=_if_filled(report.changes),
        confusion=None if report.confusion is None else _confusion(*report.confusion),
        limits=report.limits,
        groups=_chart_groups(report.curves),
        origin=report.origin,
        config=yaml.safe_dump(_plain(report.config), sort_keys=False, allow_unicode=True) if report.config else "",
    )
    # Folder names that are not valid UTF-8 reach Python as lone surrogates, which cannot be encoded.
    write_atomically(path, page.encode("utf-8", errors="replace"))


def save_grid_png(path: Path, grid: FaceGrid) -> None:
    """Write the grid as one labelled PNG picture.

    Raises:
        OSError: the file cannot be written.
    """
    write_atomically(path, png(_draw_grid(grid)))


def grid_image(grid: FaceGrid) -> Tensor:
    """The grid as one labelled picture, (3, H, W) float32 in [0, 1]: as TensorBoard's `add_image` expects."""
    return torch.from_numpy(np.array(_draw_grid(grid))).permute(2, 0, 1).float() / 255


def _if_filled(table: Table | None) -> Table | None:
    return table if table is not None and table.rows else None


def _plain(value: object) -> Any:
    """The same configuration in YAML's own types."""
    if value is None or isinstance(value, bool):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    return str(value)


# ---- Charts ----------------------------------------------------------------------------------------------------------

# Matplotlib paints with these; the page then replaces each by the style sheet's colour, light or dark.
_PAINT = {"#010101": "var(--muted)", "#020202": "var(--rule)", "#030303": "var(--accent)", "#040404": "var(--raw)"}
_MUTED, _RULE, _ACCENT, _RAW = _PAINT

_SMOOTH_FROM = 50  # points: shorter curves are easy to read unsmoothed
_MAX_POINTS = 600  # points drawn per line: about two per pixel


def _chart_groups(curves: dict[str, list[tuple[int, float]]]) -> list[dict[str, Any]]:
    """Curves grouped by their name up to the first "/"; all charts of a group share one range of steps."""
    grouped: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, points in curves.items():
        group, slash, rest = name.partition("/")
        grouped.setdefault(group if slash else "", {})[rest if slash else name] = sorted(points, key=lambda p: p[0])
    views: list[dict[str, Any]] = []
    for group, members in grouped.items():
        steps = [step for points in members.values() for step, _ in points]
        limits = (min(steps), max(steps)) if steps else (0, 0)
        charts = [
            _chart_view(name, points, limits, f"chart-{len(views)}-{i}")
            for i, (name, points) in enumerate(members.items())
        ]
        views.append({"name": group, "charts": charts})
    return views


def _chart_view(name: str, points: list[tuple[int, float]], limits: tuple[int, int], prefix: str) -> dict[str, Any]:
    steps = np.array([p[0] for p in points], dtype=float)
    values = np.array([math.nan if p[1] is None else float(p[1]) for p in points], dtype=float)
    finite = np.isfinite(values)
    # Matplotlib's axis limits overflow on the largest floats; at this height a clipped line tells the same story.
    drawn = np.where(finite, values, math.nan).clip(-1e150, 1e150)
    lost = int((~finite).sum())
    last, kind = readable(float(values[-1])) if len(values) else ("", "text")
    return {
        "name": name,
        "last": last,
        "kind": kind,
        "svg": _chart(steps, drawn, limits, prefix) if finite.any() else None,
        "lost": f"{lost:,} of {len(values):,} values not finite" if lost else "",
    }


def _chart(steps: np.ndarray, values: np.ndarray, limits: tuple[int, int], prefix: str) -> Markup:
    """One line over steps as an inline <svg>; gaps where a value is NaN."""
    figure = Figure(figsize=(2.75, 1.65), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)  # type: ignore[union-attr, call-arg]
    axes = figure.add_subplot()
    raw, smoothed = _thin(steps, values), len(values) >= _SMOOTH_FROM
    # A point beside a gap, or one of very few, may not be visible as part of a line.
    alone = np.isfinite(values) & _beside_gaps(values)
    axes.plot(*raw, color=_RAW if smoothed else _ACCENT, linewidth=0.7 if smoothed else 1.3)
    if not smoothed:
        marked = np.isfinite(values) if len(values) <= 12 else alone
        axes.plot(steps[marked], values[marked], ".", color=_ACCENT, markersize=4.5)
    else:
        axes.plot(*_thin(steps, _smooth(values)), color=_ACCENT, linewidth=1.4)
    axes.set_xlim(*(limits if limits[0] < limits[1] else (limits[0] - 1, limits[1] + 1)))
    axes.set_xlabel("step", color=_MUTED, fontsize=8.5, labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 5))
    axes.yaxis.get_offset_text().set(color=_MUTED, fontsize=7.5)
    axes.tick_params(colors=_MUTED, labelsize=8.5, length=0)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    return _inline_svg(figure, prefix)


def _beside_gaps(values: np.ndarray) -> np.ndarray:
    """Where neither neighbour is finite, so no line reaches the point."""
    padded = np.concatenate([[math.nan], values, [math.nan]])
    return ~np.isfinite(padded[:-2]) & ~np.isfinite(padded[2:])


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a twentieth of the points: no lag behind the raw line, gaps left out."""
    window = np.ones(2 * (len(values) // 40) + 1)
    finite = np.isfinite(values)
    count = np.convolve(finite, window, mode="same")
    total = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    return np.where(finite, total / np.maximum(count, 1), math.nan)


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_MAX_POINTS` points that keep every peak and trough: the minimum and maximum of each bin."""
    if len(values) <= _MAX_POINTS:
        return steps, values
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(values)), _MAX_POINTS // 2):
        if np.isfinite(values[stretch]).any():
            kept += sorted({int(stretch[np.nanargmin(values[stretch])]), int(stretch[np.nanargmax(values[stretch])])})
        else:
            kept.append(int(stretch[0]))
    return steps[kept], values[kept]


def _inline_svg(figure: Figure, prefix: str) -> Markup:
    """The figure as an element of the page: in the page's colours, with ids unique to this chart."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Text stays text, in the page's font; the fixed salt makes the output reproducible.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pcmecl_fast"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for paint, colour in _PAINT.items():
        svg = svg.replace(paint, colour)
    return Markup(svg)


def _confusion(
    emotions: list[str],
    counts: Tensor,  # (E, E)
) -> Markup:
    """Which part of each emotion's frames is named as which, a row for each emotion shown."""
    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    side = 1.4 + 0.46 * len(emotions)
    figure = Figure(figsize=(side + 0.5, side), layout="constrained")
    axes = figure.add_subplot()
    for (row, column), share in np.ndenumerate(shares):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=_ACCENT, alpha=float(share), linewidth=0))
        if share >= 0.005:
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8.5, color=_MUTED)
    ticks = range(len(emotions))
    axes.set_xticks(ticks, emotions, rotation=45, ha="right")
    axes.set_yticks(ticks, emotions)
    axes.set(xlim=(-0.5, len(emotions) - 0.5), ylim=(len(emotions) - 0.5, -0.5), aspect="equal")
    axes.set_xlabel("named, % of the row", color=_MUTED, fontsize=8.5)
    axes.set_ylabel("shown", color=_MUTED, fontsize=8.5)
    axes.tick_params(colors=_MUTED, labelsize=8.5, length=0)
    axes.spines[:].set_visible(False)
    return _inline_svg(figure, "confusion")


# ---- Faces -----------------------------------------------------------------------------------------------------------

_WIDEST = 128  # pixels of one frame on the page, and of a small one in the picture
_FINEST = 256  # pixels that are kept of a large one


def _grid_view(grid: FaceGrid) -> dict[str, Any]:
    """What the template needs from a grid: labels, and frames as data URIs (None for absent frames)."""
    rows = []
    for r, individual in enumerate(grid.rows):
        kinds = [("edited", _uris(grid.edited[r]))]
        if grid.truth is not None:
            kinds.append(("truth", _uris(grid.truth[r])))
        rows.append(
            {
                "name": individual,
                "emotion": grid.source_emotions[r],
                "source": _uris(grid.source[r : r + 1])[0],
                "kinds": kinds,
            }
        )
    return {
        "title": grid.title,
        "caption": grid.caption,
        "layout": grid.layout,
        "columns": grid.columns,
        "rows": rows,
        "same": bool(set(grid.columns) & set(grid.source_emotions)),
        "broken": any(map(_partly_broken, (grid.source, grid.edited, grid.truth))),
        "width": _shown_width(grid),
        "fine": grid.source.shape[-1] > _WIDEST,
    }


def _partly_broken(frames: Tensor | None) -> bool:
    """Whether a frame that is present has a pixel that is not finite."""
    if frames is None or frames.numel() == 0:
        return False
    pixels = frames.detach().flatten(-3)
    return bool((~pixels.isfinite().all(-1) & ~pixels.isnan().all(-1)).any())


def _uris(frames: Tensor) -> list[str | None]:
    return [None if face is None else _uri(face) for face in _pictures(frames)]


def _uri(face: Image.Image) -> str:
    return data_uri(png(face), "png") if face.width <= _WIDEST else data_uri(webp(face), "webp")


def _clip_view(clip: MovingFaces) -> dict[str, Any]:
    known = {"name": clip.name, "columns": clip.columns, "width": clip.width, "truth": clip.truth is not None}
    return known | {"uri": data_uri(clip.webp, "webp")}


def _pictures(
    frames: Tensor,  # (K, 3, S, S) in [-1, 1]
) -> list[Image.Image | None]:
    """Frames as pictures no wider than `_FINEST`: None where all is NaN, magenta where a pixel is not finite."""
    frames = frames.detach().float().cpu()
    broken = ~frames.isfinite().all(dim=1)  # (K, S, S)
    pixels = ((frames.nan_to_num(0.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    pixels[broken] = torch.tensor([255, 0, 255], dtype=torch.uint8)
    pictures: list[Image.Image | None] = []
    for frame, face in zip(frames, pixels, strict=True):
        if frame.isnan().all():
            pictures.append(None)
            continue
        picture = Image.fromarray(face.numpy())
        picture.thumbnail((_FINEST, _FINEST), Image.Resampling.LANCZOS)
        pictures.append(picture)
    return pictures


def _shown_width(grid: FaceGrid) -> int:
    """On the page."""
    return min(_drawn_width(grid), _WIDEST)


def _drawn_width(grid: FaceGrid) -> int:
    """Of small frames the largest integer multiple up to `_WIDEST`: uneven pixels would distort small features."""
    side = max(1, min(grid.source.shape[-1], _FINEST))
    return side if side > _WIDEST else _WIDEST // side * side


_INK, _PALE, _PAPER, _LINE, _MARK = "#1d2127", "#6a717c", "#ffffff", "#e2e5e9", "#2a62c9"
_MARGIN, _GAP, _ROW_GAP, _KIND_WIDTH = 16, 4, 14, 22


def _draw_grid(grid: FaceGrid) -> Image.Image:
    """The grid as a picture: title and caption, then the header, then a band for each individual."""
    width = _drawn_width(grid)
    kinds = [("edited", grid.edited)] + ([("truth", grid.truth)] if grid.truth is not None else [])
    left = _MARGIN + width + _KIND_WIDTH  # where the first column starts
    total_width = max(left + len(grid.columns) * (width + _GAP) - _GAP + _MARGIN, 3 * _WIDEST)
    title, body, small = font(20, bold=True), font(14), font(12)
    heading = wrapped(grid.title, title, total_width - 2 * _MARGIN)
    caption = wrapped(f"{grid.caption} {grid.layout}", body, total_width - 2 * _MARGIN)
    own_emotion_shown = bool(set(grid.columns) & set(grid.source_emotions))
    legend = _MARGIN + 26 * len(heading) + 4 + 20 * len(caption)
    top = legend + (20 if own_emotion_shown else 0) + 8
    # Name and emotion go below the source frame, beside the truth if there is one.
    band = max(len(kinds) * (width + _GAP), width + 40) + _ROW_GAP
    height = top + 24 + len(grid.rows) * band - (_ROW_GAP if grid.rows else 0) + _MARGIN

    picture = Image.new("RGB", (total_width, height), _PAPER)
    pen = ImageDraw.Draw(picture)
    for i, line in enumerate(heading):
        pen.text((_MARGIN, _MARGIN + 26 * i), line, _INK, title)
    for i, line in enumerate(caption):
        pen.text((_MARGIN, _MARGIN + 26 * len(heading) + 4 + 20 * i), line, _PALE, body)
    if own_emotion_shown:
        pen.rectangle([_MARGIN, legend + 3, _MARGIN + 11, legend + 14], outline=_MARK, width=2)
        pen.text((_MARGIN + 18, legend), "the source’s own emotion", _PALE, body)
    pen.text((_MARGIN + width / 2, top + 8), "source", _PALE, body, anchor="mm")
    for c, emotion in enumerate(grid.columns):
        centre = left + c * (width + _GAP) + width / 2
        pen.text((centre, top + 8), fitted(emotion, body, width), _INK, body, anchor="mm")

    for r, individual in enumerate(grid.rows):
        y = top + 24 + r * band
        if r:
            pen.line([(_MARGIN, y - _ROW_GAP / 2), (total_width - _MARGIN, y - _ROW_GAP / 2)], _LINE)
        _place(picture, _pictures(grid.source[r : r + 1])[0], _MARGIN, y, width)
        pen.text((_MARGIN, y + width + 6), fitted(individual, font(13, bold=True), width), _INK, font(13, bold=True))
        pen.text((_MARGIN, y + width + 23), fitted(grid.source_emotions[r], small, width), _PALE, small)
        for k, (kind, frames) in enumerate(kinds):
            at = y + k * (width + _GAP)
            write_upwards(picture, kind, _MARGIN + width + _KIND_WIDTH // 2, at + width // 2, ink=_PALE)
            for c, face in enumerate(_pictures(frames[r])):
                x = left + c * (width + _GAP)
                _place(picture, face, x, at, width)
                if grid.columns[c] == grid.source_emotions[r]:
                    pen.rectangle([x, at, x + width - 1, at + width - 1], outline=_MARK, width=2)
    return picture


def _place(picture: Image.Image, face: Image.Image | None, x: int, y: int, width: int) -> None:
    if face is None:
        ImageDraw.Draw(picture).rectangle([x, y, x + width - 1, y + width - 1], outline=_LINE)
    else:
        picture.paste(face.resize((width, width), Image.Resampling.NEAREST), (x, y))
