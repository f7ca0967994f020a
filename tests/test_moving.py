"""Loops of edited clips."""

import io

import pytest
import torch
from PIL import Image

from pcmecl_fast.evaluate.moving import MovingFaces, moving_faces
from pcmecl_fast.synthetic import SyntheticFaces

EMOTIONS = ["neutral", "happy", "sad"]


def unchanged(frames, target):
    return frames


def test_drawn_clips_come_with_the_truth():
    held = SyntheticFaces(3, emotions=EMOTIONS, clips=1, frames_per_clip=12, size=32)
    first, second = moving_faces(unchanged, held)
    assert first.columns == ["source, neutral", "happy", "sad"]
    assert second.columns == ["source, happy", "neutral", "sad"]  # of another person, and another emotion
    rows = torch.arange(12)
    assert torch.equal(first.frames[:, 0], held.frames(rows))
    assert torch.equal(first.truth[:, 1], held.truth(rows, torch.full((12,), EMOTIONS.index("sad"))))

    picture = Image.open(io.BytesIO(first.webp))
    assert (picture.n_frames, picture.width) == (12, first.width)
    without = MovingFaces(first.name, first.columns, first.frames, first.rate)
    assert Image.open(io.BytesIO(without.webp)).height < picture.height
    assert without.width < first.width


def test_people_with_one_emotion_repeat_it():
    missing = [(n, e) for n in range(2) for e in (1, 2)]
    held = SyntheticFaces(2, emotions=EMOTIONS, clips=1, frames_per_clip=12, size=32, missing=missing)
    assert [loop.columns[0] for loop in moving_faces(unchanged, held)] == ["source, neutral"] * 2


def test_short_clips_are_not_shown():
    assert moving_faces(unchanged, SyntheticFaces(2, emotions=EMOTIONS, frames_per_clip=11, size=32)) == []


def test_a_truth_of_another_shape_is_refused():
    frames = torch.zeros(2, 3, 3, 8, 8)
    with pytest.raises(ValueError, match=r"truth: takes \(2, 2, 3, 8, 8\), got \(2, 3, 3, 8, 8\)"):
        MovingFaces("clip", ["source", "happy", "sad"], frames, 25.0, frames)
