"""One clip measured: all that can be said of it alone, and the features that groups of clips are compared by."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pcmecl_fast.data.faces import Detector, Face, surest_face
from pcmecl_fast.data.layouts.base import is_sound, is_video
from pcmecl_fast.data.sound import has_sound
from pcmecl_fast.evaluate.field.clips import FaceClip
from pcmecl_fast.evaluate.field.measures import OF_GROUPS, Protocol, Sampling, Tools
from pcmecl_fast.evaluate.field.pairs import Pair
from pcmecl_fast.evaluate.field.pixels import psnr, ssim
from pcmecl_fast.evaluate.field.reading import as_batch, batches, frames_of, rate_of
from pcmecl_fast.evaluate.lip_sync import SAMPLE_RATE, lip_sync, read_waveform
from pcmecl_fast.evaluate.networks import SyncNet

Frames = dict[int, np.ndarray]
"""By number in the clip, ascending; each (H, W, 3) uint8, all of one size."""
Chosen = Mapping[str, Collection[int]]
"""Numbers of a clip's frames, by network."""

_BATCH = 16
_BESIDE_RECORDING = ("identity", "lmd", "lmd_mouth", "psnr", "ssim", "flicker")
"""Measures that compare with the recording, frame by frame."""
_KNOWN = 4096  # faces of recordings that are remembered, 1 KB each


@dataclass
class Result:
    """What was measured of a clip.

    Attributes:
        values: of each measure.
        why: why a measure has none.
        notes: what to know of the values, such as lengths that differ.
        frames: how many the clip has.
        looked, faceless: in how many a face was looked for, and in how many of these none was found.
        features: by network, of the frames that groups are compared by, (n, D).
    """

    values: dict[str, float] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    frames: int = 0
    looked: int = 0
    faceless: int = 0
    features: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def lacks(self, measures: Sequence[str], why: str) -> None:
        """Say why measures have no value; the first reason stays."""
        for measure in measures:
            if measure not in self.values:
                self.why.setdefault(measure, why)


class ClipMeter:
    """Measures clips one at a time.

    Args:
        tools: what the metrics need; metrics without are not measured.
        protocol: of LSE.
        sampling: which frames are looked at.
    """

    def __init__(self, tools: Tools, *, protocol: Protocol, sampling: Sampling) -> None:
        self.tools, self.protocol, self.sampling = tools, protocol, sampling
        self._known = _KnownFaces(tools.detector) if tools.detector is not None else None

    def edited(self, pair: Pair, chosen: Chosen, *, heard: bool = True) -> Result:
        """An edited clip, against its recording.

        Args:
            pair: the clip and its recording.
            chosen: of networks, the numbers of the frames whose features are taken; of the others, those of all.
            heard: whether LSE is taken.

        Raises:
            ValueError: the edited clip is damaged; a damaged recording leaves only its own measures out.
        """
        result = Result()
        meters = self._meters(pair, heard=heard)
        recording = _Recording(pair, result, [meter for meter in meters if meter.compares])
        features = _Features(self.tools, chosen)

        def wanted(number: int) -> bool:
            return features.wants(number) or any(meter.wants(number) for meter in meters)

        for batch in batches(frames_of(pair.edited, wanted), _BATCH):
            frames = _numbered(batch, result.frames)
            others = recording.beside(frames, len(batch))
            result.frames += len(batch)
            features.add(frames)
            for meter in meters:
                meter.add(frames, others)
        recording.finish()
        for meter in meters:
            meter.finish(result)
        result.features = features.all()
        asked = {measure.key for measure in self.tools.measures}
        # A recording that turned out to be damaged half way has left values, and a reason why they do not count.
        result.values = {key: value for key, value in result.values.items() if key in asked and key not in result.why}
        result.why = {key: why for key, why in result.why.items() if key in asked}
        return result

    def reference(self, clip: FaceClip, chosen: Chosen) -> Result:
        """A clip of real faces: its features alone; it is read up to the last frame that they are taken of.

        Raises:
            ValueError: the clip is damaged.
        """
        result, features = Result(), _Features(self.tools, chosen)
        for batch in batches(itertools.islice(frames_of(clip, features.wants), features.end), _BATCH):
            features.add(_numbered(batch, result.frames))
            result.frames += len(batch)
        result.features = features.all()
        return result

    def _meters(self, pair: Pair, *, heard: bool) -> list[_Meter]:
        tools, meters = self.tools, list[_Meter]()
        if tools.metrics & {"psnr", "ssim", "flicker"}:
            meters.append(_Likeness(tools, self.sampling.pixels))
        if self._known is not None:
            meters.append(_Faces(pair, tools, self._known, self.sampling.every))
        if tools.sync is not None and heard:
            meters.append(_Sync(pair, tools.sync, self.protocol))
        return meters


def _numbered(batch: Sequence[np.ndarray | None], first: int) -> Frames:
    return {number: frame for number, frame in enumerate(batch, first) if frame is not None}


class _Recording:
    """The frames of an edit's recording beside its own; where there are none, the result says why.

    Args:
        pair: the edit and its recording.
        result: of the edit.
        meters: what compares the two; without any, the recording is not opened.
    """

    def __init__(self, pair: Pair, result: Result, meters: Sequence[_Meter]) -> None:
        self._result, self._clip = result, pair.recording
        self._frames: Iterator[np.ndarray | None] = iter(())
        self._compared = 0
        if not meters:
            return
        if self._clip is None:
            self._lose(pair.why)
            return
        if pair.edited.was is None and self._clip.emotion not in (pair.edited.emotion, None):
            result.note(f"{self._clip.file} is taken for its recording")
        try:
            ours, theirs = rate_of(pair.edited), rate_of(self._clip)
            if ours and theirs and abs(ours / theirs - 1) > 0.001:
                a, b = (f"{float(rate):.4g}" for rate in (ours, theirs))
                self._lose(f"{a} frames a second beside the recording's {b}: they do not show the same moments")
                return
            self._frames = frames_of(self._clip, lambda number: any(meter.wants(number) for meter in meters))
        except (ValueError, OSError) as error:
            self._lose(str(error))

    def beside(self, frames: Frames, count: int) -> Frames:
        """Of the recording's next `count` frames those that are looked at, in the size of the edit's, `frames`.

        Fewer where it ends.
        """
        try:
            batch = list(itertools.islice(self._frames, count))
        except (ValueError, OSError) as error:
            self._lose(str(error))
            return {}
        others = _numbered(batch, self._compared)
        self._compared += len(batch)
        if not others:
            return others
        (height, width), (h, w) = (next(iter(of.values())).shape[:2] for of in (frames, others))
        if (height, width) == (h, w):
            return others
        if abs(height * w - h * width) > 0.02 * h * width:
            self._lose(f"its {width} × {height} pixels and the recording's {w} × {h} are no two sizes of one picture")
            return {}
        self._result.note(f"the recording's {w} × {h} pixels were resized to {width} × {height}")
        resize = partial(Image.Image.resize, size=(width, height), resample=Image.Resampling.LANCZOS)
        return {number: np.array(resize(Image.fromarray(other))) for number, other in others.items()}

    def finish(self) -> None:
        """Note lengths that differ."""
        try:
            longer = self._compared == self._result.frames and next(self._frames, self) is not self
        except (ValueError, OSError) as error:
            self._lose(str(error))
            return
        if self._compared and (longer or self._compared < self._result.frames):
            self._result.note(
                f"the recording is {'longer' if longer else 'shorter'}: the first {self._compared} frames were compared"
            )

    def _lose(self, why: str) -> None:
        self._frames, self._compared = iter(()), 0
        self._result.lacks(_BESIDE_RECORDING, why)


class _Features:
    """Features of a clip's frames by which groups are compared: of all, or of those that were drawn."""

    def __init__(self, tools: Tools, chosen: Chosen) -> None:
        self._networks = {name: tools.networks[name] for name in OF_GROUPS.values() if name in tools.networks}
        self._chosen = {name: frozenset(chosen[name]) for name in self._networks if name in chosen}
        self._waiting: dict[str, list[np.ndarray]] = {name: [] for name in self._networks}
        self._parts: dict[str, list[Tensor]] = {name: [] for name in self._networks}

    @property
    def end(self) -> int | None:
        """How many frames a clip is read for them; None is all. One at least, which tells whether it can be read."""
        if len(self._chosen) < len(self._networks):
            return None
        return 1 + max((number for of in self._chosen.values() for number in of), default=0)

    def wants(self, number: int) -> bool:
        return any(self._takes(name, number) for name in self._networks)

    def add(self, frames: Frames) -> None:
        for name, waiting in self._waiting.items():
            waiting += [frame for number, frame in frames.items() if self._takes(name, number)]
            # Networks run for many frames at once, however few of a clip's were drawn.
            if len(waiting) >= _BATCH:
                self._describe(name)

    def all(self) -> dict[str, np.ndarray]:
        for name in self._networks:
            self._describe(name)
        return {name: torch.cat(parts).numpy() for name, parts in self._parts.items() if parts}

    def _takes(self, name: str, number: int) -> bool:
        return name not in self._chosen or number in self._chosen[name]

    def _describe(self, name: str) -> None:
        if self._waiting[name]:
            self._parts[name].append(self._networks[name](as_batch(self._waiting[name])).float().cpu())
            self._waiting[name].clear()


class _Meter(Interface):
    """Takes a clip's frames in parts.

    Attributes:
        compares: whether it also takes the recording's.
    """

    compares: bool

    def wants(self, number: int) -> bool:
        """Whether it looks at a frame."""

    def add(self, frames: Frames, others: Frames) -> None:
        """Take frames of the edit, those it wants among them, and of its recording the same or fewer."""

    def finish(self, result: Result) -> None:
        """Give the result its values."""


class _Likeness:
    """PSNR, SSIM and flicker against the recording."""

    compares = True

    def __init__(self, tools: Tools, every: int) -> None:
        self._metrics, self._every = tools.metrics, every
        self._means: dict[str, list[float]] = {"psnr": [], "ssim": [], "flicker": []}
        self._identical = 0
        self._last: np.ndarray | None = None  # (1, H, W, 3) int16, what the edit changed in the last frame

    def wants(self, number: int) -> bool:
        return "flicker" in self._metrics or number % self._every == 0

    def add(self, frames: Frames, others: Frames) -> None:
        both = [(frame, others[number]) for number, frame in frames.items() if number in others]
        if "flicker" in self._metrics and both:
            changes = [np.subtract(edited, recorded, dtype=np.int16) for edited, recorded in both]
            if self._last is not None:
                changes.insert(0, self._last)
            self._means["flicker"] += [float(np.abs(b - a).mean()) for a, b in itertools.pairwise(changes)]
            self._last = changes[-1]
        seen = [(frames[number], others[number]) for number in others if number % self._every == 0]
        for edited, recorded in seen:
            if "psnr" in self._metrics:
                value = psnr(edited, recorded)
                if math.isfinite(value):
                    self._means["psnr"].append(value)
                else:
                    self._identical += 1
            if "ssim" in self._metrics:
                self._means["ssim"].append(ssim(edited, recorded))

    def finish(self, result: Result) -> None:
        for name, values in self._means.items():
            if values:
                result.values[name] = sum(values) / len(values)
        if self._identical and self._means["psnr"]:
            result.note(f"{self._identical} frames equal the recording's: PSNR, there infinite, leaves them out")
        elif self._identical:
            result.lacks(["psnr"], "every frame equals the recording's: PSNR is infinite")
        result.lacks(["psnr", "ssim"], "no frame was compared")
        result.lacks(["flicker"], "takes two frames at least")


class _Faces:
    """Identity, landmarks and emotion: what needs the face found in the frame."""

    def __init__(self, pair: Pair, tools: Tools, known: _KnownFaces, every: int) -> None:
        self._pair, self._tools, self._known, self._every = pair, tools, known, every
        self.compares = bool(tools.metrics & {"identity", "lmd"})
        self._same: list[float] = []
        self._apart: list[tuple[float, float]] = []  # of all landmarks, and of the mouth's
        self._right: list[float] = []
        self._looked = self._faceless = 0

    def wants(self, number: int) -> bool:
        return number % self._every == 0

    def add(self, frames: Frames, others: Frames) -> None:
        for number in filter(self.wants, frames):
            self._looked += 1
            face = surest_face(self._known.detector, frames[number])
            if face is None:
                self._faceless += 1
                continue
            self._see_emotion(frames[number], face)
            if not self.compares or number not in others or self._pair.recording is None:
                continue
            other = self._known.face(self._pair.recording, number, others[number])
            if other is not None:
                self._compare(frames[number], face, others[number], other)

    def finish(self, result: Result) -> None:
        result.looked, result.faceless = self._looked, self._faceless
        if self._right:
            result.values["emotion"] = sum(self._right) / len(self._right)
        if self._same:
            result.values["identity"] = sum(self._same) / len(self._same)
        if self._apart:
            result.values["lmd"], result.values["lmd_mouth"] = np.mean(self._apart, axis=0).tolist()
        if (network := self._tools.networks.get("emotion")) is not None:
            target = self._pair.edited.emotion
            if target is None:
                result.lacks(["emotion"], "no name says which emotion it shows, or it shows several")
            elif target not in network.emotions:
                result.lacks(["emotion"], f"the classifier knows no {target}")
        if self._faceless == self._looked:
            missing = f"no face found in any of the {self._looked} frames looked at"
            result.lacks(["emotion", "identity", "lmd", "lmd_mouth"], missing)
        result.lacks(["identity", "lmd", "lmd_mouth"], "no face found in the recording's frames")

    def _see_emotion(self, frame: np.ndarray, face: Face) -> None:
        network = self._tools.networks.get("emotion")
        if network is not None and self._pair.edited.emotion in network.emotions:
            self._right.append(float(emotion_seen(network, frame, face) == self._pair.edited.emotion))

    def _compare(self, frame: np.ndarray, face: Face, other: np.ndarray, its_face: Face) -> None:
        if (network := self._tools.networks.get("identity")) is not None:
            a, b = network(as_batch([frame, other]), [face, its_face])
            self._same.append(float(F.cosine_similarity(a, b, dim=0)))
        self._apart.append(landmark_distances(face, its_face))


class _KnownFaces:
    """The faces of recordings' frames, each looked for once for all the edits of a recording that are measured soon."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self._faces: dict[tuple[Path, int, tuple[int, ...]], Face | None] = {}

    def face(self, recording: FaceClip, number: int, frame: np.ndarray) -> Face | None:
        """The surest face of a recording's frame in the size that it is compared in."""
        key = recording.sources[0], number, frame.shape
        if key not in self._faces:
            self._faces[key] = surest_face(self.detector, frame)
            if len(self._faces) > _KNOWN:
                self._faces.pop(next(iter(self._faces)))
        return self._faces[key]


def emotion_seen(network: Any, frame: np.ndarray, face: Face) -> str:
    """The classifier's word for the square around the face."""
    return network.emotions[int(network(as_batch([frame]), [face])[0].argmax())]


def landmark_distances(face: Face, other: Face) -> tuple[float, float]:
    """Mean distances of all landmarks and of the mouth's, in parts of the distance of the other's outer eye corners."""
    ours, theirs = face.landmarks, other.landmarks
    assert ours is not None
    assert theirs is not None
    distances = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs[36] - theirs[45])
    return float(distances.mean()), float(distances[48:].mean())


class _Sync:
    """LSE-D and LSE-C of a clip with its sound."""

    compares = False

    def __init__(self, pair: Pair, network: SyncNet, protocol: Protocol) -> None:
        self._pair, self._network, self._protocol = pair, network, protocol
        self._frames: list[np.ndarray] = []
        self._sound: Path | None = None
        self._why = "no sound in it, beside it, in its recording, or in --sound"
        try:
            self._sound = next((path for path in pair.sounds if is_sound(path) or has_sound(path)), None)
        except (ValueError, OSError) as error:
            self._why = str(error)

    def wants(self, number: int) -> bool:
        return self._sound is not None

    def add(self, frames: Frames, others: Frames) -> None:
        if self._sound is not None:
            self._frames += frames.values()

    def finish(self, result: Result) -> None:
        if self._sound is None:
            result.lacks(["lse_d", "lse_c"], self._why)
            return
        try:
            rate = rate_of(self._pair.edited)
            if rate is None:
                rate = _RATES[self._protocol]
                result.note(f"nothing says its rate: LSE takes {rate} frames a second")
            if is_video(self._pair.edited.sources[0]) and self._sound in self._of_recording():
                result.note("it has no sound of its own: LSE takes its recording's")
            sound = read_waveform(self._sound)
            found = lip_sync(as_batch(self._frames), rate, sound, SAMPLE_RATE, self._protocol, self._network)
        except (ValueError, OSError) as error:
            result.lacks(["lse_d", "lse_c"], str(error))
            return
        result.values |= {"lse_d": found.distance, "lse_c": found.confidence}

    def _of_recording(self) -> tuple[Path | None, ...]:
        recording = self._pair.recording
        return (recording.sound, *recording.sources) if recording is not None else ()


_RATES = {"cdrl": Fraction(30), "original": Fraction(25)}
