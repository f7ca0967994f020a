"""A bank that ranks write together: each a part of its rows, in files of its own, never gathered in one memory.

    bank.safetensors                                     emotions, tower, and which files hold the rows: no features
    bank-00001-of-00004-5d2c9f0a1b3c4d5e.safetensors     a bank of its own, of the first quarter of the individuals
    …

The last word of a part's name is a hash of all that its rows are made from. So a part is never written over by another
bank's, a build that was ended finds what is whole, and `bank.safetensors`, which takes its place when all parts are
there, names one bank at any moment, the old or the new.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcmecl_fast.distributed import all_rows, barrier, from_main, ranks, share, shares
from pcmecl_fast.files import load_tensors, save_rows, save_tensors

FILES = "files"
"""In the header of a bank without rows of its own: the names of the files that have them, and how many each has."""

_MOST_BYTES = 2**30  # of a part: what a build that is ended loses at most on each rank


def write_parts(
    path: Path,
    header: dict[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rows: Callable[[range], Iterable[Tensor]],
    *,
    prompts: nn.Module,
    conditions: Callable[[range], Iterable[Tensor]],
) -> None:
    """Write a bank; called on all ranks, each of which computes a contiguous part of the rows.

    Args:
        path: of the bank, in a folder that all ranks see.
        header: of the whole bank, as `PromptBank.save` writes it.
        shape: of its features, (N, E, D).
        dtype: of its features.
        rows: computes the rows of a range, some at a time.
        prompts: the module that computes them.
        conditions: what the rows of a range are computed from, some at a time; read once for the parts' names.

    Raises:
        FileNotFoundError: on the first rank, a part that another has written is not to be seen.
    """
    parts = _count_parts(shape, dtype)
    base = _hash_of(prompts, dtype)
    hashes = []
    for number in range(parts)[share(parts)]:
        which = range(shape[0])[share(shape[0], of=parts, at=number)]
        about = header | {"individuals": header["individuals"][which.start : which.stop]}
        hashes.append(_extended(base, about, conditions(which)))
        file = path.with_name(_name(path, number, parts, hashes[-1]))
        size = (len(which), *shape[1:])
        if not _is_whole(file, size, dtype):
            with save_rows(file, "bank", "features", size, dtype, about) as append:
                for some in rows(which):
                    append(some)
    barrier()
    device = next(prompts.parameters()).device
    (every,) = all_rows(torch.tensor(hashes, dtype=torch.int64, device=device), sizes=shares(parts))
    names = [_name(path, number, parts, each) for number, each in enumerate(every.tolist())]
    lengths = [len(range(shape[0])[share(shape[0], of=parts, at=number)]) for number in range(parts)]
    from_main(partial(_publish, path, header, list(zip(names, lengths, strict=True))))


def files_of(path: Path, header: dict[str, Any]) -> tuple[list[Path], list[str]]:
    """The files with a bank's rows, and its individuals.

    Args:
        path: the bank, which may have its rows itself.
        header: its header.

    Raises:
        FileNotFoundError: a part is gone.
        ValueError: a part is broken, or of another bank.
    """
    if FILES not in header:
        return [path], header["individuals"]
    files, individuals = [], []
    for name, length in header[FILES]:
        if not _pattern(path).fullmatch(name):
            raise ValueError(f"a file {name!r} that is not a part of it")
        files.append(path.with_name(name))
        tensors, about = load_tensors(files[-1], "bank")
        here = about.pop("individuals")
        if about != {key: value for key, value in header.items() if key != FILES}:
            raise ValueError(f"{name} is a part of another bank")
        if not len(here) == len(tensors["features"]) == length:
            raise ValueError(f"{name} holds {len(here)} individuals instead of {length}")
        individuals += here
    return files, individuals


def remove_files(path: Path, *, keep: Collection[str] = ()) -> None:
    """Remove the parts of the banks that were at a path before, but for the named ones."""
    for file in path.parent.glob(f"{glob.escape(path.stem)}-*-of-*"):
        if _pattern(path).fullmatch(file.name) and file.name not in keep:
            file.unlink(missing_ok=True)


def _count_parts(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """As many for each rank, so that all end at once."""
    size = torch.Size(shape).numel() * dtype.itemsize
    each = max(1, -(-size // (ranks() * _MOST_BYTES)))
    return max(1, min(ranks() * each, shape[0]))


def _hash_of(prompts: nn.Module, dtype: torch.dtype) -> hashlib.blake2b:
    digest = hashlib.blake2b(str(dtype).encode(), digest_size=8)
    for name, value in prompts.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    return digest


def _extended(base: hashlib.blake2b, about: dict[str, Any], conditions: Iterable[Tensor]) -> int:
    digest = base.copy()
    digest.update(json.dumps(about).encode())
    for some in conditions:
        digest.update(_bytes(some))
    return int.from_bytes(digest.digest(), "big", signed=True)  # as a tensor holds it


def _bytes(x: Tensor) -> memoryview:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _name(path: Path, number: int, parts: int, digest: int) -> str:
    return f"{path.stem}-{number + 1:05d}-of-{parts:05d}-{digest % 2**64:016x}{path.suffix}"


def _pattern(path: Path) -> re.Pattern[str]:
    return re.compile(rf"{re.escape(path.stem)}-\d{{5}}-of-\d{{5}}-[0-9a-f]{{16}}{re.escape(path.suffix)}")


def _is_whole(file: Path, size: tuple[int, ...], dtype: torch.dtype) -> bool:
    try:
        features = load_tensors(file, "bank")[0]["features"]
    except (FileNotFoundError, ValueError, KeyError):
        return False
    return features.shape == size and features.dtype == dtype


def _publish(path: Path, header: dict[str, Any], files: list[tuple[str, int]]) -> None:
    """All parts are there: name them in the bank's file, and remove those of an older one."""
    names = [name for name, _ in files]
    for name in names:
        if not path.with_name(name).is_file():
            raise FileNotFoundError(
                f"path: another rank has written {name}, which is not to be seen here in {path.parent}: ranks that "
                "build a bank together take one folder that all of them see"
            )
    about = {key: value for key, value in header.items() if key != "individuals"}
    save_tensors(path, "bank", {}, about | {FILES: files})
    remove_files(path, keep=names)
