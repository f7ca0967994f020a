"""Reading faces from folders, on pictures made here."""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pcmecl_fast.data.base import FrameDataset, as_indices, check_trainable
from pcmecl_fast.data.emotions import EMOTIONS
from pcmecl_fast.data.folder import FolderFaces
from pcmecl_fast.data.splits import split

MEAD_STILLS = Path(__file__).resolve().parents[2] / "shared" / "data" / "mead_stills"

needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV is not installed")


def picture(path: Path, size: tuple[int, int] = (24, 24), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def truncated(path: Path) -> Path:
    data = picture(path, size=(64, 64)).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def video(path: Path, frames: int = 12, size: tuple[int, int] = (48, 32)) -> Path:
    """Frame i is grey of value 16·i, with a red upper left corner."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), min(16 * i, 255), dtype=np.uint8)
            pixels[:16, :16] = (255, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def people(root: Path, counts: dict[str, dict[str, int]]) -> Path:
    for p, (person, emotions) in enumerate(counts.items()):
        for e, (emotion, count) in enumerate(emotions.items()):
            for i in range(count):
                picture(root / person / emotion / f"{i + 1}.png", seed=10000 * p + 1000 * e + i)
    return root


def sides(dataset: FrameDataset, **options: object) -> tuple[set[str], set[str]]:
    train, held = split(dataset, **options)  # type: ignore[arg-type]
    assert not set(train.keys) & set(held.keys)
    assert set(train.keys) | set(held.keys) == set(dataset.keys)
    return set(train.keys), set(held.keys)


# Reading


def test_labels_follow_the_folders_with_uneven_counts_and_missing_emotions(tmp_path: Path) -> None:
    people(tmp_path, {"ann": {"happy": 3, "angry": 1}, "ben": {"neutral": 2}})
    faces = FolderFaces(tmp_path, size=8)
    assert faces.individuals == ["ann", "ben"]
    assert faces.emotions == ["neutral", "angry", "happy"]  # the canonical order, not the alphabet's
    assert faces.individual_index.tolist() == [0, 0, 0, 0, 1, 1]
    assert faces.emotion_index.tolist() == [1, 2, 2, 2, 0, 0]
    assert faces.individual_index.dtype == faces.emotion_index.dtype == torch.int64
    assert faces.keys[0] == "ann/angry/1.png"
    assert faces.available().tolist() == [[False, True, True], [True, False, False]]


def test_order_is_natural(tmp_path: Path) -> None:
    for person in ("p10", "p2", "P1"):
        for name in ("10.png", "9.png", "009.png"):
            picture(tmp_path / person / "sad" / name)
    faces = FolderFaces(tmp_path, size=8)
    assert faces.individuals == ["P1", "p2", "p10"]
    assert [key.rsplit("/")[-1] for key in faces.keys[:3]] == ["009.png", "9.png", "10.png"]


def test_hidden_and_other_files_are_ignored(tmp_path: Path) -> None:
    people(tmp_path, {"ann": {"happy": 1, "sad": 1}})
    others = ("README.md", "ann/Thumbs.db", "ann/happy/notes.txt", "ann/happy/._1.png", "__MACOSX/x.png", ".x/a.png")
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not a picture")
    assert FolderFaces(tmp_path, size=8).keys == ["ann/happy/1.png", "ann/sad/1.png"]


def test_suffixes_are_read_in_any_case(tmp_path: Path) -> None:
    for name in ("a.JPG", "b.Jpeg", "c.PNG", "d.webp"):
        picture(tmp_path / "ann" / "happy" / name)
    assert len(FolderFaces(tmp_path, size=8)) == 4


def test_frames_are_the_pictures_in_minus_one_to_one(tmp_path: Path) -> None:
    path = picture(tmp_path / "ann" / "happy" / "1.png")
    faces = FolderFaces(tmp_path, size=24)
    expected = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(faces.frames([0])[0], expected)
    assert faces.frames([0]).dtype == torch.float32
    assert faces.frames([0]).is_contiguous()
    assert float(expected.max()) == 1


@pytest.mark.parametrize("size", [5, 13])
def test_frames_are_the_centred_square_resized(tmp_path: Path, size: int) -> None:
    pixels = np.zeros((40, 100, 3), dtype=np.uint8)
    pixels[:, 30:70] = 255  # the centred square, and nothing else
    (tmp_path / "ann" / "happy").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "ann" / "happy" / "wide.png")
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "ann" / "happy" / "tall.png")
    frames = FolderFaces(tmp_path, size=size).frames([0, 1])
    assert torch.equal(frames, torch.ones(2, 3, size, size))


def test_large_jpegs_decoded_at_reduced_scale_look_the_same(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 1024).astype(np.uint8)
    pixels = np.stack([np.tile(ramp, (1024, 1)), np.tile(ramp[:, None], (1, 1024)), np.full((1024, 1024), 90)], axis=-1)
    for name in ("1.jpg", "2.png"):
        (tmp_path / "ann" / "happy").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "ann" / "happy" / name)
    jpeg, png = FolderFaces(tmp_path, size=16).frames([0, 1])
    torch.testing.assert_close(jpeg, png, atol=0.03, rtol=0)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise by 90°
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = 255
    (tmp_path / "ann" / "happy").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "ann" / "happy" / "1.png", exif=exif)
    frame = FolderFaces(tmp_path, size=16).frames([0])[0, 0]
    assert torch.equal(frame[:, 8:], torch.ones(16, 8))
    assert torch.equal(frame[:, :8], -torch.ones(16, 8))


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("L", (8, 8), 100), (100, 100, 100)),
        (Image.new("1", (8, 8), 1), (255, 255, 255)),
        (
            Image.new(
                "P",
                (8, 8),
                0,
            )
            .convert("RGB")
            .quantize(2),
            (0, 0, 0),
        ),
        (Image.new("RGBA", (8, 8), (200, 100, 50, 255)), (200, 100, 50)),
        (Image.new("RGBA", (8, 8), (200, 100, 50, 0)), (0, 0, 0)),
        (Image.new("LA", (8, 8), (200, 0)), (0, 0, 0)),
        (Image.fromarray(np.full((8, 8), 100 * 257, dtype=np.uint16)), (100, 100, 100)),
    ],
    ids=["grey", "bilevel", "palette", "opaque", "transparent", "transparent-grey", "16-bit-grey"],
)
def test_every_mode_becomes_rgb(tmp_path: Path, image: Image.Image, colour: tuple[int, int, int]) -> None:
    (tmp_path / "ann" / "happy").mkdir(parents=True)
    image.save(tmp_path / "ann" / "happy" / "1.png")
    pixel = (FolderFaces(tmp_path, size=4).frames([0])[0, :, 2, 2] + 1) * 127.5
    assert pixel.round().int().tolist() == list(colour)


@pytest.mark.parametrize("options", [{"cache": False}, {"cache_bytes": 0}, {"cache_bytes": 3 * 3 * 8 * 8}])
def test_frames_that_are_not_cached_are_decoded_again_to_the_same_pixels(
    tmp_path: Path, options: dict[str, int]
) -> None:
    people(tmp_path, {"ann": {"happy": 3, "sad": 2}, "ben": {"sad": 2}})
    order = [6, 0, 3, 3, 2]
    kept = FolderFaces(tmp_path, size=8).frames(order)
    assert torch.equal(FolderFaces(tmp_path, size=8, **options).frames(order), kept)  # type: ignore[arg-type]


def test_a_file_that_breaks_later_is_named(tmp_path: Path) -> None:
    path = picture(tmp_path / "ann" / "happy" / "1.png")
    faces = FolderFaces(tmp_path, size=8, cache=False)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"1\.png \(empty file\)"):
        faces.frames([0])


@pytest.mark.parametrize("workers", [0, 1])
def test_it_works_in_a_data_loader(tmp_path: Path, workers: int) -> None:
    faces = FolderFaces(people(tmp_path, {"ann": {"happy": 3, "sad": 2}}), size=8)
    batch = next(iter(DataLoader(faces, batch_size=5, num_workers=workers)))
    assert torch.equal(batch["frame"], faces.frames(range(5)))
    assert batch["individual"].tolist() == [0] * 5
    assert torch.equal(batch["emotion"], faces.emotion_index)


def test_iterating_ends(tmp_path: Path) -> None:
    faces = FolderFaces(people(tmp_path, {"ann": {"happy": 3}}), size=8)
    assert len([sample["frame"] for sample in faces]) == 3  # type: ignore[attr-defined]


# Videos


@needs_av
def test_video_frames_are_keyed_by_number(tmp_path: Path) -> None:
    video(tmp_path / "ann" / "happy" / "clip.MP4")
    picture(tmp_path / "ann" / "happy" / "z.png")
    faces = FolderFaces(tmp_path, size=16, video_stride=5)
    assert faces.keys == [f"ann/happy/clip.MP4#{i}" for i in (0, 5, 10)] + ["ann/happy/z.png"]
    grey = (faces.frames([0, 1, 2])[:, :, -2:, -2:].mean(dim=(1, 2, 3)) + 1) * 127.5
    torch.testing.assert_close(grey, torch.tensor([0.0, 80.0, 160.0]), atol=6, rtol=0)


@needs_av
def test_video_frames_are_found_again_without_a_cache(tmp_path: Path) -> None:
    for name in ("a.mkv", "b.avi", "c.mov"):
        video(tmp_path / "ann" / "happy" / name)
    order = [30, 2, 17, 2, 35]
    kept = FolderFaces(tmp_path, size=8).frames(order)
    assert torch.equal(FolderFaces(tmp_path, size=8, cache=False).frames(order), kept)


@needs_av
def test_sideways_videos_are_turned_upright(tmp_path: Path) -> None:
    path = video(tmp_path / "ann" / "happy" / "phone.mp4", size=(32, 32))
    upright, quarter = (
        b"".join(v.to_bytes(4, "big", signed=True) for v in values)
        for values in (
            (65536, 0, 0, 0, 65536, 0, 0, 0, 2**30),
            (0, 65536, 0, -65536, 0, 0, 0, 0, 2**30),
        )
    )
    data = path.read_bytes()
    start = data.index(upright, data.index(b"tkhd"))  # the track's matrix, in the container's header
    path.write_bytes(data[:start] + quarter + data[start + len(quarter) :])
    red = FolderFaces(tmp_path, size=32).frames([0])[0, 0]
    assert float(red[:12, 20:].mean()) > 0.8  # the upper left corner went to the upper right
    assert float(red[:12, :12].mean()) < -0.8


@needs_av
@pytest.mark.parametrize("name", ["moov-last.mp4", "index-last.avi"])
def test_a_truncated_video_is_broken_as_a_whole(tmp_path: Path, name: str) -> None:
    path = video(tmp_path / "ann" / "happy" / name)
    video(tmp_path / "ann" / "happy" / "z.mp4", frames=3)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=name):
        FolderFaces(tmp_path, size=8)
    faces = FolderFaces(tmp_path, size=8, skip_broken=True)
    assert faces.keys == [f"ann/happy/z.mp4#{i}" for i in range(3)]
    assert faces.frames(range(3)).shape == (3, 3, 8, 8)


def test_videos_without_pyav_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    people(tmp_path, {"ann": {"happy": 1}})
    (tmp_path / "ann" / "happy" / "clip.webm").write_bytes(b"x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'clip\.webm.*pip install "pcmecl_fast\[video\]"'):
        FolderFaces(tmp_path, size=8)


# Broken files


def test_broken_files_are_all_named_in_one_error(tmp_path: Path) -> None:
    people(tmp_path, {"ann": {"happy": 2}})
    truncated(tmp_path / "ann" / "happy" / "cut.jpg")
    (tmp_path / "ann" / "happy" / "empty.png").write_bytes(b"")
    (tmp_path / "ann" / "happy" / "text.webp").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="3 of 5 files are broken") as error:
        FolderFaces(tmp_path, size=8)
    for name in ("cut.jpg", "empty.png (empty file)", "text.webp", "skip_broken=True"):
        assert name in str(error.value)


def test_a_long_list_of_broken_files_is_cut(tmp_path: Path) -> None:
    people(tmp_path, {"ann": {"happy": 1}})
    for i in range(13):
        (tmp_path / "ann" / "happy" / f"broken{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"13 of 14 files are broken.*broken9\.png \(empty file\) and 3 more;"):
        FolderFaces(tmp_path, size=8)


def test_broken_files_are_skipped_on_request_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    people(tmp_path, {"ann": {"happy": 2}})
    truncated(tmp_path / "ann" / "sad" / "cut.jpg")
    truncated(tmp_path / "ben" / "happy" / "cut.jpg")
    with caplog.at_level(logging.WARNING):
        faces = FolderFaces(tmp_path, size=8, skip_broken=True)
    assert (faces.individuals, faces.emotions, len(faces)) == (["ann"], ["happy"], 2)
    (message,) = caplog.messages
    assert "2 of 4 files are broken" in message
    assert str(Path("sad", "cut.jpg")) in message
    assert str(Path("ben", "happy", "cut.jpg")) in message


def test_skipping_everything_is_an_error(tmp_path: Path) -> None:
    truncated(tmp_path / "ann" / "happy" / "cut.jpg")
    with pytest.raises(ValueError, match="all 1 files are broken"):
        FolderFaces(tmp_path, size=8, skip_broken=True)


# Layout


def test_a_root_that_is_not_a_folder_of_faces_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        FolderFaces(tmp_path / "absent", size=8)
    with pytest.raises(ValueError, match="holds no pictures or videos"):
        FolderFaces(tmp_path, size=8)
    (tmp_path / "ann" / "happy").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no pictures or videos"):
        FolderFaces(tmp_path, size=8)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        FolderFaces(tmp_path / "file", size=8)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("1.png", "directly in the root folder"),
        ("ben/1.png", "'ben', outside an emotion's folder"),
        ("ben/happy/level_1/1.png", "one level too deep"),
        ("happy/1.png", "if .* is one individual, pass its parent"),
        ("happy/ben/1.png", "levels are swapped"),
    ],
)
def test_files_at_the_wrong_level_are_explained(tmp_path: Path, path: str, message: str) -> None:
    people(tmp_path, {"ann": {"happy": 1}})
    picture(tmp_path / path)
    with pytest.raises(ValueError, match=message):
        FolderFaces(tmp_path, size=8)


def test_an_individual_may_be_called_like_an_emotion(tmp_path: Path) -> None:
    assert FolderFaces(people(tmp_path, {"happy": {"sad": 1}}), size=8).individuals == ["happy"]


def test_unknown_emotions_are_named_with_the_closest_known(tmp_path: Path) -> None:
    people(tmp_path, {"ann": {"happy": 1, "Fearful": 1, "disgust": 1, "xyz": 1}})
    with pytest.raises(ValueError, match="not known emotions") as error:
        FolderFaces(tmp_path, size=8)
    for hint in (
        "'disgust' (did you mean disgusted?)",
        "'Fearful' (did you mean fear?)",
        "'xyz',",
        "calm",
        "emotions=",
    ):
        assert hint in str(error.value)


def test_known_emotions_that_are_not_asked_for_are_left_out_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    people(tmp_path, {"ann": {"happy": 1, "sad": 2, "fear": 1}, "ben": {"calm": 1, "sad": 1}})
    with caplog.at_level("INFO"):
        faces = FolderFaces(tmp_path, size=8, emotions=["sad", "happy"])
    assert faces.emotions == ["sad", "happy"]
    assert len(faces) == 4
    (record,) = caplog.records
    assert "left out, since emotions= does not name them: the folders of fear, calm" in record.getMessage()


def test_an_emotion_that_no_folder_shows_is_an_error_with_the_closest_folder(tmp_path: Path) -> None:
    people(tmp_path, {"ann": {"happy": 1, "sad": 2}})
    with pytest.raises(ValueError, match=r"emotions: no folder in .* shows 'hapy'; did you mean happy\?$"):
        FolderFaces(tmp_path, size=8, emotions=["hapy", "sad"])
    with pytest.raises(ValueError, match=r"shows 'awe'; its folders show happy, sad$"):
        FolderFaces(tmp_path, size=8, emotions=["awe", "sad"])


def test_given_emotions_keep_their_order_and_allow_no_others(tmp_path: Path) -> None:
    people(tmp_path, {"ann": {"joy": 1, "awe": 2}})
    faces = FolderFaces(tmp_path, size=8, emotions=["joy", "bored", "awe"], reserve=True)
    assert faces.emotions == ["joy", "bored", "awe"]
    assert faces.emotion_index.tolist() == [0, 2, 2]
    with pytest.raises(ValueError, match=r"emotions: .* not known emotions: 'awe'"):
        FolderFaces(tmp_path, size=8, emotions=["joy"])


def test_calm_and_contempt_come_after_the_seven(tmp_path: Path) -> None:
    people(tmp_path, {"ann": dict.fromkeys(("calm", "contempt", *EMOTIONS), 1)})
    assert FolderFaces(tmp_path, size=8).emotions == [*EMOTIONS, "contempt", "calm"]


def test_individuals_without_files_are_left_out_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    people(tmp_path, {"ann": {"happy": 1}})
    (tmp_path / "ghost" / "sad").mkdir(parents=True)
    assert FolderFaces(tmp_path, size=8).individuals == ["ann"]
    assert "ghost" in caplog.text


@pytest.mark.parametrize(
    "options",
    [{"size": 0}, {"video_stride": 0}, {"cache_bytes": -1}, {"emotions": "happy"}, {"emotions": ["sad"] * 2}],
)
def test_arguments_out_of_range_are_named(tmp_path: Path, options: dict[str, object]) -> None:
    people(tmp_path, {"ann": {"happy": 1}})
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: "):
        FolderFaces(tmp_path, **{"size": 8, **options})  # type: ignore[arg-type]


# Subsets and training


def test_a_subset_is_a_view_that_keeps_names_and_indices(tmp_path: Path) -> None:
    faces = FolderFaces(people(tmp_path, {"ann": {"happy": 3, "sad": 2}, "ben": {"sad": 2}}), size=8)
    part = faces.subset([6, 1, -3])
    assert part.individuals == faces.individuals
    assert part.emotions == faces.emotions
    assert part.keys == [faces.keys[i] for i in (6, 1, 4)]
    assert part.individual_index.tolist() == [1, 0, 0]
    assert torch.equal(part.frames([2, 0]), faces.frames([4, 6]))
    assert torch.equal(part.subset(torch.tensor([False, True, True])).frames([0]), faces.frames([1]))
    assert faces.subset([5]).available().tolist() == [[False, False], [False, True]]
    assert part.frames([]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("indices", "error"),
    [([3], IndexError), ([-4], IndexError), ([0.5], TypeError), ([[0]], ValueError), ([True, False], ValueError)],
)
def test_bad_indices_are_rejected(indices: list, error: type[Exception]) -> None:
    with pytest.raises(error, match="indices: "):
        as_indices(indices, 3)


def test_training_needs_one_individual_with_two_emotions(tmp_path: Path) -> None:
    faces = FolderFaces(people(tmp_path, {"ann": {"happy": 3}, "ben": {"sad": 2}}), size=8)
    with pytest.raises(ValueError, match=r"two emotions.*ann, ben"):
        check_trainable(faces)
    with pytest.raises(ValueError, match="no frames"):
        check_trainable(faces.subset([]))


def test_what_does_not_contribute_is_logged_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    people(tmp_path, {"ann": {"happy": 1}, "ben": {"sad": 1, "fear": 1}, "cai": {"sad": 1}, "dan": {"sad": 1}})
    faces = FolderFaces(tmp_path, size=8)
    check_trainable(faces.subset(faces.individual_index != 2))
    assert caplog.messages == ["only one emotion, so no change to learn from: ann, dan"]
    caplog.clear()
    check_trainable(faces.subset(faces.individual_index == 1))
    assert len(caplog.messages) == 1
    assert "only one individual" in caplog.text


# Splits


class Named(FrameDataset):
    """Frames that are names only: `individual/emotion/file`."""

    def __init__(self, keys: list[str]) -> None:
        self.keys = keys
        self.individuals = sorted({key.split("/")[0] for key in keys})
        self.emotions = sorted({key.split("/")[1] for key in keys})
        self.individual_index = torch.tensor([self.individuals.index(key.split("/")[0]) for key in keys])
        self.emotion_index = torch.tensor([self.emotions.index(key.split("/")[1]) for key in keys])

    def frames(self, indices: object) -> torch.Tensor:
        raise NotImplementedError


def named(individuals: int, count: int) -> list[str]:
    return [f"p{n}/{emotion}/{i}" for n in range(individuals) for emotion in ("happy", "sad") for i in range(count)]


def test_splitting_by_individual_holds_out_whole_individuals() -> None:
    keys = named(10, 4)
    train, held = sides(Named(keys), by="individual", fraction=0.3)
    assert len({key.split("/")[0] for key in held}) == 3
    assert not {key.split("/")[0] for key in held} & {key.split("/")[0] for key in train}
    for individuals in (2, 3):
        for fraction in (0.01, 0.99):
            assert all(sides(Named(named(individuals, 1)), by="individual", fraction=fraction))


def test_splitting_by_frame_holds_out_about_the_fraction_of_every_group() -> None:
    dataset = Named(named(5, 400))
    train, held = split(dataset, by="frame", fraction=0.2)
    assert train.available().all()
    per_group = torch.stack([held.emotion_index, held.individual_index]).unique(dim=1, return_counts=True)[1]
    assert len(per_group) == 10
    assert bool(((per_group > 50) & (per_group < 110)).all())


@pytest.mark.parametrize("seed", range(5))
def test_splitting_by_frame_keeps_every_group_in_training(seed: int) -> None:
    keys = [*named(6, 2), "lone/happy/0"]
    train, held = split(Named(keys), by="frame", fraction=0.9, seed=seed)
    assert torch.equal(train.available(), Named(keys).available())
    assert len(held)
    assert "lone/happy/0" in train.keys


@pytest.mark.parametrize("by", ["individual", "frame"])
def test_splits_depend_on_seed_and_names_only(by: str) -> None:
    keys = named(8, 9)
    first = sides(Named(keys), by=by, seed=3)
    assert sides(Named(keys[::-1]), by=by, seed=3) == first
    assert sides(Named(keys), by=by, seed=4) != first


def test_splits_are_the_same_on_every_machine() -> None:
    _, held = split(Named(named(8, 1)), by="individual", fraction=0.25, seed=0)
    assert held.keys == ["p2/happy/0", "p2/sad/0", "p5/happy/0", "p5/sad/0"]
    _, held = split(Named(named(2, 6)), by="frame", fraction=0.25, seed=0)
    assert held.keys == ["p0/happy/2", "p0/sad/4", "p0/sad/5", "p1/happy/1", "p1/happy/2", "p1/sad/2"]


def test_splits_do_not_depend_on_how_accents_are_composed() -> None:
    composed, decomposed = (
        split(Named([f"{name}/sad/{i}" for i in range(30)]), by="frame")[1] for name in ("Ren\u00e9", "Rene\u0301")
    )
    assert [key.split("/")[-1] for key in composed.keys] == [key.split("/")[-1] for key in decomposed.keys]


def test_new_files_move_no_others() -> None:
    keys = named(8, 9)
    more = [*keys, *(f"p{n}/{emotion}/new{i}" for n in range(8) for emotion in ("fear", "sad") for i in range(5))]
    for by in ("individual", "frame"):
        for before, after in zip(sides(Named(keys), by=by), sides(Named(more), by=by), strict=True):
            assert before == after & set(keys)


def test_a_new_individual_moves_at_most_one_other() -> None:
    for count in range(2, 20):
        before, after = (sides(Named(named(n, 1)), by="individual")[1] for n in (count, count + 1))
        moved = {key.split("/")[0] for key in before ^ after} - {f"p{count}"}
        assert len(moved) <= 1


def test_impossible_splits_are_rejected() -> None:
    for fraction in (0, 1, -0.5):
        with pytest.raises(ValueError, match="fraction"):
            split(Named(named(4, 4)), fraction=fraction)
    with pytest.raises(ValueError, match="by: "):
        split(Named(named(4, 4)), by="emotion")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two individuals"):
        split(Named(named(1, 4)), by="individual")
    with pytest.raises(ValueError, match=r"of 8 frames holds out none, since .* has one; add frames$"):
        split(Named(named(4, 1)), by="frame", fraction=0.9)


def test_a_fraction_that_holds_out_nothing_is_answered_with_one_that_does() -> None:
    faces = Named(named(2, 2))
    with pytest.raises(ValueError, match=r"needs two frames to spare one; take fraction=") as error:
        split(faces, by="frame", fraction=0.001)
    (fraction,) = re.findall(r"fraction=([\d.]+) or more", str(error.value))
    assert len(split(faces, by="frame", fraction=float(fraction))[1]) >= 1


# Real stills


@pytest.mark.skipif(not MEAD_STILLS.is_dir(), reason=f"no real stills at {MEAD_STILLS}")
def test_all_real_stills_are_read() -> None:
    faces = FolderFaces(MEAD_STILLS, size=64)
    assert faces.individuals == [f"actor_{letter}" for letter in "abcdefg"]
    assert faces.emotions == list(EMOTIONS)
    counts = torch.zeros(7, 7, dtype=torch.int64)
    counts.index_put_((faces.individual_index, faces.emotion_index), torch.tensor(1), accumulate=True)
    assert counts.tolist() == [
        [1, 17, 1, 0, 3, 0, 7],
        [10, 0, 33, 3, 4, 0, 7],
        [0, 0, 0, 6, 0, 7, 0],
        [0, 0, 0, 19, 0, 2, 25],
        [26, 0, 0, 12, 0, 0, 0],
        [0, 0, 0, 0, 34, 0, 0],
        [0, 0, 0, 0, 0, 22, 4],
    ]
    assert int(counts.sum()) == len(faces) == 243
    frames = faces.frames(range(243))
    assert float(frames.min()) >= -1
    assert float(frames.max()) <= 1
    check_trainable(faces)
    assert all(len(part) for by in ("individual", "frame") for part in split(faces, by=by))
