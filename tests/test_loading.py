"""Frames are read ahead by any number of workers, and nothing but the time depends on them."""

from __future__ import annotations

import pytest
import torch

from pcmecl_fast import load_clip
from pcmecl_fast.data.features import FeatureStore
from pcmecl_fast.data.folder import FolderFaces
from pcmecl_fast.data.loading import read_ahead
from pcmecl_fast.run import run_train
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.train.config import TrainConfig
from tests.test_folder import needs_av, people, video

WORKERS = (0, 1, 3)


def by_plan(dataset, plans, workers):
    return list(read_ahead(dataset, plans, lambda plan: plan, workers=workers))


@needs_av
def test_the_same_frames_in_the_same_order_for_any_number_of_workers(tmp_path):
    people(tmp_path, {"ann": {"happy": 3, "sad": 2}})
    video(tmp_path / "ann/sad/clip.mp4", frames=20)
    random = torch.Generator().manual_seed(0)
    plans = [torch.randint(25, (7,), generator=random) for _ in range(9)]
    expected = [(plan, FolderFaces(tmp_path, size=16).frames(plan)) for plan in plans]
    for workers in WORKERS:
        for cache in (True, False):
            read = by_plan(FolderFaces(tmp_path, size=16, cache=cache), plans, workers)
            assert len(read) == 9
            for (plan, frames), (wanted, seen) in zip(read, expected, strict=True):
                assert torch.equal(plan, wanted)
                assert torch.equal(frames, seen)


def test_frames_that_are_no_bytes_are_read_ahead_too():
    faces = SyntheticFaces(2, clips=1, frames_per_clip=2, size=32)
    ((_, read),) = by_plan(faces, [torch.tensor([3, 1])], 1)
    assert torch.equal(read, faces.frames([3, 1]))


def test_workers_share_what_they_have_decoded(tmp_path):
    people(tmp_path, {"ann": {"happy": 6}})
    faces = FolderFaces(tmp_path, size=8)
    by_plan(faces, [torch.arange(6)], 1)
    for path in (tmp_path / "ann/happy").iterdir():
        path.unlink()
    assert faces.frames(range(6)).shape == (6, 3, 8, 8)


@pytest.mark.parametrize("workers", WORKERS)
def test_an_error_comes_at_its_plan_and_on_one_line(tmp_path, workers):
    people(tmp_path, {"ann": {"happy": 4}})
    faces = FolderFaces(tmp_path, size=8, cache=False)
    (tmp_path / "ann/happy/3.png").write_bytes(b"")
    read = read_ahead(faces, [torch.tensor([0, 1]), torch.tensor([2])], lambda plan: plan, workers=workers)
    assert next(read)[1].shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"3\.png \(empty file\)$"):
        next(read)


def test_a_store_is_filled_alike(tmp_path):
    clip = load_clip()
    faces = FolderFaces(people(tmp_path / "faces", {"ann": {"happy": 5, "sad": 4}}), size=32)
    first, second = (
        FeatureStore(tmp_path / str(workers), clip)(faces, batch_size=4, workers=workers)[torch.arange(9)]
        for workers in (0, 2)
    )
    assert torch.equal(first, second)


@needs_av
def test_training_does_not_depend_on_workers_and_resumes_bit_for_bit(tmp_path, no_report, monkeypatch):
    for emotion in ("happy", "sad"):
        for n in range(3):
            video(tmp_path / f"faces/ann/{emotion}/{n}.mp4", frames=8)
            video(tmp_path / f"faces/ben/{emotion}/{n}.mp4", frames=8, size=(40, 40))

    def trained(name, **options):
        given = {"size": 32, "steps": 6, "prompt_steps": 2, "batch": 5, "checkpoint_every": 2, "holdout": 0.4}
        config = TrainConfig(data=str(tmp_path / "faces"), out=tmp_path / name, **given | options)
        run_train(config)
        return (tmp_path / name / "generator.safetensors").read_bytes()

    weights = trained("none", workers=0)
    assert trained("two", workers=2) == weights

    class Killed(Exception):
        pass

    from pcmecl_fast.train.loop import Loop

    save = Loop._save

    def kill(self):
        save(self)
        if self.name == "stage 2" and self.done == 4:
            raise Killed

    monkeypatch.setattr(Loop, "_save", kill)
    with pytest.raises(Killed):
        trained("resumed", workers=2)
    monkeypatch.undo()
    assert trained("resumed", workers=1, resume=True) == weights
