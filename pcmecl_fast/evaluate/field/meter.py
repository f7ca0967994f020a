"""One clip measured: all that can be said of it alone, and the features that groups of clips are compared by."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from pcmecl_fast.data.faces import Detector, Face
from pcmecl_fast.data.layouts.base import is_sound
from pcmecl_fast.data.sound import has_sound
from pcmecl_fast.evaluate.field.clips import FaceClip
from pcmecl_fast.evaluate.field.measures import OF_GROUPS, Protocol, Sampling, Tools
from pcmecl_fast.evaluate.field.pairs import Pair
from pcmecl_fast.evaluate.field.reading import as_tensor, batches, frames_of, rate_of
from pcmecl_fast.evaluate.lip_sync import SAMPLE_RATE, lip_sync, read_waveform
from pcmecl_fast.evaluate.networks import SyncNet

Frames = list[np.ndarray]
"""Each (H, W, 3) uint8, all of one size."""
Chosen = Mapping[str, Collection[int]]
"""Numbers of a clip's frames, by network."""

_BATCH = 16
_BESIDE_RECORDING = ("identity", "lmd", "lmd_mouth", "psnr", "ssim", "flicker")
"""Measures that compare with the recording, frame by frame."""


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
        recording = _Recording(pair, result)
        meters = self._meters(pair, heard=heard)
        features = _Features(self.tools, chosen)
        for frames in batches(frames_of(pair.edited), _BATCH):
            others = recording.beside(frames)
            numbers = range(result.frames, result.frames + len(frames))
            result.frames += len(frames)
            features.add(frames, numbers)
            for meter in meters:
                meter.add(frames, others, numbers)
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
        """A clip of real faces: its features alone.

        Raises:
            ValueError: the clip is damaged.
        """
        result, features = Result(), _Features(self.tools, chosen)
        for frames in batches(frames_of(clip), _BATCH):
            features.add(frames, range(result.frames, result.frames + len(frames)))
            result.frames += len(frames)
        result.features = features.all()
        return result

    def _meters(self, pair: Pair, *, heard: bool) -> list[_Meter]:
        tools, meters = self.tools, list[_Meter]()
        if tools.metrics & {"psnr", "ssim", "flicker"}:
            meters.append(_Likeness(tools, self.sampling.pixels))
        if tools.detector is not None:
            meters.append(_Faces(pair, tools, tools.detector, self.sampling.every))
        if tools.sync is not None and heard:
            meters.append(_Sync(pair, tools.sync, self.protocol))
        return meters


class _Recording:
    """The frames of an edit's recording beside its own; where there are none, the result says why."""

    def __init__(self, pair: Pair, result: Result) -> None:
        self._result, self._clip = result, pair.recording
        self._frames: Iterator[np.ndarray] = iter(())
        self._compared = 0
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
            self._frames = frames_of(self._clip)
        except (ValueError, OSError) as error:
            self._lose(str(error))

    def beside(self, frames: Frames) -> Frames:
        """As many frames of the recording, in the size of the edit's; fewer where it ends."""
        try:
            others = list(itertools.islice(self._frames, len(frames)))
        except (ValueError, OSError) as error:
            self._lose(str(error))
            return []
        self._compared += len(others)
        if not others or others[0].shape == frames[0].shape:
            return others
        (height, width), (h, w) = frames[0].shape[:2], others[0].shape[:2]
        if abs(height * w - h * width) > 0.02 * h * width:
            self._lose(f"its {width} × {height} pixels and the recording's {w} × {h} are no two sizes of one picture")
            return []
        self._result.note(f"the recording's {w} × {h} pixels were resized to {width} × {height}")
        resized = (Image.fromarray(other).resize((width, height), Image.Resampling.LANCZOS) for other in others)
        return [np.array(picture) for picture in resized]

    def finish(self) -> None:
        """Note lengths that differ."""
        longer = self._compared == self._result.frames and next(self._frames, None) is not None
        if self._compared and (longer or self._compared < self._result.frames):
            self._result.note(
                f"the recording is {'longer' if longer else 'shorter'}: the first {self._compared} frames were compared"
            )

    def _lose(self, why: str) -> None:
        self._frames = iter(())
        self._result.lacks(_BESIDE_RECORDING, why)


class _Features:
    """Features of a clip's frames by which groups are compared: of all, or of those that were drawn."""

    def __init__(self, tools: Tools, chosen: Chosen) -> None:
        self._networks = {name: tools.networks[name] for name in OF_GROUPS.values() if name in tools.networks}
        self._chosen = chosen
        self._parts: dict[str, list[Tensor]] = {name: [] for name in self._networks}

    def add(self, frames: Frames, numbers: range) -> None:
        for name, network in self._networks.items():
            wanted = [
                frame
                for frame, number in zip(frames, numbers, strict=True)
                if name not in self._chosen or number in self._chosen[name]
            ]
            if wanted:
                self._parts[name].append(network(as_tensor(wanted)).float().cpu())

    def all(self) -> dict[str, np.ndarray]:
        return {name: torch.cat(parts).numpy() for name, parts in self._parts.items() if parts}


class _Meter(Interface):
    """Takes a clip's frames in parts."""

    def add(self, frames: Frames, others: Frames, numbers: range) -> None:
        """Take frames of the edit, as many of its recording or fewer, and the numbers of the edit's."""

    def finish(self, result: Result) -> None:
        """Give the result its values."""


class _Likeness:
    """PSNR, SSIM and flicker against the recording."""

    def __init__(self, tools: Tools, every: int) -> None:
        self._metrics, self._every = tools.metrics, every
        self._means: dict[str, list[float]] = {"psnr": [], "ssim": [], "flicker": []}
        self._identical = 0
        self._last: Tensor | None = None  # (1, 3, H, W), what the edit changed in the last frame

    def add(self, frames: Frames, others: Frames, numbers: range) -> None:
        if not others:
            return
        edited = as_tensor(frames[: len(others)]).add_(1).mul_(127.5)  # levels
        recorded = as_tensor(others).add_(1).mul_(127.5)
        seen = [k for k in range(len(others)) if numbers[k] % self._every == 0]
        if "psnr" in self._metrics and seen:
            each = peak_signal_noise_ratio(
                edited[seen], recorded[seen], data_range=(0.0, 255.0), reduction="none", dim=(1, 2, 3)
            ).flatten()
            self._identical += int(each.isinf().sum())
            self._means["psnr"] += each[each.isfinite()].tolist()
        if "ssim" in self._metrics and seen:
            ssim = structural_similarity_index_measure(edited[seen], recorded[seen], data_range=255.0, reduction="none")
            self._means["ssim"] += torch.as_tensor(ssim).flatten().tolist()
        if "flicker" in self._metrics:
            change = edited - recorded
            changes = change if self._last is None else torch.cat([self._last, change])
            self._means["flicker"] += changes.diff(dim=0).abs().mean((1, 2, 3)).tolist()
            self._last = change[-1:]

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

    def __init__(self, pair: Pair, tools: Tools, detector: Detector, every: int) -> None:
        self._pair, self._tools, self._detector, self._every = pair, tools, detector, every
        self._same: list[float] = []
        self._apart: list[tuple[float, float]] = []  # of all landmarks, and of the mouth's
        self._right: list[float] = []
        self._looked = self._faceless = 0

    def add(self, frames: Frames, others: Frames, numbers: range) -> None:
        for k, number in enumerate(numbers):
            if number % self._every:
                continue
            self._looked += 1
            face = self._find(frames[k])
            if face is None:
                self._faceless += 1
                continue
            self._see_emotion(frames[k], face)
            other = self._find(others[k]) if k < len(others) else None
            if other is not None:
                self._compare(frames[k], face, others[k], other)

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

    def _find(self, frame: np.ndarray) -> Face | None:
        return surest_face(self._detector, frame)

    def _see_emotion(self, frame: np.ndarray, face: Face) -> None:
        network = self._tools.networks.get("emotion")
        if network is not None and self._pair.edited.emotion in network.emotions:
            self._right.append(float(emotion_seen(network, frame, face) == self._pair.edited.emotion))

    def _compare(self, frame: np.ndarray, face: Face, other: np.ndarray, its_face: Face) -> None:
        if (network := self._tools.networks.get("identity")) is not None:
            a, b = network(as_tensor([frame, other]), [face, its_face])
            self._same.append(float(F.cosine_similarity(a, b, dim=0)))
        self._apart.append(landmark_distances(face, its_face))


def surest_face(detector: Detector, frame: np.ndarray) -> Face | None:
    """The face that the detector is surest of; None where it is of none, or has no landmarks for it."""
    return next((face for face in detector(frame) if face.score > 0 and face.landmarks is not None), None)


def emotion_seen(network: Any, frame: np.ndarray, face: Face) -> str:
    """The classifier's word for the frame within the face's box."""
    height, width = frame.shape[:2]
    left, top = max(0, int(face.box[0])), max(0, int(face.box[1]))
    right, bottom = min(width, int(face.box[2])), min(height, int(face.box[3]))
    within = frame[top : max(bottom, top + 1), left : max(right, left + 1)]
    return network.emotions[int(network(as_tensor([within]))[0].argmax())]


def landmark_distances(face: Face, other: Face) -> tuple[float, float]:
    """Mean distances of all landmarks and of the mouth's, in parts of the distance of the other's outer eye corners."""
    ours, theirs = face.landmarks, other.landmarks
    assert ours is not None
    assert theirs is not None
    distances = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs[36] - theirs[45])
    return float(distances.mean()), float(distances[48:].mean())


class _Sync:
    """LSE-D and LSE-C of a clip with its sound."""

    def __init__(self, pair: Pair, network: SyncNet, protocol: Protocol) -> None:
        self._pair, self._network, self._protocol = pair, network, protocol
        self._frames: list[np.ndarray] = []
        self._sound: Path | None = None
        self._why = "no sound in it, beside it, in its recording, or in --sound"
        try:
            self._sound = next((path for path in pair.sounds if is_sound(path) or has_sound(path)), None)
        except (ValueError, OSError) as error:
            self._why = str(error)

    def add(self, frames: Frames, others: Frames, numbers: range) -> None:
        if self._sound is not None:
            self._frames += frames

    def finish(self, result: Result) -> None:
        if self._sound is None:
            result.lacks(["lse_d", "lse_c"], self._why)
            return
        try:
            rate = rate_of(self._pair.edited)
            if rate is None:
                rate = _RATES[self._protocol]
                result.note(f"nothing says its rate: LSE takes {rate} frames a second")
            frames = torch.from_numpy(np.stack(self._frames)).permute(0, 3, 1, 2)
            sound = read_waveform(self._sound)
            found = lip_sync(frames, rate, sound, SAMPLE_RATE, self._protocol, self._network)
        except (ValueError, OSError) as error:
            result.lacks(["lse_d", "lse_c"], str(error))
            return
        result.values |= {"lse_d": found.distance, "lse_c": found.confidence}


_RATES = {"cdrl": Fraction(30), "original": Fraction(25)}
