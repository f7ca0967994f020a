"""Unit image features of frames: a frozen tower maps a frame to the same features every time, so it runs only once.

`FeatureStore` keeps them on disk, shared by all runs and processes; `LiveFeatures` computes them on every access, like
a plain trainer. Both are read the same way: `features[index]`. Ranks share the work of a store, and that of the sums in
`individual_conditions`: all of them call these with the same data.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import SystemRandom
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor

from pcmecl_fast.clip import Clip
from pcmecl_fast.data.base import FrameDataset
from pcmecl_fast.data.loading import read_ahead
from pcmecl_fast.distributed import barrier, from_main, is_main, rank, ranks, share, summed
from pcmecl_fast.files import load_tensors, naming_damage, remove_unfinished, save_tensors
from pcmecl_fast.progress import progress_bar

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

    Ranks (`pcmecl_fast.distributed`) fill it together: of the missing frames each computes an equal part, and reads all
    afterwards. The folder may be one that all see or a disk of each machine's own: ranks find out who sees the same one
    as they do, and share what is missing there.

    Args:
        root: the folder; created if missing.
        clip: the frozen model.
        dtype: dtype of the features on disk: float32, float16 or bfloat16. They are returned in float32.
        shard_frames: maximum frames per shard. An interrupted fill loses less than one shard, and less than a minute, a
            rank.

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
            dataset: any data set of frames, the same on all ranks, which all call this.
            batch_size: frames per batch of the tower.
            backend: backend of `ops.clip_frames`.
            workers: processes that read frames while the tower runs.
        """
        frames = _digests(dataset)
        if _on_any_rank(bool(self._missing(frames).size), self.clip):
            self.folder.mkdir(parents=True, exist_ok=True)
            with _held_together(self.folder, self.clip) as (at, of):
                if at == 0:
                    remove_unfinished(self.folder)
                    self._missing(frames, remove_broken=True)
                # The second time each rank for itself: whatever the folder does not show of what others have written.
                for part in ((at, of), (0, 1)):
                    barrier()
                    self._fill(dataset, frames, part, batch_size, backend, workers)
                barrier()
        return StoredFeatures(self._shards, self._digests, frames, self.clip)

    def _fill(
        self,
        dataset: FrameDataset,
        frames: np.ndarray,
        part: tuple[int, int],  # which of how many
        batch_size: int,
        backend: str | None,
        workers: int,
    ) -> None:
        """Compute a part of the frames that are missing."""
        all_missing = torch.from_numpy(self._missing(frames))
        missing = all_missing[share(len(all_missing), at=part[0], of=part[1])]
        if not len(missing):
            return
        held = len(dataset) - len(all_missing)
        bar = progress_bar(
            total=held + len(missing), initial=held, desc="image features", unit="frame", quiet=not is_main()
        )
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


@contextmanager
def _held_together(folder: Path, clip: Clip) -> Iterator[tuple[int, int]]:
    """Have a folder with the other ranks that see the same one, and nobody else: which of them this is, of how many."""
    together = _who_see(folder)
    at = together.index(rank())
    lock = FileLock(folder / ".lock", timeout=0)
    # Nobody waits for one folder while holding another: two runs with a folder on each machine might wait for ever.
    while _on_any_rank(at == 0 and not _acquired(lock), clip):
        lock.release()
        time.sleep(SystemRandom().uniform(0.1, 0.5))
    try:
        yield at, len(together)
    finally:
        lock.release()


def _who_see(folder: Path) -> list[int]:
    """The ranks for whom this path is this rank's folder: each leaves a file there, and looks for those of others."""
    if ranks() == 1:
        return [0]
    asked = from_main(lambda: uuid.uuid4().hex)
    mine = folder / f".rank-{asked}-{rank()}"
    mine.touch()
    try:
        barrier()
        found = [other for other in range(ranks()) if (folder / f".rank-{asked}-{other}").exists()]
        barrier()
        return found
    finally:
        mine.unlink(missing_ok=True)


def _acquired(lock: FileLock) -> bool:
    try:
        lock.acquire()
    except Timeout:
        return False
    return True


def _on_any_rank(yes: bool, clip: Clip) -> bool:
    return bool(summed(torch.tensor(int(yes), device=clip.device)))


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
    """The condition of each individual: the mean of its unit image features, or zero if it has no frames.

    Called on all ranks, each of which adds up a part of the frames, in float64: however many frames there are, and
    ranks, the means agree to float32's rounding.
    """
    if not len(features):
        raise ValueError("features: got none; takes at least one frame's")
    mine = torch.arange(len(features))[share(len(features))]
    like = features[mine[:0]]
    total = like.new_zeros(individuals, like.shape[-1], dtype=torch.float64)
    for index in mine.split(4096) if len(mine) else ():
        total.index_add_(0, individual_index[index].to(total.device), features[index].double())
    barrier()
    count = torch.bincount(individual_index, minlength=individuals).clamp(min=1).to(total.device)
    return (summed(total) / count[:, None]).to(like.dtype)


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
