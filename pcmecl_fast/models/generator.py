"""The built-in generator: a compact encoder–decoder that moves and repaints a face (ours).

    edited = clamp( warp(frame, window · flow) + window · residual )

`flow` and `residual` come from the decoder, modulated by the target emotion or by a reference frame, and start so
close to zero that the untrained generator is the identity. A smooth flow can move brows and lip corners but cannot
draw the high-frequency patterns that fool a CLIP tower; the residual opens eyes and shows teeth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcmecl_fast.files import load_tensors, save_tensors


@dataclass
class GeneratorConfig:
    """The built-in generator."""

    width: int = 32
    """Channels at half resolution, the finest that is computed on; doubled at a quarter."""
    blocks: int = 3
    """Residual blocks at a quarter of the resolution."""
    reach: float = 0.06
    """Largest displacement of the flow, as a fraction of the frame's side."""
    residual: float = 0.8
    """Largest change of a colour by the residual, of a range of 2."""
    window: list[float] = field(default_factory=lambda: [0.5, 0.57, 0.27, 0.36])
    """Centre x, y and half-axes of what may change, as fractions of the frame: expressions are not in hair or walls."""
    driven_by: Literal["emotion", "reference"] = "emotion"
    """What tells the target: an emotion's index, or a frame of anyone who shows it."""


class ExpressionGenerator(nn.Module):
    """Edits frames to show another emotion.

    Args:
        emotions: E, the number of emotions.
        config: sizes and what drives it.
    """

    def __init__(self, emotions: int, config: GeneratorConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GeneratorConfig()
        w, style = config.width, 64
        if config.driven_by == "emotion":
            self.target: nn.Module = nn.Embedding(emotions, style)
        else:
            self.target = _ReferenceEncoder(style)
        # 2×2 pixels become channels: full resolution would take most of the time and add nothing to see.
        self.stem = nn.Conv2d(4 * 3 + 2, w, 3, padding=1)
        self.down = _Down(w, 2 * w)
        self.middle = nn.ModuleList(_ModulatedBlock(2 * w, style) for _ in range(config.blocks))
        self.up = _Up(2 * w, w, style)
        self.to_flow = nn.Conv2d(w, 2, 3, padding=1)
        # One channel: an expression shades a face, it does not tint it.
        self.to_residual = nn.Conv2d(w, 4, 3, padding=1)
        for layer in (self.to_flow, self.to_residual):
            # Not exactly zero: a zero change has a zero gradient in a directional loss, and would never begin.
            nn.init.normal_(layer.weight, std=1e-3)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        frames: Tensor,  # (B, 3, H, W) in [-1, 1], H and W divisible by 4
        target: Tensor,  # (B,) int emotions, or (B, 3, H, W) reference frames
    ) -> Tensor:
        """Edited frames, (B, 3, H, W) in [-1, 1]."""
        if frames.shape[-1] % 4 or frames.shape[-2] % 4:
            raise ValueError(f"frames: takes a height and width divisible by 4, got {tuple(frames.shape)}")
        style = self.target(target)
        height, width = frames.shape[-2:]
        steps_y = torch.linspace(-1, 1, height // 2, device=frames.device, dtype=frames.dtype)
        steps_x = torch.linspace(-1, 1, width // 2, device=frames.device, dtype=frames.dtype)
        place = torch.stack(torch.meshgrid(steps_y, steps_x, indexing="ij")).expand(len(frames), -1, -1, -1)
        fine = self.stem(torch.cat([F.pixel_unshuffle(frames, 2), place], dim=1))
        x = self.down(fine)
        for block in self.middle:
            x = block(x, style)
        x = self.up(x, fine, style)
        # Smoothed, so that it bends a face rather than shuffling its pixels.
        flow = F.avg_pool2d(F.pad(self.to_flow(x), (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        flow = F.interpolate(flow, (height, width), mode="bilinear", align_corners=False)
        residual = self.config.residual * torch.tanh(F.pixel_shuffle(self.to_residual(x), 2))
        window = soft_window(height, width, self.config.window).to(frames)
        moved = warp(frames, window * 2 * self.config.reach * torch.tanh(flow))
        return (moved + window * residual).clamp(-1, 1)


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


class _Down(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(F.silu(x)))


class _ModulatedBlock(nn.Module):
    """Residual block whose normalised features are scaled and shifted by the target's style."""

    def __init__(self, width: int, style: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(8, width, affine=False), nn.GroupNorm(8, width, affine=False)
        self.affine = nn.Linear(style, 4 * width)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale1, shift1, scale2, shift2 = self.affine(style)[..., None, None].chunk(4, dim=1)
        y = self.conv1(F.silu(self.norm1(x) * (1 + scale1) + shift1))
        return x + self.conv2(F.silu(self.norm2(y) * (1 + scale2) + shift2))


class _Up(nn.Module):
    def __init__(self, inputs: int, outputs: int, style: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs + outputs, outputs, 3, padding=1)
        self.norm = nn.GroupNorm(8, outputs, affine=False)
        self.affine = nn.Linear(style, 2 * outputs)

    def forward(self, x: Tensor, skip: Tensor, style: Tensor) -> Tensor:
        x = F.interpolate(x, skip.shape[-2:], mode="nearest")
        scale, shift = self.affine(style)[..., None, None].chunk(2, dim=1)
        return F.silu(self.norm(self.conv(torch.cat([x, skip], dim=1))) * (1 + scale) + shift)


class _ReferenceEncoder(nn.Module):
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
