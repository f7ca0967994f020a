"""What the names of the field's projects say of a clip, and which clips of two folders belong together."""

from __future__ import annotations

import pytest

from pcmecl_fast.data.index import INDEX, Entry, write_index
from pcmecl_fast.evaluate.field.clips import list_clips
from pcmecl_fast.evaluate.field.pairs import pair_up


def touch(root, *files):
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


# Names


@pytest.mark.parametrize(
    ("file", "labels"),
    [
        ("M003/happy/001.mp4", ("M003", "happy", "001", None, None)),
        ("M003/Happiness/001/000000.png", ("M003", "happy", "001", None, None)),
        ("M003/align_img/happy/001/000000.jpg", ("M003", "happy", "001", None, None)),
        ("M003/neutral/001.happy.mp4", ("M003", "happy", "001", "neutral", None)),
        ("M003/neutral/001.happy-sad.mp4", ("M003", None, "001", "neutral", None)),
        ("talk.happy.mp4", ("", "happy", "talk", None, None)),
        ("talk.mp4", ("", None, "talk", None, None)),
        ("happy/M003/000000.png", ("M003", "happy", "", None, None)),
        ("Tom/happy/faces_aligned/000000.png", ("Tom", "happy", "", None, None)),
        ("Tom/ref_on_Tom_base/faces_aligned/000000.png", ("Tom", None, "", None, "Tom")),
        ("neutral/Tom/ref_on_angry_Actor_06_base/faces_aligned/0.png", ("Tom", "angry", "", "neutral", "Actor_06")),
        ("Tom/Ann_angry/000000.png", ("Tom", "angry", "", None, "Ann")),
        ("M003_ang_3_001.mp4", ("M003", "angry", "3_001", None, None)),
        ("M003#angry#level_1#001.mp4", ("M003", "angry", "level_1_001", None, None)),
        ("Actor_01_neutral_01.mp4", ("Actor_01", "neutral", "01", None, None)),
        ("Tom/neutral_001.mp4", ("Tom", "neutral", "001", None, None)),
    ],
)
def test_names_say_who_shows_what(tmp_path, file, labels):
    touch(tmp_path, file)
    (clip,) = list_clips(tmp_path, {"Actor_06", "Ann", "Tom"}).clips
    assert (clip.individual, clip.emotion, clip.name, clip.was, clip.driver) == labels


def test_numbered_pictures_are_one_clip_and_other_pictures_one_each(tmp_path):
    touch(tmp_path, *(f"ann/happy/walk/{k:06d}.png" for k in range(3)), "ann/happy/a.jpg", "ann/happy/b.jpg")
    clips = list_clips(tmp_path).clips
    assert [(clip.file, len(clip.sources)) for clip in clips] == [
        ("ann/happy/a.jpg", 1),
        ("ann/happy/b.jpg", 1),
        ("ann/happy/walk", 3),
    ]


def test_of_what_ned_keeps_the_aligned_faces_are_taken(tmp_path):
    touch(tmp_path, *(f"Tom/happy/{kind}/000000.png" for kind in ("images", "faces", "faces_aligned", "masks")))
    assert [clip.file for clip in list_clips(tmp_path).clips] == ["Tom/happy/faces_aligned"]


def test_pictures_numbered_over_recordings_are_told_apart_by_neds_list(tmp_path):
    touch(tmp_path, *(f"Tom/ref_on_angry_Ann/faces_aligned/{k:06d}.png" for k in range(5)), "Tom/videos/x")
    lines = [f"neutral_001_{k:06d} {k}" for k in range(3)] + [f"sad_b_{k:06d} {k + 3}" for k in range(2)]
    (tmp_path / "Tom/videos/_frame_info.txt").write_text("\n".join(lines))
    clips = list_clips(tmp_path).clips
    assert [(c.name, c.was, c.emotion, len(c.sources)) for c in clips] == [
        ("001", "neutral", "angry", 3),
        ("b", "sad", "angry", 2),
    ]


def test_a_prepared_folder_is_read_by_its_index(tmp_path):
    touch(tmp_path, "ann/happy/001/000000.png", "ann/happy/001/000001.png")
    good = Entry("ann/happy/001", "Ann Smith", "happy", 2, rate="25")
    write_index(tmp_path / INDEX, [good, Entry("ann/sad/2.mp4", "ann", "sad", 0, broken="2.mp4 is empty")], None)
    listing = list_clips(tmp_path)
    (clip,) = listing.clips
    assert (clip.individual, clip.rate, len(clip.sources)) == ("Ann Smith", 25, 2)
    assert listing.left_out == {"ann/sad/2.mp4": "2.mp4 is empty"}


def test_comparisons_of_edit_are_no_clips(tmp_path):
    touch(tmp_path, "talk.happy.mp4", "talk.happy.compare.mp4")
    listing = list_clips(tmp_path)
    assert [clip.file for clip in listing.clips] == ["talk.happy.mp4"]
    assert list(listing.left_out) == ["talk.happy.compare.mp4"]


# Pairs


def test_an_edit_is_compared_with_its_recording_and_with_real_faces_of_its_emotion(tmp_path):
    touch(tmp_path / "edited", "M003/neutral/001.happy.mp4")
    real = ("M003/neutral/001.mp4", "M003/happy/001.mp4", "M003/happy/002.mp4", "W009/happy/001.mp4")
    touch(tmp_path / "reference", *real)
    pairing = pair_up(tmp_path / "edited", tmp_path / "reference")
    (pair,) = pairing.pairs
    assert pair.recording.file == "M003/neutral/001.mp4"
    assert [clip.file for clip in pairing.groups[pair.group]] == ["M003/happy/001.mp4", "M003/happy/002.mp4"]
    assert pairing.unused == ["W009/happy/001.mp4"]


def test_edits_of_single_videos_pair_with_these(tmp_path):
    touch(tmp_path / "edited", "talk.happy.mp4", "walk.sad.mp4")
    touch(tmp_path / "reference", "talk.mp4", "walk.mp4")
    pairs = pair_up(tmp_path / "edited", tmp_path / "reference").pairs
    assert [pair.recording.file for pair in pairs] == ["talk.mp4", "walk.mp4"]
    assert [pair.group for pair in pairs] == [("", None), ("", None)]


def test_settings_come_from_who_lent_the_emotion(tmp_path):
    touch(tmp_path / "edited", "Tom/ref_on_angry_Ann_x/0.png", "Tom/ref_on_angry_Tom_x/0.png", "Ann/sad/0.png")
    touch(tmp_path / "reference", "Tom/angry/0.png", "Ann/sad/0.png")
    pairs = pair_up(tmp_path / "edited", tmp_path / "reference").pairs
    assert {pair.edited.file: pair.edited.setting for pair in pairs} == {
        "Ann/sad": "",
        "Tom/ref_on_angry_Ann_x": "cross-ID",
        "Tom/ref_on_angry_Tom_x": "inter-ID",
    }


def test_what_does_not_pair_says_why(tmp_path):
    touch(tmp_path / "edited", "M003/happy/001.mp4", "M003/sad/007.mp4", "W009/happy/001.mp4")
    touch(tmp_path / "reference", "M003/happy/001.mp4")
    good, no_emotion, nobody = pair_up(tmp_path / "edited", tmp_path / "reference").pairs
    assert good.why == good.why_not == ""
    assert no_emotion.why == "the reference has no recording '007' of M003"
    assert no_emotion.why_not == "the reference has no sad clip of M003"
    assert nobody.why_not == "the reference has no clip of W009"


@pytest.mark.parametrize(
    ("references", "recording"),
    [
        (("M003/happy/001.mp4", "M003/neutral/001.mp4"), "M003/happy/001.mp4"),
        (("M003/neutral/001.mp4", "M003/sad/001.mp4"), "M003/neutral/001.mp4"),
        (("M003/sad/001.mp4",), None),  # MEAD's numbers are no sentences: it may be another recording
        (("M003/sad/001.mp4", "M003/fear/001.mp4"), None),
    ],
)
def test_a_recording_of_another_emotion_is_taken_only_where_it_is_neutral(tmp_path, references, recording):
    touch(tmp_path / "edited", "M003/happy/001.mp4")
    touch(tmp_path / "reference", "M003/happy/002.mp4", *references)
    (pair,) = pair_up(tmp_path / "edited", tmp_path / "reference").pairs
    assert (pair.recording and pair.recording.file) == recording
    assert recording or "no name says that it is that" in pair.why


def test_folders_of_which_nothing_pairs_are_named_with_some_of_each(tmp_path):
    touch(tmp_path / "edited", "M003/happy/001.mp4")
    touch(tmp_path / "reference", "W009/sad/002.mp4")
    with pytest.raises(ValueError, match=r"there W009/sad/002\.mp4, here M003/happy/001\.mp4"):
        pair_up(tmp_path / "edited", tmp_path / "reference")


def test_sound_is_taken_from_the_folder_given_then_from_the_clip_then_from_its_recording(tmp_path):
    touch(tmp_path / "edited", "M003/happy/001.mp4", "M003/happy/002/0.png")
    touch(tmp_path / "reference", "M003/happy/001.mp4", "M003/happy/002.mp4")
    touch(tmp_path / "sound", "M003/audio/happy/001.m4a")
    first, second = pair_up(tmp_path / "edited", tmp_path / "reference", tmp_path / "sound").pairs
    inside = ["sound/M003/audio/happy/001.m4a", "edited/M003/happy/001.mp4", "reference/M003/happy/001.mp4"]
    assert [str(path.relative_to(tmp_path)) for path in first.sounds] == inside
    assert [str(path.relative_to(tmp_path)) for path in second.sounds] == ["reference/M003/happy/002.mp4"]
