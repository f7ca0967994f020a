"""Both stages learn, on data with gaps, and survive being killed at any moment; what is frozen does not change."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from features import unit_features
from safetensors.torch import load_file
from summaries import means

from pcmecl_fast import PromptBank, use_backend
from pcmecl_fast.clip import load_clip
from pcmecl_fast.criterion import MIN_CHANGE
from pcmecl_fast.data import features
from pcmecl_fast.data.base import FrameDataset
from pcmecl_fast.data.features import LiveFeatures, individual_conditions
from pcmecl_fast.models import Edit, make_generator
from pcmecl_fast.prompts import load_prompts
from pcmecl_fast.run import open_data, run_evaluate, run_train
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.train import generator as stage_two
from pcmecl_fast.train import players
from pcmecl_fast.train import prompts as stage_one
from pcmecl_fast.train.batches import Batch, FramesByEmotion
from pcmecl_fast.train.config import EvaluateConfig, PromptsConfig, TrainConfig
from pcmecl_fast.train.generator import criterion_for, mouth_loss, train_generator
from pcmecl_fast.train.loop import Loop
from pcmecl_fast.train.prompts import learn_prompts, matching_loss

pytestmark = pytest.mark.usefixtures("no_report")

EMOTIONS = ["neutral", "happy", "sad"]
SMALL = {
    "emotions": EMOTIONS,
    "individuals": 3,
    "clips": 1,
    "frames_per_clip": 2,
    "size": 32,
    "device": "cpu",
    "checkpoint_every": 2,
}


def prompts_config(out, **kwargs):
    return PromptsConfig(**SMALL | {"out": Path(out), "steps": 4, "batch_individuals": 3} | kwargs)


def train_config(out, **kwargs):
    generator = {"fields": 4, "hidden": 16} | kwargs.pop("generator_options", {})
    options = SMALL | {"out": Path(out), "steps": 3, "prompt_steps": 2, "batch": 4, "generator_options": generator}
    return TrainConfig(**options | kwargs)


def state_of(run):
    return load_file(Path(run) / "generator.safetensors")


def assert_bitwise_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def ends(curve, count=4):
    values = [value for _, value in curve]
    return sum(values[:count]) / count, sum(values[-count:]) / count


class Numbers(FrameDataset):
    """Frames of a single colour."""

    def __init__(self, individual_index, emotion_index, colour=0.0):
        self.individual_index = torch.tensor(individual_index)
        self.emotion_index = torch.tensor(emotion_index)
        self.individuals = [f"p{n}" for n in range(max(individual_index) + 1)]
        self.emotions = EMOTIONS
        self.keys = [str(i) for i in range(len(individual_index))]
        self.colour = colour

    def frames(self, indices):
        return torch.full((len(indices), 3, 32, 32), self.colour)


# Stage 1


def test_stage_one_learns(clip, tmp_path):
    # One frame of each, and everyone in every step: the same batch every time.
    data = SyntheticFaces(6, emotions=EMOTIONS, clips=1, frames_per_clip=1, size=64)
    config = prompts_config(tmp_path, steps=100, batch_individuals=6, n_ctx=8, prompt_lr=0.02)
    _, bank, loop = learn_prompts(clip, data, config)
    first, last = ends(loop.curves["stage 1/loss"])
    assert last < 0.9 * first
    assert bank.features.shape == (6, 3, clip.embed_dim)
    assert bank.individuals == data.individuals
    torch.testing.assert_close(bank.features.norm(dim=-1), torch.ones(6, 3))


@pytest.mark.parametrize(("condition", "steps"), [("individual", 200), ("frame", 50)])
def test_stage_one_from_the_store_and_from_frames_are_the_same(
    clip, tmp_path, few_faces, monkeypatch, condition, steps
):
    # Encoded in float64, a frame has the same float32 features whatever else is in its batch; otherwise training would
    # amplify the rounding.
    exact, encode = load_clip("tiny-face", dtype=torch.float64), features._encode
    monkeypatch.setattr(features, "_encode", lambda _, *of: encode(exact, *of))
    config = {"steps": steps, "n_ctx": 8, "condition": condition}
    _, bank, stored = learn_prompts(clip, few_faces(), prompts_config(tmp_path / "store", **config))
    monkeypatch.setattr(stage_one, "frame_features", lambda clip, dataset, _: LiveFeatures(clip, dataset))
    _, expected, live = learn_prompts(clip, few_faces(), prompts_config(tmp_path / "frames", **config))
    curve, other = (torch.tensor(x.curves["stage 1/loss"]) for x in (stored, live))
    torch.testing.assert_close(curve, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bank.features, expected.features, rtol=0, atol=1e-4)


@pytest.mark.parametrize("context", ["shared", "per-emotion"])
def test_stage_one_with_trees_and_store_is_the_reference(clip, tmp_path, few_faces, context):
    config = {"steps": 20, "n_ctx": 8, "context": context}
    _, bank, fast = learn_prompts(clip, few_faces(), prompts_config(tmp_path / "fast", **config))
    with use_backend("reference"):
        _, expected, plain = learn_prompts(clip, few_faces(), prompts_config(tmp_path / "plain", **config))
    curve, other = (torch.tensor(x.curves["stage 1/loss"]) for x in (fast, plain))
    torch.testing.assert_close(curve, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bank.features, expected.features, rtol=0, atol=1e-3)


def far_from_the_identity(*args):
    """A generator whose edits are more than rounding and fall between pixels."""
    generator = make_generator(*args)
    torch.nn.init.constant_(generator.pose.bias, 0.3)
    for field in (generator.flow, generator.shade):
        torch.nn.init.normal_(field, std=0.5)
    return generator


def test_stage_two_reads_source_features_from_the_store(clip, tmp_path, few_faces, monkeypatch):
    encoded = []
    seen = type(clip).encode_image
    monkeypatch.setattr(type(clip), "encode_image", lambda self, x, **k: encoded.append(len(x)) or seen(self, x, **k))
    states, curves = {}, {}
    monkeypatch.setattr(stage_two, "make_generator", far_from_the_identity)
    for backend in ("auto", "reference"):
        config = train_config(tmp_path / backend, jitter=0.0, strength=0.0, lr=1e-4)
        with use_backend(backend):
            _, bank, _ = learn_prompts(clip, few_faces(), prompts_config(tmp_path / backend))
            encoded.clear()
            generator, loop = train_generator(clip, bank, few_faces(), config)
        # Three steps of four frames: edits only from the store, edits and sources without it.
        assert sum(encoded) == (12 if backend == "auto" else 24)
        states[backend] = generator.state_dict()
        curves[backend] = torch.tensor(loop.curves["stage 2/loss"])
    torch.testing.assert_close(curves["auto"], curves["reference"], rtol=1e-4, atol=1e-4)
    for name, value in states["auto"].items():
        # As a whole: Adam turns the rounding of a gradient near 0 into a step of any sign.
        assert (value - states["reference"][name]).norm() <= 5e-3 * states["reference"][name].norm() + 1e-5


def test_prompts_become_personal(clip, tmp_path, few_faces):
    prompts, bank, _ = learn_prompts(clip, few_faces(), prompts_config(tmp_path, steps=20))
    assert (bank.features[0] - bank.features[1]).abs().max() > 1e-4
    assert prompts.condition_net[2].weight.abs().max() > 0


def test_stage_one_writes_its_prompts_and_its_bank(clip, tmp_path, few_faces):
    prompts, bank, _ = learn_prompts(clip, few_faces(), prompts_config(tmp_path))
    again, emotions = load_prompts(tmp_path / "prompts.safetensors", clip)
    assert emotions == EMOTIONS
    assert torch.equal(again.context, prompts.context)
    assert torch.equal(PromptBank.load(tmp_path / "bank.safetensors", clip).features, bank.features)


def test_missing_emotions_are_no_obstacle(clip, tmp_path, few_faces):
    data = few_faces(missing=[(0, 1), (1, 0), (2, 0), (2, 2)])  # the last shows one emotion only
    _, bank, loop = learn_prompts(clip, data, prompts_config(tmp_path, steps=6))
    assert all(value == value for curve in loop.curves.values() for _, value in curve)
    # A bank has a row for everyone and every emotion, since a generator may target any of them.
    assert bank.features.shape == (3, 3, clip.embed_dim)
    assert bank.features.isfinite().all()


@pytest.mark.parametrize("context", ["shared", "per-emotion"])
@pytest.mark.parametrize("condition", ["individual", "frame", "none"])
def test_contexts_and_conditions(clip, tmp_path, few_faces, context, condition):
    data = few_faces()
    config = prompts_config(tmp_path, context=context, condition=condition)
    prompts, bank, _ = learn_prompts(clip, data, config)
    assert prompts.context.shape[:-1] == ((8,) if context == "shared" else (3, 8))
    assert bank.condition == condition
    assert bank.individuals == (data.keys if condition == "frame" else data.individuals)


def test_prompts_without_a_condition_learn_what_everyone_shares(clip, tmp_path, few_faces):
    config = prompts_config(tmp_path, condition="none", ending=".", steps=20)
    prompts, bank, loop = learn_prompts(clip, few_faces(), config)
    assert torch.equal(bank.features, bank.features[:1].expand_as(bank.features))
    assert (prompts.condition_net, bank.ending) == (None, ".")
    assert loop.curves["stage 1/match"][-1][1] < loop.curves["stage 1/match"][0][1]
    again, resumed, _ = learn_prompts(clip, few_faces(), replace(config, resume=True))
    assert (again.condition, again.ending) == (None, ".")
    assert torch.equal(resumed.features, bank.features)
    with pytest.raises(ValueError, match=r"--ending was '?\.'?, is"):
        learn_prompts(clip, few_faces(), replace(config, resume=True, ending=""))


def test_descriptions_may_be_sentences(clip, tmp_path, few_faces):
    sentences = ["a calm face", "someone who smiles broadly", "a face about to cry"]
    prompts, bank, _ = learn_prompts(clip, few_faces(), prompts_config(tmp_path, descriptions=sentences))
    assert prompts.descriptions == bank.descriptions == sentences
    assert bank.emotions == EMOTIONS
    with pytest.raises(ValueError, match=r"descriptions: takes one for each of the 3 emotions \(neutral.*got 2"):
        learn_prompts(clip, few_faces(), prompts_config(tmp_path, descriptions=sentences[:2]))


def test_data_without_a_change_of_emotion_is_rejected(clip, tmp_path):
    with pytest.raises(ValueError, match="dataset: training needs at least one individual with two emotions"):
        learn_prompts(clip, Numbers([0, 1], [1, 1]), prompts_config(tmp_path))


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_the_matching_loss_follows_its_definition(missing):
    torch.manual_seed(0)
    people, emotions, scale = 4, 3, 9.0
    visual, text = (F.normalize(torch.randn(people, emotions, 8), dim=-1) for _ in range(2))
    mask = torch.rand(people, emotions) >= missing
    to_prompts, to_people = [], []
    for n in range(people):
        for e in range(emotions):
            if not mask[n, e]:
                continue
            own = torch.stack([scale * visual[n, e] @ text[n, f] for f in range(emotions)])
            to_prompts.append(own.logsumexp(0) - own[e])
            others = {m: scale * text[n, e] @ visual[m, e] for m in range(people) if mask[m, e]}
            to_people.append(torch.stack(list(others.values())).logsumexp(0) - others[n])
    expected = (torch.stack(to_prompts).mean() + torch.stack(to_people).mean()) / 2
    torch.testing.assert_close(matching_loss(visual, text, mask, scale), expected)
    garbage = torch.where(mask[..., None], visual, 1e3)
    torch.testing.assert_close(matching_loss(garbage, text, mask, scale), expected)
    shared = matching_loss(visual, text, mask, scale, personal=False)
    torch.testing.assert_close(shared, torch.stack(to_prompts).mean())


def test_conditions_are_means_and_zero_without_frames():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    conditions = individual_conditions(features, torch.tensor([0, 0, 2]), 3)
    torch.testing.assert_close(conditions, torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.6, 0.8]]))


def test_features_are_the_same_in_any_batches(clip, few_faces):
    data = few_faces()
    features = unit_features(clip, data)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(data)))
    torch.testing.assert_close(unit_features(clip, data, batch_size=5), features, rtol=0, atol=1e-5)


# Stage 2


@pytest.fixture(scope="module")
def stage1(clip, tmp_path_factory):
    """The folder of a finished stage 1 on the people of SMALL."""
    out = tmp_path_factory.mktemp("stage1")
    data, _ = open_data(train_config(out))
    learn_prompts(clip, data, prompts_config(out))
    return out


def bank_and_data(clip, stage1):
    data, _ = open_data(train_config(stage1))
    return PromptBank.load(stage1 / "bank.safetensors", clip), data


def test_the_trainers_min_change_is_the_criterions():
    assert TrainConfig().min_change == MIN_CHANGE  # a number there: options know nothing of PyTorch


def test_the_noise_of_training_is_not_pointed_out(clip, stage1, tmp_path, caplog):
    bank, data = bank_and_data(clip, stage1)
    with caplog.at_level("WARNING"):
        train_generator(clip, bank, data, train_config(tmp_path, steps=4, batch=8, jitter=0.1))
    assert "takes RGB in [-1, 1]" not in caplog.text


def test_stage_two_learns(clip, stage1, tmp_path):
    bank, data = bank_and_data(clip, stage1)
    # In 40 steps it is chance with some seeds.
    config = train_config(tmp_path, steps=120, batch=8, w_adversarial=0.0)
    _, loop = train_generator(clip, bank, data, config)
    first, last = ends(loop.curves["stage 2/pcmecl"], count=8)
    assert last < first - 0.3


def test_a_frozen_clip_is_untouched_by_both_stages(clip, tmp_path):
    before = {key: value.clone() for key, value in clip.model.state_dict().items()}
    data, _ = open_data(train_config(tmp_path))
    _, bank, _ = learn_prompts(clip, data, prompts_config(tmp_path))
    generator, _ = train_generator(clip, bank, data, train_config(tmp_path))
    assert_bitwise_equal(before, clip.model.state_dict())
    assert not any(module.training for module in clip.modules())
    assert all(p.grad is None and not p.requires_grad for p in clip.parameters())
    assert not generator.training
    assert not any(p.requires_grad for p in generator.parameters())


def test_what_is_trained_is_averaged_and_saved(clip, stage1, tmp_path):
    bank, data = bank_and_data(clip, stage1)
    averaged, _ = train_generator(clip, bank, data, train_config(tmp_path / "averaged", average=0.9))
    last, _ = train_generator(clip, bank, data, train_config(tmp_path / "last", average=0.0))
    states = torch.load(tmp_path / "averaged" / "stage-2.ckpt", weights_only=True)["states"]
    assert_bitwise_equal(states["average"]["weights"], averaged.state_dict())
    assert_bitwise_equal(states["generator"], last.state_dict())
    assert not torch.equal(averaged.flow, last.flow)


def test_a_term_without_a_weight_is_not_computed(clip, stage1, tmp_path, monkeypatch):
    bank, data = bank_and_data(clip, stage1)
    plain = {"w_adversarial": 0.5, "w_emotion": 0.0}
    _, loop = train_generator(clip, bank, data, train_config(tmp_path / "patches", **plain))
    assert {"stage 2/adversarial", "stage 2/critic"} <= loop.curves.keys()
    assert "stage 2/emotion" not in loop.curves
    _, loop = train_generator(clip, bank, data, train_config(tmp_path / "emotion", w_adversarial=0.0, w_emotion=1.0))
    assert {"stage 2/emotion", "stage 2/critic"} <= loop.curves.keys()
    assert "stage 2/adversarial" not in loop.curves

    def never(*of, **options):
        raise AssertionError

    monkeypatch.setattr(players, "Critics", never)
    monkeypatch.setattr(type(clip), "encode_image", never)
    none = {"w_adversarial": 0.0, "w_emotion": 0.0, "w_pcmecl": 0.0, "w_reconstruction": 0.0, "w_person": 0.0}
    config = train_config(tmp_path / "none", **none, w_speech=0.0, strength=0.0, w_identity=0.0)
    _, loop = train_generator(clip, bank, data, config)
    terms = {name.partition("/")[2] for name in loop.curves}
    assert terms == {"loss", "recognition", "mouth", "smooth", "folding", "shading", "sharpness", "paint"}


def test_the_mouth_loss_looks_at_the_mouth():
    source = torch.zeros(1, 3, 20, 20)
    box = [0.4, 0.5, 0.6, 0.9]
    for row, column, counts in ((12, 9, True), (4, 9, False), (12, 2, False), (19, 9, False)):
        edited = source.clone()
        edited[..., row, column] = 1
        assert (mouth_loss(source, edited, box) > 0) == counts


def test_drawn_faces_are_compared_by_the_reader_and_others_by_pixels(clip, stage1, tmp_path, caplog):
    bank, drawn = bank_and_data(clip, stage1)
    _, loop = train_generator(clip, bank, drawn, train_config(tmp_path / "drawn"))
    assert {"stage 2/speech", "stage 2/person"} <= loop.curves.keys()
    assert not {"stage 2/mouth", "stage 2/identity"} & loop.curves.keys()
    others = drawn.subset(range(len(drawn)))
    with caplog.at_level(logging.INFO, logger="pcmecl_fast"):
        _, loop = train_generator(clip, bank, others, train_config(tmp_path / "others"))
    assert {"stage 2/mouth", "stage 2/identity"} <= loop.curves.keys()
    assert not {"stage 2/speech", "stage 2/person"} & loop.curves.keys()
    assert caplog.text.count("the reader knows drawn faces only") == 1


@pytest.mark.parametrize("drawn", [True, False])
def test_what_keeps_person_and_speech_begins_late_and_grows(clip, stage1, tmp_path, drawn):
    bank, data = bank_and_data(clip, stage1)
    config = train_config(tmp_path, steps=8, keep_from=0.25, w_person=3.0, w_identity=3.0)
    _, loop = train_generator(clip, bank, data if drawn else data.subset(range(len(data))), config)
    curves = {name.partition("/")[2]: dict(curve) for name, curve in loop.curves.items()}
    late = ("person", "speech") if drawn else ("identity", "mouth")
    weights = {name: getattr(config, f"w_{name}") for name in players.TERMS}
    assert [list(curves[name]) for name in late] == [[2, 3, 4, 5, 6, 7]] * 2
    for step, part in enumerate([0, 0, 0.5, 1, 1, 1, 1, 1]):
        terms = {name: curve[step] for name, curve in curves.items() if step in curve and name not in players.RESERVED}
        loss = sum(weights.get(name, 1.0) * (part if name in late else 1.0) * term for name, term in terms.items())
        assert curves["loss"][step] == pytest.approx(loss, rel=1e-5)


def test_what_a_reader_says_teaches_mouth_and_chin_alone():
    frames = torch.rand(2, 3, 20, 40, requires_grad=True)
    below = stage_two.learning_below(frames, [0.4, 0.6, 0.6, 0.8])
    assert torch.equal(below, frames)
    below.sum().backward()
    expected = torch.zeros(20, 40)
    expected[12:, 10:30] = 1
    assert torch.equal(frames.grad, expected.expand(2, 3, -1, -1))
    # As wide as the frame where the box is.
    stage_two.learning_below(frames, [0, 0, 1, 1]).sum().backward()
    assert torch.equal(frames.grad, (1 + expected).expand(2, 3, -1, -1))


@pytest.mark.parametrize(("kept", "first_row"), [("speech", 0.62), ("person", 0)])
def test_speech_is_kept_by_mouth_and_chin_and_the_person_by_all_of_the_face(clip, stage1, tmp_path, kept, first_row):
    bank, data = bank_and_data(clip, stage1)
    weights = {f"w_{name}": 0.0 for name in players.TERMS if name != "recognition"}
    step = stage_two.Step(clip, bank, data, train_config(tmp_path, **weights | {f"w_{kept}": 5.0}))
    plan = step.draw(4, torch.Generator().manual_seed(0))
    batch = Batch.of(plan, data.frames(plan.index)).parts(1)[0]
    painted = batch.frames.mul(0.9).requires_grad_()
    step.players.editing = lambda frames, drive, back: (Edit(painted, {}), None)
    step.terms_of(batch, 0)[2].backward()
    reached = painted.grad.abs().amax((0, 1, 3)) > 0
    assert reached.nonzero()[0].item() == max(round(first_row * len(reached)) - 1, 0)  # what is asked for is blurred


def test_what_frozen_networks_ask_for_is_blurred(clip, stage1, tmp_path, monkeypatch):
    bank, data = bank_and_data(clip, stage1)
    weights = {f"w_{name}": 0.0 for name in players.TERMS if name != "recognition"}
    step = stage_two.Step(clip, bank, data, train_config(tmp_path, **weights | {"w_pcmecl": 5.0}))
    plan = step.draw(4, torch.Generator().manual_seed(0))
    batch = Batch.of(plan, data.frames(plan.index)).parts(1)[0]
    edited = batch.frames.mul(0.9).requires_grad_()
    step.players.editing = lambda frames, drive, back: (Edit(edited, {}), None)
    # Nothing but rows that alternate is asked for.
    rows = torch.tensor([1.0, -1.0]).repeat(edited.shape[2] // 2)[:, None]
    monkeypatch.setattr(step.terms_of, "_views", lambda batch, frames, seed: (batch.frames, frames))
    step.terms_of.criterion = lambda source, edited, *_, **__: (rows * edited).mean()
    step.terms_of(batch, 0)[2].backward()
    assert edited.grad[:, :, 1:-1].abs().max() < 1e-6


def test_the_critic_of_mouths_may_count_for_more_at_first(clip, stage1, tmp_path):
    bank, data = bank_and_data(clip, stage1)
    config = train_config(tmp_path, steps=10, w_emotion_mouth=1.5, emotion_mouth_early=3.0)
    _, loop = train_generator(clip, bank, data, config)
    curves = {name.partition("/")[2]: dict(curve) for name, curve in loop.curves.items()}
    weights = {name: getattr(config, f"w_{name}") for name in players.TERMS}
    for step, factor in enumerate([3, 3, 3, 3, 3, 1 + 2 / 3, 1, 1, 1, 1]):
        terms = {name: curve[step] for name, curve in curves.items() if name not in players.RESERVED}
        factors = {"emotion_mouth": factor}
        loss = sum(weights.get(name, 1.0) * factors.get(name, 1.0) * term for name, term in terms.items())
        assert curves["loss"][step] == pytest.approx(loss, rel=1e-5)


def test_the_first_half_of_the_steps_may_take_fewer_frames(clip, stage1, tmp_path, monkeypatch):
    bank, data = bank_and_data(clip, stage1)
    taken, plain = [], stage_two.Step.__call__

    def counting(self, batch, seed):
        taken.append(len(batch.frames))
        return plain(self, batch, seed)

    monkeypatch.setattr(stage_two.Step, "__call__", counting)
    train_generator(clip, bank, data, train_config(tmp_path / "fewer", steps=5, batch_early=2))
    train_generator(clip, bank, data, train_config(tmp_path / "same", steps=2))
    assert taken == [2, 2, 2, 4, 4, 4, 4]
    with pytest.raises(ValueError, match="batch_early: 3 frames cannot be divided among 2 parts; takes a multiple of"):
        train_generator(clip, bank, data, train_config(tmp_path / "odd", batch_early=3, accumulate=2))


def test_references_show_the_target_emotion():
    shown = torch.tensor([0, 1, 2, 1, 0, 2])
    target = torch.tensor([2, 2, 1, 0] * 10)
    index = FramesByEmotion(shown).draw(target, torch.Generator().manual_seed(0))
    assert torch.equal(shown[index], target)
    assert len(index.unique()) == 6


def test_a_bank_for_other_emotions_is_rejected(clip, stage1, tmp_path, few_faces):
    bank, _ = bank_and_data(clip, stage1)
    other = SyntheticFaces(3, emotions=["neutral", "sad", "happy"], clips=1, frames_per_clip=1, size=32, seed=1)
    with pytest.raises(ValueError, match=r"bank: has the emotions \['neutral', 'happy', 'sad'\], the data set has"):
        train_generator(clip, bank, other, train_config(tmp_path))
    with pytest.raises(KeyError, match="individual: 3 of the 3 asked for are not among the bank's 3: 'person-8-000' "):
        train_generator(clip, bank, few_faces(seed=8), train_config(tmp_path))


def test_without_real_changes_the_length_of_edits_is_not_constrained(clip, tmp_path, few_faces, caplog):
    _, bank, _ = learn_prompts(clip, Numbers([0, 0, 1, 1], [0, 1, 0, 1]), prompts_config(tmp_path / "prompts"))
    names = Numbers([0, 1], [0, 1])  # nobody shows two emotions
    with caplog.at_level(logging.WARNING, logger="pcmecl_fast"):
        criterion = criterion_for(clip, bank, names, train_config(tmp_path))
    assert criterion.strength == 0
    assert "the length of edits is not constrained" in caplog.text


def test_nan_stops_the_run_with_a_message_and_is_not_saved(clip, tmp_path):
    people, shown = [0, 0, 0, 1, 1, 1], [0, 1, 2] * 2
    names = Numbers(people, shown)
    _, bank, _ = learn_prompts(clip, names, prompts_config(tmp_path / "prompts"))
    with pytest.raises(FloatingPointError, match=r"stage 2: loss, .*pcmecl.* became NaN at step 0; lower the learning"):
        train_generator(clip, bank, Numbers(people, shown, float("nan")), train_config(tmp_path))
    assert not list(tmp_path.glob("*.ckpt"))


# Whole runs


def summary_of(run):
    return json.loads((Path(run) / "summary.json").read_text())


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "reference"},
        {"amp": "bf16"},
        {"amp": "fp16"},
        {"condition": "frame"},
        {"condition": "none", "negatives": "distinct", "ending": "."},
        {"context": "per-emotion", "descriptions": ["calm", "a happy face", "a sad face"], "n_ctx": 2},
        {"generator_options": {"driven_by": "reference"}},
        {"optimizer": "muon", "w_emotion": 1.0, "w_emotion_mouth": 0.5},
        {"optimizer": "muon", "generator": "warp-fields", "amp": "fp16"},
        {"missing": 1},
        {"keep_from": 0.3, "batch_early": 2},
        {"seed": 3, "emotions": ["happy", "sad"]},
    ],
    ids=str,
)
def test_every_kind_of_run_ends_in_a_summary_and_can_be_evaluated_again(tmp_path, options):
    summary = run_train(train_config(tmp_path, **options))
    assert all(value == value for value in summary.values())
    assert summary_of(tmp_path) == summary
    again = run_evaluate(EvaluateConfig(run=tmp_path, device="cpu"))
    assert again["counts"] == summary["counts"]
    assert means(again) == pytest.approx(means(summary), rel=1e-3, abs=1e-3)


def test_the_seed_of_an_evaluation_draws_other_targets(stage1, tmp_path):
    run_train(train_config(tmp_path, prompts=stage1))
    first, second = (
        run_evaluate(EvaluateConfig(run=tmp_path, seed=seed, device="cpu", overwrite=True)) for seed in (0, 1)
    )
    assert first["psnr_source"] != second["psnr_source"]
    assert first["zero_shot_accuracy"] == second["zero_shot_accuracy"]  # of the sources, which are the same


def test_another_seed_trains_on_other_people_but_is_judged_on_the_same():
    (first, held), (second, held_again) = (open_data(train_config("unused", seed=seed)) for seed in (0, 1))
    assert not set(first.individuals) & set(second.individuals)
    assert held.keys == held_again.keys
    assert not set(held.individuals) & (set(first.individuals) | set(second.individuals))


def test_missing_emotions_are_spread_over_the_people():
    data, held = open_data(train_config("unused", missing=1))
    shown = data.available()
    assert shown[:, 0].all()
    assert (~shown).sum(1).tolist() == [1, 1, 1]
    assert not shown.all(0)[1:].any()
    assert held.available().all()
    with pytest.raises(ValueError, match="missing: takes 0 to 1 emotions, got 2"):
        open_data(train_config("unused", missing=2))


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_an_unavailable_backend_stops_the_run_and_names_the_alternatives(tmp_path, backend):
    from pcmecl_fast.ops import backend_status

    if {status.name: status for status in backend_status()}[backend].available:
        pytest.skip(f"{backend} runs here")
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run here: "):
        run_train(train_config(tmp_path, backend=backend))


def test_the_backend_reaches_every_operator(tmp_path, stage1, monkeypatch):
    from pcmecl_fast.ops.operator import REFERENCE, requested_backend

    seen = set()
    for name, implementation in REFERENCE.implementations.items():

        def forward(*arguments, _forward=implementation.forward, _name=name):
            seen.add((_name, requested_backend(None)))
            return _forward(*arguments)

        monkeypatch.setitem(REFERENCE.implementations, name, implementation._replace(forward=forward))
    run_train(train_config(tmp_path, backend="reference"))
    assert seen == {
        (operator, "reference")
        for operator in ("clip_frames", "correlation_loss", "direction_loss", "direction_logits")
    }


def test_rows_are_computed_for_people_unseen_by_the_prompts(clip, stage1, tmp_path):
    summary = run_train(train_config(tmp_path, prompts=stage1, seed=5))  # other people than stage 1 had
    assert summary["clip_direction"] == summary["clip_direction"]
    assert not (tmp_path / "prompts").exists()


# Checkpoints


def test_a_resumed_loop_does_the_remaining_steps_with_the_same_randomness(tmp_path):
    def loop(folder, resume):
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        return Loop(folder, "stage", {"m": model}, steps=7, seed=3, every=2, resume=resume, signature={"a": 1}), model

    def work(loop, model, stop=None):
        for step in loop:
            if step == stop:
                break
            with torch.no_grad():
                model.weight.add_(torch.randn(1, 1, generator=loop.generator(step)))
            loop.record(step, weight=model.weight.sum())
        return model.weight.item(), loop.curves

    whole = work(*loop(tmp_path / "whole", False))
    work(*loop(tmp_path / "cut", False), stop=5)
    resumed, model = loop(tmp_path / "cut", True)
    assert resumed.done == 4
    assert work(resumed, model) == whole


def test_resume_without_a_checkpoint_starts_at_the_beginning(clip, tmp_path, few_faces):
    learn_prompts(clip, few_faces(), prompts_config(tmp_path, resume=True))
    assert (tmp_path / "bank.safetensors").is_file()


def test_resuming_a_finished_stage_changes_nothing(clip, tmp_path, few_faces):
    _, bank, loop = learn_prompts(clip, few_faces(), prompts_config(tmp_path))
    _, again, resumed = learn_prompts(clip, few_faces(), prompts_config(tmp_path, resume=True))
    assert torch.equal(bank.features, again.features)
    assert resumed.curves == loop.curves


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, "--seed was 0, is 1"),
        ({"steps": 9}, "--steps was 3, is 9"),
        ({"batch": 6}, "--batch was 4, is 6"),
        ({"generator_options": {"shading": 0.1}}, "--generator-options was {.*'shading': 0.4.* is {.*'shading': 0.1"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_rejected(clip, stage1, tmp_path, change, says):
    bank, data = bank_and_data(clip, stage1)
    train_generator(clip, bank, data, train_config(tmp_path))
    with pytest.raises(ValueError, match=f"--resume: .*stage-2.ckpt belongs to another configuration: {says}"):
        train_generator(clip, bank, data, train_config(tmp_path, resume=True, **change))


def test_a_checkpoint_of_another_tower_is_rejected(clip, other_clip, tmp_path, few_faces):
    learn_prompts(clip, few_faces(), prompts_config(tmp_path))
    with pytest.raises(
        ValueError, match=r"--resume: .*stage-1.ckpt belongs to another configuration: the weights of --clip are others"
    ):
        learn_prompts(other_clip, few_faces(), prompts_config(tmp_path, resume=True))


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "another file of torch", "a flipped bit"])
def test_a_broken_checkpoint_is_named_in_one_line(clip, tmp_path, few_faces, damage):
    learn_prompts(clip, few_faces(), prompts_config(tmp_path, steps=2))
    path = tmp_path / "stage-1.ckpt"
    if damage == "another file of torch":
        torch.save({"weights": torch.ones(1)}, path)
    else:
        content = path.read_bytes()
        weight = content.index(torch.load(path, weights_only=True)["states"]["prompts"]["context"].numpy().tobytes())
        flipped = content[:weight] + bytes([content[weight] ^ 1]) + content[weight + 1 :]
        cut = content[: len(content) // 2]
        path.write_bytes({"cut": cut, "empty": b"", "text": b"hello there", "a flipped bit": flipped}[damage])
    with pytest.raises(ValueError, match=r"--resume: .*stage-1.ckpt is not a .*; --overwrite starts again") as caught:
        learn_prompts(clip, few_faces(), prompts_config(tmp_path, steps=2, resume=True))
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_last_checkpoint_to_resume_from(clip, tmp_path, few_faces, monkeypatch):
    _, whole, _ = learn_prompts(clip, few_faces(), prompts_config(tmp_path / "whole", steps=6))
    fsync, left = os.fsync, [2]  # two checkpoints fit

    def filling(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", filling)
    with pytest.raises(OSError, match=r"No space left on device: '.*stage-1.ckpt'"):
        learn_prompts(clip, few_faces(), prompts_config(tmp_path / "full", steps=6))
    monkeypatch.undo()
    assert not [path for path in (tmp_path / "full").iterdir() if path.name.startswith(".")]
    _, resumed, _ = learn_prompts(clip, few_faces(), prompts_config(tmp_path / "full", steps=6, resume=True))
    assert torch.equal(resumed.features, whole.features)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_and_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(stage1, tmp_path):
    config = train_config(tmp_path / "whole", prompts=stage1, size=16, steps=40, keep_from=0.1, batch_early=2)
    run_train(config)
    assert yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())["steps"] == 40

    options = ["--config", str(tmp_path / "whole" / "config.yaml"), "--out", str(tmp_path / "killed")]
    command = [sys.executable, "-m", "pcmecl_fast.cli", "train", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    checkpoint = tmp_path / "killed" / "stage-2.ckpt"
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as killed:
        while not checkpoint.exists() and killed.poll() is None:
            time.sleep(0.005)
        killed.kill()
        error = killed.communicate()[1].decode()
        assert killed.returncode == -signal.SIGKILL, error
    assert not (tmp_path / "killed" / "generator.safetensors").exists()
    done = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < done < 40

    resumed = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumes at step {done} of 40" in " ".join(resumed.stderr.split())
    assert_bitwise_equal(state_of(tmp_path / "killed"), state_of(tmp_path / "whole"))
    first, second = summary_of(tmp_path / "killed"), summary_of(tmp_path / "whole")
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_training_is_logged_for_tensorboard(stage1, tmp_path, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with caplog.at_level(logging.WARNING):
        run_train(train_config(tmp_path, prompts=stage1, steps=50, size=16))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "stage-2")).Reload()
    assert {"loss", "pcmecl", "critic"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("loss")) == 50
    assert events.Tags()["images"] == ["edits"]
