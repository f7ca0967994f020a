"""The prompt bank: text features of every individual and emotion, computed once after the prompts are learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pcmecl_fast.clip import Clip
from pcmecl_fast.distributed import is_main, ranks
from pcmecl_fast.files import MappedRows, load_tensors, naming_damage, save_rows, save_tensors
from pcmecl_fast.prompts.learner import PersonalizedPrompts
from pcmecl_fast.prompts.shards import FILES, files_of, remove_files, write_parts
from pcmecl_fast.towers.fingerprint import VERSION
from pcmecl_fast.wording import did_you_mean, name_some


class Conditions(Protocol):
    """What prompts are conditioned on, N rows of image features: an (N, D) tensor, or a store read by rows."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Tower:
    """The CLIP model that a file of text features or prompts belongs to."""

    name: str
    pretrained: str
    text_hash: str

    @classmethod
    def of(cls, clip: Clip) -> Tower:
        return cls(clip.name, clip.pretrained, clip.text_hash())

    def check(self, clip: Clip, path: Path) -> None:
        if not self.text_hash.startswith(VERSION):
            raise ValueError(
                f"clip: {path} was made by an older pcmecl_fast, which knew a text tower by its weights alone, not by "
                "what its layers do; make it again, with `pcmecl-fast prompts` or PromptBank.build and save_prompts"
            )
        if self.text_hash != clip.text_hash():
            raise ValueError(
                f"clip: {path} was made with {self.name!r} ({self.pretrained}, text tower {self.text_hash[:8]}), "
                f"got {clip.name!r} ({clip.pretrained}, text tower {clip.text_hash()[:8]}); "
                "load the same model and weights, or recreate the file"
            )


class PromptBank:
    """A table of unit text features, looked up by (individual, emotion).

    Args:
        features: that, (N, E, D), unit norm.
        individuals: N different names; with `condition="frame"` the keys of N frames.
        emotions: E different names.
        descriptions: the E descriptions behind the emotions; the names themselves where None.
        tower: which CLIP model made the features; None if unknown, and then the bank cannot be saved.
        condition: "individual" or "frame", what a row stands for; "none", individuals whose rows are equal.
        ending: what followed the descriptions in the prompts.

    Raises:
        ValueError: names that repeat or do not match the shape of `features`.
    """

    def __init__(
        self,
        features: Tensor,  # (N, E, D)
        individuals: Sequence[str],
        emotions: Sequence[str],
        *,
        descriptions: Sequence[str] | None = None,
        tower: Tower | None = None,
        condition: str = "individual",
        ending: str = "",
    ) -> None:
        if features.ndim != 3 or not features.is_floating_point():
            raise ValueError(f"features: takes a float (N, E, D), got {features.dtype} {tuple(features.shape)}")
        descriptions = emotions if descriptions is None else descriptions
        lists = {"individuals": individuals, "emotions": emotions, "descriptions": descriptions}
        for (name, values), count in zip(lists.items(), (*features.shape[:2], features.shape[1]), strict=True):
            if len(values) != count or len(set(values)) != count:
                raise ValueError(f"{name}: takes {count} different names for features {tuple(features.shape)}")
        if condition not in ("individual", "frame", "none"):
            raise ValueError(f"condition: takes 'individual', 'frame' or 'none', got {condition!r}")
        self._features: Tensor | MappedRows = features
        self.individuals, self.emotions = list(individuals), list(emotions)
        self.descriptions = list(descriptions)
        self.tower = tower
        self.condition, self.ending = condition, ending

    @property
    def features(self) -> Tensor:  # (N, E, D)
        """The table. Where it lies on disk in several files, all of them are read; `lookup` reads rows."""
        return self._features.whole() if isinstance(self._features, MappedRows) else self._features

    @cached_property
    def _row(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.individuals)}  # made when somebody asks: there may be millions

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        prompts: PersonalizedPrompts,
        conditions: Conditions | None,  # (N, D) mean unit image features
        individuals: Sequence[str],
        emotions: Sequence[str],
        *,
        clip: Clip,
        condition: str | None = None,
        batch_size: int = 64,
        backend: str | None = None,
        path: str | Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> PromptBank:
        """Run learned prompts for every condition, `batch_size` rows at a time.

        Args:
            prompts: the learned prompts.
            conditions: one row for each individual (or frame): a tensor, or features that are read on demand; None if
                the prompts have no condition.
            individuals: N names; with `condition="frame"` the keys of N frames.
            emotions: E names, one for each description of the prompts.
            clip: the model of the prompts.
            condition: "individual" (the default) or "frame", what a row stands for; "none" if the prompts have none.
            batch_size: individuals per batch of the text tower.
            backend: backend of `PersonalizedPrompts`.
            path: a file to write the rows to as they are computed, for banks larger than memory; the returned bank is a
                memory map of it. Several ranks, which all call this, write a part each, into files beside it
                (`prompts.shards`); what is whole of a build that was ended is not computed again.
            dtype: dtype of the rows; None means the prompts' dtype.

        Raises:
            ValueError: names that repeat or do not match the rows; prompts that take a condition, and none is given.
            FileNotFoundError: `path` lies in a folder that is not the same for all ranks.
        """
        dtype = dtype or prompts.context.dtype
        count = len(individuals) if conditions is None else len(conditions)
        rows = partial(_rows, prompts, conditions, batch_size=batch_size, backend=backend, dtype=dtype)
        shape = (count, len(emotions), clip.embed_dim)
        about: dict[str, Any] = {
            "descriptions": prompts.descriptions,
            "tower": Tower.of(clip),
            "condition": _condition(prompts, condition),
            "ending": prompts.ending,
        }
        if path is None:
            empty = torch.empty(0, *shape[1:], dtype=dtype, device=prompts.context.device)
            return cls(torch.cat([empty, *rows(range(count))]), individuals, emotions, **about)
        # Check the names before doing the work, on a tensor that takes no memory.
        table = torch.empty(shape, dtype=dtype, device="meta")
        header = cls(table, individuals, emotions, **about)._header()
        if ranks() > 1:
            seen = partial(_conditions_of, conditions)
            write_parts(Path(path), header, shape, dtype, rows, prompts=prompts, conditions=seen)
        else:
            with save_rows(path, "bank", "features", shape, dtype, header) as append:
                for chunk in rows(range(count)):
                    append(chunk)
            remove_files(Path(path))
        return cls.load(path, clip, on_disk=True)

    @torch.no_grad()
    def extended(
        self,
        prompts: PersonalizedPrompts,
        conditions: Conditions | None,  # (n, D)
        individuals: Sequence[str],
        *,
        clip: Clip,
        **options: Any,
    ) -> PromptBank:
        """A bank, in memory, with rows for n more individuals (or frames): people added after the prompts were learned.

        Their condition is the mean unit image feature of a few of their frames (`condition_of`). The other options are
        those of `build`.

        Raises:
            ValueError: prompts that end, or are conditioned, in another way than the bank's.
        """
        if prompts.ending != self.ending:
            raise ValueError(f"prompts: they end with {prompts.ending!r}, those of the bank with {self.ending!r}")
        more = PromptBank.build(
            prompts, conditions, individuals, self.emotions, clip=clip, condition=self.condition, **options
        )
        return self._of(
            torch.cat([self.features.to(more.features), more.features]), self.individuals + more.individuals
        )

    def selected(self, names: Sequence[str], device: torch.device | str | None = None) -> PromptBank:
        """A bank, in memory, with the rows of these individuals alone; raises what `rows` raises."""
        return self._of(self.lookup(self.rows(names), device), names)

    def lookup(
        self,
        rows: Tensor,  # (…) int
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The text features of some rows, (…, E, D), on `device`: of a memory map, only these are read.

        Raises:
            IndexError: a row that the bank does not have (checked for banks on the CPU).
        """
        rows = rows.to(self.device)
        count = len(self.individuals)
        if rows.device.type == "cpu" and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < count:
            raise IndexError(f"individual: takes 0 to {count - 1}, got {int(rows.min())} to {int(rows.max())}")
        found = self._features.rows(rows) if isinstance(self._features, MappedRows) else self._features[rows]
        return found.to(device or self.device)

    @property
    def on_disk(self) -> bool:
        """Whether the features are a memory map of a file, or of several, which `lookup` reads."""
        return isinstance(self._features, MappedRows)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if isinstance(self._features, MappedRows) else self._features.device

    def rows(self, names: Sequence[str]) -> Tensor:  # (len(names),) int64
        """The rows of the named individuals.

        Raises:
            KeyError: an individual that the bank does not have; the message lists the closest names.
        """
        missing = [name for name in dict.fromkeys(names) if name not in self._row]
        if missing:
            raise KeyError(
                f"individual: {len(missing)} of the {len(set(names))} asked for are not among the bank's "
                f"{len(self.individuals)}: {_with_closest(missing, self.individuals)}; build a bank that holds them"
            )
        return torch.tensor([self._row[name] for name in names], dtype=torch.long)

    def columns(self, emotions: Sequence[str]) -> Tensor:  # (len(emotions),) int64
        """The columns of the named emotions; ValueError for one that the bank does not have."""
        missing = [e for e in emotions if e not in self.emotions]
        if missing:
            raise ValueError(
                f"emotions: the bank has {', '.join(self.emotions)}, not {_with_closest(missing, self.emotions)}"
            )
        return torch.tensor([self.emotions.index(e) for e in emotions], dtype=torch.long)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PromptBank:
        return self._of(self.features.to(device=device, dtype=dtype), self.individuals)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the features, and a JSON header that describes them."""
        save_tensors(path, "bank", {"features": self.features}, self._header())
        remove_files(Path(path))

    @classmethod
    def load(cls, path: str | Path, clip: Clip, *, on_disk: bool = False) -> PromptBank:
        """Read a bank that was made with this very text tower.

        Args:
            path: a file written by `save` or `build`.
            clip: the model.
            on_disk: leave the features on disk, as memory maps on the CPU, whatever the clip's device.

        Raises:
            FileNotFoundError: no such file, or one that it names is gone.
            ValueError: the file is broken, is not a bank, or belongs to another tower.
        """
        tensors, header = load_tensors(path, "bank")
        tower = _tower_of(path, header)
        tower.check(clip, Path(path))
        with naming_damage(path):
            if on_disk or FILES in header:
                files, header["individuals"] = files_of(Path(path), header)
                features: Tensor | MappedRows = MappedRows(files, "features")
                table = torch.empty(features.shape, dtype=features.dtype, device="meta")
            else:
                table = features = tensors["features"].to(clip.device)
            bank = cls(
                table,
                header["individuals"],
                header["emotions"],
                descriptions=header["descriptions"],
                tower=tower,
                condition=header["condition"],
                ending=header["ending"],
            )
            if table.shape[2] != clip.embed_dim:
                raise ValueError(f"features: takes (N, E, {clip.embed_dim}), got {tuple(table.shape)}")
            if isinstance(features, MappedRows) and not on_disk:
                features = features.whole(clip.device)
        bank._features = features
        return bank

    def _of(self, features: Tensor, individuals: Sequence[str]) -> PromptBank:
        """The same emotions and tower with other rows."""
        return PromptBank(
            features,
            individuals,
            self.emotions,
            descriptions=self.descriptions,
            tower=self.tower,
            condition=self.condition,
            ending=self.ending,
        )

    def _header(self) -> dict[str, Any]:
        if self.tower is None:
            raise ValueError("tower: this bank's CLIP model is unknown; build the bank with PromptBank.build")
        return {
            "individuals": self.individuals,
            "emotions": self.emotions,
            "descriptions": self.descriptions,
            "condition": self.condition,
            "ending": self.ending,
            "tower": asdict(self.tower),
        }


def _condition(prompts: PersonalizedPrompts, condition: str | None) -> str:
    """What a bank of these prompts calls its rows' condition."""
    if prompts.condition is None and condition not in (None, "none"):
        raise ValueError(f"condition: these prompts have none, got {condition!r}; pass condition='none'")
    if prompts.condition is not None and condition == "none":
        raise ValueError("condition: got 'none', but these prompts have one; takes 'individual' or 'frame'")
    return condition or ("none" if prompts.condition is None else "individual")


def _rows(
    prompts: PersonalizedPrompts,
    conditions: Conditions | None,
    which: range,
    *,
    batch_size: int,
    backend: str | None,
    dtype: torch.dtype,
) -> Iterator[Tensor]:  # each (n, E, D)
    """Rows of a bank, a batch at a time."""
    quick = len(which) < 50 * batch_size or not is_main()
    chunks = tqdm(torch.arange(which.start, which.stop).split(batch_size), desc="prompt bank", disable=quick)
    if prompts.condition is None:
        shared = prompts(backend=backend).to(dtype)  # (1, E, D)
        yield from (shared.expand(len(chunk), -1, -1) for chunk in chunks)
    elif conditions is None:
        raise ValueError("conditions: got None, and these prompts are conditioned; takes a row for each individual")
    else:
        yield from (prompts(conditions[chunk], backend=backend).to(dtype) for chunk in chunks if len(chunk))


def _conditions_of(conditions: Conditions | None, which: range) -> Iterator[Tensor]:  # each (n, D)
    if conditions is not None:
        yield from (conditions[chunk] for chunk in torch.arange(which.start, which.stop).split(4096) if len(chunk))


def _with_closest(missing: Sequence[str], known: Sequence[str], *, most: int = 3) -> str:
    """The first missing names, each with the known one that is closest, and how many more there are."""
    return name_some([f"{name!r} ({did_you_mean(name, known)})".removesuffix(" ()") for name in missing], most)


@torch.no_grad()
def condition_of(
    clip: Clip,
    frames: Tensor,  # (B, 3, H, W) in [-1, 1]
) -> Tensor:  # (D,)
    """What the prompts of one individual are conditioned on: the mean unit image feature of a few of their frames."""
    if frames.ndim != 4 or not len(frames):
        raise ValueError(f"frames: takes (B, 3, H, W) with at least one frame, got {tuple(frames.shape)}")
    return F.normalize(clip.encode_image(frames.to(clip.device)).float(), dim=-1).mean(0)


@torch.no_grad()
def row_of(
    prompts: PersonalizedPrompts,
    clip: Clip,
    frames: Tensor,  # (B, 3, H, W) in [-1, 1]
    *,
    backend: str | None = None,
) -> Tensor:  # (E, D)
    """The bank's row of somebody seen in a few frames; without a condition everybody's, whatever the frames."""
    condition = None if prompts.condition is None else condition_of(clip, frames)[None]
    return prompts(condition, backend=backend)[0]


def save_prompts(path: str | Path, prompts: PersonalizedPrompts, emotions: Sequence[str], clip: Clip) -> None:
    """Write learned prompts (V and h), so that individuals added later can get rows of the bank."""
    header = {
        "emotions": list(emotions),
        "descriptions": prompts.descriptions,
        "n_ctx": prompts.context.shape[-2],
        "context": "shared" if prompts.context.ndim == 2 else "per-emotion",
        "condition": prompts.condition,
        "ending": prompts.ending,
        "tower": asdict(Tower.of(clip)),
    }
    save_tensors(path, "prompts", prompts.state_dict(), header)


def load_prompts(path: str | Path, clip: Clip) -> tuple[PersonalizedPrompts, list[str]]:
    """Read learned prompts and the emotions they are for; raises what `PromptBank.load` raises."""
    tensors, header = load_tensors(path, "prompts")
    _tower_of(path, header).check(clip, Path(path))
    with naming_damage(path):
        options = {name: header[name] for name in ("n_ctx", "context", "condition", "ending")}
        prompts = PersonalizedPrompts(clip, header["descriptions"], **options)
        prompts.load_state_dict(tensors)
        emotions = header["emotions"]
        if len(emotions) != len(prompts.descriptions):
            raise ValueError(f"{len(emotions)} emotions, {len(prompts.descriptions)} descriptions")
    return prompts.to(clip.device), emotions


def _tower_of(path: str | Path, header: dict[str, Any]) -> Tower:
    with naming_damage(path):
        tower = Tower(**header["tower"])
        if not all(isinstance(value, str) for value in vars(tower).values()):
            raise TypeError(f"tower: takes names, got {header['tower']}")
        return tower
