"""What `measure` reads and looks at: every number as if all were, and nothing that no number is of."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from pcmecl_fast import measure
from pcmecl_fast.evaluate.field import measures, meter, reading
from pcmecl_fast.evaluate.field.clips import list_clips
from pcmecl_fast.evaluate.field.pixels import psnr, ssim
from tests import measuring
from tests.measuring import colours, noise, numbers, only, run, save, use_plain_networks
from tests.raw_trees import write_video


@pytest.fixture(scope="module")
def portrait():
    return measuring.portrait()


@pytest.fixture
def plain_networks(monkeypatch):
    use_plain_networks(monkeypatch)


def clip_in(root):
    (clip,) = list_clips(root).clips
    return clip


def like(frame, seed):
    """A frame with noise on it."""
    return np.clip(frame + np.random.default_rng(seed).normal(0, 12, frame.shape), 0, 255).astype(np.uint8)


# Pixels


@pytest.mark.parametrize("size", [(6, 9), (40, 57), (64, 48)])
def test_psnr_and_ssim_are_torchmetrics_of_float64(size):
    a = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    for b in (like(a, 1), np.full_like(a, 250), 255 - a):
        x, y = (torch.from_numpy(frame).permute(2, 0, 1)[None].double() for frame in (a, b))
        assert psnr(a, b) == pytest.approx(float(peak_signal_noise_ratio(x, y, data_range=(0.0, 255.0))), rel=1e-6)
        expected = structural_similarity_index_measure(x, y, data_range=255.0)
        assert ssim(a, b) == pytest.approx(float(expected), abs=1e-6)


def test_little_of_ssim_is_lost_to_rounding_where_frames_are_bright_and_even():
    a = np.full((32, 32, 3), 251, np.uint8)
    b = a.copy()
    b[::2] += 1
    x, y = (torch.from_numpy(frame).permute(2, 0, 1)[None].double() for frame in (a, b))
    expected = float(structural_similarity_index_measure(x, y, data_range=255.0))
    assert ssim(a, b) == pytest.approx(expected, abs=1e-4)


# Frames that nothing looks at


@pytest.mark.parametrize("kind", ["video", "pictures"])
def test_frames_that_are_not_wanted_are_none_and_the_others_as_ever(tmp_path, kind):
    if kind == "video":
        pytest.importorskip("av")
        write_video(tmp_path / "ann/happy/001.mp4", noise(1, 9), Fraction(25))
    else:
        save(tmp_path / "ann/happy/001", noise(1, 9))
    clip = clip_in(tmp_path)
    whole = list(reading.frames_of(clip))
    some = list(reading.frames_of(clip, lambda number: number in (2, 7)))
    assert [number for number, frame in enumerate(some) if frame is not None] == [2, 7]
    assert all(np.array_equal(some[number], whole[number]) for number in (2, 7))
    assert np.array_equal(reading.frame_at(clip, 4), whole[4])
    assert reading.frame_at(clip, 9) is None


def test_real_faces_are_read_up_to_the_last_drawn_frame(tmp_path, plain_networks, monkeypatch):
    for root in ("reference", "edited"):
        save(tmp_path / root / "ann/happy/001", noise(1, 120, 12))
    opened = []
    read = reading.read_picture
    monkeypatch.setattr(reading, "read_picture", lambda path: opened.append(path) or read(path))
    monkeypatch.setattr(measure, "write_page", lambda *of: None)  # which shows frames of its own
    run(tmp_path, "csim")
    assert sum("reference" in str(path) for path in opened) == 100
    assert sum("edited" in str(path) for path in opened) == 100


def test_a_recording_that_nothing_is_compared_with_is_not_opened(tmp_path, plain_networks, monkeypatch):
    for root in ("reference", "edited"):
        save(tmp_path / root / "ann/happy/001", noise(1))
    monkeypatch.setattr(meter, "rate_of", lambda clip: pytest.fail("it was opened"))
    assert only(run(tmp_path, "fad"))["fad"].mean.frames is None


def test_drawn_frames_are_described_many_at_a_time(tmp_path, plain_networks, monkeypatch):
    sizes = []

    def network(frames):
        sizes.append(len(frames))
        return colours(frames)

    monkeypatch.setattr(measures, "load_network", lambda name, weights, device: network)
    for root in ("reference", "edited"):
        save(tmp_path / root / "ann/happy/001", noise(1, 400, 8))
    run(tmp_path, "csim")
    assert len(sizes) <= 2 * (100 // 16 + 1)


# Recordings


class CountingDetector:
    """dlib's, which remembers what it was shown."""

    def __init__(self, detector):
        self.detector, self.shown = detector, []

    def __call__(self, picture):
        self.shown.append(picture)
        return self.detector(picture)


@pytest.fixture
def detector(monkeypatch):
    pytest.importorskip("dlib")
    counting = CountingDetector(measures.load_detector("dlib"))
    monkeypatch.setattr(measures, "load_detector", lambda name: counting)
    return counting


def test_a_recordings_faces_are_looked_for_once_for_all_its_edits(tmp_path, portrait, detector):
    save(tmp_path / "reference/ann/neutral/001", [portrait] * 2)
    for emotion in ("happy", "sad", "angry"):
        save(tmp_path / "edited/ann" / emotion / "001", [portrait // 2 + 60] * 2)
    found = only(run(tmp_path, "lmd", every=1))
    assert found["lmd"].mean.clips == 3
    assert sum(np.array_equal(picture, portrait) for picture in detector.shown) == 2


def test_for_the_emotion_alone_no_recordings_face_is_looked_for(tmp_path, portrait, detector, monkeypatch):
    class Happy:
        emotions = ("happy",)

        def __call__(self, frames, faces):
            return torch.ones(len(frames), 1)

    monkeypatch.setattr(measures, "load_network", lambda name, weights, device: Happy())
    save(tmp_path / "reference/ann/happy/001", [portrait])
    save(tmp_path / "edited/ann/happy/001", [portrait // 2 + 60])
    assert only(run(tmp_path, "emotion", every=1))["emotion"].mean.value == 1
    assert not any(np.array_equal(picture, portrait) for picture in detector.shown)


def test_a_recording_damaged_behind_the_edits_end_leaves_only_its_own_measures_out(tmp_path, plain_networks):
    save(tmp_path / "edited/ann/happy/001", noise(2, 3))
    save(tmp_path / "reference/ann/happy/001", noise(1, 4))
    (tmp_path / "reference/ann/happy/001/000003.png").write_bytes(b"torn")
    save(tmp_path / "reference/ann/happy/002", noise(3))
    found = only(run(tmp_path, "ssim", "fad"))
    assert "000003.png" in found["ssim"].left_out["ann/happy/001"]
    assert found["fad"].by_emotion["happy"].frames == (3, 4)


def test_a_recording_damaged_half_way_is_not_called_shorter(tmp_path):
    for root in ("edited", "reference"):
        save(tmp_path / root / "ann/happy/001", noise(2, 40))
    (tmp_path / "reference/ann/happy/001/000020.png").write_bytes(b"torn")
    run(tmp_path, "ssim")
    assert numbers(tmp_path)["notes"] == {}
