"""Ranks fill a feature store together: each frame is seen once, wherever the folder lies; sums are those of one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from features import unit_features
from test_features import EVERY, Counted, shards

from pcmecl_fast import distributed, load_clip
from pcmecl_fast.data import features as features_module
from pcmecl_fast.data.features import FeatureStore, individual_conditions
from pcmecl_fast.synthetic import SyntheticFaces


def few(seed=0):
    return SyntheticFaces(3, emotions=["neutral", "happy", "sad"], clips=1, frames_per_clip=2, size=32, seed=seed)


def fill(root, own_disk=None, die_at=None):
    """On a rank: how many frames it has seen, and all features."""
    clip, faces = load_clip(), few()
    folder = Path(root) / (f"disk-{own_disk[distributed.rank()]}" if own_disk else "shared")
    counted = Counted(faces, die_at=die_at)
    try:
        stored = FeatureStore(folder, clip, shard_frames=4)(counted, batch_size=2)
    except KeyboardInterrupt:
        return counted.read, None
    return counted.read, stored[EVERY(len(faces))]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_each_rank_sees_its_share_of_the_frames_and_reads_all(crew, clip, tmp_path, ranks):
    expected = unit_features(clip, few())
    found = crew(ranks, fill, tmp_path)
    seen = [count for count, _ in found]
    assert sum(seen) == 18
    assert max(seen) - min(seen) <= 1
    for _, features in found:
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    assert [count for count, _ in crew(ranks, fill, tmp_path)] == [0] * ranks
    assert not list(tmp_path.rglob(".rank-*"))


def test_shares_are_of_what_is_missing(crew, tmp_path):
    held(tmp_path / "shared", range(10))
    assert [count for count, _ in crew(2, fill, tmp_path)] == [4, 4]


def held(root, rows):
    FeatureStore(root, load_clip())(few().subset(list(rows)))


def test_ranks_share_the_work_with_those_who_see_the_same_disk(crew, clip, tmp_path):
    held(tmp_path / "disk-0", range(8))
    found = crew(3, fill, tmp_path, [0, 1, 1])
    assert [count for count, _ in found] == [10, 9, 9]
    for _, features in found:
        torch.testing.assert_close(features, unit_features(clip, few()), rtol=0, atol=1e-6)
    assert len(shards(tmp_path / "disk-0")) == 1 + 3


def test_what_a_folder_does_not_show_of_another_rank_is_computed(crew, clip, tmp_path):
    found = crew(2, blind, tmp_path)
    assert [count for count, _ in found] == [9, 18]
    for _, features in found:
        torch.testing.assert_close(features, unit_features(clip, few()), rtol=0, atol=1e-6)


def blind(root):
    """Rank 1 does not see the shards of rank 0, as from a listing that the system has kept."""
    with pytest.MonkeyPatch.context() as patch:
        glob = Path.glob
        if distributed.rank() == 1:
            written = FeatureStore._write
            own = set()

            def write(self, *arguments):
                before = set(glob(self.folder, "*.safetensors"))
                written(self, *arguments)
                own.update(set(self._shards) - before)

            patch.setattr(FeatureStore, "_write", write)
            patch.setattr(Path, "glob", lambda self, what: [path for path in glob(self, what) if path in own])
        return fill(root)


def test_a_fill_that_is_ended_loses_less_than_a_shard_a_rank(crew, clip, tmp_path):
    ended = crew(2, fill, tmp_path, None, 7)
    assert ended == [(8, None)] * 2
    rest = crew(2, fill, tmp_path)
    assert [count for count, _ in rest] == [5, 5]
    for _, features in rest:
        torch.testing.assert_close(features, unit_features(clip, few()), rtol=0, atol=1e-6)


def test_a_broken_shard_is_computed_again_once(crew, clip, tmp_path):
    crew(2, fill, tmp_path)
    broken = shards(tmp_path / "shared")[0]
    broken.write_bytes(broken.read_bytes()[:-7])
    found = crew(2, fill, tmp_path)
    assert sum(count for count, _ in found) in (1, 4)  # the frames of a shard
    assert broken not in shards(tmp_path / "shared")
    for _, features in found:
        torch.testing.assert_close(features, unit_features(clip, few()), rtol=0, atol=1e-6)


def test_two_runs_with_folders_on_each_machine_do_not_wait_for_each_other(crew, tmp_path):
    """Each has one folder and wants the other's: what locks of one after the other would end in."""
    assert crew(4, in_two_pairs, tmp_path) == [True] * 4


def in_two_pairs(root):
    import torch.distributed as dist

    place = distributed.rank() % 2  # ranks 0 and 1 are one run on two machines, 2 and 3 another
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    folder = Path(root) / str(place)
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        mine = pairs[distributed.rank() // 2]
        patch.setattr(features_module, "_who_see", lambda folder: [distributed.rank()])
        patch.setattr(features_module, "summed", lambda x: distributed.summed(x, mine))
        with features_module._held_together(folder, load_clip()) as (at, of):
            return (at, of) == (0, 1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_conditions_are_those_of_one_process(crew, ranks):
    features, who = many_features()
    expected = individual_conditions(features, who, 5)
    for found in crew(ranks, conditions_on_rank):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    nobody = individual_conditions(features[:1], who[:1], 5)
    for found in crew(ranks, conditions_on_rank, 1):  # fewer frames than ranks
        assert torch.equal(found, nobody)


def many_features(count=1000):
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(count, 16, generator=generator), dim=-1)
    return features, torch.randint(4, (count,), generator=generator)  # of individual 4 there is no frame


def conditions_on_rank(count=1000):
    features, who = many_features()
    return individual_conditions(features[:count], who[:count], 5)


def test_the_mean_of_a_million_frames_is_exact():
    features = torch.full((1_000_000, 2), 0.1)
    mean = individual_conditions(features, torch.zeros(len(features), dtype=torch.int64), 1)
    np.testing.assert_allclose(mean, np.float32(0.1), rtol=1e-7)
