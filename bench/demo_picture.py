"""Draws the README's picture, docs/images/demo.webp: people unseen by a demo run, before and after its edits.

    python -m bench.demo_picture [--run runs/demo]

It goes through `pcmecl-fast edit`, so the picture shows what that command writes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tyro
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from bench.compare import ROOT
from pcmecl_fast import cli
from pcmecl_fast.data.emotions import EMOTIONS
from pcmecl_fast.data.media import read_frames, write_frames
from pcmecl_fast.files import write_atomically
from pcmecl_fast.synthetic import SyntheticFaces

EDITED = tuple(emotion for emotion in EMOTIONS if emotion != "neutral")
HELD_OUT_SEED = 2  # the seed of the faces that runs are evaluated on
SIDE, GAP, HEADER = 112, 6, 26  # pixels
GREY = (128, 128, 128, 255)  # legible on white and on black


@dataclass
class Options:
    """Draw the README's picture from a finished demo run."""

    run: Path = Path("runs/demo")
    """Output folder of `pcmecl-fast demo`."""
    people: int = 3
    """Rows of the picture."""
    out: Path = ROOT / "docs" / "images" / "demo.webp"
    """The picture."""


def main() -> int:
    options = tyro.cli(Options)
    with TemporaryDirectory() as folder:
        faces = edited_faces(options.run, options.people, Path(folder))
        picture = Path(folder, "picture.webp")
        drawn(faces).save(picture, quality=90, method=6)  # a fifth of the size of PNG
        write_atomically(options.out, picture.read_bytes())
    return 0


def edited_faces(run: Path, people: int, folder: Path) -> dict[str, list[Image.Image]]:
    """A neutral frame of each person and its edits, by column name."""
    drawn_people = SyntheticFaces(people, clips=1, frames_per_clip=1, seed=HELD_OUT_SEED)
    neutral = (drawn_people.emotion_index == drawn_people.emotions.index("neutral")).nonzero()[:, 0]
    sources = folder / "source"
    sources.mkdir()
    for n, index in enumerate(neutral):
        write_frames(sources / f"{n}.png", drawn_people.frames(index[None]), None)

    faces = {"source": _pictures(sources, drawn_people.size)}
    for emotion in EDITED:
        words = ["edit", "--input", sources, "--emotion", emotion, "--run", run, "--out", folder / emotion]
        if cli.main([str(word) for word in words]) != 0:
            raise SystemExit(f"no picture without edits to {emotion}")
        faces[emotion] = _pictures(folder / emotion, drawn_people.size)
    return faces


def drawn(faces: dict[str, list[Image.Image]]) -> Image.Image:
    """A labelled column for each name, on a transparent background."""
    rows = len(next(iter(faces.values())))
    pitch = SIDE + GAP
    picture = Image.new("RGBA", (len(faces) * pitch - GAP, HEADER + rows * pitch - GAP))
    pen = ImageDraw.Draw(picture)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 15)
    for column, (name, pictures) in enumerate(faces.items()):
        pen.text((column * pitch + SIDE / 2, HEADER - 6), name, fill=GREY, font=font, anchor="ms")
        for row, face in enumerate(pictures):
            enlarged = face.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            picture.paste(enlarged, (column * pitch, HEADER + row * pitch))
    return picture


def _pictures(folder: Path, size: int) -> list[Image.Image]:
    return [_picture(read_frames(path, size)[1][0]) for path in sorted(folder.iterdir())]


def _picture(
    frame: Tensor,  # (3, S, S) in [-1, 1]
) -> Image.Image:
    pixels = ((frame.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255)
    return Image.fromarray(pixels.numpy().astype(np.uint8))


if __name__ == "__main__":
    sys.exit(main())
