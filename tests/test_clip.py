"""CLIP models by name: always frozen, the built-in one without a network, the others through open_clip."""

import copy
import logging
import math
import socket

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pcmecl_fast import PersonalizedPrompts, load_clip
from pcmecl_fast.clip import ASSETS
from pcmecl_fast.synthetic.tiny_face import zero_shot_accuracy

SMALL = "ViT-S-32-alt"  # open_clip's quickest to build, and without published weights


def frames(*shape, **kwargs):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), **kwargs) * 2 - 1


@pytest.fixture(scope="module")
def small_clip():
    return load_clip(SMALL)


# tiny-face


def test_tiny_face_is_the_default_and_needs_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("somebody asked for the network")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    clip = load_clip()
    assert (clip.name, clip.pretrained) == ("tiny-face", "built-in")
    assert clip.encode_image(frames(2, 3, 64, 64)).shape == (2, clip.embed_dim)
    assert clip.model.encode_text(clip.tokenizer(["a happy face"])).shape == (1, clip.embed_dim)


def test_tiny_face_is_at_most_five_megabytes():
    assert (ASSETS / "tiny-face.safetensors").stat().st_size <= 5_000_000


def test_tiny_face_knows_emotions_on_people_and_wordings_it_has_not_seen(clip):
    assert zero_shot_accuracy(clip.model) >= 0.85


def test_tiny_face_has_the_attributes_of_any_clip(clip):
    assert clip.image_size == 64
    assert clip.tokenizer(["sad", "a very happy face"]).shape == (2, 77)
    assert isinstance(clip.logit_scale, float)
    assert 1 < clip.logit_scale <= 100
    assert clip.device == torch.device("cpu")
    assert clip.dtype == torch.float32


@pytest.mark.parametrize("context", ["shared", "per-emotion"])
def test_tiny_face_supports_prompt_trees(clip, context):
    torch.manual_seed(0)
    prompts = PersonalizedPrompts(clip, ["happy", "a person who looks sad"], context=context)
    condition = torch.randn(3, clip.embed_dim)
    assert prompts._packed is not None
    torch.testing.assert_close(prompts(condition), prompts(condition, backend="reference"), rtol=0, atol=2e-6)


def test_every_load_gives_the_same_model(clip):
    again = load_clip().model.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in clip.model.state_dict().items())


# Frozen


def test_a_clip_stays_frozen_and_in_eval_mode():
    clip = load_clip()
    assert not any(module.training for module in clip.modules())
    around = nn.Sequential(nn.Linear(2, 2), nn.Module())
    around[1].clip = clip
    assert clip.train() is clip
    around.train()
    assert around[0].training
    assert not any(module.training for module in clip.modules())
    assert not any(parameter.requires_grad for parameter in clip.parameters())


@pytest.mark.parametrize("size", [(64, 64), (37, 91), (200, 131), (8, 8)])
def test_frames_of_any_size_are_encoded_with_gradients_to_them_alone(clip, size):
    pictures = frames(2, 3, *size).requires_grad_()
    features = clip.encode_image(pictures)
    assert features.shape == (2, clip.embed_dim)
    features.square().sum().backward()
    assert pictures.grad.isfinite().all()
    assert pictures.grad.flatten(1).norm(dim=1).gt(0).all()
    assert all(parameter.grad is None for parameter in clip.parameters())


def test_frames_of_clips_own_size_are_only_normalised(clip):
    pictures = frames(2, 3, 64, 64)
    mean, std = (torch.tensor(values)[:, None, None] for values in (clip.preprocessing.mean, clip.preprocessing.std))
    expected = clip.model.encode_image(((pictures + 1) / 2 - mean) / std)
    torch.testing.assert_close(clip.encode_image(pictures), expected, rtol=1e-4, atol=1e-5)


def test_features_of_a_frame_do_not_depend_on_the_others(clip):
    pictures = frames(5, 3, 40, 40)
    together = clip.encode_image(pictures)
    alone = torch.cat([clip.encode_image(picture[None]) for picture in pictures])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


# Dtypes and devices


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_clip_of_another_dtype_sees_the_same(clip, dtype):
    other = load_clip(dtype=dtype)
    assert other.dtype == dtype
    pictures = frames(4, 3, 48, 48)
    features = other.encode_image(pictures)
    assert features.dtype == dtype
    assert F.cosine_similarity(features.double(), clip.encode_image(pictures).double()).min() > 0.99


def test_the_text_hash_is_the_towers_whatever_its_dtype(clip, other_clip, small_clip):
    known = clip.text_hash()
    assert known == load_clip().text_hash()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert load_clip(dtype=dtype).text_hash() == known
        assert copy.deepcopy(clip).to(dtype).text_hash() == known
    assert load_clip().half().float().text_hash() == known
    assert len({known, other_clip.text_hash(), small_clip.text_hash()}) == 3


def test_the_text_hash_does_not_look_at_the_image_tower(clip):
    other = load_clip()
    with torch.no_grad():
        next(other.model.visual.parameters()).add_(1)
    assert other.text_hash() == clip.text_hash()
    other = load_clip()
    with torch.no_grad():
        other.model.text_projection[0, 0] += 1e-3
    assert other.text_hash() != clip.text_hash()


@pytest.mark.parametrize("cast", [False, True])
def test_what_is_known_of_weights_goes_with_them(cast):
    clip = load_clip()
    if cast:
        clip = clip.bfloat16().float()
    text, image, scale = clip.text_hash(), clip.image_hash(), clip.logit_scale
    state = {name: x + 0.25 for name, x in clip.model.state_dict().items()}
    clip.model.load_state_dict(state)
    assert clip.text_hash() != text
    assert clip.image_hash() != image
    assert clip.logit_scale == pytest.approx(min(scale * math.exp(0.25), 100.0), rel=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_clip_is_loaded_on_the_requested_device(clip):
    there = load_clip(device="cuda")
    assert there.device.type == "cuda"
    assert there.text_hash() == clip.text_hash()
    pictures = frames(2, 3, 48, 48)
    features = there.encode_image(pictures.cuda()).cpu()
    torch.testing.assert_close(features, clip.encode_image(pictures), rtol=1e-2, atol=1e-2)


# open_clip's models


def test_random_weights_warn_in_one_sentence(caplog):
    with caplog.at_level(logging.WARNING):
        load_clip(SMALL)
    (record,) = caplog.records
    assert record.name == "pcmecl_fast"
    message = record.getMessage()
    assert message == f"{SMALL} has random weights, so its features mean nothing: pass pretrained= (a local file)."


def test_random_weights_are_the_same_at_every_load_and_touch_no_other_randomness(small_clip):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    again = load_clip(SMALL)
    assert torch.equal(torch.rand(3), expected)
    state = again.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in small_clip.model.state_dict().items())


def test_a_model_of_open_clip_is_a_clip_like_the_built_in_one(small_clip):
    assert (small_clip.name, small_clip.pretrained) == (SMALL, "random")
    pictures = frames(1, 3, 40, 60).requires_grad_()
    small_clip.encode_image(pictures).sum().backward()
    assert pictures.grad.norm() > 0
    assert small_clip.tokenizer(["sad"]).shape == (1, small_clip.model.context_length)
    assert not any(parameter.requires_grad for parameter in small_clip.parameters())
    assert not any(module.training for module in small_clip.modules())


def test_a_local_file_gives_its_weights_without_a_warning(tmp_path, caplog, small_clip):
    state = {key: value + 0.01 for key, value in small_clip.model.state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    with caplog.at_level(logging.WARNING):
        loaded = load_clip(SMALL, str(tmp_path / "weights.pt"), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert not caplog.records
    assert all(torch.equal(value, state[key]) for key, value in loaded.model.state_dict().items())
    assert loaded.text_hash() != small_clip.text_hash()


# Bad names


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tinyface", "name: no CLIP model is called 'tinyface'; did you mean tiny-face?"),
        ("VIT-B32", "did you mean ViT-B-32"),
        ("ViT-L14", "did you mean ViT-L-14"),
        ("0123456789", "e.g. tiny-face, ViT-B-32"),
    ],
)
def test_an_unknown_name_lists_close_ones(name, says):
    with pytest.raises(ValueError, match=says):
        load_clip(name)


def test_an_unknown_tag_lists_the_models_tags():
    with pytest.raises(ValueError, match=r"pretrained: 'opnai' is neither a file nor .*'ViT-B-32'.* openai, laion400m"):
        load_clip("ViT-B-32", "opnai")


def test_tiny_face_accepts_no_other_weights():
    with pytest.raises(ValueError, match="pretrained: 'tiny-face' has its weights built in and takes none, got 'open"):
        load_clip("tiny-face", "openai")


@pytest.mark.parametrize("content", [b"", b"not weights"])
def test_a_broken_local_file_is_named_in_one_line(tmp_path, content):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(RuntimeError) as caught:
        load_clip(SMALL, str(path))
    message = str(caught.value)
    assert message.startswith(f"pretrained: the weights '{path}' of '{SMALL}' could not be loaded")
    assert "\n" not in message
