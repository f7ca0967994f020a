"""What a criterion is made of, as the folders of `pcmecl-fast prompts` and `pcmecl-fast train` hold it."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pcmecl_fast.clip import Clip, load_clip
from pcmecl_fast.files import load_tensors, naming_damage, save_tensors
from pcmecl_fast.libraries import missing_library
from pcmecl_fast.prompts.bank import PromptBank, load_prompts
from pcmecl_fast.prompts.learner import PersonalizedPrompts
from pcmecl_fast.towers.precision import tower_dtype

LENGTHS = "lengths.safetensors"
_OPTIONS = ("contrast", "min_change", "strength")


class Parts(NamedTuple):
    """A criterion's arguments."""

    clip: Clip
    bank: PromptBank
    prompts: PersonalizedPrompts
    options: dict[str, Any]
    """Of `contrast`, `min_change`, `strength` and `lengths` those that the folder has."""


def parts_of_run(run: str | Path, *, clip: Clip | None = None, device: torch.device | str | None = None) -> Parts:
    """Read the folder of a finished run of `pcmecl-fast prompts`, `train` or `demo`.

    A bank with a row for each frame stays on disk.

    Args:
        run: the folder.
        clip: the run's model, where it is loaded already.
        device: where to put the model otherwise.

    Raises:
        FileNotFoundError: no such folder, or one without the files of a finished run.
        ValueError: another command's folder, a broken file, a clip other than the run's.
        ImportError: a library that reads configurations is missing.
    """
    run = Path(os.path.expanduser(run))
    config = _config_of(run)
    folder = run
    if "generator" in config:  # of `train`, which learns the prompts inside its folder or is given others
        folder = run / "prompts" if config.get("prompts") is None else Path(config["prompts"])
    files = {name: folder / f"{name}.safetensors" for name in ("prompts", "bank")}
    for path in files.values():
        if not path.is_file():
            of_it = "" if folder == run else f"its prompts are those of {folder}, and "
            raise FileNotFoundError(f"run: {of_it}{folder} holds no {path.name}; it takes the folder of a finished run")
    if clip is None:
        clip = load_clip(
            config["clip"],
            config.get("clip_pretrained"),
            device=device,
            dtype=tower_dtype(config.get("tower_dtype", "float32"), device or "cpu"),
            like=config.get("clip_like"),
        )
    bank = PromptBank.load(files["bank"], clip, on_disk=True)
    if bank.condition != "frame":
        bank = PromptBank.load(files["bank"], clip)
    prompts, _ = load_prompts(files["prompts"], clip)
    options = {name: config[name] for name in _OPTIONS if name in config}
    # Those that `train` measured come first: with its data and options.
    measured = next((path for path in (run / LENGTHS, folder / LENGTHS) if path.is_file()), None)
    if measured is not None:
        options["lengths"] = load_lengths(measured, bank)
    return Parts(clip, bank, prompts.requires_grad_(False).eval(), options)


def save_lengths(
    path: str | Path,
    lengths: Tensor,  # (E, E), or (N, E, E) for the rows of the bank
    bank: PromptBank,
) -> None:
    """Write how far changes go, with whose they are: `lengths.safetensors` in the folder of a run."""
    header = {
        "emotions": bank.emotions,
        "individuals": bank.individuals if lengths.ndim == 3 else None,
        "tower": bank.tower and asdict(bank.tower),
    }
    save_tensors(path, "lengths", {"lengths": lengths}, header)


def load_lengths(path: str | Path, bank: PromptBank) -> Tensor:  # (E, E), or (N, E, E)
    """Read what `save_lengths` wrote, for the rows of this bank; those that the file lacks get the mean of its own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is broken, or made with a bank of other emotions or of another text tower.
    """
    tensors, header = load_tensors(path, "lengths")
    with naming_damage(path):
        lengths, individuals = tensors["lengths"].float(), header["individuals"]
        emotions, tower = header["emotions"], header["tower"] or {}
        sizes = (len(emotions), len(emotions))
        if tuple(lengths.shape) != (sizes if individuals is None else (len(individuals), *sizes)):
            raise ValueError(f"lengths {tuple(lengths.shape)}")
    if emotions != bank.emotions:
        raise ValueError(f"lengths: {path} is for the emotions {emotions}, the bank has {bank.emotions}")
    if bank.tower is not None and tower.get("text_hash") not in (None, bank.tower.text_hash):
        raise ValueError(f"lengths: {path} was measured with {tower.get('name')!r}, not with the bank's clip")
    if individuals is None or individuals == bank.individuals:
        return lengths
    row = {name: i for i, name in enumerate([*individuals, None])}
    lengths = torch.cat([lengths, lengths.mean(0, keepdim=True)])
    return lengths[[row.get(name, row[None]) for name in bank.individuals]]


def check_prompts(prompts: PersonalizedPrompts, bank: PromptBank, clip: Clip) -> None:
    """Refuse prompts that are not those of the bank."""
    if prompts.clip is not clip and prompts.clip.text_hash() != clip.text_hash():
        raise ValueError(f"prompts: made with {prompts.clip.name!r} ({prompts.clip.pretrained}), not with this clip")
    if prompts.descriptions != bank.descriptions or prompts.ending != bank.ending:
        its, others = ([d + x.ending for d in x.descriptions] for x in (prompts, bank))
        raise ValueError(f"prompts: they are for {', '.join(its)}, the bank for {', '.join(others)}")
    if (prompts.condition is None) != (bank.condition == "none"):
        raise ValueError(f"prompts: their condition is {prompts.condition!r}, the bank's {bank.condition!r}")


def checked_lengths(
    lengths: Tensor | None, bank: PromptBank, strength: float, *, by_frame: bool
) -> Tensor | None:  # (1, E, E) or (N, E, E)
    """Refuse lengths that are not the bank's; where text features are made of each frame, only everybody's fit."""
    if lengths is None:
        if strength:
            raise ValueError("lengths: required when strength is not 0; `personal_lengths` measures them on a data set")
        return None
    rows, emotions = len(bank.individuals), len(bank.emotions)
    shapes = [(emotions, emotions)] if by_frame else [(emotions, emotions), (rows, emotions, emotions)]
    if tuple(lengths.shape) not in shapes or not bool((lengths > 0).all()):
        takes = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"lengths: takes {takes} positive numbers, got {tuple(lengths.shape)}")
    return lengths.detach() if lengths.ndim == 3 else lengths.detach()[None]


def _config_of(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    if not path.is_file():
        what = "is not the folder of a run of `pcmecl-fast prompts` or `train` (no config.yaml)"
        raise FileNotFoundError(f"run: {run} {what if run.is_dir() else 'does not exist'}")
    try:
        from pcmecl_fast.options import read_options
    except ModuleNotFoundError as error:
        message = missing_library(error)
        if message is None:
            raise
        raise ImportError(f"run: to read {path}: {message}") from error
    config = read_options(path, argument="run")
    if "clip" not in config or "n_ctx" not in config:
        raise ValueError(f"run: {run} was not written by `pcmecl-fast prompts`, `train` or `demo`; it takes theirs")
    return config
