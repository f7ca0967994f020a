"""The frames of a clip, with the memory of a few."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
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


def frames_of(
    clip: FaceClip, wanted: Callable[[int], bool] | None = None
) -> Iterator[np.ndarray | None]:  # each (H, W, 3) uint8
    """The frames of a clip in order, upright RGB.

    Args:
        clip: the clip.
        wanted: of a frame's number, whether it is looked at; by default all are. In place of the others stands None: a
            video decodes them all the same, but to turn them into colours takes as long again; pictures are not opened.

    Raises:
        ValueError: a damaged file, which the message names.
    """
    if is_video(clip.sources[0]):
        with open_video(clip.sources[0], threads=1) as reader:
            for frame in reader:
                yield frame.rgb() if wanted is None or wanted(frame.number) else None
        return
    size = None
    for number, source in enumerate(clip.sources):
        if wanted is not None and not wanted(number):
            yield None
            continue
        picture = read_picture(source)
        if size not in (None, picture.shape):
            raise ValueError(f"{source} has another size than the pictures before it")
        size = picture.shape
        yield picture


def frame_at(clip: FaceClip, number: int) -> np.ndarray | None:  # (H, W, 3) uint8
    """One frame, or None where the clip ends before it; errors are those of `frames_of`."""
    return next(itertools.islice(frames_of(clip, number.__eq__), number, None), None)


def batches(frames: Iterator[np.ndarray | None], size: int) -> Iterator[list[np.ndarray | None]]:
    """The frames in lists of `size`."""
    while batch := list(itertools.islice(frames, size)):
        yield batch


def as_batch(frames: Sequence[np.ndarray]) -> Tensor:  # (B, 3, H, W) uint8
    """Frames of one size, as networks take them."""
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
