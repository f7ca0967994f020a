"""Ranks: the processes that torchrun starts, which share one piece of work and come to one result.

    torchrun --nproc-per-node 8 -m pcmecl_fast -- train …

Without torchrun there is one rank, and everything here costs nothing. The whole is PyTorch's own: gloo between CPUs,
NCCL between GPUs, torchrun's rendezvous and restarts. Three rules make the ranks' result that of one process:

- Draws come from the seed and the global step. Every rank draws all, and computes its `share`.
- Sums over individuals, samples and frames are sums over ranks before they are divided.
- One rank, the first, writes, logs and shows progress; `from_main` hands its result, or its error, to the others.

Gradients follow `torch.distributed.nn`: where all ranks return one number, a rank's gradients are those of the sum of
all ranks' numbers. The mean over ranks that DistributedDataParallel takes of them is then that of the number itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pcmecl_fast.machine import launched

log = logging.getLogger("pcmecl_fast")

Group = Any
"""A `torch.distributed.ProcessGroup`."""

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOOK = timedelta(seconds=5)  # how often a rank that waits for the first looks whether another has failed
_WORDS = 3.0  # seconds in which the ranks that are left say so

_state = {"exchanges": 0, "alone": 0}


class AnotherRankFailed(RuntimeError):
    """This rank cannot go on, and another says why."""


# ---- Ranks -----------------------------------------------------------------------------------------------------------


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _joined() else 0


def ranks() -> int:
    """How many processes share the work; 1 outside torchrun."""
    return dist.get_world_size() if _joined() else 1


def everybody() -> Group | None:
    """The group of all ranks, None where there is one."""
    return dist.group.WORLD if ranks() > 1 else None


def is_main() -> bool:
    """Whether this is the rank that writes files, logs and shows progress."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """No other ranks in this block: for what one does and the others do not, or what each does for itself."""
    _state["alone"] += 1
    try:
        yield
    finally:
        _state["alone"] -= 1


def share(count: int, *, of: int | None = None, at: int | None = None) -> slice:
    """The part of `count` things that is this rank's: contiguous, in the order of ranks, sizes differing by 1 at most.

    Args:
        count: how many things there are; there may be fewer than ranks.
        of: how many parts; by default as many as ranks.
        at: which part; by default this rank's.
    """
    parts, number = ranks() if of is None else of, rank() if at is None else at
    return slice(count * number // parts, count * (number + 1) // parts)


def shares(count: int) -> list[int]:
    """How many of `count` things each rank has."""
    each = (share(count, at=k) for k in range(ranks()))
    return [part.stop - part.start for part in each]


@contextmanager
def joined(device: str = "cpu") -> Iterator[None]:
    """Be one of the ranks that torchrun has started as long as the block runs; without torchrun, be alone.

    An error in the block ends all ranks: it is raised where it happened, and as `AnotherRankFailed` elsewhere.

    Args:
        device: what the ranks compute on: "cuda" (or "auto" where there are GPUs) talks by NCCL, and each rank takes
            the GPU of its LOCAL_RANK; everything else by gloo.

    Raises:
        ValueError: torchrun's variables are incomplete; there is no GPU for this rank.
    """
    if not launched():
        yield
        return
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise ValueError(
            f"RANK is set, {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not: start the ranks with "
            "torchrun, or unset RANK"
        )
    if ":" in device:
        raise ValueError(f"--device {device}: each rank takes the GPU of its LOCAL_RANK; give --device cuda, or cpu")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        local, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= visible:
            raise ValueError(
                f"rank {os.environ['RANK']} would take GPU {local}, and {visible} are visible here: start at most "
                f"{visible} ranks a machine (--nproc-per-node {visible}), or use --device cpu"
            )
        torch.cuda.set_device(local)
    # DDP imports this, and it would keep the group as its functions' default argument: gloo's threads would then meet
    # the end of the interpreter, and abort it now and then (seen with PyTorch 2.14).
    from torch.distributed.nn import functional  # noqa: F401

    # Gloo too where there are GPUs: a rank that sees none meets the others, and is told apart.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=_store_of_torchrun(),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    _state["exchanges"] = 0
    try:
        agree({"its kind of device (--device)": "GPU" if on_gpu else "CPU"})
        yield
        _everybody_is_here()  # the store may be the first rank's: it stays until all have read
    except BaseException as error:
        # The group is not destroyed: that could wait for those who have gone. The process is about to end.
        raise _shared_failure(error) from error
    dist.destroy_process_group()


def _store_of_torchrun() -> dist.Store:
    """The store in which ranks find each other; torchrun keeps it over restarts, with what the ranks before wrote."""
    kept_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_master=os.environ["RANK"] == "0" and not kept_by_torchrun,
        wait_for_workers=False,
    )
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _everybody_is_here() -> None:
    dist.all_reduce(torch.zeros(1))
    # The group's end waits for gloo's threads and holds the interpreter, which they may need to let go of the last
    # message: a deadlock, seen with PyTorch 2.13. Here they can.
    time.sleep(0.1)


# ---- Agreement -------------------------------------------------------------------------------------------------------


def from_main(do: Callable[[], Any]) -> Any:
    """What `do` returns, which the first rank alone calls, `alone`: JSON for the others. They wait as long as it takes.

    Raises:
        AnotherRankFailed: on the others, where it raised on the first.
    """
    if ranks() == 1:
        return do()
    key = _next_key("main")
    store = _store()
    if is_main():
        with alone():
            result = do()
        store.set(key, json.dumps(result))
        return result
    return json.loads(_awaited(key))


def agree(facts: Mapping[str, str]) -> None:
    """Refuse to compute together what is not the same: facts by the words that a message uses for them.

    Raises:
        ValueError: on the first rank, names the rank that differs, and in what; `AnotherRankFailed` on the others.
    """
    if ranks() == 1:
        return
    key = _next_key("agree")
    store = _store()
    short = {
        name: hashlib.sha256(value.encode("utf-8", "surrogateescape")).hexdigest() for name, value in facts.items()
    }
    store.set(f"{key}/{rank()}", json.dumps(short))

    count = ranks()  # of those that `compare`, alone, does not see

    def compare() -> None:
        for other in range(1, count):
            theirs = json.loads(_awaited(f"{key}/{other}"))
            differing = [name for name in short if theirs.get(name) != short[name]]
            if differing:
                raise ValueError(f"rank {other} differs from rank 0 in {', '.join(differing)}: ranks compute one thing")

    from_main(compare)


def source_hash() -> str:
    """Of this package's code: ranks that run another version would compute something else."""
    whole = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        whole.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return whole.hexdigest()


def barrier() -> None:
    """Wait until all ranks are here, however long that takes."""
    if ranks() == 1:
        return
    key = _next_key("barrier")
    _store().set(f"{key}/{rank()}", "")
    for other in range(ranks()):
        _awaited(f"{key}/{other}")


# ---- Tensors ---------------------------------------------------------------------------------------------------------


def summed(x: Tensor, group: Group | None = None) -> Tensor:
    """The sum over ranks, on each; differentiable."""
    return x if _alone(group) else _Summed.apply(x, group)


def gathered(*tensors: Tensor, sizes: Sequence[int], group: Group | None = None) -> tuple[Tensor, ...]:
    """All ranks' rows of each tensor in the order of ranks, (Σ sizes, …), in one message; differentiable.

    Args:
        tensors: this rank's rows, (sizes[rank], …).
        sizes: how many each rank has.
        group: of which ranks; by default all.
    """
    return tensors if _alone(group) else _Gathered.apply(tuple(sizes), group, *tensors)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace gradients by their means over ranks, in one message; None counts as 0."""
    if ranks() == 1:
        return
    kept = [x for x in parameters if x.requires_grad]
    for x in kept:
        if x.grad is None:
            x.grad = torch.zeros_like(x)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for x in kept:
        assert x.grad is not None
        by_dtype.setdefault(x.grad.dtype, []).append(x.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= ranks()
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def all_rows(*tensors: Tensor, sizes: Sequence[int], group: Group | None = None) -> list[Tensor]:
    """`gathered` without a gradient."""
    if len(tensors) == 1:
        return [_rows_of_all(tensors[0], sizes, group)]
    # As bytes: a message takes longer to begin than to carry a few numbers more.
    widths = [math.prod(x.shape[1:]) for x in tensors]
    as_bytes = [
        x.reshape(len(x), width).contiguous().view(torch.uint8) for x, width in zip(tensors, widths, strict=True)
    ]
    parts = _rows_of_all(torch.cat(as_bytes, 1), sizes, group).split([x.shape[1] for x in as_bytes], 1)
    return [
        part.clone(memory_format=torch.contiguous_format).view(-1).view(x.dtype).view(len(part), *x.shape[1:])
        for part, x in zip(parts, tensors, strict=True)
    ]


def _rows_of_all(x: Tensor, sizes: Sequence[int], group: Group | None) -> Tensor:
    most = max(sizes)
    # Gloo gathers equal shapes alone.
    padded = x if len(x) == most else torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded, memory_format=torch.contiguous_format) for _ in sizes]
    dist.all_gather(parts, padded.contiguous(), group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def own_rows_of_all(x: Tensor, sizes: Sequence[int], group: Group | None = None) -> Tensor:
    """This rank's rows of every rank's x, (Σ sizes, …): (ranks, sizes[rank], …)."""
    own = sizes[dist.get_rank(group)]
    received = x.new_empty(len(sizes) * own, *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), [own] * len(sizes), list(sizes), group=group)
    return received.view(len(sizes), own, *x.shape[1:])


def own_rows_of_sum(x: Tensor, sizes: Sequence[int], group: Group | None = None) -> Tensor:
    """This rank's rows of the sum of all ranks' x, (Σ sizes, …): a scatter with reduction, of unequal parts."""
    return own_rows_of_all(x, sizes, group).sum(0)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group | None) -> Tensor:
        ctx.group = group
        total = x.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sizes: tuple[int, ...], group: Group | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.sizes, ctx.group = sizes, group
        ctx.set_materialize_grads(False)
        return tuple(all_rows(*(x.detach() for x in tensors), sizes=sizes, group=group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Every rank has the same graph: where one has no gradient, none has.
        own = (None if grad is None else own_rows_of_sum(grad, ctx.sizes, ctx.group) for grad in grads)
        return None, None, *own


# ---- Failures --------------------------------------------------------------------------------------------------------


def _shared_failure(error: BaseException) -> BaseException:
    """The error as this rank is to raise it: its own, or that another has failed."""
    if isinstance(error, AnotherRankFailed):
        return error
    if not _is_of_a_collective(error):
        told = _tell_failure(error)
        return error if told is None else AnotherRankFailed(told)
    # Somebody has gone. torchrun is about to end those that are left: first let them say who they are.
    ignored = signal.signal(signal.SIGTERM, signal.SIG_IGN) if _in_main_thread() else None
    try:
        return AnotherRankFailed(_who_failed(error))
    finally:
        if ignored is not None:
            signal.signal(signal.SIGTERM, ignored)


def _is_of_a_collective(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("Connection closed by peer", "Connection reset", "gloo", "NCCL", "Broken pipe")
    )


def _who_failed(error: BaseException) -> str:
    try:
        store = _store()
        store.set(f"here/{rank()}", "")
        until = time.monotonic() + _WORDS
        while time.monotonic() < until:
            told = _failure_told()
            if told is not None:
                return told
            if all(store.check([f"here/{other}"]) for other in range(ranks())):
                break
            time.sleep(0.1)
        gone = [str(other) for other in range(ranks()) if not store.check([f"here/{other}"])]
    except RuntimeError:  # the store has gone with the first rank's machine
        return f"the other ranks cannot be reached any more ({' '.join(str(error).split())[:200]})"
    if gone:
        who = f"rank {gone[0]}" if len(gone) == 1 else f"of ranks {', '.join(gone)}, one"
        return f"{who} ended without a word: killed, or out of memory"
    return f"the ranks lost their connection ({' '.join(str(error).split())[:200]})"


def _tell_failure(error: BaseException) -> str | None:
    """Say why this rank ends; if another said so before, what it said."""
    name = "stopped" if isinstance(error, KeyboardInterrupt) else " ".join(str(error).split())
    mine = f"rank {rank()} failed: {name}"
    try:
        first = _store().compare_set("failed", "", mine).decode()
    except RuntimeError:  # the store has gone with the first rank's machine
        return None
    return None if first == mine else first


def _failure_told() -> str | None:
    store = _store()
    return store.get("failed").decode() if store.check(["failed"]) else None


def _awaited(key: str) -> str:
    """A key of the store, however long it takes, unless a rank fails meanwhile."""
    store = _store()
    while True:
        began = time.monotonic()
        try:
            store.wait([key], _LOOK)
            return store.get(key).decode()
        except RuntimeError:  # what a store raises differs; at once, it means that the store is gone
            if time.monotonic() - began < _LOOK.total_seconds() / 2:
                raise
            told = _failure_told()
        if told is not None:
            raise AnotherRankFailed(told)


def _next_key(name: str) -> str:
    """A name for the next exchange, the same on all ranks, since they come to it in one order."""
    _state["exchanges"] += 1
    return f"{name}/{_state['exchanges']}"


def _store() -> Any:
    return dist.PrefixStore("pcmecl_fast", dist.distributed_c10d._get_default_store())


def _joined() -> bool:
    return not _state["alone"] and dist.is_available() and dist.is_initialized()


def _alone(group: Group | None) -> bool:
    return not _joined() or dist.get_world_size(group) == 1


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
