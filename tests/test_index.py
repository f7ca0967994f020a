"""The index of a folder of faces survives kills and full disks, and opens a folder without decoding it."""

from __future__ import annotations

import os
import time

import pytest
import torch

from pcmecl_fast.data import folder as folder_module
from pcmecl_fast.data import plain_folder
from pcmecl_fast.data.folder import FolderFaces
from pcmecl_fast.data.index import (
    INDEX,
    Entry,
    IndexWriter,
    in_order,
    mark_finished,
    packed_pts,
    read_index,
    rewrite_index,
    unpacked_pts,
    write_index,
)
from tests.test_folder import needs_av, people, picture, video


def entry(n: int, **known) -> Entry:
    return Entry(f"ann/happy/{n}.mp4", "ann", "happy", 3, **known)


def read(path):
    prepared, entries = read_index(path)
    return prepared, list(entries)


def test_entries_come_back_as_they_were_written(tmp_path):
    known = {"bytes": 7, "pts": [0, 3, 4], "rate": "30000/1001", "number": 0, "track": {"at": [1]}, "broken": "why"}
    entries = [entry(1), entry(2, **known), Entry("b\udce9/sad/x.png", "b\udce9", "sad", 1)]
    write_index(tmp_path / INDEX, entries, {"layout": "mead"})
    assert read(tmp_path / INDEX) == ({"layout": "mead"}, entries)


def test_what_is_appended_is_whole_after_a_kill_at_any_byte(tmp_path):
    path = tmp_path / INDEX
    writer = IndexWriter(path, None)
    for n in range(3):
        writer.append(entry(n))
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == 10]
    for cut in range(ends[0] + 1, len(whole), 7):
        path.write_bytes(whole[:cut])
        kept = sum(end < cut for end in ends) - 1
        assert read(path)[1] == [entry(n) for n in range(kept)]
        writer = IndexWriter(path, None)
        writer.append(entry(9))
        writer.close()
        assert read(path)[1] == [*(entry(n) for n in range(kept)), entry(9)]


def test_a_full_disk_leaves_no_half_line(tmp_path):
    class Full:
        def __init__(self, file):
            self.file = file

        def tell(self):
            return self.file.tell()

        def write(self, line):
            return self.file.write(line[:10])

    path = tmp_path / INDEX
    writer = IndexWriter(path, None)
    writer.append(entry(1))
    writer._file = Full(writer._file)
    with pytest.raises(OSError, match=r"No space left on device: .*index\.jsonl"):
        writer.append(entry(2))
    assert read(path)[1] == [entry(1)]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "its first line is not that of an index"),
        (
            '{"pcmecl_fast": "index", "version": 99, "prepared": null}\n',
            "written by another version of pcmecl_fast",
        ),
        ('{"pcmecl_fast": "index", "version": 1, "prepared": null}\n{"file": 3}\n', "line 2 is damaged"),
        ('{"pcmecl_fast": "index", "version": 1, "prepared": null}\nx\n', "line 2 is damaged"),
    ],
)
def test_a_damaged_index_is_named_with_its_line(tmp_path, lines, said):
    (tmp_path / INDEX).write_text(lines)
    with pytest.raises(ValueError, match=said):
        FolderFaces(tmp_path, size=8)


def test_times_are_packed_where_they_are_even():
    for pts in ([0, 512, 1024], [5, 6], [7], [0, 1, 3]):
        packed = packed_pts(pts)
        assert list(unpacked_pts(packed, len(pts))) == pts
        assert isinstance(packed, list) == (pts == [0, 1, 3])


def test_a_prepared_folder_opens_without_a_file_being_touched(tmp_path, monkeypatch):
    entries = [Entry(f"p{n}/{e}/{c}.mp4", f"p{n}", e, 5, "video", 100, pts={"first": 0, "step": 1}, checksum="c")
               for n in range(3) for e in ("neutral", "happy") for c in range(2)]  # fmt: skip
    write_index(tmp_path / INDEX, entries, {"finished": True})
    faces = FolderFaces(tmp_path, size=16)  # there are no such files
    assert len(faces) == 60
    assert faces.individuals == ["p0", "p1", "p2"]
    assert faces.keys[7] == "p0/neutral/1.mp4#2"
    assert faces.available().all()
    clips = faces.clips()
    assert clips.names[1] == "p0/neutral/1.mp4"
    assert torch.equal(clips.index, torch.arange(12).repeat_interleave(5))
    assert len(set(faces.stamps())) == 1  # by their content, wherever the folder lies


def test_what_could_not_be_prepared_is_no_part_of_the_data_set(tmp_path):
    write_index(tmp_path / INDEX, [entry(1), entry(2, broken="empty")], {"finished": True})
    assert len(FolderFaces(tmp_path, size=16)) == 3


def test_an_unfinished_index_opens_in_natural_order(tmp_path):
    names = ("p10/sad/2", "p2/sad/10", "p2/happy/1", "p2/sad/9")
    entries = [Entry(f"{n}.mp4", n.split("/")[0], n.split("/")[1], 1, "video", 9, pts=[0]) for n in names]
    write_index(tmp_path / INDEX, entries, {})
    assert FolderFaces(tmp_path, size=16).clips().names == [f"{names[i]}.mp4" for i in (2, 3, 1, 0)]


def test_an_index_is_put_in_order_with_its_tracks(tmp_path):
    path = tmp_path / INDEX
    write_index(path, [entry(10, track={"at": [0]}), entry(9), entry(2)], {"layout": "mead"})
    left = rewrite_index(path, {"layout": "mead"}, keep=lambda e: e.file != "ann/happy/9.mp4", order=in_order)
    assert [e.file for e in left] == ["ann/happy/2.mp4", "ann/happy/10.mp4"]
    assert read(path)[1] == [entry(2), entry(10, track={"at": [0]})]
    mark_finished(path)
    assert read(path) == ({"layout": "mead", "finished": True}, [entry(2), entry(10, track={"at": [0]})])


# A folder without an index


@pytest.fixture
def looked_at(monkeypatch):
    """The files that are decoded to be indexed; whatever time it takes, the index is kept."""
    seen: list[str] = []
    look = plain_folder._look

    def counting(root, file):
        seen.append(file.path.name)
        return look(root, file)

    monkeypatch.setattr(plain_folder, "_look", counting)
    monkeypatch.setattr(plain_folder, "_WORTH_KEEPING", 0)
    return seen


@needs_av
def test_a_folder_is_indexed_once_and_later_only_what_is_new(tmp_path, looked_at):
    people(tmp_path, {"ann": {"happy": 2, "sad": 1}})
    video(tmp_path / "ann/sad/clip.mp4", frames=4)
    first = FolderFaces(tmp_path, size=8)
    assert len(looked_at) == 4
    again = FolderFaces(tmp_path, size=8)
    assert len(looked_at) == 4
    assert (again.keys, again.labels_hash()) == (first.keys, first.labels_hash())
    assert torch.equal(again.frames(range(7)), first.frames(range(7)))
    picture(tmp_path / "ann/sad/9.png")
    time.sleep(0.01)
    picture(tmp_path / "ann/happy/1.png", seed=5)
    FolderFaces(tmp_path, size=8)
    assert sorted(looked_at[4:]) == ["1.png", "9.png"]


def test_other_emotions_keep_what_was_seen_of_the_first(tmp_path, looked_at):
    people(tmp_path, {"ann": {"happy": 2, "sad": 2}})
    FolderFaces(tmp_path, size=8, emotions=["sad"])
    FolderFaces(tmp_path, size=8, emotions=["happy"])
    FolderFaces(tmp_path, size=8)
    assert len(looked_at) == 4


def test_a_folder_that_cannot_be_written_is_indexed_all_the_same(tmp_path, looked_at, monkeypatch, caplog):
    people(tmp_path, {"ann": {"happy": 2}})

    def refuse(*_):
        raise PermissionError(13, "Permission denied", ".index.jsonl")

    monkeypatch.setattr(plain_folder, "write_index", refuse)
    with caplog.at_level("INFO"):
        assert len(FolderFaces(tmp_path, size=8)) == 2
    assert "is not kept" in caplog.text


def test_a_broken_file_is_looked_at_again(tmp_path, looked_at):
    people(tmp_path, {"ann": {"happy": 1}})
    (tmp_path / "ann/happy/2.png").write_bytes(b"x")
    for _ in range(2):
        FolderFaces(tmp_path, size=8, skip_broken=True)
    assert looked_at.count("2.png") == 2


def test_a_small_folder_gets_no_index(tmp_path):
    people(tmp_path, {"ann": {"happy": 2}})
    FolderFaces(tmp_path, size=8)
    assert os.listdir(tmp_path) == ["ann"]


# Frames in memory


def test_frames_are_decoded_once_as_far_as_memory_goes(tmp_path, monkeypatch):
    people(tmp_path, {"ann": {"happy": 4}})
    faces = FolderFaces(tmp_path, size=8, cache_bytes=2 * 3 * 8 * 8)
    decoded: list[str] = []
    decode = folder_module.decode

    def counting(path, *arguments):
        decoded.append(path.name)
        return decode(path, *arguments)

    monkeypatch.setattr(folder_module, "decode", counting)
    once = faces.frames([3, 0, 1])
    assert torch.equal(faces.frames([3, 0, 1]), once)
    assert sorted(decoded) == ["1.png", "2.png", "4.png", "4.png"]
