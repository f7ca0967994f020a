"""Personalized prompts: the padded path is the tower's own `encode_text`, for every kind of tower."""

from functools import cache
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from pcmecl_fast import load_clip
from pcmecl_fast.prompts.learner import PersonalizedPrompts
from pcmecl_fast.towers.text import encode_padded

EMOTIONS = ["angry", "contemptuous", "a very happy face", "sad"]
WORDS = "a photo of a"  # four tokens for every tokenizer here
VISION = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 16}
TEXT = {"context_length": 24, "width": 64, "heads": 2, "layers": 3}
D = 48


class WordTokenizer:
    """One id per word, between special tokens: [before] words [after] pads [end], cut to the context length."""

    def __init__(self, before=(), after=(), pad=0, end=(), length=24):
        self.before, self.after, self.pad, self.end, self.length = list(before), list(after), pad, list(end), length
        self.ids = {}

    def __call__(self, texts):
        room = self.length - len(self.before) - len(self.after) - len(self.end)
        rows = []
        for text in texts:
            words = [self.ids.setdefault(word, 10 + len(self.ids)) for word in text.split()][:room]
            pads = [self.pad] * (room - len(words))
            rows.append(self.before + words + self.after + pads + self.end)
        return torch.tensor(rows)


class MeanPooledTower(nn.Module):
    """The shape of open_clip's HFTextEncoder: a transformer with input embeddings, a mask from pads, a mean."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True)
        embeddings = nn.Embedding(60, 64)
        self.transformer.embeddings = embeddings
        self.transformer.get_input_embeddings = lambda: embeddings
        self.positions = nn.Parameter(torch.randn(24, 64))
        self.proj = nn.Linear(64, D)

    def forward(self, text):
        words = text != 0
        x = self.transformer.get_input_embeddings()(text) + self.positions
        x = self.transformer(x, src_key_padding_mask=~words)
        return self.proj((x * words[..., None]).sum(1) / words.sum(1, keepdim=True))


@cache
def clip_tokenizer(length=24):
    return open_clip.tokenizer.SimpleTokenizer(context_length=length)


def text_clip(kind, tokenizer=None, **text):
    model = kind(D, VISION, {**TEXT, **text}, quick_gelu=text.get("layers") == 2)
    return SimpleNamespace(model=model, tokenizer=tokenizer or clip_tokenizer(), embed_dim=D)


def coca_clip():
    vision = {**VISION, "attentional_pool": True, "output_tokens": True}
    text = {**TEXT, "context_length": 23, "embed_cls": True, "output_tokens": True, "vocab_size": 49408}
    model = CoCa(D, {**TEXT, "layers": 1}, text, vision)
    return SimpleNamespace(model=model, tokenizer=clip_tokenizer(23), embed_dim=D)


def mean_pooled_clip():
    clip = text_clip(CustomTextCLIP, WordTokenizer([1], [2]), vocab_size=60)
    clip.model.text = MeanPooledTower()
    return clip


# Every kind of text tower that open_clip has, small.
TREE_TOWERS = {
    "openai": lambda: text_clip(CLIP),
    "quick gelu": lambda: text_clip(CLIP, layers=2),
    "custom text": lambda: text_clip(CustomTextCLIP, ls_init_value=0.5),
    "no projection": lambda: text_clip(CustomTextCLIP, proj_type="none"),
    "biased projection": lambda: text_clip(CustomTextCLIP, proj_bias=True),
    "one layer": lambda: text_clip(CLIP, layers=1),
    "custom blocks": lambda: text_clip(
        CustomTextCLIP, qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True
    ),
    "eos by id": lambda: text_clip(CLIP, WordTokenizer([3], [2]), pool_type="eos", eos_id=2, vocab_size=60),
}
PADDED_TOWERS = {
    "siglip": lambda: text_clip(
        CustomTextCLIP,
        WordTokenizer(after=[1], pad=1),
        vocab_size=60,
        no_causal_mask=True,
        pool_type="last",
        proj_bias=True,
    ),
    "clipa": lambda: text_clip(CLIP, WordTokenizer([5]), vocab_size=60, no_causal_mask=True, pool_type="last"),
    "not causal": lambda: text_clip(CustomTextCLIP, no_causal_mask=True),
    "first token": lambda: text_clip(CustomTextCLIP, no_causal_mask=True, pool_type="first"),
    "class token from the tokenizer": lambda: text_clip(
        CLIP, WordTokenizer([1], [2], end=[3]), vocab_size=60, pool_type="last"
    ),
    "coca": coca_clip,
    "hugging face's shape": mean_pooled_clip,
}
TOWERS = TREE_TOWERS | PADDED_TOWERS


def tower(name, dtype=torch.float64):
    """A model with all weights random: initial layer scales, biases and norms would hide mistakes."""
    torch.manual_seed(0)
    clip = TOWERS[name]()
    clip.model.to(dtype)
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return clip


def learned(clip, descriptions=EMOTIONS, **kwargs):
    """Prompts a few steps into training: their condition network has an effect."""
    torch.manual_seed(1)
    prompts = PersonalizedPrompts(clip, descriptions, **{"n_ctx": 4} | kwargs)
    nn.init.normal_(prompts.condition_net[2].weight, std=0.1)
    nn.init.normal_(prompts.condition_net[2].bias, std=0.02)
    return prompts


def conditions(count, dtype=torch.float64):
    drawn = torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return F.normalize(drawn, dim=-1).to(dtype)


@pytest.mark.parametrize("context", ["shared", "per-emotion"])
@pytest.mark.parametrize("name", TOWERS)
def test_prompts_that_start_at_words_are_the_features_of_those_words(name, context):
    clip = tower(name)
    prompts = PersonalizedPrompts(clip, EMOTIONS, n_ctx=4, context=context, init=WORDS)
    spelled = clip.model.encode_text(clip.tokenizer([f"{WORDS} {emotion}" for emotion in EMOTIONS]), normalize=True)
    for backend in ("reference", None):
        features = prompts(conditions(2), backend=backend)
        assert features.shape == (2, len(EMOTIONS), spelled.shape[-1])
        torch.testing.assert_close(features, spelled.expand_as(features), rtol=0, atol=1e-12)


def test_a_hugging_face_tower_reads_the_context():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from open_clip.hf_model import HFTextEncoder

    config = transformers.RobertaConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, pad_token_id=0
    )
    clip = text_clip(CustomTextCLIP, WordTokenizer([1], [2]), vocab_size=60)
    clip.model.text = HFTextEncoder("", D, config=config, pooler_type="mean_pooler", proj_type="linear")
    clip.model.double().eval()
    prompts = PersonalizedPrompts(clip, EMOTIONS, n_ctx=4, init=WORDS)
    spelled = clip.model.encode_text(clip.tokenizer([f"{WORDS} {emotion}" for emotion in EMOTIONS]), normalize=True)
    torch.testing.assert_close(prompts(conditions(1))[0], spelled, rtol=0, atol=1e-12)


@pytest.mark.parametrize("context", ["shared", "per-emotion"])
def test_the_shift_moves_every_context_token_of_an_individual(context):
    clip = tower("openai")
    prompts, c = learned(clip, context=context), conditions(3)
    one_by_one = torch.stack(
        [encode_padded(clip.model, prompts.tokens, (prompts.context + shift)[None])[0] for shift in prompts.shift(c)]
    )
    torch.testing.assert_close(prompts(c, backend="reference"), F.normalize(one_by_one, dim=-1), rtol=0, atol=1e-12)
    assert (prompts(c)[0] - prompts(c)[1]).abs().max() > 1e-3


@pytest.mark.parametrize("context", ["shared", "per-emotion"])
@pytest.mark.parametrize("name", TOWERS)
def test_prompts_without_a_condition_are_the_same_for_everyone(name, context):
    clip = tower(name)
    prompts = PersonalizedPrompts(clip, EMOTIONS, n_ctx=4, context=context, condition=None)
    own = prompts.context[None]
    expected = F.normalize(encode_padded(clip.model, prompts.tokens, own, prompts._start), dim=-1)
    for backend in ("reference", None):
        torch.testing.assert_close(prompts(backend=backend), expected, rtol=0, atol=1e-12)
        features = prompts(conditions(3), backend=backend)
        torch.testing.assert_close(features, expected.expand(3, -1, -1), rtol=0, atol=1e-12)
    assert set(prompts.state_dict()) == {"context"}
    features.square().sum().backward()
    assert prompts.context.grad is not None
    assert torch.equal(prompts.shift(conditions(3)), torch.zeros(3, prompts.context.shape[-1], dtype=torch.float64))


@pytest.mark.parametrize("context", ["shared", "per-emotion"])
def test_an_ending_is_tokenized_with_its_description(context):
    clip = SimpleNamespace(model=tower("openai").model, tokenizer=tower("openai").tokenizer, embed_dim=D)
    plain = PersonalizedPrompts(clip, [f"{emotion} ." for emotion in EMOTIONS], n_ctx=4, context=context, init=WORDS)
    ended = PersonalizedPrompts(clip, EMOTIONS, n_ctx=4, context=context, init=WORDS, ending=" .")
    assert ended.descriptions == EMOTIONS
    assert torch.equal(ended.tokens, plain.tokens)
    assert torch.equal(ended(conditions(2)), plain(conditions(2)))


def test_cocoops_sentences_are_made_with_an_ending():
    clip = load_clip("tiny-face")
    prompts = PersonalizedPrompts(clip, ["happy", "very sad"], n_ctx=4, init=WORDS, ending=".", condition=None)
    spelled = clip.model.encode_text(clip.tokenizer([f"{WORDS} happy.", f"{WORDS} very sad."]), normalize=True)
    torch.testing.assert_close(prompts()[0], spelled, rtol=0, atol=2e-6)


def test_only_context_and_condition_network_learn():
    clip = tower("openai", torch.float32)
    prompts = learned(clip)
    assert set(prompts.state_dict()) == {"context"} | {
        f"condition_net.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")
    }
    prompts(conditions(2, torch.float32)).square().sum().backward()
    assert all(p.grad is not None for p in prompts.parameters())
    assert all(p.grad is None and not p.requires_grad for p in clip.model.transformer.parameters())
    assert clip.model.logit_scale.requires_grad, "the scale belongs to the loss"
    assert all(p.requires_grad for p in clip.model.visual.parameters())


def test_shapes():
    clip = tower("openai")
    shared, per_emotion = (PersonalizedPrompts(clip, EMOTIONS, context=c) for c in ("shared", "per-emotion"))
    assert shared.context.shape == (8, 64)
    assert per_emotion.context.shape == (4, 8, 64)
    assert not torch.equal(per_emotion.context[0], per_emotion.context[1])
    assert shared.condition_net[0].out_features == D // 16
    assert shared.shift(conditions(5)).shape == (5, 64)
    assert shared.descriptions == EMOTIONS
    assert shared(conditions(0)).shape == shared(conditions(0), backend="reference").shape == (0, 4, D)
    assert "n_ctx=8, context='shared'" in repr(shared)


def test_a_random_context_has_the_deviation_of_clip_embeddings():
    prompts = PersonalizedPrompts(tower("openai"), EMOTIONS, n_ctx=16)
    assert prompts.context.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", None])
def test_a_half_tower_learns_in_float32(half, backend):
    clip = tower("openai", torch.float32)
    exact = learned(clip)(conditions(2, torch.float32))
    clip.model.to(half)
    prompts = learned(clip)
    features = prompts(conditions(2, half), backend=backend)
    features.sum().backward()
    assert features.dtype == prompts.context.dtype == prompts.context.grad.dtype == torch.float32
    torch.testing.assert_close(features, exact, rtol=0, atol=0.02)


@pytest.mark.parametrize("backend", ["reference", None])
def test_open_clips_low_precision_towers_run(backend):
    model = CLIP(D, VISION, TEXT, cast_dtype=torch.bfloat16)
    open_clip.convert_weights_to_lp(model, torch.bfloat16)  # norms, embeddings and positions stay float32
    prompts = learned(SimpleNamespace(model=model, tokenizer=clip_tokenizer(), embed_dim=D))
    features = prompts(conditions(2, torch.float32), backend=backend)
    model.float()
    torch.testing.assert_close(features, prompts(conditions(2)), rtol=0, atol=0.03)


@pytest.mark.parametrize("backend", ["reference", None])
def test_autocast_runs_and_stays_close(backend):
    prompts, c = learned(tower("openai", torch.float32)), conditions(2, torch.float32)
    exact = prompts(c)
    with torch.autocast("cpu", torch.bfloat16):
        features = prompts(c, backend=backend)
        features.sum().backward()
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, exact, rtol=0, atol=0.03)


def test_a_frozen_tower_that_someone_unfroze_gives_the_same():
    clip = tower("openai", torch.float32)
    prompts, c = learned(clip), conditions(2, torch.float32)
    frozen = prompts(c)
    clip.model.requires_grad_(True)
    torch.testing.assert_close(prompts(c), frozen, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("descriptions", "kwargs", "error", "message"),
    [
        ([], {}, ValueError, "descriptions: got none"),
        ("angry", {}, TypeError, "a sequence of strings"),
        (["angry", 3], {}, TypeError, "a sequence of strings"),
        (["angry", " "], {}, ValueError, "blank"),
        (["angry", "sad", "angry"], {}, ValueError, "'angry' twice"),
        (
            ["sad", "very " * 15 + "sad"],
            {"n_ctx": 8},
            ValueError,
            "'very very .* sad' takes at least 16 tokens.* tower's 24",
        ),
        (["sad", "very " * 80 + "sad"], {}, ValueError, "'very very .* tower's 24"),
        (["angry"], {"n_ctx": 0}, ValueError, "n_ctx: got 0"),
        (["angry"], {"context": "own"}, ValueError, "context: got 'own'"),
        (["angry"], {"init": "a photo of"}, ValueError, "'a photo of' has 3 tokens, takes exactly n_ctx = 8"),
        (["angry"], {"init": ""}, ValueError, "has 0 tokens"),
    ],
)
def test_arguments_that_cannot_make_a_prompt_are_named(descriptions, kwargs, error, message):
    with pytest.raises(error, match=message):
        PersonalizedPrompts(tower("openai"), descriptions, **kwargs)


def test_a_description_that_just_fits_does():
    prompts = PersonalizedPrompts(tower("openai"), ["very " * 13 + "sad"], n_ctx=8)
    assert prompts.tokens[0, -1] == 49407, "EOS takes the last place"
    with pytest.raises(ValueError, match="takes at least 15 tokens"):
        PersonalizedPrompts(tower("openai"), ["very " * 14 + "sad"], n_ctx=8)


@pytest.mark.parametrize("name", ["siglip", "clipa"])
def test_where_eos_is_a_pad_one_pad_stays(name):
    clip = tower(name)
    length = 24 - 4 - 1 - len(clip.tokenizer.before)
    PersonalizedPrompts(clip, ["x " * length], n_ctx=4)
    with pytest.raises(ValueError, match="tower's 24"):
        PersonalizedPrompts(clip, ["x " * (length + 1)], n_ctx=4)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (torch.zeros(2, D + 1), r"condition: got shape \(2, 49\), takes \(N, 48\)"),
        (torch.zeros(D), r"takes \(N, 48\)"),
        (torch.zeros(2, D, dtype=torch.long), "got torch.int64"),
        (torch.zeros(2, D, device="meta"), "on meta, the prompts on cpu, the clip on cpu"),
    ],
)
def test_a_mismatched_condition_is_named(condition, message):
    with pytest.raises(ValueError, match=message):
        PersonalizedPrompts(tower("openai"), EMOTIONS)(condition)


@pytest.mark.parametrize("pool", ["none", "first"])
def test_towers_that_do_not_pool_the_prompt_are_rejected(pool):
    with pytest.raises(ValueError, match="pools"):
        PersonalizedPrompts(text_clip(CLIP, pool_type=pool), EMOTIONS)


def test_an_unknown_tower_is_rejected():
    clip = SimpleNamespace(model=nn.Linear(2, 2), tokenizer=clip_tokenizer(), embed_dim=D)
    with pytest.raises(TypeError, match="no token embedding"):
        PersonalizedPrompts(clip, EMOTIONS)


def test_the_embedding_keeps_no_hook_when_the_tower_fails():
    clip = tower("openai")
    prompts = PersonalizedPrompts(clip, EMOTIONS)
    clip.model.ln_final = nn.LayerNorm(3).double()
    with pytest.raises(RuntimeError):
        prompts(conditions(1), backend="reference")
    assert not clip.model.token_embedding._forward_hooks


def test_parameters_can_change_dtype_alone():
    prompts = learned(tower("openai")).float()
    features = prompts(conditions(2))
    assert features.dtype == torch.float32
    assert isinstance(features, Tensor)
