"""Names to labels: what each layout of raw recordings lists, how it is recognized, and what is chosen from it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import raw_trees
from PIL import Image
from raw_trees import TREES, RawTree, click_offset

from pcmecl_fast.data.emotions import KNOWN_EMOTIONS, emotion_named
from pcmecl_fast.data.layouts import LAYOUTS, Layout, Listing, RawClip, find_layout, register, select
from pcmecl_fast.data.layouts.base import is_picture, is_sound, natural


@pytest.fixture(scope="module", params=TREES)
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RawTree:
    pytest.importorskip("av")
    return TREES[request.param](tmp_path_factory.mktemp(request.param))


def touch(root: Path, *names: str) -> Path:
    """Empty files: a layout reads names alone."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def listed(root: Path, layout: str) -> Listing:
    return LAYOUTS[layout].list(root)


def named(listing: Listing) -> list[tuple[str, str, str]]:
    return [(clip.individual, clip.emotion, clip.name) for clip in listing.clips]


def ned_actor(root: Path, lines: list[str], *images: str) -> Path:
    touch(root, *(f"images/{image}" for image in images), "videos/_frame_info.txt")
    (root / "videos/_frame_info.txt").write_text("\n".join(lines))
    return root


# Every layout


def test_every_clip_of_a_tree_has_exactly_its_labels_and_files(tree: RawTree) -> None:
    assert listed(tree.root, tree.layout).clips == tree.clips


def test_what_a_layout_cannot_name_is_listed_and_documents_and_hidden_names_are_not(tree: RawTree) -> None:
    assert listed(tree.root, tree.layout).unknown == tree.unknown


def test_auto_finds_the_layout_and_says_why_with_a_path_in_the_folder(tree: RawTree) -> None:
    layout, why = find_layout(tree.root)
    assert layout.name == tree.layout
    assert (tree.root / why.split(" is ")[0]).exists()
    assert find_layout(tree.root, tree.layout) == (layout, why)
    assert [name for name, other in LAYOUTS.items() if other.evidence(tree.root)] == [tree.layout]


def test_clips_names_are_unique_file_names_within_individual_and_emotion(tree: RawTree) -> None:
    names = named(listed(tree.root, tree.layout))
    assert len(set(names)) == len(names)
    assert all(Path(name).name == name for _, _, name in names)


def test_a_folder_given_as_text_relative_to_here_is_listed_the_same(
    tree: RawTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree.root)
    layout, _ = find_layout(".")
    assert named(layout.list(Path("."))) == [(clip.individual, clip.emotion, clip.name) for clip in tree.clips]


def test_listing_needs_neither_pytorch_nor_pyav_nor_pillow() -> None:
    code = "import sys, pcmecl_fast.data.layouts; print(*{'torch', 'av', 'PIL', 'numpy'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_numbers_sort_by_value_and_capitals_do_not_count() -> None:
    assert sorted(["10", "a2", "B1", "9", "A10", "09"], key=natural) == ["09", "9", "10", "a2", "A10", "B1"]
    names = ["p0", "p1", "p9-2", "p9-10", "p10", f"p{10**30}", f"p{10**30 + 1}", "q"]
    assert sorted(reversed(names), key=natural) == names


def test_clips_are_in_natural_order_and_emotions_in_that_of_the_reports(tmp_path: Path) -> None:
    touch(tmp_path, "p10/sad/1.mp4", "p2/sad/10.mp4", "p2/sad/9.mp4", "p2/Anger/1.mp4", "p2/neutral/1.mp4")
    assert named(listed(tmp_path, "folder")) == [
        ("p2", "neutral", "1"),
        ("p2", "angry", "1"),
        ("p2", "sad", "9"),
        ("p2", "sad", "10"),
        ("p10", "sad", "1"),
    ]


def test_every_usual_word_for_an_emotion_is_known_in_any_capitals() -> None:
    words = {"anger": "angry", "ANG": "angry", "Disgust": "disgusted", "fearful": "fear", "happiness": "happy"}
    words |= {"SADNESS": "sad", "surprise": "surprised", "con": "contempt", **{name: name for name in KNOWN_EMOTIONS}}
    assert {word: emotion_named(word) for word in words} == words
    assert emotion_named("bored") is None


# MEAD


def test_mead_has_one_sound_for_all_views(tmp_path: Path) -> None:
    touch(tmp_path, *(f"M003/video/{view}/fear/level_2/007.mp4" for view in ("front", "top")))
    touch(tmp_path, "M003/audio/fear/level_2/007.m4a", "M003/audio/fear/level_3/007.m4a")
    clips = listed(tmp_path, "mead").clips
    assert [clip.view for clip in clips] == ["front", "top"]
    assert {clip.sound for clip in clips} == {tmp_path / "M003/audio/fear/level_2/007.m4a"}


def test_mead_clips_say_view_level_and_number(tmp_path: Path) -> None:
    touch(tmp_path, "W011/video/left_30/contempt/level_3/030.mp4")
    [clip] = listed(tmp_path, "mead").clips
    file = tmp_path / "W011/video/left_30/contempt/level_3/030.mp4"
    expected = RawClip("W011", "contempt", "left_30-level_3-030", (file,), None, "level_3", "left_30", number=30)
    assert clip == expected


@pytest.mark.parametrize(
    ("file", "labels"),
    [
        ("M003_ang_3_001.mp4", ("M003", "angry", "level_3-001", "level_3", 1)),
        ("W009_sur_1_030.mp4", ("W009", "surprised", "level_1-030", "level_1", 30)),
        ("M003#angry#level_1#001.mp4", ("M003", "angry", "level_1-001", "level_1", 1)),
        ("M003#neutral#level_1#040.mp4", ("M003", "neutral", "level_1-040", "level_1", 40)),
        ("M003_5_2_output_03.mp4", ("M003", "angry", "level_2-page_5-03", "level_2", None)),
    ],
)
@pytest.mark.parametrize("folder", ["", "M003/"])
def test_renamed_copies_of_mead_are_told_apart_by_their_names(
    tmp_path: Path, folder: str, file: str, labels: tuple[object, ...]
) -> None:
    touch(tmp_path, folder + file)
    layout, why = find_layout(tmp_path)
    [clip] = layout.list(tmp_path).clips
    assert (clip.individual, clip.emotion, clip.name, clip.level, clip.number) == labels
    assert clip.view is None
    assert folder + file in why


def test_the_pages_of_meads_first_release_are_emotions(tmp_path: Path) -> None:
    borders = {"angry": (1, 8), "disgusted": (9, 16), "contempt": (17, 24), "fear": (25, 33), "happy": (34, 43)}
    borders |= {"sad": (44, 52), "surprised": (53, 61), "neutral": (62, 73)}
    for emotion, pages in borders.items():
        touch(tmp_path, *(f"{emotion}/M003_{page}_1_output_2.mp4" for page in pages))
        listing = listed(tmp_path / emotion, "mead")
        assert [(clip.emotion, clip.sentence) for clip in listing.clips] == [(emotion, "2")] * 2
    assert listed(touch(tmp_path / "none", "M003_74_1_output_2.mp4"), "mead").unknown == ["M003_74_1_output_2.mp4"]


def test_a_renamed_copys_sound_may_lie_beside_it(tmp_path: Path) -> None:
    touch(tmp_path, "M003_ang_3_001.mp4", "M003_ang_3_001.wav", "M003_ang_3_002.mp4")
    clips = listed(tmp_path, "mead").clips
    assert [clip.sound for clip in clips] == [tmp_path / "M003_ang_3_001.wav", None]


def test_what_mead_does_not_have_is_unknown_at_every_depth(tmp_path: Path) -> None:
    wrong = ["M3/x.mp4", "M003/extra/x.mp4", "M003/video/side/x.mp4", "M003/video/top/bored/x.mp4"]
    wrong += ["M003/video/top/sad/level_4/x.mp4", "M003/video/top/sad/level_1/x.mp4", "M003/video.tar"]
    touch(tmp_path, "M003/video/top/sad/level_1/001.mp4", *wrong)
    listing = listed(tmp_path, "mead")
    assert len(listing.clips) == 1
    assert set(listing.unknown) == {
        "M3",
        "M003/extra",
        "M003/video/side",
        "M003/video/top/bored",
        "M003/video/top/sad/level_4",
        "M003/video/top/sad/level_1/x.mp4",
        "M003/video.tar",
    }


# RAVDESS


def test_a_take_of_ravdess_counts_once_with_its_copies_beside_it(tmp_path: Path) -> None:
    take = "01-06-02-02-01-24"
    touch(tmp_path, *(f"Actor_24/{modality}-{take}.mp4" for modality in ("01", "02")), f"Actor_24/03-{take}.wav")
    listing = listed(tmp_path, "ravdess")
    assert listing.clips == [
        RawClip(
            "Actor_24",
            "fear",
            "speech-strong-02-01",
            (tmp_path / f"Actor_24/01-{take}.mp4",),
            level="strong",
            sentence="02",
            repetition="01",
        )
    ]
    assert not listing.unknown


def test_ravdess_lies_in_the_folders_of_its_zips_or_of_its_actors_or_in_none(tmp_path: Path) -> None:
    name = "01-01-08-01-01-01-05.mp4"
    for folder in ("", "Actor_05/", "Video_Speech_Actor_05/", "Video_Speech_Actor_05/Actor_05/"):
        root = touch(tmp_path / f"root {len(folder)}", folder + name)
        layout, why = find_layout(root)
        assert named(layout.list(root)) == [("Actor_05", "surprised", "speech-normal-01-01")]
        assert why.startswith(folder + name)


def test_a_take_that_lies_in_two_folders_is_a_clip_once_and_unknown_the_second_time(tmp_path: Path) -> None:
    name = "01-02-04-01-01-01-05.mp4"
    listing = listed(touch(tmp_path, f"Actor_05/{name}", f"Video_Song_Actor_05/Actor_05/{name}"), "ravdess")
    assert named(listing) == [("Actor_05", "sad", "song-normal-01-01")]
    assert listing.unknown == [f"Video_Song_Actor_05/Actor_05/{name}"]


# CREMA-D


def test_crema_d_takes_the_sound_of_the_other_folder(tmp_path: Path) -> None:
    touch(tmp_path, "VideoFlash/1001_IEO_DIS_HI.flv", "AudioWAV/1001_IEO_DIS_HI.wav", "VideoFlash/1001_IEO_NEU_XX.flv")
    neutral, disgusted = listed(tmp_path, "crema-d").clips
    assert disgusted.sound == tmp_path / "AudioWAV/1001_IEO_DIS_HI.wav"
    assert (disgusted.emotion, disgusted.level, disgusted.sentence) == ("disgusted", "HI", "IEO")
    assert (neutral.emotion, neutral.level, neutral.sound) == ("neutral", "XX", None)


# NED


def test_neds_flat_form_is_listed_as_its_folders_of_fifty(tmp_path: Path) -> None:
    lines = [f"happy_1_{g:06d} {g}" for g in range(120)]
    ned_actor(tmp_path / "train/Tom", lines, *(f"{g // 50:06d}/{g:06d}.png" for g in range(120)))
    ned_actor(tmp_path / "test/Tom", lines, *(f"{g:06d}.png" for g in range(120)))
    [train], [test] = (listed(tmp_path / form, "ned").clips for form in ("train", "test"))
    assert [source.name for source in train.sources] == [f"{g:06d}.png" for g in range(120)]
    assert [source.name for source in test.sources] == [source.name for source in train.sources]
    assert train.cropped
    assert test.cropped


def test_neds_root_may_be_one_actor(tmp_path: Path) -> None:
    actor = ned_actor(tmp_path / "Tom", ["sad_level_1_003_000000 0"], "000000/000000.png")
    layout, _ = find_layout(actor)
    assert named(layout.list(actor)) == [("Tom", "sad", "sad_level_1_003")]


def test_neds_frames_are_in_the_order_of_their_numbers_and_may_have_gaps(tmp_path: Path) -> None:
    lines = ["fear_1_9 0", "fear_1_10 1", "fear_1_2 2", "fear_1_11 3", "not a line"]
    [clip] = listed(ned_actor(tmp_path, lines, "000000.png", "000001.png", "000002.png"), "ned").clips
    assert [source.name for source in clip.sources] == ["000002.png", "000000.png", "000001.png"]


def test_neds_images_without_a_line_or_an_emotion_are_unknown(tmp_path: Path) -> None:
    lines = ["happy_1_0 0", "interview_1_0 1"]
    listing = listed(ned_actor(tmp_path, lines, "000000.png", "000001.png", "000002.png"), "ned")
    assert len(listing.clips) == 1
    assert listing.unknown == ["images/000001.png", "images/000002.png"]


def test_ned_without_the_list_of_frames_names_the_file_that_the_emotions_are_in(tmp_path: Path) -> None:
    touch(tmp_path, "Tom/images/000000/000000.png")
    layout, _ = find_layout(tmp_path)
    file = re.escape(str(tmp_path / "Tom/videos/_frame_info.txt"))
    with pytest.raises(ValueError, match=rf"^root: there is no {file}, .*keeps no emotions; .* line"):
        layout.list(tmp_path)


# Plain folders


def test_a_picture_a_video_and_a_folder_of_pictures_are_clips(tmp_path: Path) -> None:
    touch(tmp_path, "ann/Happiness/photo.BMP", "ann/Happiness/talk.wmv", *(f"ann/joy/f/{i}.webp" for i in (10, 9)))
    photo, talk, folder = sorted(listed(tmp_path, "folder").clips, key=lambda clip: len(clip.sources[0].suffix) * 10)
    assert {clip.emotion for clip in (photo, talk, folder)} == {"happy"}
    assert [source.name for source in folder.sources] == ["9.webp", "10.webp"]
    assert (folder.name, photo.name, talk.name) == ("f", "photo", "talk")


def test_cdrls_aligned_faces_are_cropped_clips(tmp_path: Path) -> None:
    touch(tmp_path, "M003/align_img/angry/001/000000.jpg", "M003/align_img/angry/001/000001.jpg", "M003/sad/1.jpg")
    aligned, photo = listed(tmp_path, "folder").clips
    assert (aligned.individual, aligned.emotion, aligned.name) == ("M003", "angry", "001")
    assert (len(aligned.sources), aligned.cropped, photo.cropped) == (2, True, False)


def test_clips_that_would_share_a_name_get_longer_ones(tmp_path: Path) -> None:
    touch(tmp_path, "ann/anger/a.jpg", "ann/anger/a.png", "ann/angry/a.jpg", "ann/angry/A.png")
    assert named(listed(tmp_path, "folder")) == [("ann", "angry", n) for n in ("a", "a-jpg", "a-png", "angry-A")]


def test_a_sound_beside_a_video_or_a_folder_of_pictures_is_its_sound_and_another_is_unknown(tmp_path: Path) -> None:
    touch(tmp_path, "ann/sad/a.mp4", "ann/sad/a.wav", "ann/sad/b/0.jpg", "ann/sad/b.m4a", "ann/sad/c.mp4")
    touch(tmp_path, "ann/sad/d.wav")
    listing = listed(tmp_path, "folder")
    assert [clip.sound and clip.sound.name for clip in listing.clips] == ["a.wav", "b.m4a", None]
    assert listing.unknown == ["ann/sad/d.wav"]


# Which layout


def test_a_folder_of_no_layout_gets_one_line_that_says_what_each_expects(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no layout known here") as error:
        find_layout(touch(tmp_path, "clip.mp4"))
    assert all(f"{name} expects {layout.expects}" in str(error.value) for name, layout in LAYOUTS.items())
    assert "\n" not in str(error.value)


def test_a_folder_of_two_layouts_gets_both_with_their_reasons(tmp_path: Path) -> None:
    touch(tmp_path, "Actor_01/01-01-05-01-01-01-01.mp4", "ann/happy/1.jpg")
    with pytest.raises(ValueError, match=r"be folder .*ann/happy.* and ravdess .*Actor_01/01-.*; name the layout"):
        find_layout(tmp_path)
    assert find_layout(tmp_path, "ravdess")[0].name == "ravdess"


def test_a_layout_asked_for_by_name_is_taken_without_evidence_and_says_so(tmp_path: Path) -> None:
    layout, why = find_layout(touch(tmp_path, "ann/bored/1.jpg"), "folder")
    assert why.startswith("as asked for")
    assert layout.list(tmp_path) == Listing([], ["ann/bored"])


def test_wrong_names_and_roots_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no layout is named 'Raves'; did you mean ravdess.* known: auto, crema-d"):
        find_layout(tmp_path, "Raves")
    with pytest.raises(FileNotFoundError, match=r"root: .*missing does not exist"):
        find_layout(tmp_path / "missing")
    with pytest.raises(NotADirectoryError, match=r"root: .*file\.zip is a file"):
        find_layout(touch(tmp_path, "file.zip") / "file.zip")


def test_a_new_data_set_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcmecl_fast.data.layouts.base.LAYOUTS", LAYOUTS)
    monkeypatch.delitem(LAYOUTS, "one_file", raising=False)

    class OneFile(Layout):
        name, expects = "one_file", "the.mp4"

        def evidence(self, root: Path) -> str | None:
            return "the.mp4 is there" if (root / "the.mp4").exists() else None

        def list(self, root: Path) -> Listing:
            return Listing([RawClip("me", "happy", "the", (root / "the.mp4",))], [])

    try:
        register(OneFile)
        assert find_layout(touch(tmp_path, "the.mp4"))[1] == "the.mp4 is there"
    finally:
        del LAYOUTS["one_file"]


# What is chosen


def some_clips() -> list[RawClip]:
    return [
        RawClip(who, emotion, f"{view}-{level}", (Path("a.mp4"),), level=level, view=view)
        for who in ("M003", "W009")
        for emotion, levels in (("neutral", ("level_1",)), ("angry", ("level_1", "level_3")))
        for level in levels
        for view in ("front", "top")
    ]


def test_clips_are_chosen_by_all_of_what_is_given_in_their_order() -> None:
    clips = some_clips()
    assert select(clips) == clips
    chosen = select(clips, individuals=["W009"], emotions=["angry", "neutral"], views=["front"], levels=["level_1"])
    assert [(c.individual, c.emotion, c.name) for c in chosen] == [
        ("W009", "neutral", "front-level_1"),
        ("W009", "angry", "front-level_1"),
    ]


def test_a_person_who_lacks_what_others_have_is_no_mistake() -> None:
    clips = [RawClip("ann", "sad", "1", (), view="front"), RawClip("ben", "happy", "1", (), view="top")]
    assert select(clips, individuals=["ann"], emotions=["sad", "happy"]) == clips[:1]
    assert select(clips, individuals=["ann"], views=["top"]) == []


def test_emotions_and_levels_are_known_by_other_words() -> None:
    clips = some_clips()
    assert select(clips, emotions=["Anger"]) == select(clips, emotions=["angry"]) != []
    assert select(clips, levels=["3"]) == select(clips, levels=["LEVEL_3"]) != []
    assert {clip.emotion for clip in select(clips, levels=["3"])} == {"neutral", "angry"}  # neutral has no levels
    other = [RawClip("a", "sad", level, (), level=level) for level in ("strong", "HI", "normal")]
    assert [clip.level for clip in select(other, levels=["strong", "hi"])] == ["strong", "HI"]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"individuals": ["M3"]}, "individuals: no clip has 'M3'; did you mean M003? there are M003, W009"),
        ({"emotions": ["happy"]}, "emotions: no clip has 'happy'; there are angry, neutral"),
        ({"views": ["left"]}, "views: no clip has 'left'; there are front, top"),
        ({"levels": ["4"]}, "levels: no clip has '4'; there are level_1, level_3"),
        ({"levels": "level_1"}, "levels: takes a sequence of names, got 'level_1'"),
    ],
)
def test_a_value_that_no_clip_has_is_refused_with_those_there_are(choice: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        select(some_clips(), **choice)


def test_where_clips_have_no_views_a_view_is_refused() -> None:
    with pytest.raises(ValueError, match="views: no clip has 'front'; these clips have no views"):
        select([RawClip("a", "sad", "1", ())], views=["front"])


# The trees that other tests prepare


def test_whole_clips_of_a_tree_can_be_read_and_broken_files_cannot(tree: RawTree) -> None:
    for clip in tree.whole:
        frames = sum(1 if is_picture(source) else count_frames(source) for source in clip.sources)
        assert frames == (1 if len(clip.sources) == 1 and is_picture(clip.sources[0]) else tree.frames), clip
    for path in tree.broken:
        with pytest.raises((OSError, ValueError)):
            Image.open(path).load() if is_picture(path) else count_frames(path)


def test_clicks_and_flashes_of_a_tree_are_in_step(tree: RawTree) -> None:
    with_sound = [clip for clip in tree.whole if clip.sound]
    if tree.layout in ("ravdess", "folder"):
        with_sound = [clip for clip in tree.whole if not is_picture(clip.sources[0])]
    assert bool(with_sound) == (tree.layout != "ned")
    for clip in with_sound:
        assert abs(click_offset(clip.sources[0], clip.sound)) < 0.001


def test_a_sound_that_comes_late_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("av")
    take = raw_trees.Cast(("ann",), frames=16, seed=0).take("ann", "happy", 0)
    late = np.concatenate([np.zeros(4800, np.float32), take.sound(raw_trees.NTSC, 48000)])
    video = raw_trees.write_video(tmp_path / "late.mp4", take.scenes((160, 120)), raw_trees.NTSC, late, 48000)
    assert click_offset(video) == pytest.approx(0.1, abs=0.001)


def count_frames(path: Path) -> int:
    """The frames of a video, or of a sound; raises where a packet is damaged."""
    import av

    count = 0
    with av.open(str(path)) as container:
        for packet in container.demux(audio=0) if is_sound(path) else container.demux(video=0):
            if packet.is_corrupt:
                raise ValueError(f"{path} is cut short")
            count += len(packet.decode())
    return count
