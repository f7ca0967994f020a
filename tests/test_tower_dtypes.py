"""Towers in half precision: both stages train in them, parameters and losses stay in float32, a run keeps its dtype."""

import logging
from dataclasses import replace

import pytest
import torch
import yaml
from one_line import wrong
from torch.nn.functional import cosine_similarity

from bench import tower_dtypes
from pcmecl_fast import PCMECLCriterion, PromptBank, load_clip
from pcmecl_fast.data.features import FeatureStore
from pcmecl_fast.run import load_clip_for, open_data, run_train
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.towers import precision
from pcmecl_fast.towers.precision import DTYPES, tower_dtype
from pcmecl_fast.train import prompts as stage_one
from pcmecl_fast.train.config import PromptsConfig, TrainConfig
from pcmecl_fast.train.generator import train_generator
from pcmecl_fast.train.prompts import learn_prompts

pytestmark = pytest.mark.usefixtures("no_report")

EMOTIONS = ["neutral", "happy", "sad"]
HALF = ["bfloat16", "float16"]
SMALL = {
    "emotions": EMOTIONS,
    "individuals": 3,
    "clips": 1,
    "frames_per_clip": 2,
    "size": 32,
    "device": "cpu",
    "checkpoint_every": 2,
}


def prompts_config(out, **options):
    return PromptsConfig(**SMALL | {"out": out, "steps": 4, "batch_individuals": 3} | options)


def train_config(out, **options):
    generator = {"fields": 4, "hidden": 16}
    small = {"out": out, "steps": 4, "prompt_steps": 4, "batch": 4, "generator_options": generator}
    return TrainConfig(**SMALL | small | options)


def both_stages(out, dtype):
    config = train_config(out, tower_dtype=dtype)
    clip, (data, _) = load_clip_for(config), open_data(config)
    prompts, bank, first = learn_prompts(clip, data, config.stage_one())
    generator, second = train_generator(clip, bank, data, config)
    return clip, prompts, bank, generator, {**first.curves, **second.curves}


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory):
    return both_stages(tmp_path_factory.mktemp("float32"), "float32")


@pytest.fixture
def unknown_device(monkeypatch):
    """What "auto" finds is remembered, and said once."""
    precision._fast_dtype.cache_clear()
    yield
    precision._fast_dtype.cache_clear()


@pytest.mark.parametrize("dtype", HALF)
def test_both_stages_train_in_half_precision_as_in_float32(in_float32, tmp_path, dtype):
    clip, prompts, bank, generator, curves = both_stages(tmp_path, dtype)
    *_, expected = in_float32
    assert clip.dtype == DTYPES[dtype]
    learned = [*prompts.parameters(), *generator.parameters()]
    assert {x.dtype for x in (*learned, bank.features)} == {torch.float32}
    assert all(x.isfinite().all() for x in learned)
    for name in ("stage 1/loss", "stage 2/pcmecl"):
        half, full = torch.tensor(curves[name]), torch.tensor(expected[name])
        assert torch.equal(half[:, 0], full[:, 0])  # the steps
        compared = [lambda curve: curve]
        if (name, dtype) == ("stage 2/pcmecl", "bfloat16"):
            # The first edits are smaller than its rounding: after the first step, single ones differ by up to 0.07.
            compared = [lambda curve: curve[0], lambda curve: curve.mean(0)]
        for of in compared:
            torch.testing.assert_close(of(half), of(full), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_gather_in_float32(dtype):
    clip = load_clip(dtype=DTYPES[dtype])
    prompts = stage_one.PersonalizedPrompts(clip, EMOTIONS)
    features = prompts(torch.nn.functional.normalize(torch.randn(2, clip.embed_dim), dim=-1).to(clip.dtype))
    features.square().sum().backward()
    assert features.dtype == torch.float32
    assert {p.grad.dtype for p in prompts.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_goes_along_with_half_towers(in_float32, tmp_path, dtype, amp):
    _, _, bank, *_ = in_float32
    config = train_config(tmp_path, tower_dtype=dtype, amp=amp)
    _, loop = train_generator(load_clip_for(config), bank, open_data(config)[0], config)
    assert all(value == value for _, value in loop.curves["stage 2/loss"])


def test_features_and_gradients_are_those_of_float32():
    faces = SyntheticFaces(2, **tower_dtypes.FRAMES)
    rows = tower_dtypes.measure(["tiny-face"], faces, "cpu")
    assert [row.dtype for row in rows] == HALF
    for row in rows:
        assert max(row.image_error, row.text_error) < 1e-3
        assert min(row.frames_gradient_cosine, row.context_gradient_cosine) > 0.995
        assert row.loss_difference < 0.02
    bfloat16, float16 = rows
    assert float16.image_error < bfloat16.image_error


def test_a_tower_compared_with_itself_differs_in_nothing(clip):
    exact = tower_dtypes.results(clip, SyntheticFaces(2, **tower_dtypes.FRAMES))
    row = tower_dtypes.compared(clip, "float32", exact, exact)
    assert (row.loss_difference, row.weights) == (0.0, "trained")
    assert abs(row.image_error) < 1e-12
    assert abs(row.frames_gradient_cosine - 1) < 1e-12


def test_a_bank_goes_with_any_dtype_and_a_store_with_its_own(in_float32, tmp_path, few_faces):
    clip, _, bank, *_ = in_float32
    half = load_clip(dtype=torch.bfloat16)
    bank.save(tmp_path / "bank")
    assert torch.equal(PromptBank.load(tmp_path / "bank", half).features, bank.features)
    assert FeatureStore(tmp_path, half).folder != FeatureStore(tmp_path, clip).folder
    assert FeatureStore(tmp_path, half)(few_faces())[torch.arange(2)].dtype == torch.float32


# Commands


def test_a_run_goes_on_in_the_dtype_that_it_began_in(clip, tmp_path, few_faces):
    config = prompts_config(tmp_path, tower_dtype="bfloat16")
    learn_prompts(load_clip_for(config), few_faces(), config)
    other = replace(config, tower_dtype="float32", resume=True)
    with pytest.raises(ValueError, match=r"--resume: .*--tower-dtype was bfloat16, is float32"):
        learn_prompts(load_clip_for(other), few_faces(), other)


def test_a_finished_run_says_its_dtype_and_its_criterion_takes_it(tmp_path, monkeypatch, capsys, unknown_device):
    monkeypatch.setattr(precision, "_has_amx", lambda: True)
    config = train_config(tmp_path / "run", tower_dtype="auto", steps=2, prompt_steps=2)
    run_train(config)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["tower_dtype"] == "bfloat16"
    criterion = PCMECLCriterion.load(tmp_path / "run")
    assert (criterion.clip.dtype, criterion.features.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="--tower-dtype was bfloat16, is float16"):
        run_train(replace(config, tower_dtype="float16", resume=True))


def test_auto_is_float32_without_instructions_for_bfloat16_and_says_why_once(monkeypatch, caplog, unknown_device):
    for has in ("_has_amx", "_has_avx512_bf16"):
        monkeypatch.setattr(precision, has, lambda: False)
    with caplog.at_level(logging.INFO, logger="pcmecl_fast"):
        assert [tower_dtype("auto", "cpu") for _ in range(2)] == [torch.float32] * 2
    assert caplog.messages == [
        "tower_dtype: auto takes float32, since this CPU has no instructions for bfloat16 (AVX512-BF16, AMX)"
    ]


def test_auto_here_is_what_this_cpu_is_fast_in(tmp_path):
    fast = precision._has_amx() or precision._has_avx512_bf16()
    assert prompts_config(tmp_path, tower_dtype="auto").located().tower_dtype == ("bfloat16" if fast else "float32")


@pytest.mark.parametrize(
    ("capability", "dtype", "says"),
    [
        ((7, 5), torch.float32, "T4 (compute capability 7.5) lacks tensor cores for bfloat16"),
        ((8, 0), torch.bfloat16, "T4 (compute capability 8.0) has tensor cores for bfloat16"),
    ],
)
def test_auto_on_a_gpu_goes_by_its_compute_capability(monkeypatch, caplog, unknown_device, capability, dtype, says):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    with caplog.at_level(logging.INFO, logger="pcmecl_fast"):
        assert tower_dtype("auto", "cuda:1") == dtype
    assert says in caplog.text


def test_auto_on_a_device_that_nothing_is_known_of_is_float32(unknown_device):
    assert tower_dtype("auto", "meta") == torch.float32


def test_a_dtype_that_is_none_is_answered_in_one_line(capsys, tmp_path):
    with pytest.raises(ValueError, match="tower_dtype: takes one of float32, bfloat16, float16, auto, got 'half'"):
        tower_dtype("half", "cpu")
    config = tmp_path / "config.yaml"
    config.write_text("tower_dtype: half\n")
    line = wrong(capsys, "prompts", "--config", config, "--out", tmp_path / "out")
    assert "tower_dtype: got 'half'; takes one of float32, bfloat16, float16, auto" in line


def test_cosines_of_whole_features(clip, few_faces):
    frames = few_faces().frames(torch.arange(4))
    exact = clip.encode_image(frames)
    for dtype in HALF:
        assert cosine_similarity(load_clip(dtype=DTYPES[dtype]).encode_image(frames).float(), exact).min() > 0.999
