"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
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
        raise FileNotFoundError(f"path: there is no file {path}")
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
    name = os.fsdecode(os.fsencode(path.name)[:_NAMED])  # a file's name has 255 bytes at most
    return path.with_name(f".{name}.{uuid.uuid4().hex[:12]}{_UNFINISHED}")


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process was writing in a folder. Only for one who has the folder to themselves."""
    for path in list(folder.glob(f".*{_UNFINISHED}")):
        remove(path)


class MappedTensor:
    """One tensor of a safetensors file as a memory map, read by rows; it takes no memory between reads.

    Args:
        path: a file that `save_tensors` or `save_rows` wrote.
        name: the tensor.

    Attributes:
        tensor: the whole tensor, on the CPU, read-only.
    """

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

    def rows(
        self,
        index: Tensor,  # (…) int
    ) -> Tensor:
        """A copy of the rows at `index`, (*index.shape, *the tensor's other dimensions)."""
        flat = index.flatten()
        rows = self.tensor.new_empty(len(flat), *self.tensor.shape[1:])
        for part in torch.arange(len(flat)).split(128):
            rows[part] = self.tensor[flat[part]]
            # The OS may map megabytes around each row, and count them as ours until they are released.
            if hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)
        return rows.view(*index.shape, *self.tensor.shape[1:])


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
