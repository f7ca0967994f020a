"""A bank that ranks build together is the bank of one process, in parts that are never half of something else."""

import re

import pytest
import torch
from test_bank import EMOTIONS, conditions, learned

from pcmecl_fast import PromptBank, distributed, load_clip
from pcmecl_fast.files import load_tensors
from pcmecl_fast.prompts import shards

PEOPLE = [f"person {n}" for n in range(7)]


def build(path, options=None, scale=1.0):
    """On a rank, or in the only process."""
    clip = load_clip()
    seen = conditions(clip, 7) * scale
    return PromptBank.build(learned(clip), seen, PEOPLE, EMOTIONS, clip=clip, path=path, **(options or {}))


def on_rank(path, options=None, scale=1.0, most_bytes=None):
    if most_bytes is not None:
        shards._MOST_BYTES = most_bytes
    bank = build(path, options, scale)
    shards._MOST_BYTES = 2**30
    return bank.features.clone(), bank.individuals, bank.on_disk


def parts(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "bank.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return build(tmp_path_factory.mktemp("whole") / "bank.safetensors")


def test_it_is_that_of_one_process_on_each_rank(crew, clip, tmp_path, whole):
    for ranks in (2, 3):
        path = tmp_path / str(ranks) / "bank.safetensors"
        for features, individuals, on_disk in crew(ranks, on_rank, path):
            torch.testing.assert_close(features, whole.features, rtol=0, atol=1e-6)
            assert individuals == PEOPLE
            assert on_disk
        names = [re.sub("-[0-9a-f]{16}", "", name) for name in parts(path.parent)]
        assert names == [f"bank-{k + 1:05d}-of-{ranks:05d}.safetensors" for k in range(ranks)]
        in_memory = PromptBank.load(path, clip)
        assert not in_memory.on_disk
        torch.testing.assert_close(in_memory.features, whole.features, rtol=0, atol=1e-6)


def test_parts_of_parts_are_of_equal_number_on_each_rank(crew, clip, tmp_path, whole):
    row = whole.features[0].numel() * 4
    crew(2, on_rank, tmp_path / "bank.safetensors", None, 1.0, 2 * row)
    lengths = load_tensors(tmp_path / "bank.safetensors", "bank")[1]["files"]
    assert [length for _, length in lengths] == [1, 2, 2, 2]


def test_ranks_without_anybody_write_nothing(crew, tmp_path):
    found = crew(4, few, tmp_path / "bank.safetensors")
    assert [len(individuals) for individuals in found] == [2] * 4
    assert len(parts(tmp_path)) == 2
    assert crew(2, few, tmp_path / "none/bank.safetensors", 0) == [[], []]


def few(path, count=2):
    clip = load_clip()
    return PromptBank.build(
        learned(clip), conditions(clip, count), PEOPLE[:count], EMOTIONS, clip=clip, path=path
    ).individuals


def test_rows_of_any_part_are_looked_up(crew, clip, tmp_path, whole):
    path = tmp_path / "bank.safetensors"
    crew(3, on_rank, path, {"dtype": torch.float16})
    bank = PromptBank.load(path, clip, on_disk=True)
    index = torch.tensor([[6, 0, 3], [2, 2, 5]])
    assert bank.lookup(index).dtype == torch.float16
    torch.testing.assert_close(bank.lookup(index).float(), whole.features[index], rtol=0, atol=1e-3)
    assert bank.lookup(index[:0]).shape == (0, 3, *whole.features.shape[1:])
    assert bank.rows(["person 5", "person 1"]).tolist() == [5, 1]
    chosen = bank.selected(["person 6", "person 0"])
    assert torch.equal(chosen.features, bank.lookup(torch.tensor([6, 0])))
    more = bank.extended(learned(clip), conditions(clip, 1), ["dora"], clip=clip)
    assert more.individuals == [*PEOPLE, "dora"]
    assert torch.equal(more.features[:7], bank.features)


def test_prompts_without_a_condition_are_written_by_ranks_too(crew, tmp_path):
    first, second = crew(2, without_a_condition, tmp_path / "bank.safetensors")
    assert torch.equal(first, second)
    assert torch.equal(first[0], first[6])


def without_a_condition(path):
    from pcmecl_fast import PersonalizedPrompts

    clip = load_clip()
    torch.manual_seed(0)
    prompts = PersonalizedPrompts(clip, ["a", "b", "c"], n_ctx=2, condition=None)
    return PromptBank.build(prompts, None, PEOPLE, EMOTIONS, clip=clip, path=path).features.clone()


def test_what_is_whole_of_an_ended_build_is_not_computed_again(crew, clip, tmp_path, whole):
    path = tmp_path / "bank.safetensors"
    crew(2, on_rank, path)
    path.unlink()  # as an end before the last file leaves it
    first, second = (tmp_path / name for name in parts(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        PromptBank.load(path, clip)
    kept = first.stat().st_mtime_ns
    second.write_bytes(second.read_bytes()[:-9])
    found = crew(2, on_rank, path)
    assert first.stat().st_mtime_ns == kept
    torch.testing.assert_close(found[0][0], whole.features, rtol=0, atol=1e-6)


def test_another_bank_takes_its_place_whole(crew, clip, tmp_path, whole):
    path = tmp_path / "bank.safetensors"
    crew(2, on_rank, path)
    before = parts(tmp_path)
    changed = crew(2, on_rank, path, None, -1.0)[0][0]
    assert not set(before) & set(parts(tmp_path))
    assert torch.equal(PromptBank.load(path, clip).features, changed)
    # One process leaves one file.
    assert torch.equal(build(path).features, whole.features)
    assert parts(tmp_path) == []
    crew(2, on_rank, path)
    bank = PromptBank.load(path, clip, on_disk=True)
    bank.save(path)
    assert parts(tmp_path) == []
    assert torch.equal(PromptBank.load(path, clip).features, bank.features)


def test_a_rank_that_fails_leaves_the_old_bank(crew, clip, tmp_path):
    path = tmp_path / "bank.safetensors"
    crew(2, on_rank, path)
    before = PromptBank.load(path, clip).features.clone()
    with pytest.raises(RuntimeError, match="the disk is full"):
        crew(2, fails, path)
    assert torch.equal(PromptBank.load(path, clip).features, before)


def fails(path):
    class Full:
        def __len__(self):
            return 7

        def __getitem__(self, index):
            raise OSError("the disk is full")

    clip = load_clip()
    PromptBank.build(learned(clip), Full(), PEOPLE, EMOTIONS, clip=clip, path=path)


def test_a_part_that_is_gone_or_of_another_bank_is_named(crew, clip, tmp_path):
    path = tmp_path / "bank.safetensors"
    crew(2, on_rank, path)
    first, second = (tmp_path / name for name in parts(tmp_path))
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"path: there is no file {first}")):
        PromptBank.load(path, clip, on_disk=True)
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=f"{first.name} holds 4 individuals instead of 3"):
        PromptBank.load(path, clip)
    build(first, {"condition": "frame"})
    with pytest.raises(ValueError, match=f"{first.name} is a part of another bank"):
        PromptBank.load(path, clip)
    first.write_bytes(content[:-3])
    with pytest.raises(ValueError, match=f"{first.name} is not a whole safetensors file"):
        PromptBank.load(path, clip)


def test_an_index_names_no_file_outside_its_folder(crew, clip, tmp_path):
    from pcmecl_fast.files import save_tensors

    path = tmp_path / "bank.safetensors"
    crew(2, on_rank, path)
    header = load_tensors(path, "bank")[1]
    header["files"][0][0] = "../bank.safetensors"
    save_tensors(path, "bank", {}, header)
    with pytest.raises(ValueError, match=r"a file '\.\./bank\.safetensors' that is not a part of it"):
        PromptBank.load(path, clip)


def test_a_folder_that_ranks_do_not_share_is_told(crew, tmp_path):
    messages = crew(2, in_folders_of_their_own, tmp_path)
    assert "ranks that build a bank together take one folder that all of them see" in messages[0]


def in_folders_of_their_own(folder, monkeypatch=pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        # The first rank's error ends the others, where torchrun has started them.
        patch.setattr(shards, "from_main", lambda do: do() if distributed.rank() == 0 else None)
        try:
            build(folder / str(distributed.rank()) / "bank.safetensors")
        except FileNotFoundError as error:
            return str(error)
