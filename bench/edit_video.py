"""How fast and how exactly `edit` edits a video of full size: `python -m bench.edit_video --run runs/demo`.

A face (scikit-image's astronaut) moves over a background for a minute, at 1920 × 1080 and 29.97 frames a second, with
stereo sound. Measured: frames a second, by part; peak memory; whether times and sound are those of the source; and the
PSNR of what lies outside the face's square, against the source as it is decoded.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

RATE = Fraction(30000, 1001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a finished run")
    parser.add_argument("--emotion", default="happy")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/edit-video"), help="where the videos go")
    options = parser.parse_args()
    source = options.folder / f"talk-{options.seconds:g}s.mp4"
    if not source.exists():
        write_talk(source, seconds=options.seconds)
    print(
        json.dumps(
            measure(source, options.run, options.emotion, options.folder / "edited", every=options.every), indent=2
        )
    )


def measure(source: Path, run: Path, emotion: str, out: Path, **options: Any) -> dict[str, Any]:
    """Edit a video and compare the result with it."""
    from pcmecl_fast.edit import run_edit
    from pcmecl_fast.train.config import EditConfig

    begin = time.perf_counter()
    summary = run_edit(EditConfig(source, emotion, run=run, out=out, device="cpu", overwrite=True, **options))
    seconds = time.perf_counter() - begin
    edited = out / f"{source.stem}.{emotion}.mp4"
    return {
        "frames_per_second": summary["frames"] / seconds,
        "milliseconds": summary["milliseconds"],
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        **compare(source, edited),
    }


def compare(source: Path, edited: Path) -> dict[str, Any]:
    """What an edit should have left alone."""
    from pcmecl_fast.data.canvas import planes
    from pcmecl_fast.data.faces import load_detector
    from pcmecl_fast.data.tracks import Tracker, choose_tracks
    from pcmecl_fast.data.video import open_video

    with open_video(source) as reader:
        tracker = Tracker(load_detector(), rate=reader.rate)
        frames = 0
        for frame in reader:
            if tracker.wants(frame.number):
                tracker.look(frame.number, frame.rgb(quick=True))
            frames += 1
        (track,) = choose_tracks(tracker.tracks(frames))
    times: list[tuple[Fraction, Fraction]] = []
    errors, inside = [], []
    with open_video(source) as one, open_video(edited) as other:
        for a, b in zip(one, other, strict=True):
            times.append((a.time, b.time))
            before, after = (planes(f.raw)[0] for f in (a, b))
            difference = (before.astype(np.int16) - after).astype(np.float32) ** 2
            x, y, side, _ = track.square(a.number)
            part = (
                slice(max(0, int(y - side / 2) - 2), int(y + side / 2) + 3),
                slice(max(0, int(x - side / 2) - 2), int(x + side / 2) + 3),
            )
            inside.append(difference[part].sum() / difference[part].size)
            total, square = difference.sum(), difference[part].sum()
            errors.append((total - square) / (difference.size - difference[part].size))
    return {
        "frames": len(times),
        "same_times": all(a == b for a, b in times),
        "same_sound": np.array_equal(samples(source), samples(edited)),
        "psnr_outside": 10 * math.log10(255**2 / max(float(np.mean(errors)), 1e-9)),
        "psnr_inside": 10 * math.log10(255**2 / max(float(np.mean(inside)), 1e-9)),
    }


def samples(path: Path) -> np.ndarray:  # (channels, samples)
    """The sound of a file, decoded."""
    import av

    with av.open(str(path)) as container:
        return np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)


def write_talk(path: Path, *, seconds: float, width: int = 1920, height: int = 1080, zoom: float = 2.0) -> None:
    """A face that moves over a background, with stereo sound."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as output:
        video = output.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "crf": "18"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        sound = output.add_stream("aac", rate=48000, layout="stereo")
        for number, picture in enumerate(talk(seconds, width, height, zoom)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, 1 / RATE
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        t = np.arange(int(48000 * seconds)) / 48000
        waves = np.stack([np.sin(2 * np.pi * 220 * t) * np.sin(2 * np.pi * t), np.sin(2 * np.pi * 331 * t)])
        for begin in range(0, len(t), 1024):
            part = av.AudioFrame.from_ndarray(
                (0.3 * waves[:, begin : begin + 1024]).astype(np.float32), "fltp", "stereo"
            )
            part.sample_rate, part.pts, part.time_base = 48000, begin, Fraction(1, 48000)
            output.mux(sound.encode(part))
        output.mux(sound.encode(None))


def talk(seconds: float, width: int = 1920, height: int = 1080, zoom: float = 2.0) -> Iterator[np.ndarray]:
    """The pictures of `write_talk`, (height, width, 3) uint8."""
    from PIL import Image, ImageFilter
    from skimage import data

    person = Image.fromarray(data.astronaut()[:300, 90:390])
    side = round(300 * zoom)
    person = person.resize((side, side), Image.Resampling.LANCZOS)
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    background = Image.fromarray(noise).resize((width, height)).filter(ImageFilter.GaussianBlur(4))
    for number in range(int(seconds * RATE)):
        picture, t = background.copy(), float(number / RATE)
        x = (width - side) / 2 + 0.25 * (width - side) * math.sin(0.7 * t)
        y = (height - side) / 2 + 0.2 * (height - side) * math.sin(0.5 * t)
        picture.paste(person, (round(x), round(y)))
        yield np.asarray(picture)


if __name__ == "__main__":
    main()
