"""Named comparisons, side by side in one process: what people run, and what this library runs instead.

    python -m bench.compare text_tower stage1_step [--device cuda] [--dtype bfloat16] [--json FILE]
    python -m bench.compare --all
    python -m bench.compare --host

All sides get the same inputs. Before anything is timed their results and gradients must agree; only a disagreement, or
a side that breaks off, makes the exit status 1. Then the sides run in turns, and the table shows medians, quartiles,
the ratio to ours, peak extra memory, and the machine's limit: the bytes that must be moved divided by its measured copy
bandwidth, or the operations divided by its measured matrix-product rate, whichever is longer.

On a GPU every backend is a side of its own, and a call has two times: the device's, of a CUDA graph's replays, and the
host's, until the call has enqueued everything. What takes the device less than the host hides behind other work.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import shlex
import statistics
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import rehearsal
from bench.timing import Run, alternate, host_seconds, one_core, peak_memory, release_unused, timed, timer
from pcmecl_fast.files import write_atomically
from pcmecl_fast.ops.operator import BACKENDS, Backend

ROOT = Path(__file__).parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative error between two sides, |a − b| / |b|, by dtype: float32's leaves room for a logit scale of 100."""


@dataclass(frozen=True)
class Side:
    """One way to do the work."""

    name: str
    run: Run
    """Runs it once, forward and backward; returns the result and the gradients."""


@dataclass(frozen=True)
class Comparison:
    """Several ways to do the same work; ours is the last."""

    sides: Sequence[Side]
    moved: float = 0.0
    """Bytes that must be read and written."""
    operations: float = 0.0
    """Multiplications and additions that must be done."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Sides that do not run here, and why."""
    as_it_runs: bool = False
    """Whether a call's time on a GPU is what it takes as it runs, the host's work included, as for a training step."""


CPU_ONLY = ("csrc/cpu", "csrc/tests", "csrc/bindings.cpp", "pcmecl_fast/ops/backends/cpu")
GPU_ONLY = (
    "csrc/cuda", "csrc/tests", "kernels/", "pcmecl_fast/ops/backends/cuda/",
    "pcmecl_fast/ops/backends/triton.py",
)  # fmt: skip

Candidates = dict[str, Callable[[], Run]]
"""Sides by name, each to be built: building one may raise."""

Build = Callable[[torch.device, torch.dtype], Comparison]


@dataclass(frozen=True)
class Entry:
    """A comparison by name, with its target ratios and the files whose speed it measures."""

    build: Build
    what: str
    sources: Sequence[str]
    targets: dict[str, dict[str, float]]
    host: bool


COMPARISONS: dict[str, Entry] = {}


def comparison(
    name: str,
    what: str,
    *,
    sources: Sequence[str],
    targets: dict[str, dict[str, float]] | None = None,
    host: bool = False,
) -> Callable[[Build], Build]:
    """Register a comparison.

    Args:
        name: its name on the command line.
        what: the work, in a few words.
        sources: globs of the files whose changes make a measured result stale.
        targets: by device type and side, how many times as long as ours the side should take.
        host: whether it measures what a call costs besides arithmetic, see `bench.host_cost`.
    """

    def register(build: Build) -> Build:
        COMPARISONS[name] = Entry(build, what, sources, targets or {}, host)
        return build

    return register


@dataclass
class Row:
    """The measurements of one side."""

    comparison: str
    side: str
    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    ratio: float
    """Its median divided by ours."""
    target: float | None
    """The smallest acceptable ratio."""
    error: float
    """Largest relative error of its results and gradients against the first side's."""
    peak_mb: float
    """Peak memory in addition to the inputs."""
    limit_ms: float | None
    """The time the machine needs for the bytes or the operations alone."""
    host_us: float | None = None
    """On a GPU, how long a call keeps the host, the device being idle."""
    note: str = ""


@dataclass
class Options:
    """Compare what people run with what this library runs."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of comparisons."""
    all: bool = False
    """Every comparison."""
    host: bool = False
    """Those of what a call costs besides arithmetic, all named host_…"""
    device: str = "auto"
    """cpu or cuda; auto takes a GPU where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the inputs and the towers."""
    seconds: float = 20.0
    """Minimum time per comparison; slow sides run three times however long that takes."""
    without: tuple[str, ...] = ()
    """Sides to leave out."""
    rehearse: bool = False
    """Go through what a GPU would do on a machine without one, at tiny sizes; see bench/rehearsal.py."""
    json: Path | None = None
    """A file for the results; those of other comparisons already in it are kept."""


def main() -> int:
    options = tyro.cli(Options)
    load_all()
    names = list(COMPARISONS) if options.all else list(options.names)
    names += [name for name, entry in COMPARISONS.items() if options.host and entry.host and name not in names]
    unknown = [name for name in names if name not in COMPARISONS]
    if unknown or not names:
        print(
            f"names: takes {', '.join(COMPARISONS)}, --host or --all; got {', '.join(unknown) or 'none'}",
            file=sys.stderr,
        )
        return 2
    if options.rehearse:
        rehearsal.begin()
    kind = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device, dtype = torch.device(kind), DTYPES[options.dtype]
    lacking = BACKENDS["cpu"].missing() if kind == "cpu" else None
    if lacking is not None:
        print(f"bench.compare: ours would be the reference, without the extension: {lacking}", file=sys.stderr)
        return 1
    console, agreed = Console(), True
    if not console.is_terminal:
        console = Console(width=150)
    for name in names:
        with console.status(f"{name}: {COMPARISONS[name].what}"):
            rows, failure = _attempt(name, device, dtype, options)
        if rehearsal.is_on() and failure is None:
            print(rehearsed(name, rows, options.seconds))
        else:
            show(console, name, rows, failure)
        agreed &= failure is None
        if options.json is not None:
            keep(options.json, name, rows, failure, device, dtype)
        release_unused(device)
    return 0 if agreed else 1


def _attempt(name: str, device: torch.device, dtype: torch.dtype, options: Options) -> tuple[list[Row], str | None]:
    """`compare`; what it raises is a failure of this comparison and leaves the others their turn."""
    try:
        return compare(name, device, dtype, seconds=options.seconds, without=options.without)
    except Exception as error:
        traceback.print_exc()
        return [], f"broke off: {first_line(error)}"


def compare(
    name: str, device: torch.device, dtype: torch.dtype, *, seconds: float = 20.0, without: Sequence[str] = ()
) -> tuple[list[Row], str | None]:
    """Run one comparison, `without` some sides.

    Returns:
        Its rows, and which sides disagree with the first: those are not timed, and none is if ours is among them.
    """
    entry = COMPARISONS[name]
    work = entry.build(device, dtype)
    sides = [side for side in work.sides if side.name not in without]
    errors = errors_against_the_first(sides)
    wrong = {side: error for side, error in errors.items() if not error <= TOLERANCES[dtype]}
    failure = "; ".join(f"{side} and {sides[0].name} disagree: relative error {wrong[side]:.1e}" for side in wrong)
    sides = [side for side in sides if side.name not in wrong]
    if work.sides[-1] not in sides:
        return [], failure
    peaks = [peak_memory(side.run, device) for side in sides]
    with one_core() if entry.host else nullcontext():
        hosts = [1e6 * host_seconds(side.run) if device.type == "cuda" else None for side in sides]
        timers = [timer(side.run, device, as_it_runs=work.as_it_runs) for side in sides]
        times = [[measure()] for measure in timers] if rehearsal.is_on() else alternate(timers, seconds)
    ours = statistics.median(times[-1])
    limit = machine_limit(work, device, dtype)
    targets = entry.targets.get(device.type, {})
    rows = []
    for side, measured, peak, host in zip(sides, times, peaks, hosts, strict=True):
        middle = statistics.median(measured)
        low, high = (measured[0], measured[-1]) if len(measured) < 4 else _quartiles(measured)
        rows.append(
            Row(
                name, side.name, 1e3 * middle, 1e3 * low, 1e3 * high, len(measured), middle / ours,
                targets.get(side.name), errors[side.name], peak, limit and 1e3 * limit, host,
            )
        )  # fmt: skip
    rows[-1:-1] = [_not_run(name, side, targets.get(side), why) for side, why in work.skipped.items()]
    return rows, failure or None


def _not_run(name: str, side: str, target: float | None, why: str) -> Row:
    nan = float("nan")
    return Row(name, side, nan, nan, nan, 0, nan, target, nan, nan, None, note=f"not run: {why}")


def errors_against_the_first(sides: Sequence[Side]) -> dict[str, float]:
    """Every side's largest relative error of its results and gradients against the first side's."""
    errors = {side.name: 0.0 for side in sides}
    expected = [x.detach().clone() for x in sides[0].run()]
    for side in sides[1:]:
        errors[side.name] = max(map(relative_error, side.run(), expected), default=0.0)
    return errors


def backend_sides(run: Callable[[str], Sequence[Tensor]], device: torch.device, *operators: str) -> Candidates:
    """On a GPU a side for each backend that has kernels for these operators; `run` takes the backend's name."""
    if not rehearsal.as_on_gpu(device):
        return {}
    names = [name for name, backend in BACKENDS.items() if name not in ("reference", "cpu")]
    if rehearsal.is_on():  # where the extension of a GPU may be missing, and its kernels with it
        others = [name for name in names if not BACKENDS[name].implementations]
        names = [name for name in names if name in others or set(operators) <= set(BACKENDS[name].implementations)]
        return {f"backend={name}": lambda: partial(run, "reference") for name in names}
    able = [name for name in names if _may_run(BACKENDS[name], operators)]
    return {f"backend={name}": partial(partial, run, name) for name in able}


def those_that_run(candidates: Candidates) -> tuple[list[Side], dict[str, str]]:
    """The sides that can be built and run here, tried once, and why the others cannot."""
    sides, skipped = [], {}
    for name, build in candidates.items():
        try:
            run = build()
            run()
        except Missing as error:
            skipped[name] = str(error)
        except Exception as error:
            skipped[name] = first_line(error)
        else:
            sides.append(Side(name, run))
    return sides, skipped


class Missing(Exception):
    """Something a side needs that this machine lacks."""


def first_line(error: Exception) -> str:
    """An exception in one line of a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:110]}"


def _may_run(backend: Backend, operators: Sequence[str]) -> bool:
    """Whether it has kernels for all of these operators; a backend that was not built has none and says so itself."""
    return not backend.implementations or set(operators) <= backend.implementations.keys()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual − expected| / |expected| as vectors, in float64; infinite if either is not finite."""
    difference = (actual.detach().double() - expected.double()).norm()
    error = float(difference / expected.double().norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def machine_limit(work: Comparison, device: torch.device, dtype: torch.dtype) -> float | None:
    """Seconds that the machine needs for the bytes or for the operations alone, whichever are more; None if unknown."""
    if rehearsal.is_on() or not (work.moved or work.operations):
        return None
    return max(work.moved / copy_bandwidth(device), work.operations / product_rate(device, dtype))


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy too large for any cache."""
    source = torch.randn(1 << (26 if device.type == "cpu" else 28), device=device)
    target = torch.empty_like(source)
    best = min(timed(lambda: target.copy_(source), device) for _ in range(12))
    return 2 * source.nbytes / best


@cache
def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions per second in PyTorch's fastest large matrix product."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    products: list[Callable[[], Tensor]] = [lambda: a @ b]
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    best = min(timed(product, device) for product in products for _ in range(6))
    return 2 * size**3 / best


def count_operations(run: Callable[[], Any]) -> float:
    """Multiplications and additions of the matrix products in one call."""
    counter = FlopCounterMode(display=False)
    # PyTorch counts its own products, not oneDNN's.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.backends.mkldnn.flags(enabled=False), counter:
            run()
    return float(counter.get_total_flops())


def show(console: Console, name: str, rows: Sequence[Row], failure: str | None) -> None:
    title = f"{name}: {COMPARISONS[name].what}"
    if failure is not None:
        console.print(f"[bold red]{title}: {failure}[/]")
    if not rows:
        return
    table = Table(title=title, title_justify="left")
    with_host = any(row.host_us is not None for row in rows)
    unit, scale = ("µs", 1e3) if COMPARISONS[name].host else ("ms", 1.0)
    columns = ["side", "median", "quartiles", "runs", "÷ ours", "target", "error", "peak", "limit"]
    for column in columns + ["host"] * with_host:
        table.add_column(column, justify="left" if column == "side" else "right")
    for row in rows:
        if row.note:
            table.add_row(row.side, row.note)
            continue
        met = row.target is None or row.ratio >= row.target
        ratio = f"{row.ratio:.2f}×" if row.ratio < 10 else f"{row.ratio:.1f}×"
        limit = row.limit_ms and f"{row.limit_ms:.3g} ms, {100 * row.limit_ms / row.median_ms:.0f} %"
        cells = [
            row.side,
            f"{scale * row.median_ms:.4g} {unit}",
            f"{scale * row.low_ms:.4g}–{scale * row.high_ms:.4g}",
            str(row.runs),
            ratio if met else f"[red]{ratio}[/]",
            "" if row.target is None else f"{row.target:g}×",
            f"{row.error:.1e}",
            f"{row.peak_mb:.0f} MB",
            limit or "",
        ]
        table.add_row(*cells, *([f"{row.host_us:.0f} µs"] if row.host_us is not None else []))
    console.print(table)


def rehearsed(name: str, rows: Sequence[Row], seconds: float) -> str:
    """What a comparison would do on a GPU: its sides, the seconds of each, and what ran here in its place."""
    share = seconds / sum(not row.note for row in rows)
    lines = [f"{name}: {seconds:g} s, besides building, compiling and checking"]
    for row in rows:
        stands_in = ", here the reference" if row.side.startswith("backend=") else ""
        lines.append(f"  {row.side}: {row.note or f'{share:.1f} s{stands_in}'}")
    return "\n".join(lines)


def keep(
    path: Path, name: str, rows: Sequence[Row], failure: str | None, device: torch.device, dtype: torch.dtype
) -> None:
    """Write a comparison's results, keeping those already in the file."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results[f"{name} {str(dtype).removeprefix('torch.')}"] = {
        "what": COMPARISONS[name].what,
        "rows": [{k: v for k, v in asdict(row).items() if v == v} for row in rows],  # JSON has no NaN
        "disagreement": failure,
        "sources": sources_digest(name, "cuda" if rehearsal.as_on_gpu(device) else device.type),
        **environment(device),
    }
    write_atomically(path, (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())


def sources_digest(name: str, kind: str) -> str:
    """A hash of the files whose speed a comparison measures on a device type: if it changes, results are stale."""
    return files_digest(COMPARISONS[name].sources, kind)


def files_digest(patterns: Sequence[str], kind: str) -> str:
    """A hash of the repository's files that match any of the globs and run on "cpu" or on "cuda"."""
    elsewhere = GPU_ONLY if kind == "cpu" else CPU_ONLY
    files = sorted(
        path
        for path in {path for pattern in patterns for path in ROOT.glob(pattern)}
        if _is_source(path) and not path.relative_to(ROOT).as_posix().startswith(elsewhere)
    )
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def environment(device: torch.device) -> dict[str, Any]:
    """The command, the versions and the machine that a result belongs to."""
    return {
        "command": "python -m bench.compare " + shlex.join(sys.argv[1:]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "kind": "cuda" if rehearsal.as_on_gpu(device) else device.type,
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def load_all() -> None:
    """Import the files that register comparisons."""
    # Run with -m, this file is __main__, but they register with the module bench.compare.
    sys.modules.setdefault("bench.compare", sys.modules[__name__])
    for module in sorted(path.stem for path in Path(__file__).parent.glob("compare_*.py")):
        importlib.import_module(f"bench.{module}")
    importlib.import_module("bench.host_cost")


def _is_source(path: Path) -> bool:
    """Whether it holds what is measured; the order of the backends is what measurements lead to."""
    return path.is_file() and path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h") and path.name != "choice.py"


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def _device_name(device: torch.device) -> str:
    if rehearsal.is_on():
        return "a rehearsal without a GPU"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
