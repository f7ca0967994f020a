"""The built-in generator: a few learned fields that move and shade a face, mixed for each frame (ours).

    change = style(target) − style(shown)                                 the emotion shown is recognised
    a, b   = mix(encoder(frame), change) − mix(encoder(frame), 0)         K weights each; zero for no change
    flow   = window · reach · tanh(Σ a_k flow_k),   shade = window · shading · tanh(Σ b_k shade_k)
    edited = clamp( (1 + warp(frame, flow)) · exp(shade) − 1 )

The fields are the same for everyone, as muscles are, and move with the head; how much of each is used depends on the
face and on the change. So few degrees of freedom can bend brows and lips, but cannot draw the patterns that please a
CLIP tower and nobody else: an encoder–decoder that paints freely raised CLIP's score just as far and hardly changed the
expression. The weights start so close to zero that the untrained generator is the identity.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcmecl_fast.models.base import Edit, Generator, enlarge

STYLE = 64
"""The length of a style."""


@dataclass
class WarpFieldsConfig:
    """The options of `warp-fields`."""

    fields: int = 48
    """K: the number of learned fields that move a face, and of those that shade it."""
    cells: int = 32
    """How many values a side the fields have that move a face: with 16, a lid of two pixels takes the iris along."""
    hidden: int = 128
    """Width of the network that mixes them."""
    reach: float = 0.09
    """Largest displacement of the flow, as a fraction of the frame's side."""
    shading: float = 0.4
    """Largest change of brightness, as a natural logarithm; hues are unchanged."""
    window: list[float] = field(default_factory=lambda: [0.5, 0.60, 0.27, 0.27])
    """Centre x, y and half-axes of the region that may change, in fractions of the frame: not the hair or the walls."""
    driven_by: Literal["emotion", "reference"] = "emotion"
    """How the target is given: as an emotion's index, or as a frame of anyone who shows it."""
    w_smooth: float = 50.0
    """Weight of the total variation of the fields that move and shade the face."""
    w_folding: float = 35.0
    """Weight of moving neighbouring pixels apart further than skin stretches."""
    w_shading: float = 200.0
    """Weight of the mean absolute shade: thin lines are cheap, patches that paint a brow over are not."""


class WarpFields(Generator):
    """Moves and shades a face by fields shared by everyone; frames may have any size."""

    Config = WarpFieldsConfig
    before: ClassVar[Mapping[str, Any]] = {"cells": 16}
    config: WarpFieldsConfig

    def __init__(self, emotions: Sequence[str], size: int, config: WarpFieldsConfig | None = None) -> None:
        super().__init__(emotions, size, config)
        config, style = self.config, STYLE
        check_window("window", config.window)
        self.driven_by = config.driven_by
        self.shown: nn.Module | None = None
        if config.driven_by == "emotion":
            self.target: nn.Module = nn.Embedding(len(emotions), style)
            self.shown = nn.Sequential(_FaceEncoder(style), nn.SiLU(), nn.Linear(style, len(emotions)))
        else:
            self.target = _FaceEncoder(style)
        self.encoder = _FaceEncoder(64)
        self.mix = nn.Sequential(
            nn.Linear(64 + style, config.hidden), nn.SiLU(),
            nn.Linear(config.hidden, config.hidden), nn.SiLU(),
            nn.Linear(config.hidden, 2 * config.fields),
        )  # fmt: skip
        # Not exactly zero: a zero change has a zero gradient in a directional loss, and training would never start.
        self.pose = nn.Linear(64, 4)
        nn.init.normal_(self.pose.weight, std=0.01)
        nn.init.zeros_(self.pose.bias)
        self.flow = nn.Parameter(0.01 * torch.randn(config.fields, 2, config.cells, config.cells))
        self.shade = nn.Parameter(0.01 * torch.randn(config.fields, 1, 48, 48))

    def edit(self, frames: Tensor, target: Tensor) -> Edit:
        flow, shade, shown = self.fields(frames, target)
        return Edit(move_and_shade(frames, flow, shade), self._penalties(flow.float(), shade.float()), shown)

    def plan(self, frames: Tensor, target: Tensor) -> Tensor:  # (B, 3, S, S)
        """Flow, x and y, and shade: `fields` without the emotion shown."""
        flow, shade, _ = self.fields(frames, target)
        return torch.cat([flow, shade], 1)

    def region(self, height: int, width: int) -> tuple[slice, slice]:
        """The rows and columns that the window reaches."""
        return reached(height, width, self.config.window)

    def carry_out(self, frames: Tensor, plan: Tensor) -> Tensor:
        """The fields enlarged, and the frames' own pixels moved and shaded by them: as sharp as they were."""
        flow, shade = enlarge(plan, frames).split([2, 1], dim=1)
        return move_and_shade(frames, flow, shade)

    def fields(
        self,
        frames: Tensor,  # (B, 3, H, W) in [-1, 1]
        target: Tensor,  # (B,) int emotions, or (B, 3, H, W) reference frames
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The fields that make up an edit.

        Returns:
            flow: (B, 2, H, W), x and y in units of half a side.
            shade: (B, 1, H, W), the logarithm of the factor on brightness.
            shown: (B, E) logits of the emotion that the frames show; None for a generator driven by a reference.
        """
        change, shown = self._change(frames, target)
        height, width = frames.shape[-2:]
        flow, shade = self._mixed(frames, change, (slice(0, height), slice(0, width)))
        window = soft_window(height, width, self.config.window).to(frames)
        flow = window * 2 * self.config.reach * torch.tanh(flow)
        shade = window * self.config.shading * torch.tanh(shade)
        return flow, shade, shown

    def _change(self, frames: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """The change from the style shown to the target's, and the logits of the emotion recognised on the way."""
        if self.shown is None:
            return self.target(target) - self.target(frames), None
        shown = self.shown(frames)
        # Detached: recognition learns from labels alone, and must not learn to be wrong to suit an edit.
        return self.target(target) - shown.detach().softmax(dim=1) @ self.target.weight, shown

    def _mixed(
        self,
        frames: Tensor,  # (B, 3, H, W) in [-1, 1]
        change: Tensor,  # (B, STYLE)
        part: tuple[slice, slice],  # rows and columns of the frame, h of H and w of W
    ) -> tuple[Tensor, Tensor]:
        """Flow, (B, 2, h, w), and shade, (B, 1, h, w), before they are bounded: zero for no change."""
        seen = self.encoder(frames)
        mix = self.mix(torch.cat([seen, change], 1)) - self.mix(torch.cat([seen, torch.zeros_like(change)], 1))
        flow_mix, shade_mix = mix.chunk(2, dim=1)  # (B, K) each
        size = height, width = frames.shape[-2], frames.shape[-1]
        rows, columns = part
        grid = pose_grid(0.15 * torch.tanh(self.pose(seen)), height, width)[:, rows, columns]
        flow = lay(torch.einsum("bk,kchw->bchw", flow_mix, self.flow), grid, size, "bicubic")
        return flow, lay(torch.einsum("bk,kchw->bchw", shade_mix, self.shade), grid, size, "bilinear")

    def _penalties(self, flow: Tensor, shade: Tensor) -> dict[str, Tensor]:
        return {
            "smooth": self.config.w_smooth * (total_variation(flow) + total_variation(shade)),
            "folding": self.config.w_folding * folding(flow),
            "shading": self.config.w_shading * shade.abs().mean(),
        }


def move_and_shade(
    frames: Tensor,  # (B, 3, H, W) in [-1, 1]
    flow: Tensor,  # (B, 2, H, W) in units of half a side
    shade: Tensor,  # (B, 1, H, W), a logarithm
) -> Tensor:
    """clamp((1 + warp(frame, flow)) · exp(shade) - 1)."""
    return ((warp(frames, flow) + 1) * shade.exp() - 1).clamp(-1, 1)


def check_window(name: str, window: Sequence[float]) -> None:
    if len(window) != 4 or min(window[2:]) <= 0:
        raise ValueError(f"{name}: takes four numbers, centre x, y and half-axes above 0, got {window}")


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


def reached(
    height: int,
    width: int,
    window: Sequence[float],
) -> tuple[slice, slice]:
    """The rows and columns in which `soft_window` is not zero: of a window that reaches none, all."""
    inside = soft_window(height, width, window) > 0
    rows, columns = inside.any(1).nonzero()[:, 0].tolist(), inside.any(0).nonzero()[:, 0].tolist()
    if not rows:
        return slice(0, height), slice(0, width)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def warp(
    frames: Tensor,  # (B, C, H, W)
    flow: Tensor,  # (B, 2, H, W) in units of half a side, x then y
) -> Tensor:
    """Each pixel takes the colour at its own position plus `flow`, bilinearly; NaN where the flow is."""
    theta = torch.eye(2, 3, device=frames.device, dtype=frames.dtype).expand(len(frames), 2, 3)
    grid = F.affine_grid(theta, list(frames.shape), align_corners=False) + flow.movedim(1, -1)
    return sample(frames, grid)


def pose_grid(
    pose: Tensor,  # (B, 4): zoom − 1, roll, shift x, shift y; in units of half a side
    height: int,
    width: int,
) -> Tensor:  # (B, H, W, 2)
    """Each pixel's position in the fields, which follow the head's pose; at pose zero they align with the frame."""
    zoom, roll, x, y = pose.unbind(1)
    theta = torch.stack([1 + zoom, roll, x, -roll, 1 + zoom, y], dim=1).unflatten(1, (2, 3))
    return F.affine_grid(theta, [len(pose), 1, height, width], align_corners=False)


def total_variation(
    field: Tensor,  # (B, C, H, W)
) -> Tensor:
    """Mean absolute difference of neighbours, in both directions: penalizes busy fields."""
    return field.diff(dim=-1).abs().mean() + field.diff(dim=-2).abs().mean()


def folding(
    flow: Tensor,  # (B, 2, H, W) in units of half a side
    *,
    free: float = 0.4,
) -> Tensor:
    """Mean change of the flow between neighbours beyond `free` pixels, in both directions: there skin would tear."""
    steps = ((flow.diff(dim=d) * flow.shape[d] / 2).abs() for d in (-1, -2))
    return torch.stack([F.relu(step - free).mean() for step in steps]).sum()


def lay(
    fields: Tensor,  # (B, C, h, w), coarse
    grid: Tensor,  # (B, H, W, 2)
    size: tuple[int, int],  # of the frames
    smoothly: str,
) -> Tensor:  # (B, C, H, W)
    """Fields interpolated to a frame's size, and sampled at the grid's positions."""
    sizes = zip(fields.shape[-2:], size, strict=True)
    height, width = (_interpolation(coarse, fine, smoothly, fields) for coarse, fine in sizes)
    return sample(height @ fields @ width.T, grid)


def _interpolation(coarse: int, fine: int, smoothly: str, like: Tensor) -> Tensor:  # (fine, coarse)
    """F.interpolate in one dimension as a matrix: products take a fraction of its time, forth and back."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    each = torch.eye(coarse, dtype=dtype, device=like.device)[None, :, :, None]
    return F.interpolate(each, (fine, 1), mode=smoothly, align_corners=False)[0, :, :, 0].T.to(like.dtype)


def sample(
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
