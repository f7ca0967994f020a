"""Runs frozen image towers for features and for the gradient of their input alone.

`model.encode_image` is the specification. `encode_image` runs vision transformers of open_clip and of timm for which
`image_obstacle` finds no obstacle, with the same result in less time and memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import AttentionalPooler, Transformer, VisionTransformer
from torch import Tensor, nn

from pcmecl_fast.towers import timm_vit
from pcmecl_fast.towers.blocks import Checkpoint, norm, open_clip_block, open_clip_obstacle, run_blocks, sum_dtype
from pcmecl_fast.towers.frozen import frozen_linear, frozen_patches, run_frozen


def encode_image(
    model: nn.Module,
    pixels: Tensor,  # (B, 3, H, W)
    *,
    checkpoint: Checkpoint | None = None,
) -> Tensor:
    """What `model.encode_image` returns, and the gradient of `pixels`: both are equal up to rounding.

        x = patches @ conv1 + positions;  x += attention(x), x += mlp(x) in every layer;  features = project(pool(x))

    Of what the plain path computes, this leaves out whatever the features do not depend on: where the class token is
    the feature, the last block's queries, output and MLP of all other tokens; of an attentional pooler, the queries
    that are not pooled. Where the weights are in half precision, sums between layers are in float32.

    Args:
        model: a model without an `image_obstacle`; its image tower is frozen.
        pixels: normalized images of the tower's size, in its dtype.
        checkpoint: what to recompute in the backward pass instead of keeping it. False: nothing; "attention": queries,
            keys, values and what they mix, 40 % of what is kept for an eighth more products; True: whole blocks. None
            follows the tower's own `set_grad_checkpointing`, which takes the three, too.

    Returns:
        (B, D), in the dtype of the tower; normalized only if the model's own are (CoCa's).

    Source: ours.
    """
    visual: Any = model.visual
    if isinstance(visual, TimmModel):
        features = run_frozen(visual.head, timm_vit.trunk_features(visual.trunk, pixels, checkpoint))
    else:
        features = _open_clip_features(visual, pixels, checkpoint)
    return F.normalize(features, dim=-1) if isinstance(model, CoCa) else features


def image_obstacle(model: nn.Module) -> str | None:
    """Why `encode_image` would not reproduce `model.encode_image` exactly, or None if it does.

    It does for open_clip's vision transformers (OpenAI's, LAION's, DataComp's, MetaCLIP's, CoCa's, CLIPA's) and timm's
    (EVA's, SigLIP's, PE's) as they come. ResNets, ConvNeXts and others run as they are, and so does a tower that
    somebody has changed: subclasses, forward hooks, the training mode.
    """
    if getattr(type(model), "encode_image", None) not in (
        CLIP.encode_image,
        CustomTextCLIP.encode_image,
        CoCa.encode_image,
    ):
        return f"{type(model).__name__} encodes images in its own way"
    if isinstance(model, CoCa) and type(model)._encode_image is not CoCa._encode_image:
        return f"{type(model).__name__} encodes images in its own way"
    visual: Any = model.visual
    if type(visual).forward is TimmModel.forward:
        obstacle = timm_vit.obstacle(visual.trunk)
    else:
        obstacle = _open_clip_obstacle(visual, gives_tokens=isinstance(model, CoCa))
    return obstacle or _change(visual)


def _change(tower: nn.Module) -> str | None:
    """What somebody has done to a module of the tower that running its parts would not notice."""
    modules = [tower]
    while modules:  # nn.Module.modules() takes several times as long, and this is asked at every call
        module = modules.pop()
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"a {type(module).__name__} of the tower has hooks"
        if "forward" in module.__dict__:
            return f"a {type(module).__name__} of the tower has a forward of its own"
        if module.training:
            return "the tower is in training mode"
        modules += [child for child in module._modules.values() if child is not None]
    return None


def _open_clip_obstacle(tower: Any, *, gives_tokens: bool) -> str | None:
    kind = type(tower)
    own = ("forward", "_embeds", "_pool", "_global_pool")
    if any(getattr(kind, name, None) is not getattr(VisionTransformer, name) for name in own):
        return f"a {kind.__name__} is not open_clip's vision transformer"
    if tower.output_tokens != gives_tokens:
        return "the tower returns tokens besides the features"
    transformer = tower.transformer
    if type(transformer).forward is not Transformer.forward:
        return f"a {type(transformer).__name__} is not open_clip's transformer"
    for block in transformer.resblocks:
        obstacle = open_clip_obstacle(block)
        if obstacle is None and getattr(block.attn, "batch_first", True) != transformer.batch_first:
            obstacle = "a block's attention takes another order of dimensions than the tower"
        if obstacle is not None:
            return obstacle
    return next(filter(None, map(_pooler_obstacle, _poolers(tower))), None)


def _poolers(tower: Any) -> list[nn.Module]:
    found = (tower.attn_pool, getattr(tower, "attn_pool_contrastive", None))
    return [pooler for pooler in found if pooler is not None]


def _pooler_obstacle(pooler: Any) -> str | None:
    if type(pooler).forward is not AttentionalPooler.forward or type(pooler.attn) is not nn.MultiheadAttention:
        return f"a {type(pooler).__name__} is not open_clip's pooler"
    attention = pooler.attn
    plain = attention.bias_k is None and not attention.add_zero_attn and not attention.dropout and attention.batch_first
    return None if plain else "the pooler's attention has extra keys or dropout"


def _open_clip_features(tower: Any, pixels: Tensor, checkpoint: Checkpoint | None) -> Tensor:
    dtype = tower.conv1.weight.dtype
    patches = frozen_patches(tower.conv1, pixels).to(sum_dtype(dtype))
    positions = tower.positional_embedding.to(patches.dtype)
    class_token = (tower.class_embedding.to(patches.dtype) + positions[0]).expand(len(patches), 1, -1)
    x = torch.cat([class_token, patches + positions[1:]], dim=1)
    x = norm(tower.ln_pre, tower.patch_dropout(x), x.dtype)

    first_only = tower.attn_pool is None and tower.pool_type == "tok"
    blocks = [open_clip_block(block) for block in tower.transformer.resblocks]
    if checkpoint is None:
        checkpoint = tower.transformer.grad_checkpointing
    x = run_blocks(blocks, x, checkpoint, first_only=first_only)

    pooled = _open_clip_pool(tower, x, dtype)
    return pooled if tower.proj is None else pooled @ tower.proj


def _open_clip_pool(tower: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The pooled tokens of the last block's, (B, S, W), or of its class token alone, (B, 1, W)."""
    if tower.attn_pool is None:
        if tower.final_ln_after_pool:
            return norm(tower.ln_post, tower._global_pool(x)[0], dtype)
        return tower._global_pool(norm(tower.ln_post, x, x.dtype))[0].to(dtype)
    if tower.attn_pool_contrastive is None:
        queries = 1 if tower.pool_type == "tok" else None
        pooled = norm(tower.ln_post, _attentional_pool(tower.attn_pool, x, dtype, queries), dtype)
        return tower._global_pool(pooled)[0]
    tokens = norm(tower.ln_post, x, x.dtype)
    if tower.attn_pool_type == "cascade":
        tokens = _attentional_pool(tower.attn_pool, tokens, dtype)
    return _attentional_pool(tower.attn_pool_contrastive, tokens, dtype)


def _attentional_pool(pooler: Any, x: Tensor, dtype: torch.dtype, queries: int | None = None) -> Tensor:
    """(B, S, W) to (B, Q, D): what learned queries, or the first few of them, find in the tokens."""
    attention, normed = pooler.attn, norm(pooler.ln_k, x, dtype)
    if attention._qkv_same_embed_dim:
        weights = attention.in_proj_weight.chunk(3)
    else:
        weights = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
    biases = (None, None, None) if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    asked = (pooler.ln_q(pooler.query[:queries])[None], normed, normed)  # the same for every image
    query, key, value = (
        frozen_linear(x, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for x, weight, bias in zip(asked, weights, biases, strict=True)
    )
    mixed = F.scaled_dot_product_attention(query.expand(len(x), -1, -1, -1), key, value)
    return frozen_linear(mixed.transpose(1, 2).flatten(-2), attention.out_proj.weight, attention.out_proj.bias)
