"""The frames of a clip, with the memory of a few."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from pcmecl_fast.data.layouts.base import is_video
from pcmecl_fast.data.media import read_picture
from pcmecl_fast.data.video import declared_frames, open_video, scan
from pcmecl_fast.evaluate.field.clips import FaceClip


def count_frames(clip: FaceClip) -> int:
    """How many frames a clip has; a video is decoded for that only where its header does not say.

    Raises:
        ValueError: a damaged file, which the message names.
    """
    if not is_video(clip.sources[0]):
        return len(clip.sources)
    return declared_frames(clip.sources[0]) or len(scan(clip.sources[0]))


def rate_of(clip: FaceClip) -> Fraction | None:
    """Frames a second; None for pictures that no index knows the rate of."""
    if not is_video(clip.sources[0]):
        return clip.rate
    with open_video(clip.sources[0], threads=1) as reader:
        return reader.rate


def frames_of(clip: FaceClip) -> Iterator[np.ndarray]:  # each (H, W, 3) uint8
    """The frames of a clip in order, upright RGB.

    Raises:
        ValueError: a damaged file, which the message names.
    """
    if is_video(clip.sources[0]):
        with open_video(clip.sources[0], threads=1) as reader:
            for frame in reader:
                yield frame.rgb()
        return
    size = None
    for source in clip.sources:
        picture = read_picture(source)
        if size not in (None, picture.shape):
            raise ValueError(f"{source} has another size than the pictures before it")
        size = picture.shape
        yield picture


def batches(frames: Iterator[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """The frames in lists of `size`."""
    while batch := list(itertools.islice(frames, size)):
        yield batch


def as_tensor(frames: list[np.ndarray]) -> Tensor:
    """Frames of one size as (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
