"""Comparisons of the image tower: features of edited frames and the gradient of the frames.

The plain sides are a careful user's: parameters frozen, so that PyTorch computes no gradients of weights; also with
attention in one product for queries, keys and values and `F.scaled_dot_product_attention`, and through `torch.compile`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import rehearsal
from bench.compare import Comparison, Side, comparison, count_operations, those_that_run
from bench.compare_prompts import backward_to, random_frames, tower
from bench.timing import Run
from pcmecl_fast.towers.image import encode_image

SOURCES = ("pcmecl_fast/towers/*.py", "pcmecl_fast/clip.py")


@comparison(
    "image_tower",
    "ViT-B-32's features of 16 edited frames, with backward to the frames",
    sources=SOURCES,
    targets={"cpu": {"open_clip": 1.35}, "cuda": {"open_clip": 1.2}},
)
def image_tower(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _compared("ViT-B-32", rehearsal.size(16), device, dtype)


@comparison(
    "image_tower_large",
    "ViT-L-14's features of 4 edited frames, with backward to the frames",
    sources=SOURCES,
    targets={"cpu": {"open_clip": 1.2}, "cuda": {"open_clip": 1.1}},
)
def image_tower_large(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _compared("ViT-L-14", rehearsal.size(4), device, dtype)


def _compared(name: str, count: int, device: torch.device, dtype: torch.dtype) -> Comparison:
    clip = tower(device, dtype, name)
    pixels = random_frames(count, clip.image_size, device, dtype).requires_grad_()
    weight = torch.randn(count, clip.embed_dim, generator=torch.Generator().manual_seed(1)).to(device)

    def side(encode: Callable[[Tensor], Tensor]) -> Run:
        def run() -> list[Tensor]:
            features = encode(pixels)
            return [features, backward_to(pixels, (features.float() * weight).sum())]

        return run

    ours = side(partial(encode_image, clip.model, checkpoint=False))
    recomputed = side(partial(encode_image, clip.model, checkpoint="attention"))
    compiled, skipped = those_that_run(
        {"torch.compile": lambda: side(torch.compile(clip.model.encode_image, dynamic=False))}
    )
    return Comparison(
        [
            Side("open_clip", side(clip.model.encode_image)),
            Side("with F.sdpa", side(_with_sdpa(clip.model).encode_image)),
            *compiled,
            Side("ours, attention recomputed", recomputed),
            Side("ours", ours),
        ],
        operations=count_operations(ours),
        skipped=skipped,
        as_it_runs=True,
    )


def _with_sdpa(model: Any) -> Any:
    """The same model, weights shared, with another attention in its image tower."""
    changed = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for block in changed.visual.transformer.resblocks:
        block.attn = _Attention(block.attn)
    return changed


class _Attention(nn.Module):
    """Stands in for `nn.MultiheadAttention` where all three inputs are the same."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.plain = attention

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        qkv = F.linear(x, self.plain.in_proj_weight, self.plain.in_proj_bias)
        query, key, value = qkv.unflatten(-1, (3, self.plain.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.plain.out_proj(mixed), None
