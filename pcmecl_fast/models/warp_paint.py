"""The built-in generator: the learned fields of `warp-fields`, refined and painted over by a network that looks (ours).

    change = style(target) − style(shown)                               the emotion shown is recognised
    seen   = gate(change) ⊙ U-Net(frame, contrast, place; change)       the change scales and shifts its channels
    flow', shade', α, crisp = head(seen)                                no biases: zero for no change
    flow   = window · reach · tanh(flow of the fields + flow'),  shade = window · shading · tanh(… + shade')
    own    = (1 + warp(frame, flow)) · exp(shade) − 1,  own ← own + crisp · (own − mean of 3 × 3 (own))
    edited = clamp( (1 − Σ α) · own + Σ_c α_c · colour_c )
    crisp  = mouth · window · sharpness · clamp(crisp, 0, 1),  a window of its own around the mouth
    α_c    = window · strokes(clamp(α_c, 0, 1) / max(1, Σ clamp(α, 0, 1))),  one for each colour; Σ α less its opening
    colour = [white, black, Σ_x softmax(place_p)(x) frame(x) for p = 1 … P]

Fields that everyone shares learn soon what a face does, but not where this face has its lids and lips: alone, they
smear wide eyes. The network alone learns that, and takes twice as many steps to show as much. Moved skin has no teeth,
no white around the iris and no fold in it: that is painted, with a mask and a colour as in GANimation (Pumarola et al.
2018), over as little of the face as the penalties leave to it: what the frame has keeps its texture where it is moved.
The colours are white, black and the frame's own at P learned places: free ones were magenta where that pleased. Each
has an opacity of its own, so that a pixel says from the start which it would rather be: one opacity for a mixture,
which begins as the mean of the colours, was wanted nowhere and stayed at zero. Paint comes in strokes: where cover
holds a wide square it is taken away, and costs as much as if it were there, so that no critic gains anything by a veil.

Teeth that a raised lip bares are a line of one pixel, and so is the dark below them. A line that is moved by parts of a
pixel grows dull, and to paint it each of its pixels has to be met. So mouths are sharpened, too: it takes a place and
no line, and what is bright gets brighter while what is dark gets darker. Around eyes, irises became slits by it.

The network sees the window at `detail` pixels for the whole frame, whatever the frame's size, and beside the colours
their local contrast, in which lips and lids are as plain on dark skin as on light. Flow, shade, Σ α, Σ α_c · colour_c
and crisp are an edit's plan, which is enlarged to the frame (and a mean is over 3 × 3 of the network's pixels): halved,
it moves half as far and covers half as much. Trained, the network looks twice, at the frame and at its mirror image,
and the plan is the mean of both: where one look puts a brow or a lip a pixel off, the other seldom does.
The weights start so close to zero that the untrained generator is the identity, and opacities at exactly zero. A plan
of zeros gives the frame back to the bit, and so does every pixel outside the window.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcmecl_fast.models.base import Edit, enlarge
from pcmecl_fast.models.warp_fields import (
    STYLE,
    WarpFields,
    WarpFieldsConfig,
    check_window,
    pose_grid,
    reached,
    sample,
    soft_window,
)


@dataclass
class WarpPaintConfig(WarpFieldsConfig):
    """The options of `warp-paint`: those of `warp-fields`, and those of the network."""

    detail: int = 64
    """Pixels along the longer side of a frame as the network sees and plans it; smaller frames are seen as they are."""
    widths: list[int] = field(default_factory=lambda: [16, 32, 48, 64])
    """Channels of the U-Net at full, half, quarter and eighth resolution: multiples of 8."""
    last: int = 16
    """Channels of its last layer, at full resolution: a multiple of 8."""
    places: int = 4
    """P: how many learned places of the face lend their colours to the paint."""
    mirrored: bool = True
    """Once trained, look at the mirror image of a frame, too; only where window and mouth are in the middle."""
    w_folding: float = 100.0
    """Weight of moving neighbouring pixels apart further than skin stretches: what opens is painted."""
    least: float = 0.05
    """Once trained, paint that covers less than this is left out, and from twice as much on stays: it is what leaks out
    of teeth into cheeks."""
    stroke: float = 0.25
    """The widest that a stroke of paint may be, as a fraction of a frame's longer side: cover that holds a wider square
    is taken away, whatever the losses want. Without it (1), critics of few real faces covered whole mouths."""
    sharpness: float = 3.0
    """The most of its difference from its surroundings that is added to a pixel of the mouth; 0 sharpens nothing."""
    mouth: list[float] = field(default_factory=lambda: [0.5, 0.75, 0.2, 0.13])
    """Centre x, y and half-axes of the region that may be sharpened, in fractions of the frame."""
    w_sharpness: float = 5.0
    """Weight of the mean sharpness."""
    w_paint: float = 20.0
    """Weight of what the paint covers, or would without `stroke`, mean log(1 + 10 Σ α) / log 11: a tenth of a cover
    costs 29 % of it."""


class WarpPaint(WarpFields):
    """Moves, shades and paints a face, by fields and by what a network sees; frames may have any size."""

    Config = WarpPaintConfig
    before: ClassVar[Mapping[str, Any]] = {**WarpFields.before, "sharpness": 0.0}
    config: WarpPaintConfig

    def __init__(self, emotions: Sequence[str], size: int, config: WarpPaintConfig | None = None) -> None:
        super().__init__(emotions, size, config)
        widths, last = self.config.widths, self.config.last
        if len(widths) < 2 or any(width < 8 or width % 8 for width in widths):
            raise ValueError(f"widths: takes two or more multiples of 8, got {widths}")
        if last < 8 or last % 8:
            raise ValueError(f"last: takes a multiple of 8, got {last}")
        if not 0 <= self.config.least < 1:
            raise ValueError(f"least: takes 0 to less than 1, got {self.config.least}")
        if not 0 < self.config.stroke <= 1:
            raise ValueError(f"stroke: takes more than 0, up to 1, got {self.config.stroke}")
        check_window("mouth", self.config.mouth)
        if self.config.sharpness < 0:
            raise ValueError(f"sharpness: takes 0 or more, got {self.config.sharpness}")
        self.condition = nn.Sequential(nn.Linear(STYLE, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        # Colour, its contrast, and place, x and y.
        self.entry = _Layer(3 + 3 + 2, widths[0])
        self.down = nn.ModuleList([_Layer(widths[0], widths[0])])
        self.down.extend(_Layer(i, o, halved=True) for i, o in itertools.pairwise(widths))
        self.middle = nn.ModuleList(_Layer(widths[-1], widths[-1], 128) for _ in range(2))
        self.up = nn.ModuleList(
            _Up(below, beside, beside, 128) for beside, below in reversed(list(itertools.pairwise(widths[1:])))
        )
        self.up.append(_Up(widths[1], widths[0], last, 128))
        # Neither has a bias: no change, no edit.
        self.gate = nn.Linear(STYLE, last, bias=False)
        outputs = 3 + 2 + self.config.places + bool(self.config.sharpness)
        self.head = nn.Conv2d(last, outputs, 3, padding=1, bias=False)
        self.place = nn.Parameter(torch.randn(self.config.places, 16 * 16))
        with torch.no_grad():
            # Not exactly zero: a zero change has a zero gradient in a directional loss, and training would never start.
            self.head.weight[:3] *= 0.1
            self.head.weight[3:] = 0

    def edit(self, frames: Tensor, target: Tensor) -> Edit:
        plan, wanted, shown = self._plan(frames, target)
        flow, shade, _, crisp = plan.float().split([2, 1, 4, 1], dim=1)
        penalties = self._penalties(flow, shade)
        penalties["sharpness"] = self.config.w_sharpness * crisp.mean()
        penalties["paint"] = self.config.w_paint * covered(wanted.float())
        box = Box.around(self.config.window, *frames.shape[-2:])
        edited = frames.clone()
        edited[box.pixels] = self._carried_out(frames, enlarge(plan, frames)[box.pixels], box)
        return Edit(edited, penalties, shown)

    def plan(self, frames: Tensor, target: Tensor) -> Tensor:  # (B, 8, S, S)
        """Flow, x and y, shade, the paint's opacity, its colour times opacity, and how much is sharpened."""
        box = Box.around(self.config.window, *frames.shape[-2:])
        return F.pad(enlarge(self._plan(frames, target)[0], frames)[box.pixels], box.padding)

    def carry_out(self, frames: Tensor, plan: Tensor) -> Tensor:
        """The plan enlarged, and the frames' own pixels moved, shaded, sharpened and covered by it."""
        return self._carried_out(frames, enlarge(plan, frames), Box.whole(*frames.shape[-2:]))

    def _carried_out(
        self,
        frames: Tensor,  # (B, 3, H, W) in [-1, 1]
        plan: Tensor,  # (B, 8, h, w), inside the box
        box: Box,
    ) -> Tensor:  # (B, 3, h, w) in [-1, 1]
        """The part of the frames inside a box, moved, shaded, sharpened and covered.

        Pixels with a plan of zeros stay, to the bit.
        """
        flow, shade, opacity, paint, crisp = plan.split([2, 1, 1, 3, 1], dim=1)
        own = frames[box.pixels]
        grid = pose_grid(flow.new_zeros(1, 4), *frames.shape[-2:])[:, box.rows, box.columns]
        moved = torch.where((flow == 0).all(1, keepdim=True), own, sample(frames, grid + flow.movedim(1, -1)))
        shaded = (moved + (moved + 1) * shade.expm1()).clamp(-1, 1)
        mouth = self._mouth(*frames.shape[-2:])
        if mouth is not None:
            near = mouth.seen_from(box).pixels
            lips = shaded[near].clone()  # backward needs what is written over
            apart = lips - _around(lips, 3 * max(frames.shape[-2:]) / self.config.detail)
            shaded[near] = (lips + crisp[near] * apart).clamp(-1, 1)
        # More than opaque, as an exaggerated plan may be, is opaque in the same colour. No clamp at zero, where
        # opacities begin: it would have no gradient there.
        return (shaded - opacity.clamp(max=1) * shaded + paint / opacity.clamp(min=1)).clamp(-1, 1)

    def _mouth(self, height: int, width: int) -> Box | None:
        """What may be sharpened, if anything may."""
        box = Box.around(self.config.mouth, height, width).within(Box.around(self.config.window, height, width))
        return box if self.config.sharpness and all(box.shape) else None

    def _plan(self, frames: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The plan at the size that the network sees, the cover that was wanted, and the emotion shown."""
        config = self.config
        frames = _shrunk(frames, config.detail)
        target = target if target.dim() == 1 else _shrunk(target, config.detail)
        # Not while it trains: two looks that learn together err together.
        if self.training or not config.mirrored or {config.window[0], config.mouth[0]} != {0.5}:
            change, shown = self._change(frames, target)
            return *self._look(frames, change), shown
        count, looks = len(frames), torch.cat([frames, frames.flip(-1)])
        change, shown = self._change(looks, torch.cat([target, target]))
        change = change.unflatten(0, (2, count)).mean(0)
        both, wanted = self._look(looks, torch.cat([change, change]))
        plan, turned = both.split(count)
        return (plan + _mirrored(turned)) / 2, wanted[:count], None if shown is None else shown[:count]

    def _look(
        self,
        frames: Tensor,  # (B, 3, S, S)
        change: Tensor,  # (B, STYLE)
    ) -> tuple[Tensor, Tensor]:  # (B, 8, S, S) and (B, 1, S, S)
        """The plan, and Σ α with what is too wide for a stroke."""
        config = self.config
        size = height, width = frames.shape[-2], frames.shape[-1]
        box = Box.around(config.window, *size)
        place = pose_grid(frames.new_zeros(1, 4), *size).movedim(-1, 1)[box.pixels]
        part = frames[box.pixels]
        inputs = [part, local_contrast(part), place.expand(len(part), -1, -1, -1)]
        seen = self._seen(torch.cat(inputs, 1), self.condition(change))
        out = self.head(seen * self.gate(change)[..., None, None])[..., : part.shape[-2], : part.shape[-1]]
        windows = [soft_window(height, width, window) for window in (config.window, config.mouth)]
        window, mouth = torch.stack(windows).to(out)[:, box.rows, box.columns]
        flow, shade, opacities, crisp = out.split([2, 1, 2 + config.places, out.shape[1] - 5 - config.places], dim=1)
        shared_flow, shared_shade = self._mixed(frames, change, (box.rows, box.columns))
        flow = window * 2 * config.reach * torch.tanh(shared_flow + flow)
        shade = window * config.shading * torch.tanh(shared_shade + shade)
        if config.sharpness:
            crisp = window * mouth * config.sharpness * _Bounded.apply(crisp)
        else:
            crisp = torch.zeros_like(shade)
        opacities = _Bounded.apply(opacities)
        opacities = opacities / opacities.sum(1, keepdim=True).clamp(min=1)
        cover = opacities.sum(1, keepdim=True)
        left = 1 - opened(cover, 1 + round(config.stroke * max(size))) / cover.clamp(min=1e-6)
        if not self.training and config.least:
            left = left * (left * cover / config.least - 1).clamp(0, 1)
        opacities = window * opacities * left
        cover = F.pad(window * cover, box.padding)
        paint = torch.einsum("bphw,bpc->bchw", opacities, self._palette(part))
        plan = torch.cat([flow, shade, opacities.sum(1, keepdim=True), paint, crisp], 1)
        return F.pad(plan, box.padding), cover

    def _palette(
        self,
        part: Tensor,  # (B, 3, h, w) in [-1, 1]
    ) -> Tensor:  # (B, 2 + P, 3)
        """White, black, and the colours at the places."""
        own = torch.einsum("px,bcx->bpc", self.place.softmax(1), F.adaptive_avg_pool2d(part, 16).flatten(2))
        white, black = (own.new_full((len(own), 1, 3), level) for level in (0.9, -0.9))  # nothing comes from the host
        return torch.cat([white, black, own], 1)

    def _seen(self, part: Tensor, condition: Tensor) -> Tensor:
        """The U-Net: the part's size filled up to what can be halved."""
        height, width = part.shape[-2:]
        halvings = 2 ** (len(self.down) - 1)
        hidden = F.pad(part, (0, -width % halvings, 0, -height % halvings), mode="replicate")
        hidden = self.entry(hidden.contiguous(memory_format=torch.channels_last))
        beside = []
        for layer in self.down:
            hidden = layer(hidden)
            beside.append(hidden)
        for layer in self.middle:
            hidden = hidden + layer(hidden, condition=condition)
        for layer, skipped in zip(self.up, beside[-2::-1], strict=True):
            hidden = layer(hidden, skipped, condition=condition)
        return hidden


def opened(
    cover: Tensor,  # (B, 1, h, w), at least 0
    side: int,
) -> Tensor:
    """The morphological opening, max of min: what is left of a cover where it holds `side` × `side` pixels."""
    before, after = (side - 1) // 2, side // 2

    def most(x: Tensor) -> Tensor:  # a square's is that of its columns' own
        return F.max_pool2d(F.max_pool2d(x, (side, 1), 1), (1, side), 1)

    return most(F.pad(-most(-F.pad(cover, (before, after) * 2)), (after, before) * 2))


def covered(
    opacity: Tensor,  # (B, 1, h, w) in [0, 1]
) -> Tensor:
    """mean log(1 + 10 α) / log 11: for as much paint, a little everywhere costs more than all of it in few places."""
    return (10 * opacity).log1p().mean() / math.log(11)


def local_contrast(
    frames: Tensor,  # (B, 3, H, W) in [-1, 1]
    around: int = 7,
) -> Tensor:
    """(x − mean) / √(variance + 0.03²), each of `around` × `around` pixels; the variance is that of all channels."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, around, 1, around // 2, count_include_pad=False)

    apart = frames - mean(frames)
    return apart * (mean(apart.square().mean(1, keepdim=True)) + 0.03**2).rsqrt()


def _mirrored(
    plan: Tensor,  # (B, 8, h, w)
) -> Tensor:
    x, others = plan.flip(-1).split([1, 7], dim=1)
    return torch.cat([-x, others], 1)


class _Layer(nn.Module):
    """SiLU((1 + scale) · norm(convolution(x)) + shift), where a condition gives scale and shift."""

    def __init__(self, inputs: int, outputs: int, condition: int = 0, *, halved: bool = False) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 4 if halved else 3, stride=2 if halved else 1, padding=1)
        self.norm = nn.GroupNorm(8, outputs, affine=not condition)
        self.modulation = nn.Linear(condition, 2 * outputs) if condition else None

    def forward(self, *inputs: Tensor, condition: Tensor | None = None) -> Tensor:
        hidden = self.norm(self.convolved(*inputs))
        if self.modulation is not None:
            scale, shift = self.modulation(condition)[..., None, None].chunk(2, dim=1)
            hidden = torch.addcmul(shift, hidden, 1 + scale)
        return F.silu(hidden)

    def convolved(self, *inputs: Tensor) -> Tensor:
        return self.convolution(*inputs)


class _Up(_Layer):
    """A `_Layer` of what is below, enlarged to twice its size, and what is beside, concatenated.

    Nothing is enlarged or concatenated: nearest neighbours enlarged and convolved with 3 × 3 weights are what is below
    spread by 4 × 4 ones, 4 products a pixel instead of 9. On a CPU the largest layer takes half the time.
    """

    spread: Tensor

    def __init__(self, below: int, beside: int, outputs: int, condition: int) -> None:
        super().__init__(below + beside, outputs, condition)
        self.inputs = [below, beside]
        # A pixel of what is below meets those of two neighbouring taps, of the outermost one alone.
        spread = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        self.register_buffer("spread", spread, persistent=False)

    def convolved(self, *inputs: Tensor) -> Tensor:
        below, beside = inputs
        of_below, of_beside = self.convolution.weight.split(self.inputs, dim=1)
        spread = torch.einsum("iy,ncyx,jx->cnij", self.spread, of_below, self.spread)
        enlarged = F.conv_transpose2d(below, spread, self.convolution.bias, stride=2, padding=1)
        return enlarged + F.conv2d(beside, of_beside, padding=1)


def _shrunk(
    frames: Tensor,  # (B, 3, H, W)
    detail: int,
) -> Tensor:
    """The frames with at most `detail` pixels along their longer side, each the mean of what it stands for."""
    height, width = frames.shape[-2:]
    longer = max(height, width)
    if longer <= detail:
        return frames
    size = [max(8, round(side * detail / longer)) for side in (height, width)]
    return F.interpolate(frames, size, mode="area")


class Box(NamedTuple):
    """A part of a frame: what is outside it is not computed."""

    rows: slice
    columns: slice
    height: int  # of the whole frame
    width: int

    @classmethod
    def around(cls, window: Sequence[float], height: int, width: int) -> Box:
        """What the window reaches."""
        return cls(*reached(height, width, window), height, width)

    @classmethod
    def whole(cls, height: int, width: int) -> Box:
        return cls(slice(0, height), slice(0, width), height, width)

    def within(self, other: Box) -> Box:
        """What both boxes hold."""
        rows, columns = (
            slice(max(one.start, two.start), max(min(one.stop, two.stop), one.start, two.start))
            for one, two in zip(self[:2], other[:2], strict=True)
        )
        return self._replace(rows=rows, columns=columns)

    def seen_from(self, other: Box) -> Box:
        """The same pixels, counted from the corner of a box that holds this one."""
        rows, columns = (
            slice(one.start - two.start, one.stop - two.start) for one, two in zip(self[:2], other[:2], strict=True)
        )
        return Box(rows, columns, *other.shape)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """Left, right, top and bottom, to the whole frame."""
        return (
            self.columns.start, self.width - self.columns.stop,
            self.rows.start, self.height - self.rows.stop,
        )  # fmt: skip

    @property
    def pixels(self) -> tuple[Any, ...]:
        """Indexes (B, C, H, W)."""
        return (..., self.rows, self.columns)


def _around(
    frames: Tensor,  # (B, C, h, w)
    side: float,
) -> Tensor:
    """Each pixel's mean over a square of about this side: 3 × 3 pixels or more."""
    reach = max(1, round((side - 1) / 2))
    padded = F.pad(frames, (reach,) * 4, mode="replicate")
    return F.avg_pool2d(F.avg_pool2d(padded, (2 * reach + 1, 1), 1), (1, 2 * reach + 1), 1)


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
