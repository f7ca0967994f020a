"""Paints frames from their parameters with batched tensor operations."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pcmecl_fast.synthetic.people import ACTION_UNITS, SHAPE, FrameParameters, Identities

NOISE_IMAGES = 64


def draw(identities: Identities, parameters: FrameParameters, size: int) -> Tensor:
    """Draw frames without noise, (B, 3, size, size) in [-1, 1].

    Layers are painted back to front; each is a signed distance in face units, turned into coverage over one pixel.
    """
    canvas = _Canvas(identities, parameters, size)
    canvas.backdrop()
    canvas.back_hair()
    canvas.neck_and_shirt()
    canvas.head()
    canvas.folds()
    canvas.eyes()
    canvas.brows()
    canvas.nose()
    canvas.mouth()
    canvas.front_hair()
    return canvas.finish()


def noise_images(size: int, seed: int) -> Tensor:
    """A fixed set of sensor noise, (NOISE_IMAGES, 3, size, size): a redrawn frame gets exactly the same noise."""
    generator = torch.Generator().manual_seed(seed + 7919)
    return 0.02 * torch.randn(NOISE_IMAGES, 3, size, size, generator=generator)


class _Lips(NamedTuple):
    """The position of the lips, each (B, S, S) or broadcastable to it, in face units."""

    half: Tensor  # half the mouth's width
    middle: Tensor  # height of the line between the lips, then of their edges
    inner_top: Tensor
    inner_bottom: Tensor
    outer_top: Tensor
    outer_bottom: Tensor
    opening: Tensor  # how far the lips are apart


class _Canvas:
    """The picture being painted and the coordinates of the face: x to the right, y down, the head about 1.4 high."""

    def __init__(self, identities: Identities, parameters: FrameParameters, size: int) -> None:
        who = parameters.individual
        self.shape = {name: identities.shape[who, i][:, None, None] for i, name in enumerate(SHAPE)}
        self.skin, self.hair = identities.skin[who], identities.hair[who]
        self.iris, self.shirt = identities.eyes[who], identities.shirt[who]
        self.background = identities.background[who]
        self.hair_length = identities.hair_length[who][:, None, None]
        units = parameters.action_units.clamp(0, 1.8)
        # unit[name] = (activation on the face's own left = +x, on its right = −x), each (B, 1, 1)
        self.unit = {
            name: (units[:, i, 0][:, None, None], units[:, i, 1][:, None, None]) for i, name in enumerate(ACTION_UNITS)
        }
        self.open = parameters.speech[:, 0][:, None, None]
        self.spread = parameters.speech[:, 1][:, None, None]
        self.blink = parameters.blink[:, None, None]
        self.light = parameters.light
        shift_x, shift_y, roll, log_scale, yaw = (parameters.pose[:, i][:, None, None] for i in range(5))
        steps = (torch.arange(size) + 0.5) * (2 / size) - 1
        self.grid_y, self.grid_x = torch.meshgrid(steps, steps, indexing="ij")
        scale = torch.exp(log_scale) * 0.98
        x, y = self.grid_x - shift_x, self.grid_y - shift_y - 0.06
        self.x = (torch.cos(roll) * x + torch.sin(roll) * y) / scale
        self.y = (-torch.sin(roll) * x + torch.cos(roll) * y) / scale
        self.pixel = 2 / size / scale
        # Turning the head moves the features relative to the outline, the nose most.
        self.feature_x = self.x - 0.07 * yaw
        self.nose_x = self.x - 0.11 * yaw
        self.picture = self.background[:, :, None, None] * torch.ones(len(who), 3, size, size)
        self.half_width = 0.55 * (1 + 0.10 * self.shape["face_width"])
        self.eye_y = -0.09 + 0.03 * self.shape["eye_height"]
        self.mouth_y = 0.40 + 0.025 * self.shape["mouth_height"]

    def paint(self, colour: Tensor, distance: Tensor, opacity: Tensor | float = 1.0, soft: float = 1.0) -> Tensor:
        """Blend `colour` (B, 3) where `distance` (B, S, S) is negative; returns the coverage."""
        coverage = (0.5 - distance / (self.pixel * soft)).clamp(0, 1) * opacity
        self.blend(colour, coverage)
        return coverage

    def blend(self, colour: Tensor, coverage: Tensor) -> None:
        """Move the picture towards `colour` (B, 3) by `coverage` (B, S, S) in [0, 1]."""
        self.picture = self.picture + coverage[:, None] * (colour[:, :, None, None] - self.picture)

    def both(self, name: str) -> Tensor:
        left, right = self.unit[name]
        return (left + right) / 2

    def sides(self) -> list[tuple[int, float]]:
        """(index into the pair of activations, sign of x): the face's left is at +x."""
        return [(0, 1.0), (1, -1.0)]

    def backdrop(self) -> None:
        shade = 1 + 0.12 * self.grid_y
        self.picture = self.picture * (2 - shade)

    def back_hair(self) -> None:
        length = 0.15 + 0.85 * self.hair_length
        radius = self.half_width + 0.10 + 0.04 * self.shape["hair_volume"]
        y = self.y + 0.16
        top = torch.sqrt(self.x**2 / radius**2 + y**2 / 0.70**2) - 1
        sides = torch.maximum(self.x.abs() - radius * (1 - 0.06 * self.y), self.y - length)
        drop = torch.maximum(sides, -0.16 - self.y)
        self.paint(self.hair * 0.75, torch.minimum(top * 0.6, drop), soft=2.0)

    def neck_and_shirt(self) -> None:
        neck = torch.maximum(self.x.abs() - 0.25, 0.3 - self.y)
        self.paint(self.skin * 0.78, neck, soft=1.5)
        shoulders = 0.93 + 0.35 * self.x**2 - self.y
        neckline = 0.20 - torch.sqrt(self.x**2 + (self.y - 0.86) ** 2 + 1e-6)
        self.paint(self.shirt, torch.maximum(shoulders, neckline), soft=1.5)

    def head(self) -> None:
        for _, sign in self.sides():
            ear = torch.sqrt((sign * self.x - self.half_width) ** 2 / 0.35 + (self.y - 0.02) ** 2) - 0.13
            self.paint(self.skin * 0.86, ear)
        chin = 0.74 + 0.05 * self.shape["chin_height"] + 0.085 * self.both("jaw_drop") + 0.035 * self.open
        below = (self.y / chin).clamp(0, 1.2)
        width = self.half_width * (1 - (0.26 + 0.10 * self.shape["jaw_taper"]) * below**2)
        height = torch.where(self.y > 0, chin, torch.full_like(chin, 0.72))
        radius = torch.sqrt((self.x / width) ** 2 + (self.y / height) ** 2 + 1e-9)
        self.face = (radius - 1) * 0.55
        face = self.paint(self.skin, self.face)
        rim = face * (radius.clamp(0, 1) ** 4) * 0.22
        self.picture = self.picture * (1 - rim[:, None])
        blush = self.skin * torch.tensor([1.02, 0.84, 0.82])
        for side, sign in self.sides():
            lift = self.unit["cheek_raise"][side]
            cheek = torch.sqrt((sign * self.feature_x - 0.31) ** 2 + ((self.y - 0.22 + 0.05 * lift) * 1.25) ** 2)
            glow = (1 - cheek / 0.22).clamp(0, 1)
            self.paint(blush, torch.full_like(self.x, -1.0), opacity=glow * (0.35 + 0.4 * lift))

    def folds(self) -> None:
        """Creases made by the muscles: nasolabial, forehead, frown, nose bridge, chin."""
        dark = self.skin * 0.62
        for side, sign in self.sides():
            u = sign * self.feature_x
            pull = 0.7 * self.unit["lip_corner_pull"][side] + 0.9 * self.unit["upper_lip_raise"][side]
            t = ((self.y - 0.20) / 0.24).clamp(0, 1)
            fold = (u - (0.13 + 0.14 * t**0.8)).abs() - 0.010
            ends = torch.maximum(0.20 - self.y, self.y - 0.44)
            self.paint(dark, torch.maximum(fold, ends), opacity=(0.75 * pull).clamp(0, 0.8), soft=1.4)
            raised = 0.5 * (self.unit["inner_brow_raise"][side] + self.unit["outer_brow_raise"][side])
            for row in (0.0, 0.075):
                line = (self.y + 0.36 + row - 0.04 * u + 0.05 * (u - 0.2) ** 2).abs() - 0.007
                span = torch.maximum(0.02 - u, u - 0.32)
                self.paint(dark, torch.maximum(line, span), opacity=(0.55 * raised).clamp(0, 0.7), soft=1.4)
            frown = self.unit["brow_lower"][side]
            crease = torch.maximum((u - 0.045 - 0.08 * (self.y + 0.25)).abs() - 0.008, (self.y + 0.24).abs() - 0.075)
            self.paint(dark, crease, opacity=(0.75 * frown).clamp(0, 0.85), soft=1.4)
            wrinkle = self.unit["nose_wrinkle"][side]
            for row in (0.0, 0.055, 0.11):
                line = (self.y + 0.08 - row + 0.5 * u).abs() - 0.008
                span = torch.maximum(-u, u - 0.085)
                self.paint(dark, torch.maximum(line, span), opacity=(0.8 * wrinkle).clamp(0, 0.85), soft=1.4)
            crow = self.unit["cheek_raise"][side]
            for slope in (-0.5, 0.0, 0.5):
                line = (self.y - self.eye_y - 0.03 - slope * (u - 0.36)).abs() - 0.006
                span = torch.maximum(0.38 - u, u - 0.46)
                self.paint(dark, torch.maximum(line, span), opacity=(0.6 * crow).clamp(0, 0.7), soft=1.4)

    def eyes(self) -> None:
        white, black = torch.tensor([[0.97, 0.97, 0.96]]), torch.tensor([[0.05, 0.04, 0.04]])
        centre_x = 0.235 * (1 + 0.09 * self.shape["eye_spacing"])
        width = 0.125 * (1 + 0.12 * self.shape["eye_size"])
        for side, sign in self.sides():
            u = sign * self.feature_x - centre_x
            v = self.y - self.eye_y
            wide, tight = self.unit["upper_lid_raise"][side], self.unit["lid_tighten"][side]
            cheek = self.unit["cheek_raise"][side]
            upper = 0.062 * (1 + 0.2 * self.shape["eye_size"]) + 0.034 * wide - 0.026 * tight - 0.010 * cheek
            lower = 0.042 + 0.012 * wide - 0.018 * tight - 0.030 * cheek
            upper = (upper.clamp(min=0.012) * (1 - self.blink)) + 0.004
            lower = lower.clamp(min=0.008) * (1 - 0.6 * self.blink)
            arch = (1 - (u / width) ** 2).clamp(min=0)
            top, bottom = -upper * arch**0.8, lower * arch
            eye = torch.maximum(torch.maximum(top - v, v - bottom), u.abs() - width)
            opened = self.paint(white, eye)
            for radius, colour in ((0.052, self.iris), (0.026, black)):
                disc = torch.sqrt(u**2 + (v + 0.006) ** 2 + 1e-9) - radius
                self.blend(colour, (0.5 - disc / self.pixel).clamp(0, 1) * opened)
            glint = torch.sqrt((u - 0.016) ** 2 + (v + 0.024) ** 2 + 1e-9) - 0.013
            self.blend(torch.ones(1, 3), (0.5 - glint / self.pixel).clamp(0, 1) * opened)
            edge = u.abs() - width * 1.04
            self.paint(self.hair * 0.25, torch.maximum((v - top + 0.006).abs() - 0.014, edge), opacity=0.95)
            self.paint(self.skin * 0.55, torch.maximum((v - bottom).abs() - 0.005, edge), opacity=0.6)
            bag = torch.maximum((v - bottom - 0.035 + 0.1 * (u / width) ** 2 * 0.2).abs() - 0.006, edge)
            self.paint(self.skin * 0.62, bag, opacity=(0.5 * (cheek + 0.6 * tight)).clamp(0, 0.7), soft=1.4)

    def brows(self) -> None:
        thickness = 0.026 * (1 + 0.35 * self.shape["brow_thickness"])
        rest = self.eye_y - 0.150 - 0.018 * self.shape["brow_height"]
        for side, sign in self.sides():
            u = sign * self.feature_x
            inner, outer = self.unit["inner_brow_raise"][side], self.unit["outer_brow_raise"][side]
            lower = self.unit["brow_lower"][side]
            start = 0.095 - 0.028 * lower
            t = ((u - start) / (0.40 - start)).clamp(0, 1)
            lift = 0.085 * inner * (1 - t) ** 1.2 + 0.085 * outer * (0.35 + 0.65 * t) * (1 - 0.3 * t)
            drop = lower * (0.085 * (1 - t) + 0.015)
            squeeze = 0.03 * self.unit["nose_wrinkle"][side] * (1 - t)
            line = rest - 0.035 * torch.sin(math.pi * (0.15 + 0.75 * t)) - lift + drop + squeeze
            line = line + 0.02 * self.shape["brow_tilt"] * (t - 0.5)
            body = (self.y - line).abs() - thickness * (1.05 - 0.6 * t**2)
            ends = torch.maximum(start - u, u - 0.40)
            self.paint(self.hair * 0.62, torch.maximum(body, ends), soft=1.2)

    def nose(self) -> None:
        tip = 0.19 + 0.03 * self.shape["nose_length"]
        width = 0.082 * (1 + 0.2 * self.shape["nose_width"])
        for side, sign in self.sides():
            u = sign * self.nose_x
            lift = 0.03 * self.unit["nose_wrinkle"][side] + 0.012 * self.unit["upper_lip_raise"][side]
            flare = width * (1 + 0.25 * self.unit["nose_wrinkle"][side])
            nostril = torch.sqrt(((u - flare * 0.52) / 1.5) ** 2 + (self.y - tip + lift) ** 2 + 1e-9) - 0.017
            self.paint(self.skin * 0.38, nostril)
            wing = (
                torch.sqrt((u - flare * 0.55) ** 2 + (self.y - tip + 0.022 + lift) ** 2 + 1e-9) - 0.052
            ).abs() - 0.006
            self.paint(self.skin * 0.66, torch.maximum(wing, flare * 0.8 - u), opacity=0.85)
        bridge = torch.maximum((self.nose_x - 0.055).abs() - 0.013, (self.y - 0.02).abs() - 0.13)
        self.paint(self.skin * 0.80, bridge, opacity=0.55, soft=2.5)
        shine = torch.sqrt(self.nose_x**2 + ((self.y - tip + 0.065) * 0.8) ** 2 + 1e-9) - 0.030
        self.paint((self.skin * 1.12).clamp(0, 1), shine, opacity=0.55, soft=2.5)

    def mouth(self) -> None:
        lips = self._lips()
        span = self.feature_x.abs() - lips.half
        body = torch.maximum(torch.maximum(lips.outer_top - self.y, self.y - lips.outer_bottom), span)
        self.paint(self.skin * 0.72, body - 0.012, opacity=0.35, soft=2.0)
        self.paint(self.skin * torch.tensor([0.86, 0.52, 0.52]), body)
        self._mouth_inside(lips, span)
        self._mouth_surroundings(lips)

    def _lips(self) -> _Lips:
        """The lines that bound the lips, pulled by every muscle around the mouth."""
        drop, tight, chin = self.both("jaw_drop"), self.both("lip_tighten"), self.both("chin_raise")
        opening = 0.150 * self.open + 0.050 * drop
        thick = 0.036 * (1 + 0.3 * self.shape["lip_thickness"]) * (1 - 0.55 * tight.clamp(0, 1.4))
        thick = thick * (1 - 0.16 * self.spread)
        half = 0.205 * (1 + 0.10 * self.shape["mouth_width"]) * (1 + 0.20 * self.spread - 0.08 * drop - 0.08 * tight)
        on_left = torch.sigmoid(self.feature_x / 0.03)

        def by_side(name: str) -> Tensor:
            left, right = self.unit[name]
            return left * on_left + right * (1 - on_left)

        pull, depress, stretch = by_side("lip_corner_pull"), by_side("lip_corner_depress"), by_side("lip_stretch")
        half = half * (1 + 0.20 * pull + 0.26 * stretch + 0.03 * depress)
        t = (self.feature_x / half).clamp(-1, 1)
        arch = (1 - t**2).clamp(min=0)
        corner = (-0.095 * pull + 0.080 * depress + 0.030 * stretch) * t.abs() ** 2.2
        middle = self.mouth_y + corner + 0.030 * pull * arch - 0.028 * chin * arch + 0.035 * drop
        raised = by_side("upper_lip_raise") * 0.058 * torch.exp(-(((t.abs() - 0.40) / 0.33) ** 2))
        inner_top = middle - 0.30 * opening * arch - raised
        inner_bottom = middle + 0.70 * opening * arch - 0.006 * stretch
        bow = 1 - 0.25 * torch.exp(-((t / 0.16) ** 2))
        outer_top = inner_top - thick * arch**0.7 * bow
        outer_bottom = inner_bottom + thick * 1.25 * arch**0.7
        return _Lips(half, middle, inner_top, inner_bottom, outer_top, outer_bottom, opening)

    def _mouth_inside(self, lips: _Lips, span: Tensor) -> None:
        """The dark mouth cavity, teeth, tongue, and the seam where the lips meet."""
        dark, teeth = torch.tensor([[0.20, 0.05, 0.06]]), torch.tensor([[0.95, 0.94, 0.90]])
        tongue = torch.tensor([[0.72, 0.33, 0.34]])
        cavity = torch.maximum(torch.maximum(lips.inner_top - self.y, self.y - lips.inner_bottom), span)
        inside = self.paint(dark, cavity)
        band = self.y - (lips.inner_top + 0.042)
        self.blend(teeth, (0.5 - band / self.pixel).clamp(0, 1) * inside)
        low = ((self.y - (lips.inner_bottom - 0.045)) / self.pixel + 0.5).clamp(0, 1)
        self.blend(tongue, low * inside * (self.open * 1.4).clamp(0, 0.8))
        seam = torch.maximum((self.y - (lips.inner_top + lips.inner_bottom) / 2).abs() - 0.007, span)
        self.paint(dark, seam, opacity=(1 - lips.opening * 18).clamp(0.0, 0.9))

    def _mouth_surroundings(self, lips: _Lips) -> None:
        """The corners, the chin's dimple and the shadow below the lips."""
        u, half = self.feature_x, lips.half
        tight, chin = self.both("lip_tighten"), self.both("chin_raise")
        for _, sign in self.sides():
            corner_y = self._at_corner(lips.middle, u, sign, half)
            end = torch.sqrt((sign * u - half) ** 2 + (self.y - corner_y) ** 2 + 1e-9)
            self.paint(self.skin * 0.45, end - 0.013, opacity=0.7)
        dimple = torch.sqrt((u / 1.6) ** 2 + (self.y - self.mouth_y - 0.19) ** 2 + 1e-9) - 0.035
        self.paint(self.skin * 0.72, dimple, opacity=(0.15 + 0.55 * chin).clamp(0, 0.8), soft=3.0)
        below = torch.maximum((self.y - lips.outer_bottom - 0.022).abs() - 0.008, u.abs() - half * 0.5)
        self.paint(self.skin * 0.70, below, opacity=(0.30 + 0.4 * tight).clamp(0, 0.8), soft=2.0)

    def _at_corner(self, middle: Tensor, u: Tensor, sign: float, half: Tensor) -> Tensor:
        """Height of the mouth's centre line at a corner: its value where |u| ≥ half, constant over rows."""
        outside = (sign * u >= half * 0.98).to(middle.dtype)
        weight = outside.sum((1, 2), keepdim=True).clamp(min=1)
        return (middle * outside).sum((1, 2), keepdim=True) / weight

    def front_hair(self) -> None:
        radius = self.half_width + 0.05 + 0.03 * self.shape["hair_volume"]
        cap = torch.sqrt((self.x / radius) ** 2 + ((self.y + 0.05) / 0.76) ** 2 + 1e-9) - 1
        hairline = -0.47 + 0.06 * self.shape["hairline"] + 0.55 * self.x**2 + 0.05 * torch.sin(9 * self.x)
        fringe = torch.maximum(cap * 0.6, self.y - hairline)
        covered = self.paint(self.hair, fringe, soft=1.5)
        strands = covered * (0.06 * torch.sin(38 * self.x + 9 * self.y) + 0.12 * (self.y + 0.6))
        self.picture = self.picture * (1 - strands[:, None])

    def finish(self) -> Tensor:
        toward = self.light[:, 0, None, None] * self.grid_x + self.light[:, 1, None, None] * self.grid_y
        gain = 1 + self.light[:, 2, None, None] + toward
        return (self.picture * gain[:, None]).clamp(0, 1) * 2 - 1
