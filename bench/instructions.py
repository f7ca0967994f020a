"""Counts the instructions of the CPU kernels' cores and compares them with the last accepted counts.

    python -m bench.instructions            fails if a kernel's count changed by more than 3 % either way
    python -m bench.instructions --accept   writes the current counts to bench/instructions.json

Times on shared machines vary by more than any change worth seeing; valgrind's counts do not. They are for the AVX2
path, the widest that valgrind supports, and for one compiler; others have nothing to compare with and get a message.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from bench.compare import ROOT
from pcmecl_fast.files import write_atomically

ACCEPTED = ROOT / "bench" / "instructions.json"
TOLERANCE = 0.03
KERNELS = (
    "direction_forward", "direction_backward", "direction_bank",
    "correlation_centre", "correlation_forward", "correlation_backward", "frames_resize",
)  # fmt: skip
SOURCES = ("bench/native/kernels.cpp", "csrc/cpu/avx2.cpp", "csrc/cpu/portable.cpp")
FLAGS = ("-std=c++17", "-O3", "-g", "-Wno-psabi", "-Wno-unknown-pragmas")


@dataclass
class Options:
    """Count the instructions of the CPU kernels."""

    accept: bool = False
    """Save the current counts as the ones to compare with."""
    compiler: str = "c++"
    """Command of the C++ compiler."""


def main() -> int:
    options = tyro.cli(Options)
    for tool in ("valgrind", shlex.split(options.compiler)[0]):
        if shutil.which(tool) is None:
            print(f"bench.instructions: not run, there is no {tool}", file=sys.stderr)
            return 0
    compiler = _first_line(options.compiler, "--version")
    counts = count(options.compiler)
    accepted = json.loads(ACCEPTED.read_text()) if ACCEPTED.exists() else {}
    if options.accept:
        write_atomically(ACCEPTED, (json.dumps(accepted | {compiler: counts}, indent=1) + "\n").encode())
        return 0
    if compiler not in accepted:
        print(f"bench.instructions: no counts for {compiler!r} to compare with; --accept saves these", file=sys.stderr)
        return 0
    return show(counts, accepted[compiler])


def count(compiler: str) -> dict[str, int]:
    """Instructions of each kernel."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "kernels"
        sources = [str(ROOT / source) for source in SOURCES]
        subprocess.run([*shlex.split(compiler), *FLAGS, *sources, "-o", str(program)], check=True)
        return {kernel: _instructions(program, kernel) for kernel in KERNELS}


def show(counts: dict[str, int], accepted: dict[str, int]) -> int:
    table, failed = Table(title="Instructions"), False
    for column in ("kernel", "accepted", "now", "change"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for kernel, now in counts.items():
        change = now / accepted[kernel] - 1 if kernel in accepted else float("inf")
        wrong = abs(change) > TOLERANCE
        failed |= wrong
        table.add_row(
            kernel, f"{accepted.get(kernel, 0):,}", f"{now:,}", f"[red]{change:+.1%}[/]" if wrong else f"{change:+.1%}"
        )
    Console().print(table)
    if failed:
        print("More: find out why. Fewer, or intended: python -m bench.instructions --accept", file=sys.stderr)
    return int(failed)


def _instructions(program: Path, kernel: str) -> int:
    report = program.parent / "callgrind.out"
    command = [
        "valgrind", "--tool=callgrind", "--collect-atstart=no", "--toggle-collect=measured*",
        f"--callgrind-out-file={report}", str(program), kernel,
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    found = re.search(r"^(?:summary|totals): (\d+)", report.read_text(), re.MULTILINE)
    if found is None or not int(found[1]):
        raise RuntimeError(f"{kernel}: callgrind counted nothing")
    return int(found[1])


def _first_line(command: str, argument: str) -> str:
    told = subprocess.run([*shlex.split(command), argument], capture_output=True, text=True, check=True)
    return told.stdout.splitlines()[0].strip()


if __name__ == "__main__":
    sys.exit(main())
