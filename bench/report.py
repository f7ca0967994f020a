"""Writes from bench/results/: docs/performance.md, its pictures, the README's headlines and docs/ablation.md's tables.

    python -m bench.report [--check]

No number is copied manually: the same files give the same bytes. A result whose sources have changed since it was
measured is marked as such. `--check` writes nothing and fails if something would change.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro

from bench.compare import COMPARISONS, ROOT, files_digest, load_all, sources_digest
from bench.steps import PARTS, SOURCES
from pcmecl_fast.ablation import MAIN, OF_EDITS, OF_PROMPTS
from pcmecl_fast.files import write_atomically

matplotlib.use("svg")
import matplotlib.pyplot as plt

RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs"
STALE = " ⚠"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
HEADLINES = (  # what the README says, in its order: machine, comparison, the work in words, and a second baseline
    (
        "cpu-2-cores",
        "correlation_loss float32",
        "every change against every change of 128 individuals, with backward",
        None,
    ),
    (
        "cpu-2-cores",
        "text_tower float32",
        "text features of 16 individuals × 7 emotions through ViT-B-32, with backward",
        "padded batch",
    ),
    (
        "cpu-2-cores",
        "direction_loss_edited float32",
        "the direction loss of 256 edits as stage 2 runs it, with the edited frames' gradient",
        None,
    ),
)
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#bab0ac")

_ABLATION_TABLES = {
    "People seen in training": OF_EDITS,
    "People never seen": tuple(f"unseen_{measure}" for measure in OF_EDITS),
    "The prompts alone, for people never seen": OF_PROMPTS,
}
_GENERIC_DIRECT, _PCMECL = "generic, direct", "personalized, differencing"
_IDEAS = (  # what, from, to
    ("personalizing, under direct similarity", _GENERIC_DIRECT, "personalized, direct"),
    ("personalizing, under differencing", "generic, differencing", _PCMECL),
    ("differencing, with a generic prompt", _GENERIC_DIRECT, "generic, differencing"),
    ("differencing, with personalized prompts", "personalized, direct", _PCMECL),
    ("both: PCMECL", _GENERIC_DIRECT, _PCMECL),
)

METHOD = """# What is measured, and how

This page is written by `python -m bench.report` from the files under `bench/results/`. What is marked ⚠ was measured
before one of the files that it depends on changed.

- All sides get the same inputs, random and never zero, in one process. Before anything is timed, results and gradients
  have to agree; *error* is the largest relative difference, |a − b| / |b|.
- A plain side is what a good user would write: batched, no gradients where none are needed. The *trimmed batch* and the
  *careful trainer* (bench/careful.py) also cut prompts after the longest one's EOS, which is exact, and keep what does
  not change; the *padded batch* and the *published trainer* run all 77 positions and encode every frame in every step,
  as published trainers do. The README and the table below lead with the ratio to the fastest of them.
- `stage2_step` is the trainer's own step, generator, critic and optimisers included; the plain sides are loops around
  the same networks. Where prompts follow each frame (`stage2_criterion_frames`), no bank knows them: what trees cost
  beside the image tower is the *prompt tree* of `text_tower`, 16 × 7 prompts as there, but with a backward pass that
  stage 2 leaves out, over *ours* of `image_tower`, the features of 16 frames and the frames' gradient.
- All are warm. They run in turns; times are medians, with quartiles (or the extremes of fewer than four runs).
- On a GPU a time is the device's own: CUDA graphs of the call are replayed while the device is kept busy. Training
  steps and text towers are timed as they run, the host's work included. *host* is how long a call keeps the host until
  it has enqueued everything. Each backend is a side of its own; the last side is the backend that `auto` chooses.
- *÷ ours* is a side's median over that of pcmecl_fast: above 1 we are faster, below 1 the other side is.
- *target* is the smallest ratio that this project accepts; *(short)* is beside one that was missed.
- `host_…` is what a call costs besides arithmetic, of inputs so small that a kernel has nothing to do. On a CPU
  `tree_attention` has no kernel of its own: there `cuda`'s own host code runs, compiled for the CPU, on no tree.
- *peak* is memory beyond the inputs: resident memory on a CPU, allocated memory on a GPU.
- *limit* is the time that the machine needs for the bytes alone, at its measured copy bandwidth, or for the matrix
  products alone, at the rate it was measured to multiply large matrices with PyTorch, whichever is longer; the
  percentage is how near a side comes to it. Exponentials and other arithmetic are not in it.
- CPU times are for ratios. Other work on a machine moves all sides.
- `bench/gpu.sh` measures a GPU in ten minutes and writes its files here as it goes; `bench/gpu.sh --dry-run` shows on
  any machine what it would do, and for how long. It has not been run on a GPU yet.
"""


@dataclass
class Options:
    """Write docs/performance.md, the README's headlines and the tables of docs/ablation.md from bench/results/."""

    check: bool = False
    """Write nothing; fail if something would change."""


def main() -> int:
    options = tyro.cli(Options)
    load_all()
    plt.rcParams |= {
        "svg.hashsalt": "pcmecl_fast",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    files = {path: content for path, content in pages()}
    changed = [path for path, content in files.items() if not path.exists() or path.read_bytes() != content]
    if options.check:
        print("\n".join(f"{path.relative_to(ROOT)} does not match bench/results/" for path in changed))
        return 1 if changed else 0
    for path in changed:
        write_atomically(path, files[path])
    return 0


def pages() -> Iterator[tuple[Path, bytes]]:
    """Every file generated from results, and its content."""
    parts = [METHOD, "## At a glance\n", *overview_table(), ""]
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        if not results.keys() & {"compare", "steps", "scaling"}:
            continue
        parts.append(f"## {folder.name}\n")
        if "compare" in results:
            parts += compare_section(results["compare"])
        if "steps" in results:
            picture = DOCS / "images" / f"steps-{folder.name}.svg"
            yield picture, draw_steps(results["steps"]["rows"])
            parts += steps_section(results["steps"], picture)
        if "scaling" in results:
            picture = DOCS / "images" / f"scaling-{folder.name}.svg"
            drawn, exponents = draw_scaling(results["scaling"]["points"])
            yield picture, drawn
            parts += scaling_section(results["scaling"], exponents, picture)
    yield DOCS / "performance.md", ("\n".join(parts).rstrip() + "\n").encode()
    yield ROOT / "README.md", filled(ROOT / "README.md", headlines()).encode()
    ablation = RESULTS / "ablation" / "summary.json"
    if ablation.exists():
        yield (
            DOCS / "ablation.md",
            filled(DOCS / "ablation.md", ablation_tables(json.loads(ablation.read_text()))).encode(),
        )


def compare_section(results: dict[str, Any]) -> list[str]:
    lines = []
    for key, result in results.items():
        name, dtype = key.rsplit(" ", 1)
        mark = _stale(key, result)
        lines += [f"### `{name}`, {dtype}{mark}\n", f"{result['what'][0].upper()}{result['what'][1:]}.\n"]
        if result["disagreement"]:
            lines.append(f"**The sides do not agree**: {result['disagreement']}.\n")
            continue
        with_host = any(row.get("host_us") is not None for row in result["rows"])
        lines += [
            "| side | median | quartiles | ÷ ours | target | error | peak | limit |" + " host |" * with_host,
            "|---|--:|--:|--:|--:|--:|--:|--:|" + "--:|" * with_host,
        ]
        lines += [_compare_row(row) + f" {_host(row)} |" * with_host for row in result["rows"]]
        lines += ["", f"`{result['command']}`: {_machine(result)}\n"]
    return lines


def steps_section(results: dict[str, Any], picture: Path) -> list[str]:
    mark = STALE if files_digest(SOURCES, results["kind"]) != results["sources"] else ""
    header = "| tower | stage | side | " + " | ".join(PARTS) + " | sum | peak |"
    lines = [
        f"### A training step, part by part{mark}\n",
        f"![parts of a step]({picture.relative_to(DOCS).as_posix()})\n",
    ]
    lines += [f"Milliseconds; stage 1 with {results['individuals']} individuals.\n", header]
    lines.append("|---|---|---|" + "--:|" * (len(PARTS) + 2))
    for row in results["rows"]:
        numbers = [f"{row[part]:.3g}" for part in PARTS] + [f"{sum(row[part] for part in PARTS):.4g}"]
        names = [row["tower"], row["stage"], row["side"]]
        lines.append("| " + " | ".join([*names, *numbers, f"{row['peak_mb']:.0f} MB"]) + " |")
    return [*lines, "", f"`{results['command']}`: {_machine(results)}\n"]


def scaling_section(results: dict[str, Any], exponents: dict[str, str], picture: Path) -> list[str]:
    mark = STALE if files_digest(SOURCES, results["kind"]) != results["sources"] else ""
    lines = [f"### How cost grows{mark}\n", f"![growth]({picture.relative_to(DOCS).as_posix()})\n"]
    lines += ["Exponents are fitted to the larger half of each curve.\n", "| work | side | time grows as | memory as |"]
    lines.append("|---|---|---|---|")
    lines += [f"| {key} | {value} |" for key, value in exponents.items()]
    return [*lines, "", f"`{results['command']}`: {_machine(results)}\n", *_measured_apart(results["points"])]


def _measured_apart(points: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each curve with points from a different run than the rest of the file."""
    apart = [point for point in points if "measured" in point]
    lines = []
    for (name, grows, when), group in groupby(apart, lambda p: (p["name"], p["grows"], p["measured"])):
        sizes = ", ".join(f"{point['size']:,}" for point in group)
        lines.append(f"{name} with {sizes} {grows} was measured on {when}.\n")
    return lines


def filled(page: Path, lines: Sequence[str]) -> str:
    """The page with the text between its markers replaced."""
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page.name}: lacks the markers {BEGIN} and {END}")
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + rest.split(END)[1]


def headlines() -> list[str]:
    """The README's three ratios, each against the fastest of the other sides."""
    return [_headline(*headline) for headline in HEADLINES]


def overview_table() -> list[str]:
    """Every comparison: the fastest of the other sides first, then those that have a target."""
    lines = ["| what | against | faster by | memory | measured on |", "|---|---|--:|--:|---|"]
    for folder in sorted(path for path in RESULTS.iterdir() if (path / "compare.json").exists()):
        for key, result in json.loads((folder / "compare.json").read_text()).items():
            lines += _overview_rows(key, result, folder.name)
    return lines


def ablation_tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each regime, every measure of every supervision, and what each idea changes."""
    lines: list[str] = []
    for regime, group in groupby(rows, lambda row: row["regime"]):
        own = list(group)
        named = {row["supervision"]: row for row in own}
        lines += ["", f"### Regime: {regime}", ""]
        for people, measures in _ABLATION_TABLES.items():
            lines += [f"{people}; mean ± standard error over seeds:", ""]
            lines += _table(
                "supervision (seeds)",
                measures,
                {f"{k} ({row['seeds']})": [_mean_and_sem(row[m]) for m in measures] for k, row in named.items()},
            )
        ideas = {idea: (named[before], named[after]) for idea, before, after in _IDEAS}
        main = {supervision.name for supervision in MAIN}
        ideas |= {f"PCMECL with {k}": (named[_PCMECL], row) for k, row in named.items() if k not in main}
        lines += [
            "What each idea changes; people seen in training, mean ± standard error of the seeds' differences:",
            "",
        ]
        lines += _table(
            "idea (seeds)",
            OF_EDITS,
            {
                f"{k} ({min(a['seeds'], b['seeds'])})": [_difference(a[m], b[m]) for m in OF_EDITS]
                for k, (a, b) in ideas.items()
            },
        )
    return lines


def _table(first: str, measures: Sequence[str], rows: dict[str, list[str]]) -> list[str]:
    names = [measure.removeprefix("unseen_").replace("_", " ") for measure in measures]
    lines = ["| " + " | ".join([first, *names]) + " |", "|---|" + "--:|" * len(names)]
    return lines + ["| " + " | ".join([name, *cells]) + " |" for name, cells in rows.items()] + [""]


def draw_steps(rows: Sequence[dict[str, Any]]) -> bytes:
    """One panel per tower: a bar for each stage and side, its parts stacked."""
    towers = list(dict.fromkeys(row["tower"] for row in rows))
    figure, axes = plt.subplots(1, len(towers), figsize=(3.6 * len(towers), 3.4), layout="constrained", squeeze=False)
    for axis, tower in zip(axes[0], towers, strict=True):
        own = [row for row in rows if row["tower"] == tower]
        labels = [f"{row['stage']}\n{row['side'].replace(' trainer', '')}" for row in own]
        bottom = np.zeros(len(own))
        for part, colour in zip(PARTS, COLOURS, strict=True):
            heights = np.array([row[part] / 1e3 for row in own])
            axis.bar(labels, heights, 0.7, bottom=bottom, label=part, color=colour)
            bottom += heights
        axis.bar_label(axis.containers[-1], [f"{total:.3g} s" for total in bottom], padding=2)
        axis.set(title=tower, ylabel="seconds" if tower == towers[0] else "")
        axis.tick_params(axis="x", labelsize=7)
        axis.margins(y=0.1)
    axes[0][-1].legend(frameon=False)
    return _svg(figure)


def draw_scaling(points: Sequence[dict[str, Any]]) -> tuple[bytes, dict[str, str]]:
    """Time and memory against size, one column per series, on logarithmic axes; and the exponents."""

    def panel(point: dict[str, Any]) -> tuple[str, str]:
        return point["name"], point["grows"]

    panels = [(key, list(group)) for key, group in groupby(sorted(points, key=panel), panel)]
    figure, axes = plt.subplots(2, len(panels), figsize=(2.7 * len(panels), 4.6), layout="constrained", squeeze=False)
    exponents = {}
    for column, ((name, grows), own) in enumerate(panels):
        for side, colour in (("reference", COLOURS[1]), ("pcmecl_fast", COLOURS[0])):
            curve = sorted((p for p in own if p["side"] == side), key=lambda p: p["size"])
            if not curve:
                continue
            sizes = [p["size"] for p in curve]
            for axis, measure in zip(axes[:, column], ("median_ms", "peak_mb"), strict=True):
                values = [max(p.get(measure, math.nan), 1e-3) for p in curve]
                axis.loglog(sizes, values, "o-", color=colour, label=side, markersize=3)
            # A few microseconds are call overhead, and less than a megabyte is the allocator's.
            kept = (("median_ms", 0.02), ("peak_mb", 0.5))
            fits = [_exponent(sizes, [p.get(m, math.nan) for p in curve], least) for m, least in kept]
            exponents[f"{name} with {grows} | {side}"] = " | ".join(fits)
        sizes = sorted({p["size"] for p in own})
        shown = sizes[:: 1 + len(sizes) // 5]
        for axis in axes[:, column]:
            axis.set_xticks(shown, [f"{size:,}" for size in shown], fontsize=7)
            axis.minorticks_off()
        axes[0, column].set(title=f"{name}", ylabel="ms" if not column else "")
        axes[1, column].set(xlabel=grows, ylabel="MB beside inputs" if not column else "")
    axes[0, 0].legend(frameon=False)
    return _svg(figure), exponents


def _exponent(sizes: Sequence[int], values: Sequence[float], least: float) -> str:
    half = max(0, min(len(sizes) // 2, len(sizes) - 2))
    kept = [(s, v) for s, v in zip(sizes[half:], values[half:], strict=True) if v >= least]
    if len(kept) < 2:
        return "–"
    slope = np.polyfit(np.log([s for s, _ in kept]), np.log([v for _, v in kept]), 1)[0]
    return f"size^{slope:.2f}"


def _compare_row(row: dict[str, Any]) -> str:
    if row["note"]:
        return f"| {row['side']} | {row['note']} | | | | | | |"
    limit = ""
    if row["limit_ms"]:
        limit = f"{row['limit_ms']:.3g} ms, {100 * row['limit_ms'] / row['median_ms']:.0f} %"
    peak = f"{row['peak_mb']:.0f} MB" if "peak_mb" in row else ""
    target = "" if row["target"] is None else f"≥ {row['target']:g}×"
    short = " (short)" if row["target"] is not None and row["ratio"] < row["target"] else ""
    cells = (
        row["side"], f"{row['median_ms']:.4g} ms", f"{row['low_ms']:.4g}–{row['high_ms']:.4g}",
        f"{_ratio(row['ratio'])}{short}", target, f"{row['error']:.0e}", peak, limit,
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _host(row: dict[str, Any]) -> str:
    """How long the call keeps the host; files from before this was measured have no such figure."""
    return "" if row.get("host_us") is None else f"{row['host_us']:.0f} µs"


def _headline(machine: str, key: str, work: str, second: str | None) -> str:
    result = json.loads((RESULTS / machine / "compare.json").read_text())[key]
    if result["disagreement"]:
        raise ValueError(f"{machine}, {key}: is a headline of the README, and the sides do not agree")
    *others, ours = [row for row in result["rows"] if not row["note"]]
    best = _fastest(others, ours["side"])
    if best is None:
        raise ValueError(f"{machine}, {key}: is a headline of the README, and no other side ran")
    saved = f", {best['peak_mb']:.0f} → {ours['peak_mb']:.0f} MB" if best["peak_mb"] > 2 * ours["peak_mb"] else ""
    also = next((row for row in others if row["side"] == second and row is not best), None)
    beside = "" if also is None else f" ({_ratio(also['ratio'])} {_called(also['side'])}, {also['peak_mb']:.0f} MB)"
    return (
        f"- **{_ratio(best['ratio'])}** as fast as {_called(best['side'])}{saved}{beside}: {work}{_stale(key, result)}"
    )


def _called(side: str) -> str:
    """A side in a sentence."""
    if side == "torch.compile":
        return "`torch.compile`"
    return "the " + side.replace(", torch.compile", " through `torch.compile`")


def _stale(key: str, result: dict[str, Any]) -> str:
    name = key.rsplit(" ", 1)[0]
    return STALE if name in COMPARISONS and sources_digest(name, result["kind"]) != result["sources"] else ""


def _overview_rows(key: str, result: dict[str, Any], machine: str) -> list[str]:
    """The fastest of the other sides, then those that have a target."""
    if result["disagreement"] or key.startswith("host_"):
        return []
    mark = _stale(key, result)
    *others, ours = result["rows"]
    timed = [row for row in others if not row["note"]]
    best = _fastest(timed, ours["side"])
    lines = []
    for row in sorted(timed, key=lambda row: row["ratio"]):
        if row is best or row["target"] is not None:
            memory = f"{row['peak_mb']:.0f} → {ours['peak_mb']:.0f} MB" if "peak_mb" in ours else ""
            lines.append(f"| {result['what']}{mark} | {row['side']} | {_ratio(row['ratio'])} | {memory} | {machine} |")
    return lines


def _fastest(others: Sequence[dict[str, Any]], ours: str) -> dict[str, Any] | None:
    """The fastest of the sides that are not this project's own: a backend, or a variant named after our side."""
    plain = [row for row in others if not row["side"].startswith(("backend=", ours + ","))]
    return min(plain, key=lambda row: row["ratio"], default=None)


def _mean_and_sem(value: dict[str, Any]) -> str:
    return f"{value['mean']:.3f}" + ("" if value["sem"] is None else f" ± {value['sem']:.3f}")


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Paired by seed: data and people are the same on both sides. One of them may have more seeds."""
    change = np.array([b - a for a, b in zip(before["values"], after["values"], strict=False)])
    if len(change) < 2:
        return f"{change.mean():+.4f}"
    return f"{change.mean():+.4f} ± {change.std(ddof=1) / math.sqrt(len(change)):.4f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}×" if value < 10 else f"{value:.1f}×"


def _machine(result: dict[str, Any]) -> str:
    threads = f"{result['threads']} threads, " if "cuda" not in result["command"] else ""
    return f"{result['device']}, {threads}torch {result['torch']}, Python {result['python']}, {result['date']}"


def _svg(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
