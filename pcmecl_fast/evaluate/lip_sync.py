"""How well lips and voice go together: LSE-D and LSE-C, by either protocol in use.

SyncNet turns every 5 frames, and the 0.2 seconds of sound with them, into features. For each offset of the sound, from
10 frames before the picture to 10 after it, their distances are averaged over the clip. LSE-D is the least of these 21
means, LSE-C their median minus the least (Chung and Zisserman 2016; Prajwal et al. 2020).

The values of the two protocols cannot be compared:

============  ==============================================  ==================================================
              "cdrl"                                          "original"
============  ==============================================  ==================================================
follows       CDRL's evaluation, which NED's papers share     the authors' syncnet_python
frames        at the video's own rate (theirs is 30)          at 25 a second
cut           35 of 256 pixels a side                         as given: theirs come from its own face detector
sound         in [−1, 1]                                      16-bit whole numbers
MFCC          4 steps a frame, in whole samples               every 10 ms
windows       up to 5 before the end of frames and steps      up to 5 before the end of frames and sound
============  ==============================================  ==================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pcmecl_fast.data.containers import naming, open_container
from pcmecl_fast.evaluate.networks.base import as_pictures
from pcmecl_fast.evaluate.networks.syncnet import COEFFICIENTS, STEPS, WINDOW, SyncNet

SAMPLE_RATE = 16_000
Protocol = Literal["cdrl", "original"]

_REACH = 10  # frames, the largest offset
_CUT = Fraction(35, 256)
_ORIGINAL_RATE = 25
_SCALE = 32768  # of 16-bit sound


@dataclass(frozen=True)
class LipSync:
    """What SyncNet says of one clip.

    Args:
        distance: LSE-D, lower is better.
        confidence: LSE-C, higher is better.
        offset: by how many frames the sound comes too early: delayed by as many, it fits best.
        rate: of the frames that were seen, a second.
        windows: over how many windows of 5 frames the means are.
        distances: (21,) mean distances, from the sound 10 frames earlier to 10 later.
    """

    distance: float
    confidence: float
    offset: int
    rate: float
    windows: int
    distances: Tensor


def lip_sync(
    frames: Tensor,  # (T, 3, H, W) RGB in [-1, 1], or uint8
    rate: float | Fraction,
    waveform: Tensor,  # (N,) float in [-1, 1]
    sample_rate: int,
    protocol: Protocol,
    network: SyncNet,
    most_windows: int | None = None,
) -> LipSync:
    """LSE-D and LSE-C of a clip, by one of the protocols above.

    Args:
        frames: the clip's faces; for "original" as SyncNet's pipeline cuts them out.
        rate: frames a second. For "original", frames are repeated or left out to make 25 of them.
        waveform: the sound that begins with the first frame.
        sample_rate: 16000; `read_waveform` gives it.
        protocol: "cdrl" or "original".
        network: of `load_syncnet`.
        most_windows: looked at, spread evenly over the clip, for results that may be rough: nearly all the time goes
            into the frames' windows. None, as both protocols have it, is all.

    Raises:
        ValueError: a shape, rate, protocol or number of windows; a clip or sound too short for one window.
    """
    if protocol not in ("cdrl", "original"):
        raise ValueError(f"protocol: got {protocol!r}; takes cdrl or original")
    if not 0 < rate < math.inf:
        raise ValueError(f"rate: got {rate}; takes frames a second, above 0")
    if most_windows is not None and most_windows < 1:
        raise ValueError(f"most_windows: got {most_windows}; takes at least 1, or None for all")
    if waveform.ndim != 1 or not waveform.is_floating_point():
        raise ValueError(f"waveform: got {waveform.dtype} {tuple(waveform.shape)}; takes floats (N,) in [-1, 1]")
    if sample_rate != SAMPLE_RATE:
        raise ValueError(f"sample_rate: got {sample_rate}; takes {SAMPLE_RATE}, which read_waveform gives")
    pictures = as_pictures(frames)
    sound = waveform.detach().to("cpu", torch.float64)
    if protocol == "original":
        pictures, rate = pictures[_at_original_rate(len(pictures), rate)], _ORIGINAL_RATE
        steps = mfcc((sound * _SCALE).round().clamp(-_SCALE, _SCALE - 1), 0.01)
        heard = len(sound) * _ORIGINAL_RATE // SAMPLE_RATE
    else:
        pictures = _cut(pictures)
        steps = mfcc(sound, 1 / (float(rate) * STEPS))
        heard = len(steps) // STEPS
    windows = min(len(pictures), heard) - WINDOW  # one fewer than there is room for, as both count
    if windows < 1:
        seconds = len(sound) / SAMPLE_RATE
        raise ValueError(
            f"lip synchronisation takes at least {WINDOW + 1} frames with sound; got {len(pictures)} frames at "
            f"{float(rate):g} a second, and {seconds:.2f} seconds of sound"
        )
    starts = torch.linspace(0, windows - 1, min(windows, most_windows or windows)).round().long()
    lips = network.lips(pictures, starts)
    sounds = network.sounds(steps[: STEPS * (windows + WINDOW - 1)].float())
    distances = _mean_distances(lips, sounds, starts)
    least = int(distances.argmin())
    return LipSync(
        distance=float(distances[least]),
        confidence=float(distances.median() - distances[least]),
        offset=_REACH - least,
        rate=float(rate),
        windows=len(starts),
        distances=distances,
    )


def read_waveform(path: str | Path) -> Tensor:  # (N,) float32 in [-1, 1)
    """The first sound of a file as SyncNet hears it: one channel, 16 kHz, 16 bits.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or has no sound; the message names it.
    """
    import av

    with open_container(path) as container:
        if not container.streams.audio:
            raise ValueError(f"{path} has no sound")
        resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
        parts = []
        with naming(path):
            for frame in container.decode(container.streams.audio[0]):
                parts += [part.to_ndarray()[0] for part in resampler.resample(frame)]
            parts += [part.to_ndarray()[0] for part in resampler.resample(None)]
    samples = np.concatenate(parts) if parts else np.zeros(0, np.int16)
    return torch.from_numpy(samples.astype(np.float32) / _SCALE)


def mfcc(
    waveform: Tensor,  # (N,) float64, 16 kHz
    step: float,
) -> Tensor:  # (steps, 13) float64
    """Mel-frequency cepstral coefficients, those of the library python_speech_features that both protocols use.

    Every `step` seconds, 25 ms of the pre-emphasised sound: the log energies of 26 triangular filters on the mel scale,
    their orthonormal DCT-II, liftered; the first coefficient is the log of the whole energy. Written out because that
    library is no wheel and needs SciPy; a test compares the two.
    """
    length, stride = _whole(0.025 * SAMPLE_RATE), _whole(step * SAMPLE_RATE)
    emphasised = torch.cat((waveform[:1], waveform[1:] - 0.97 * waveform[:-1]))
    count = 1 + max(0, math.ceil((len(waveform) - length) / stride))
    padded = F.pad(emphasised, (0, max(0, (count - 1) * stride + length - len(waveform))))
    power = torch.fft.rfft(padded.unfold(0, length, stride)[:count], _FFT).abs().square() / _FFT
    energy = _not_zero(power.sum(1))
    filtered = _not_zero(power @ _mel_filters().T).log()
    n = torch.arange(COEFFICIENTS, dtype=torch.float64)
    angles = torch.pi / _FILTERS * torch.outer(torch.arange(_FILTERS, dtype=torch.float64) + 0.5, n)
    cepstrum = (filtered @ angles.cos()) * math.sqrt(2 / _FILTERS) * (1 + 11 * torch.sin(torch.pi * n / 22))
    cepstrum[:, 0] = energy.log()
    return cepstrum


_FFT, _FILTERS = 512, 26


def _mel_filters() -> Tensor:  # (26, 257) float64
    """Triangles between whole bins, evenly spaced on the mel scale m = 2595 log₁₀(1 + f / 700)."""
    top = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    mels = torch.linspace(0, top, _FILTERS + 2, dtype=torch.float64)
    edges = ((_FFT + 1) * 700 * (10 ** (mels / 2595) - 1) / SAMPLE_RATE).floor()
    left, middle, right = (edges[k : k + _FILTERS, None] for k in range(3))
    bins = torch.arange(_FFT // 2 + 1, dtype=torch.float64)
    rising, falling = (bins - left) / (middle - left), (right - bins) / (right - middle)
    return torch.minimum(rising, falling).clamp(min=0)


def _not_zero(energy: Tensor) -> Tensor:
    """Silence has a logarithm too."""
    return torch.where(energy == 0, torch.finfo(torch.float64).eps, energy)


def _whole(samples: float) -> int:
    return math.floor(samples + 0.5)


def _at_original_rate(count: int, rate: float | Fraction) -> Tensor:  # (T',) int
    """Which frame is nearest in time to each of 25 a second."""
    speed = Fraction(rate).limit_denominator(100_000) / _ORIGINAL_RATE
    wanted = math.floor(count / speed)
    return torch.tensor(
        [min(math.floor(k * speed + Fraction(1, 2)), count - 1) for k in range(wanted)], dtype=torch.long
    )


def _cut(
    pictures: Tensor,  # (T, 3, H, W)
) -> Tensor:
    """CDRL's faces have a margin, of 35 pixels in 256; of other sizes the same part is cut off."""
    height, width = pictures.shape[2:]
    top, left = round(_CUT * height), round(_CUT * width)
    return pictures[:, :, top : height - top, left : width - left]


def _mean_distances(
    lips: Tensor,  # (S, D)
    sounds: Tensor,  # (W, D)
    starts: Tensor,  # (S,) int in [0, W)
) -> Tensor:  # (21,) float32
    """For each offset the mean distance over the clip; beyond its ends, features are 0, as both protocols have it."""
    padded = F.pad(sounds, (0, 0, _REACH, _REACH))
    shifted = (padded[starts + k] for k in range(2 * _REACH + 1))
    return torch.stack([F.pairwise_distance(lips, other).mean() for other in shifted]).cpu()
