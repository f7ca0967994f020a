"""Pictures and videos are read as square frames and written back as they were."""

import importlib.util
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from pcmecl_fast.data import media
from pcmecl_fast.data.media import read_frames, write_frames
from pcmecl_fast.synthetic import SyntheticFaces

needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV is not installed")


@pytest.fixture(scope="module")
def faces():
    """Nine frames that differ, (9, 3, 64, 64)."""
    return SyntheticFaces(9, emotions=["happy"], clips=1, frames_per_clip=1).frames(range(9))


def test_a_png_round_trips_to_half_a_grey_level(tmp_path, faces):
    write_frames(tmp_path / "face.png", faces[:1], None)
    rate, frames = read_frames(tmp_path / "face.png", 64)
    assert rate is None
    assert frames.dtype == torch.float32
    torch.testing.assert_close(frames, faces[:1], rtol=0, atol=0.5 / 127.5 + 1e-6)
    # What has been rounded once is not rounded again.
    write_frames(tmp_path / "again.png", frames, None)
    assert torch.equal(read_frames(tmp_path / "again.png", 64)[1], frames)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp", ".JPG", ".Png"])
def test_other_pictures_round_trip_approximately(tmp_path, faces, suffix):
    path = tmp_path / f"face{suffix}"
    write_frames(path, faces[:1], None)
    rate, frames = read_frames(path, 64)
    assert rate is None
    assert frames.shape == (1, 3, 64, 64)
    assert (frames - faces[:1]).abs().mean() < 0.04


def test_the_suffix_names_the_format(tmp_path, faces):
    for suffix, name in ((".png", "PNG"), (".jpg", "JPEG"), (".jpeg", "JPEG"), (".webp", "WEBP")):
        write_frames(tmp_path / f"face{suffix}", faces[:1], None)
        with Image.open(tmp_path / f"face{suffix}") as image:
            assert image.format == name


@needs_av
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".avi", ".mkv", ".webm"])
def test_a_video_round_trips_with_its_frames_and_rate(tmp_path, faces, suffix):
    path = tmp_path / f"clip{suffix}"
    write_frames(path, faces, Fraction(10))
    rate, frames = read_frames(path, 64)
    assert rate == 10
    assert frames.shape == faces.shape
    assert (frames - faces).abs().mean() < 0.06
    # In order: each is nearest to its original.
    distance = (frames[:, None] - faces[None]).abs().mean((2, 3, 4))
    assert distance.argmin(1).tolist() == list(range(9))


@needs_av
def test_odd_rates_survive(tmp_path, faces):
    write_frames(tmp_path / "clip.mp4", faces, Fraction(30000, 1001))
    assert read_frames(tmp_path / "clip.mp4", 64)[0] == Fraction(30000, 1001)


@needs_av
def test_a_read_video_is_resized(tmp_path, faces):
    write_frames(tmp_path / "clip.mp4", faces, Fraction(10))
    assert read_frames(tmp_path / "clip.mp4", 24)[1].shape == (9, 3, 24, 24)


def test_the_centred_square_of_a_wide_picture_is_read(tmp_path):
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert read_frames(tmp_path / "wide.png", 10)[1].eq(1).all()


def test_colours_out_of_range_are_clamped(tmp_path):
    write_frames(tmp_path / "a.png", torch.stack([torch.full((3, 4, 4), x) for x in (3.0,)]), None)
    assert read_frames(tmp_path / "a.png", 4)[1].eq(1).all()


def test_folders_are_made_and_nothing_else_is_left_in_them(tmp_path, faces):
    write_frames(tmp_path / "new" / "face.png", faces[:1], None)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["face.png"]


def test_a_failed_write_leaves_the_old_picture(tmp_path, faces, monkeypatch):
    path = tmp_path / "face.png"
    write_frames(path, faces[:1], None)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_frames(path, faces[1:2], None)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# Bad input


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"input: there is no file .*face.png"):
        read_frames(tmp_path / "face.png", 8)


def test_a_file_that_is_not_a_picture_is_named_with_the_supported_formats(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"input: .*notes.txt is not a picture or video; takes .3gp, .avi, .bmp"):
        read_frames(tmp_path / "notes.txt", 8)


@pytest.mark.parametrize("name", ["face.png", "face.jpg", pytest.param("clip.mp4", marks=needs_av)])
def test_a_truncated_file_is_named(tmp_path, faces, name):
    path = tmp_path / name
    write_frames(path, faces[:1] if name.startswith("face") else faces, None if "face" in name else Fraction(10))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=name):
        read_frames(path, 16)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name} is empty"):
        read_frames(path, 16)


def test_a_video_without_pyav_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"frames")
    monkeypatch.setattr(media.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'clip.mp4.*pip install "pcmecl_fast\[video\]"'):
        read_frames(tmp_path / "clip.mp4", 8)
