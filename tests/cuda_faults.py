"""Faults for the CUDA kernels, to be planted one at a time: what the checked harness has to find in each.

A fault is a replacement in the text of a source. When the kernels change and a text is no longer there, `planted` says
so: plant the same fault in the new code, or another one that the same report finds.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cuda_on_host
import torch
from device_cases import WIDE_TREE, correlation, unaligned
from operators import CLIP_MEAN, Call, make

# One type alone is compiled of a changed source, float where it has it: the linker finds the others in the object of
# the unchanged one.
TYPES = re.compile(r"^(?:PCMECL_FOR\((\w+)\)|template void \w+<(\w+)>\(.*\);)$", re.MULTILINE)


@dataclass(frozen=True)
class Fault:
    name: str
    source: str
    """The file in csrc/cuda that is changed."""
    changes: dict[str, str]
    """What is replaced, each of which the file holds once, and by what."""
    call: Callable[[], Call]
    report: str
    """How the report begins, a regular expression."""
    order: str = "up"
    kernels: str = ""
    """The file that is compiled, if it is not the one that is changed."""


@dataclass(frozen=True)
class Barrier:
    source: str
    line: int  # from 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line + 1}"


def barriers() -> list[Barrier]:
    """Every barrier of the kernels."""
    sources = [*cuda_on_host.KERNELS, *sorted((cuda_on_host.CSRC / "cuda").glob("*.h"))]
    return [
        Barrier(source.name, line)
        for source in sources
        for line, text in enumerate(source.read_text().splitlines())
        if re.match(r"\s*__sync(threads|warp)\(", text)
    ]


def planted(fault: Fault, folder: Path) -> list[Path]:
    """The kernels with a fault, in a copy of csrc in `folder`."""
    text = (cuda_on_host.CSRC / "cuda" / fault.source).read_text()
    for old, new in fault.changes.items():
        if text.count(old) != 1:
            raise LookupError(
                f"the fault {fault.name!r} replaces {old!r}, which csrc/cuda/{fault.source} holds {text.count(old)} "
                "times, not once: change the fault in tests/cuda_faults.py so that it fits the kernels as they are"
            )
        text = text.replace(old, new)
    return _changed(fault.source, text, [fault.kernels or fault.source], folder)


def without(barrier: Barrier, folder: Path) -> list[Path]:
    """The kernels without a barrier, in a copy of csrc in `folder`."""
    lines = (cuda_on_host.CSRC / "cuda" / barrier.source).read_text().splitlines(keepends=True)
    del lines[barrier.line]
    in_kernels = barrier.source.endswith(".cu")
    kernels = [barrier.source] if in_kernels else [source.name for source in cuda_on_host.KERNELS]
    return _changed(barrier.source, "".join(lines), kernels, folder)


def _changed(source: str, text: str, kernels: list[str], folder: Path) -> list[Path]:
    for part in ("common", "cuda"):
        shutil.copytree(cuda_on_host.CSRC / part, folder / part)
    (folder / "cuda" / source).write_text(text)
    paths = [folder / "cuda" / name for name in kernels]
    for path in paths:
        path.write_text(_of_one_type(path.read_text()))
    return paths


def _of_one_type(text: str) -> str:
    one = "float" if any("float" in found.groups() for found in TYPES.finditer(text)) else "Half"
    return TYPES.sub(lambda found: found[0] if one in found.groups() else "", text)


unaligned_direction_loss = partial(unaligned, "direction_loss", people=2, width=16)
direction_loss = partial(make, "direction_loss", people=2, width=33)
many_individuals = partial(make, "direction_loss", batch=3, people=1100, emotions=2, width=1)
# Two tiles high and two chunks of columns wide.
frames = partial(make, "clip_frames", batch=1, height=40, width=150, size=24, mean=CLIP_MEAN)
small_frames = partial(make, "clip_frames", batch=1, height=24, width=24, size=21)  # taps that the compiler knows
tree = partial(make, "tree_attention", layout=WIDE_TREE, width=16)
half_tree = partial(tree, dtype=torch.float16)

# All that a barrier may be for.
BARRIER_CALLS = [
    frames,
    small_frames,
    partial(correlation, people=5, width=20),
    partial(correlation, people=5, width=20, emotions=9),
    partial(correlation, people=5, width=20, negatives="within"),
    partial(direction_loss, batch=70),
    many_individuals,
    tree,
    half_tree,
]

FAULTS = [
    Fault(
        "a number of a sum is overwritten while another warp reads it",
        "direction_bank.cu",
        {
            "warps_before) + up_to - count;\n    before += __shfl_sync(kAllLanes, up_to_warp, kWarpSize - 1);\n"
            "    __syncthreads();\n": (
                "warps_before) + up_to - count;\n    before += __shfl_sync(kAllLanes, up_to_warp, kWarpSize - 1);\n"
            )
        },
        many_individuals,
        "race within a (warp|block): a write .* shared memory",
    ),
    Fault(
        "a sum over warps waits for its own warp only",
        "warp.h",
        {"  __syncthreads();\n  if (warp": "  __syncwarp();\n  if (warp"},
        correlation,
        "race within a block: a read .* shared memory",
        order="down",
        kernels="correlation.cu",
    ),
    Fault(
        "lanes read what another lane wrote, after a shuffle but no __syncwarp",
        "warp.h",
        {
            "  __syncthreads();\n  if (warp": "  __shfl_sync(kAllLanes, values[0], 0);\n"
            "  values[0] = warps[warp_of_thread()];\n  __syncthreads();\n  if (warp"
        },
        correlation,
        "race within a warp: a read .* shared memory",
        kernels="correlation.cu",
    ),
    Fault(
        "the next chunk of rows overwrites one that is still read",
        "frames.cu",
        {"      }\n      __syncthreads();\n    }\n": "      }\n    }\n"},
        frames,
        "race within a warp: a (read|write) .* shared memory",
    ),
    Fault(
        "two emotions' sums have one place and two owners",
        "direction_bank.cu",
        {"* emotions + threadIdx.x] += of_sample": "* emotions + threadIdx.x / 2] += of_sample"},
        direction_loss,
        "race within a warp: .* shared memory",
    ),
    Fault(
        "an individual's runs have one row of the table",
        "direction_bank.cu",
        {"sums.write(individual, int64_t(run) + individual)": "sums.write(individual, individual)"},
        partial(direction_loss, people=1, batch=40),
        "conflict between blocks: a write .* of buffer",
    ),
    Fault(
        "two samples of a warp have one place",
        "direction_bank.cu",
        {"+ before + rank] = sample": "+ before + rank / 2] = sample"},
        partial(direction_loss, people=1, batch=40),
        "race within a warp: a write .* of buffer",
    ),
    Fault(
        "losses are added up by atomics that nobody has set to 0",
        "direction.cu",
        {"args.parts[blockIdx.x] = sums[0];": "atomicAdd(args.parts, sums[0]);"},
        direction_loss,
        "uninitialised: an atomic operation .* of buffer",
    ),
    Fault(
        "tiles overlap by a row",
        "frames.cu",
        {"int(blockIdx.y) * kRows,": "int(blockIdx.y) * (kRows - 1),"},
        frames,
        "conflict between blocks: a write",
    ),
    Fault(
        "more old columns are taken at once than there is room for",
        "frames.cu",
        {"move + columns.taps + V - 1 <= kChunk": "true"},
        partial(make, "clip_frames", batch=1, height=144, width=144, size=48, interpolation="bilinear"),
        "access outside: a read of 4 bytes .* behind the end of shared memory",
    ),
    Fault(
        "rows are taken for aligned that begin anywhere",
        "warp.h",
        {" && reinterpret_cast<uintptr_t>(pointer) % 16 == 0": ""},
        unaligned_direction_loss,
        "misaligned access: a read of 16 bytes",
        kernels="direction.cu",
    ),
    Fault(
        "a row is read to one past its end",
        "direction.cu",
        {"k < args.width; k += kWarpSize * V) f(k)": "k <= args.width; k += kWarpSize * V) f(k)"},
        partial(direction_loss, batch=1),
        "access outside: a read of 4 bytes 0 bytes behind the end of argument",
    ),
    Fault(
        "features are read from one before their beginning",
        "correlation_features.cu",
        {
            "const Features<E, V, T> features(from + k, width);": (
                "const Features<E, V, T> features(from + k - 1, width);"
            )
        },
        partial(correlation, width=13),
        "access outside: a read of 4 bytes 4 bytes before argument",
    ),
    Fault(
        "a launch asks for too little shared memory",
        "correlation.cu",
        {
            "warps * kWarpSize, 2 * warps * sizeof(float)": "warps * kWarpSize, warps * sizeof(float)",
        },
        correlation,
        "access outside: a write of 4 bytes 0 bytes behind the end of shared memory",
    ),
    Fault(
        "edits that change nothing get no gradient",
        "direction.cu",
        {"      if (args.grad_source) store(args.grad_source + sample * args.width + k, zeros);\n": ""},
        partial(direction_loss, degenerate=True),
        r"output not written: \d+ of 165 numbers of result 0",
    ),
    Fault(
        "sums in shared memory do not begin at 0",
        "direction_bank.cu",
        {"    clear();\n  }\n": "  }\n"},
        direction_loss,
        "uninitialised: a read .* of shared memory",
    ),
    Fault(
        "a length is never stored for the kernels that need it",
        "correlation_features.cu",
        {"    if (at.j >= 0) args.inv_norm_text[pair * m + at.j] = text_valid ? w : -1.0f;\n": ""},
        correlation,
        "uninitialised: a read .* of buffer",
    ),
    Fault(
        "an individual's samples are never counted",
        "direction_bank.cu",
        {
            "if (lane_of_thread() == 0) order.first[individual] = before;": (
                "if (lane_of_thread() == 0 && individual > 0) order.first[individual] = before;"
            )
        },
        direction_loss,
        "uninitialised: a read .* of buffer",
    ),
    Fault(
        "a pair's factors are kept for one of its two emotions",
        "correlation_features.cu",
        {"factors[a * emotions + b] = factors[b * emotions + a] = {": "factors[a * emotions + b] = {"},
        correlation,
        "uninitialised: a read .* of shared memory",
    ),
    Fault(
        "pairs that are not valid are added to the loss",
        "correlation.cu",
        {"      rows[v] = columns[v] = 1;\n    else\n      ++count;": "      rows[v] = columns[v] = 1;\n    ++count;"},
        correlation,
        "wrong result",
    ),
    Fault(
        "the means of a warp's last eight queries lie where those of the first do",
        "tree_attention_half.cu",
        {
            "args.means[Queries<T, V, wide>::of_lse(tile, row)] = mean[row]": (
                "args.means[Queries<T, V, wide>::of_lse(tile, 0)] = mean[row]"
            )
        },
        half_tree,
        "uninitialised: a read .* of buffer",
    ),
    Fault(
        "an individual's columns take the sums of its rows",
        "correlation_within.cu",
        {"(line.row ? inv_row_sums : inv_column_sums)[line.pair]": "inv_row_sums[line.pair]"},
        partial(correlation, negatives="within"),
        "wrong result",
    ),
    Fault(
        "rows of an individual's gradients overlap",
        "correlation_within.cu",
        {"float* to = of_rows + line.pair * emotions;": "float* to = of_rows + line.pair * (emotions - 1);"},
        partial(correlation, negatives="within"),
        "race within a (warp|block): a write .* shared memory",
    ),
    Fault(
        "a sum's mask names half of the warp",
        "warp.h",
        {"value += __shfl_xor_sync(kAllLanes, value, other)": "value += __shfl_xor_sync(0xFFFFu, value, other)"},
        direction_loss,
        "shuffle mask: lane 0 reads lane 16",
        kernels="direction.cu",
    ),
    Fault(
        "a sum's mask does not name a lane that asks",
        "warp.h",
        {"value += __shfl_xor_sync(kAllLanes, value, other)": "value += __shfl_xor_sync(0xFFFFu, value, other)"},
        direction_loss,
        "shuffle mask: lane 31 at .* is not in its own mask",
        order="down",
        kernels="direction.cu",
    ),
    Fault(
        "lanes leave a loop that shuffles when their own features end",
        "direction.cu",
        {
            "for (int64_t start = 0; start < args.width; start += kWarpSize * V) {": (
                "for (int64_t start = 0; start + lane * V < args.width; start += kWarpSize * V) {"
            )
        },
        direction_loss,
        "never arrive: lanes 1, 2, .* at warp.h",
    ),
    Fault(
        "lanes that do not count skip a shuffle and meet the others at the next",
        "direction.cu",
        {"max_over_warp(counts() ? cosine : -kInfinity)": "counts() ? max_over_warp(cosine) : -kInfinity"},
        direction_loss,
        "shuffle sites: lane",
    ),
    Fault(
        "threads beyond the picture leave before a barrier",
        "frames.cu",
        {
            "  float sums[kRowsOfThread] = {};\n": (
                "  if (own > last_column) return;\n  float sums[kRowsOfThread] = {};\n"
            )
        },
        frames,
        "never arrive: .* threads at __syncthreads",
    ),
    Fault(
        "pixels are counted on the grid's y axis",
        "frames.cu",
        {"{across, down, unsigned(planes)}": "{1, unsigned(planes) * args.rows.after * args.columns.after}"},
        partial(make, "clip_frames", batch=1, size=150),
        "launch limit: 67500 blocks in y",
    ),
    Fault(
        "a block has 2048 threads",
        "correlation_features.cu",
        {"{unsigned(args.extent.individuals())}, kThreads, 0": "{unsigned(args.extent.individuals())}, 2048, 0"},
        correlation,
        "launch limit: 2048 threads",
    ),
    Fault(
        "shared memory is asked for three axes of emotions",
        "direction_bank.cu",
        {"args.emotions * args.emotions * sizeof": "args.emotions * args.emotions * args.emotions * sizeof"},
        partial(direction_loss, emotions=32),
        "launch limit: 131072 bytes of shared memory",
    ),
    Fault(
        "a layout travels with the launch twice",
        "tree_attention.cu",
        {
            "forward_kernel(const Tree<float> args, const TreeLayout layout, float scale) {": (
                "forward_kernel(const Tree<float> args, const TreeLayout layout, const TreeLayout, float scale) {"
            ),
            "forward_kernel<vector(), part(), whole()>, grid, kThreads, 0, some, layout": (
                "forward_kernel<vector(), part(), whole()>, grid, kThreads, 0, some, layout, layout"
            ),
        },
        tree,
        "launch limit: .* bytes of arguments",
    ),
    Fault(
        "a group of lanes without a key gives the last one its weight again",
        "tree_attention.cu",
        {"at < keys.count ? exp2_fast(logit - largest) : 0.0f": "exp2_fast(seen - largest)"},
        tree,
        "wrong result",
    ),
    Fault(
        "a key's last queries lie behind the last token",
        "tree_attention.cu",
        {"query_token = at < end ? at : end - 1": "query_token = at"},
        partial(tree, people=1),
        "access outside: a read of 16 bytes",
    ),
    Fault(
        "queries of half types see what lies before their own segments",
        "tree_attention_half.cu",
        {"key >= first_own[row]": "key >= first_own[0]"},
        half_tree,
        "wrong result",
    ),
    Fault(
        "a row's features change places on their way to tensor cores",
        "tree_attention_half.cu",
        {"[2 * half], own[1].values[2 * half], ": "[2 * half + 1], own[1].values[2 * half], "},
        half_tree,
        "wrong result",
    ),
    Fault(
        "a register's halves change places in a product along the tokens",
        "tensor_cores.h",
        {"  return (first & 0xFFFF) | second << 16;": "  return (second & 0xFFFF) | first << 16;"},
        half_tree,
        "wrong result",
        kernels="tree_attention_half.cu",
    ),
    Fault(
        "a warp's last rows lie behind the last token",
        "tree_attention_half.cu",
        {"below = rows[at_most(token + group_of_lane() + 8, tokens - 1)]": "below = rows[token + group_of_lane() + 8]"},
        partial(half_tree, people=1),
        "access outside: a read of 16 bytes",
    ),
    Fault(
        "lanes without a key leave a product of the warp to the others",
        "tree_attention_half.cu",
        {"if (first + 8 * half < keys.count)": "if (first + 8 * half + group_of_lane() < keys.count)"},
        half_tree,
        "never arrive: lanes|shuffle sites",
    ),
    Fault(
        "rows of half types are taken for aligned that begin anywhere",
        "tree_attention_half.cu",
        {"aligned(args.width, args.qkv, args.out),": "args.width % 8 == 0,"},
        partial(unaligned, "tree_attention", width=16, dtype=torch.float16),
        "misaligned access: a read of 16 bytes",
    ),
    Fault(
        "keys behind the first eight get no gradient",
        "tree_attention_half.cu",
        {"if (token >= tile.layout.tokens) continue;": "if (token >= tile.layout.tokens || lower_row) continue;"},
        half_tree,
        r"output not written: \d+ of \d+ numbers of result 0",
    ),
    Fault(
        "the gradient is added up where the product is still read",
        "correlation.cu",
        {"    if constexpr (E != 0) return values[(x * E + e) * kLanes<E>];\n": ""},
        correlation,
        "wrong result",
    ),
    Fault(
        "a lane of the gradient takes its neighbours' place",
        "correlation.cu",
        {"return values[(x * E + e) * kLanes<E>];": "return values[(x * E + e) * kLanes<E> / 2];"},
        correlation,
        "race within a block: a (read|write) .* shared memory",
    ),
    Fault(
        "exponentials so small that a GPU makes them 0",
        "scale.h",
        {"ceilf(scale * kLog2e) - 100": "ceilf(scale * kLog2e)"},
        partial(correlation, scale=100.0),
        "wrong result",
        kernels="correlation.cu",
    ),
]
