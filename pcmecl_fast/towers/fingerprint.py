"""A hash of what a tower computes: its weights, and what its modules do with them.

One file of weights makes different towers: with GELU or quick-GELU, pooled at EOS or at the last token, causal or not.
What a module does is read off the module itself, so that a tower is the same tower whether its configuration came with
open_clip, from the Hub or from a folder, and in whatever dtype it runs.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

VERSION = "v2-"
"""What hashes begin with. Those before it had no version, and knew of weights alone."""

_SETTINGS = (
    # Of towers: which token is the feature, and what tokens see.
    *("pool_type", "text_pool_type", "global_pool", "final_ln_after_pool", "cls_token_position", "context_length"),
    *("eos_id", "text_eos_id", "pad_id", "num_prefix_tokens", "pool_include_prefix", "no_embed_class"),
    # Of layers.
    *("num_heads", "num_attention_heads", "scaled_cosine", "eps", "approximate", "negative_slope"),
    *("kernel_size", "stride", "padding", "dilation", "groups"),
)
_IDLE = ("Identity", "Dropout", "Dropout1d", "Dropout2d", "DropPath", "PatchDropout")
"""Layers without parameters that do nothing in eval mode."""


def tower_hash(model: nn.Module, *, visual: bool) -> str:
    """The hash of an open_clip model's image tower, or of all but that; take it before a cast to another dtype."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(_behaviour(model, visual=visual), sort_keys=True).encode())
    for key, value in sorted(model.state_dict().items()):
        if key.startswith("visual.") == visual:
            digest.update(f"{key}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return VERSION + digest.hexdigest()


def _behaviour(model: nn.Module, *, visual: bool) -> dict[str, dict[str, Any]]:
    """What each module does besides its weights, for those that say anything."""
    modules = ((path, module) for path, module in model.named_modules() if f"{path}.".startswith("visual.") == visual)
    facts = {path: _facts(module) for path, module in modules}
    return {path: said for path, said in facts.items() if said}


def _facts(module: nn.Module) -> dict[str, Any]:
    facts = {name: value for name in _SETTINGS if _is_plain(value := getattr(module, name, None))}
    if "attn_mask" in module._buffers or "attn_mask" in vars(module):
        facts["attn_mask"] = _mask_hash(getattr(module, "attn_mask"))  # noqa: B009 (a buffer, to mypy a module)
    leaf = not (module._modules or module._parameters or module._buffers)
    if leaf and type(module).__name__ not in _IDLE:  # activations, poolers
        facts["does"] = type(module).__name__
    return facts


def _mask_hash(mask: Tensor | None) -> str | None:
    """Who sees whom: the mask's pattern, in any dtype."""
    if mask is None:
        return None
    seen = mask.logical_not() if mask.dtype == torch.bool else mask == 0
    return hashlib.blake2b(seen.cpu().numpy().tobytes(), digest_size=8).hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)
