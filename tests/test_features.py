"""The feature store: a tower sees every frame once, and features are never out of date."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from features import unit_features
from PIL import Image

from pcmecl_fast.data.base import FrameDataset
from pcmecl_fast.data.features import FeatureStore, LiveFeatures, individual_conditions
from pcmecl_fast.data.folder import FolderFaces
from pcmecl_fast.files import save_tensors
from pcmecl_fast.synthetic import SyntheticFaces

EVERY = torch.arange


class Counted(FrameDataset):
    """A data set that counts how often its frames are read, and raises at a given one."""

    def __init__(self, faces, die_at=None):
        self.faces, self.read, self.die_at = faces, 0, die_at
        self.individuals, self.emotions, self.keys = faces.individuals, faces.emotions, faces.keys
        self.individual_index, self.emotion_index = faces.individual_index, faces.emotion_index

    def frames(self, indices):
        self.read += len(indices)
        if self.die_at is not None and self.read > self.die_at:
            raise KeyboardInterrupt
        return self.faces.frames(indices)

    def stamps(self):
        return self.faces.stamps()


def shards(root):
    return sorted(Path(root).glob("*/*.safetensors"))


def pictures(root, count=6):
    for i in range(count):
        path = Path(root) / f"person-{i % 2}" / ("happy" if i % 3 else "sad") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 20 + 30 * i).convert("RGB").save(path)
    return FolderFaces(root, size=32)


def test_it_returns_the_towers_features(clip, tmp_path, few_faces):
    faces = few_faces()
    stored = FeatureStore(tmp_path, clip)(faces)
    expected = unit_features(clip, faces)
    assert len(stored) == len(faces)
    assert torch.equal(stored[EVERY(len(faces))], expected)
    index = torch.tensor([[3, 0], [0, 5]])
    assert torch.equal(stored[index], expected[index])
    assert stored[EVERY(0)].shape == (0, clip.embed_dim)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_types_take_half_the_disk_and_are_returned_in_float32(clip, tmp_path, few_faces, dtype, error):
    faces = few_faces()
    stored = FeatureStore(tmp_path, clip, dtype=dtype)(faces)[EVERY(len(faces))]
    assert stored.dtype == torch.float32
    torch.testing.assert_close(stored, unit_features(clip, faces), rtol=0, atol=error)


def test_no_frame_is_seen_twice(clip, tmp_path, few_faces):
    faces = Counted(few_faces())
    FeatureStore(tmp_path, clip)(faces)
    assert faces.read == len(faces)
    FeatureStore(tmp_path, clip)(faces)
    FeatureStore(tmp_path, clip)(faces.subset([2, 7]))
    assert faces.read == len(faces)


def test_two_data_sets_share_a_store(clip, tmp_path, few_faces):
    store = FeatureStore(tmp_path, clip)
    first, second = few_faces(seed=0), few_faces(seed=1)
    assert torch.equal(store(first)[EVERY(len(first))], unit_features(clip, first))
    assert torch.equal(store(second)[EVERY(len(second))], unit_features(clip, second))


def test_another_tower_or_dtype_has_features_of_its_own(clip, other_clip, tmp_path, few_faces):
    faces = few_faces()
    FeatureStore(tmp_path, clip)(faces)
    FeatureStore(tmp_path, clip, dtype=torch.float16)(faces)
    other = FeatureStore(tmp_path, other_clip)(faces)
    assert torch.equal(other[EVERY(len(faces))], unit_features(other_clip, faces))
    assert len({path.parent for path in shards(tmp_path)}) == 3


def test_a_fill_interrupted_twice_equals_an_uninterrupted_one(clip, tmp_path):
    faces = SyntheticFaces(4, clips=1, frames_per_clip=2, size=32)
    for die_at in (20, 17):
        stopped = Counted(faces, die_at=die_at)
        with pytest.raises(KeyboardInterrupt):
            FeatureStore(tmp_path / "twice", clip, shard_frames=8)(stopped, batch_size=4)
    rest = Counted(faces)
    twice = FeatureStore(tmp_path / "twice", clip, shard_frames=8)(rest, batch_size=4)
    once = FeatureStore(tmp_path / "once", clip)(faces, batch_size=4)
    assert rest.read == len(faces) - 32
    assert torch.equal(twice[EVERY(len(faces))], once[EVERY(len(faces))])


def test_a_killed_fill_resumes_where_it_stopped(clip, tmp_path):
    code = (
        "import sys, torch\n"
        "from pcmecl_fast import load_clip\n"
        "from pcmecl_fast.data.features import FeatureStore\n"
        "from pcmecl_fast.synthetic import SyntheticFaces\n"
        "faces = SyntheticFaces(40, clips=1, frames_per_clip=4, size=64)\n"
        "FeatureStore(sys.argv[1], load_clip(), shard_frames=16)(faces, batch_size=16)\n"
    )
    for _ in range(2):
        before = len(shards(tmp_path))
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL)
        while len(shards(tmp_path)) < before + 2:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    faces = SyntheticFaces(40, clips=1, frames_per_clip=4, size=64)
    stored = FeatureStore(tmp_path, clip, shard_frames=16)(faces, batch_size=16)
    torch.testing.assert_close(stored[EVERY(len(faces))], unit_features(clip, faces), rtol=0, atol=1e-5)


def test_a_touched_picture_is_recomputed(clip, tmp_path):
    faces = pictures(tmp_path / "faces")
    FeatureStore(tmp_path / "store", clip)(faces)
    path = tmp_path / "faces" / faces.keys[2]
    Image.effect_noise((32, 32), 99).convert("RGB").save(path)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    again = Counted(FolderFaces(tmp_path / "faces", size=32))
    stored = FeatureStore(tmp_path / "store", clip)(again)
    assert again.read == 1
    torch.testing.assert_close(stored[EVERY(6)], unit_features(clip, again.faces), rtol=0, atol=1e-6)


def test_a_picture_that_changes_under_an_open_data_set_is_an_error(clip, tmp_path):
    pictures(tmp_path / "faces")
    faces = FolderFaces(tmp_path / "faces", size=32, cache=False)
    path = tmp_path / "faces" / faces.keys[2]
    os.utime(path, ns=(0, 1))
    with pytest.raises(ValueError, match="changed since the data set was opened; open it again"):
        FeatureStore(tmp_path / "store", clip)(faces)


def test_a_truncated_shard_is_recomputed(clip, tmp_path, few_faces, caplog):
    faces = few_faces()
    FeatureStore(tmp_path, clip, shard_frames=6)(faces, batch_size=6)
    broken = shards(tmp_path)[1]
    broken.write_bytes(broken.read_bytes()[:-7])
    again = Counted(faces)
    stored = FeatureStore(tmp_path, clip)(again, batch_size=6)
    assert again.read == 6
    assert torch.equal(stored[EVERY(len(faces))], unit_features(clip, faces, batch_size=6))
    assert caplog.text.count("recomputing a broken shard of features") == 1
    assert broken not in shards(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"features": torch.ones(6, 3), "frames": torch.zeros(6, 16, dtype=torch.uint8)},
        {"features": torch.ones(6, 3)},
    ],
    ids=["other sizes", "a tensor short"],
)
def test_a_shard_of_something_else_is_computed_again(clip, tmp_path, few_faces, tensors):
    faces = few_faces()
    expected = FeatureStore(tmp_path, clip)(faces)[EVERY(len(faces))]
    [shard] = shards(tmp_path)
    save_tensors(shard, "features", tensors, {})
    assert torch.equal(FeatureStore(tmp_path, clip)(faces)[EVERY(len(faces))], expected)
    assert shard not in shards(tmp_path)


def test_two_processes_read_while_one_fills(clip, tmp_path):
    code = (
        "import sys, torch\n"
        "from pcmecl_fast import load_clip\n"
        "from pcmecl_fast.data.features import FeatureStore, LiveFeatures\n"
        "from pcmecl_fast.synthetic import SyntheticFaces\n"
        "torch.set_num_threads(1)\n"
        "clip, many = load_clip(), sys.argv[2] == 'fill'\n"
        "faces = SyntheticFaces(12, clips=1, frames_per_clip=4, size=64)\n"
        "part = faces if many else faces.subset(torch.arange(64))\n"
        "for _ in range(1 if many else 8):\n"
        "    stored = FeatureStore(sys.argv[1], clip, shard_frames=16)(part, batch_size=16)\n"
        "    got = stored[torch.arange(len(part))]\n"
        "    torch.testing.assert_close(got, LiveFeatures(clip, part)[torch.arange(len(part))], rtol=0, atol=1e-5)\n"
    )
    FeatureStore(tmp_path, clip, shard_frames=16)(
        SyntheticFaces(12, clips=1, frames_per_clip=4, size=64).subset(EVERY(64)), batch_size=16
    )
    roles = ("fill", "read", "read")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), role], env=environment, stderr=subprocess.PIPE)
        for role in roles
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert len(shards(tmp_path)) == 12 * 7 * 4 // 16


def test_live_features_are_those_of_the_store(clip, few_faces):
    faces = few_faces()
    live, expected = LiveFeatures(clip, faces), unit_features(clip, faces)
    index = torch.tensor([[3, 0], [0, 5]])
    torch.testing.assert_close(live[index], expected[index], rtol=0, atol=1e-5)
    assert len(live) == len(faces)
    torch.testing.assert_close(
        individual_conditions(live, faces.individual_index, 3),
        individual_conditions(expected, faces.individual_index, 3),
        rtol=0,
        atol=1e-5,
    )


def test_the_default_stamp_is_the_pixels(few_faces):
    faces = few_faces()
    plain = FrameDataset.stamps(faces)
    assert plain == FrameDataset.stamps(few_faces())
    assert len(set(plain)) == len(faces)


def test_bad_arguments_are_named(clip, tmp_path):
    with pytest.raises(ValueError, match=r"dtype: takes one of .*, got torch.float64"):
        FeatureStore(tmp_path, clip, dtype=torch.float64)
    with pytest.raises(ValueError, match="shard_frames: takes 1 or more, got 0"):
        FeatureStore(tmp_path, clip, shard_frames=0)
