"""The criterion of a finished run, in one line."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from criteria import sample

from pcmecl_fast import PCMECLCriterion, PersonalizedPrompts, PromptBank
from pcmecl_fast.criterion_parts import LENGTHS, load_lengths, save_lengths
from pcmecl_fast.options import plain_options
from pcmecl_fast.prompts import save_prompts
from pcmecl_fast.prompts.bank import Tower
from pcmecl_fast.train.config import PromptsConfig, TrainConfig

EMOTIONS = ["neutral", "happy", "sad"]
PEOPLE = ["anna", "ben", "carl"]
LABELS = ["anna", "carl"], "neutral", ["happy", "sad"]


def write_run(folder, clip, *, config=None, prompts=True, condition="individual"):
    """What the commands leave in their folders, as far as the criterion reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(plain_options(config)))
    if prompts:
        learned = PersonalizedPrompts(clip, EMOTIONS)
        bank = PromptBank.build(
            learned, torch.randn(3, clip.embed_dim), PEOPLE, EMOTIONS, clip=clip, condition=condition
        )
        bank.save(folder / "bank.safetensors")
        save_prompts(folder / "prompts.safetensors", learned, EMOTIONS, clip)
    return folder


@pytest.fixture
def prompts_run(clip, tmp_path):
    return write_run(tmp_path / "prompts run", clip, config=PromptsConfig())


def test_a_prompts_folder_is_all_it_takes(clip, prompts_run):
    criterion = PCMECLCriterion.load(prompts_run)
    source, edited, *_ = sample(2, 3, 24, 24)
    by_hand = PCMECLCriterion(clip, PromptBank.load(prompts_run / "bank.safetensors", clip))
    assert criterion(source, edited, *LABELS) == by_hand(source, edited, *LABELS)
    assert criterion.clip is not clip
    criterion.add_individual("dora", source)
    assert criterion.individuals == [*PEOPLE, "dora"]
    assert not any(parameter.requires_grad for parameter in criterion.prompts.parameters())


def test_a_loaded_clip_and_options_come_before_the_folders(clip, prompts_run):
    criterion = PCMECLCriterion.load(prompts_run, clip=clip, contrast=0.7, value_range=(0, 255), channels="bgr")
    assert criterion.clip is clip
    assert criterion.contrast == 0.7
    assert str(criterion.format) == "BGR in [0, 255]"


def test_a_train_folder_also_says_how_to_weigh_its_terms(clip, tmp_path, caplog):
    config = TrainConfig(contrast=0.25, min_change=0.2, strength=0.6)
    run = write_run(tmp_path / "train", clip, config=config, prompts=False)
    write_run(run / "prompts", clip)
    bank = PromptBank.load(run / "prompts" / "bank.safetensors", clip)
    lengths = torch.rand(3, 3, 3) + 0.1
    save_lengths(run / LENGTHS, lengths, bank)
    criterion = PCMECLCriterion.load(run, clip=clip)
    assert (criterion.contrast, criterion.min_change, criterion.strength) == (0.25, 0.2, 0.6)
    torch.testing.assert_close(criterion.lengths, lengths)
    assert PCMECLCriterion.load(run, clip=clip, strength=0.0).strength == 0

    (run / LENGTHS).unlink()
    with caplog.at_level(logging.WARNING):
        criterion = PCMECLCriterion.load(run, clip=clip)
    assert criterion.strength == 0
    assert "has no lengths of changes, so strength=0.6 is left out" in caplog.text
    assert PCMECLCriterion.load(run, clip=clip, lengths=lengths).strength == 0.6
    with pytest.raises(ValueError, match="lengths: required when strength is not 0"):
        PCMECLCriterion.load(run, clip=clip, strength=1.0)


def test_a_train_folder_may_use_another_runs_prompts(clip, prompts_run, tmp_path):
    run = write_run(tmp_path / "train", clip, config=TrainConfig(prompts=prompts_run, strength=0.0), prompts=False)
    criterion = PCMECLCriterion.load(run, clip=clip)
    assert torch.equal(criterion.features, PromptBank.load(prompts_run / "bank.safetensors", clip).features)
    shutil.rmtree(prompts_run)
    with pytest.raises(
        FileNotFoundError, match=r"run: its prompts are those of .*prompts run, and .* holds no prompts\."
    ):
        PCMECLCriterion.load(run, clip=clip)


def test_a_bank_of_frames_stays_on_disk_and_its_text_is_computed_in_the_step(clip, tmp_path):
    run = write_run(tmp_path / "run", clip, config=PromptsConfig(condition="frame"), condition="frame")
    criterion = PCMECLCriterion.load(str(run), clip=clip)
    assert len(criterion.features) == 0
    source, edited, *_ = sample(2, 3, 24, 24)
    criterion(source, edited, None, "neutral", "happy").backward()
    assert edited.grad.ne(0).any()


def test_it_is_the_criterion_of_the_command(tmp_path, no_report):
    from pcmecl_fast.run import run_prompts

    small = {"emotions": EMOTIONS, "individuals": 2, "clips": 1, "frames_per_clip": 1, "size": 32, "device": "cpu"}
    run_prompts(PromptsConfig(**small, steps=2, batch_individuals=2, out=tmp_path / "run"))
    criterion = PCMECLCriterion.load(tmp_path / "run")
    assert criterion.emotions == EMOTIONS
    source, edited, *_ = sample(2, 3, 24, 24)
    assert criterion(source, edited, criterion.individuals[0], "neutral", "sad").isfinite()


# Lengths


def test_lengths_follow_the_names_of_the_bank(clip, tmp_path):
    features = torch.randn(3, 3, clip.embed_dim)
    measured = PromptBank(features, PEOPLE, EMOTIONS, tower=Tower.of(clip))
    lengths = torch.rand(3, 3, 3) + 0.1
    save_lengths(tmp_path / LENGTHS, lengths, measured)
    assert torch.equal(load_lengths(tmp_path / LENGTHS, measured), lengths)
    other = PromptBank(features, ["carl", "dora", "anna"], EMOTIONS, tower=Tower.of(clip))
    expected = torch.stack([lengths[2], lengths.mean(0), lengths[0]])
    torch.testing.assert_close(load_lengths(tmp_path / LENGTHS, other), expected)
    save_lengths(tmp_path / LENGTHS, lengths[0], measured)
    assert torch.equal(load_lengths(tmp_path / LENGTHS, other), lengths[0])


def test_lengths_of_another_bank_are_refused(clip, other_clip, tmp_path):
    features = torch.randn(1, 3, clip.embed_dim)
    save_lengths(tmp_path / LENGTHS, torch.ones(3, 3), PromptBank(features, ["a"], EMOTIONS, tower=Tower.of(clip)))
    with pytest.raises(ValueError, match=r"lengths: .* is for the emotions .*, the bank has \['a', 'b', 'c'\]"):
        load_lengths(tmp_path / LENGTHS, PromptBank(features, ["a"], ["a", "b", "c"]))
    with pytest.raises(ValueError, match="was measured with 'tiny-face', not with the bank's clip"):
        load_lengths(tmp_path / LENGTHS, PromptBank(features, ["a"], EMOTIONS, tower=Tower.of(other_clip)))


# Bad folders


def test_a_folder_that_is_no_run_is_named(clip, prompts_run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run: .*nowhere does not exist"):
        PCMECLCriterion.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a run of `pcmecl-fast prompts` or `train`"):
        PCMECLCriterion.load(tmp_path)
    (tmp_path / "config.yaml").write_text("run: somewhere\n")
    with pytest.raises(ValueError, match=r"run: .* was not written by `pcmecl-fast prompts`, `train` or `demo`"):
        PCMECLCriterion.load(tmp_path)
    (prompts_run / "bank.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no bank.safetensors; it takes the folder of a finished run"):
        PCMECLCriterion.load(prompts_run, clip=clip)


def test_a_clip_other_than_the_runs_is_refused(other_clip, prompts_run):
    with pytest.raises(ValueError, match=r"bank.safetensors was made with 'tiny-face' .* got 'other-face'"):
        PCMECLCriterion.load(prompts_run, clip=other_clip)


def test_without_the_commands_libraries_it_says_what_to_install(prompts_run):
    script = f"""
import sys
sys.modules["dacite"] = None
from pcmecl_fast import PCMECLCriterion
PCMECLCriterion.load({str(prompts_run)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: run: to read ")
    assert "dacite is not installed; pip install 'pcmecl_fast[train]'" in last
