"""The operators in plain PyTorch: the specification that every backend is tested against.

The wrappers in the files beside this one check the arguments; these functions trust them. Three rules hold throughout:

- Half types are computed in float32. Losses stay float32; logits, attention and frames return in the input's dtype.
- `torch.autocast` changes nothing: the arithmetic runs with it switched off.
- A vector no longer than ε = 1e-8 has no direction: its unit vector is 0, and so is the gradient through it. A plain
  `x / max(|x|, ε)` would have gradient 1/ε = 1e8 there, and `x / |x|` would give NaN. The difference of two unit
  vectors that were computed in float32 has none up to 1e-6: below that it is rounding. Nor has a vector so long that
  its square overflows (in float32 1.8e19).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pcmecl_fast.ops.checks import autocast_off
from pcmecl_fast.ops.prompt_tree import PromptTree

EPS = 1e-8  # as in F.cosine_similarity
FLOAT32_EPS = 1e-6  # of differences of unit vectors: some eight roundings of one of their elements


def direction_logits(
    source: Tensor,  # (B, D)
    edited: Tensor,  # (B, D)
    bank: Tensor,  # (N, E, D)
    individual: Tensor,  # (B,)
    source_emotion: Tensor,  # (B,)
    normalize: bool,
    min_change: float,
) -> Tensor:  # (B, E)
    with autocast_off(source):
        cosines = _direction_cosines(source, edited, bank, individual, source_emotion, normalize, min_change)
        return cosines.to(source.dtype)


def direction_loss(
    source: Tensor,  # (B, D)
    edited: Tensor,  # (B, D)
    bank: Tensor,  # (N, E, D)
    individual: Tensor,  # (B,)
    source_emotion: Tensor,  # (B,)
    target_emotion: Tensor,  # (B,)
    scale: float | Tensor,
    contrast: float,
    normalize: bool,
    min_change: float,
    reduction: str,
) -> Tensor:  # () or (B,)
    with autocast_off(source):
        valid = source_emotion != target_emotion
        # Whatever is in a sample that requests no change, NaN included, must not reach the bank's gradient.
        source, edited = (x.masked_fill(~valid[:, None], 0.0) for x in (source, edited))
        cosines = _direction_cosines(source, edited, bank, individual, source_emotion, normalize, min_change)
        wanted = _pick(cosines, target_emotion)
        # Without a valid target nothing is masked, so the softmax is never empty, even with a single emotion.
        not_a_change = valid[:, None] & (torch.arange(bank.shape[1], device=bank.device) == source_emotion[:, None])
        # Subtracted before they are scaled: the loss is the difference of two logits, and small where they are not.
        logits = (scale * (cosines - wanted[:, None])).masked_fill(not_a_change, -torch.inf)
        loss = torch.where(valid, 1 - wanted + contrast * logits.logsumexp(dim=1), 0.0)
        if reduction == "none":
            return loss
        return loss.sum() / valid.sum().clamp(min=1) if reduction == "mean" else loss.sum()


def correlation_loss(
    visual: Tensor,  # (N, E, D)
    text: Tensor,  # (N, E, D)
    scale: float | Tensor,
    mask: Tensor | None,  # (N, E) bool
    negatives: str,
) -> Tensor:  # ()
    individuals, emotions, _ = visual.shape
    present = visual.new_ones(individuals, emotions, dtype=torch.bool) if mask is None else mask
    before, after = ordered_pairs(emotions, visual.device)
    pairs = len(before)
    valid = (present[:, before] & present[:, after]).flatten()

    with autocast_off(visual):
        visual_change, text_change = (
            _unit(x[:, after] - x[:, before]).flatten(0, 1)
            for x in (_centred(visual, present), _centred(text, present))
        )
        logits = scale * (visual_change @ text_change.T)

        who = torch.arange(individuals, device=visual.device).repeat_interleave(pairs)
        change = torch.arange(pairs, device=visual.device).repeat(individuals)
        same_individual, same_change = who[:, None] == who, change[:, None] == change
        keep = valid[:, None] & valid
        if negatives == "within":
            keep = keep & same_individual
        elif negatives == "distinct":
            keep = keep & (same_individual | ~same_change)
        # An invalid row keeps only its own logit: its cross entropy and gradient are exactly 0.
        logits = logits.masked_fill(~(keep | same_individual & same_change), -torch.inf)
        rows_and_columns = logits.logsumexp(dim=1) + logits.logsumexp(dim=0) - 2 * logits.diagonal()
        return 0.5 * rows_and_columns.sum() / valid.sum().clamp(min=1)


def tree_attention(
    qkv: Tensor,  # (N, S, 3, H, d)
    layout: PromptTree,
) -> Tensor:  # (N, S, H, d)
    with autocast_off(qkv):
        query, key, value = _wide(qkv).permute(2, 0, 3, 1, 4)  # each (N, H, S, d)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=layout.mask(qkv.device))
        return out.transpose(1, 2).to(qkv.dtype).contiguous()


def clip_frames(
    frames: Tensor,  # (B, 3, H, W) in [-1, 1]
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
) -> Tensor:  # (B, 3, size, size)
    with autocast_off(frames):
        unit_range = (_wide(frames) + 1) / 2
        resized = F.interpolate(unit_range, (size, size), mode=interpolation, antialias=True, align_corners=False)
        # Not clamped: the resize overshoots slightly at edges, and a clamp would zero those pixels' gradients.
        per_channel = [(channel - m) / s for channel, m, s in zip(resized.unbind(dim=1), mean, std, strict=True)]
        return torch.stack(per_channel, dim=1).to(frames.dtype)


def _direction_cosines(
    source: Tensor,  # (B, D)
    edited: Tensor,  # (B, D)
    bank: Tensor,  # (N, E, D)
    individual: Tensor,  # (B,)
    source_emotion: Tensor,  # (B,)
    normalize: bool,
    min_change: float,
) -> Tensor:  # (B, E) in the computing dtype
    # In one order in memory, and so summed in one: else the norms of two equal features differ by a rounding, and their
    # difference is a direction.
    source, edited = _wide(source).contiguous(), _wide(edited).contiguous()
    bank = _wide(bank)  # before the gather, so that the samples' gradients add up in float32
    if normalize:
        source, edited = _unit(source), _unit(edited)
    delta = _unit(edited - source, least=min_change, eps=smallest_change(source.dtype, normalize))
    rows = bank[individual]  # (B, E, D)
    directions = _unit(rows - bank[individual, source_emotion][:, None])
    return (directions * delta[:, None]).sum(dim=-1)


def smallest_change(dtype: torch.dtype, normalize: bool) -> float:
    """Up to which length a change of image features, computed in this dtype, is no direction."""
    return FLOAT32_EPS if normalize and dtype == torch.float32 else EPS


def _unit(x: Tensor, *, least: float = 0.0, eps: float = EPS) -> Tensor:
    """x / max(|x|, least) over the last dimension; 0 with gradient 0 where that is at most ε. NaN stays visible."""
    square = (x * x).sum(dim=-1, keepdim=True).clamp(min=least**2)
    short = square <= eps**2
    return x.masked_fill(short, 0.0) / square.masked_fill(short, 1.0).sqrt()


def _centred(x: Tensor, present: Tensor) -> Tensor:
    """Subtract each individual's mean over its present emotions: differences keep their value, and their low bits."""
    x = torch.where(present[..., None], _wide(x), 0.0)  # absent entries may hold anything, NaN included
    mean = x.sum(dim=1, keepdim=True) / present.sum(dim=1).clamp(min=1)[:, None, None]
    return x - mean


def ordered_pairs(emotions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every (a, b) with a ≠ b, a varying slowest: two index tensors of E(E-1)."""
    pair = torch.arange(emotions * (emotions - 1), device=device)
    before = pair // max(emotions - 1, 1)
    other = pair % max(emotions - 1, 1)
    return before, other + (other >= before)


def _pick(table: Tensor, column: Tensor) -> Tensor:
    return table.gather(1, column[:, None])[:, 0]


def _wide(x: Tensor) -> Tensor:
    return x.to(computing_dtype(x))


def computing_dtype(x: Tensor) -> torch.dtype:
    """float32 for half types, else the tensor's own."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
