"""The field's measures by name: what each is, what it needs to run, and why it does not where something is missing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pcmecl_fast.data.faces import Detector, load_detector
from pcmecl_fast.evaluate.networks import IdentityNetwork, SyncNet, load_network, load_syncnet
from pcmecl_fast.libraries import missing_library
from pcmecl_fast.wording import did_you_mean

log = logging.getLogger("pcmecl_fast")

Protocol = Literal["cdrl", "original"]

SAMPLES = 100
"""Frames a side that CSIM is taken over, for each individual and emotion: CDRL's number."""


@dataclass(frozen=True)
class Sampling:
    """Of what the numbers are taken.

    Attributes:
        every: frames from one in which the face is looked for to the next.
        pixels: frames from one that PSNR and SSIM are taken of to the next.
        frames: random ones a side and emotion that FAD and FID are taken over; None takes all, as the papers do.
        clips: random ones for each setting and emotion that LSE is taken over; None takes all.
    """

    every: int = 10
    pixels: int = 1
    frames: int | None = None
    clips: int | None = None

    @classmethod
    def of(cls, every: int, *, quick: bool) -> Sampling:
        return cls(2 * every, 5, 300, 10) if quick else cls(every)


@dataclass(frozen=True)
class Measure:
    """One number of the table.

    Attributes:
        key: its name in `measures.json`.
        metric: the word of --metrics that asks for it.
        name: as people write it.
        better: ↑ where more is better, ↓ where less is.
        unit: after the number.
        protocol: how it is taken, in one line: printed with every number.
        by: what one value is of. clip: one edited clip. person: an individual and an emotion. emotion: all clips.
    """

    key: str
    metric: str
    name: str
    better: Literal["↑", "↓"]
    protocol: str
    unit: Literal["", "%", "dB"] = ""
    by: Literal["clip", "person", "emotion"] = "clip"


MEASURES = (
    Measure(
        "fad",
        "fad",
        "FAD",
        "↓",
        "Fréchet distance of resnet_face18's features (512) of {frames} edited frames and of {frames} real ones of the "
        "same people and emotion; mean over emotions, as in CDRL",
        by="emotion",
    ),
    Measure(
        "csim",
        "csim",
        "CSIM",
        "↑",
        "expression similarity, no identity: mean cosine of EfficientFace's features over all pairs of at most "
        f"{SAMPLES} random frames a side, individual and emotion; mean over individuals, then emotions, as in CDRL",
        by="person",
    ),
    Measure("lse_d", "lse", "LSE-D", "↓", "SyncNet's mean distance at the best of the offsets ±10; {lse}"),
    Measure("lse_c", "lse", "LSE-C", "↑", "SyncNet's median minus its least distance over the offsets ±10; {lse}"),
    Measure(
        "identity",
        "identity",
        "identity similarity",
        "↑",
        "cosine of dlib's face features (128) of the edited frame and its recording's; every {every}th frame",
    ),
    Measure(
        "emotion",
        "emotion",
        "emotion accuracy",
        "↑",
        "frames in which the fer package's classifier sees the target emotion in the square around the face, a weak "
        "one: right in 53 % of unedited stills of MEAD; every {every}th frame",
        unit="%",
    ),
    Measure(
        "lmd",
        "lmd",
        "LMD",
        "↓",
        "mean distance of dlib's 68 landmarks from the recording's, in parts of the distance of its outer eye corners; "
        "every {every}th frame",
    ),
    Measure("lmd_mouth", "lmd", "LMD, mouth", "↓", "as LMD, of the mouth's 20 landmarks alone"),
    Measure("psnr", "psnr", "PSNR", "↑", "against the recording, mean over {pixels} of 8 bits, RGB", unit="dB"),
    Measure("ssim", "ssim", "SSIM", "↑", "against the recording, 11 × 11 Gaussian window of σ 1.5, mean over {pixels}"),
    Measure(
        "fid",
        "fid",
        "FID",
        "↓",
        "Fréchet distance of InceptionV3's features (2048; network and resize are torch-fidelity's) of {frames} edited "
        "frames and of {frames} real ones of the same people and emotion; mean over emotions",
        by="emotion",
    ),
    Measure(
        "flicker",
        "flicker",
        "flicker",
        "↓",
        "how much the edit changes from frame to frame: mean |(e_t − e_(t−1)) − (s_t − s_(t−1))| of edited and "
        "recorded pixels, in levels of 255; no optical flow, so that a moving edit counts too",
    ),
)
"""In the order of the table."""

METRICS = tuple(dict.fromkeys(measure.metric for measure in MEASURES))
"""The words of --metrics."""

OF_GROUPS = {"fad": "resnet_face18", "csim": "efficient_face", "fid": "inception"}
"""Metrics that compare groups of frames, and the network whose features they take."""

_LSE = {
    "cdrl": "CDRL's way, not comparable with the original's: at the clip's own rate, 35 of 256 pixels cut a side, "
    "sound in [−1, 1]; mean over clips",
    "original": "the original's way, not comparable with CDRL's: 25 frames a second, whole frames, sound of 16 bits; "
    "mean over clips",
}


def protocol_of(measure: Measure, protocol: Protocol, sampling: Sampling) -> str:
    """How a number was taken, in one line."""
    few = f", of at most {sampling.clips} random ones for each emotion" if sampling.clips is not None else ""
    return measure.protocol.format(
        lse=_LSE[protocol] + few,
        every=sampling.every,
        pixels="frames" if sampling.pixels == 1 else f"every {sampling.pixels}th frame",
        frames="all" if sampling.frames is None else f"at most {sampling.frames} random",
    )


def check_metrics(metrics: Sequence[str] | None) -> tuple[str, ...]:
    """The metrics asked for, in the table's order; all where none are.

    Raises:
        ValueError: a word that is none.
    """
    for metric in metrics or ():
        if metric not in METRICS:
            hint = did_you_mean(metric, METRICS)
            raise ValueError(
                f"metrics: takes some of {', '.join(METRICS)}, got {metric!r}{hint and '; '}{hint}".rstrip()
            )
    return tuple(metric for metric in METRICS if metrics is None or metric in metrics)


@dataclass
class Tools:
    """What the metrics need, as far as it is here.

    Attributes:
        metrics: those that can run.
        not_run: the others, and why in one line each.
        networks: by name, each giving features of frames.
        detector: finds faces and their landmarks.
        sync: SyncNet.
    """

    metrics: set[str] = field(default_factory=set)
    not_run: dict[str, str] = field(default_factory=dict)
    networks: dict[str, Any] = field(default_factory=dict)  # of these, some can more than a FrameNetwork
    detector: Detector | None = None
    sync: SyncNet | None = None

    @property
    def measures(self) -> list[Measure]:
        """Those that can run."""
        return [measure for measure in MEASURES if measure.metric in self.metrics]


def load_tools(metrics: Sequence[str], weights: Path | None, device: str) -> Tools:
    """Load what each metric needs; one that lacks something is told, and the others run.

    Args:
        metrics: words of `METRICS`.
        weights: the folder with the authors' files.
        device: where networks run.
    """
    tools = Tools()
    for metric in metrics:
        try:
            _NEEDS.get(metric, _nothing)(tools, weights, device)
        # A file that is missing, not installed, damaged, or of another architecture: its message says which.
        except (OSError, ImportError, ValueError, RuntimeError) as error:
            tools.not_run[metric] = " ".join((missing_library(error) or str(error)).split())
            log.warning("not measured, %s: %s", metric, tools.not_run[metric])
        else:
            tools.metrics.add(metric)
    return tools


_Load = Callable[[Tools, Path | None, str], None]


def _nothing(tools: Tools, weights: Path | None, device: str) -> None:
    pass


def _network(name: str) -> _Load:
    def load(tools: Tools, weights: Path | None, device: str) -> None:
        tools.networks[name] = load_network(name, weights, device)

    return load


def _detector(tools: Tools, weights: Path | None, device: str) -> None:
    tools.detector = tools.detector or load_detector("dlib")


def _identity(tools: Tools, weights: Path | None, device: str) -> None:
    _detector(tools, weights, device)
    assert tools.detector is not None
    tools.networks["identity"] = IdentityNetwork(tools.detector, torch.device(device))


def _emotion(tools: Tools, weights: Path | None, device: str) -> None:
    _detector(tools, weights, device)
    _network("emotion")(tools, weights, device)


def _sync(tools: Tools, weights: Path | None, device: str) -> None:
    tools.sync = load_syncnet(weights, device)


_NEEDS: dict[str, _Load] = {
    "fad": _network("resnet_face18"),
    "csim": _network("efficient_face"),
    "lse": _sync,
    "identity": _identity,
    "emotion": _emotion,
    "lmd": _detector,
    "fid": _network("inception"),
}
