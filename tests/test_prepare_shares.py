"""A data set prepared in shares is the one that is prepared at once: nothing is missing, done twice, or another's."""

import os
import shutil
import subprocess
import sys

import pytest
from test_prepare import content, dotted, entries_of, last_line, prepare

from pcmecl_fast.data.folder import FolderFaces
from pcmecl_fast.data.index import INDEX, read_index
from pcmecl_fast.data.shares import Share, shares_in
from tests.test_folder import picture


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Two people, three emotions, videos of different lengths and a few pictures, one of them broken."""
    root = tmp_path_factory.mktemp("shares") / "raw"
    for who in ("ann", "ben"):
        for e, emotion in enumerate(("happy", "sad", "neutral")):
            for n in range(1 + e):
                dotted(root / who / emotion / f"{n}.mp4", 4 + 3 * n + e)
    for n in (2, 10):
        picture(root / f"ben/happy/photo-{n}.jpg", size=(64, 64), seed=n)
    (root / "ann/sad/torn.mp4").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def at_once(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("at-once") / "faces"
    assert prepare(raw, out, "--skip-broken") == 0
    return out


def share(raw, out, which, *options):
    return prepare(raw, out, "--skip-broken", "--share", which, *options)


def clips(folder):
    return {name: file for name, file in content(folder).items() if name.count("/") == 2}


def same_data(one, other):
    one, other = FolderFaces(one, size=32), FolderFaces(other, size=32)
    return (one.keys, one.stamps(), one.labels_hash()) == (other.keys, other.stamps(), other.labels_hash())


# One data set


@pytest.mark.parametrize("of", [1, 3])
def test_shares_in_one_folder_are_what_one_command_makes(raw, at_once, tmp_path, of, caplog):
    for number in range(of, 0, -1):
        assert share(raw, tmp_path, f"{number}/{of}") == 0
    assert clips(tmp_path) == clips(at_once)
    assert same_data(tmp_path, at_once)
    assert "are missing" not in caplog.text.split("share 1/")[-1]
    files = [entry.file for each in shares_in(tmp_path) for entry in read_index(tmp_path / each.index)[1]]
    assert sorted(files) == sorted(entry.file for entry in entries_of(at_once))
    assert not (tmp_path / INDEX).exists()


def test_the_report_shows_all_shares(raw, at_once, tmp_path):
    for number in (2, 1):
        assert share(raw, tmp_path, f"{number}/2") == 0
    assert (tmp_path / "report.html").read_bytes() == (at_once / "report.html").read_bytes()


def test_shares_in_folders_of_their_own_may_be_copied_into_one(raw, at_once, tmp_path):
    for number in (1, 2, 3):
        assert share(raw, tmp_path / str(number), f"{number}/3") == 0
        shutil.copytree(tmp_path / str(number), tmp_path / "faces", dirs_exist_ok=True)
    assert clips(tmp_path / "faces") == clips(at_once)
    assert same_data(tmp_path / "faces", at_once)


def test_shares_at_the_same_time_do_not_disturb_each_other(raw, at_once, tmp_path):
    words = ["prepare", "--data", str(raw), "--out", str(tmp_path / "faces"), "--crop", "centre", "--size", "64"]
    words += ["--skip-broken", "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "pcmecl_fast", *words, "--share", f"{number}/2"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for number in (1, 2)
    ]
    for process in processes:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors.decode()
    assert clips(tmp_path / "faces") == clips(at_once)
    assert same_data(tmp_path / "faces", at_once)
    assert (tmp_path / "faces/report.html").read_bytes() == (at_once / "report.html").read_bytes()


def test_torchruns_processes_take_a_share_each(raw, at_once, tmp_path, monkeypatch):
    from pcmecl_fast.prepare import run_prepare
    from pcmecl_fast.train.config import PrepareConfig

    for number in range(2):
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        config = PrepareConfig(data=raw, out=tmp_path / "faces", crop="centre", size=64, skip_broken=True)
        assert run_prepare(config)["share"] == f"{number + 1}/2"
    assert same_data(tmp_path / "faces", at_once)


@pytest.mark.parametrize("of", [1, 2, 3, 7, 40])
def test_every_recording_is_in_one_share_and_shares_are_balanced(of):
    sizes = [(n * 7919) % 1000 for n in range(200)]
    parts = [Share(number, of)(sizes) for number in range(1, of + 1)]
    assert [i for part in parts for i in part] == list(range(200))
    loads = [sum(sizes[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= 2 * max(sizes)
    assert [i for number in range(1, of + 1) for i in Share(number, of)([0, 0, 0])] == [0, 1, 2]
    assert not any(Share(number, of)([]) for number in range(1, of + 1))


# Going on


def test_a_share_given_again_does_nothing(raw, tmp_path):
    assert share(raw, tmp_path, "1/2") == 0
    before = content(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
    assert share(raw, tmp_path, "1/2") == 0
    assert content(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_share_that_was_ended_goes_on_and_leaves_the_others_alone(raw, at_once, tmp_path):
    for number in (1, 2):
        assert share(raw, tmp_path, f"{number}/2") == 0
    index = tmp_path / Share(1, 2).index
    lines = index.read_text().splitlines(keepends=True)
    index.write_text(lines[0].replace(', "finished": true', "") + "".join(lines[1:3]) + lines[3][:30])
    folder = tmp_path / "ann/happy"
    own, another = folder / ".0.mp4.0123456789ab.unfinished", folder / ".9.mp4.0123456789ab.unfinished"
    (folder / "0.mp4").unlink()
    own.touch()
    another.touch()  # what the other share is writing
    assert share(raw, tmp_path, "1/2") == 0
    assert not own.exists()
    assert another.exists()
    another.unlink()
    assert clips(tmp_path) == clips(at_once)
    assert index.read_text() == "".join(lines)


def test_a_share_at_work_is_not_started_twice(raw, tmp_path, capsys):
    from filelock import FileLock

    assert share(raw, tmp_path, "1/2") == 0
    place = tmp_path / ".index-00001-of-00002"
    place.mkdir(exist_ok=True)
    with FileLock(place / ".lock"):
        assert share(raw, tmp_path, "1/2") == 1
        assert "is in use" in last_line(capsys)
        assert share(raw, tmp_path, "2/2") == 0


def test_when_recordings_are_added_every_share_is_run_again(raw, tmp_path, capsys):
    shutil.copytree(raw, tmp_path / "raw")
    for number in (1, 2):
        assert share(tmp_path / "raw", tmp_path / "faces", f"{number}/2") == 0
    for n in range(4):
        dotted(tmp_path / f"raw/zoe/happy/{n}.mp4", 30)
    assert share(tmp_path / "raw", tmp_path / "faces", "2/2") == 0
    with pytest.raises(ValueError, match=r"shares 1/2 and 2/2 are of different lists of recordings.*run every share"):
        FolderFaces(tmp_path / "faces", size=32)
    assert share(tmp_path / "raw", tmp_path / "faces", "1/2") == 0
    assert prepare(tmp_path / "raw", tmp_path / "once", "--skip-broken") == 0
    assert clips(tmp_path / "faces") == clips(tmp_path / "once")
    assert same_data(tmp_path / "faces", tmp_path / "once")


def test_other_options_are_refused_until_every_share_has_them(raw, tmp_path, capsys):
    for number in (1, 2):
        assert share(raw, tmp_path, f"{number}/2") == 0
    assert share(raw, tmp_path, "1/2", "--size", "32") == 1
    assert "prepared with other options: --size was 64, is 32" in last_line(capsys)
    assert share(raw, tmp_path, "1/2", "--size", "32", "--overwrite") == 0
    with pytest.raises(ValueError, match="shares 1/2 and 2/2 were prepared with other options: --size"):
        FolderFaces(tmp_path, size=32)


# What is missing


def test_missing_and_unfinished_shares_are_named_when_the_folder_is_opened(raw, tmp_path, caplog):
    for number in (1, 3, 5):
        assert share(raw, tmp_path, f"{number}/6") == 0
    index = tmp_path / Share(3, 6).index
    index.write_text(index.read_text().replace(', "finished": true', ""))
    faces = FolderFaces(tmp_path, size=32)
    told = "shares 2, 4 and 6 of 6 are missing; share 3 of 6 is not finished; `pcmecl-fast prepare --share 2/6` goes on"
    assert told in caplog.text
    assert 0 < len(faces.clips().names) < 14
    assert not faces.prepared["finished"]


def test_a_share_says_what_the_others_lack(raw, tmp_path, capsys):
    assert share(raw, tmp_path, "1/2") == 0
    assert "share 2 of 2 is missing" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert share(raw, tmp_path, "2/2") == 0
    assert "all are there" in capsys.readouterr().out


# Bad input


@pytest.mark.parametrize(
    "text", ["0/4", "5/4", "three", "3", "3/", "/4", "-1/4", "1.5/4", "3/16/2", "", "1/0", "1/999999"]
)
def test_a_share_that_is_none_is_told_how_to_write_it(raw, tmp_path, capsys, text):
    assert share(raw, tmp_path / "faces", text) == 1
    assert f"--share: takes a share and how many there are, 1/16 to 16/16, got {text!r}" in last_line(capsys)
    assert not (tmp_path / "faces").exists()


def test_shares_of_other_numbers_are_not_mixed(raw, tmp_path, capsys):
    assert share(raw, tmp_path / "a", "1/2") == 0
    assert share(raw, tmp_path / "a", "1/3") == 1
    assert "is prepared in 2 shares, and not share 1/3; --share 1/2 and so on go on with it" in last_line(capsys)
    assert prepare(raw, tmp_path / "a", "--skip-broken") == 1
    assert "is prepared in 2 shares, and not all at once" in last_line(capsys)
    assert share(raw, tmp_path / "b", "1/3") == 0
    shutil.copytree(tmp_path / "b", tmp_path / "a", dirs_exist_ok=True)
    with pytest.raises(
        ValueError, match=r"holds shares of 2 and 3: they overlap; keep .* \(index-\*-of-00003\.jsonl\)"
    ):
        FolderFaces(tmp_path / "a", size=32)


def test_a_folder_that_was_prepared_at_once_takes_no_shares(raw, at_once, tmp_path, capsys):
    shutil.copytree(at_once, tmp_path / "faces")
    assert share(raw, tmp_path / "faces", "1/2") == 1
    assert "was prepared at once; without --share the same command goes on" in last_line(capsys)
    shutil.copy(at_once / INDEX, tmp_path / "faces" / Share(1, 2).index)
    with pytest.raises(ValueError, match=r"holds index\.jsonl and index-00001-of-00002\.jsonl"):
        FolderFaces(tmp_path / "faces", size=32)


def test_a_damaged_index_of_a_share_is_named(raw, tmp_path):
    assert share(raw, tmp_path, "1/2") == 0
    assert share(raw, tmp_path, "2/2") == 0
    (tmp_path / Share(2, 2).index).write_text("{}")
    with pytest.raises(ValueError, match=r"index-00002-of-00002\.jsonl is damaged"):
        FolderFaces(tmp_path, size=32)
