"""What every page that a command writes is made with: its template, and pictures that lie in the page itself."""

from __future__ import annotations

import base64
import io
from functools import cache
from pathlib import Path

import jinja2
from PIL import Image


@cache
def template(name: str) -> jinja2.Template:
    """A template of this folder; those of pages extend `page.html`, which has the look that they share."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def data_uri(content: bytes, kind: str) -> str:
    """A picture as a part of the page that shows it; `kind` is png, jpeg or webp."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def webp(picture: Image.Image) -> bytes:
    """For photographs: a tenth of the size of a PNG, and no loss that an eye sees."""
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=88, method=4)
    return buffer.getvalue()
