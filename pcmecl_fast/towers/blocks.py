"""Residual blocks of frozen transformers, whoever built them, taken apart so that towers can run them in their own way.

    x += ls_1 · out(attention(norm_1(x)));  x += ls_2 · mlp(norm_2(x))

Where the layers are in half precision, the sums x and the norms' statistics stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from open_clip.transformer import Attention, CustomResidualAttentionBlock, LayerScale, ResidualAttentionBlock
from open_clip.transformer import LayerNorm as OpenClipNorm
from open_clip.transformer import LayerNormFp32 as OpenClipNormFp32
from timm.layers.norm import LayerNorm as TimmNorm
from torch import Tensor, nn

from pcmecl_fast.towers.frozen import frozen_linear, run_frozen

Checkpoint = bool | Literal["attention"]
Rotate = Callable[[Tensor], Tensor]
"""Turns queries or keys of all tokens, (B, H, S, d), by their positions."""

_NORMS = (nn.LayerNorm.forward, OpenClipNorm.forward, OpenClipNormFp32.forward, TimmNorm.forward)


class Linear(NamedTuple):
    """A weight and a bias that are not a module's own."""

    weight: Tensor
    bias: Tensor | None


class Block(NamedTuple):
    """The parts of a block."""

    norm_1: nn.Module
    qkv: tuple[Linear, ...]
    """One layer for the queries, keys and values of all heads, in that order, or three."""
    heads: int
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    head_scale: Tensor | None  # (H, 1)
    gate: nn.Module | None
    norm_mixed: nn.Module | None
    """Between the heads and `out`."""
    out: Linear | nn.Module
    norm_out: nn.Module | None
    ls_1: Tensor | None
    norm_2: nn.Module
    mlp: nn.Module
    ls_2: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """That of its layers."""
        return self.qkv[0].weight.dtype


def open_clip_block(block: Any) -> Block:
    """The parts of one of open_clip's blocks, for which `open_clip_obstacle` finds no obstacle."""
    attention = block.attn
    custom = isinstance(attention, Attention)
    return Block(
        norm_1=block.ln_1,
        qkv=(Linear(attention.in_proj_weight, attention.in_proj_bias),),
        heads=attention.num_heads,
        q_norm=attention.ln_q if custom else None,
        k_norm=attention.ln_k if custom else None,
        head_scale=attention.head_scale.squeeze(-1) if custom and attention.head_scale is not None else None,
        gate=None,
        norm_mixed=attention.ln_inner if custom else None,
        # PyTorch's own attention does not call the layer, whatever it was replaced with: it takes its weights.
        out=attention.out_proj if custom else Linear(attention.out_proj.weight, attention.out_proj.bias),
        norm_out=block.ln_attn if custom else None,
        ls_1=getattr(block.ls_1, "gamma", None),
        norm_2=block.ln_2,
        mlp=block.mlp,
        ls_2=getattr(block.ls_2, "gamma", None),
    )


def open_clip_obstacle(block: Any) -> str | None:
    """Why a block would not be what `open_clip_block` takes it for, or None if it is."""
    attention: Any = getattr(block, "attn", None)
    if type(block).forward is ResidualAttentionBlock.forward and type(attention) is nn.MultiheadAttention:
        plain = attention._qkv_same_embed_dim and attention.bias_k is None and not attention.add_zero_attn
        if not plain or attention.dropout:
            return "a block's attention has extra keys or dropout"
    elif type(block).forward is CustomResidualAttentionBlock.forward and type(attention) is Attention:
        if attention.scaled_cosine or attention.attn_drop.p or attention.out_drop.p:
            return "a block's attention has cosine scores or dropout"
    else:
        return f"a {type(block).__name__} with a {type(attention).__name__} is not open_clip's block"
    for scale in (block.ls_1, block.ls_2):
        if type(scale).forward not in (LayerScale.forward, nn.Identity.forward):
            return f"a {type(scale).__name__} is not open_clip's layer scale"
    return None


def run_blocks(
    blocks: Sequence[Block],
    x: Tensor,  # (B, S, W)
    checkpoint: Checkpoint,
    *,
    first_only: bool = False,
    rotations: Sequence[Rotate] | None = None,
) -> Tensor:  # (B, S, W), or (B, 1, W)
    """All blocks, where every token sees all.

    Args:
        blocks: in order.
        x: the tokens.
        checkpoint: what to recompute in the backward pass, see `towers.image.encode_image`.
        first_only: compute the last block for the first token alone.
        rotations: each block's, if it has rotary positions; the first token's is none.
    """
    for i, block in enumerate(blocks):
        first = first_only and i == len(blocks) - 1
        rotate = None if rotations is None else rotations[i]
        if checkpoint == "attention":
            mixed = torch.utils.checkpoint.checkpoint(_mix, block, x, first, rotate, use_reentrant=False)
            x = after_attention(block, x[:, :1] if first else x, *mixed)
        elif checkpoint:
            x = torch.utils.checkpoint.checkpoint(_run_block, block, x, first, rotate, use_reentrant=False)
        else:
            x = _run_block(block, x, first, rotate)
    return x


def _run_block(block: Block, x: Tensor, first: bool, rotate: Rotate | None) -> Tensor:
    return after_attention(block, x[:, :1] if first else x, *_mix(block, x, first, rotate))


def _mix(block: Block, x: Tensor, first: bool, rotate: Rotate | None) -> tuple[Tensor, Tensor | None]:
    """What the heads of all tokens, or of the first, have mixed, (B, S or 1, H, d), and its gate."""
    normed = norm(block.norm_1, x, block.dtype)
    asking = normed[:, :1] if first else None
    query, key, value = (each.transpose(1, 2) for each in project(block, normed, asking))
    if rotate is not None:
        query, key = query if first else rotate(query), rotate(key)
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    gate = None if block.gate is None else run_frozen(block.gate, normed if asking is None else asking).sigmoid()
    return mixed, gate


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the sums x between layers of a dtype."""
    return torch.promote_types(dtype, torch.float32)


def norm(module: nn.Module | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    """module(x) in a dtype; a LayerNorm's statistics are in the dtype of x. No module is the identity."""
    if module is None or type(module).forward is nn.Identity.forward:
        return x.to(dtype)
    layer: Any = module
    if type(module).forward not in _NORMS:
        return module(x.to(dtype))
    if x.dtype == dtype and (layer.weight is None or layer.weight.dtype == dtype):
        return module(x)
    weight, bias = (None if p is None else p.to(x.dtype) for p in (layer.weight, layer.bias))
    return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps).to(dtype)


def project(
    block: Block,
    normed: Tensor,  # (B, S, W)
    asking: Tensor | None = None,  # (B, K, W)
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the tokens that ask, all if None; keys and values of all tokens: (B, K or S, H, d) each."""
    if len(block.qkv) == 3:
        inputs = (normed if asking is None else asking, normed, normed)
        query, key, value = (
            frozen_linear(x, *layer).unflatten(-1, (block.heads, -1))
            for x, layer in zip(inputs, block.qkv, strict=True)
        )
    elif asking is None:
        query, key, value = frozen_linear(normed, *block.qkv[0]).unflatten(-1, (3, block.heads, -1)).unbind(2)
    else:
        weight, bias = block.qkv[0]
        size = len(weight) // 3
        bias_q, bias_kv = (None, None) if bias is None else (bias[:size], bias[size:])
        query = frozen_linear(asking, weight[:size], bias_q).unflatten(-1, (block.heads, -1))
        key, value = frozen_linear(normed, weight[size:], bias_kv).unflatten(-1, (2, block.heads, -1)).unbind(2)
    if block.q_norm is not None:
        query = block.q_norm(query)
    if block.k_norm is not None:
        key = block.k_norm(key)
    return query, key, value


def after_attention(
    block: Block,
    x: Tensor,  # (B, S, W)
    heads: Tensor,  # (B, S, H, d)
    gate: Tensor | None = None,  # (B, S, H·d)
) -> Tensor:  # (B, S, W)
    """The rest of a block, from what its attention has mixed."""
    if block.head_scale is not None:
        heads = heads * block.head_scale
    mixed = heads.flatten(-2)
    if block.norm_mixed is not None:
        mixed = block.norm_mixed(mixed)
    if gate is not None:
        mixed = mixed * gate
    mixed = frozen_linear(mixed, *block.out) if isinstance(block.out, Linear) else run_frozen(block.out, mixed)
    if block.norm_out is not None:
        mixed = block.norm_out(mixed)
    x = x + (mixed if block.ls_1 is None else mixed * block.ls_1)
    more = run_frozen(block.mlp, norm(block.norm_2, x, block.dtype))
    return x + (more if block.ls_2 is None else more * block.ls_2)
