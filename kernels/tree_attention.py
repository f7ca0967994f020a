"""tree_attention: a prompt tree's attention straight from the packed qkv, without a mask tensor or a transposed copy.

A program owns one individual, one head and a block of tokens: the whole tree up to 64 tokens (32 in float32). The mask
is one number for each token, where its segment begins: token q sees key k if k ≤ q and (k < prefix or k ≥ begin[q]).
Blocks of keys that no query of the block sees are passed by. A streaming softmax goes over the rest.

The backward recomputes the logits from qkv and the saved log-sum-exp: one launch for one block, else one for the
queries' gradient and one for the keys' and values'.

S tokens, d wide, w bytes a number: 4·S·d·w bytes forward and 7·S·d·w backward for each individual and head, about
4·S²·d and 10·S²·d operations. At S = 30 the bytes bound it, and at a few individuals the launch. Products take half
inputs as they are, weights as two halves, and accumulate in float32; float32 inputs are multiplied in 3xTF32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcmecl_fast.kernels.common import INTERPRETED, LN2, LOG2E, Config, power_of_2, run_tuned

CONFIGS = [Config(warps=4, stages=1), Config(warps=8, stages=1)]


def tree_attention_forward(
    qkv: Tensor,  # (N, S, 3, H, d)
    prefix: int,
    segment_lengths: Sequence[int],
) -> tuple[Tensor, Tensor]:
    people, tokens, _, heads, width = qkv.shape
    out = qkv.new_empty(people, tokens, heads, width)
    lse = qkv.new_empty(people, heads, tokens, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse.zero_()
    begins = _begins(prefix, tuple(segment_lengths), qkv.device)
    constants = _constants(qkv)
    run_tuned(
        "tree_attention",
        (tokens, width, heads, qkv.dtype),
        CONFIGS,
        qkv,
        lambda config: _forward_kernel[(people * heads, triton.cdiv(tokens, constants["BLOCK"]))](
            qkv, begins, out, lse, prefix, tokens, heads, width**-0.5, **constants, **config.options()
        ),
    )
    return out, lse


def tree_attention_backward(
    grad: Tensor,  # (N, S, H, d)
    qkv: Tensor,  # (N, S, 3, H, d)
    prefix: int,
    segment_lengths: Sequence[int],
    out: Tensor,  # (N, S, H, d)
    lse: Tensor,  # (N, H, S)
    needs: Sequence[bool],
) -> tuple[Tensor | None]:
    if not needs[0]:
        return (None,)
    people, tokens, _, heads, width = qkv.shape
    g_qkv = torch.empty_like(qkv)
    if g_qkv.numel() == 0:
        return (g_qkv,)
    begins = _begins(prefix, tuple(segment_lengths), qkv.device)
    constants = _constants(qkv)
    blocks = triton.cdiv(tokens, constants["BLOCK"])
    deltas = torch.empty_like(lse)
    for kernel in (_backward_kernel,) if blocks == 1 else (_queries_kernel, _keys_kernel):
        run_tuned(
            kernel.__name__,
            (tokens, width, heads, qkv.dtype),
            CONFIGS,
            qkv,
            lambda config, kernel=kernel: kernel[(people * heads, blocks)](  # type: ignore[misc]
                grad,
                qkv,
                begins,
                lse,
                deltas,
                g_qkv,
                prefix,
                tokens,
                heads,
                width**-0.5,
                **constants,
                **config.options(),
            ),
        )
    return (g_qkv,)


def block_of(tokens: int, *, half: bool) -> int:
    """Tokens that a program owns: the whole tree up to 64, or 32 of float32; of longer ones what spills no register."""
    whole = 64 if half else 32
    return power_of_2(tokens, least=16) if tokens <= whole else whole // 2


def _constants(qkv: Tensor) -> dict[str, Any]:
    _, tokens, _, _, width = qkv.shape
    # The interpreter multiplies bfloat16 wrongly, so there the factors are widened.
    wide = qkv.dtype == torch.float32 or INTERPRETED
    return {
        "WIDTH": width,
        "BLOCK": block_of(tokens, half=qkv.dtype != torch.float32),
        "BLOCK_D": power_of_2(width, least=16),
        "WIDE": wide,
    }


@lru_cache(maxsize=64)
def _begins(prefix: int, segment_lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each token's segment begins, 0 for the prefix."""
    begins = [0] * prefix
    for length in segment_lengths:
        begins += [len(begins)] * length
    with torch.inference_mode(False):  # a tensor made in inference mode could not serve a later backward
        return torch.tensor(begins, dtype=torch.int32).to(device)


@triton.jit
def _load(x, token, stride, tokens, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """A block of tokens' vectors, 0 beyond the last."""
    d = tl.arange(0, BLOCK_D)
    inside = (token[:, None] < tokens) & (d[None, :] < WIDTH)
    block = tl.load(x + token[:, None] * stride + d[None, :], inside, other=0.0)
    return block.to(tl.float32) if WIDE else block


@triton.jit
def _store(x, token, stride, tokens, block, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    inside = (token[:, None] < tokens) & (d[None, :] < WIDTH)
    tl.store(x + token[:, None] * stride + d[None, :], block, inside)


@triton.jit
def _sees(query, key, begin, prefix, tokens):
    """The mask, queries down and keys across."""
    past = (key[None, :] <= query[:, None]) & (key[None, :] < tokens)
    return past & ((key[None, :] < prefix) | (key[None, :] >= begin[:, None]))


@triton.jit
def _any_seen(first_query, last_key, first_key, begins, prefix, BLOCK: tl.constexpr):
    """Whether a block of keys up to the diagonal holds any that the block of queries may see."""
    return (first_key < prefix) | (last_key >= tl.load(begins + first_query)) | (first_key == first_query)


@triton.jit
def _dot(x, y):
    """x y for float32 x: where y is a half type, x goes in as two of that type, so that its bits are not lost."""
    if y.dtype == tl.float32:
        return tl.dot(x, y, input_precision="tf32x3")
    else:  # noqa: RET505
        high = x.to(y.dtype)
        return tl.dot((x - high.to(tl.float32)).to(y.dtype), y, acc=tl.dot(high, y))


@triton.jit
def _forward_kernel(
    qkv,
    begins,
    out,
    lse,
    prefix,
    tokens,
    heads,
    by_width,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    person, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    stride = 3 * heads * WIDTH
    q_at = qkv + tl.cast(person, tl.int64) * tokens * stride + head * WIDTH
    k_at, v_at = q_at + heads * WIDTH, q_at + 2 * heads * WIDTH
    first_query = tl.program_id(1) * BLOCK
    query = first_query + tl.arange(0, BLOCK)
    begin = tl.load(begins + query, query < tokens, other=0)
    q = _load(q_at, query, stride, tokens, WIDTH, BLOCK_D, WIDE)

    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    result = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for first_key in range(0, first_query + BLOCK, BLOCK):
        if _any_seen(first_query, first_key + BLOCK - 1, first_key, begins, prefix, BLOCK):
            key = first_key + tl.arange(0, BLOCK)
            k = _load(k_at, key, stride, tokens, WIDTH, BLOCK_D, WIDE)
            v = _load(v_at, key, stride, tokens, WIDTH, BLOCK_D, WIDE)
            logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * (by_width * LOG2E)
            # Tokens beyond the last see the first, so that no row is without a key; they are not stored.
            logits = tl.where(_sees(query, key, begin, prefix, tokens), logits, -float("inf"))
            new_highest = tl.maximum(highest, tl.max(logits, axis=1))
            # A block may hold no key of a row that has seen none yet only after the prefix's first, which all see.
            shrink = tl.exp2(highest - new_highest)
            weights = tl.exp2(logits - new_highest[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            result = result * shrink[:, None] + _dot(weights, v)
            highest = new_highest
    _store(
        out + tl.cast(person, tl.int64) * tokens * heads * WIDTH + head * WIDTH,
        query,
        heads * WIDTH,
        tokens,
        result / total[:, None],
        WIDTH,
        BLOCK_D,
    )
    tl.store(lse + tl.program_id(0) * tokens + query, (highest + tl.log2(total)) * LN2, query < tokens)


@triton.jit
def _weights(q, k, lse, query, key, begin, prefix, tokens, by_width):
    """The attention weights again, queries down and keys across."""
    logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * (by_width * LOG2E)
    seen = _sees(query, key, begin, prefix, tokens)
    return tl.where(seen, tl.exp2(logits - lse[:, None] * LOG2E), 0.0)


@triton.jit
def _backward_kernel(
    grad,
    qkv,
    begins,
    lse,
    deltas,
    g_qkv,
    prefix,
    tokens,
    heads,
    by_width,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The whole tree in one block."""
    person, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    stride, out_stride = 3 * heads * WIDTH, heads * WIDTH
    at = tl.cast(person, tl.int64) * tokens * stride + head * WIDTH
    token = tl.arange(0, BLOCK)
    begin = tl.load(begins + token, token < tokens, other=0)
    of_token = tl.load(lse + tl.program_id(0) * tokens + token, token < tokens, other=0.0)
    q = _load(qkv + at, token, stride, tokens, WIDTH, BLOCK_D, WIDE)
    k = _load(qkv + at + out_stride, token, stride, tokens, WIDTH, BLOCK_D, WIDE)
    v = _load(qkv + at + 2 * out_stride, token, stride, tokens, WIDTH, BLOCK_D, WIDE)
    out_at = tl.cast(person, tl.int64) * tokens * out_stride + head * WIDTH
    g = _load(grad + out_at, token, out_stride, tokens, WIDTH, BLOCK_D, WIDE)

    weights = _weights(q, k, of_token, token, token, begin, prefix, tokens, by_width)
    _store(g_qkv + at + 2 * out_stride, token, stride, tokens, _dot(tl.trans(weights), g), WIDTH, BLOCK_D)
    g_weights = tl.dot(g, tl.trans(v), input_precision="tf32x3")
    delta = tl.sum(weights * g_weights, axis=1)
    g_logits = weights * (g_weights - delta[:, None]) * by_width
    _store(g_qkv + at, token, stride, tokens, _dot(g_logits, k), WIDTH, BLOCK_D)
    _store(g_qkv + at + out_stride, token, stride, tokens, _dot(tl.trans(g_logits), q), WIDTH, BLOCK_D)


@triton.jit
def _queries_kernel(
    grad,
    qkv,
    begins,
    lse,
    deltas,
    g_qkv,
    prefix,
    tokens,
    heads,
    by_width,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A block of queries: δ = Σ over keys of weight · its gradient, then dq. The rounded output gives less."""
    person, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    stride, out_stride = 3 * heads * WIDTH, heads * WIDTH
    at = tl.cast(person, tl.int64) * tokens * stride + head * WIDTH
    out_at = tl.cast(person, tl.int64) * tokens * out_stride + head * WIDTH
    k_at, v_at = qkv + at + out_stride, qkv + at + 2 * out_stride
    first = tl.program_id(1) * BLOCK
    query = first + tl.arange(0, BLOCK)
    begin = tl.load(begins + query, query < tokens, other=0)
    of_query = tl.load(lse + tl.program_id(0) * tokens + query, query < tokens, other=0.0)
    q = _load(qkv + at, query, stride, tokens, WIDTH, BLOCK_D, WIDE)
    g = _load(grad + out_at, query, out_stride, tokens, WIDTH, BLOCK_D, WIDE)

    delta = tl.zeros([BLOCK], tl.float32)
    for first_key in range(0, first + BLOCK, BLOCK):
        if _any_seen(first, first_key + BLOCK - 1, first_key, begins, prefix, BLOCK):
            key = first_key + tl.arange(0, BLOCK)
            k = _load(k_at, key, stride, tokens, WIDTH, BLOCK_D, WIDE)
            v = _load(v_at, key, stride, tokens, WIDTH, BLOCK_D, WIDE)
            weights = _weights(q, k, of_query, query, key, begin, prefix, tokens, by_width)
            delta += tl.sum(weights * tl.dot(g, tl.trans(v), input_precision="tf32x3"), axis=1)
    tl.store(deltas + tl.program_id(0) * tokens + query, delta, query < tokens)

    g_q = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for first_key in range(0, first + BLOCK, BLOCK):
        if _any_seen(first, first_key + BLOCK - 1, first_key, begins, prefix, BLOCK):
            key = first_key + tl.arange(0, BLOCK)
            k = _load(k_at, key, stride, tokens, WIDTH, BLOCK_D, WIDE)
            v = _load(v_at, key, stride, tokens, WIDTH, BLOCK_D, WIDE)
            weights = _weights(q, k, of_query, query, key, begin, prefix, tokens, by_width)
            g_weights = tl.dot(g, tl.trans(v), input_precision="tf32x3")
            g_q += _dot(weights * (g_weights - delta[:, None]) * by_width, k)
    _store(g_qkv + at, query, stride, tokens, g_q, WIDTH, BLOCK_D)


@triton.jit
def _keys_kernel(
    grad,
    qkv,
    begins,
    lse,
    deltas,
    g_qkv,
    prefix,
    tokens,
    heads,
    by_width,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A block of keys: dk and dv over the queries that see it."""
    person, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    stride, out_stride = 3 * heads * WIDTH, heads * WIDTH
    at = tl.cast(person, tl.int64) * tokens * stride + head * WIDTH
    out_at = tl.cast(person, tl.int64) * tokens * out_stride + head * WIDTH
    first = tl.program_id(1) * BLOCK
    key = first + tl.arange(0, BLOCK)
    k = _load(qkv + at + out_stride, key, stride, tokens, WIDTH, BLOCK_D, WIDE)
    v = _load(qkv + at + 2 * out_stride, key, stride, tokens, WIDTH, BLOCK_D, WIDE)
    g_k = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    g_v = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for first_query in range(first, tokens, BLOCK):
        if _any_seen(first_query, first + BLOCK - 1, first, begins, prefix, BLOCK):
            query = first_query + tl.arange(0, BLOCK)
            begin = tl.load(begins + query, query < tokens, other=0)
            of_query = tl.load(lse + tl.program_id(0) * tokens + query, query < tokens, other=0.0)
            delta = tl.load(deltas + tl.program_id(0) * tokens + query, query < tokens, other=0.0)
            q = _load(qkv + at, query, stride, tokens, WIDTH, BLOCK_D, WIDE)
            g = _load(grad + out_at, query, out_stride, tokens, WIDTH, BLOCK_D, WIDE)
            weights = _weights(q, k, of_query, query, key, begin, prefix, tokens, by_width)
            g_v += _dot(tl.trans(weights), g)
            g_weights = tl.dot(g, tl.trans(v), input_precision="tf32x3")
            g_k += _dot(tl.trans(weights * (g_weights - delta[:, None]) * by_width), q)
    _store(g_qkv + at + out_stride, key, stride, tokens, g_k, WIDTH, BLOCK_D)
    _store(g_qkv + at + 2 * out_stride, key, stride, tokens, g_v, WIDTH, BLOCK_D)
