"""Small raw data sets as they lie on disk, made of drawn talking faces: what prepares real ones is tested on them.

A take is a drawn face, pasted near the middle of a wider scene whose background moves, with a sound that is loud while
the mouth is open. Some frames of a take are a white flash with a click, so that `click_offset` can tell whether picture
and sound are still in step. Every tree has gaps, as real data sets do, names that mean nothing, and broken files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from pcmecl_fast.data.emotions import EMOTIONS, KNOWN_EMOTIONS
from pcmecl_fast.data.layouts import RawClip
from pcmecl_fast.synthetic import SyntheticFaces, draw

SCENE = (160, 120)  # width and height in pixels
FACE = 96  # side of the pasted square
FRAMES = 16
FLASHES = (4, 11)  # frames
NTSC = Fraction(30000, 1001)


@dataclass
class RawTree:
    """What was made.

    Attributes:
        layout: the name of the tree's layout.
        root: what a person would pass to a command.
        clips: what the layout lists, in its order; those with broken files included.
        broken: files of clips, pictures or sound, that nobody can read.
        unknown: what the layout cannot name, relative to the root.
        frames, rate: of every whole video.
    """

    layout: str
    root: Path
    clips: list[RawClip] = field(default_factory=list)
    broken: list[Path] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    frames: int = FRAMES
    rate: Fraction = NTSC

    @property
    def whole(self) -> list[RawClip]:
        """The clips without a broken file."""
        return [clip for clip in self.clips if not {*clip.sources, clip.sound} & {*self.broken}]

    def in_order(self) -> RawTree:
        self.clips.sort(key=lambda clip: (clip.individual, KNOWN_EMOTIONS.index(clip.emotion), clip.name))
        return self


def mead_tree(root: Path, *, frames: int = FRAMES, scene: tuple[int, int] = SCENE) -> RawTree:
    """Two people at up to three levels; one is seen from two sides. The sound lies apart, once for both views."""
    tree = RawTree("mead", root, frames=frames, rate=Fraction(30))
    cast = Cast(("M003", "W009"), frames=frames, seed=3)
    levels = {"neutral": {"level_1": (1, 2)}, "angry": {"level_1": (1,), "level_3": (2,)}, "happy": {"level_3": (1, 3)}}
    for individual, views, emotions in (
        ("M003", ("front", "left_30"), ("neutral", "angry", "happy")),
        ("W009", ("front",), ("neutral", "happy")),
    ):
        for emotion in emotions:
            for level, numbers in levels[emotion].items():
                for number in numbers:
                    take = cast.take(individual, emotion, number)
                    place = f"{emotion}/{level}/{number:03d}"
                    silent = (individual, emotion, number) == ("W009", "neutral", 2)
                    sound = None if silent else root / individual / "audio" / f"{place}.m4a"
                    if sound:
                        write_sound(sound, take.sound(tree.rate, 48000), 48000)
                    for view in views:
                        if (view, place) == ("left_30", "happy/level_3/003"):
                            continue  # a clip that was never released
                        video = root / individual / "video" / view / f"{place}.mp4"
                        write_video(video, take.scenes(scene, mirrored=view != "front"), tree.rate)
                        name = f"{view}-{level}-{number:03d}"
                        clip = RawClip(individual, emotion, name, (video,), sound, level, view, number=number)
                        tree.clips.append(clip)
    tree.broken = [
        _emptied(root / "M003/video/left_30/angry/level_3/002.mp4"),
        _cut_short(root / "W009/video/front/happy/level_3/001.mp4"),
        _emptied(root / "M003/audio/angry/level_1/001.m4a"),
    ]
    _touch(root / "M003/video/.DS_Store", root / "README.md", root / "info.txt")
    tree.unknown = _unknown(
        root, "M003/video/back/", "M003/video/front/angry/level_1/take.mp4", "W009/video/front/bored/"
    )
    return tree.in_order()


def ravdess_tree(root: Path, *, frames: int = FRAMES, scene: tuple[int, int] = SCENE) -> RawTree:
    """Actor 1 speaks and sings, in the folders that the zips make; actor 2 speaks, without such folders around.

    Every take has its copies without sound (02) and without picture (03) beside it.
    """
    tree = RawTree("ravdess", root, frames=frames, rate=NTSC)
    cast = Cast(("01", "02"), frames=frames, seed=7)
    emotions = {"01": "neutral", "02": "calm", "03": "happy", "05": "angry", "06": "fear"}
    takes = [  # actor, folder, and the numbers between the first and the last
        *(
            ("01", "Video_Speech_Actor_01/Actor_01", f"01-{rest}")
            for rest in ("01-01-01-01", "03-02-01-02", "06-01-02-01")
        ),
        *(("01", "Video_Song_Actor_01/Actor_01", f"02-{rest}") for rest in ("02-01-01-01", "03-02-01-02")),
        *(("02", "Actor_02", f"01-{rest}") for rest in ("01-01-01-02", "03-01-01-01", "05-01-02-01", "05-02-02-01")),
    ]
    for number, (actor, folder, numbers) in enumerate(takes):
        channel, code, level, sentence, repetition = numbers.split("-")
        take = cast.take(actor, emotions[code], number % 3)
        scenes, sound = take.scenes(scene), take.sound(tree.rate, 48000)
        video = root / folder / f"01-{numbers}-{actor}.mp4"
        write_video(video, scenes, tree.rate, sound, 48000)
        write_video(video.with_name(f"02-{numbers}-{actor}.mp4"), scenes, tree.rate)
        write_sound(video.with_name(f"03-{numbers}-{actor}.wav"), sound, 48000)
        level, spoken = {"01": "normal", "02": "strong"}[level], {"01": "speech", "02": "song"}[channel]
        tree.clips.append(
            RawClip(
                f"Actor_{actor}",
                emotions[code],
                f"{spoken}-{level}-{sentence}-{repetition}",
                (video,),
                level=level,
                sentence=sentence,
                repetition=repetition,
            )
        )
    tree.broken = [
        _cut_short(root / "Actor_02/01-01-03-01-01-01-02.mp4"),
        _emptied(root / "Video_Song_Actor_01/Actor_01/01-02-02-01-01-01-01.mp4"),
    ]
    tree.unknown = _unknown(root, "Actor_02/01-01-09-01-01-01-02.mp4", "Actor_02/take.mp4", "Video_Speech_Actor_02.zip")
    return tree.in_order()


def crema_d_tree(root: Path, *, frames: int = FRAMES, scene: tuple[int, int] = SCENE) -> RawTree:
    """Flash videos, which have sound of their own, and the same sound uncompressed in another folder."""
    tree = RawTree("crema-d", root, frames=frames, rate=NTSC)
    cast = Cast(("1001", "1002"), frames=frames, seed=11)
    emotions = {"NEU": "neutral", "ANG": "angry", "DIS": "disgusted", "FEA": "fear", "HAP": "happy", "SAD": "sad"}
    stems = ("1001_DFA_NEU_XX", "1001_DFA_ANG_XX", "1001_IEO_ANG_LO", "1001_IEO_ANG_HI", "1001_IEO_FEA_MD")
    stems += ("1002_DFA_NEU_XX", "1002_DFA_DIS_XX", "1002_IEO_SAD_HI", "1002_IEO_HAP_LO")
    for number, stem in enumerate(stems):
        actor, sentence, word, level = stem.split("_")
        take = cast.take(actor, emotions[word], number % 3)
        video, apart = root / "VideoFlash" / f"{stem}.flv", root / "AudioWAV" / f"{stem}.wav"
        # Without sound in it, the one that is cut short below is cut within a frame for sure.
        own = None if stem == "1002_IEO_HAP_LO" else take.sound(tree.rate, 44100)
        write_video(video, take.scenes(scene), tree.rate, own, 44100)
        write_sound(apart, take.sound(tree.rate, 16000), 16000)
        if stem == "1002_DFA_DIS_XX":
            apart.unlink()
        tree.clips.append(
            RawClip(
                actor,
                emotions[word],
                f"{sentence}-{level}",
                (video,),
                apart if apart.exists() else None,
                level,
                sentence=sentence,
            )
        )
    tree.broken = [
        _emptied(root / "VideoFlash/1001_IEO_ANG_HI.flv"),
        _cut_short(root / "VideoFlash/1002_IEO_HAP_LO.flv"),
        _emptied(root / "AudioWAV/1001_IEO_FEA_MD.wav"),
    ]
    _touch(root / "processedResults/summaryTable.csv", root / "AudioMP3/1001_DFA_NEU_XX.mp3")
    tree.unknown = _unknown(root, "VideoFlash/1001_DFA_BOR_XX.flv", "VideoFlash/take.flv")
    return tree.in_order()


def ned_tree(root: Path, *, frames: int = FRAMES, form: str = "train", size: int = 128) -> RawTree:
    """Two actors' faces, cut out: in folders of 50 (`form` "train") or all in one folder ("test").

    Images are numbered over all videos; frame 3 of every video, in which no face was found, has no image.
    """
    tree = RawTree("ned", root, frames=frames - 1)
    cast = Cast(("Tom", "Ann"), frames=frames, size=size, seed=13)
    videos = {"Tom": ("neutral_001", "angry_level_3_001", "angry_level_3_002"), "Ann": ("happy_001", "sad_a_b_007")}
    for actor, stems in videos.items():
        lines: list[str] = []
        for v, stem in enumerate(stems):
            emotion = stem.partition("_")[0]
            images = []
            for number, face in enumerate(cast.take(actor, emotion, v).faces):
                if number == 3:
                    continue
                g = len(lines)
                folder = root / actor / "images" / (f"{g // 50:06d}" if form == "train" else "")
                images.append(folder / f"{g:06d}.png")
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(face).save(images[-1], compress_level=1)
                lines.append(f"{stem}_{number:06d} {g}")
            tree.clips.append(RawClip(actor, emotion, stem, tuple(images), cropped=True))
        (root / actor / "videos").mkdir(parents=True)
        (root / actor / "videos/_frame_info.txt").write_text("\n".join(lines) + "\n")
    tree.broken = [_cut_short(tree.clips[1].sources[2]), _emptied(tree.clips[3].sources[0])]
    _touch(root / "Tom/full_frames/000000.png", root / "Tom/faces_aligned/000000.png")
    tree.unknown = _unknown(root, "others/", "Tom/images/999999.png", "Tom/images/cover.png")
    return tree.in_order()


def folder_tree(root: Path, *, frames: int = FRAMES, scene: tuple[int, int] = SCENE) -> RawTree:
    """Two people with videos, pictures, folders of pictures and CDRL's aligned faces, in other words for emotions."""
    tree = RawTree("folder", root, frames=frames, rate=Fraction(25))
    cast = Cast(("ann", "ben"), frames=frames, seed=17)

    def add(individual: str, word: str, emotion: str, name: str, suffix: str, within: str = "") -> None:
        take = cast.take(individual, emotion, len(tree.clips) % 3)
        place = root / individual / within / word / f"{name}{suffix}"
        scenes = take.faces if within else take.scenes(scene)
        sources = (place,)
        if suffix in (".mp4", ".mkv"):
            write_video(place, scenes, tree.rate, take.sound(tree.rate, 44100), 44100)
        elif suffix:
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scenes[0]).save(place)
        else:
            place.mkdir(parents=True)
            sources = tuple(place / f"{number:06d}.jpg" for number in range(len(scenes)))
            for source, picture in zip(sources, scenes, strict=True):
                Image.fromarray(picture).save(source)
        tree.clips.append(RawClip(individual, emotion, name, sources, cropped=bool(within)))

    add("ann", "Neutral", "neutral", "talk", ".mp4")
    add("ann", "anger", "angry", "talk", ".mkv")
    add("ann", "anger", "angry", "photo", ".jpg")
    add("ann", "happiness", "happy", "frames", "")
    add("ann", "happiness", "happy", "lost", ".mp4")
    add("ben", "neutral", "neutral", "001", "", "align_img")
    add("ben", "fearful", "fear", "001", "", "align_img")
    add("ben", "fearful", "fear", "torn", ".png")
    tree.broken = [_emptied(root / "ann/happiness/lost.mp4"), _cut_short(root / "ben/fearful/torn.png")]
    _touch(root / "notes.txt", root / "ann/anger/.hidden.jpg")
    tree.unknown = _unknown(root, "ann/bored/", "ann/stray.mp4", "ben/fearful/take.part", "clip.mp4")
    return tree.in_order()


TREES: dict[str, Callable[[Path], RawTree]] = {
    "mead": mead_tree,
    "ravdess": ravdess_tree,
    "crema-d": crema_d_tree,
    "ned": ned_tree,
    "folder": folder_tree,
}


def click_offset(video: Path, sound: Path | None = None) -> float:
    """By how many seconds the clicks of a file come after its flashes: the median, 0 when in step, below 0 when early.

    Args:
        video: a file with flashes.
        sound: a file with the clicks; by default the video itself.

    Raises:
        ValueError: no flash, or not as many clicks as flashes.
    """
    flashes, clicks = _flashes(video), _clicks(sound or video)
    if not flashes or len(flashes) != len(clicks):
        raise ValueError(f"{video}: {len(flashes)} flashes and {len(clicks)} clicks")
    return float(np.median(np.subtract(clicks, flashes)))


def _flashes(path: Path) -> list[float]:
    """The times in seconds of the white frames."""
    import av

    with av.open(str(path)) as container:
        frames = [(float(f.time), f.to_ndarray(format="gray").mean()) for f in container.decode(video=0)]
    return [time for time, brightness in frames if brightness > 200]


def _clicks(path: Path) -> list[float]:
    """The times in seconds at which the sound first passes half its maximum, after 50 ms below it."""
    import av

    with av.open(str(path)) as container:
        if not container.streams.audio:
            raise ValueError(f"{path}: no sound")
        to_mono = av.AudioResampler(format="fltp", layout="mono")
        parts = [
            (float(part.pts * part.time_base), part.to_ndarray()[0], part.sample_rate)
            for frame in container.decode(audio=0)
            for part in to_mono.resample(frame)
        ]
    times = np.concatenate([start + np.arange(len(samples)) / rate for start, samples, rate in parts])
    level = np.abs(np.concatenate([samples for _, samples, _ in parts]))
    loud = times[level > level.max() / 2]
    return loud[np.diff(loud, prepend=-math.inf) > 0.05].tolist()


# Takes


@dataclass(frozen=True)
class Take:
    """One clip's face and voice."""

    faces: np.ndarray  # (T, S, S, 3) uint8
    openness: np.ndarray  # (T,) of the mouth, in [0, 1]
    pitch: float  # Hz

    def scenes(self, size: tuple[int, int], *, mirrored: bool = False) -> np.ndarray:
        """The face in front of a moving background, white where a flash is: (T, H, W, 3) uint8."""
        width, height = size
        frames = len(self.faces)
        x, y, t = np.arange(width), np.arange(height)[:, None], np.arange(frames)[:, None, None]
        waves = [90 + 40 * np.sin(x / 9 + y / (13 + 4 * c) + 0.4 * t + c) for c in range(3)]
        scenes = np.stack(waves, axis=-1).astype(np.uint8)
        faces = self.faces[:, :, ::-1] if mirrored else self.faces
        for number, (scene, face) in enumerate(zip(scenes, faces, strict=True)):
            left, top, side = face_place(number, size, len(face))
            scene[top : top + side, left : left + side] = face
        scenes[[flash for flash in FLASHES if flash < frames]] = 255
        return scenes

    def sound(self, rate: Fraction, sample_rate: int) -> np.ndarray:
        """Harmonics and noise as loud as the mouth is open, and a click with every flash: (N,) float32 in [-1, 1]."""
        frames = len(self.openness)
        time = np.arange(round(frames / rate * sample_rate)) / sample_rate
        voice = sum(np.sin(2 * math.pi * self.pitch * k * time) / k for k in range(1, 6))
        breath = np.random.default_rng(0).standard_normal(len(time))
        sound = (0.08 * voice + 0.02 * breath) * np.interp(time * float(rate), np.arange(frames), self.openness)
        for flash in FLASHES:
            since = time - flash / float(rate)
            # 2 kHz that dies away in milliseconds: sudden, and yet within what a lossy coder keeps.
            sound += np.where(since >= 0, 0.9 * np.cos(2 * math.pi * 2000 * since) * np.exp(-np.abs(since) / 0.003), 0)
        return sound.clip(-1, 1).astype(np.float32)


class Cast:
    """Drawn people under the names of a data set, who can be filmed with any emotion."""

    def __init__(self, names: Sequence[str], *, frames: int, seed: int, size: int = FACE, takes: int = 4) -> None:
        self._names = list(names)
        self._takes = takes
        self._frames = frames
        self._drawn = SyntheticFaces(len(names), clips=takes, frames_per_clip=frames, size=size, seed=seed)

    def take(self, name: str, emotion: str, number: int) -> Take:
        """One of an individual's takes; emotions that are not drawn look neutral."""
        who = self._names.index(name)
        shown = EMOTIONS.index(emotion) if emotion in EMOTIONS else 0
        start = ((who * len(EMOTIONS) + shown) * self._takes + number) * self._frames
        parameters = self._drawn.parameters[start : start + self._frames]
        frames = draw(self._drawn.identities, parameters, self._drawn.size).clamp(-1, 1).permute(0, 2, 3, 1)
        faces = ((frames + 1) * 127.5).round().byte().numpy()
        return Take(faces, parameters.speech[:, 0].clamp(0, 1).numpy(), pitch=110 + 45 * who)


def face_place(number: int, scene: tuple[int, int], side: int = FACE) -> tuple[int, int, int]:
    """Where the face is pasted in a frame of a scene (width, height): (left, top, side) in pixels."""
    width, height = scene
    left, top = (width - side) / 2 + 3 * math.sin(0.3 * number), (height - side) / 2 + 2 * math.cos(0.2 * number)
    return round(left), round(top), side


# Files


_H264 = ("libx264", {"preset": "ultrafast", "crf": "18"}, "aac")
_CODECS = {".mp4": _H264, ".mkv": _H264, ".flv": ("flv", {"b": "3000000"}, "pcm_s16le")}
_SOUND_CODECS = {".m4a": "aac", ".wav": "pcm_s16le"}


def write_video(
    path: Path,
    scenes: np.ndarray,  # (T, H, W, 3) uint8
    rate: Fraction,
    sound: np.ndarray | None = None,  # (N,) float32
    sample_rate: int = 48000,
) -> Path:
    import av

    video_codec, options, sound_codec = _CODECS[path.suffix]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(video_codec, rate=rate, options=options)
        stream.height, stream.width = scenes.shape[1:3]
        stream.pix_fmt = "yuv420p"
        voice = None if sound is None else container.add_stream(sound_codec, rate=sample_rate, layout="mono")
        for number, scene in enumerate(scenes):
            frame = av.VideoFrame.from_ndarray(scene, format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if voice is not None:
            _encode_sound(container, voice, sound, sample_rate)
    return path


def write_sound(
    path: Path,
    sound: np.ndarray,  # (N,) float32
    sample_rate: int,
) -> Path:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(_SOUND_CODECS[path.suffix], rate=sample_rate, layout="mono")
        _encode_sound(container, stream, sound, sample_rate)
    return path


def _encode_sound(container, stream, sound: np.ndarray, sample_rate: int) -> None:
    import av

    for start in range(0, len(sound), 1024):
        frame = av.AudioFrame.from_ndarray(sound[None, start : start + 1024], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = sample_rate, start, Fraction(1, sample_rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _emptied(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def _cut_short(path: Path) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 5])
    return path


def _touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def _unknown(root: Path, *names: str) -> list[str]:
    """Make what no layout can name: files, and folders, with a file each, where a name ends in "/"."""
    _touch(*(root / (f"{name}take.mp4" if name.endswith("/") else name) for name in names))
    return [name.removesuffix("/") for name in names]
