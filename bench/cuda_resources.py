"""Registers, shared memory, spills and the widest loads of every CUDA kernel, read from the built extension.

    python -m bench.cuda_resources            print the tables
    python -m bench.cuda_resources --write    and put them into docs/kernels-cuda.md

Needs the extension and cuobjdump, which comes with the CUDA toolkit and with Triton's wheel; no GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pcmecl_fast.ops.backends import extension

DOCUMENT = Path(__file__).parent.parent / "docs" / "kernels-cuda.md"
BEGIN, END = "<!-- resources: begin -->", "<!-- resources: end -->"


@dataclass
class Kernel:
    """The resources one kernel uses on one architecture, and statistics of its machine code."""

    arch: str
    name: str
    registers: int
    shared: int  # bytes besides what the launch requests
    spills: int  # loads and stores of local memory
    wide_loads: int  # of 16 bytes from global memory
    loads: int  # from global memory
    tensor: int  # instructions of the tensor cores
    atomics: int  # on global memory
    code: str = field(repr=False, default="")

    def blocks(self, threads: int, shared: int = 0) -> int:
        """How many blocks of as many threads a multiprocessor of an A100 (sm_80) or H100 (sm_90) holds, with bytes of
        requested shared memory."""
        of_warp = (self.registers * 32 + 255) // 256 * 256
        by_registers = 65536 // of_warp // ((threads + 31) // 32)
        by_shared = ((164 if self.arch == "sm_80" else 228) << 10) // (shared + self.shared + 1024)
        return min(by_registers, by_shared, 2048 // threads, 32)

    def loops(self) -> list[int]:
        """The instructions of every loop, those of inner ones among them, in the order of the code.

        What only parted lanes run is none.
        """
        return [sum(begin <= at <= end for at in self._addresses()) for begin, end in self._spans()]

    def issued(self, warps: float, trips: Sequence[float], last: float | None = None) -> float:
        """Instructions of `warps` warps: everything once, and the loops, in their order, as often as said in all.

        Where `last` is given, only so many warps go on behind the last barrier.
        """
        spans = self._spans()
        assert len(spans) == len(trips), f"{self.name}: loops {self.loops()}, of which {len(trips)} are counted"
        total = 0.0
        for at in self._addresses():
            around = [
                (end - begin, times) for (begin, end), times in zip(spans, trips, strict=True) if begin <= at <= end
            ]
            total += min(around)[1] if around else warps if last is None or at <= self._last_barrier() else last
        return total

    def _last_barrier(self) -> int:
        return max(address for address, text in self._lines()[0] if "BAR.SYNC" in text)

    def issued_around(self, warps: float, trips: float) -> float:
        """The same where the longest loop that has none inside is the one that counts, and others run once a warp."""
        spans = self._spans()
        innermost = [one for one in spans if not any(one != b and one[0] <= b[0] and b[1] <= one[1] for b in spans)]
        longest = max(innermost, key=lambda span: span[1] - span[0])
        return self.issued(warps, [trips if span == longest else warps for span in spans])

    def stores_in_loop(self, number: int) -> int:
        """Instructions of a loop that write to global memory."""
        begin, end = self._spans()[number]
        return sum("STG" in text for address, text in self._lines()[0] if begin <= address <= end)

    def _addresses(self) -> list[int]:
        lines, end = self._lines()
        return [address for address, _ in lines[:end]]

    def _spans(self) -> list[tuple[int, int]]:
        """The addresses where loops begin and end."""
        lines, end = self._lines()
        # In sm_80's code a loop may also end in a conditional way out and a branch back without a condition.
        branch = re.compile(r"(?:@!?U?P\w+ )?BRA(?:\.U)?(?: !?U?P\w+,)? `?\(?(0x[0-9a-f]+)")
        found = [(branch.match(text), address) for address, text in lines[:end]]
        return [(int(target[1], 16), address) for target, address in found if target and int(target[1], 16) <= address]

    def _lines(self) -> tuple[list[tuple[int, str]], int]:
        """Addresses and instructions, and how many of them come before what only parted lanes run, or nobody."""
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+?) *;", self.code)
        lines = [(int(address, 16), text) for address, text in found]
        return lines, max(at for at, (_, text) in enumerate(lines) if text == "EXIT") + 1


def main(arguments: list[str]) -> int:
    path = extension._path(extension.CUDA_NAME)
    tool = cuobjdump()
    if path is None or tool is None:
        print("needs the built CUDA extension and cuobjdump", file=sys.stderr)
        return 1
    text = tables(read(path, tool))
    if "--write" not in arguments:
        print(text)
    else:
        write_between(BEGIN, END, text)
    return 0


def write_between(begin: str, end: str, text: str) -> None:
    before, rest = DOCUMENT.read_text().split(begin)
    _, after = rest.split(end)
    DOCUMENT.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


def cuobjdump() -> str | None:
    """The tool's path: in the toolkit, else in Triton's wheel."""
    found = shutil.which("cuobjdump")
    if found is not None:
        return found
    try:
        import triton
    except ImportError:
        return None
    inside = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(inside) if inside.exists() else None


def read(path: Path, tool: str) -> list[Kernel]:
    """Every kernel of every architecture in the file."""
    code = {(arch, name): body for arch, name, body in _functions(_output(tool, "-sass", str(path)))}
    used = _usage(_output(tool, "-res-usage", str(path)))
    names = _readable([name for _, name in code])
    kernels = []
    for (arch, name), body in sorted(code.items()):
        registers, shared = used[arch, name]
        loads = re.findall(r"\bLDG\.[A-Z0-9.]+", body)
        spills = len(re.findall(r"\b(?:LDL|STL)\b", body))
        wide = sum(".128" in load for load in loads)
        tensor = len(re.findall(r"\bHMMA\.", body))
        atomics = len(re.findall(r"\b(?:RED|ATOMG?)\.", body))
        kernels.append(Kernel(arch, names[name], registers, shared, spills, wide, len(loads), tensor, atomics, body))
    return kernels


def tables(kernels: list[Kernel]) -> str:
    """One table per architecture."""
    parts = []
    for arch in sorted({kernel.arch for kernel in kernels}):
        parts.append(f"### {arch}\n")
        parts.append("| kernel | registers | static shared memory | local loads and stores | 16-byte loads of all |")
        parts.append("| --- | --- | --- | --- | --- |")
        for kernel in kernels:
            if kernel.arch == arch:
                loads = f"{kernel.wide_loads} of {kernel.loads}"
                parts.append(f"| `{kernel.name}` | {kernel.registers} | {kernel.shared} | {kernel.spills} | {loads} |")
        parts.append("")
    return "\n".join(parts)


def _functions(sass: str) -> Iterator[tuple[str, str, str]]:
    arch = ""
    for part in re.split(r"(?=\tcode for sm_|\t\tFunction : )", sass):
        if found := re.match(r"\tcode for (sm_\w+)", part):
            arch = found[1]
        elif found := re.match(r"\t\tFunction : (\S+)", part):
            yield arch, found[1], part


def _usage(text: str) -> dict[tuple[str, str], tuple[int, int]]:
    used, arch = {}, ""
    for line in text.splitlines():
        if found := re.match(r"arch = (sm_\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif found := re.search(r"REG:(\d+) .*SHARED:(\d+)", line):
            used[arch, name] = int(found[1]), int(found[2])
    return used


def _readable(names: list[str]) -> dict[str, str]:
    """`forward_kernel<float, 4, 8>` from a mangled name; a kernel's file tells apart two with the same name."""
    if shutil.which("c++filt") is None:
        return {name: name for name in names}
    demangled = _output("c++filt", *names).splitlines()
    return {name: _short(text) for name, text in zip(names, demangled, strict=True)}


def _short(demangled: str) -> str:
    text = re.sub(r"pcmecl::(cuda::)?|\(anonymous namespace\)::|^void ", "", demangled)
    template = re.match(r"\w+(<[^(]*>)?", text)
    of = re.search(r"\((?:const )?(\w+)", text)
    return f"{template[0] if template else text} of {of[1] if of else '?'}"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
