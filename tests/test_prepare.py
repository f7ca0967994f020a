"""Raw data sets become folders of faces: whatever their layout, with the right labels, in step, and never twice."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pcmecl_fast.commands import run_command
from pcmecl_fast.data import cutting
from pcmecl_fast.data import faces as faces_module
from pcmecl_fast.data.faces import Face
from pcmecl_fast.data.folder import FolderFaces
from pcmecl_fast.data.index import INDEX, read_index
from pcmecl_fast.data.splits import split
from pcmecl_fast.data.tracks import Crop, Track
from pcmecl_fast.data.video import open_video
from pcmecl_fast.models import load_generator
from tests.raw_trees import TREES, click_offset, face_place, mead_tree, write_sound, write_video
from tests.test_folder import picture

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Raw trees and what was prepared of them, each made once: name -> (tree, folder)."""
    made = {}

    def get(name):
        if name not in made:
            tree = TREES[name](tmp_path_factory.mktemp(name))
            out = tmp_path_factory.mktemp("prepared") / name
            assert prepare(tree.root, out, "--skip-broken") == 0
            made[name] = tree, out
        return made[name]

    return get


def prepare(root, out, *options):
    words = ["prepare", "--data", str(root), "--out", str(out), "--crop", "centre", "--size", "64", *options]
    return run_command(words)


def entries_of(folder):
    return list(read_index(folder / INDEX)[1])


def content(folder):
    """Every file of a folder but the lock."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    }


def preparable(tree):
    """The clips whose files that are needed are whole: sound beside a video that has its own is not."""
    apart = tree.layout == "mead"
    return [c for c in tree.clips if not {*c.sources, *([c.sound] if apart else [])} & {*tree.broken}]


# Every layout


@pytest.mark.parametrize("name", TREES)
def test_a_raw_tree_is_prepared_with_its_labels(trees, name):
    tree, out = trees(name)
    entries = entries_of(out)
    whole = [entry for entry in entries if not entry.broken]
    names = [(e.individual, e.emotion, Path(e.file).stem) for e in whole]
    clips = preparable(tree)
    assert names == [(clip.individual, clip.emotion, clip.name) for clip in clips]
    for entry, clip in zip(whole, clips, strict=True):
        told = ("level", "view", "sentence", "repetition", "number")
        assert [getattr(entry, word) for word in told] == [getattr(clip, word) for word in told]
        assert entry.source == clip.sources[0].relative_to(tree.root).as_posix()
        assert entry.frames == (1 if clip.is_picture else len(clip.sources) if len(clip.sources) > 1 else tree.frames)
        assert (out / entry.file).is_file()
    assert len(entries) == len(tree.clips)


@pytest.mark.parametrize("name", TREES)
def test_the_report_names_what_is_broken_and_what_is_unknown(trees, name):
    tree, out = trees(name)
    page = (out / "report.html").read_text()
    needed = [path for path in tree.broken if path.suffix != ".wav"]
    for path in (*needed, *tree.unknown):
        assert str(path) in page
    shown = {(clip.individual, clip.emotion) for clip in preparable(tree)}
    assert page.count("data:image/webp") == len(shown)


@pytest.mark.parametrize("name", ["mead", "ravdess", "crema-d", "folder"])
def test_sound_stays_in_step_with_the_pictures(trees, name):
    tree, out = trees(name)
    heard = 0
    for entry in entries_of(out):
        named = (c for c in preparable(tree) if entry.file == f"{c.individual}/{c.emotion}/{c.name}.mp4")
        clip = next(named, None)
        if entry.broken or clip is None or len(clip.sources) > 1 or (name == "mead" and clip.sound is None):
            continue
        assert abs(click_offset(out / entry.file)) < 1 / float(tree.rate)
        heard += 1
    assert heard >= 2


@pytest.mark.parametrize("name", TREES)
def test_prompts_and_train_run_on_a_prepared_tree(trees, name, tmp_path, capfd, no_report):
    _, out = trees(name)
    common = ["--data", str(out), "--size", "32", "--split", "frame"]
    assert run_command(["prompts", *common, "--steps", "2", "--out", str(tmp_path / "p")]) == 0
    words = ["train", *common, "--prompts", str(tmp_path / "p"), "--steps", "2", "--batch", "4"]
    assert run_command([*words, "--out", str(tmp_path / "t"), "--workers", "2"]) == 0, capfd.readouterr().err
    assert (tmp_path / "t/generator.safetensors").is_file()


def test_what_was_prepared_is_the_picture_as_it_was(trees):
    tree, out = trees("folder")
    clip = next(c for c in tree.whole if c.is_picture)
    raw = Image.open(clip.sources[0])
    square = raw.crop((20, 0, 140, 120)).resize((64, 64), Image.Resampling.BICUBIC)
    made = Image.open(out / clip.individual / clip.emotion / f"{clip.name}.png")
    assert np.abs(np.asarray(square, int) - np.asarray(made, int)).mean() < 1


# Faces


class Pasted:
    """A detector that knows where the test pasted the face of the frame it is shown: by a white dot, or nowhere."""

    calls = 0

    def __call__(self, picture):
        white = np.argwhere((picture > 250).all(-1))
        if not len(white):
            return []
        top, left = white.min(0)
        return [Face((float(left), float(top), left + 40.0, top + 40.0), 1.0, None)]


@pytest.fixture
def pasted(monkeypatch):
    monkeypatch.setitem(faces_module.DETECTORS, "pasted", Pasted)


def dotted(path, frames, *, at=lambda t: (30 + t, 20), blank=()):
    """A video in which a white dot of 8 × 8 pixels moves."""
    scenes = np.full((frames, 120, 160, 3), 60, np.uint8)
    for t in range(frames):
        if t not in blank:
            x, y = at(t)
            scenes[t, y : y + 8, x : x + 8] = 255
    return write_video(path, scenes, Fraction(25))


def test_faces_are_followed_and_their_track_is_kept(tmp_path, pasted):
    dotted(tmp_path / "raw/ann/happy/a.mp4", 40)
    dotted(tmp_path / "raw/ann/sad/a.mp4", 40)
    words = ["--crop", "faces", "--detector", "pasted", "--margin", "0"]
    assert prepare(tmp_path / "raw", tmp_path / "faces", *words) == 0
    entry = entries_of(tmp_path / "faces")[0]
    track = Track.from_json(entry.track)
    assert entry.found == 1
    for t in (0, 17, 39):
        x, y, side, _ = track.square(t)
        assert abs(x - (50 + t)) < 2.5
        assert abs(y - 40) < 1.5
        assert abs(side - 40) < 1
    frames = FolderFaces(tmp_path / "faces", size=64).frames(range(40))
    # The dot stays where it is in the face.
    assert float(frames[:, :, 2:9, 2:9].min()) > 0.6
    assert float(frames[:, :, 20:].max()) < 0


def test_a_generator_knows_how_its_faces_were_cut(tmp_path, pasted, no_report):
    for emotion in ("happy", "sad"):
        for n in range(2):
            dotted(tmp_path / f"raw/ann/{emotion}/{n}.mp4", 10)
    words = ["--crop", "faces", "--detector", "pasted", "--margin", "0.4"]
    assert prepare(tmp_path / "raw", tmp_path / "faces", *words) == 0
    words = ["--data", str(tmp_path / "faces"), "--size", "32", "--steps", "1", "--prompt-steps", "1", "--batch", "2"]
    assert run_command(["train", *words, "--holdout", "0.5", "--out", str(tmp_path / "run")]) == 0
    assert load_generator(tmp_path / "run/generator.safetensors").crop == Crop(margin=0.4)


def test_no_face_is_told_with_the_frames_and_left_out_when_asked(tmp_path, pasted, capsys):
    dotted(tmp_path / "raw/ann/happy/a.mp4", 20)
    dotted(tmp_path / "raw/ann/sad/gone.mp4", 20, blank=range(20))
    words = ["--crop", "faces", "--detector", "pasted"]
    assert prepare(tmp_path / "raw", tmp_path / "faces", *words) == 1
    said = last_line(capsys)
    assert "1 of 2 recordings could not be prepared" in said
    assert "gone.mp4 (no face was found in frames 0 to 19" in said
    assert "--skip-broken" in said
    assert [e.file for e in entries_of(tmp_path / "faces") if not e.broken] == ["ann/happy/a.mp4"]
    assert prepare(tmp_path / "raw", tmp_path / "faces", *words, "--skip-broken") == 0


# Options


def test_clips_may_be_numbered_pictures_with_the_sound_beside_them(trees, tmp_path):
    tree, _ = trees("ravdess")
    words = ["--frames", "png", "--individuals", "Actor_01", "--skip-broken"]
    assert prepare(tree.root, tmp_path / "png", *words) == 0
    entry = next(e for e in entries_of(tmp_path / "png") if not e.broken)
    folder = tmp_path / "png" / entry.file
    names = sorted(p.name for p in folder.iterdir())
    assert names == [*(f"{n:06d}.png" for n in range(tree.frames)), "sound.m4a"]
    assert abs(click_offset(tree.root / entry.source, folder / "sound.m4a")) < 0.5 / float(tree.rate)
    faces = FolderFaces(tmp_path / "png", size=64)
    assert faces.keys[:2] == [f"{entry.file}#0", f"{entry.file}#1"]
    first = np.asarray(Image.open(folder / "000003.png"), np.float32) / 127.5 - 1
    np.testing.assert_allclose(faces.frames([3])[0].permute(1, 2, 0).numpy(), first, atol=1e-6)


@pytest.mark.parametrize(("fps", "frames"), [("25", 41), ("60", 99), ("10", 17)])
def test_frames_are_resampled_in_time(tmp_path, fps, frames):
    dotted(tmp_path / "raw/ann/happy/a.mp4", 41)
    assert prepare(tmp_path / "raw", tmp_path / "faces", "--fps", fps) == 0
    (entry,) = entries_of(tmp_path / "faces")
    assert abs(entry.frames - frames) <= 1
    with open_video(tmp_path / "faces/ann/happy/a.mp4") as reader:
        times = [frame.time for frame in reader]
    assert {round(1 / float(b - a), 3) for a, b in itertools.pairwise(times)} == {float(fps)}
    assert abs(float(times[-1]) - 40 / 25) <= 1 / float(fps)


def test_uneven_times_are_kept(tmp_path):
    times = [0, 1, 3, 4, 8, 9, 10, 15]
    path = tmp_path / "raw/ann/happy/a.mkv"
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * n, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 0
    with open_video(tmp_path / "faces/ann/happy/a.mp4") as reader:
        assert [float(frame.time) for frame in reader] == pytest.approx([t / 25 for t in times], abs=1e-3)
    faces = FolderFaces(tmp_path / "faces", size=64, cache=False)
    grey = (faces.frames([5, 1, 7]).mean(dim=(1, 2, 3)) + 1) * 127.5
    np.testing.assert_allclose(grey.numpy(), [100, 20, 140], atol=3)


def test_a_worker_that_the_system_ends_is_told(tmp_path, monkeypatch, capsys):
    dotted(tmp_path / "raw/ann/happy/a.mp4", 4)
    monkeypatch.setattr("pcmecl_fast.data.cutting.write_clip", lambda *_, **__: os._exit(9))
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 1
    assert "was ended by the system" in last_line(capsys)
    monkeypatch.undo()
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 0


def test_a_file_without_pictures_is_named(tmp_path, capsys):
    write_sound(tmp_path / "raw/ann/happy/a.m4a", np.zeros(4800, np.float32), 48000).rename(
        tmp_path / "raw/ann/happy/a.mp4"
    )
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 1
    assert "a.mp4 (it contains no video)" in last_line(capsys)


def test_filters_take_what_they_name_and_more_can_be_added_later(trees, tmp_path):
    tree, _ = trees("mead")
    out = tmp_path / "faces"
    words = ["--skip-broken", "--views", "front", "--emotions"]
    assert prepare(tree.root, out, *words, "neutral", "--individuals", "M003") == 0
    assert {(e.individual, e.emotion, e.view) for e in entries_of(out)} == {("M003", "neutral", "front")}
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.mp4")}
    assert prepare(tree.root, out, *words, "neutral", "happy") == 0
    assert {e.emotion for e in entries_of(out)} == {"neutral", "happy"}
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps  # nothing is written twice


def test_sound_can_be_dropped_or_needed(trees, tmp_path, capsys):
    tree, _ = trees("mead")
    words = ["--individuals", "W009", "--emotions", "neutral"]
    assert prepare(tree.root, tmp_path / "need", *words, "--sound", "need") == 1
    assert "002.mp4 (no sound, in it or beside it)" in last_line(capsys)
    assert prepare(tree.root, tmp_path / "drop", *words, "--sound", "drop") == 0
    with pytest.raises(ValueError, match="no sound"):
        click_offset(tmp_path / "drop/W009/neutral/front-level_1-001.mp4")


def test_meads_own_split_holds_out_its_last_clips(tmp_path):
    tree = mead_tree(tmp_path / "raw", frames=12)
    video = next(c for c in tree.whole if c.emotion == "neutral").sources[0]
    for emotion, number in (("neutral", 30), ("neutral", 31), ("happy", 24), ("happy", 25)):
        level = "level_1" if emotion == "neutral" else "level_3"
        shutil.copy(video, tree.root / f"M003/video/front/{emotion}/{level}/{number:03d}.mp4")
    assert prepare(tree.root, tmp_path / "faces", "--skip-broken", "--sound", "drop") == 0
    faces = FolderFaces(tmp_path / "faces", size=32)
    train, held = split(faces, by="mead")
    assert {key.partition("#")[0] for key in held.keys} == {
        "M003/neutral/front-level_1-031.mp4",
        "M003/happy/front-level_3-025.mp4",
    }
    assert len(train) + len(held) == len(faces)


# Going on


def test_prepared_again_nothing_is_done(trees, tmp_path):
    tree, out = trees("ravdess")
    shutil.copytree(out, tmp_path / "faces")
    before = content(tmp_path / "faces")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "faces").rglob("*.mp4")}
    assert prepare(tree.root, tmp_path / "faces", "--skip-broken") == 0
    assert content(tmp_path / "faces") == before
    assert {p: p.stat().st_mtime_ns for p in times} == times


def test_what_is_missing_is_made_again_byte_for_byte(trees, tmp_path):
    tree, out = trees("ravdess")
    shutil.copytree(out, tmp_path / "faces")
    index = tmp_path / "faces" / INDEX
    lines = index.read_text().splitlines(keepends=True)
    # As a kill leaves it: a clip that is not in the index yet, one that never was, and a line that was cut.
    index.write_text(lines[0].replace(', "finished": true', "") + "".join(lines[3:6]) + lines[6][:40])
    next((tmp_path / "faces").rglob("*speech*.mp4")).unlink()
    assert prepare(tree.root, tmp_path / "faces", "--skip-broken") == 0
    assert content(tmp_path / "faces") == content(out)


def test_a_folder_that_is_still_being_prepared_says_so(trees, tmp_path, caplog):
    _, out = trees("ravdess")
    shutil.copytree(out, tmp_path / "faces")
    index = tmp_path / "faces" / INDEX
    index.write_text(index.read_text().replace(', "finished": true', ""))
    FolderFaces(tmp_path / "faces", size=32)
    assert "not all of it has been prepared yet" in caplog.text


def test_a_recording_that_has_changed_is_named_and_prepared_again_when_asked(tmp_path, capsys):
    path = dotted(tmp_path / "raw/ann/happy/a.mp4", 10)
    dotted(tmp_path / "raw/ann/sad/a.mp4", 10)
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 0
    before = content(tmp_path / "faces")
    dotted(path, 20)
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 1
    assert re.search(r"happy/a\.mp4 changed since it was prepared; --overwrite", last_line(capsys))
    assert content(tmp_path / "faces") == before
    assert prepare(tmp_path / "raw", tmp_path / "faces", "--overwrite") == 0
    assert [e.frames for e in entries_of(tmp_path / "faces")] == [20, 10]


def test_other_options_are_refused_and_prepare_everything_again_when_asked(tmp_path, capsys):
    dotted(tmp_path / "raw/ann/happy/a.mp4", 10)
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 0
    assert prepare(tmp_path / "raw", tmp_path / "faces", "--fps", "10", "--frames", "png") == 1
    assert "was prepared with other options: --fps was None, is 10.0" in last_line(capsys)
    assert prepare(tmp_path / "raw", tmp_path / "faces", "--fps", "10", "--frames", "png", "--overwrite") == 0
    assert not list((tmp_path / "faces").rglob("*.mp4"))
    assert (tmp_path / "faces/ann/happy/a/000000.png").is_file()


def test_a_prepared_clip_that_changes_is_refused_by_the_data_set(tmp_path):
    dotted(tmp_path / "raw/ann/happy/a.mp4", 10)
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 0
    clip = tmp_path / "faces/ann/happy/a.mp4"
    faces = FolderFaces(tmp_path / "faces", size=32)
    os.utime(clip, ns=(0, 1))  # as a copy has another time: its content counts
    assert faces.frames([0]).shape == (1, 3, 32, 32)
    changed = bytearray(clip.read_bytes())
    changed[-3] ^= 1
    clip.write_bytes(changed)
    with pytest.raises(ValueError, match=r"a\.mp4: changed since it was prepared"):
        FolderFaces(tmp_path / "faces", size=32).frames([1])


# What names may be


def test_a_clip_is_what_it_is_whatever_its_name(tmp_path):
    """Names with dots, and those that look like files of another kind, in both forms."""
    raw = tmp_path / "raw/ann/happy"
    for name in ("a.mp4.mp4", "take.v1.mp4"):
        dotted(raw / name, 6)
    for name in ("pictures.png", "frames.jpg"):
        for n in range(3):
            picture(raw / name / f"{n}.png", size=(64, 64), seed=n)
    picture(raw / "face.v2.jpg", size=(64, 64))
    dotted(tmp_path / "raw/ann/sad/plain.mp4", 6)
    for form in ("mp4", "png"):
        out = tmp_path / form
        assert prepare(tmp_path / "raw", out, "--frames", form) == 0
        before = content(out)
        assert prepare(tmp_path / "raw", out, "--frames", form) == 0
        assert content(out) == before
        entries = entries_of(out)
        assert sorted(e.frames for e in entries) == [1, 3, 3, 6, 6, 6]
        assert not [e for e in entries if e.broken]
        faces = FolderFaces(out, size=32, cache=False)
        assert len(faces) == len(set(faces.keys)) == 25
        assert faces.frames(range(25)).shape == (25, 3, 32, 32)


def test_two_recordings_never_become_one_clip(tmp_path, capsys):
    raw = tmp_path / "raw/ann/happy"
    picture(raw / "x.jpg", size=(64, 64))
    for n in range(3):
        picture(raw / "x.png" / f"{n}.png", size=(64, 64))
    assert prepare(tmp_path / "raw", tmp_path / "faces", "--frames", "png") == 1
    assert "would both become ann/happy/x.png; rename one of them" in last_line(capsys)
    assert prepare(tmp_path / "raw", tmp_path / "videos") == 0


def test_nothing_is_written_or_removed_outside_the_folder(tmp_path, capsys):
    tree = TREES["ned"](tmp_path / "raw")
    info = tree.root / "Tom/videos/_frame_info.txt"
    info.write_text(info.read_text() + "happy_/../../../../evil_0 0\n")
    assert prepare(tree.root, tmp_path / "faces", "--skip-broken") == 0
    assert not list(tmp_path.rglob("evil*"))
    (tmp_path / "victim.txt").write_text("mine")
    index = tmp_path / "faces" / INDEX
    index.write_text(index.read_text() + '{"file":"../victim.txt","individual":"a","emotion":"sad","frames":1}\n')
    assert prepare(tree.root, tmp_path / "faces", "--skip-broken", "--overwrite", "--fps", "10") == 1
    assert "that is not in the folder" in last_line(capsys)
    assert (tmp_path / "victim.txt").read_text() == "mine"


def test_one_bad_file_stops_nothing_else(tmp_path):
    dotted(tmp_path / "raw/ann/happy/a.mp4", 6)
    (tmp_path / "raw/ann/happy/gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    dotted(tmp_path / f"raw/ann/happy/{'長' * 80}.mp4", 6)
    assert prepare(tmp_path / "raw", tmp_path / "faces", "--skip-broken") == 0
    assert [bool(e.broken) for e in entries_of(tmp_path / "faces")].count(True) == 1


# Whose files they are


def test_a_file_that_somebody_put_there_is_not_written_over(tmp_path, capsys):
    dotted(tmp_path / "raw/ann/happy/a.mp4", 6)
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 0
    dotted(tmp_path / "raw/ann/happy/b.mp4", 6)
    own = dotted(tmp_path / "faces/ann/happy/b.mp4", 3).read_bytes()
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 1
    assert "b.mp4 is there, and is not what becomes of ann/happy/b.mp4; move it away" in last_line(capsys)
    assert (tmp_path / "faces/ann/happy/b.mp4").read_bytes() == own
    assert [p.name for p in (tmp_path / "faces/ann/happy").iterdir() if p.name.startswith(".")] == []


def test_what_was_broken_is_tried_again_when_asked(tmp_path, monkeypatch):
    dotted(tmp_path / "raw/ann/happy/a.mp4", 6)
    with monkeypatch.context() as patch:
        patch.setattr("pcmecl_fast.data.cutting.has_sound", failing(ValueError))
        assert prepare(tmp_path / "raw", tmp_path / "faces", "--skip-broken") == 0
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 1
    assert prepare(tmp_path / "raw", tmp_path / "faces", "--overwrite") == 0


def failing(kind):
    def fail(path):
        raise kind(f"{path} (for a while)")

    return fail


def test_an_error_that_is_not_the_recordings_stops_and_marks_nothing(tmp_path, monkeypatch, capsys):
    dotted(tmp_path / "raw/ann/happy/a.mp4", 6)
    with monkeypatch.context() as patch:
        patch.setattr("pcmecl_fast.data.cutting.scan", lambda path: [][0])
        assert prepare(tmp_path / "raw", tmp_path / "faces", "--skip-broken") == 1
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 0


def test_recordings_that_are_gone_are_told_and_removed_when_asked(tmp_path, caplog):
    dotted(tmp_path / "raw/ann/happy/a.mp4", 6)
    dotted(tmp_path / "raw/ann/happy/z.mp4", 6)
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 0
    (tmp_path / "raw/ann/happy/a.mp4").rename(tmp_path / "raw/ann/happy/b.mp4")
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 0
    assert "the recordings of ann/happy/a.mp4 is no longer in --data" in caplog.text
    assert prepare(tmp_path / "raw", tmp_path / "faces", "--overwrite") == 0
    assert [e.file for e in entries_of(tmp_path / "faces")] == ["ann/happy/b.mp4", "ann/happy/z.mp4"]
    assert not (tmp_path / "faces/ann/happy/a.mp4").exists()


def test_clips_that_somebody_named_are_left_out(tmp_path, caplog):
    for n in range(3):
        dotted(tmp_path / f"raw/ann/happy/{n}.mp4", 6)
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 0
    (tmp_path / "faces/left_out.txt").write_text("ann/happy/1.mp4\nann/happy/9.mp4\n")
    faces = FolderFaces(tmp_path / "faces", size=32)
    assert faces.clips().names == ["ann/happy/0.mp4", "ann/happy/2.mp4"]
    assert "ann/happy/9.mp4" in caplog.text


def test_a_damaged_clip_is_shown_as_such_and_made_again_once_it_is_removed(tmp_path, caplog):
    dotted(tmp_path / "raw/ann/happy/a.mp4", 6)
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 0
    before = content(tmp_path / "faces")
    clip = tmp_path / "faces/ann/happy/a.mp4"
    clip.write_bytes(bytes(clip.stat().st_size))
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 0
    assert "a.mp4" in caplog.text
    assert "damaged" in (tmp_path / "faces/report.html").read_text()
    clip.unlink()
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 0
    assert content(tmp_path / "faces") == before


@pytest.mark.parametrize(("fps", "rate"), [(29.97, "30000/1001"), (23.976, "24000/1001"), (25, "25"), (12.5, "25/2")])
def test_rates_are_the_usual_fractions(fps, rate):
    assert str(cutting._exact(fps)) == rate


# Bad input


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_folder_that_holds_something_else_is_not_touched(tmp_path, capsys):
    dotted(tmp_path / "raw/ann/happy/a.mp4", 4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    assert prepare(tmp_path / "raw", tmp_path / "mine") == 1
    assert "holds notes.txt, not made by `pcmecl-fast prepare`" in last_line(capsys)
    assert os.listdir(tmp_path / "mine") == ["notes.txt"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layout", "meed"], "did you mean mead?"),
        (["--emotions", "hapy"], "--emotions: no clip has 'hapy'; did you mean happy?"),
        (["--detector", "mtcnn", "--crop", "faces"], "--detector: got 'mtcnn'; takes one of dlib"),
        (["--margin", "1"], "--margin: takes 0 to 0.9, got 1"),
        (["--every", "0"], "--every: takes 1 or more, got 0"),
        (["--size", "65"], "--size: takes an even number, as videos do, got 65; --frames png takes any"),
        (["--individuals", "bob"], "--individuals: no clip has 'bob'"),
        (["--levels", "3"], "--levels: no clip has '3'; these clips have no levels"),
    ],
)
def test_bad_options_are_named_before_anything_is_written(tmp_path, capsys, words, said):
    dotted(tmp_path / "raw/ann/happy/a.mp4", 4)
    assert prepare(tmp_path / "raw", tmp_path / "faces", *words) == 1
    assert said in last_line(capsys)
    assert not (tmp_path / "faces" / INDEX).exists()


def test_a_folder_without_a_layout_is_told_what_each_expects(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/x.mp4").write_bytes(b"x")
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 1
    said = last_line(capsys)
    assert "has no layout known here" in said
    assert "mead expects" in said


def test_the_output_may_not_lie_in_the_raw_folder(tmp_path, capsys):
    dotted(tmp_path / "raw/ann/happy/a.mp4", 4)
    assert prepare(tmp_path / "raw", tmp_path / "raw/faces") == 1
    assert "lies in --data" in last_line(capsys)


def test_a_full_disk_leaves_a_valid_index(tmp_path, capsys, monkeypatch):
    for n in range(3):
        dotted(tmp_path / f"raw/ann/happy/{n}.mp4", 10)
    monkeypatch.setattr("pcmecl_fast.data.cutting.write_clip", full_after(1))
    assert prepare(tmp_path / "raw", tmp_path / "faces", "--workers", "1") == 1
    assert "No space left on device" in last_line(capsys)
    assert [e.file for e in entries_of(tmp_path / "faces")] == ["ann/happy/0.mp4"]
    monkeypatch.undo()
    assert prepare(tmp_path / "raw", tmp_path / "faces") == 0
    assert len(entries_of(tmp_path / "faces")) == 3


def full_after(clips):
    from pcmecl_fast.data.video import write_clip

    left = [clips]

    def write(path, *arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device", str(path))
        write_clip(path, *arguments, **options)

    return write


def test_an_index_is_json_that_others_can_read(trees):
    _, out = trees("mead")
    head, *lines = (out / INDEX).read_text().splitlines()
    assert json.loads(head)["prepared"]["layout"] == "mead"
    assert {"file", "individual", "emotion", "frames", "checksum", "source"} <= json.loads(lines[0]).keys()


def test_faces_are_where_the_tree_says(trees):
    """The trees' faces are near the middle, so that the centred square holds them."""
    left, top, side = face_place(0, (160, 120))
    assert left >= 20
    assert left + side <= 140
    assert top + side <= 120


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and SIGKILL")
def test_killed_at_random_moments_it_ends_as_if_nothing_had_been():
    """A few kills of `tests/kill_prepare.py`, in a process of its own: a fork of this one has its threads."""
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.kill_prepare", "--kills", "4"]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert "4 kills, 0 problems" in result.stdout, result.stdout + result.stderr
