"""Runs open_clip's frozen text towers on prompts whose context is embeddings, not words.

`encode_padded` runs any tower through its own `encode_text`: it is the specification. `encode_tree` runs towers for
which `tree_obstacle` finds no obstacle on packed prompts, with the same result for a fraction of the tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer, Transformer
from torch import Tensor, nn

from pcmecl_fast.ops import tree_attention
from pcmecl_fast.towers.blocks import (
    Block,
    after_attention,
    norm,
    open_clip_block,
    open_clip_obstacle,
    project,
    sum_dtype,
)
from pcmecl_fast.towers.frozen import frozen_linear

if TYPE_CHECKING:
    from pcmecl_fast.prompts.tree import PackedPrompts


def encode_padded(
    model: nn.Module,
    tokens: Tensor,  # (E, L)
    context: Tensor,  # (N, M, W) or (N, E, M, W)
    start: int = 1,
) -> Tensor:
    """Text features of N × E prompts from the model's own `encode_text`, at full context length.

        prompt[n, e] = tokens[e], with the embeddings at start … start + M - 1 replaced by context[n] or context[n, e]

    Args:
        model: an open_clip model (`CLIP`, `CustomTextCLIP`, `CoCa`), with any text tower.
        tokens: token ids, padded, with placeholders where the context goes. A placeholder's embedding is never used,
            but its id is: towers find EOS and pads by id, so it must be the id of an ordinary word.
        context: the embeddings of the context tokens; positions are added by the tower.
        start: the position of the first context token: 1 after [SOS], 0 in a tower without one.

    Returns:
        (N, E, D), as `model.encode_text(..., normalize=False)` returns them: not normalized, in the tower's dtype.

    While it runs, the model's token embedding has a hook: do not run one model in two threads at once.

    Source: CoCoOp's `TextEncoder`, for any tower.
    """
    individuals, classes, length = context.shape[0], *tokens.shape
    if context.dim() == 3:
        context = context[:, None].expand(-1, classes, -1, -1)
    n_ctx = context.shape[2]
    rows = context.flatten(0, 1)

    def insert_context(_module: nn.Module, _args: Any, embedded: Tensor) -> Tensor:
        return torch.cat([embedded[:, :start], rows.to(embedded.dtype), embedded[:, start + n_ctx :]], dim=1)

    # A hook leaves everything after the embedding to the tower itself: masks, class tokens, pooling, projection.
    hook = token_embedding(model).register_forward_hook(insert_context)
    try:
        ids = tokens.expand(individuals, classes, length).reshape(individuals * classes, length)
        features = model.encode_text(ids, normalize=False)  # type: ignore[operator]
    finally:
        hook.remove()
    return features.unflatten(0, (individuals, classes))


def encode_tree(
    model: nn.Module,
    packed: PackedPrompts,
    context: Tensor,  # (N, M, W) if packed as shared, else (N, E, M, W)
    *,
    backend: str | None = None,
    checkpoint: bool | None = None,
) -> Tensor:
    """What `encode_padded` returns, from packed prompts: outputs and gradients are equal up to rounding.

        x = embeddings of the trees' tokens + their positions;  x += attention(x), x += mlp(x) in every layer
        features[n, e] = project(ln_final(x at EOS of e))

    Where the tower is in half precision, the sums x are in float32.

    Args:
        model: a model without a `tree_obstacle`; its text tower is frozen.
        packed: the prompts' layout.
        context: the embeddings of the context tokens.
        backend: backend of `ops.tree_attention`.
        checkpoint: recompute each block in the backward pass instead of keeping its activations. None follows the
            tower's own `set_grad_checkpointing`.

    Returns:
        (N, E, D), not normalized.

    Source: ours.
    """
    tower = text_tower(model)
    blocks = [open_clip_block(block) for block in tower.transformer.resblocks]
    dtype = tower.transformer.get_cast_dtype()
    if checkpoint is None:
        checkpoint = tower.transformer.grad_checkpointing

    x = _embed(tower, packed, context)  # (N·T, S, W)
    for block in blocks[:-1]:
        if checkpoint:
            x = torch.utils.checkpoint.checkpoint(_run_block, block, x, packed, backend, use_reentrant=False)
        else:
            x = _run_block(block, x, packed, backend)
    x = norm(tower.ln_final, _run_last_block(blocks[-1], x, packed), dtype)  # (N, E, W)

    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def tree_obstacle(model: nn.Module) -> str | None:
    """Why prompt trees would not reproduce `model.encode_text` exactly, or None if they do.

    They do for towers that are causal and pool at EOS, built of open_clip's blocks: OpenAI's, LAION's, DataComp's,
    MetaCLIP's, EVA's, PE's.
    """
    tower = text_tower(model)
    if type(tower).forward not in (CLIP.forward, TextTransformer.forward):
        return f"a {type(tower).__name__} is not open_clip's text tower"
    if getattr(tower, "cls_emb", None) is not None:
        return "the tower pools at a class token, which comes after the pads"
    if pool_type(model) not in ("argmax", "eos"):
        return f"the tower pools {pool_type(model)!r}, not at EOS"
    if getattr(type(model), "encode_text", None) not in (CLIP.encode_text, CustomTextCLIP.encode_text):
        return f"{type(model).__name__} encodes texts in its own way"
    if tower.attn_mask is None or not _is_causal(tower.attn_mask):
        return "the tower's attention is not causal"
    if type(tower.transformer).forward is not Transformer.forward:
        return f"a {type(tower.transformer).__name__} is not open_clip's transformer"
    return next(filter(None, map(open_clip_obstacle, tower.transformer.resblocks)), None)


def eos_positions(
    model: nn.Module,
    tokens: Tensor,  # (E, L)
) -> Tensor:  # (E,)
    """Where a tower that pools at EOS finds it, as `open_clip.transformer.text_global_pool` does."""
    if pool_type(model) == "argmax":
        return tokens.argmax(-1)
    tower = text_tower(model)
    eos: int = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))  # type: ignore[assignment]
    return torch.eq(tokens, eos).int().argmax(-1)


def text_tower(model: nn.Module) -> Any:
    """The module that holds the text tower: `CLIP` itself (it unpacks the tower), else its `.text`."""
    return getattr(model, "text", model)


def token_embedding(model: nn.Module) -> nn.Module:
    """The text tower's token embedding, whose output for ids (B, L) is (B, L, W)."""
    tower = text_tower(model)
    if hasattr(tower, "token_embedding"):
        return tower.token_embedding
    if hasattr(tower, "transformer") and hasattr(tower.transformer, "get_input_embeddings"):
        return tower.transformer.get_input_embeddings()
    raise TypeError(f"clip.model: found no token embedding in its text tower, a {type(tower).__name__}")


def text_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The text tower's parameters; for `CLIP`, which unpacks the tower, all but the image tower's and the logit's."""
    tower = text_tower(model)
    if tower is not model:
        return list(tower.parameters())
    return [p for name, p in tower.named_parameters() if not name.startswith(("visual.", "logit_"))]


def check_pooling(model: nn.Module) -> None:
    """Raise ValueError for a tower whose pooled feature does not depend on the whole prompt."""
    tower = text_tower(model)
    if getattr(tower, "cls_emb", None) is not None:  # CoCa's class token overrides the pool type
        return
    pool = pool_type(model)
    if pool == "none":
        raise ValueError("clip.model: its text tower pools 'none': one feature per token, not one per prompt")
    if pool == "first" and getattr(tower, "attn_mask", None) is not None:
        raise ValueError("clip.model: its text tower is causal and pools the first token, which sees no prompt")


def pool_type(model: nn.Module) -> str | None:
    """open_clip's name for how the tower pools ('argmax', 'eos', 'first', 'last', 'none'); None if it has none."""
    tower = text_tower(model)
    return getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))


def _embed(tower: Any, packed: PackedPrompts, context: Tensor) -> Tensor:
    """(N·T, S, W): the trees' tokens with the context inserted and positions added."""
    dtype = sum_dtype(tower.transformer.get_cast_dtype())
    individuals, width = context.shape[0], context.shape[-1]
    if context.dim() == 3:
        rows = context[:, None].expand(-1, packed.trees, -1, -1)
    else:
        rows = context.index_select(1, packed.classes)
    words = tower.token_embedding(packed.tokens).to(dtype).flatten(0, 1)  # (T·S, W)
    words = words.expand(individuals, -1, -1).index_copy(1, packed.context_at, rows.to(dtype).flatten(1, 2))
    positions = tower.positional_embedding.to(dtype)[packed.positions]
    return words.view(individuals * packed.trees, packed.length, width) + positions


def _run_block(block: Block, x: Tensor, packed: PackedPrompts, backend: str | None) -> Tensor:
    """One residual block on all tokens, (N·T, S, W) to the same."""
    normed = norm(block.norm_1, x, block.dtype)
    if len(block.qkv) == 1 and block.q_norm is None and block.k_norm is None:
        qkv = frozen_linear(normed, *block.qkv[0]).unflatten(-1, (3, block.heads, -1))  # (N·T, S, 3, H, d)
    else:
        qkv = torch.stack(project(block, normed), dim=2)
    return after_attention(block, x, tree_attention(qkv, packed.layout, backend=backend))


def _run_last_block(block: Block, x: Tensor, packed: PackedPrompts) -> Tensor:
    """The last block at EOS only, (N·T, S, W) to (N, E, W): queries of EOS, keys and values of all tokens."""
    individuals, width = len(x) // packed.trees, x.shape[-1]
    trees = (individuals, packed.trees * packed.length, width)  # an individual's trees laid end to end
    normed = norm(block.norm_1, x, block.dtype)
    asking = normed.view(trees).index_select(1, packed.eos).view(len(x), packed.segments, width)
    query, key, value = (each.transpose(1, 2) for each in project(block, normed, asking))

    mask = packed.eos_mask.repeat(individuals, 1, 1)[:, None] if packed.trees > 1 else packed.eos_mask
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)

    in_order = packed.place
    heads = mixed.reshape(individuals, packed.trees * packed.segments, *mixed.shape[2:]).index_select(1, in_order)
    return after_attention(block, x.view(trees).index_select(1, packed.eos[in_order]), heads)


def _is_causal(mask: Tensor) -> bool:
    """Whether an additive mask lets each token see exactly itself and all tokens before it."""
    causal = torch.full_like(mask, -torch.inf).triu_(1)
    return torch.equal(mask, causal)
