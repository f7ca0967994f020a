"""The judge reads emotions, action units, speech and identity of drawn people, and ships with the package."""

import pytest
import torch
from safetensors.torch import load_file

from pcmecl_fast.clip import ASSETS
from pcmecl_fast.synthetic.judge import JudgeConfig, accuracy, load_judge, train


def test_the_shipped_judge_reads_people_it_has_not_seen():
    errors = accuracy(load_judge(), individuals=12)
    assert errors["emotion_accuracy"] > 0.97
    assert errors["action_unit_error"] < 0.08
    assert errors["mouth_error"] < 0.08
    assert errors["identity_similarity"] > 0.8


def test_training_writes_a_judge_that_loads_and_can_be_trained_further(tmp_path):
    options = {"steps": 2, "batch": 4, "individuals": 1}
    train(JudgeConfig(**options, out=tmp_path))
    file = tmp_path / "judge.safetensors"
    written = load_file(file)
    assert {value.dtype for value in written.values()} == {torch.float16}
    loaded = load_judge(path=file).state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in written.items())
    train(JudgeConfig(**options, start=file, lr=0.0, out=tmp_path / "second"))
    second = load_file(tmp_path / "second" / "judge.safetensors")
    weights = [name for name in written if "running" not in name]
    assert all(torch.equal(second[name], written[name]) for name in weights)


def test_the_same_seed_trains_the_same_judge(tmp_path):
    for name in ("first", "second"):
        train(JudgeConfig(steps=2, batch=4, individuals=1, out=tmp_path / name))
    first, second = ((tmp_path / name / "judge.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


def test_the_weights_of_another_network_are_rejected():
    with pytest.raises(ValueError, match=r"reader.safetensors does not hold the weights of a Judge: it lacks body"):
        load_judge(path=ASSETS / "reader.safetensors")
