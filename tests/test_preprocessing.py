"""How images reach a tower: as its weights were trained, wherever the weights come from."""

import logging

import numpy as np
import open_clip
import pytest
import torch
from architectures import register
from one_line import wrong
from open_clip.pretrained import _PRETRAINED, _apcfg, _mccfg, _pcfg, _pecfg, _slpcfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from pcmecl_fast import load_clip, ops, preprocessing
from pcmecl_fast.preprocessing import Preprocessing, of_open_clip, preprocessing_of_file
from pcmecl_fast.run import load_clip_for
from pcmecl_fast.train.config import PromptsConfig

KEYS = ("mean", "std", "interpolation", "resize_mode")
OPENAI = Preprocessing(PreprocessCfg().mean, PreprocessCfg().std, "bicubic", "shortest")
SIZES = [(48, 48), (32, 32), (24, 24), (40, 90), (97, 33), (20, 31)]  # height, width


def as_registered(config):
    return tuple(tuple(config[key]) if key in ("mean", "std") else config[key] for key in KEYS)


def as_found(found):
    return tuple(getattr(found, key) for key in KEYS)


@pytest.fixture(autouse=True)
def _say_everything_again():
    preprocessing._say_assumed.cache_clear()


@pytest.mark.parametrize("name", open_clip.list_models())
def test_a_file_of_every_architecture_is_taken_as_its_tags_are(name):
    tags = _PRETRAINED.get(name, {})
    registered = {as_registered(config) for config in tags.values()}
    if len(registered) <= 1:
        (expected,) = registered or {as_found(OPENAI)}
        assert as_found(preprocessing_of_file(name)) == expected
    else:
        with pytest.raises(ValueError, match="a file does not say which it follows"):
            preprocessing_of_file(name)
    for tag, config in tags.items():
        assert as_found(preprocessing_of_file(name, like=tag)) == as_registered(config)


# Loaded from a file


KINDS = {"openai": _pcfg(), "siglip": _slpcfg(), "clipa": _apcfg(), "mobileclip": _mccfg(), "pe": _pecfg()}
KINDS["padded"] = {**_pcfg(), "resize_mode": "longest"}


@pytest.fixture
def weights_of(monkeypatch, tmp_path):
    """Registers a tiny architecture with some tags, and returns a file of its weights."""

    def make(tags, **changes):
        register(monkeypatch, "tiny", tags, **changes)
        torch.manual_seed(0)
        torch.save(open_clip.create_model("tiny", pretrained=None).state_dict(), tmp_path / "weights.pt")
        return str(tmp_path / "weights.pt")

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_features_from_a_file_are_those_of_open_clips_own_transform(weights_of, kind, size):
    config = {key: KINDS[kind][key] for key in KEYS}
    clip = load_clip("tiny", weights_of({"some": {**config, "url": "", "hf_hub": ""}}))
    picture = smooth_picture(*size)
    transform = image_transform_v2(PreprocessCfg(size=32, **config), is_train=False)
    expected = clip.model.encode_image(transform(Image.fromarray(picture))[None])
    frames = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    # Pillow rounds to 256 levels, and open_clip cuts and pads after its resize: half a pixel where sides are odd.
    cosine = torch.nn.functional.cosine_similarity(clip.encode_image(frames), expected)
    assert cosine > (0.9999 if size[0] == size[1] else 0.99)


def smooth_picture(height, width):
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(5 * x + 2 * y), np.cos(3 * x - 4 * y), np.sin(6 * x * y)]
    return np.uint8(np.stack(waves, axis=-1) * 100 + 128)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mode_is_of_no_consequence_for_square_frames(kind):
    how = of_open_clip({key: KINDS[kind][key] for key in KEYS}, {})
    frames = torch.rand(2, 3, 45, 45) * 2 - 1
    expected = ops.clip_frames(frames, 32, how.mean, how.std, interpolation=how.interpolation)
    assert torch.equal(how(frames, 32), expected)


def test_what_is_cut_out_and_padded_is_central():
    frames = torch.rand(1, 3, 8, 5) * 2 - 1
    cut, padded = (Preprocessing((0.5,) * 3, (0.5,) * 3, resize_mode=mode) for mode in ("shortest", "longest"))
    torch.testing.assert_close(cut(frames, 5), frames[:, :, 1:6])
    torch.testing.assert_close(padded(frames, 8)[..., 1:6], frames)
    torch.testing.assert_close(padded(frames, 8)[..., 0], torch.full((1, 3, 8), -1.0))  # black
    wide = frames.mT
    torch.testing.assert_close(cut(wide, 5), wide[..., 1:6])
    torch.testing.assert_close(padded(wide, 8)[:, :, 1:6], wide)


def test_gradients_reach_every_pixel_that_the_tower_sees():
    frames = torch.rand(1, 3, 40, 60, requires_grad=True)
    Preprocessing(OPENAI.mean, OPENAI.std, resize_mode="shortest")(frames, 16).sum().backward()
    assert frames.grad[..., 10:50].ne(0).all()
    assert frames.grad[..., :10].eq(0).all()


# What a user may say


def test_values_of_ones_own_come_before_those_of_the_tags(weights_of):
    path = weights_of({"some": _slpcfg()})
    clip = load_clip("tiny", path, mean=[0.1, 0.2, 0.3], std=(0.4, 0.5, 0.6), interpolation="bilinear")
    assert clip.preprocessing == Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", "squash")


def test_tags_that_differ_are_chosen_from(weights_of):
    path = weights_of({"one": _pcfg(), "two": _slpcfg(), "three": _pcfg()})
    with pytest.raises(ValueError, match="differ") as caught:
        load_clip("tiny", path)
    assert str(caught.value) == (
        "pretrained: the weights tags of 'tiny' differ in mean, std and resize_mode, and a file does not say which it "
        'follows; pass like="one" (mean 0.481 0.458 0.408, std 0.269 0.261 0.276, resize_mode shortest, as 1 more), '
        'like="two" (mean 0.5 0.5 0.5, std 0.5 0.5 0.5, resize_mode squash) or mean=, std= and resize_mode='
    )
    assert load_clip("tiny", path, like="two").preprocessing.resize_mode == "squash"
    given = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "longest"}
    assert load_clip("tiny", path, **given).preprocessing == Preprocessing(**given)


def test_an_architecture_without_tags_is_openais_and_the_log_says_so_once(weights_of, caplog):
    path = weights_of(None)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="pcmecl_fast"):
        assert load_clip("tiny", path).preprocessing == OPENAI
        load_clip("tiny", path)
    (record,) = caplog.records
    assert "how tiny takes its images: OpenAI's preprocessing is assumed (mean 0.481" in record.getMessage()
    caplog.clear()
    load_clip("tiny", path, mean=OPENAI.mean, std=OPENAI.std)
    assert not caplog.records


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"like": "thre"}, "like: got 'thre'; takes a weights tag of 'tiny': one, three; did you mean three?"),
        ({"mean": (0.5, 0.5)}, r"mean: got \(0.5, 0.5\); takes three numbers"),
        ({"std": (0.5, 0.5, 0)}, r"std: got \(0.5, 0.5, 0.0\); takes three numbers above 0"),
        ({"interpolation": "random"}, "interpolation: got 'random'; takes one of bicubic, bilinear"),
        ({"resize_mode": "crop"}, "resize_mode: got 'crop'; takes one of squash, shortest, longest"),
    ],
)
def test_wrong_values_are_named(weights_of, given, says):
    path = weights_of({"one": _pcfg(), "three": _pcfg()})
    with pytest.raises(ValueError, match=says):
        load_clip("tiny", path, **given)


def test_an_interpolation_that_only_training_has_is_refused_with_the_way_out(weights_of):
    path = weights_of({"one": {**_pcfg(), "interpolation": "random"}})
    with pytest.raises(ValueError, match=r"takes one of bicubic, bilinear, and the model's own .* pass interpolation="):
        load_clip("tiny", path)
    assert load_clip("tiny", path, interpolation="bicubic").preprocessing == OPENAI


@pytest.mark.parametrize("given", [{"like": "openai"}, {"mean": (0.5,) * 3}, {"resize_mode": "squash"}])
def test_the_built_in_model_takes_none(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))}: 'tiny-face' has its preprocessing built in and takes"):
        load_clip("tiny-face", **given)


def test_like_without_tags_says_what_to_pass(weights_of):
    with pytest.raises(
        ValueError, match="like: got 'openai', and open_clip has no weights tag of 'tiny'; pass mean= a"
    ):
        load_clip("tiny", weights_of(None), like="openai")


def test_the_image_hash_holds_all_of_it(weights_of):
    path = weights_of({"some": _slpcfg()})
    changes = [{}, {"mean": (0.5, 0.5, 0.4)}, {"interpolation": "bilinear"}, {"resize_mode": "shortest"}]
    assert len({load_clip("tiny", path, **given).image_hash() for given in changes}) == len(changes)


def test_a_command_asks_in_its_own_words_and_takes_the_answer(capsys, tmp_path, weights_of):
    path = weights_of({"one": _pcfg(), "two": _slpcfg()})
    line = wrong(capsys, "prompts", "--clip", "tiny", "--clip-pretrained", path, "--out", tmp_path / "out")
    assert line.startswith(
        "pcmecl-fast prompts: --clip-pretrained: the weights tags of 'tiny' differ in mean, std and res"
    )
    assert "pass --clip-like one (mean" in line
    config = PromptsConfig(clip="tiny", clip_pretrained=path, clip_like="two", device="cpu")
    assert load_clip_for(config).preprocessing == of_open_clip(_slpcfg(), {})
