"""Frozen image towers: features and input gradients of the model's own `encode_image`, with less work and memory."""

import logging
from functools import cache

import open_clip
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from test_trees import assert_equal, kept_bytes
from torch import nn

from pcmecl_fast import load_clip
from pcmecl_fast.clip import Clip
from pcmecl_fast.ops import use_backend
from pcmecl_fast.preprocessing import Preprocessing
from pcmecl_fast.towers import blocks, frozen
from pcmecl_fast.towers.image import encode_image, image_obstacle

D, SIDE = 48, 56
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": SIDE, "layers": 3, "width": 64, "head_width": 16, "patch_size": 14}
POOLER = {"attn_pooler_queries": 5, "attn_pooler_heads": 4}


def of_open_clip(quick_gelu=False, **vision):
    return CLIP(D, {**VISION, **vision}, TEXT, quick_gelu=quick_gelu)


def coca(**vision):
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    vision = {**VISION, "attentional_pool": True, "output_tokens": True, **POOLER, **vision}
    return CoCa(D, TEXT, text, vision)


def known(name, **changes):
    """A known model's own configuration with few layers."""
    config = open_clip.get_model_config(name)
    return CLIP(D, config["vision_cfg"] | {"layers": 2} | changes, TEXT, quick_gelu=config.get("quick_gelu", False))


def of_timm(name, pool="token", proj="linear", **changes):
    """One of timm's models as open_clip has them, but small."""
    made, create = {"img_size": SIDE, "embed_dim": 64, "depth": 3, "num_heads": 4, **changes}, timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, **settings: create(name, **settings, **made))
        vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": SIDE}
        return CustomTextCLIP(64 if proj == "none" else D, vision, TEXT)


class GatedAttention(timm.layers.Attention):
    """timm's option, which its towers do not hand through."""

    def __init__(self, *args, **settings):
        super().__init__(*args, gated=True, **settings)


CUSTOM = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}
FAST = {
    "openai": lambda: of_open_clip(quick_gelu=True),
    "laion": of_open_clip,
    "tiny-face": lambda: load_clip().model,
    "ViT-B-32": lambda: known("ViT-B-32", image_size=64),
    "ViT-B-32-quickgelu": lambda: known("ViT-B-32-quickgelu", image_size=64),
    "one layer": lambda: of_open_clip(layers=1),
    "layer scale": lambda: of_open_clip(ls_init_value=0.5),
    "patch dropout": lambda: of_open_clip(patch_dropout=0.5),
    "clipa": lambda: of_open_clip(
        no_ln_pre=True, pos_embed_type="sin_cos_2d", pool_type="avg", final_ln_after_pool=True
    ),
    "average": lambda: of_open_clip(pool_type="avg"),
    "normed after the pool": lambda: of_open_clip(final_ln_after_pool=True),
    "all tokens": lambda: of_open_clip(pool_type="none"),
    "custom blocks": lambda: of_open_clip(**CUSTOM),
    "attentional pool": lambda: of_open_clip(attentional_pool=True, **POOLER),
    "attentional pool, average": lambda: of_open_clip(attentional_pool=True, pool_type="avg", **POOLER),
    "parallel pool": lambda: of_open_clip(attentional_pool="parallel", width=48, **POOLER),
    "cascade pool": lambda: of_open_clip(attentional_pool="cascade", width=48, **POOLER),
    "pool as wide as the tower": lambda: of_open_clip(attentional_pool=True, width=48, **POOLER),
    "coca": coca,
    "SigLIP": lambda: of_timm("vit_base_patch16_siglip_224", "map", "none", patch_size=14),
    "EVA01": lambda: of_timm("eva_giant_patch14_224"),
    "EVA02-B-16": lambda: of_timm("eva02_base_patch16_clip_224", patch_size=14),
    "EVA02, one projection": lambda: of_timm("eva02_base_patch16_clip_224", patch_size=14, qkv_fused=True),
    "mixed rotary": lambda: of_timm("eva02_base_patch16_clip_224", patch_size=14, rope_type="mixed"),
    "PE": lambda: of_timm("vit_pe_core_tiny_patch16_384", "map", "none", patch_size=14),
    "timm's average": lambda: of_timm("vit_medium_patch16_gap_256", "avg", patch_size=14),
    "timm's CLIP": lambda: of_timm("vit_large_patch14_clip_224", proj="mlp"),
    "timm's registers": lambda: of_timm("vit_large_patch14_clip_224", reg_tokens=3, no_embed_class=True),
    "timm's sizes": lambda: of_timm("vit_large_patch14_clip_224", dynamic_img_size=True),
    "timm's scales": lambda: of_timm(
        "vit_large_patch14_clip_224", init_values=0.5, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True
    ),
    "gates": lambda: of_timm("vit_large_patch14_clip_224", attn_layer=GatedAttention),
    "GLU": lambda: of_timm("eva02_base_patch16_clip_224", patch_size=14, scale_mlp=False),
}
PLAIN = {
    "RN50": (lambda: CLIP(D, {"layers": [1, 1, 1, 1], "width": 32, "image_size": 64}, TEXT), "ModifiedResNet"),
    "ConvNeXt": (
        lambda: CustomTextCLIP(D, {"timm_model_name": "convnext_atto", "timm_pool": "", "image_size": 64}, TEXT),
        "ConvNeXt",
    ),
    "cosine scores": (lambda: of_open_clip(scaled_cosine_attn=True), "cosine scores"),
    "relative positions": (
        lambda: CustomTextCLIP(D, {"timm_model_name": "vit_relpos_small_patch16_224", "image_size": 224}, TEXT),
        "RelPos",
    ),
}
towers = pytest.mark.parametrize("name", FAST)
some_towers = pytest.mark.parametrize("name", ["openai", "custom blocks", "coca", "SigLIP", "EVA02-B-16"])


@cache
def tower(name, dtype=torch.float64):
    """A frozen model with all weights random: initial layer scales, biases and norms would hide mistakes."""
    return randomized(FAST[name] if name in FAST else PLAIN[name][0], dtype)


def randomized(make, dtype=torch.float64):
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.3 if parameter.dim() == 1 else 0.05))
    return model.requires_grad_(False).eval().to(dtype)


def pixels(model, count=3, dtype=torch.float64):
    size = model.visual.image_size
    size = (size, size) if isinstance(size, int) else size
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(2)).to(dtype)


def gradients(run, x):
    """Features, then the gradient of the pixels."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    features = run(x)
    towards = torch.randn(features.shape, generator=torch.Generator().manual_seed(3)).to(features.dtype)
    return [features.detach(), *torch.autograd.grad((features * towards).sum(), x)]


def relative_errors(actual, expected):
    return [float((a.double() - e.double()).norm() / e.double().norm()) for a, e in zip(actual, expected, strict=True)]


def assert_the_same(model, x, error=1e-12, **options):
    actual = gradients(lambda x: encode_image(model, x, **options), x)
    expected = gradients(model.encode_image, x)
    assert [a.dtype for a in actual] == [e.dtype for e in expected]
    assert [a.shape for a in actual] == [e.shape for e in expected]
    assert max(relative_errors(actual, expected)) <= error


@towers
def test_features_and_gradients_are_the_models_own(name):
    model = tower(name)
    assert image_obstacle(model) is None
    assert_the_same(model, pixels(model))


@some_towers
@pytest.mark.parametrize("checkpoint", [True, "attention"])
def test_recomputing_changes_nothing(name, checkpoint):
    model = tower(name)
    assert_the_same(model, pixels(model), checkpoint=checkpoint)


@towers
def test_float32(name):
    model = tower(name, torch.float32)
    assert_the_same(model, pixels(model, dtype=torch.float32), error=1e-5)


@some_towers
def test_batches_of_one_and_of_none(name):
    model = tower(name)
    assert_the_same(model, pixels(model, 1))
    empty = pixels(model, 1)[:0]  # most towers of open_clip break off
    features, gradient = gradients(lambda x: encode_image(model, x), empty)
    assert features.shape == (0, model.encode_image(pixels(model, 1)).shape[1])
    assert gradient.shape == empty.shape


@some_towers
def test_channels_last(name):
    model = tower(name)
    assert_the_same(model, pixels(model).to(memory_format=torch.channels_last))


@some_towers
def test_without_gradients(name):
    model = tower(name)
    with torch.no_grad():
        actual, expected = encode_image(model, pixels(model)), model.encode_image(pixels(model))
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_patches_that_do_not_fill_the_image():
    model = randomized(lambda: of_open_clip(image_size=61))
    assert_the_same(model, pixels(model))


@pytest.mark.parametrize("settings", [{"stride": 7}, {"padding": 3}, {"dilation": 2}, {"groups": 3}, {"stride": 14}])
def test_patches_are_the_convolutions(settings):
    layer = nn.Conv2d(3, 6, 14, **{"stride": 14} | settings).double()
    x = torch.randn(2, 3, 45, 60, dtype=torch.float64)
    torch.testing.assert_close(frozen.frozen_patches(layer, x), layer(x).flatten(2).mT)


# What is kept for the backward pass


@pytest.mark.parametrize(
    ("name", "most"), [("laion", 0.9), ("openai", 0.65), ("custom blocks", 0.95), ("EVA02-B-16", 0.9), ("coca", 0.95)]
)
def test_less_is_kept_for_the_backward_pass(name, most):
    model = tower(name)
    x = pixels(model, 8).requires_grad_()
    assert kept_bytes(model, lambda: encode_image(model, x)) <= most * kept_bytes(model, lambda: model.encode_image(x))


def test_quick_gelu_keeps_no_more_than_gelu():
    kept = []
    for quick_gelu in (True, False):
        model = randomized(lambda quick_gelu=quick_gelu: of_open_clip(quick_gelu))
        x = pixels(model, 8).requires_grad_()
        kept.append(kept_bytes(model, lambda model=model, x=x: encode_image(model, x)))
    assert kept[0] == kept[1]


def test_recomputing_keeps_less():
    model = randomized(lambda: of_open_clip(layers=8), torch.float32)
    x = pixels(model, 8, torch.float32).requires_grad_()
    plain = kept_bytes(model, lambda: model.encode_image(x))
    everything, attention, whole = (
        kept_bytes(model, lambda c=c: encode_image(model, x, checkpoint=c)) for c in (False, "attention", True)
    )
    assert attention <= 0.65 * everything
    assert attention <= 0.6 * plain
    assert whole <= 0.2 * plain
    model.set_grad_checkpointing()
    assert kept_bytes(model, lambda: encode_image(model, x)) == whole
    model.set_grad_checkpointing(1)
    assert kept_bytes(model, lambda: encode_image(model, x)) == whole
    model.set_grad_checkpointing("attention")
    assert kept_bytes(model, lambda: encode_image(model, x)) == attention
    model.set_grad_checkpointing(False)


@pytest.mark.parametrize("name", ["RN50", "ConvNeXt"])
def test_networks_on_the_plain_path_compute_no_weight_gradients(name):
    model = tower(name, torch.float32)
    x = pixels(model, 2, torch.float32).requires_grad_()
    frozen_keeps = kept_bytes(model, lambda: model.encode_image(x))
    model.visual.requires_grad_()
    training_keeps = kept_bytes(model, lambda: model.encode_image(x))
    model.visual.requires_grad_(False)
    assert frozen_keeps < training_keeps
    model.encode_image(x).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


# Who takes which path


@pytest.mark.parametrize("name", PLAIN)
def test_other_towers_have_an_obstacle(name):
    assert PLAIN[name][1] in image_obstacle(tower(name, torch.float32))


class OwnTower(open_clip.transformer.VisionTransformer):
    def _pool(self, x):
        return 2 * super()._pool(x)[0], None


class OwnBlock(open_clip.transformer.ResidualAttentionBlock):
    def forward(self, q_x, k_x=None, v_x=None, attn_mask=None):
        return 2 * super().forward(q_x, k_x, v_x, attn_mask)


class OwnModel(CLIP):
    def encode_image(self, image, normalize=False):
        return 2 * super().encode_image(image, normalize)


class OwnScale(nn.Module):
    def forward(self, x):
        return 2 * x


def own_tower(model):
    model.visual.__class__ = OwnTower


def own_block(model):
    model.visual.transformer.resblocks[1].__class__ = OwnBlock


def own_model(model):
    model.__class__ = OwnModel


def own_scale(model):
    model.visual.transformer.resblocks[0].ls_1 = OwnScale()


def own_forward(model):
    model.visual.transformer.resblocks[0].mlp.forward = lambda x: 2 * x


def own_order(model):
    model.visual.transformer.resblocks[0].attn.batch_first = False


def hook(model):
    model.visual.transformer.resblocks[2].mlp.register_forward_hook(lambda module, args, output: 2 * output)


def pre_hook(model):
    model.visual.ln_post.register_forward_pre_hook(lambda module, args: args)


def backward_hook(model):
    model.visual.conv1.register_full_backward_hook(lambda module, grad_input, grad_output: None)


def dropout(model):
    model.visual.transformer.resblocks[1].attn.dropout = 0.1


def training(model):
    model.visual.patch_dropout.train()


def tokens(model):
    model.visual.output_tokens = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (own_tower, "OwnTower"),
        (own_block, "OwnBlock"),
        (own_model, "OwnModel"),
        (own_scale, "OwnScale"),
        (own_forward, "a Sequential of the tower has a forward of its own"),
        (own_order, "order of dimensions"),
        (hook, "a Sequential of the tower has hooks"),
        (pre_hook, "a LayerNorm of the tower has hooks"),
        (backward_hook, "a Conv2d of the tower has hooks"),
        (dropout, "dropout"),
        (training, "training mode"),
        (tokens, "tokens besides"),
    ],
)
def test_any_relevant_change_of_a_tower_is_noticed(change, reason):
    model = of_open_clip(patch_dropout=0.5).eval()
    assert image_obstacle(model) is None
    change(model)
    assert reason in image_obstacle(model)


def test_changes_of_timms_trunks_are_noticed():
    model = of_timm("vit_large_patch14_clip_224").eval()
    assert image_obstacle(model) is None
    block = model.visual.trunk.blocks[1]
    block.attn.proj_drop = OwnScale()
    assert "dropout" in image_obstacle(model)
    block.attn.proj_drop, block.attn.qkv = nn.Identity(), nn.Sequential(block.attn.qkv)
    assert "not linear" in image_obstacle(model)
    model.visual.trunk.blocks[1] = OwnScale()
    assert "OwnScale" in image_obstacle(model)


def clip_of(model):
    return Clip(model, "small", "random", Preprocessing((0.5,) * 3, (0.25,) * 3), lambda: None)


def towers_lines(caplog):
    return [message for message in caplog.messages if message.startswith("images")]


def test_a_clip_takes_the_fast_path_and_a_hook_takes_it_to_the_plain_one(monkeypatch, caplog):
    clip, ran = clip_of(randomized(of_open_clip, torch.float32)), []
    frames = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    monkeypatch.setattr("pcmecl_fast.clip.encode_image", lambda *a: ran.append("fast") or encode_image(*a))
    with caplog.at_level(logging.INFO, "pcmecl_fast"):
        fast = clip.encode_image(frames)
        assert ran == ["fast"]
        assert clip.image_obstacle() is None
        assert not towers_lines(caplog)
        seen = []
        handle = clip.model.visual.ln_post.register_forward_hook(lambda *args: seen.append(args))
        plain = clip.encode_image(frames), clip.encode_image(frames)
        assert len(seen) == 2
        assert "hooks" in clip.image_obstacle()
        handle.remove()
        clip.encode_image(frames)
    assert ran == ["fast"] * 2
    (message,) = towers_lines(caplog)
    assert message == "images take the plain path, the model's own: a LayerNorm of the tower has hooks"
    for features in plain:
        torch.testing.assert_close(features, fast, rtol=1e-4, atol=2e-5)


def test_the_backend_reference_is_the_plain_path(monkeypatch):
    clip = clip_of(randomized(of_open_clip, torch.float32))
    frames = torch.rand(2, 3, SIDE, SIDE)
    monkeypatch.setattr("pcmecl_fast.clip.encode_image", lambda *a: pytest.fail("took the fast path"))
    clip.encode_image(frames, backend="reference")
    with use_backend("reference"):
        clip.encode_image(frames)


# Modes of PyTorch


@pytest.mark.parametrize("name", ["openai", "custom blocks", "coca", "SigLIP", "EVA02-B-16", "PE"])
def test_compiles_without_a_graph_break(name):
    torch._dynamo.reset()
    model = tower(name)
    compiled = torch.compile(lambda x: encode_image(model, x), fullgraph=True, backend="aot_eager")
    assert max(relative_errors(*(gradients(f, pixels(model)) for f in (compiled, model.encode_image)))) <= 1e-12


def test_a_whole_clip_compiles():
    torch._dynamo.reset()
    clip = load_clip(dtype=torch.float64)
    frames = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    compiled = torch.compile(clip.encode_image, backend="aot_eager")
    assert_equal(gradients(compiled, frames), gradients(clip.encode_image, frames), 1e-12)


@some_towers
def test_autocast(name):
    model = tower(name, torch.float32)
    x = pixels(model, dtype=torch.float32)
    exact = gradients(model.encode_image, x)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = gradients(lambda x: encode_image(model, x), x), gradients(model.encode_image, x)
    assert ours[0].dtype == plain[0].dtype
    for error, of_plain in zip(relative_errors(ours, exact), relative_errors(plain, exact), strict=True):
        assert error <= max(0.02, of_plain)


@pytest.mark.parametrize("name", [*FAST])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    half = randomized(FAST[name], dtype)
    exact = randomized(FAST[name], torch.float32)
    exact.load_state_dict(half.state_dict())
    x = pixels(half, dtype=dtype)
    ours = gradients(lambda x: encode_image(half, x), x)
    assert {a.dtype for a in ours} == {dtype}
    errors = relative_errors(ours, gradients(exact.encode_image, x.float()))
    assert max(errors) <= 4 * torch.finfo(dtype).eps


def test_sums_in_float32_make_half_precision_more_exact():
    half, exact = (randomized(lambda: of_open_clip(layers=8), dtype) for dtype in (torch.bfloat16, torch.float32))
    exact.load_state_dict(half.state_dict())
    x = pixels(half, 8, torch.bfloat16)
    expected = gradients(exact.encode_image, x.float())
    ours = relative_errors(gradients(lambda x: encode_image(half, x), x), expected)
    plain = relative_errors(gradients(half.encode_image, x), expected)
    assert all(a <= 0.7 * b for a, b in zip(ours, plain, strict=True))


def test_where_onednn_is_faster_biases_may_be_tuned_and_towers_transformed(monkeypatch):
    monkeypatch.setattr(frozen, "_onednn_is_faster", lambda: True)
    model = randomized(of_open_clip, torch.float32)
    x = pixels(model, 2, torch.float32)
    expected = encode_image(model, x)
    torch.testing.assert_close(
        torch.vmap(lambda one: encode_image(model, one[None])[0])(x), expected, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(torch.jit.trace(lambda x: encode_image(model, x), x)(x), expected, rtol=1e-4, atol=1e-5)

    bias = model.visual.transformer.resblocks[0].mlp.c_fc.bias.requires_grad_()
    encode_image(model, x).sum().backward()
    ours, bias.grad = bias.grad, None
    model.encode_image(x).sum().backward()
    torch.testing.assert_close(ours, bias.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")
def test_runs_the_same_in_onednn_and_in_mkl(monkeypatch, enabled):
    model = tower("openai", torch.float32)
    monkeypatch.setattr(frozen, "_onednn_is_faster", lambda: enabled)
    assert_the_same(model, pixels(model, dtype=torch.float32), error=1e-5)


def test_second_derivatives_where_attention_has_them():
    model = tower("openai")
    x, towards = pixels(model, 2), torch.randn(2, D, dtype=torch.float64)

    def slope(run):
        y = x.clone().requires_grad_()
        (first,) = torch.autograd.grad((run(y) * towards).sum(), y, create_graph=True)
        return torch.autograd.grad(first.square().sum(), y)

    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        ours, plain = slope(lambda y: encode_image(model, y)), slope(model.encode_image)
    assert max(relative_errors(ours, plain)) <= 1e-11
    for run in (lambda y: encode_image(model, y), model.encode_image):
        with pytest.raises(RuntimeError, match=r"derivative for .*flash_attention"):
            slope(run)


def test_distributed_training_through_a_frozen_tower(tmp_path):
    model = tower("openai")

    class Edited(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3, SIDE, SIDE, dtype=torch.float64))

        def forward(self, x):
            return encode_image(model, x + self.shift)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        edited, x = Edited(), pixels(model)
        nn.parallel.DistributedDataParallel(edited)(x).square().sum().backward()
        y = x.clone().requires_grad_()
        model.encode_image(y).square().sum().backward()
        assert max(relative_errors([edited.shift.grad], [y.grad.sum(0)])) <= 1e-12
    finally:
        dist.destroy_process_group()


def test_frames_reach_a_clip_through_the_fast_path_with_their_gradients():
    clip = load_clip(dtype=torch.float64)
    frames = torch.rand(2, 3, 40, 60, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    ours = gradients(clip.encode_image, frames)
    plain = gradients(lambda x: clip.encode_image(x, backend="reference"), frames)
    assert max(relative_errors(ours, plain)) <= 1e-6  # frames are resized in float32
    assert F.cosine_similarity(ours[0], plain[0]).min() > 1 - 1e-12


def test_the_first_token_alone_goes_through_the_last_block(monkeypatch):
    rows = []
    run = blocks.after_attention
    monkeypatch.setattr(blocks, "after_attention", lambda b, x, *mixed: rows.append(x.shape[1]) or run(b, x, *mixed))
    for name in ("openai", "average"):
        encode_image(tower(name), pixels(tower(name)))
    assert rows == [17, 17, 1, 17, 17, 17]
