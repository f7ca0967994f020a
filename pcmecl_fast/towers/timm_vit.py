"""timm's vision transformers (`VisionTransformer`, `Eva`), which open_clip has as trunks of image towers, frozen."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pcmecl_fast.towers.blocks import Block, Checkpoint, Linear, Rotate, norm, run_blocks, sum_dtype
from pcmecl_fast.towers.frozen import frozen_patches, run_frozen

_IDLE = (nn.Identity.forward, nn.Dropout.forward, DropPath.forward)
"""What layers that do nothing in eval mode run."""


def trunk_features(
    trunk: Any,
    pixels: Tensor,  # (B, 3, H, W)
    checkpoint: Checkpoint | None,
) -> Tensor:
    """What trunk(pixels) returns, of a trunk without an `obstacle`; see `towers.image.encode_image`."""
    patches, dtype = _patches(trunk.patch_embed, pixels), next(trunk.patch_embed.parameters()).dtype
    patches = patches.to(sum_dtype(dtype))
    rotations: list[Rotate] | None = None
    if isinstance(trunk, Eva):
        x, angles = trunk._pos_embed(patches)
        rotations = None if angles is None else _rotations(trunk, angles)
    else:
        x = trunk.patch_drop(trunk._pos_embed(patches))
    x = norm(trunk.norm_pre, x, x.dtype)

    first_only = trunk.attn_pool is None and trunk.global_pool == "token"
    if checkpoint is None:
        checkpoint = trunk.grad_checkpointing
    x = run_blocks(list(map(_block, trunk.blocks)), x, checkpoint, first_only=first_only, rotations=rotations)

    if trunk.attn_pool is None:
        x = norm(trunk.fc_norm, trunk.pool(norm(trunk.norm, x, x.dtype)), dtype)
    else:
        x = trunk.fc_norm(trunk.pool(norm(trunk.norm, x, dtype)))
    return run_frozen(trunk.head, trunk.head_drop(x))


def obstacle(trunk: Any) -> str | None:
    """Why `trunk_features` would not be what a trunk returns, or None if it is."""
    kind = type(trunk)
    expected: Any = Eva if isinstance(trunk, Eva) else VisionTransformer
    for method in ("forward", "forward_features", "forward_head", "pool", "_pos_embed"):
        if getattr(kind, method, None) is not getattr(expected, method):
            return f"the tower's trunk, a {kind.__name__}, is not a vision transformer of timm"
    return next(filter(None, map(_block_obstacle, trunk.blocks)), None)


def _patches(embedding: Any, pixels: Tensor) -> Tensor:
    """embedding(pixels), as one matrix product where it is timm's and the pixels have the size that it asks for."""
    as_usual = type(embedding).forward is PatchEmbed.forward and embedding.flatten and not embedding.dynamic_img_pad
    if not as_usual or tuple(pixels.shape[-2:]) != embedding.img_size:
        return embedding(pixels)
    return embedding.norm(frozen_patches(embedding.proj, pixels))


def _rotations(trunk: Any, angles: Tensor) -> list[Rotate]:
    """Each block's: mixed rotary positions have angles for each block, others the same for all."""
    each = angles.unbind() if trunk.rope_mixed else [angles] * len(trunk.blocks)
    return [partial(_rotate, block.attn, each[i]) for i, block in enumerate(trunk.blocks)]


def _rotate(attention: Any, angles: Tensor, x: Tensor) -> Tensor:
    prefix = attention.num_prefix_tokens
    turned = apply_rot_embed_cat(x[:, :, prefix:], angles, half=attention.rotate_half)
    return torch.cat([x[:, :, :prefix], turned], dim=2).to(x.dtype)


def _block(block: Any) -> Block:
    attention, eva = block.attn, isinstance(block, EvaBlock)
    return Block(
        norm_1=block.norm1,
        qkv=_projections(attention),
        heads=attention.num_heads,
        q_norm=attention.q_norm,
        k_norm=attention.k_norm,
        head_scale=None,
        gate=attention.gate,
        norm_mixed=attention.norm,
        out=attention.proj,
        norm_out=None,
        ls_1=block.gamma_1 if eva else getattr(block.ls1, "gamma", None),
        norm_2=block.norm2,
        mlp=block.mlp,
        ls_2=block.gamma_2 if eva else getattr(block.ls2, "gamma", None),
    )


def _projections(attention: Any) -> tuple[Linear, ...]:
    if attention.qkv is None:
        return tuple(Linear(each.weight, each.bias) for each in (attention.q_proj, attention.k_proj, attention.v_proj))
    if getattr(attention, "q_bias", None) is not None:  # EVA's, which lie apart
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        return (Linear(attention.qkv.weight, bias),)
    return (Linear(attention.qkv.weight, attention.qkv.bias),)


def _block_obstacle(block: Any) -> str | None:
    kind = type(block)
    attention: Any = getattr(block, "attn", None)
    mixes = getattr(type(attention), "forward", None)
    if kind.forward is TimmBlock.forward and mixes is Attention.forward:
        scales = (block.ls1, block.ls2)
        if any(type(scale).forward not in (LayerScale.forward, nn.Identity.forward) for scale in scales):
            return "a block's layer scale is not timm's"
    elif kind.forward is not EvaBlock.forward or mixes not in (EvaAttention.forward, AttentionRope.forward):
        return f"a {kind.__name__} with a {type(attention).__name__} is not a block that is known"
    if getattr(attention, "num_kv_groups", 1) > 1:
        return "a block's attention has fewer keys than queries"
    separate = (attention.q_proj, attention.k_proj, attention.v_proj) if attention.qkv is None else ()
    projections = separate or (attention.qkv,)
    if any(type(layer).forward is not nn.Linear.forward for layer in projections):
        return "a block's attention has projections that are not linear layers"
    idle = [attention.proj_drop, block.drop_path1, block.drop_path2]
    if type(block.mlp).forward in (Mlp.forward, GluMlp.forward, SwiGLU.forward):
        idle += [block.mlp.drop1, block.mlp.drop2]
    if any(type(layer).forward not in _IDLE for layer in idle):
        return "a block's dropout is not PyTorch's or timm's"
    return None
