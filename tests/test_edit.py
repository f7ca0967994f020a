"""`edit` on pictures and videos of any size: faces are found, edited where they are, and everything else stays."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from moving_discs import Discs, samples, scene, sound_packets, write_scene, write_tone
from PIL import Image

from pcmecl_fast.data import faces as faces_module
from pcmecl_fast.data.canvas import LAYOUTS, Box, FrameCanvas, PictureCanvas, planes
from pcmecl_fast.data.video import Frame, Look, colours_of, open_video, scan, write_clip
from pcmecl_fast.edit import run_edit
from pcmecl_fast.edit_faces import FaceEditor, Planned, Schedule, calmed, feather, lay, take
from pcmecl_fast.edit_media import FaceFinder
from pcmecl_fast.models import Generator, load_generator, make_generator
from pcmecl_fast.models.base import Edit, save_generator
from pcmecl_fast.train.config import EditConfig

needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV is not installed")
EMOTIONS = ["neutral", "happy", "sad"]
TIMES = [k * 1001 for k in range(24)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run whose generator changes faces visibly."""
    torch.manual_seed(0)
    generator = make_generator("warp-fields", EMOTIONS, 32, {"fields": 4, "hidden": 16})
    with torch.no_grad():
        generator.flow *= 2000
        generator.shade *= 2000
    folder = tmp_path_factory.mktemp("runs") / "run"
    save_generator(folder / "generator.safetensors", generator)
    return folder


@pytest.fixture(autouse=True)
def _discs(monkeypatch):
    monkeypatch.setitem(faces_module.DETECTORS, "discs", Discs)


@pytest.fixture
def config(run, tmp_path):
    return EditConfig(
        tmp_path / "talk.mp4", "happy", run=run, out=tmp_path / "out", detector="discs", device="cpu", crf=8, smooth=0
    )


def edited(config, **options):
    """Run `edit`, and the one file that it wrote."""
    run_edit(dataclasses.replace(config, **options))
    (path,) = (path for path in config.out.rglob("*") if path.is_file() and "compare" not in path.name)
    return path


def frames_of(path):
    with open_video(path) as reader:
        return [frame.rgb().astype(int) for frame in reader]


def changed(before, after, *, by=12):  # of (H, W, 3): (H, W) bool
    return np.abs(before - after).max(2) > by


# What stays


@needs_av
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_size_times_rate_colours_rotation_and_pixels_shape_stay(config, tmp_path, suffix):
    uneven = [0, 1001, 2002, 3600, 4004, 6006, 6100, 9009]
    matrix = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    look = Look(120, 200, matrix=9, primaries=9, transfer=14, aspect=Fraction(4, 3), display=matrix)
    source = write_scene(tmp_path / f"talk{suffix}", uneven, look=look, turns=3)
    path = edited(config, input=source)
    assert path.name == f"talk.happy{suffix}"
    with open_video(source) as before, open_video(path) as after:
        for name in ("width", "height", "rotation", "display", "rate"):
            assert getattr(after, name) == getattr(before, name), name
        assert after.rotation
        assert after.stream.sample_aspect_ratio == Fraction(4, 3)
        assert colours_of(after.first) == (9, False)
        context = after.stream.codec_context
        assert (context.color_primaries, context.color_trc) == (9, 14)
        assert [frame.time for frame in after] == [frame.time for frame in before]
    shown = changed(frames_of(source)[3], frames_of(path)[3])
    rows, columns = np.nonzero(shown)
    assert shown.any()  # and at the upright disc
    assert abs(columns.mean() - 0.6 * 200) < 20
    assert abs(rows.mean() - 60) < 20


@needs_av
@pytest.mark.parametrize("name", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le"])
def test_pixels_of_every_kind_stay_of_their_kind(config, tmp_path, name):
    source = write_scene(tmp_path / "talk.mkv", TIMES[:4], look=Look(200, 120, name))
    path = edited(config, input=source)
    with open_video(source) as before, open_video(path) as after:
        assert after.first.format.name == name
        one, other = (planes(reader.first) for reader in (before, after))
        # Far from the disc, beside what encoding changes.
        unit = 2 ** (LAYOUTS[name].bits - 8)
        assert np.abs(one[0][:, :50].astype(int) - other[0][:, :50]).max() <= 6 * unit
    assert changed(frames_of(source)[1], frames_of(path)[1]).sum() > 100


@needs_av
@pytest.mark.parametrize("name", sorted(LAYOUTS))
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_a_canvas_changes_no_sample_outside_its_box(name, rotation):
    frame = noise(name, 38, 26)
    before = [plane.copy() for plane in planes(frame)]
    canvas = FrameCanvas(frame, rotation)
    box = canvas.aligned(Box(7, 5, 15, 16))
    canvas.add(box, torch.full((3, box.bottom - box.top, box.right - box.left), 0.2))
    width, height = (26, 38) if rotation % 180 else (38, 26)
    mask = np.zeros((height, width), bool)
    mask[box.top : box.bottom, box.left : box.right] = True
    stored = np.rot90(mask, -rotation // 90)
    assert np.array_equal(planes(frame)[0] != before[0], stored)
    for now, then in zip(planes(frame)[1:], before[1:], strict=True):
        assert np.abs(now.astype(int) - then).max() <= 1  # grey changes no chroma
    assert (box.right - box.left) * (box.bottom - box.top) < 150


def noise(name, width, height):
    import av

    frame = av.VideoFrame(width, height, name)
    generator = np.random.default_rng(0)
    for plane in planes(frame):
        plane[:] = generator.integers(60, 180, plane.shape) * 2 ** (LAYOUTS[name].bits - 8)
    frame.colorspace, frame.color_range = 1, 1
    return frame


@needs_av
@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_canvas_has_the_colours_that_the_video_shows_and_takes_changes_of_them(name):
    import av

    smooth = np.stack([*np.meshgrid(np.linspace(60, 190, 64), np.linspace(60, 190, 48)), np.full((48, 64), 120.0)], -1)
    picture = av.VideoFrame.from_ndarray(smooth.astype(np.uint8), format="rgb24")
    frame = picture.reformat(format=name, dst_colorspace=1, dst_color_range=1, src_color_range=2)
    frame.colorspace, frame.color_range = 1, 1
    canvas, box = FrameCanvas(frame), Box(8, 8, 40, 32)
    shown = Frame(0, 0, Fraction(1), frame).rgb()[8:32, 8:40].astype(float)
    colours = (canvas.colours(box) + 1) * 127.5
    assert np.abs(colours.movedim(0, 2).numpy() - shown).max() < 3
    canvas.add(box, torch.tensor([0.2, -0.1, 0.05])[:, None, None].expand(3, 24, 32))
    after = Frame(0, 0, Fraction(1), frame).rgb()[10:30, 10:38].astype(float)
    difference = (after - shown[2:-2, 2:-2]).mean((0, 1))
    np.testing.assert_allclose(difference, [25.5, -12.75, 6.4], atol=1.0)


@needs_av
def test_other_kinds_of_pixels_are_converted_once_and_that_is_said(config, tmp_path, caplog):
    import av

    caplog.set_level("INFO", "pcmecl_fast")
    with av.open(str(tmp_path / "talk.mkv"), "w") as output:
        stream = output.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 200, 121, "bgr0"
        for number in range(3):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(scene(number, 200, 121), format="rgb24")))
        output.mux(stream.encode(None))
    path = edited(config, input=tmp_path / "talk.mkv")
    assert "its pixels are bgr0, which become yuv444p" in caplog.text  # 121 rows cannot be halved
    with open_video(path) as reader:
        assert (reader.width, reader.height, reader.first.format.name) == (200, 121, "yuv444p")
    assert np.abs(frames_of(path)[0][:, :40] - scene(0, 200, 121)[:, :40]).mean() < 3


@needs_av
@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mp4", "aac"), (".mkv", "pcm_s16le"), (".mkv", "flac"), (".mov", "pcm_s16le")]
)
def test_sound_is_copied_packet_by_packet(config, tmp_path, suffix, codec):
    tone = write_tone(tmp_path / "tone.wav", 1.5)
    if codec == "flac":
        tone = write_tone(tmp_path / "tone.flac", 1.5, codec=codec)
    if codec == "aac":
        from test_video import coded

        tone = coded(tmp_path, ".m4a", "aac")
    source = write_scene(tmp_path / f"talk{suffix}", TIMES, sound=tone)
    path = edited(config, input=source)
    assert sound_packets(path) == sound_packets(source)
    assert np.array_equal(samples(path), samples(source))


@needs_av
def test_sound_that_the_output_cannot_hold_is_encoded_and_that_is_said(config, tmp_path, caplog):
    caplog.set_level("INFO", "pcmecl_fast")
    from test_video import coded

    source = write_scene(tmp_path / "talk.mp4", TIMES, sound=coded(tmp_path, ".m4a", "aac"))
    path = edited(config, input=source, format="webm")
    assert path.name == "talk.happy.webm"
    assert "the output cannot hold sound of the kind aac, which becomes libopus" in caplog.text
    with open_video(path) as reader:
        assert reader.stream.codec_context.name == "vp9"
        assert [stream.codec_context.name for stream in reader.container.streams.audio] == ["opus"]
    assert len(scan(path)) == len(TIMES)
    assert samples(path).shape[1] == pytest.approx(2 * 48000, rel=0.03)


@needs_av
def test_uncompressed_sound_becomes_aac_in_mp4_and_that_is_said(config, tmp_path, caplog):
    caplog.set_level("INFO", "pcmecl_fast")
    source = write_scene(tmp_path / "talk.mov", TIMES, sound=write_tone(tmp_path / "tone.wav", 1.0))
    path = edited(config, input=source, format="mp4")
    assert "the output cannot hold sound of the kind pcm_s16le, which becomes aac" in caplog.text
    with open_video(path) as reader:
        assert [stream.codec_context.name for stream in reader.container.streams.audio] == ["aac"]


@needs_av
def test_what_cannot_be_an_output_becomes_mp4(config, tmp_path):
    source = write_scene(tmp_path / "talk.flv", [k * 40 for k in range(8)], time_base=Fraction(1, 1000), codec="flv1")
    path = edited(config, input=source)
    assert path.name == "talk.happy.mp4"
    assert len(scan(path)) == 8


def test_a_picture_is_upright_and_keeps_size_profile_and_transparency(config, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned
    exif[0x010F] = "a camera"
    Image.fromarray(np.rot90(scene(0))).save(tmp_path / "face.jpg", exif=exif, icc_profile=b"a profile", quality=95)
    path = edited(config, input=tmp_path / "face.jpg")
    with Image.open(path) as picture:
        assert picture.size == (200, 120)
        assert picture.info["icc_profile"] == b"a profile"
        assert 0x0112 not in picture.getexif()
        assert picture.getexif()[0x010F] == "a camera"
        shown = changed(scene(0).astype(int), np.asarray(picture).astype(int), by=24)
    assert shown[:, 80:160].sum() > 100
    assert shown[:, :70].sum() == 0
    path.unlink()
    alpha = np.full((120, 200, 1), 255, np.uint8)
    alpha[:10] = 0
    Image.fromarray(np.concatenate([scene(0), alpha], 2)).save(tmp_path / "face.png")
    with Image.open(edited(config, input=tmp_path / "face.png")) as picture:
        assert np.array_equal(np.asarray(picture)[:, :, 3:], alpha)
        assert np.array_equal(np.asarray(picture)[:, :70, :3], scene(0)[:, :70])


# Whose face, and when


@needs_av
@pytest.mark.parametrize(
    ("face", "left", "right"), [("largest", False, True), ("left", True, False), ("all", True, True)]
)
def test_of_several_people_those_asked_for_are_edited(config, tmp_path, face, left, right):
    source = write_scene(tmp_path / "talk.mp4", TIMES, green=True)
    shown = changed(frames_of(source)[10], frames_of(edited(config, input=source, face=face))[10], by=24)
    assert (shown[:, :70].sum() > 30, shown[:, 90:].sum() > 30) == (left, right)


@needs_av
def test_emotions_begin_at_their_times_and_go_over_into_each_other(config, tmp_path):
    source = write_scene(tmp_path / "talk.mp4", [k * 3000 for k in range(30)], rate=Fraction(10))
    path = edited(config, input=source, emotion=None, at="0:01=happy,0:02=neutral")
    assert path.name == "talk.happy-neutral.mp4"
    before, after = frames_of(source), frames_of(path)
    much = [int(changed(a, b).sum()) for a, b in zip(before, after, strict=True)]
    assert max(much[:9]) < 40
    assert min(much[12:]) > 100


def test_a_schedule_says_how_much_of_what_is_shown():
    schedule = Schedule.parse("0:02=happy, 1:07.5=neutral")
    assert schedule.changes == ((2, "happy"), (67.5, "neutral"))
    assert schedule.weights(1.8) == {}
    assert schedule.weights(2) == {"happy": 0.5}
    assert schedule.weights(30) == {"happy": 1}
    assert schedule.weights(67.5) == {"happy": 0.5, "neutral": 0.5}
    assert schedule.weights(70) == {"neutral": 1}
    assert Schedule.always("sad").weights(0) == {"sad": 1}
    assert Schedule.parse("1:00:00=sad").changes == ((3600, "sad"),)


@pytest.mark.parametrize("text", ["happy", "0:02", "2=happy,1=sad", "", "x=happy", "-1=sad"])
def test_a_schedule_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="at: takes times"):
        Schedule.parse(text)


@needs_av
def test_strength_scales_the_edit_and_nothing_at_zero(config, tmp_path):
    source = write_scene(tmp_path / "talk.mp4", TIMES[:6])
    much = []
    for strength in (0, 0.3, 1, 1.5):
        path = edited(config, input=source, strength=strength, overwrite=True)
        much.append(np.abs(frames_of(source)[2] - frames_of(path)[2]).sum())
    assert much == sorted(much)
    assert much[0] < 0.3 * much[1]
    with pytest.raises(ValueError, match=r"--strength: takes 0 to 1.5, got 2"):
        run_edit(dataclasses.replace(config, input=source, strength=2))


# Planning and carrying out


def plan_of(value, square=(0.0, 0.0, 1.0, 0.0)):
    return Planned(square, torch.empty(0), None if value is None else torch.full((1, 1, 1, 1), float(value)))


def test_calmed_plans_are_means_over_the_window_and_frames_stay_in_order():
    frames = [(k / 25, k, {"a": plan_of(k == 10)}) for k in range(20)]
    result = list(calmed(iter(frames), 0.2))
    assert [item for item, _ in result] == list(range(20))
    values = torch.stack([plans["a"].plan.flatten() for _, plans in result]).flatten()
    assert values.sum() == pytest.approx(1, abs=1e-5)
    assert values.nonzero().flatten().tolist() == [8, 9, 10, 11, 12]
    assert values[10] == values.max()
    assert torch.equal(values[8:13], values[8:13].flip(0))
    unchanged = [plans["a"].plan.item() for _, plans in calmed(iter(frames), 0)]
    assert unchanged == [float(k == 10) for k in range(20)]


def test_calmed_looks_ahead_no_further_than_half_of_the_window():
    taken = []

    def frames():
        for k in range(1000):
            taken.append(k)
            yield k / 25, k, {"a": plan_of(1)}

    for item, plans in calmed(frames(), 0.4):
        assert len(taken) - item <= 7
        assert plans["a"].plan.item() == pytest.approx(1)


def test_a_face_that_comes_fades_in():
    frames = [(k / 25, k, {"a": plan_of(1)} if k >= 10 else {}) for k in range(20)]
    values = [plans["a"].plan.item() if plans else 0 for _, plans in calmed(iter(frames), 0.4)]
    assert values[9] == 0
    assert 0 < values[10] < values[12] < 1
    assert values[16:] == pytest.approx([1] * 4)


@pytest.mark.parametrize("angle", [0.0, 0.4, -1.2])
def test_a_square_is_taken_and_laid_back_where_it_was(angle):
    canvas = PictureCanvas(scene(0).copy())
    square = (120.5, 60.5, 41.0, angle)
    face = take(canvas, square)
    assert face.shape == (1, 3, 41, 41)
    middle = (face[0, :, 20, 20] + 1) * 127.5
    np.testing.assert_allclose(middle, scene(0)[60, 120], atol=1)
    change = torch.zeros_like(face)
    change[:, 0, 18:23, 30:35] = -0.5  # to the right of the centre, in the square's own directions
    lay(canvas, square, change)
    rows, columns = np.nonzero(canvas.pixels[:, :, 0] < scene(0)[:, :, 0] - 30.0)
    expected = 120.5 + 12 * math.cos(angle), 60.5 + 12 * math.sin(angle)
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx(expected, abs=0.6)


@pytest.mark.parametrize("square", [(5.0, 60.0, 50.0, 0.0), (195.0, 5.0, 60.0, 0.3), (100.0, 60.0, 260.0, 0.0)])
def test_a_square_may_reach_beyond_the_picture(square):
    canvas = PictureCanvas(scene(0).copy())
    face = take(canvas, square)
    assert face.shape[-1] == square[2]
    assert face.isfinite().all()
    lay(canvas, square, torch.zeros_like(face))
    assert np.array_equal(canvas.pixels, scene(0))


def test_the_border_of_a_square_is_soft():
    mask = feather(100)
    assert mask[50, 50] == 1
    assert mask[0].max() < 0.02
    assert mask.diff(dim=0).abs().max() < 0.25


def test_warp_fields_at_its_own_size_carries_out_what_it_edits(run):
    generator = load_generator(run / "generator.safetensors", "cpu")
    frames, target = torch.rand(2, 3, 32, 32) * 2 - 1, torch.tensor([1, 2])
    torch.testing.assert_close(generator.carry_out(frames, generator.plan(frames, target)), generator(frames, target))


def test_a_large_face_is_moved_at_its_own_resolution(run):
    """Details that the small frames cannot show are as strong after an edit as before."""
    generator = load_generator(run / "generator.safetensors", "cpu")
    x = torch.arange(320)
    stripes = ((x // 2) % 2 * 1.0 - 0.5).expand(1, 3, 320, 320)
    small = F.interpolate(stripes, (32, 32), mode="area")
    edit = generator.carry_out(stripes, generator.plan(small, torch.tensor([1])))
    assert (edit - stripes).abs().mean() > 0.05
    detail = edit.diff(dim=-1).abs().mean() / stripes.diff(dim=-1).abs().mean()
    assert detail > 0.7
    assert F.interpolate(small, (320, 320)).diff(dim=-1).abs().mean() < 0.1 * stripes.diff(dim=-1).abs().mean()


class Painter(Generator):
    """Any other generator: it paints everything brighter."""

    def edit(self, frames, target):
        return Edit((frames + 0.25).clamp(-1, 1), {})


def test_any_other_generators_change_is_added_to_the_large_face():
    generator = Painter(EMOTIONS, 16)
    large = torch.rand(1, 3, 160, 160) - 0.5
    small = F.interpolate(large, (16, 16), mode="area")
    edit = generator.carry_out(large, generator.plan(small, torch.tensor([0])))
    torch.testing.assert_close(edit, large + 0.25)
    torch.testing.assert_close(generator.carry_out(large, torch.zeros(1, 3, 16, 16)), large)


def test_an_editor_leaves_everything_outside_the_square(run):
    editor = FaceEditor(Painter(EMOTIONS, 16), {"sad": torch.tensor([2])}, Schedule.always("sad"))
    canvas = PictureCanvas(scene(0).copy())
    editor.carry_out(canvas, editor.plan(canvas, (120.0, 60.0, 60.0, 0.0), 0.0))
    rows, columns = np.nonzero((canvas.pixels != scene(0)).any(2))
    assert (columns.min() >= 90, columns.max() < 150, rows.min() >= 30, rows.max() < 90) == (True,) * 4
    assert len(rows) > 2000


# Comparisons


@needs_av
def test_a_comparison_shows_source_and_edit_side_by_side_with_sound(config, tmp_path):
    source = write_scene(tmp_path / "talk.mkv", TIMES[:6], sound=write_tone(tmp_path / "tone.wav", 0.2))
    path = edited(config, input=source, compare=True)
    both = frames_of(path.with_name("talk.happy.compare.mkv"))
    assert both[0].shape == (120, 400, 3)
    assert len(both) == 6
    below = slice(40, None)  # the names
    assert np.abs(both[2][below, :200] - frames_of(source)[2][below]).mean() < 4
    assert np.abs(both[2][below, 200:] - frames_of(path)[2][below]).mean() < 4
    assert both[2][:40, :100].max() > 220
    assert sound_packets(path.with_name("talk.happy.compare.mkv")) == sound_packets(source)


def test_pictures_are_compared_too(config, tmp_path):
    Image.fromarray(scene(0)).save(tmp_path / "face.png")
    path = edited(config, input=tmp_path / "face.png", compare=True)
    with Image.open(path.with_name("face.happy.compare.png")) as both:
        assert both.size == (400, 120)


# What cannot be edited


@needs_av
def test_a_video_without_a_face_is_named_with_the_way_out(config, tmp_path):
    source = tmp_path / "wall.mp4"
    write_clip(source, [(k, np.zeros((120, 120, 3), np.uint8)) for k in range(7)], time_base=Fraction(1, 25))
    with pytest.raises(ValueError, match=r"^input: .*wall.mp4: no face is found in any of its 7 frames; --crop centre"):
        run_edit(dataclasses.replace(config, input=source, crop="faces"))
    assert not config.out.exists() or not list(config.out.iterdir())
    assert len(scan(edited(config, input=source, crop="centre"))) == 7


@needs_av
def test_of_a_folder_the_others_are_edited(config, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    good = write_scene(folder / "good.mp4", TIMES[:8])
    (folder / "cut.mp4").write_bytes(good.read_bytes()[:-900])
    (folder / "empty.mp4").write_bytes(b"")
    Image.new("RGB", (100, 100)).save(folder / "wall.png")
    with pytest.raises(ValueError, match=r"3 of 4 files could not be edited: .*cut.mp4 .*empty.mp4 is empty.*wall.png"):
        run_edit(dataclasses.replace(config, input=folder))
    assert [path.name for path in config.out.iterdir()] == ["good.happy.mp4"]


@needs_av
def test_of_a_folder_what_is_missing_is_edited_when_asked(config, tmp_path, caplog):
    for name in ("a", "b"):
        write_scene(tmp_path / f"in/{name}.mp4", TIMES[:6])
    again = dataclasses.replace(config, input=tmp_path / "in")
    run_edit(again)
    (config.out / "a.happy.mp4").unlink()
    kept = (config.out / "b.happy.mp4").stat().st_mtime_ns
    assert run_edit(dataclasses.replace(again, resume=True))["files"] == 1
    assert sorted(path.name for path in config.out.iterdir()) == ["a.happy.mp4", "b.happy.mp4"]
    assert (config.out / "b.happy.mp4").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="give one of them"):
        run_edit(dataclasses.replace(again, resume=True, overwrite=True))


@needs_av
def test_times_after_the_end_are_told(config, tmp_path, caplog):
    write_scene(config.input, TIMES[:6])
    edited(config, emotion=None, at="0:09=happy")
    assert "nothing in it is edited: it ends before the first time in --at" in caplog.text


@needs_av
def test_a_format_that_a_file_cannot_become_is_refused(config):
    write_scene(config.input, TIMES[:6])
    with pytest.raises(ValueError, match=r"--format: .*talk.mp4 becomes mp4, mkv, webm or mov, not png"):
        run_edit(dataclasses.replace(config, format="png"))


@needs_av
def test_a_full_disk_stops_the_command_names_the_output_and_leaves_nothing(config, tmp_path):
    import resource

    source = write_scene(tmp_path / "talk.mp4", TIMES)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        with pytest.raises(OSError, match=r"talk\.happy\.mp4") as caught:
            run_edit(dataclasses.replace(config, input=source))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(config.out / "talk.happy.mp4")
    assert list(config.out.iterdir()) == []


@needs_av
def test_ctrl_c_leaves_nothing_half(config, tmp_path, monkeypatch):
    source = write_scene(tmp_path / "talk.mp4", TIMES)
    carry_out, calls = FaceEditor.carry_out, []

    def stopped(self, *of):
        calls.append(of)
        if len(calls) > 5:
            raise KeyboardInterrupt
        carry_out(self, *of)

    monkeypatch.setattr(FaceEditor, "carry_out", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_edit(dataclasses.replace(config, input=source, compare=True))
    assert list(config.out.iterdir()) == []


def test_options_that_do_not_fit_are_named(config, tmp_path):
    Image.fromarray(scene(0)).save(tmp_path / "face.png")
    config = dataclasses.replace(config, input=tmp_path / "face.png")
    with pytest.raises(ValueError, match="--emotion: takes the emotion to show, or --at"):
        run_edit(dataclasses.replace(config, emotion=None))
    with pytest.raises(ValueError, match="at: this generator knows neutral, happy, sad, got 'bored'"):
        run_edit(dataclasses.replace(config, emotion=None, at="0=bored"))
    with pytest.raises(ValueError, match=r"detector: got 'disks'; takes one of .*discs"):
        run_edit(dataclasses.replace(config, detector="disks"))
    with pytest.raises(ValueError, match="--every: takes 1 or more, got 0"):
        run_edit(dataclasses.replace(config, every=0))
    with pytest.raises(ValueError, match="--smooth: takes 0 to 1, got 3"):
        run_edit(dataclasses.replace(config, smooth=3))


def test_two_inputs_never_become_one_output(config, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("face.png", "face.jpg"):
        Image.fromarray(scene(0)).save(folder / name)
    with pytest.raises(ValueError, match=r"--format: several inputs would become .*face.happy.png"):
        run_edit(dataclasses.replace(config, input=folder, format="png"))
    run_edit(dataclasses.replace(config, input=folder))
    assert sorted(path.name for path in config.out.iterdir()) == ["face.happy.jpg", "face.happy.png"]


# Faces that no detector finds


def test_pictures_too_small_for_a_detector_are_faces_already(tmp_path):
    finder = FaceFinder()
    assert finder.tracker(tmp_path / "face.png", 64, 64) is None
    assert FaceFinder("faces", detector="discs").tracker(tmp_path / "face.png", 64, 64) is not None


def test_without_a_detector_square_pictures_are_faces_and_others_say_what_to_install(tmp_path, monkeypatch, caplog):
    def missing():
        raise ImportError('dlib is not installed: pip install "pcmecl_fast[faces]"')

    caplog.set_level("INFO", "pcmecl_fast")
    monkeypatch.setitem(faces_module.DETECTORS, "discs", missing)
    finder = FaceFinder(detector="discs")
    for _ in range(3):
        assert finder.tracker(tmp_path / "clip.mp4", 256, 256) is None
    assert caplog.text.count("is taken for a face as it is") == 1
    with pytest.raises(ImportError, match=r"pcmecl_fast\[faces\].*--crop centre"):
        finder.tracker(tmp_path / "talk.mp4", 1280, 720)


def test_a_run_on_drawn_faces_takes_the_centred_square_where_none_is_found(tmp_path):
    finder = FaceFinder(detector="discs", drawn=True)
    tracker = finder.tracker(tmp_path / "face.png", 100, 100)
    tracker.look(0, np.zeros((100, 100, 3), np.uint8))
    (track,) = finder.tracks(tmp_path / "face.png", tracker, 1, 100, 100)
    assert track.square(0) == (50, 50, 100, 0)


# A real face


@needs_av
def test_a_real_face_in_a_moving_picture(config, tmp_path):
    """Show 3 at a smaller size: a face found, smiling, and everything else as it was."""
    pytest.importorskip("skimage")
    pytest.importorskip("dlib")
    from bench.edit_video import compare, write_talk

    write_talk(tmp_path / "talk.mp4", seconds=1.5, width=640, height=360, zoom=1.0)
    path = edited(config, input=tmp_path / "talk.mp4", detector="dlib", crf=16, smooth=0.2)
    seen = compare(tmp_path / "talk.mp4", path)
    assert (seen["frames"], seen["same_times"], seen["same_sound"]) == (44, True, True)
    assert seen["psnr_outside"] >= 45
    assert seen["psnr_inside"] < 40
