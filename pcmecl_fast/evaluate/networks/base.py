"""What the networks of the field's metrics have in common: their authors' files, and pictures as the scripts read them.

The papers' scripts read frames as 8-bit pictures from disk, so frames in [-1, 1] become 8-bit here too: a generator's
frames in memory and the same frames saved as PNG give the same features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pcmecl_fast.weights import read_weights
from pcmecl_fast.wording import name_some

_AT_ONCE = 8  # frames: ResNetFace's first layer takes 4 MB for each, and the caches of a CPU hold no more

Module = TypeVar("Module", bound=nn.Module)


class MissingWeights(FileNotFoundError):
    """A file that its authors alone publish is not there; says which, of which project, and what goes without it."""


class FrameNetwork(Protocol):
    """A network that describes faces one by one.

    Attributes:
        name: as `load_network` takes it.
        width: how many numbers describe a face.
    """

    name: str
    width: int

    def __call__(
        self,
        frames: Tensor,  # (B, 3, H, W) RGB in [-1, 1], or uint8; any size
    ) -> Tensor:  # (B, width) float32
        ...


@dataclass(frozen=True)
class AuthorsFile:
    """A file of weights, as its authors publish it.

    Args:
        name: the file's name in its project.
        pattern: what copies of it are called, for `Path.glob`.
        project: who publishes it.
        metrics: what cannot be measured without it.
        install: how to get it, where a package has it.
    """

    name: str
    pattern: str
    project: str
    metrics: str
    install: str = ""

    def find(self, weights: str | Path | None) -> Path:
        """The file in a folder of weights.

        Raises:
            MissingWeights: there is none.
            ValueError: there are several, and none has the name itself.
        """
        folder = None if weights is None else Path(weights)
        found = sorted(folder.glob(self.pattern)) if folder is not None else []
        exact = [path for path in found if path.name == self.name]
        if not found:
            where = f"is not in {folder}" if folder is not None else "is needed, and no folder of weights was given"
            how = f"; {self.install}" if self.install else ""
            raise MissingWeights(
                f"weights: {self.name} of {self.project} {where}: {self.metrics} cannot be measured{how}"
            )
        if len(found) > 1 and not exact:
            names = name_some([path.name for path in found])
            raise ValueError(f"weights: {folder} has several files for {self.name}: {names}; leave one")
        return (exact or found)[0]


class PreparedNetwork:
    """A frozen module, and how its pictures are made: a `FrameNetwork`."""

    def __init__(
        self, name: str, width: int, module: nn.Module, prepare: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        self.name, self.width = name, width
        self._module, self._prepare, self._device = frozen(module, device), prepare, device

    def __call__(
        self,
        frames: Tensor,  # (B, 3, H, W) RGB in [-1, 1], or uint8
    ) -> Tensor:  # (B, width) float32, on the network's device
        """The faces' features, `_AT_ONCE` at a time; no gradient reaches the frames.

        Raises:
            ValueError: `frames` is no batch of pictures.
        """
        pictures = as_pictures(frames).cpu()
        if not len(pictures):
            return torch.zeros(0, self.width, device=self._device)
        with torch.inference_mode():
            parts = [self._module(self._prepare(part).to(self._device)) for part in pictures.split(_AT_ONCE)]
        return torch.cat(parts)


def as_pictures(
    frames: Tensor,  # (B, 3, H, W) in [-1, 1], or uint8
) -> Tensor:  # (B, 3, H, W) uint8
    """8-bit pictures, rounded as they are when frames are saved.

    Raises:
        ValueError: another shape, or a dtype that is neither uint8 nor floating.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape[2:]:
        raise ValueError(f"frames: got shape {tuple(frames.shape)}; takes (B, 3, H, W)")
    if frames.dtype == torch.uint8:
        return frames
    if not frames.is_floating_point():
        raise ValueError(f"frames: got {frames.dtype}; takes uint8, or floats in [-1, 1]")
    return frames.detach().float().add(1).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)


def cut_by_pillow(
    pictures: Tensor,  # (B, 3, H, W) uint8 RGB
    mode: str,
    shorter: int,
    side: int,
) -> Tensor:  # (B, C, side, side) in [0, 1]
    """Pictures in a mode of Pillow, resized to a length of the shorter side, and the square in their middle.

    By Pillow, as the scripts have it: PyTorch's resize of 8-bit pictures rounds a few pixels in a thousand otherwise.
    """
    images = (Image.fromarray(picture).convert(mode) for picture in pictures.permute(0, 2, 3, 1).numpy())
    cut = [TF.center_crop(TF.resize(image, [shorter]), [side]) for image in images]
    return torch.stack([TF.pil_to_tensor(image) for image in cut]).float().div(255)


def resize_as_opencv(
    pictures: Tensor,  # (B, C, H, W) uint8
    height: int,
    width: int,
) -> Tensor:  # (B, C, height, width) float32, whole numbers from 0 to 255
    """OpenCV's bilinear resize of 8-bit pictures, bit for bit: without smoothing, in fixed point with 11 bits.

    Exact arithmetic rounds one pixel in eight otherwise, which these networks see.
    """
    above, below, upper, lower = _taps(pictures.shape[2], height, pictures.device)
    left, right, first, second = _taps(pictures.shape[3], width, pictures.device)
    whole = pictures.int()
    rows = whole[..., left] * first + whole[..., right] * second >> 4
    both = (rows[:, :, above] * upper[:, None] >> 16) + (rows[:, :, below] * lower[:, None] >> 16)
    return (both + 2 >> 2).float()


def _taps(old: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each of `new` places the two of `old` around it, and their weights in parts of 2048."""
    place = ((torch.arange(new, dtype=torch.float64, device=device) + 0.5) * (old / new) - 0.5).float()
    before = place.floor()
    part = place - before
    indices = (before.long() + k for k in (0, 1))
    first, second = (each.clamp(0, old - 1) for each in indices)
    return first, second, ((1 - part) * 2048).round().int(), (part * 2048).round().int()


def load_authors_weights(module: Module, path: Path) -> Module:
    """Fill a module with a file's tensors; nothing in the file is run.

    Counters of batches, which files written before torch 0.4.1 do not have, are not compared.

    Raises:
        ValueError: the file holds no weights, or those of another architecture; names the first that differs.
    """
    try:
        state, _ = read_weights(path)
    except ValueError as error:
        raise ValueError(f"weights: {path}: {error}") from error
    return fill(module, state, path)


def fill(module: Module, state: dict[str, Tensor], path: Path) -> Module:
    """`load_authors_weights` for tensors that are read already."""
    wanted = {key: value.shape for key, value in module.state_dict().items() if not _is_counter(key)}
    given = {key: value for key, value in state.items() if not _is_counter(key)}
    for key, shape in wanted.items():
        if key not in given:
            raise ValueError(f"weights: {path} is of another architecture: it has no {key}")
        if given[key].shape != shape:
            got = f"{tuple(given[key].shape)}, not {tuple(shape)}"
            raise ValueError(f"weights: {path} is of another architecture: its {key} is {got}")
    extra = next((key for key in given if key not in wanted), None)
    if extra is not None:
        raise ValueError(f"weights: {path} is of another architecture: it has {extra}, which is unknown here")
    module.load_state_dict(given, strict=False)
    return module


def frozen(module: Module, device: torch.device) -> Module:
    """For inference alone: normalisations folded, in the layout of memory in which convolutions are fastest."""
    module.eval().requires_grad_(False)
    fold_normalisations(module)
    return module.to(device).to(memory_format=torch.channels_last)


def fold_normalisations(module: nn.Module) -> None:
    """Make each normalisation that follows a convolution a part of it: one pass over its output less.

    The two are neighbours in an `nn.Sequential`, or children of the names `conv…` and `bn…` with the same ending.
    """
    for part in list(module.modules()):
        children = dict(part.named_children())
        followers = (
            [*children][1:] if isinstance(part, nn.Sequential) else [k.replace("conv", "bn", 1) for k in children]
        )
        for name, follower in zip(children, followers, strict=False):
            first, second = children[name], children.get(follower)
            if isinstance(first, _CONVOLUTIONS) and isinstance(second, _NORMALISATIONS):
                setattr(part, name, fuse_conv_bn_eval(first, second))
                setattr(part, follower, nn.Identity())


_CONVOLUTIONS, _NORMALISATIONS = (nn.Conv2d, nn.Conv3d), (nn.BatchNorm2d, nn.BatchNorm3d)


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")
