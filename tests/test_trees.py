"""Prompt trees: the padded path's features and gradients, for a fraction of its tokens."""

import logging

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.model import CLIP
from test_prompts import (
    EMOTIONS,
    PADDED_TOWERS,
    TREE_TOWERS,
    VISION,
    D,
    WordTokenizer,
    clip_tokenizer,
    conditions,
    learned,
    text_clip,
    tower,
)
from torch import nn

from pcmecl_fast.ops import use_backend
from pcmecl_fast.prompts.learner import PersonalizedPrompts
from pcmecl_fast.prompts.tree import PackedPrompts
from pcmecl_fast.towers import frozen
from pcmecl_fast.towers.text import encode_padded, encode_tree, eos_positions, tree_obstacle

SENTENCES = [
    "a photo of a face that looks angry",
    "a photo of a face that looks angry and",  # continues where another ends
    "a photo of a smile",
    "sad",
]
contexts = pytest.mark.parametrize("context", ["shared", "per-emotion"])
precisions = pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])


def gradients(prompts, run):
    """Features, then the gradients of V and of h's weights."""
    prompts.zero_grad()
    features = run()
    towards = torch.randn(features.shape, dtype=features.dtype, generator=torch.Generator().manual_seed(3))
    (features * towards).sum().backward()
    return [features.detach(), *(p.grad.clone() for p in prompts.parameters())]


def assert_equal(actual, expected, error):
    for a, e in zip(actual, expected, strict=True):
        assert e.abs().max() > 0
        torch.testing.assert_close(a, e, rtol=0, atol=error * e.abs().max().item())


def assert_tree_equals_padded(prompts, c, error):
    assert prompts._packed is not None
    tree = gradients(prompts, lambda: prompts(c))
    assert_equal(tree, gradients(prompts, lambda: prompts(c, backend="reference")), error)


@contexts
@precisions
@pytest.mark.parametrize("name", TREE_TOWERS)
def test_features_and_gradients_are_the_padded_paths(name, dtype, error, context):
    assert_tree_equals_padded(learned(tower(name, dtype), context=context), conditions(3, dtype), error)


@contexts
@precisions
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14"])
def test_two_layers_of_known_towers(name, dtype, error, context):
    torch.manual_seed(0)
    model = CLIP(D, VISION, open_clip.get_model_config(name)["text_cfg"] | {"layers": 2}).to(dtype)
    clip = text_clip(CLIP, clip_tokenizer(77))
    clip.model = model
    assert_tree_equals_padded(learned(clip, EMOTIONS[:3], context=context), conditions(2, dtype), error)


@contexts
def test_descriptions_of_all_lengths(context):
    prompts = learned(tower("openai"), [*SENTENCES, "very " * 16 + "sad"], context=context)
    assert_tree_equals_padded(prompts, conditions(2), 1e-12)


@contexts
@pytest.mark.parametrize("name", ["openai", "custom blocks"])
@pytest.mark.parametrize("max_tokens", [1, 40, 60, 10_000])
def test_many_classes_in_several_trees(name, max_tokens, context):
    clip = tower(name)
    names = open_clip.IMAGENET_CLASSNAMES[:31]
    prompts, c = learned(clip, names, n_ctx=2, context=context), conditions(3)
    packed = pack(clip.model, prompts, 2, context, max_tokens)
    assert (packed.trees > 1) == (max_tokens < 10_000)

    def run(encode, *layout):
        shift = prompts.shift(c)[:, None]
        shift = shift if context == "shared" else shift[:, None]
        return gradients(prompts, lambda: encode(clip.model, *layout, prompts.context + shift))

    assert_equal(run(encode_tree, packed), run(lambda m, x: encode_padded(m, prompts.tokens, x)), 1e-12)


def pack(model, prompts, n_ctx, context, max_tokens):
    eos = eos_positions(model, prompts.tokens)
    return PackedPrompts(prompts.tokens, eos, start=1, n_ctx=n_ctx, shared=context == "shared", max_tokens=max_tokens)


@pytest.mark.parametrize("name", TREE_TOWERS)
def test_causal_towers_that_pool_at_eos_use_the_tree(name, caplog):
    with caplog.at_level(logging.INFO, "pcmecl_fast"):
        prompts = learned(tower(name))
    assert prompts._packed is not None
    assert not caplog.messages


@pytest.mark.parametrize(
    ("name", "reason"),
    zip(
        PADDED_TOWERS,
        ["pools 'last'", "pools 'last'", "not causal", "pools 'first'", "pools 'last'", "class token", "MeanPooled"],
        strict=True,
    ),
)
def test_other_towers_use_the_padded_path_and_one_log_line_says_why(name, reason, caplog):
    with caplog.at_level(logging.INFO, "pcmecl_fast"):
        prompts = learned(tower(name))
        prompts(conditions(1)), prompts(conditions(2))
    (message,) = caplog.messages
    assert "padded path" in message
    assert reason in message


class OwnBlock(open_clip.transformer.ResidualAttentionBlock):
    def forward(self, q_x, k_x=None, v_x=None, attn_mask=None):
        return 2 * super().forward(q_x, k_x, v_x, attn_mask)


class OwnModel(CLIP):
    def encode_text(self, text, normalize=False):
        return 2 * super().encode_text(text, normalize)


def widen(model):
    model.attn_mask[3, 5] = 0


def drop(model):
    model.transformer.resblocks[1].attn.dropout = 0.1


def own_block(model):
    model.transformer.resblocks[1].__class__ = OwnBlock


def own_model(model):
    model.__class__ = OwnModel


@pytest.mark.parametrize(
    ("change", "reason"),
    [(widen, "not causal"), (drop, "dropout"), (own_block, "OwnBlock"), (own_model, "OwnModel")],
)
def test_any_relevant_change_of_a_tower_is_noticed(change, reason):
    model = text_clip(CLIP).model
    assert tree_obstacle(model) is None
    change(model)
    assert reason in tree_obstacle(model)


def test_a_causal_tower_without_sos_shares_a_context_but_nothing_else(caplog):
    clip = text_clip(CLIP, WordTokenizer(after=[2]), pool_type="eos", eos_id=2, vocab_size=60)
    clip.model.double()
    assert_tree_equals_padded(learned(clip), conditions(2), 1e-12)
    with caplog.at_level(logging.INFO, "pcmecl_fast"):
        assert learned(clip, context="per-emotion")._packed is None
    assert "no token before the context" in caplog.text


def test_a_tower_with_another_eos_uses_the_padded_path(caplog):
    clip = text_clip(CLIP, WordTokenizer([3], [2]), pool_type="eos", eos_id=9, vocab_size=60)
    with caplog.at_level(logging.INFO, "pcmecl_fast"):
        assert learned(clip)._packed is None
    assert "no EOS" in caplog.text


def test_eos_inside_a_description_ends_it_as_it_does_in_the_tower():
    prompts = learned(tower("openai"), ["angry <end_of_text> face", "sad"])
    assert prompts._packed.length < prompts._packed.layout.prefix + 5
    assert_tree_equals_padded(prompts, conditions(2), 1e-12)


def test_the_backend_reference_is_the_padded_path(monkeypatch):
    prompts, c = learned(tower("openai")), conditions(2)
    ran = []
    monkeypatch.setattr(
        "pcmecl_fast.prompts.learner.encode_padded", lambda *a: ran.append("padded") or encode_padded(*a)
    )
    prompts(c), prompts(c, backend="auto")
    assert not ran
    prompts(c, backend="reference")
    with use_backend("reference"):
        prompts(c), prompts(c, backend="auto")
    monkeypatch.setenv("PCMECL_BACKEND", "reference")
    prompts(c)
    assert ran == ["padded"] * 3
    with pytest.raises(ValueError, match="backend: got 'fast'"):
        prompts(c, backend="fast")


def test_one_word_names_pack_into_a_few_tokens():
    names = ["angry", "contempt", "disgusted", "fear", "happy", "sad", "surprised"]
    clip = text_clip(CLIP, clip_tokenizer(77), context_length=77)
    assert PersonalizedPrompts(clip, names)._packed.length == 1 + 8 + 7 * 2
    assert PersonalizedPrompts(clip, names, context="per-emotion")._packed.length == 1 + 7 * (8 + 2)


def test_a_common_beginning_of_the_descriptions_is_packed_once():
    prompts = learned(tower("openai"), SENTENCES[:3])
    assert prompts._packed.layout.prefix == 1 + 4 + len(["a", "photo", "of", "a"])
    assert prompts._packed.layout.segment_lengths == (5, 6, 2)


@contexts
@pytest.mark.parametrize("max_tokens", [20, 64, 192])
def test_a_thousand_classes_become_equal_trees_with_little_padding(max_tokens, context):
    clip = text_clip(CLIP, clip_tokenizer(77), context_length=77)
    names = list(dict.fromkeys(open_clip.IMAGENET_CLASSNAMES))
    prompts = PersonalizedPrompts(clip, names, n_ctx=4, context=context)
    packed = pack(clip.model, prompts, 4, context, max_tokens)
    eos = eos_positions(clip.model, prompts.tokens)
    prefix = packed.layout.prefix
    own = int((eos + 1 - prefix).sum())
    assert packed.length <= max(max_tokens, prefix + int((eos + 1 - prefix).max()))
    assert packed.tokens.shape == (packed.trees, packed.length)
    filled = packed.tokens.numel() - packed.trees * prefix - own
    assert filled <= packed.trees * int((eos + 1 - prefix).max())

    tokens, flat = prompts.tokens, packed.tokens.flatten()
    for c in range(0, len(names), 7):
        end = int(packed.eos[packed.place[c]])
        length = int(eos[c]) + 1 - prefix
        assert flat[end - length + 1 : end + 1].tolist() == tokens[c, prefix : eos[c] + 1].tolist()
        assert packed.classes[packed.place[c]] == c


def test_few_classes_keep_their_order():
    packed = learned(tower("openai"), SENTENCES)._packed
    assert packed.place.tolist() == packed.classes.tolist() == [0, 1, 2, 3]
    assert packed.eos.tolist() == packed.layout.eos.tolist()


def test_layouts_follow_the_prompts_and_are_not_saved():
    prompts = learned(tower("openai", torch.float32))
    assert not any("packed" in key for key in prompts.state_dict())
    assert all(buffer.device.type == "meta" for buffer in prompts.to("meta")._packed.buffers())


@pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")
@pytest.mark.parametrize("name", ["openai", "custom blocks"])
def test_float32_runs_the_same_with_and_without_onednn(name):
    prompts, c = learned(tower(name, torch.float32)), conditions(2, torch.float32)
    with_it = gradients(prompts, lambda: prompts(c))
    with torch.backends.mkldnn.flags(enabled=False):
        assert_equal(with_it, gradients(prompts, lambda: prompts(c)), 1e-5)


def test_onednn_linear_has_the_right_gradient():
    x, weight, bias = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7), torch.randn(3)
    towards = torch.randn(5, 3)
    ours, plain = frozen._OneDNNLinear.apply(x, weight, bias), F.linear(x, weight, bias)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, towards)[0] for y in (ours, plain)))


def test_activations_kept_for_the_backward_pass_shrink_with_the_tokens():
    clip = text_clip(CLIP, clip_tokenizer(77), context_length=77, layers=3)
    prompts, c = learned(clip, EMOTIONS), conditions(4, torch.float32)
    fewer_tokens = 77 * len(EMOTIONS) / prompts._packed.length
    tree, padded = (kept_bytes(clip.model, lambda b=b: prompts(c, backend=b)) for b in (None, "reference"))
    assert tree < padded / fewer_tokens
    clip.model.set_grad_checkpointing()
    assert kept_bytes(clip.model, lambda: prompts(c)) < tree / 1.8


def kept_bytes(model, run):
    """Bytes that autograd saves, not counting the model's own weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = run()
    assert features.requires_grad  # and keep it alive: otherwise its memory could be counted twice
    return sum(kept.values())


@contexts
def test_activation_checkpointing_changes_nothing(context):
    clip = tower("openai")
    prompts, c = learned(clip, context=context), conditions(2)
    plain = gradients(prompts, lambda: prompts(c))
    clip.model.set_grad_checkpointing()
    assert_equal(gradients(prompts, lambda: prompts(c)), plain, 1e-13)


@pytest.mark.parametrize(("name", "context"), [("quick gelu", "shared"), ("custom blocks", "per-emotion")])
def test_compiles_without_a_graph_break(name, context):
    torch._dynamo.reset()
    prompts = learned(tower(name), context=context)
    compiled, c = torch.compile(prompts, fullgraph=True, backend="aot_eager"), conditions(2)
    assert_equal(gradients(prompts, lambda: compiled(c)), gradients(prompts, lambda: prompts(c)), 1e-12)


def test_the_padded_path_compiles_too():
    torch._dynamo.reset()
    prompts, c = learned(tower("siglip")), conditions(2)
    compiled = torch.compile(prompts, backend="aot_eager")
    assert_equal(gradients(prompts, lambda: compiled(c)), gradients(prompts, lambda: prompts(c)), 1e-12)


@pytest.mark.parametrize("backend", ["reference", None])
def test_autocast_keeps_gradients_to_half_precision(backend):
    prompts, c = learned(tower("openai", torch.float32)), conditions(8, torch.float32)
    exact = gradients(prompts, lambda: prompts(c))
    with torch.autocast("cpu", torch.bfloat16):
        half = gradients(prompts, lambda: prompts(c, backend=backend))
    for h, e in zip(half, exact, strict=True):
        assert (h - e).norm() <= 0.05 * e.norm()


def test_distributed_training_has_no_unused_parameter(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        prompts, c = learned(tower("openai")), conditions(2)
        plain = gradients(prompts, lambda: prompts(c))
        distributed = nn.parallel.DistributedDataParallel(prompts)
        for _ in range(2):  # the second step is the one that reports unused parameters
            assert_equal(gradients(prompts, lambda: distributed(c)), plain, 1e-13)
    finally:
        dist.destroy_process_group()


def test_repeats_bitwise_in_deterministic_mode():
    prompts, c = learned(tower("openai", torch.float32), context="per-emotion"), conditions(2, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients(prompts, lambda: prompts(c)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
