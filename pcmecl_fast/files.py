"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_UNFINISHED = ".unfinished"
_NAMED = 200  # bytes of a name that its temporary one repeats
_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that a full disk or a kill at any moment leaves the old file whole.

    Raises:
        OSError: the disk is full or the folder cannot be written, and its message names the file; the old file, if
            any, is as it was.
    """
    with replacing(Path(path)) as file:
        file.write(content)


def save_tensors(path: str | Path, kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write one safetensors file with a JSON header that describes the tensors; `kind` is checked on loading."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    content = memoryview(save(tensors, metadata={"pcmecl_fast": kind, "header": json.dumps(header)}))
    numbers = 8 + int.from_bytes(content[:8], "little")
    # safetensors writes the metadata in random order; the same tensors should be the same bytes.
    entries = json.loads(bytes(content[8:numbers]))
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    with replacing(Path(path)) as file:
        file.write(_head_of(entries))
        file.write(content[numbers:])


@contextmanager
def save_rows(
    path: str | Path,
    kind: str,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    header: dict[str, Any],
) -> Iterator[Callable[[Tensor], None]]:
    """`save_tensors` for one tensor larger than memory: the function that the block gets appends rows, in order.

    Raises:
        ValueError: at the end of the block, if the rows do not add up to `shape`; the old file stays.
    """
    size = math.prod(shape) * dtype.itemsize
    entry = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [0, size]}
    metadata = {"pcmecl_fast": kind, "header": json.dumps(header)}
    head = _head_of({"__metadata__": metadata, name: entry})
    with replacing(Path(path)) as file:
        file.write(head)

        def append(rows: Tensor) -> None:
            file.write(rows.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy().data)

        yield append
        written = file.tell() - len(head)
        if written != size:
            raise ValueError(f"rows: {shape} takes {size} bytes, got {written}")


def _head_of(entries: dict[str, Any]) -> bytes:
    """The start of a safetensors file: a JSON text's length in 8 bytes, and the text, padded to a multiple of 8."""
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: (tensors, header).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is broken or holds something else.

    The tensors are memory-mapped: what is never accessed is never read.
    """
    if not Path(path).is_file():
        instead = ", it is a folder" if Path(path).is_dir() else ""
        raise FileNotFoundError(f"path: there is no file {path}{instead}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: {path} is not a whole safetensors file ({error})") from error
    if metadata.get("pcmecl_fast") != kind:
        raise ValueError(f"path: {path} holds {metadata.get('pcmecl_fast', 'something else')!r}, not {kind!r}")
    with naming_damage(path):
        header = json.loads(metadata["header"])
        if not isinstance(header, dict):
            raise ValueError(f"its header is {type(header).__name__}")
    return tensors, header


@contextmanager
def naming_damage(path: str | Path) -> Iterator[None]:
    """Whatever the content of a damaged file makes its reader trip over becomes a ValueError that names the file."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"path: {path} is damaged, or another version of pcmecl_fast wrote it ({why[:300]})"
        ) from error


def content_hash(path: str | Path) -> str:
    """What a file holds, in 16 letters: the same for every copy of it."""
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def unfinished(path: Path) -> Path:
    """A temporary name beside a path, for what takes its place when it is whole."""
    return path.with_name(f".{_repeated(path.name)}.{uuid.uuid4().hex[:12]}{_UNFINISHED}")


def _repeated(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:_NAMED])  # a file's name has 255 bytes at most


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path, *, names: Collection[str] | None = None) -> None:
    """Remove what a killed process was writing in a folder. Only for one who has it, or the names, to themselves.

    Args:
        folder: which; it may be missing.
        names: of the files that were to be written; by default whatever they are.
    """
    whose = None if names is None else {_repeated(name) for name in names}
    for path in list(folder.glob(f".*{_UNFINISHED}")):
        name = path.name[1:].rsplit(".", 2)[0]
        if whose is None or name in whose:
            remove(path)


class MappedRows:
    """The rows of a tensor that lies in safetensors files, one after the other: memory maps, empty between reads.

    Args:
        paths: files that `save_tensors` or `save_rows` wrote.
        name: the tensor, in each file.

    Attributes:
        shape, dtype: of the whole tensor.

    Raises:
        ValueError: rows of different shapes or dtypes.
    """

    def __init__(self, paths: Sequence[str | Path], name: str) -> None:
        self._files = [_MappedTensor(path, name) for path in paths]
        first, self._lengths = self._files[0].tensor, [len(file.tensor) for file in self._files]
        if any(f.tensor.shape[1:] != first.shape[1:] or f.tensor.dtype != first.dtype for f in self._files):
            raise ValueError(f"{name}: files of one tensor hold rows of different shapes or dtypes")
        self.shape, self.dtype = torch.Size([sum(self._lengths), *first.shape[1:]]), first.dtype
        self._ends = torch.tensor(self._lengths).cumsum(0)

    def whole(self, device: torch.device | str = "cpu") -> Tensor:
        """All rows: of one file on the CPU the map itself, read-only; else a copy in memory."""
        if len(self._files) == 1:
            return self._files[0].tensor.to(device)
        rows = torch.empty(self.shape, dtype=self.dtype, device=device)
        for part, file in zip(rows.split(self._lengths), self._files, strict=True):
            part.copy_(file.tensor)
            file.release()
        return rows

    def rows(
        self,
        index: Tensor,  # (…) int
    ) -> Tensor:
        """A copy of the rows at `index`, (*index.shape, *the tensor's other dimensions)."""
        flat = index.flatten()
        rows = torch.empty(len(flat), *self.shape[1:], dtype=self.dtype)
        for part in torch.arange(len(flat)).split(128):
            of_file = torch.searchsorted(self._ends, flat[part], right=True)
            for k in of_file.unique().tolist():
                here, file = part[of_file == k], self._files[k]
                rows[here] = file.tensor[flat[here] - (self._ends[k] - self._lengths[k])]
                file.release()
        return rows.view(*index.shape, *self.shape[1:])


class _MappedTensor:
    """One tensor of a safetensors file as a memory map."""

    def __init__(self, path: str | Path, name: str) -> None:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length))[name]
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # a tensor wants a writable buffer
        dtype = {name: dtype for dtype, name in _SAFETENSORS_NAMES.items()}[entry["dtype"]]
        begin, count = 8 + length + entry["data_offsets"][0], math.prod(entry["shape"])
        self.tensor = torch.empty(entry["shape"], dtype=dtype)
        if count:
            self.tensor = torch.frombuffer(self._map, dtype=dtype, offset=begin, count=count).view(entry["shape"])

    def release(self) -> None:
        """Forget what has been read: the OS may map megabytes around each row, and count them as ours until then."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file under a temporary name, which takes the old one's place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are readable only by their owner, whatever the umask.
    temporary = unfinished(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # A write that finds the disk full does not know the file's name, and others know the temporary one.
        if isinstance(error, OSError) and error.errno and error.filename in (None, temporary, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
