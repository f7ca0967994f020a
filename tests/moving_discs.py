"""Videos whose faces are coloured discs, and the detector that finds them: quick, and known to the pixel."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

from pcmecl_fast.data.faces import Face
from pcmecl_fast.data.video import Encoder, Look, from_rgb, writing_video

RED, GREEN = (220, 60, 50), (50, 200, 60)


class Discs:
    """Finds red and green discs."""

    def __call__(self, picture: np.ndarray) -> list[Face]:
        found = []
        for colour in (RED, GREEN):
            rows, columns = np.nonzero(np.abs(picture.astype(int) - colour).max(2) < 40)
            if len(rows) > 50:
                box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                found.append(Face(tuple(map(float, box)), 1.0, None))
        return found


def scene(number: int, width: int = 200, height: int = 120, *, green: bool = False) -> np.ndarray:
    """A frame: a red disc of 60 pixels that moves to the right, and perhaps a smaller green one on its left."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([60 + x * 100 // width, 90 + y * 100 // height, np.full_like(x, 128)], axis=-1)
    centre = (0.6 * width + number / 2, height / 2)
    for colour, at, radius in ((RED, centre, 30), (GREEN, (0.18 * width, height / 2), 18)):
        if colour == RED or green:
            disc = np.hypot(x + 0.5 - at[0], y + 0.5 - at[1]) < radius
            picture[disc] = colour
            picture[disc & (np.hypot(x - at[0] + radius / 3, y - at[1] + radius / 4) < radius / 8)] = 20  # an eye
    return picture.astype(np.uint8)


def write_scene(
    path: Path,
    times: list[int],
    *,
    time_base: Fraction = Fraction(1, 30000),
    rate: Fraction = Fraction(30),
    look: Look | None = None,
    codec: str = "libx264",
    sound: Path | None = None,
    green: bool = False,
    turns: int = 0,
) -> Path:
    """A video of `scene`, stored turned `turns` quarters clockwise."""
    look = look or Look(200, 120)
    width, height = (look.height, look.width) if turns % 2 else (look.width, look.height)
    options = (
        {"crf": "12"} if codec == "libx264" else {"crf": "18", "b:v": "0", "cpu-used": "8", "deadline": "realtime"}
    )
    clock = {"time_base": time_base, "rate": rate, "sound": sound}
    with writing_video(path, look, Encoder(codec, options if "lib" in codec else {}), **clock) as write:
        for number, time in enumerate(times):
            picture = np.rot90(scene(number, width, height, green=green), -turns)
            frame = from_rgb(picture)
            write(frame.reformat(format=look.pixels) if look.pixels != "yuv420p" else frame, time)
    return path


def write_tone(path: Path, seconds: float = 2.0, *, codec: str = "pcm_s16le", rate: int = 48000) -> Path:
    """Two tones, left and right."""
    import av

    t = np.arange(int(seconds * rate)) / rate
    waves = (8000 * np.stack([np.sin(2 * np.pi * 300 * t), np.sin(2 * np.pi * 451 * t)])).astype(np.int16)
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=rate, layout="stereo")
        for begin in range(0, len(t), 1024):
            interleaved = np.ascontiguousarray(waves[:, begin : begin + 1024].T).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(interleaved, "s16", "stereo")
            frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def samples(path: Path, stream: int = 0) -> np.ndarray:
    """The sound of a file, decoded."""
    import av

    with av.open(str(path)) as container:
        return np.concatenate([frame.to_ndarray() for frame in container.decode(audio=stream)], axis=1)


def sound_packets(path: Path) -> list[bytes]:
    import av

    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]
