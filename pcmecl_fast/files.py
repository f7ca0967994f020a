"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that a full disk or a kill at any moment leaves the old file whole.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file, if any, is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile's: it makes files that only their owner can read, whatever the umask says.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_tensors(path: str | Path, kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write one safetensors file with a JSON header that says what the tensors are; `kind` is checked on loading."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_atomically(path, save(tensors, metadata={"pcmecl_fast": kind, "header": json.dumps(header)}))


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: (tensors, header).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is broken or holds something else.
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
    return tensors, json.loads(metadata["header"])
