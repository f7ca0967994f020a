"""Unit image features of frames: a frozen tower maps a frame to the same features every time, so it runs only once.

`FeatureStore` keeps them on disk, shared by all runs and processes; `LiveFeatures` computes them on every access, like
a plain trainer. Both are read the same way: `features[index]`.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from pcmecl_fast.clip import Clip
from pcmecl_fast.data.base import FrameDataset
from pcmecl_fast.data.loading import read_ahead
from pcmecl_fast.files import load_tensors, naming_damage, remove_unfinished, save_tensors

log = logging.getLogger("pcmecl_fast")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_DIGEST = 16
_FLUSH_SECONDS = 60.0


class Features(Protocol):
    """Unit image features of a data set's L frames; an (L, D) tensor qualifies too."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor) -> Tensor:
        """The features of the frames at `index` (any shape, int64): (*index.shape, D) float32 on the clip's device."""
        ...


class FeatureStore:
    """A folder of unit image features, filled once for each frame and tower.

        <root>/<tower>-<dtype>-<hash>/<shard>.safetensors      features (n, D) and the digests of their n frames

    The hash covers the image tower's weights and preprocessing; a digest covers a frame's key and stamp
    (`FrameDataset.stamps`: where it comes from, its size and time stamp). So a store is never out of date: whatever
    changes gets another name. Several data sets may share one root. Shards are memory-mapped, written under a temporary
    name, renamed and never changed afterwards, so any number of processes may read while one fills; a second that wants
    to fill waits for the first and finds the work done.

    Args:
        root: the folder; created if missing.
        clip: the frozen model.
        dtype: dtype of the features on disk: float32, float16 or bfloat16. They are returned in float32.
        shard_frames: maximum frames per shard. An interrupted fill loses less than one shard, and less than a minute.

    Raises:
        ValueError: an unsupported dtype, or `shard_frames` below 1.

    Source: ours.
    """

    def __init__(
        self,
        root: str | Path,
        clip: Clip,
        *,
        dtype: torch.dtype = torch.float32,
        shard_frames: int = 4096,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype: takes one of {', '.join(map(str, DTYPES))}, got {dtype}")
        if shard_frames < 1:
            raise ValueError(f"shard_frames: takes 1 or more, got {shard_frames}")
        self.clip, self.dtype, self.shard_frames = clip, dtype, shard_frames
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", clip.name)
        self.folder = Path(root) / f"{name}-{str(dtype).removeprefix('torch.')}-{clip.image_hash()[:16]}"
        self._shards: dict[Path, Tensor] = {}
        self._digests: dict[Path, np.ndarray] = {}

    def __call__(
        self, dataset: FrameDataset, *, batch_size: int = 64, backend: str | None = None, workers: int = 0
    ) -> StoredFeatures:
        """The features of a data set's frames, read from disk; missing ones are computed first, with a progress bar.

        Args:
            dataset: any data set of frames.
            batch_size: frames per batch of the tower.
            backend: backend of `ops.clip_frames`.
            workers: processes that read frames while the tower runs.
        """
        frames = _digests(dataset)
        if self._missing(frames).size:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                self._fill(dataset, frames, batch_size, backend, workers)
        return StoredFeatures(self._shards, self._digests, frames, self.clip)

    def _fill(
        self, dataset: FrameDataset, frames: np.ndarray, batch_size: int, backend: str | None, workers: int
    ) -> None:
        remove_unfinished(self.folder)
        missing = torch.from_numpy(self._missing(frames, remove_broken=True))
        if not len(missing):
            return
        bar = tqdm(total=len(dataset), initial=len(dataset) - len(missing), desc="image features", unit="frame")
        batches: list[Tensor] = []
        done, written, since = 0, 0, time.monotonic()
        chunks = missing.split(min(batch_size, self.shard_frames))
        for chunk, seen in read_ahead(dataset, chunks, lambda chunk: chunk, workers=workers):
            batches.append(_encode(self.clip, seen, backend).to("cpu", self.dtype))
            done += len(chunk)
            bar.update(len(chunk))
            full = done - written + batch_size > self.shard_frames or time.monotonic() - since > _FLUSH_SECONDS
            if full or done == len(missing):
                self._write(torch.cat(batches), frames[missing[written:done].numpy()])
                batches, written, since = [], done, time.monotonic()
        bar.close()

    def _write(self, features: Tensor, frames: np.ndarray) -> None:
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        digests = torch.from_numpy(frames.view(np.uint8).reshape(-1, _DIGEST).copy())
        tower = {"name": self.clip.name, "pretrained": self.clip.pretrained, "image_hash": self.clip.image_hash()}
        save_tensors(path, "features", {"features": features, "frames": digests}, tower)
        self._open(path)

    def _missing(self, frames: np.ndarray, *, remove_broken: bool = False) -> np.ndarray:
        """Which frames are in no shard, after looking for shards written by other processes."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in self._shards:
                try:
                    self._open(path)
                except FileNotFoundError:  # another process has just removed a broken one
                    continue
                except ValueError as error:
                    if remove_broken:
                        log.warning("recomputing a broken shard of features: %s", error)
                        path.unlink(missing_ok=True)
        held = np.concatenate([*self._digests.values(), frames[:0]])
        return np.flatnonzero(~np.isin(frames, held))

    def _open(self, path: Path) -> None:
        tensors, _ = load_tensors(path, "features")
        with naming_damage(path):
            features, frames = tensors["features"], tensors["frames"]
            expected = ((len(frames), self.clip.embed_dim), self.dtype, (len(frames), _DIGEST), torch.uint8)
            if (features.shape, features.dtype, frames.shape, frames.dtype) != expected:
                raise ValueError(f"features {tuple(features.shape)} of frames {tuple(frames.shape)}")
        self._shards[path] = features
        self._digests[path] = frames.numpy().reshape(-1).view(f"S{_DIGEST}")


class StoredFeatures:
    """What `FeatureStore` returns: memory-mapped features of L frames, read by index."""

    def __init__(
        self, shards: dict[Path, Tensor], digests: dict[Path, np.ndarray], frames: np.ndarray, clip: Clip
    ) -> None:
        self.device, self.width = clip.device, clip.embed_dim
        held = np.concatenate([*digests.values(), frames[:0]])
        order = np.argsort(held, kind="stable")
        at = order[np.searchsorted(held, frames, sorter=order)] if len(frames) else np.empty(0, np.int64)
        begins = np.cumsum([0, *(len(d) for d in digests.values())])
        shard = np.searchsorted(begins, at, side="right") - 1
        self._shard, self._row = torch.from_numpy(shard), torch.from_numpy(at - begins[shard])
        used = self._shard.unique().tolist()
        self._shards = {i: tensor for i, tensor in enumerate(shards.values()) if i in used}

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, index: Tensor) -> Tensor:
        flat = index.flatten().cpu()
        shard, row = self._shard[flat], self._row[flat]
        out = torch.empty(len(flat), self.width)
        for i in shard.unique().tolist():
            here = shard == i
            out[here] = self._shards[i][row[here]].float()
        return out.to(self.device).view(*index.shape, self.width)


class LiveFeatures:
    """Features computed from the frames on every access."""

    def __init__(self, clip: Clip, dataset: FrameDataset) -> None:
        self.clip, self.dataset = clip, dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Tensor) -> Tensor:
        if not index.numel():
            return torch.empty(*index.shape, self.clip.embed_dim, device=self.clip.device)
        return _encode(self.clip, self.dataset.frames(index.flatten()), None).view(*index.shape, -1)


def individual_conditions(
    features: Features,  # (L, D) unit
    individual_index: Tensor,  # (L,) int
    individuals: int,
) -> Tensor:  # (N, D)
    """The condition of each individual: the mean of its unit image features, or zero if it has no frames."""
    total: Tensor | None = None
    for index, part in _in_parts(features):
        who = individual_index[index].to(part.device)
        total = part.new_zeros(individuals, part.shape[1]) if total is None else total
        total.index_add_(0, who, part)
    if total is None:
        raise ValueError("features: got none; takes at least one frame's")
    return total / torch.bincount(individual_index, minlength=individuals).clamp(min=1)[:, None].to(total.device)


def _in_parts(features: Features, size: int = 4096) -> Iterator[tuple[Tensor, Tensor]]:
    for index in torch.arange(len(features)).split(size):
        if len(index):
            yield index, features[index]


@torch.no_grad()
def _encode(
    clip: Clip,
    frames: Tensor,  # (B, 3, S, S) in [-1, 1]
    backend: str | None,
) -> Tensor:  # (B, D)
    return F.normalize(clip.encode_image(frames.to(clip.device), backend=backend).float(), dim=-1)


def _digests(dataset: FrameDataset) -> np.ndarray:
    """A name for each frame, a hash of what it is made from: (L,) of 16 bytes."""
    pairs = zip(dataset.keys, dataset.stamps(), strict=True)
    names = (f"{key}\0{stamp}".encode("utf-8", "surrogateescape") for key, stamp in pairs)
    whole = bytearray()  # which grows in place: there may be millions
    for name in names:
        whole += hashlib.blake2b(name, digest_size=_DIGEST).digest()
    return np.frombuffer(whole, dtype=f"S{_DIGEST}")
