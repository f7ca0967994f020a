"""Augmentation of drawn faces for training networks on them: shifts, zooms, blur and noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pcmecl_fast.synthetic.faces import SyntheticFaces

SIDE = 64
"""The side, in pixels, of the frames that the judge and the reader see."""


def at_side(
    frames: Tensor,  # (B, 3, H, W)
) -> Tensor:  # (B, 3, SIDE, SIDE)
    if frames.shape[-2:] == (SIDE, SIDE):
        return frames
    return F.interpolate(frames, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)


def drawn(faces: SyntheticFaces) -> Tensor:
    """Every frame as bytes, (L, 3, S, S) uint8: drawn once, in a quarter of the memory."""
    return drawn_by(faces.frames, len(faces))


def drawn_by(
    draw: Callable[[Tensor], Tensor],  # rows (B,) to frames (B, 3, S, S) in [-1, 1]
    count: int,
) -> Tensor:  # (count, 3, S, S) uint8
    chunks = tqdm(torch.arange(count).split(128), desc="drawing faces")
    return torch.cat([to_bytes(draw(chunk)) for chunk in chunks])


def to_bytes(
    frames: Tensor,  # (B, 3, S, S) in [-1, 1]
) -> Tensor:  # (B, 3, S, S) uint8
    return ((frames + 1) * 127.5).round().to(torch.uint8)


def augmented(
    pixels: Tensor,  # (B, 3, S, S) uint8
    *,
    zoom: float,
    shift: float,
    blurred: float,
    noise: float,
    tint: float = 0.0,
    mirrored: bool = False,
    grain: float = 0.0,
    alike: int = 1,
) -> Tensor:  # (B, 3, S, S), about [-1, 1]
    """Frames under random changes that edited frames may also show, drawn from torch's global generator.

    Args:
        pixels: frames as bytes.
        zoom: largest change of scale.
        shift: largest displacement, in half sides.
        blurred: the fraction of frames that are blurred, each by a different amount.
        noise: largest standard deviation of normal noise, on a scale of 2.
        tint: largest change of each colour's gain.
        mirrored: whether every other frame is mirrored.
        grain: standard deviation of normal noise that each frame has in the first place, as from a camera's sensor.
        alike: into how many equal parts the frames fall that zooms, shifts, mirrorings and `noise` are the same for:
            frames i, B / alike + i, … are seen in one view.
    """
    frames = pixels.float() / 127.5 - 1
    count = len(frames)
    views = count // alike
    theta = torch.zeros(views, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + zoom * (torch.rand(views) * 2 - 1)
    if mirrored:
        theta[:, 0, 0] *= 1 - 2 * torch.randint(2, (views,))
    theta[:, :, 2] = shift * (torch.rand(views, 2) * 2 - 1)
    grid = F.affine_grid(theta.repeat(alike, 1, 1), list(frames.shape), align_corners=False)
    if grain:
        frames = frames + grain * torch.randn_like(frames)
    frames = F.grid_sample(frames, grid, padding_mode="border", align_corners=False)
    smooth = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mix = torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < blurred)
    frames = frames + mix * (smooth - frames)
    if tint:
        frames = frames * (1 + tint * (torch.rand(count, 3, 1, 1) * 2 - 1))
    seen = noise * torch.rand(views, 1, 1, 1) * torch.randn_like(frames[:views])
    return frames + seen.repeat(alike, 1, 1, 1)
