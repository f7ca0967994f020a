"""What has been measured, clip by clip, kept as it is made: a killed command goes on, and gives the same numbers.

    <out>/measures.jsonl                  a head, then one clip a line; a line without its end is not read
    <out>/features/<stamp>.safetensors    a clip's features, by which groups are compared

A record carries the stamp of all that it depends on. One with another stamp is not read, and its clip measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcmecl_fast.evaluate.field.meter import Result
from pcmecl_fast.files import load_tensors, naming_damage, save_tensors, write_atomically

RECORDS = "measures.jsonl"
FEATURES = "features"

_HEAD = {"pcmecl_fast": "measures", "version": 1}
_KIND = "features"
_CODEC = ("utf-8", "surrogateescape")  # names of files need not be valid UTF-8


def stamp_of(parts: Iterable[object], files: Iterable[Path]) -> str:
    """What changes when any of the parts does, or the size or time stamp of a file."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(f"{part}\n".encode(*_CODEC))
    for path in files:
        stat = path.stat()
        digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode(*_CODEC))
    return digest.hexdigest()


class Records:
    """The records of a folder: those that still hold are there when it is opened, and new ones are appended.

    Args:
        out: the folder.
        stamps: of every clip that is to be measured, by its key.

    Raises:
        ValueError: the file of records is damaged, or another version's.
        OSError: the folder cannot be written.
    """

    def __init__(self, out: Path, stamps: dict[str, str]) -> None:
        self._path, self._features, self._stamps = out / RECORDS, out / FEATURES, stamps
        self._results: dict[str, Result] = {}
        lines = [json.dumps(_HEAD)]
        for record in _read(self._path):
            key = record["key"]
            if stamps.get(key) == record["stamp"] and (not record["features"] or self._file(key).is_file()):
                self._results[key] = _result(record["result"])
                lines.append(_line(record))
        write_atomically(self._path, "".join(f"{line}\n" for line in lines).encode(*_CODEC))
        self._open = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def __getitem__(self, key: str) -> Result:
        """A clip's result; its features are read by `features` alone."""
        return self._results[key]

    def add(self, key: str, result: Result) -> None:
        """Keep a clip's result; its features are whole before its line is written."""
        features, result.features = result.features, {}
        if features:
            tensors = {name: torch.from_numpy(rows) for name, rows in features.items()}
            save_tensors(self._file(key), _KIND, tensors, {})
        record = {"key": key, "stamp": self._stamps[key], "features": bool(features), "result": _plain(result)}
        line = f"{_line(record)}\n".encode(*_CODEC)
        if self._open.write(line) != len(line):
            raise OSError(28, "No space left on device", str(self._path))
        self._results[key] = result

    def features(self, key: str, network: str) -> Tensor | None:
        """A clip's features of a network, (n, D); None where it has none."""
        path = self._file(key)
        return load_tensors(path, _KIND)[0].get(network) if path.is_file() else None

    def close(self) -> None:
        self._open.close()

    def remove_stale(self) -> None:
        """Remove features that no record has any more."""
        kept = {self._file(key).name for key in self._results}
        for path in self._features.glob("*.safetensors"):
            if path.name not in kept:
                path.unlink()

    def _file(self, key: str) -> Path:
        # Of the stamp, so that features of what has changed are never taken for the new ones.
        return self._features / f"{stamp_of([key, self._stamps[key]], ())}.safetensors"


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with open(path, encoding=_CODEC[0], errors=_CODEC[1], newline="\n") as file:
        lines = [line for line in file if line.endswith("\n")]
    with naming_damage(path):
        if not lines or json.loads(lines[0]) != _HEAD:
            raise ValueError(f"its first line is not that of version {_HEAD['version']}")
        records = [json.loads(line) for line in lines[1:]]
        for record in records:
            if not {"key", "stamp", "features"} <= record.keys():
                raise ValueError(f"a line has only {', '.join(record)}")
            _result(record["result"])
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False)


def _plain(result: Result) -> dict[str, Any]:
    return {f.name: getattr(result, f.name) for f in fields(Result) if f.name != "features"}


def _result(plain: dict[str, Any]) -> Result:
    return Result(**plain)
