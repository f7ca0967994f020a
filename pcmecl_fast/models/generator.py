"""The built-in generator: a few learned fields that move and shade a face, mixed anew for every frame (ours).

    a, b   = mix(encoder(frame), target)                                       K weights each
    edited = clamp( warp(frame, window · reach · tanh(Σ a_k flow_k)) + window · residual · tanh(Σ b_k shade_k) )

The fields are the same for everybody, as muscles are; how much of each is used depends on the face and the target. So
few degrees of freedom can bend brows and lips, but not draw the patterns that please a CLIP tower and nobody else: an
encoder–decoder that paints freely raised CLIP's score as far and the expression hardly at all. The weights start so
close to zero that the untrained generator is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcmecl_fast.files import load_tensors, save_tensors


@dataclass
class GeneratorConfig:
    """The built-in generator."""

    fields: int = 48
    """K, the learned fields that move a face, and as many that shade it."""
    hidden: int = 128
    """Width of the network that mixes them."""
    reach: float = 0.09
    """Largest displacement of the flow, as a fraction of the frame's side."""
    residual: float = 0.8
    """Largest change of a colour by the residual, of a range of 2."""
    window: list[float] = field(default_factory=lambda: [0.5, 0.60, 0.27, 0.27])
    """Centre x, y and half-axes of what may change, as fractions of the frame: expressions are not in hair or walls."""
    driven_by: Literal["emotion", "reference"] = "emotion"
    """What tells the target: an emotion's index, or a frame of anyone who shows it."""


class Edit(NamedTuple):
    """An edit and how it was made."""

    frames: Tensor  # (B, 3, H, W) in [-1, 1]
    flow: Tensor  # (B, 2, H, W), x and y in units of half a side
    shade: Tensor  # (B, 1, H, W), what is added to every colour


class ExpressionGenerator(nn.Module):
    """Edits frames to show another emotion.

    Args:
        emotions: E, the number of emotions.
        config: sizes and what drives it.
    """

    def __init__(self, emotions: int, config: GeneratorConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GeneratorConfig()
        style = 64
        if config.driven_by == "emotion":
            self.target: nn.Module = nn.Embedding(emotions, style)
        else:
            self.target = _FaceEncoder(style)
        self.encoder = _FaceEncoder(64)
        self.mix = nn.Sequential(
            nn.Linear(64 + style, config.hidden), nn.SiLU(),
            nn.Linear(config.hidden, config.hidden), nn.SiLU(),
            nn.Linear(config.hidden, 2 * config.fields),
        )  # fmt: skip
        # Not exactly zero: a zero change has a zero gradient in a directional loss, and would never begin.
        self.flow = nn.Parameter(0.01 * torch.randn(config.fields, 2, 16, 16))
        self.shade = nn.Parameter(0.01 * torch.randn(config.fields, 1, 32, 32))

    def forward(
        self,
        frames: Tensor,  # (B, 3, H, W) in [-1, 1]
        target: Tensor,  # (B,) int emotions, or (B, 3, H, W) reference frames
    ) -> Tensor:
        """Edited frames, (B, 3, H, W) in [-1, 1]."""
        return self.edit(frames, target).frames

    def edit(self, frames: Tensor, target: Tensor) -> Edit:
        """`forward`, with the flow and the shade that make the edit."""
        height, width = frames.shape[-2:]
        mix = self.mix(torch.cat([self.encoder(frames), self.target(target)], dim=1))
        of_flow, of_shade = mix.chunk(2, dim=1)  # (B, K) each
        flow = torch.einsum("bk,kchw->bchw", of_flow, self.flow)
        flow = F.interpolate(flow, (height, width), mode="bicubic", align_corners=False)
        shade = torch.einsum("bk,kchw->bchw", of_shade, self.shade)
        shade = F.interpolate(shade, (height, width), mode="bilinear", align_corners=False)
        window = soft_window(height, width, self.config.window).to(frames)
        flow = window * 2 * self.config.reach * torch.tanh(flow)
        shade = window * self.config.residual * torch.tanh(shade)
        return Edit((warp(frames, flow) + shade).clamp(-1, 1), flow, shade)


def save_generator(path: str | Path, generator: ExpressionGenerator, emotions: Sequence[str], size: int) -> None:
    """Write the weights, the emotions' names and the side of the frames it was trained on."""
    header = {"emotions": list(emotions), "size": size, "generator": asdict(generator.config)}
    save_tensors(path, "generator", generator.state_dict(), header)


def load_generator(
    path: str | Path, device: torch.device | str | None = None
) -> tuple[ExpressionGenerator, list[str], int]:
    """(generator in eval mode, emotions, side); raises as `files.load_tensors`."""
    state, header = load_tensors(path, "generator")
    generator = ExpressionGenerator(len(header["emotions"]), GeneratorConfig(**header["generator"]))
    generator.load_state_dict(state)
    return generator.eval().requires_grad_(False).to(device), header["emotions"], header["size"]


def soft_window(
    height: int,
    width: int,
    window: Sequence[float],  # centre x, y, half-axes, as fractions
) -> Tensor:  # (H, W) in [0, 1]
    """1 inside a rounded rectangle, falling smoothly to 0 around it."""
    y = (torch.arange(height) + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    radius = ((x - window[0]) / window[2]) ** 4 + (((y - window[1]) / window[3]) ** 4)[:, None]
    return ((1.4 - radius) / 0.8).clamp(0, 1)


def warp(
    frames: Tensor,  # (B, C, H, W)
    flow: Tensor,  # (B, 2, H, W) in units of half a side, x then y
) -> Tensor:
    """Each pixel takes the colour found at its own place plus `flow`, bilinearly; NaN where the flow is."""
    theta = torch.eye(2, 3, device=frames.device, dtype=frames.dtype).expand(len(frames), 2, 3)
    grid = F.affine_grid(theta, list(frames.shape), align_corners=False) + flow.movedim(1, -1)
    # At a NaN, PyTorch's backward on the CPU writes outside its memory (pytorch issue 24823).
    warped = F.grid_sample(frames, grid.nan_to_num(), padding_mode="border", align_corners=False)
    return warped.masked_fill(grid.isnan().any(-1)[:, None], torch.nan)


class _FaceEncoder(nn.Module):
    def __init__(self, style: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(8, 32), nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GroupNorm(8, 64), nn.SiLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(),
            nn.Linear(64 * 16, style),
        )  # fmt: skip

    def forward(self, frames: Tensor) -> Tensor:
        return self.body(frames)
