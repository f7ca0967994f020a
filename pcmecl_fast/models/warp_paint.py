"""The built-in generator: learned fields that move, shade and paint a face, mixed for each frame (ours).

    change  = style(target) − style(shown)                               the emotion shown is recognised
    a, b, c = mix(encoder(frame), change) − mix(encoder(frame), 0)       zero for no change
    flow    = window · reach · tanh(Σ a_k flow_k),   shade = window · shading · tanh(Σ b_k shade_k)
    α_p     = window · clamp(Σ c_pk opacity_k, 0, 1)                     one opacity for each of P paints
    edited  = clamp( (1 − α) · ((1 + warp(frame, flow)) · exp(shade) − 1) + Σ α_p colour_p ),   α = Σ α_p ≤ 1

Moved skin has no teeth, no white around the iris and no fold in it: that is painted. A paint's colour is the frame's
own at a learned place, tinted, or a learned one, or between the two:

    colour_p = (1 − own_p) · ((1 + Σ_x place_p(x) frame(x)) · tint_p − 1) + own_p · learned_p

Flow and shade begin so close to zero that the untrained generator is the identity, and opacities at exactly zero. Flow,
shade, α and Σ α_p colour_p are an edit's plan: halved, it moves half as far and covers half as much. A plan of zeros
gives the frame back to the bit, and so does every pixel outside the window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcmecl_fast.models.base import Edit, enlarge
from pcmecl_fast.models.warp_fields import (
    WarpFields,
    WarpFieldsConfig,
    lay,
    pose_grid,
    sample,
    soft_window,
)


@dataclass
class WarpPaintConfig(WarpFieldsConfig):
    """The options of `warp-paint`: those of `warp-fields`, and those of the paint."""

    paints: int = 6
    """P: the number of colours."""
    opacities: int = 48
    """The number of learned fields that their opacities are mixed of."""
    features: int = 16
    """C: the number of local features of the frame that flow, shade and opacities are mixed of beside the fields."""
    w_paint: float = 40.0
    """Weight of the mean opacity: skin that can be moved or shaded is not painted over."""


class WarpPaint(WarpFields):
    """Moves, shades and paints a face by fields shared by everyone; frames may have any size."""

    Config = WarpPaintConfig
    config: WarpPaintConfig

    def __init__(self, emotions: Sequence[str], size: int, config: WarpPaintConfig | None = None) -> None:
        super().__init__(emotions, size, config)
        config = self.config
        paints, opacities = config.paints, config.opacities
        self.mix = self.mix[:-1]
        self.features = _Features(config.features)
        # Without biases, which would cancel.
        self.static_mix = nn.Linear(config.hidden, 2 * config.fields, bias=False)
        self.local_mix = nn.Linear(config.hidden, 3 * config.features, bias=False)
        self.opacity_mix = nn.Linear(config.hidden, paints * (opacities + config.features), bias=False)
        nn.init.normal_(self.local_mix.weight, std=0.01)
        nn.init.zeros_(self.opacity_mix.weight)
        self.opacity = nn.Parameter(_spots(opacities, 48, config.window))
        self.place = nn.Parameter(torch.randn(paints, 16 * 16))
        self.tint = nn.Parameter(torch.zeros(paints, 3))
        self.learned = nn.Parameter(0.5 * torch.randn(paints, 1).expand(paints, 3).clone())
        self.own = nn.Parameter(torch.zeros(paints, 1))

    def edit(self, frames: Tensor, target: Tensor) -> Edit:
        box = Box.around(self.config.window, *frames.shape[-2:])
        plan, shown = self._plan(frames, target, box)
        flow, shade, opacity = F.pad(plan[:, :4].float(), box.padding).split([2, 1, 1], dim=1)
        penalties = self._penalties(flow, shade)
        penalties["paint"] = self.config.w_paint * opacity.mean()
        edited = frames.clone()
        edited[box.pixels] = _carried_out(frames, plan, box)
        return Edit(edited, penalties, shown)

    def plan(self, frames: Tensor, target: Tensor) -> Tensor:  # (B, 7, S, S)
        """Flow, x and y, shade, the paint's opacity, and its colour times opacity."""
        box = Box.around(self.config.window, *frames.shape[-2:])
        return F.pad(self._plan(frames, target, box)[0], box.padding)

    def carry_out(self, frames: Tensor, plan: Tensor) -> Tensor:
        """The fields enlarged, and the frames' own pixels moved, shaded and covered by them."""
        return _carried_out(frames, enlarge(plan, frames), Box.whole(*frames.shape[-2:]))

    def _plan(self, frames: Tensor, target: Tensor, box: Box) -> tuple[Tensor, Tensor | None]:
        """The plan inside the box, outside which it is zero, and the emotion shown."""
        size = height, width = frames.shape[-2], frames.shape[-1]
        config = self.config
        seen = self.encoder(frames)
        change, shown = self._change(frames, target)
        hidden = self._hidden(seen, change) - self._hidden(seen, torch.zeros_like(change))
        grid = pose_grid(0.15 * torch.tanh(self.pose(seen)), height, width)[:, box.rows, box.columns]
        window = soft_window(height, width, config.window).to(frames)[box.rows, box.columns]
        flow_mix, shade_mix = self.static_mix(hidden).chunk(2, dim=1)
        on_spots, on_features = (
            self.opacity_mix(hidden).unflatten(1, (config.paints, -1)).split([config.opacities, config.features], dim=2)
        )
        local_mix = torch.cat([self.local_mix(hidden).unflatten(1, (3, -1)), on_features], 1)
        local = torch.einsum("bpc,bchw->bphw", local_mix, self.features(frames[box.pixels], grid, size))
        flow = lay(torch.einsum("bk,kchw->bchw", flow_mix, self.flow), grid, "bicubic", fine=size)
        flow = window * 2 * config.reach * torch.tanh(flow + local[:, :2])
        shade = torch.einsum("bk,kchw->bchw", shade_mix, self.shade)
        spots = torch.einsum("bpk,khw->bphw", on_spots, self.opacity[:, 0])
        laid = lay(torch.cat([shade, spots], 1), grid, "bilinear", fine=size) + local[:, 2:]
        shade = window * config.shading * torch.tanh(laid[:, :1])
        each = window * _Bounded.apply(laid[:, 1:])
        total = each.sum(1, keepdim=True)
        colours = self._colours(frames)
        paint = torch.einsum("bphw,bpc->bchw", each, colours)
        return torch.cat([flow, shade, torch.cat([total, paint], 1) / total.clamp(min=1)], 1), shown

    def _hidden(self, seen: Tensor, change: Tensor) -> Tensor:
        return self.mix(torch.cat([seen, change], 1))

    def _colours(self, frames: Tensor) -> Tensor:  # (B, P, 3) in [-1, 1]
        small = F.adaptive_avg_pool2d(frames, 16).flatten(2)  # (B, 3, 256)
        there = torch.einsum("px,bcx->bpc", self.place.softmax(1), small)
        tinted = (1 + there) * self.tint.exp() - 1
        own = self.own.sigmoid()
        return ((1 - own) * tinted + own * self.learned.tanh()).clamp(-1, 1)


class _Features(nn.Module):
    """What a part of a frame looks like at each of its pixels, seen at about 64 × 64 pixels for the whole frame."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.fine = _convolution(5, 12, 3, 1)
        self.middle = _convolution(12, 24, 4, 2)
        self.coarse = nn.Sequential(_convolution(24, 32, 4, 2), _convolution(32, 32, 3, 1))
        self.up_middle = _convolution(24 + 32, 24, 3, 1)
        self.up_fine = nn.Sequential(nn.Conv2d(12 + 24, features, 3, padding=1), nn.Tanh())

    def forward(
        self,
        part: Tensor,  # (B, 3, h, w) in [-1, 1]
        grid: Tensor,  # (B, h, w, 2), its pixels' positions in the fields
        size: tuple[int, int],  # of the whole frame
    ) -> Tensor:  # (B, C, h, w) in [-1, 1]
        small = torch.cat([part, grid.movedim(-1, 1)], 1)
        seen_at = [max(4, round(64 * own / whole)) for own, whole in zip(part.shape[-2:], size, strict=True)]
        if list(part.shape[-2:]) != seen_at:
            small = F.interpolate(small, seen_at, mode="area")
        fine = self.fine(small)
        middle = self.middle(fine)
        middle = self.up_middle(torch.cat([middle, _resized(self.coarse(middle), middle)], 1))
        return _resized(self.up_fine(torch.cat([fine, _resized(middle, fine)], 1)), part)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=1)
    return nn.Sequential(convolution, nn.GroupNorm(4, outputs), nn.SiLU())


def _resized(images: Tensor, like: Tensor) -> Tensor:
    if images.shape[-2:] == like.shape[-2:]:
        return images
    return F.interpolate(images, like.shape[-2:], mode="bilinear", align_corners=False)


class Box(NamedTuple):
    """A part of a frame: what is outside it is not computed."""

    rows: slice
    columns: slice
    padding: tuple[int, int, int, int]  # left, right, top and bottom, to the whole frame

    @classmethod
    def around(cls, window: Sequence[float], height: int, width: int) -> Box:
        """The rows and columns in which `soft_window` is not zero."""
        inside = soft_window(height, width, window) > 0
        rows, columns = inside.any(1).nonzero()[:, 0].tolist(), inside.any(0).nonzero()[:, 0].tolist()
        if not rows:
            return cls.whole(height, width)
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        return cls(slice(top, bottom), slice(left, right), (left, width - right, top, height - bottom))

    @classmethod
    def whole(cls, height: int, width: int) -> Box:
        return cls(slice(0, height), slice(0, width), (0, 0, 0, 0))

    @property
    def pixels(self) -> tuple[Any, ...]:
        """Indexes (B, C, H, W)."""
        return (..., self.rows, self.columns)


def _carried_out(
    frames: Tensor,  # (B, 3, H, W) in [-1, 1]
    plan: Tensor,  # (B, 7, h, w), inside the box
    box: Box,
) -> Tensor:  # (B, 3, h, w) in [-1, 1]
    """The part of the frames inside a box, moved, shaded and covered; pixels with a plan of zeros stay, to the bit."""
    flow, shade, opacity, paint = plan.split([2, 1, 1, 3], dim=1)
    own = frames[box.pixels]
    grid = pose_grid(flow.new_zeros(len(flow), 4), *frames.shape[-2:])[:, box.rows, box.columns]
    moved = torch.where((flow == 0).all(1, keepdim=True), own, sample(frames, grid + flow.movedim(1, -1)))
    shaded = (moved + (moved + 1) * shade.expm1()).clamp(-1, 1)
    # More than opaque, as an exaggerated plan may be, is opaque in the same colour. No clamp at zero, where opacities
    # begin: it would have no gradient there.
    return (shaded - opacity.clamp(max=1) * shaded + paint / opacity.clamp(min=1)).clamp(-1, 1)


class _Bounded(torch.autograd.Function):
    """clamp(x, 0, 1), whose gradient vanishes only where it leads further out: what is not painted yet can be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        further_out = (x.clamp(0, 1) - x) * gradient > 0
        return gradient.masked_fill(further_out, 0)


def _spots(count: int, side: int, window: Sequence[float]) -> Tensor:  # (count, 1, side, side)
    """Soft round spots, evenly over the window in rows."""
    rows = max(1, round(count**0.5))
    columns = math.ceil(count / rows)
    number = torch.arange(count)
    x = window[0] + window[2] * ((2 * (number % columns) + 1) / columns - 1)
    y = window[1] + window[3] * ((2 * (number // columns) + 1) / rows - 1)
    at = (torch.arange(side) + 0.5) / side
    across, down = ((at - centre[:, None]) / half for centre, half in ((x, window[2] / columns), (y, window[3] / rows)))
    return (-(across[:, None, None, :] ** 2 + down[:, None, :, None] ** 2) / 2).exp()
