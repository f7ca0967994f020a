"""What a generator is: a network that edits frames to show another emotion, its options, its name, and its file.

The trainer, the evaluation and the commands know generators only through this file, so your own can replace the
built-in one: docs/generators.md shows how.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcmecl_fast.data.tracks import Crop
from pcmecl_fast.files import load_tensors, naming_damage, save_tensors
from pcmecl_fast.options import from_options, plain_options
from pcmecl_fast.wording import did_you_mean

BUILT_IN = {
    "warp-fields": "pcmecl_fast.models.warp_fields:WarpFields",
    "warp-paint": "pcmecl_fast.models.warp_paint:WarpPaint",
}
"""Generators with a short name."""


class Edit(NamedTuple):
    """Edited frames, and the penalties on how they were made that the trainer adds to its loss."""

    frames: Tensor  # (B, 3, H, W) in [-1, 1]
    penalties: dict[str, Tensor]  # scalars, weighted already; each is logged under its name
    shown: Tensor | None = None  # (B, E) logits of the emotion that the source shows, to be learned from the labels


@dataclass
class NoOptions:
    """The configuration of a generator without options."""


class Generator(nn.Module, ABC):
    """Edits frames to show another emotion. A subclass defines `edit`, and `Config` if it has options.

    Args:
        emotions: names, in the order of the indices that `edit` receives.
        size: side of the frames it is trained on.
        config: a `Config`; by default one with default values.

    Attributes:
        Config: a dataclass of options, each with a default: numbers, strings, or lists of them.
        before: values of options in files that do not name them, since they were written before there were any.
        driven_by: how the target is given; set it in the class or in the constructor.
        crop: how the faces were cut that it is trained on; None where nothing says. The trainer sets it.
    """

    Config: ClassVar[type] = NoOptions
    before: ClassVar[Mapping[str, Any]] = {}
    driven_by: Literal["emotion", "reference"] = "emotion"
    config: Any
    crop: Crop | None = None

    def __init__(self, emotions: Sequence[str], size: int, config: Any = None) -> None:
        super().__init__()
        self.emotions, self.size = list(emotions), size
        self.config = self.Config() if config is None else config

    @abstractmethod
    def edit(
        self,
        frames: Tensor,  # (B, 3, H, W) in [-1, 1]
        target: Tensor,  # (B,) int emotions; driven by a reference, (B, 3, H, W) frames of anyone showing it
    ) -> Edit:
        """Frames that show the target, as differentiable as training needs them."""

    def forward(self, frames: Tensor, target: Tensor) -> Tensor:
        """`edit`'s frames alone, (B, 3, H, W) in [-1, 1]."""
        return self.edit(frames, target).frames

    def region(self, height: int, width: int) -> tuple[slice, slice]:
        """The rows and columns of such frames that edits may change: the trainer's critics look there alone.

        By default all of them.
        """
        return slice(0, height), slice(0, width)

    # An edit in two steps, for faces larger than the frames that a generator was trained on. A plan is linear: zero is
    # no edit, a multiple a weaker or stronger one, a mean over emotions lies between them, and one over time is calmer.

    def plan(
        self,
        frames: Tensor,  # (B, 3, S, S) in [-1, 1]
        target: Tensor,  # as `edit` takes it
    ) -> Tensor:  # (B, C, S, S)
        """What `edit` would change, in a form that `carry_out` can do at any size: by default, its difference.

        A generator that moves or shades pixels had better override both, and give what moves and shades them.
        """
        return self(frames, target) - frames

    def carry_out(
        self,
        frames: Tensor,  # (B, 3, h, w) in [-1, 1], the same faces at their own resolution
        plan: Tensor,  # (B, C, S, S)
    ) -> Tensor:  # (B, 3, h, w) in [-1, 1]
        """Frames of any size, changed as planned.

        By default the planned difference is enlarged and added, so that what the frames have and the generator never
        saw stays as it is: an enlarged edit would be blurred all over.
        """
        return (frames + enlarge(plan, frames)).clamp(-1, 1)


def enlarge(
    small: Tensor,  # (B, C, S, S)
    like: Tensor,  # (B, *, h, w)
) -> Tensor:  # (B, C, h, w)
    """Smoothly resized to the size of other frames, bicubically."""
    if small.shape[-2:] == like.shape[-2:]:
        return small
    # Antialiasing changes little where something is enlarged, but is done one direction after the other: faster.
    return F.interpolate(small, like.shape[-2:], mode="bicubic", align_corners=False, antialias=True)


def make_generator(
    name: str, emotions: Sequence[str], size: int, options: Mapping[str, Any] | None = None
) -> Generator:
    """A new generator by name; raises what `generator_class` and `generator_config` raise."""
    return generator_class(name)(emotions, size, generator_config(name, options or {}))


def generator_class(name: str) -> type[Generator]:
    """A built-in generator by name, or any other as `package.module:Class`.

    The module is imported, also from the current directory, as with `python -m`.

    Raises:
        ValueError: no such generator, a module that cannot be imported, or a class that is not a generator.
    """
    if name not in BUILT_IN and ":" not in name:
        closest = did_you_mean(name, BUILT_IN)
        raise ValueError(
            f"generator: no generator is called {name!r}; {closest and f'{closest} '}"
            f"--generator takes {', '.join(BUILT_IN)} or your own as package.module:Class"
        )
    module, _, attribute = BUILT_IN.get(name, name).partition(":")
    found = getattr(_import(module, name), attribute, None)
    if not (inspect.isclass(found) and issubclass(found, Generator)):
        what = f"{module} has no {attribute!r}" if found is None else f"{attribute} is not one"
        raise ValueError(f"generator: --generator {name} takes a subclass of pcmecl_fast.models.Generator; {what}")
    if inspect.isabstract(found):
        raise ValueError(f"generator: --generator {name} does not define edit(frames, target) -> Edit")
    if not is_dataclass(found.Config):
        raise ValueError(f"generator: --generator {name} has a Config that is not a dataclass")
    return found


def generator_config(name: str, options: Mapping[str, Any]) -> Any:
    """The generator's own `Config` with these options.

    Raises:
        ValueError: an unknown option, or one of the wrong type; the message lists the known ones.
    """
    config_class = generator_class(name).Config
    try:
        return from_options(config_class, options, source="generator_options")
    except ValueError as error:
        known = ", ".join(field.name for field in fields(config_class)) or "none"
        raise ValueError(f"{error} (options of {name}: {known})") from error


@dataclass
class _MadeWith:
    """What a file says of its generator beside the weights."""

    emotions: list[str]
    size: int
    options: dict[str, Any]
    crop: Crop | None = None


def save_generator(path: str | Path, generator: Generator) -> None:
    """Write the weights and the arguments the generator was created with."""
    header = {
        "generator": _name_of(type(generator)),
        "options": plain_options(generator.config),
        "emotions": generator.emotions,
        "size": generator.size,
        "crop": None if generator.crop is None else asdict(generator.crop),
    }
    # Copies, because safetensors rejects weights that share memory, such as tied ones.
    save_tensors(path, "generator", {k: v.clone() for k, v in generator.state_dict().items()}, header)


def load_generator(
    path: str | Path, device: torch.device | str | None = None, *, generator: str | None = None
) -> Generator:
    """The generator that `save_generator` wrote, in eval mode and frozen.

    Args:
        path: the file.
        device: where the generator goes.
        generator: the name of one that is not built in, as `package.module:Class`. It runs its author's code, so the
            file's word alone does not do.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is broken, its generator is neither built in nor the one named, or cannot be created here.
    """
    state, header = load_tensors(path, "generator")
    name = header.get("generator")
    if not isinstance(name, str):
        raise ValueError(f"path: {path} does not name its generator: another version of pcmecl_fast wrote it")
    if name not in BUILT_IN and name != generator:
        raise ValueError(
            f"path: {path} was written by {name}, code that is not part of pcmecl_fast; generator={name} lets it run"
        )
    generator_class(name)  # whose own errors are not the file's
    with naming_damage(path):
        known = {k: header[k] for k in ("emotions", "size", "options")} | {"crop": header.get("crop")}
        made_with = from_options(_MadeWith, known, source="header")
    options = {**generator_class(name).before, **made_with.options}
    try:
        loaded = make_generator(name, made_with.emotions, made_with.size, options)
        loaded.load_state_dict(state)
        loaded.crop = made_with.crop
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"path: {path} was written by the generator {name}, not as it is here: {error}") from error
    return loaded.eval().requires_grad_(False).to(device)


def _import(module: str, name: str) -> ModuleType:
    # For a generator that somebody named, and last: nothing in the directory takes the place of another module.
    if name not in BUILT_IN and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):  # found, but not what it imports
            raise ValueError(f"generator: the module of --generator {name} cannot be imported ({error})") from error
        raise ValueError(
            f"generator: --generator {name} takes a module in the current folder or on PYTHONPATH; there is no "
            f"{error.name} in either"
        ) from error
    except Exception as error:  # importing a module can raise anything
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"generator: the module of --generator {name} cannot be imported ({why})") from error


def _name_of(kind: type[Generator]) -> str:
    path = f"{kind.__module__}:{kind.__qualname__}"
    return next((name for name, known in BUILT_IN.items() if known == path), path)
