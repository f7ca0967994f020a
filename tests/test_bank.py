"""The prompt bank: a table of features with names, tied to one text tower, in a file that is whole or absent."""

import errno
import json
import multiprocessing
import os
import re
import signal
import stat

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from pcmecl_fast import PersonalizedPrompts, PromptBank
from pcmecl_fast.files import load_tensors, save_rows, save_tensors, write_atomically
from pcmecl_fast.prompts import Tower, condition_of, load_prompts, save_prompts

PEOPLE = ["ann", "ben", "cleo"]
EMOTIONS = ["neutral", "happy", "sad"]
SENTENCES = ["a calm face", "a face full of joy", "a face about to cry"]


def learned(clip, descriptions=SENTENCES, **kwargs):
    """Prompts a few steps into training: their condition network has an effect."""
    torch.manual_seed(0)
    prompts = PersonalizedPrompts(clip, descriptions, **{"n_ctx": 3} | kwargs)
    torch.nn.init.normal_(prompts.condition_net[2].weight, std=0.3)
    return prompts


def conditions(clip, count=3):
    return F.normalize(torch.randn(count, clip.embed_dim, generator=torch.Generator().manual_seed(1)), dim=-1)


def build(clip, **kwargs):
    return PromptBank.build(learned(clip), conditions(clip), PEOPLE, EMOTIONS, clip=clip, **kwargs)


# The table


def test_a_bank_holds_the_prompts_features_of_every_individual(clip):
    bank = build(clip)
    with torch.no_grad():
        expected = learned(clip)(conditions(clip))
    assert torch.equal(bank.features, expected)
    assert not bank.features.requires_grad
    torch.testing.assert_close(bank.features.norm(dim=-1), torch.ones(3, 3))
    assert (bank.individuals, bank.emotions, bank.descriptions) == (PEOPLE, EMOTIONS, SENTENCES)
    assert (bank.tower.name, bank.tower.text_hash) == ("tiny-face", clip.text_hash())


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_it_is_built_a_batch_at_a_time(clip, batch_size):
    torch.testing.assert_close(build(clip, batch_size=batch_size).features, build(clip).features, rtol=0, atol=1e-6)


def test_a_bank_is_written_as_it_is_built(clip, tmp_path):
    path = tmp_path / "bank.safetensors"
    bank = build(clip, path=path, batch_size=2)
    assert bank.on_disk
    assert torch.equal(bank.features, build(clip, batch_size=2).features)
    assert torch.equal(PromptBank.load(path, clip).features, bank.features)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_bank_may_be_kept_in_half(clip, tmp_path, dtype):
    bank = build(clip, path=tmp_path / "bank.safetensors", dtype=dtype)
    assert bank.features.dtype == dtype
    torch.testing.assert_close(bank.features.float(), build(clip).features, rtol=0, atol=8e-3)


def test_names_are_checked_before_a_bank_is_built(clip, tmp_path):
    with pytest.raises(ValueError, match="individuals: takes 3 different names"):
        PromptBank.build(
            learned(clip), conditions(clip), ["ann"] * 3, EMOTIONS, clip=clip, path=tmp_path / "bank.safetensors"
        )
    assert not list(tmp_path.iterdir())


def test_rows_are_looked_up(clip, tmp_path):
    bank = build(clip, path=tmp_path / "bank.safetensors")
    rows = torch.tensor([[2, 0], [0, 0]])
    assert torch.equal(bank.lookup(rows), bank.features[rows])
    with pytest.raises(IndexError, match="individual: takes 0 to 2, got 0 to 3"):
        bank.lookup(torch.tensor([0, 3]))


def test_people_added_later_get_rows_from_a_few_frames(clip):
    frames = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    condition = condition_of(clip, frames)
    torch.testing.assert_close(condition, F.normalize(clip.encode_image(frames), dim=-1).mean(0))
    bank = build(clip).extended(learned(clip), condition[None], ["dora"], clip=clip)
    assert bank.individuals == [*PEOPLE, "dora"]
    torch.testing.assert_close(bank.features[3:], learned(clip)(condition[None]).detach())
    assert torch.equal(bank.features[:3], build(clip).features)
    with pytest.raises(ValueError, match=r"frames: takes \(B, 3, H, W\) with at least one frame"):
        condition_of(clip, frames[:0])


def test_prompts_without_a_condition_give_everyone_the_same_row_and_newcomers_too(clip, tmp_path):
    prompts = PersonalizedPrompts(clip, SENTENCES, n_ctx=3, condition=None, ending=".")
    path = tmp_path / "bank.safetensors"
    on_disk = PromptBank.build(prompts, None, PEOPLE, EMOTIONS, clip=clip, batch_size=2, path=path)
    bank = PromptBank.load(path, clip).extended(prompts, None, ["dora"], clip=clip)
    assert (on_disk.condition, bank.condition, bank.ending) == ("none", "none", ".")
    assert bank.individuals == [*PEOPLE, "dora"]
    assert torch.equal(bank.features, prompts().detach().expand(4, -1, -1))
    assert torch.equal(on_disk.lookup(on_disk.rows(["ben"])), bank.features[1:2])


def test_a_bank_is_extended_by_prompts_of_its_kind_alone(clip):
    bank = build(clip)
    with pytest.raises(ValueError, match=r"prompts: they end with '\.', those of the bank with ''"):
        bank.extended(learned(clip, ending="."), conditions(clip, 1), ["dora"], clip=clip)
    with pytest.raises(ValueError, match="condition: these prompts have none, got 'individual'"):
        bank.extended(PersonalizedPrompts(clip, SENTENCES, condition=None), None, ["dora"], clip=clip)
    with pytest.raises(ValueError, match="condition: got 'none', but these prompts have one"):
        build(clip, condition="none")
    with pytest.raises(ValueError, match="conditions: got None, and these prompts are conditioned"):
        bank.extended(learned(clip), None, ["dora"], clip=clip)


@pytest.mark.parametrize("options", [{"condition": None}, {"ending": "."}, {"context": "per-emotion", "ending": " !"}])
def test_saved_prompts_keep_their_condition_and_ending(clip, tmp_path, options):
    prompts = PersonalizedPrompts(clip, SENTENCES, n_ctx=3, **options)
    save_prompts(tmp_path / "prompts", prompts, EMOTIONS, clip)
    again, _ = load_prompts(tmp_path / "prompts", clip)
    assert (again.condition, again.ending, again.descriptions) == (prompts.condition, prompts.ending, SENTENCES)
    assert torch.equal(again(conditions(clip)), prompts(conditions(clip)))


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads its memory from /proc")
def test_looking_up_rows_on_disk_reads_only_those(clip, tmp_path):
    count, shape = 40_000, (32, clip.embed_dim)
    features = torch.randn(1, *shape).expand(count, *shape)
    names = [str(i) for i in range(count)], [f"e{i}" for i in range(shape[0])]
    path = tmp_path / "bank.safetensors"
    header = PromptBank(features, *names, tower=Tower.of(clip))._header()
    with save_rows(path, "bank", "features", tuple(features.shape), features.dtype, header) as append:
        for part in features.split(4096):
            append(part)
    before = resident()
    bank = PromptBank.load(path, clip, on_disk=True)
    rows = torch.randperm(count)[:400]
    assert bank.lookup(rows).shape == (400, *shape)
    # The file has 655 MB, the rows 6.5 MB.
    assert resident() - before < 100e6


def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_a_bank_of_nobody_is_empty(clip):
    bank = PromptBank.build(learned(clip), conditions(clip, 0), [], EMOTIONS, clip=clip)
    assert bank.features.shape == (0, 3, clip.embed_dim)


def test_rows_and_columns_follow_the_names():
    bank = PromptBank(torch.rand(3, 3, 4), PEOPLE, EMOTIONS)
    assert bank.rows(["cleo", "ann", "cleo"]).tolist() == [2, 0, 2]
    assert bank.columns(["sad", "neutral"]).tolist() == [2, 0]
    assert bank.rows([]).dtype == torch.int64


def test_an_unknown_individual_is_named_with_close_ones():
    bank = PromptBank(torch.rand(3, 3, 4), PEOPLE, EMOTIONS)
    with pytest.raises(KeyError, match=r"2 of the 3 asked for .*bank's 3: 'anne' \(did you mean ann\?\), 'dora'; "):
        bank.rows(["ben", "anne", "dora"])


def test_an_unknown_emotion_is_named_with_the_known_ones():
    bank = PromptBank(torch.rand(3, 3, 4), PEOPLE, EMOTIONS)
    with pytest.raises(ValueError, match="emotions: the bank has neutral, happy, sad, not 'joyful'"):
        bank.columns(["happy", "joyful"])


@pytest.mark.parametrize(
    ("features", "people", "emotions", "kwargs", "says"),
    [
        (torch.rand(3, 3), PEOPLE, EMOTIONS, {}, r"features: takes a float \(N, E, D\), got torch.float32 \(3, 3\)"),
        (torch.ones(3, 3, 4).long(), PEOPLE, EMOTIONS, {}, "features: takes a float .*int64"),
        (torch.rand(3, 3, 4), ["ann", "ben", "ann"], EMOTIONS, {}, "individuals: takes 3 different names"),
        (torch.rand(3, 3, 4), ["ann", "ben"], EMOTIONS, {}, "individuals: takes 3 different names"),
        (torch.rand(3, 3, 4), PEOPLE, ["sad", "sad", "happy"], {}, "emotions: takes 3 different names"),
        (torch.rand(3, 3, 4), PEOPLE, EMOTIONS, {"descriptions": ["a"] * 3}, "descriptions: takes 3 different names"),
        (
            torch.rand(3, 3, 4),
            PEOPLE,
            EMOTIONS,
            {"condition": "clip"},
            "condition: takes 'individual', 'frame' or 'none', got",
        ),
    ],
)
def test_names_that_do_not_match_the_features_are_rejected(features, people, emotions, kwargs, says):
    with pytest.raises(ValueError, match=says):
        PromptBank(features, people, emotions, **kwargs)


def test_another_dtype_keeps_everything_else(clip):
    half = build(clip, condition="frame").to(dtype=torch.float16)
    assert half.features.dtype == torch.float16
    assert (half.individuals, half.descriptions, half.condition) == (PEOPLE, SENTENCES, "frame")
    assert half.tower.text_hash == clip.text_hash()


# The file


@pytest.mark.parametrize("condition", ["individual", "frame"])
def test_what_is_saved_is_loaded(clip, tmp_path, condition):
    bank = build(clip, condition=condition)
    bank.save(tmp_path / "new" / "folder" / "bank.safetensors")
    again = PromptBank.load(tmp_path / "new" / "folder" / "bank.safetensors", clip)
    assert torch.equal(again.features, bank.features)
    for name in ("individuals", "emotions", "descriptions", "tower", "condition"):
        assert getattr(again, name) == getattr(bank, name)


def test_any_names_survive(clip, tmp_path):
    people = ["Zoë/señor#1", "名前", 'a "quoted" name\n']
    PromptBank.build(learned(clip), conditions(clip), people, EMOTIONS, clip=clip).save(tmp_path / "bank")
    assert PromptBank.load(tmp_path / "bank", clip).individuals == people


def test_the_header_is_readable_json(clip, tmp_path):
    build(clip).save(tmp_path / "bank")
    with safe_open(tmp_path / "bank", framework="pt") as file:
        header = json.loads(file.metadata()["header"])
    assert header["individuals"] == PEOPLE
    assert header["tower"] == {"name": "tiny-face", "pretrained": "built-in", "text_hash": clip.text_hash()}


def test_another_tower_is_rejected_and_both_are_named(clip, other_clip, tmp_path):
    build(clip).save(tmp_path / "bank")
    with pytest.raises(ValueError, match=r"clip: .*bank was made with 'tiny-face' \(.*got 'other-face' \(by hand"):
        PromptBank.load(tmp_path / "bank", other_clip)


def test_the_same_tower_in_another_dtype_is_not_another_tower(clip, tmp_path):
    from pcmecl_fast import load_clip

    build(clip).save(tmp_path / "bank")
    assert PromptBank.load(tmp_path / "bank", load_clip(dtype=torch.bfloat16)).individuals == PEOPLE


def test_a_bank_of_an_unknown_tower_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="tower: this bank's CLIP model is unknown"):
        PromptBank(torch.rand(3, 3, 4), PEOPLE, EMOTIONS).save(tmp_path / "bank")
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_named(clip, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"path: there is no file {tmp_path / 'bank'}")):
        PromptBank.load(tmp_path / "bank", clip)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_named(clip, tmp_path, keep):
    path = tmp_path / "bank.safetensors"
    build(clip).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=re.escape(f"path: {path} is not a whole safetensors file")):
        PromptBank.load(path, clip)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tower": None}, "KeyError: 'tower'"),
        ({"tower": {"name": 1}}, "TypeError"),
        ({"tower": {"name": 1, "pretrained": "", "text_hash": ""}}, "tower: takes names"),
        ({"individuals": 3}, "TypeError"),
        ({"emotions": [["neutral"], "happy", "sad"]}, "TypeError"),
        ({"condition": "nobody"}, "condition: takes 'individual', 'frame' or 'none'"),
        ({"features": torch.ones(3, 3, 7)}, r"takes \(N, E, \d+\), got \(3, 3, 7\)"),
        ({"features": torch.ones(3, 3, 64, dtype=torch.int32)}, "'I32'|takes a float"),
    ],
)
def test_a_header_that_makes_no_sense_is_named(clip, tmp_path, change, says, on_disk):
    path = tmp_path / "bank.safetensors"
    bank = build(clip)
    header = {name: value for name, value in (bank._header() | change).items() if value is not None}
    save_tensors(path, "bank", {"features": header.pop("features", bank.features)}, header)
    with pytest.raises(ValueError, match=f"path: {re.escape(str(path))} is damaged, or .*({says})"):
        PromptBank.load(path, clip, on_disk=on_disk)


@pytest.mark.parametrize("change", [{"n_ctx": 4}, {"n_ctx": "3"}, {"context": "none"}, {"emotions": ["one"]}])
def test_prompts_that_do_not_fit_their_header_are_named(clip, tmp_path, change):
    path = tmp_path / "prompts.safetensors"
    save_prompts(path, learned(clip), EMOTIONS, clip)
    tensors, header = load_tensors(path, "prompts")
    save_tensors(path, "prompts", {k: v.clone() for k, v in tensors.items()}, header | change)
    with pytest.raises(ValueError, match=f"path: {re.escape(str(path))} is damaged, or") as caught:
        load_prompts(path, clip)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_kind_is_rejected(clip, tmp_path):
    save_prompts(tmp_path / "prompts", learned(clip), EMOTIONS, clip)
    with pytest.raises(ValueError, match="prompts holds 'prompts', not 'bank'"):
        PromptBank.load(tmp_path / "prompts", clip)
    build(clip).save(tmp_path / "bank")
    with pytest.raises(ValueError, match="bank holds 'bank', not 'prompts'"):
        load_prompts(tmp_path / "bank", clip)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="foreign holds 'something else', not 'bank'"):
        PromptBank.load(tmp_path / "foreign", clip)


# Learned prompts


@pytest.mark.parametrize("context", ["shared", "per-emotion"])
def test_loaded_prompts_make_rows_for_people_added_later(clip, tmp_path, context):
    prompts = learned(clip, context=context)
    save_prompts(tmp_path / "prompts", prompts, EMOTIONS, clip)
    torch.manual_seed(99)
    again, emotions = load_prompts(tmp_path / "prompts", clip)
    assert emotions == EMOTIONS
    assert again.descriptions == SENTENCES
    with torch.no_grad():
        assert torch.equal(again(conditions(clip, 5)), prompts(conditions(clip, 5)))


def test_learned_prompts_of_another_tower_are_rejected(clip, other_clip, tmp_path):
    save_prompts(tmp_path / "prompts", learned(clip), EMOTIONS, clip)
    with pytest.raises(ValueError, match=r"made with 'tiny-face'.*got 'other-face'"):
        load_prompts(tmp_path / "prompts", other_clip)


# Saving over an older file


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_whole_and_no_litter(clip, tmp_path, monkeypatch, broken):
    path = tmp_path / "bank.safetensors"
    bank = build(clip)
    bank.save(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="No space left"):
        PromptBank(-bank.features, PEOPLE, EMOTIONS, tower=bank.tower).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert torch.equal(PromptBank.load(path, clip).features, bank.features)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_kill_while_saving_leaves_the_old_file_whole(clip, tmp_path, at):
    path = tmp_path / "bank.safetensors"
    bank = build(clip)
    bank.save(path)
    before = path.read_bytes()

    def save_and_die():
        setattr(os, at, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        write_atomically(path, before[: len(before) // 2])

    child = multiprocessing.get_context("fork").Process(target=save_and_die)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert path.read_bytes() == before
    # What the killed process left behind is a hidden file that does no harm.
    assert all(file.name.startswith(".") for file in tmp_path.iterdir() if file != path)
    PromptBank(-bank.features, PEOPLE, EMOTIONS, tower=bank.tower).save(path)
    assert torch.equal(PromptBank.load(path, clip).features, -bank.features)


def test_file_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        save_tensors(tmp_path / "file", "kind", {"x": torch.ones(1)}, {})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
