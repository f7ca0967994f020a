"""Words drawn into pictures: fonts that are the same everywhere, and names made to fit."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as shipped with Matplotlib: the same on every system, and it covers most alphabets."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def fitted(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text on one line of at most `width` pixels, its middle elided if need be: ends tell names apart."""
    text = printable(text)
    if font.getlength(text) <= width:
        return text
    for kept in range(min(len(text), 200) - 1, 0, -1):
        short = text[: (kept + 1) // 2] + "…" + text[len(text) - kept // 2 :]
        if font.getlength(short) <= width:
            return short
    return "…"


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    lines: list[str] = []
    for word in printable(text).split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(fitted(word, font, width))
    return lines


def write_upwards(picture: Image.Image, text: str, x: int, y: int, *, ink: str) -> None:
    """Small text on white, rotated by 90°, centred at (x, y)."""
    small = font(12)
    label = Image.new("RGB", (math.ceil(small.getlength(text)) + 2, 16), "white")
    ImageDraw.Draw(label).text((label.width / 2, 8), text, ink, small, anchor="mm")
    turned = label.rotate(90, expand=True)
    picture.paste(turned, (x - turned.width // 2, y - turned.height // 2))


def printable(text: str) -> str:
    """On one line, without unprintable characters: names come from folders and may hold any character."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
