"""The built-in generator: a few learned fields that move and shade a face, mixed anew for every frame (ours).

    change = style(target) − style(shown)                                 what the frame shows now is recognised
    a, b   = mix(encoder(frame), change) − mix(encoder(frame), 0)         K weights each; nothing asked, nothing changed
    flow   = window · reach · tanh(Σ a_k flow_k),   shade = window · shading · tanh(Σ b_k shade_k)
    edited = clamp( (1 + warp(frame, flow)) · exp(shade) − 1 )

The fields are the same for everybody, as muscles are, and lie where the head does; how much of each is used depends on
the face and on the change. So few degrees of freedom can bend brows and lips, but not draw the patterns that please a
CLIP tower and nobody else: an encoder–decoder that paints freely raised CLIP's score as far and the expression hardly
at all. The weights start so close to zero that the untrained generator is the identity.
"""

from __future__ import annotations

import itertools
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
    shading: float = 0.4
    """Largest change of brightness, as a natural logarithm; hues stay."""
    window: list[float] = field(default_factory=lambda: [0.5, 0.60, 0.27, 0.27])
    """Centre x, y and half-axes of what may change, as fractions of the frame: expressions are not in hair or walls."""
    driven_by: Literal["emotion", "reference"] = "emotion"
    """What tells the target: an emotion's index, or a frame of anyone who shows it."""


class Edit(NamedTuple):
    """An edit and how it was made."""

    frames: Tensor  # (B, 3, H, W) in [-1, 1]
    flow: Tensor  # (B, 2, H, W), x and y in units of half a side
    shade: Tensor  # (B, 1, H, W), logarithm of what brightness is multiplied by
    shown: Tensor | None  # (B, E) logits of the emotion that the frames show; None for one driven by a reference


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
        self.shown: nn.Module | None = None
        if config.driven_by == "emotion":
            self.target: nn.Module = nn.Embedding(emotions, style)
            self.shown = nn.Sequential(_FaceEncoder(style), nn.SiLU(), nn.Linear(style, emotions))
        else:
            self.target = _FaceEncoder(style)
        self.encoder = _FaceEncoder(64)
        self.mix = nn.Sequential(
            nn.Linear(64 + style, config.hidden), nn.SiLU(),
            nn.Linear(config.hidden, config.hidden), nn.SiLU(),
            nn.Linear(config.hidden, 2 * config.fields),
        )  # fmt: skip
        # Not exactly zero: a zero change has a zero gradient in a directional loss, and would never begin.
        self.pose = nn.Linear(64, 4)
        nn.init.normal_(self.pose.weight, std=0.01)
        nn.init.zeros_(self.pose.bias)
        self.flow = nn.Parameter(0.01 * torch.randn(config.fields, 2, 16, 16))
        self.shade = nn.Parameter(0.01 * torch.randn(config.fields, 1, 48, 48))

    def forward(
        self,
        frames: Tensor,  # (B, 3, H, W) in [-1, 1]
        target: Tensor,  # (B,) int emotions, or (B, 3, H, W) reference frames
    ) -> Tensor:
        """Edited frames, (B, 3, H, W) in [-1, 1]."""
        return self.edit(frames, target).frames

    def edit(self, frames: Tensor, target: Tensor) -> Edit:
        """`forward`, with the flow and the shade that make the edit and the emotion that was seen."""
        height, width = frames.shape[-2:]
        seen = self.encoder(frames)
        change, shown = self._change(frames, target)
        mix = self.mix(torch.cat([seen, change], 1)) - self.mix(torch.cat([seen, torch.zeros_like(change)], 1))
        of_flow, of_shade = mix.chunk(2, dim=1)  # (B, K) each
        grid = pose_grid(0.15 * torch.tanh(self.pose(seen)), height, width)
        flow = _lay(torch.einsum("bk,kchw->bchw", of_flow, self.flow), grid, "bicubic")
        shade = _lay(torch.einsum("bk,kchw->bchw", of_shade, self.shade), grid, "bilinear")
        window = soft_window(height, width, self.config.window).to(frames)
        flow = window * 2 * self.config.reach * torch.tanh(flow)
        shade = window * self.config.shading * torch.tanh(shade)
        return Edit(((warp(frames, flow) + 1) * shade.exp() - 1).clamp(-1, 1), flow, shade, shown)

    def _change(self, frames: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """From the style that is shown to the one that is asked for, and the emotion recognised on the way."""
        if self.shown is None:
            return self.target(target) - self.target(frames), None
        shown = self.shown(frames)
        # Detached: recognition learns from labels alone, not to be wrong where that suits an edit.
        return self.target(target) - shown.detach().softmax(dim=1) @ self.target.weight, shown


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
    return _sample(frames, grid)


def pose_grid(
    pose: Tensor,  # (B, 4): zoom − 1, roll, shift x, shift y; in units of half a side
    height: int,
    width: int,
) -> Tensor:  # (B, H, W, 2)
    """For each pixel its place in the fields, which lie as the head does; zero is where they lie on the frame."""
    zoom, roll, x, y = pose.unbind(1)
    theta = torch.stack([1 + zoom, roll, x, -roll, 1 + zoom, y], dim=1).unflatten(1, (2, 3))
    return F.affine_grid(theta, [len(pose), 1, height, width], align_corners=False)


def _lay(
    fields: Tensor,  # (B, C, h, w), coarse
    grid: Tensor,  # (B, H, W, 2)
    smoothly: str,
) -> Tensor:  # (B, C, H, W)
    fine = F.interpolate(fields, grid.shape[1:3], mode=smoothly, align_corners=False)
    return _sample(fine, grid)


def _sample(
    images: Tensor,  # (B, C, h, w)
    grid: Tensor,  # (B, H, W, 2)
) -> Tensor:  # (B, C, H, W)
    """Bilinear samples; NaN where the grid is."""
    # At a NaN, PyTorch's backward on the CPU writes outside its memory (pytorch issue 24823).
    sampled = F.grid_sample(images, grid.nan_to_num(), padding_mode="border", align_corners=False)
    return sampled.masked_fill(grid.isnan().any(-1)[:, None], torch.nan)


class _FaceEncoder(nn.Module):
    def __init__(self, style: int) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, 64)
        self.body = nn.Sequential(
            *(
                layer
                for i, o in itertools.pairwise(widths)
                for layer in (nn.Conv2d(i, o, 3, stride=2, padding=1), nn.GroupNorm(8, o), nn.SiLU())
            ),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(),
            nn.Linear(64 * 16, style),
        )  # fmt: skip

    def forward(self, frames: Tensor) -> Tensor:
        return self.body(frames)
