"""A tower's hash: whatever changes its features changes it, and nothing else does."""

import json

import open_clip
import pytest
import torch
from architectures import TINY, register
from open_clip.pretrained import _pcfg
from safetensors.torch import save_file

from pcmecl_fast import PromptBank, load_clip
from pcmecl_fast.files import load_tensors, save_tensors
from pcmecl_fast.prompts import load_prompts

COLOURS = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.fixture
def weights(monkeypatch, tmp_path):
    """A file of a tiny model's weights."""
    register(monkeypatch, "tiny")
    torch.manual_seed(0)
    save_file(open_clip.create_model("tiny", pretrained=None).state_dict(), tmp_path / "weights.safetensors")
    return str(tmp_path / "weights.safetensors")


def hashes(clip):
    return clip.text_hash(), clip.image_hash()


def test_one_file_with_another_activation_is_another_tower(monkeypatch, weights):
    register(monkeypatch, "tiny-quickgelu", quick_gelu=True)
    plain, quick = (load_clip(name, weights, **COLOURS) for name in ("tiny", "tiny-quickgelu"))
    tokens = plain.tokenizer(["a happy face"])
    assert not torch.allclose(plain.model.encode_text(tokens), quick.model.encode_text(tokens))
    assert all(one != other for one, other in zip(hashes(plain), hashes(quick), strict=True))


@pytest.mark.parametrize(
    ("text", "vision"),
    [
        ({"act_kwargs": {"approximate": "tanh"}}, {}),
        ({"pool_type": "last"}, {}),
        ({"pool_type": "eos", "eos_id": 2}, {}),
        ({"pool_type": "eos", "eos_id": 5}, {}),
        ({"no_causal_mask": True}, {}),
        ({"heads": 4}, {}),
        ({"norm_kwargs": {"eps": 1e-3}}, {}),
        ({"context_length": 50}, {}),
        ({}, {"head_width": 8}),
        ({}, {"pool_type": "avg"}),
        ({}, {"act_kwargs": {"approximate": "tanh"}}),
    ],
    ids=str,
)
def test_whatever_layers_do_with_the_same_weights_is_in_the_hash(monkeypatch, weights, text, vision):
    register(monkeypatch, "other", text=text, vision=vision)
    before, after = hashes(load_clip("tiny", weights, **COLOURS)), hashes(load_clip("other", weights, **COLOURS))
    assert (before[0] != after[0], before[1] != after[1]) == (bool(text), bool(vision))


def test_poolings_that_differ_by_eos_alone_differ(monkeypatch, weights):
    for eos in (2, 5):
        register(monkeypatch, f"eos-{eos}", text={"pool_type": "eos", "eos_id": eos})
    assert len({load_clip(f"eos-{eos}", weights, **COLOURS).text_hash() for eos in (2, 5)}) == 2


def test_the_same_tower_is_the_same_wherever_it_comes_from(monkeypatch, weights, tmp_path):
    tag = {key: value for key, value in _pcfg().items() if key not in ("url", "hf_hub")}
    register(monkeypatch, "tagged", {"some": {**tag, "file": weights}})
    config = {"model_cfg": TINY, "preprocess_cfg": {"mean": list(tag["mean"]), "std": list(tag["std"])}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))  # as a repository of the Hub has it
    clips = [load_clip("tagged", "some"), load_clip("tagged", weights), load_clip(f"local-dir:{tmp_path}")]
    assert len({hashes(clip) for clip in clips}) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_text_hash_is_the_same_in_every_dtype_and_the_image_hash_is_not(weights, dtype):
    clip, other = load_clip("tiny", weights, **COLOURS), load_clip("tiny", weights, **COLOURS, dtype=dtype)
    assert clip.text_hash() == other.text_hash()
    assert clip.image_hash() != other.image_hash()


@pytest.mark.parametrize("kind", ["bank", "prompts"])
def test_a_file_with_an_older_hash_says_what_to_do(clip, tmp_path, kind):
    from test_bank import EMOTIONS, PEOPLE, conditions, learned, save_prompts

    path, prompts = tmp_path / "file", learned(clip)
    if kind == "bank":
        PromptBank.build(prompts, conditions(clip), PEOPLE, EMOTIONS, clip=clip).save(path)
    else:
        save_prompts(path, prompts, EMOTIONS, clip)
    tensors, header = load_tensors(path, kind)
    header["tower"]["text_hash"] = header["tower"]["text_hash"].removeprefix("v2-")
    save_tensors(path, kind, {key: value.clone() for key, value in tensors.items()}, header)
    with pytest.raises(
        ValueError, match=r"was made by an older pcmecl_fast, .* make it again, with `pcmecl-fast prompts`"
    ):
        PromptBank.load(path, clip) if kind == "bank" else load_prompts(path, clip)
