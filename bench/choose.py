"""From a GPU's results to the order in which "auto" tries the backends there: rows for pcmecl_fast/ops/choice.py.

    python -m bench.choose FILE [FILE ...]

One row for each operator and dtype, the fastest backend first, by the device's median time. Backends whose quartiles
overlap with the fastest one's are as fast as it: those stand in a fixed order.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from bench.compare import ROOT, load_all, sources_digest

OPERATORS = ("direction_logits", "direction_loss", "correlation_loss", "tree_attention", "clip_frames")
"""The comparisons that are looked at; each has its operator's name."""
AMONG_EQUALS = ("cuda", "triton", "xformers", "reference")


@dataclass
class Options:
    """Print which backends are fastest, as rows for pcmecl_fast/ops/choice.py."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Results of `bench.compare` on GPUs."""


def main() -> int:
    options = tyro.cli(Options)
    if not options.files:
        print("files: got none; takes results of bench.compare on GPUs", file=sys.stderr)
        return 2
    load_all()
    try:
        rows = [row for path in options.files for row in choices(path)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(rows))
    return 0


def choices(path: Path) -> list[str]:
    """The rows of one file of results.

    Raises:
        ValueError: no results of `bench.compare`, those of a CPU, stale ones, sides that disagree, or of no operator.
    """
    rows = []
    for key, result in _results(path).items():
        operator, _, dtype = key.rpartition(" ")
        if operator in OPERATORS:
            _check(f"{path}: {key}", operator, result)
            rows.append(_row(path, operator, dtype, result))
    if not rows:
        raise ValueError(f"{path}: compares none of {', '.join(OPERATORS)}")
    return rows


def _results(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as results of bench.compare ({error})") from error
    if not isinstance(results, dict) or not all(isinstance(x, dict) for x in results.values()):
        raise ValueError(f"{path}: holds no results of bench.compare")
    return results


def fastest_first(rows: list[dict[str, Any]]) -> list[str]:
    """The backends of a comparison's rows, in order of their medians; equal ones in the order of `AMONG_EQUALS`."""
    timed = [row for row in rows if "median_ms" in row and _backend(row["side"])]
    groups: list[list[str]] = []
    fastest: dict[str, Any] = {}
    for row in sorted(timed, key=lambda row: row["median_ms"]):
        if not groups or row["low_ms"] > fastest["high_ms"]:
            groups.append([])
            fastest = row
        groups[-1].append(_backend(row["side"]))
    return [backend for group in groups for backend in sorted(group, key=AMONG_EQUALS.index)]


def _check(what: str, operator: str, result: dict[str, Any]) -> None:
    if result["kind"] != "cuda":
        raise ValueError(f"{what} was measured on a CPU; takes a GPU's results")
    if sources_digest(operator, "cuda") != result["sources"]:
        raise ValueError(f"{what} is stale: a file whose speed it measures has changed; measure it again")
    if result["disagreement"]:
        raise ValueError(f"{what} cannot be trusted: {result['disagreement']}")


def _row(path: Path, operator: str, dtype: str, result: dict[str, Any]) -> str:
    place = path.resolve()
    source = place.relative_to(ROOT) if place.is_relative_to(ROOT) else path
    backends = json.dumps(fastest_first(result["rows"]))[1:-1]
    measured = f"{source} {result['date']}"
    return f'Choice("{operator}", {json.dumps(result["device"])}, "{dtype}", ({backends}), {json.dumps(measured)}),'


def _backend(side: str) -> str:
    """The backend that a side ran on; "" for another library or for ours, where "auto" chose."""
    named = "backend=reference" if side == "eager" else side
    return named.removeprefix("backend=") if named.startswith("backend=") else ""


if __name__ == "__main__":
    sys.exit(main())
