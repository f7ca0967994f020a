"""What ranks cost and gain on this machine: `python -m bench.ranks memory|scaling`.

memory   correlation_loss of one process and of each of some ranks: memory beside its arguments, and bytes sent,
         counted beside what `ops/correlation_ranks.py` says
scaling  the same work for each of 1, 2, 4 ranks (weak scaling): a step of stage 1, of stage 2, and the feature store;
         the machine's own limit is as many processes that do it beside each other and do not talk
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from rich.console import Console
from rich.table import Table

from pcmecl_fast import load_clip, ops
from pcmecl_fast.data.features import FeatureStore
from pcmecl_fast.distributed import share
from pcmecl_fast.machine import cores
from pcmecl_fast.prompts import PromptBank, Tower
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.train import generator as stage2
from pcmecl_fast.train import prompts as stage1
from pcmecl_fast.train.config import PromptsConfig, TrainConfig

EMOTIONS, WIDTH = 7, 512


@dataclass
class Options:
    """Memory, messages and weak scaling of ranks, one thread each, with gloo."""

    what: tyro.conf.Positional[str] = "memory"
    """memory or scaling."""
    ranks: tuple[int, ...] = (1, 2, 4)
    """How many; for `memory` the last is compared with one process."""
    individuals: int = 4096
    """memory: N, over all ranks."""
    rounds: int = 5
    """scaling: rounds that are timed after two steps; medians are reported."""


def main(options: Options) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # in the ranks
    {"memory": memory, "scaling": scaling}[options.what](options)


# ---- Memory and messages ---------------------------------------------------------------------------------------------


def memory(options: Options) -> None:
    people, count = options.individuals, options.ranks[-1]
    table = Table("", "extra memory of a rank", "of one process", "sent by a rank", "predicted", "seconds")
    (alone, _, seconds), *_ = on_ranks(1, _correlation, people, False)
    table.add_row("one process", f"{alone / 2**20:.0f} MB", "", "", "", f"{seconds:.1f}")
    for overlap in (False, True):
        found = on_ranks(count, _correlation, people, overlap)
        most = max(extra for extra, _, _ in found)
        sent = max(bytes_ for _, bytes_, _ in found)
        own = people // count * EMOTIONS * WIDTH * 4  # text features, or their gradients, of a rank's individuals
        predicted = own * (2 * (count - 1) + (count if overlap else count - 1))
        table.add_row(
            f"{count} ranks, {'passed round' if overlap else 'gathered'}",
            f"{most / 2**20:.0f} MB", f"{most / alone:.2f}", f"{sent / 2**20:.1f} MB", f"{predicted / 2**20:.1f} MB",
            f"{max(s for *_, s in found):.1f}",
        )  # fmt: skip
    print(f"correlation_loss, forward and backward, {people} × {EMOTIONS} × {WIDTH} float32; one thread each")
    Console(width=130).print(table)


def _correlation(people: int, overlap: bool) -> tuple[float, int, float]:
    """Bytes of memory beside the arguments at most, bytes sent, and seconds."""
    count = dist.get_world_size()
    own = people // count
    visual, text = (torch.randn(own, EMOTIONS, WIDTH, requires_grad=True) for _ in range(2))
    group = None if count == 1 else dist.group.WORLD
    arguments: dict[str, Any] = {"group": group, "group_sizes": [own] * count if group else None, "overlap": overlap}
    small = [x[:64].detach().clone().requires_grad_() for x in (visual, text)]
    # What is loaded, and connected, once.
    ops.correlation_loss(*small, **arguments | {"group_sizes": None}).backward()
    before, began = _resident(), time.perf_counter()
    with _counted() as sent, _peak() as peak:
        ops.correlation_loss(visual, text, scale=100.0, **arguments).backward()
    return peak[0] - before, sent[0], time.perf_counter() - began


@contextlib.contextmanager
def _peak() -> Iterator[list[float]]:
    """The most memory that this process has resident in the block."""
    found = [0.0]
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    yield found
    lines = Path("/proc/self/status").read_text().splitlines()
    found[0] = next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@contextlib.contextmanager
def _counted() -> Iterator[list[int]]:
    """Bytes that this rank sends in the block, a collective counted as rings do it."""
    sent, others = [0], dist.get_world_size() - 1
    gather, exchange, send, reduce = dist.all_gather, dist.all_to_all_single, dist.isend, dist.all_reduce

    def all_gather(parts: Any, x: Any, **of: Any) -> Any:
        sent[0] += x.nbytes * others
        return gather(parts, x, **of)

    def all_to_all_single(out: Any, x: Any, into: Any, outof: Any, **of: Any) -> Any:
        sent[0] += x.nbytes - x[0].nbytes * outof[dist.get_rank()] if len(x) else 0
        return exchange(out, x, into, outof, **of)

    def all_reduce(x: Any, *rest: Any, **of: Any) -> Any:
        sent[0] += 2 * x.nbytes * others // (others + 1)
        return reduce(x, *rest, **of)

    class P2POp(dist.P2POp):
        def __new__(cls, op: Any, tensor: Any, *rest: Any, **of: Any) -> Any:
            sent[0] += tensor.nbytes if op is send else 0
            return super().__new__(cls, op, tensor, *rest, **of)

    with patch.multiple(
        dist, all_gather=all_gather, all_to_all_single=all_to_all_single, all_reduce=all_reduce, P2POp=P2POp
    ):
        yield sent


# ---- Weak scaling ----------------------------------------------------------------------------------------------------


def scaling(options: Options) -> None:
    table = Table("", *(f"{count} rank{'s' * (count > 1)}" for count in options.ranks), "the machine's limit")
    works: dict[str, Callable[[int, int], float]] = {
        "stage 1, a step": partial(_stage_1, "tiny-face", 32),
        "stage 1, a step, tower of ViT-B-32": partial(_stage_1, "ViT-B-32", 8),
        "stage 2, a step": _stage_2,
        "feature store": _store,
    }
    for name, work in works.items():
        talking, beside = [], []
        for count in options.ranks:
            talking.append(median(on_ranks(count, work, count, options.rounds)))
            beside.append(talking[0] if count == 1 else median(on_ranks(count, _each_alone, work, options.rounds)))
        cells = [f"{1000 * s:.0f} ms, {100 * talking[0] / s:.0f} %" for s in talking]
        table.add_row(name, *cells, ", ".join(f"{100 * beside[0] / s:.0f} %" for s in beside))
    print(
        f"as much work for each rank, one thread each, {cores()} cores, gloo; percentage: time of one rank over theirs"
    )
    Console(width=150).print(table)


def _each_alone(work: Callable[[int, int], float], rounds: int) -> float:
    folder = os.environ["PCMECL_BENCH_FOLDER"]
    dist.barrier()
    dist.destroy_process_group()
    try:
        return work(1, rounds)
    finally:
        dist.init_process_group("gloo", init_method=f"file://{folder}/alone-{os.getpid()}", rank=0, world_size=1)


def _stage_1(tower: str, each: int, count: int, rounds: int) -> float:
    clip = load_clip(tower, pretrained=None)
    people = each * count
    from pcmecl_fast import PersonalizedPrompts

    torch.manual_seed(0)
    prompts = PersonalizedPrompts(clip, [f"emotion {k}" for k in range(EMOTIONS)], n_ctx=8)
    optimizer = torch.optim.AdamW(prompts.parameters(), lr=1e-3)
    own = share(people) if count > 1 else slice(0, people)
    visual = torch.nn.functional.normalize(torch.randn(people, EMOTIONS, clip.embed_dim), dim=-1)[own]
    condition, mask = visual.mean(1), torch.ones(visual.shape[:2], dtype=torch.bool)
    config = PromptsConfig()
    return _seconds(
        lambda: stage1._take_step(20.0, prompts, optimizer, config, people, visual, condition, mask), rounds
    )


def _stage_2(count: int, rounds: int) -> float:
    clip = load_clip()
    data = SyntheticFaces(8, clips=1, frames_per_clip=1, size=64)
    bank = torch.nn.functional.normalize(torch.randn(8, len(data.emotions), clip.embed_dim), dim=-1)
    times: list[float] = []
    with tempfile.TemporaryDirectory() as out:
        config = TrainConfig(out=Path(out), steps=rounds + 2, batch=24 * count, strength=0.0, checkpoint_every=10_000)
        made = PromptBank(bank, data.individuals, data.emotions, tower=Tower.of(clip))
        record = stage2.Loop.record

        def timed(loop: Any, step: int, **scalars: Any) -> None:
            times.append(time.perf_counter())
            record(loop, step, **scalars)

        with patch.object(stage2.Loop, "record", timed):
            stage2.train_generator(clip, made, data, config)
    return median(b - a for a, b in itertools.pairwise(times[1:]))


def _store(count: int, rounds: int) -> float:
    clip = load_clip()
    data = SyntheticFaces(200 * count, clips=1, frames_per_clip=1, size=64)
    data.frames(torch.arange(2))
    folder = Path(os.environ["PCMECL_BENCH_FOLDER"]) / f"{count}-{os.getpid() if not dist.is_initialized() else 0}"
    began = time.perf_counter()
    FeatureStore(folder, clip)(data)
    return time.perf_counter() - began


def _seconds(step: Callable[[], object], rounds: int) -> float:
    """Of a step: the median of some rounds of ten."""
    for _ in range(2):
        step()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(10):
            step()
        times.append((time.perf_counter() - began) / 10)
    return median(times)


# ---- Processes -------------------------------------------------------------------------------------------------------


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function` returns on each of some ranks with one thread."""
    with tempfile.TemporaryDirectory() as folder:
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(_rank, (count, folder, results, function, arguments), count)
        found = dict(results.get() for _ in range(count))
    return [found[k] for k in range(count)]


def _rank(number: int, count: int, folder: str, results: Any, function: Any, arguments: Any) -> None:
    os.environ["PCMECL_BENCH_FOLDER"] = folder
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=count)
    results.put((number, function(*arguments)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
