"""tree_attention: a prompt tree's attention straight from the packed qkv, without a mask tensor or a transposed copy.

A program owns one individual, one head and a block of tokens: the whole tree up to 64 tokens (32 in float32). The mask
is one number for each token, where its segment starts: token q sees key k if k ≤ q and (k < prefix or k ≥ start[q]).
The starts come as arguments of the launch, a bit for each token that begins a segment: a table on the device would have
to be copied there, which waits, and kept, which a CUDA graph's memory does not allow.
Blocks of keys that no query of the block sees are skipped. A streaming softmax goes over the rest. Each factor is read
where it is first multiplied: float32 is split in two for that, and what is read earlier would spill.

The backward recomputes the logits from qkv and the saved log-sum-exp: one launch for one block, else one for the
queries' gradient and one for the keys' and values'.

S tokens, d wide, w bytes a number: 4·S·d·w bytes forward and 7·S·d·w backward for each individual and head, about
4·S²·d and 10·S²·d operations. At S = 30 the bytes bound it, and at a few individuals the launch. Products take half
inputs as they are, weights as two halves, and accumulate in float32; float32 inputs are multiplied in 3xTF32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcmecl_fast.kernels.common import INTERPRETED, LOG2E, Config, power_of_2, run_tuned

# Arguments that kernels are not compiled anew for: a layout's segments, and sizes that no load's alignment depends on.
ANY = [*(f"begins_{word}" for word in range(4)), "prefix", "tokens", "heads"]
# Of a thread of `queries_kernel`, at most, in half types with heads of 33 to 64: by itself the compiler spills two for
# a fifth program of four warps a processor, Triton 3.8 at 256 tokens and 3.6 at 192.
QUERY_REGISTERS = 128
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
    begins = segment_begins(prefix, segment_lengths)
    sizes = _tile_sizes(qkv)
    blocks = triton.cdiv(tokens, sizes["BLOCK"])
    run_tuned(
        "tree_attention",
        (tokens, width, heads, qkv.dtype),
        CONFIGS,
        qkv,
        lambda config: forward_kernel[(people * heads, blocks)](
            qkv,
            *begins,
            out,
            lse,
            prefix,
            tokens,
            heads,
            width**-0.5,
            MANY=blocks > 1,
            **sizes,
            **config.options(),
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
    grad_qkv = torch.empty_like(qkv)
    if grad_qkv.numel() == 0:
        return (grad_qkv,)
    begins = segment_begins(prefix, segment_lengths)
    sizes = _tile_sizes(qkv)
    blocks = triton.cdiv(tokens, sizes["BLOCK"])
    deltas = torch.empty_like(lse)
    bound = {"maxnreg": QUERY_REGISTERS} if not sizes["WIDE"] and sizes["BLOCK_D"] == 64 else {}
    for kernel in (backward_kernel,) if blocks == 1 else (queries_kernel, keys_kernel):
        run_tuned(
            kernel.__name__,
            (tokens, width, heads, qkv.dtype),
            CONFIGS,
            qkv,
            lambda config, kernel=kernel: kernel[(people * heads, blocks)](  # type: ignore[misc]
                grad,
                qkv,
                *begins,
                lse,
                deltas,
                grad_qkv,
                prefix,
                tokens,
                heads,
                width**-0.5,
                **sizes,
                **config.options(),
                **(bound if kernel is queries_kernel else {}),
            ),
        )
    return (grad_qkv,)


def block_of(tokens: int, *, half: bool) -> int:
    """Tokens that a program owns: the whole tree up to 64, or 32 of float32; of longer ones what spills no register."""
    whole = 64 if half else 32
    return power_of_2(tokens, least=16) if tokens <= whole else whole // 2


def _tile_sizes(qkv: Tensor) -> dict[str, Any]:
    _, tokens, _, _, width = qkv.shape
    # The interpreter multiplies bfloat16 wrongly, so there the factors are widened.
    wide = qkv.dtype == torch.float32 or INTERPRETED
    return {
        "WORDS": triton.cdiv(tokens, 64),
        "WIDTH": width,
        "BLOCK": block_of(tokens, half=qkv.dtype != torch.float32),
        "BLOCK_D": power_of_2(width, least=16),
        "WIDE": wide,
    }


def segment_begins(prefix: int, segment_lengths: Sequence[int]) -> list[int]:
    """Four words of 64 bits, as signed numbers: bit t % 64 of word t // 64 tells that token t begins a segment."""
    bits, begin = 0, prefix
    for length in segment_lengths:
        bits |= 1 << begin
        begin += length
    words = (bits >> shift & (1 << 64) - 1 for shift in range(0, 256, 64))
    return [word - (1 << 64) if word >> 63 else word for word in words]


@triton.jit(do_not_specialize=ANY)
def forward_kernel(
    qkv,  # (N, S, 3, H, d), read
    begins_0: tl.int64,  # which tokens begin a segment, a bit each: of tokens 0 to 63
    begins_1: tl.int64,  # 64 to 127
    begins_2: tl.int64,  # 128 to 191
    begins_3: tl.int64,  # 192 to 255
    out,  # (N, S, H, d), written
    lse,  # (N, H, S) float32: log2 of the sum of each query's exponentials, written
    prefix,  # tokens that all others see
    tokens,  # S
    heads,  # H
    softmax_scale,  # float32: d^−½
    WORDS: tl.constexpr,  # words of begins that hold tokens of the tree
    WIDTH: tl.constexpr,  # d
    BLOCK: tl.constexpr,  # tokens that a program owns, or visits at a time
    BLOCK_D: tl.constexpr,  # d rounded up to a power of two
    MANY: tl.constexpr,  # whether a tree has several blocks
    WIDE: tl.constexpr,  # whether products are of float32 numbers
):
    """A program owns a block of queries of one individual and head, and visits the blocks of keys that they see."""
    begins = (begins_0, begins_1, begins_2, begins_3)
    stride, out_stride = 3 * heads * WIDTH, heads * WIDTH
    q_at = qkv + _head_offset(tokens, heads, stride, WIDTH)
    k_at, v_at = q_at + out_stride, q_at + 2 * out_stride
    # Of a whole tree the compiler knows that it is 0, and leaves the loop out, across which q's split would lie.
    first_query = tl.program_id(1) * BLOCK if MANY else tl.program_id(1) * 0
    query = first_query + tl.arange(0, BLOCK)
    segment_start = _segment_start(query, begins, tokens, WORDS)
    q = _load(q_at, query, stride, tokens, WIDTH, BLOCK_D, WIDE)

    row_max = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    result = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for first_key in range(0, first_query + BLOCK, BLOCK):
        if _any_visible(first_query, first_key + BLOCK - 1, first_key, begins, tokens, prefix, WORDS):
            key = first_key + tl.arange(0, BLOCK)
            k = _load(k_at, key, stride, tokens, WIDTH, BLOCK_D, WIDE)
            logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * (softmax_scale * LOG2E)
            # Tokens beyond the last see the first, so that no row is without a key; they are not stored.
            logits = tl.where(_visible(query, key, segment_start, prefix, tokens), logits, -float("inf"))
            new_row_max = tl.maximum(row_max, tl.max(logits, axis=1))
            # A block may hold no key of a row that has seen none yet only after the prefix's first, which all see.
            rescale = tl.exp2(row_max - new_row_max)
            weights = tl.exp2(logits - new_row_max[:, None])
            total = total * rescale + tl.sum(weights, axis=1)
            v = _load(v_at, key, stride, tokens, WIDTH, BLOCK_D, WIDE)
            result = result * rescale[:, None] + _dot(weights, v)
            row_max = new_row_max
    out_at = out + _head_offset(tokens, heads, out_stride, WIDTH)
    _store(out_at, query, out_stride, tokens, result / total[:, None], WIDTH, BLOCK_D)
    tl.store(lse + tl.program_id(0) * tokens + query, row_max + tl.log2(total), query < tokens)


@triton.jit
def _head_offset(tokens, heads, stride, WIDTH: tl.constexpr):
    """Where the program's individual and head begin in a tensor whose tokens are `stride` apart."""
    person, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    return tl.cast(person, tl.int64) * tokens * stride + head * WIDTH


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
def _any_visible(first_query, last_key, first_key, begins, tokens, prefix, WORDS: tl.constexpr):
    """Whether a block of keys up to the diagonal holds any that the block of queries may see."""
    segment_start = _segment_start(first_query, begins, tokens, WORDS)
    return (first_key < prefix) | (last_key >= segment_start) | (first_key == first_query)


@triton.jit
def _segment_start(token, begins, tokens, WORDS: tl.constexpr):
    """Where a token's segment begins: the highest begin up to it. 0 for the prefix and beyond the last token."""
    start = token * 0
    for word in tl.static_range(WORDS):
        # The word shifted so that the token's own bit is the highest, and later ones are gone; whole for later tokens.
        own = tl.minimum(token - 64 * word, 63)
        up_to_own = begins[word].to(tl.int64).to(tl.uint64, bitcast=True) << (63 - tl.maximum(own, 0)).to(tl.uint64)
        # float32's exponent is the highest bit's number, if the bit below is 0: else rounding might carry.
        bits = (up_to_own ^ (up_to_own & (up_to_own >> 1))).to(tl.float32).to(tl.int32, bitcast=True)
        highest = (bits >> 23) - 127
        begin = 64 * word + own - 63 + highest
        start = tl.maximum(start, tl.where((own >= 0) & (up_to_own != 0), begin, 0))
    return tl.where(token < tokens, start, 0)


@triton.jit
def _visible(query, key, segment_start, prefix, tokens):
    """The mask, queries down and keys across."""
    past = (key[None, :] <= query[:, None]) & (key[None, :] < tokens)
    return past & ((key[None, :] < prefix) | (key[None, :] >= segment_start[:, None]))


@triton.jit
def _dot(x, y):
    """x y for float32 x: where y is a half type, x goes in as two of that type, so that its bits are not lost."""
    if y.dtype == tl.float32:
        return tl.dot(x, y, input_precision="tf32x3")
    else:  # noqa: RET505
        high = x.to(y.dtype)
        return tl.dot((x - high.to(tl.float32)).to(y.dtype), y, acc=tl.dot(high, y))


@triton.jit(do_not_specialize=ANY)
def backward_kernel(
    grad,  # (N, S, H, d), read
    qkv,  # (N, S, 3, H, d), read
    begins_0: tl.int64,  # which tokens begin a segment, a bit each: of tokens 0 to 63
    begins_1: tl.int64,  # 64 to 127
    begins_2: tl.int64,  # 128 to 191
    begins_3: tl.int64,  # 192 to 255
    lse,  # (N, H, S) float32: log2 of the sum of each query's exponentials, read
    deltas,  # (N, H, S) float32, not used: both ways take the same arguments
    grad_qkv,  # (N, S, 3, H, d): all of it is written
    prefix,  # tokens that all others see
    tokens,  # S
    heads,  # H
    softmax_scale,  # float32: d^−½
    WORDS: tl.constexpr,  # words of begins that hold tokens of the tree
    WIDTH: tl.constexpr,  # d
    BLOCK: tl.constexpr,  # tokens that a program owns: all
    BLOCK_D: tl.constexpr,  # d rounded up to a power of two
    WIDE: tl.constexpr,  # whether products are of float32 numbers
):
    """A program owns one individual and head, the whole tree in one block."""
    begins = (begins_0, begins_1, begins_2, begins_3)
    stride, out_stride = 3 * heads * WIDTH, heads * WIDTH
    at = _head_offset(tokens, heads, stride, WIDTH)
    out_at = _head_offset(tokens, heads, out_stride, WIDTH)
    token = tl.arange(0, BLOCK)
    segment_start = _segment_start(token, begins, tokens, WORDS)
    token_lse = tl.load(lse + tl.program_id(0) * tokens + token, token < tokens, other=0.0)
    q = _load(qkv + at, token, stride, tokens, WIDTH, BLOCK_D, WIDE)
    k = _load(qkv + at + out_stride, token, stride, tokens, WIDTH, BLOCK_D, WIDE)
    weights = _weights(q, k, token_lse, token, token, segment_start, prefix, tokens, softmax_scale)
    grad_out = _load(grad + out_at, token, out_stride, tokens, WIDTH, BLOCK_D, WIDE)
    _store(grad_qkv + at + 2 * out_stride, token, stride, tokens, _dot(tl.trans(weights), grad_out), WIDTH, BLOCK_D)
    v = _load(qkv + at + 2 * out_stride, token, stride, tokens, WIDTH, BLOCK_D, WIDE)
    grad_weights = tl.dot(grad_out, tl.trans(v), input_precision="tf32x3")
    delta = tl.sum(weights * grad_weights, axis=1)
    grad_logits = weights * (grad_weights - delta[:, None]) * softmax_scale
    _store(grad_qkv + at, token, stride, tokens, _dot(grad_logits, k), WIDTH, BLOCK_D)
    if BLOCK > 32:  # read again, for Triton 3.6 spills up to 152 bytes a thread for sm_80 and sm_120 if it is kept
        q = _load(qkv + at, token, stride, tokens, WIDTH, BLOCK_D, WIDE)
    _store(grad_qkv + at + out_stride, token, stride, tokens, _dot(tl.trans(grad_logits), q), WIDTH, BLOCK_D)


@triton.jit
def _weights(q, k, lse, query, key, segment_start, prefix, tokens, softmax_scale):
    """The attention weights, recomputed; queries down and keys across."""
    logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * (softmax_scale * LOG2E)
    visible = _visible(query, key, segment_start, prefix, tokens)
    # At most 1: rounded otherwise than in the forward, a huge logit may exceed its log-sum-exp by any number.
    exponents = tl.minimum(logits - lse[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(visible, tl.exp2(exponents), 0.0)


@triton.jit(do_not_specialize=ANY)
def queries_kernel(
    grad,  # (N, S, H, d), read
    qkv,  # (N, S, 3, H, d), read
    begins_0: tl.int64,  # which tokens begin a segment, a bit each: of tokens 0 to 63
    begins_1: tl.int64,  # 64 to 127
    begins_2: tl.int64,  # 128 to 191
    begins_3: tl.int64,  # 192 to 255
    lse,  # (N, H, S) float32: log2 of the sum of each query's exponentials, read
    deltas,  # (N, H, S) float32: δ of each query, written
    grad_qkv,  # (N, S, 3, H, d): the queries' part is written
    prefix,  # tokens that all others see
    tokens,  # S
    heads,  # H
    softmax_scale,  # float32: d^−½
    WORDS: tl.constexpr,  # words of begins that hold tokens of the tree
    WIDTH: tl.constexpr,  # d
    BLOCK: tl.constexpr,  # tokens that a program owns, or visits at a time
    BLOCK_D: tl.constexpr,  # d rounded up to a power of two
    WIDE: tl.constexpr,  # whether products are of float32 numbers
):
    """A program owns a block of queries: δ = Σ over keys of weight · its gradient, then dq.

    δ from the rounded output would be less exact.
    """
    begins = (begins_0, begins_1, begins_2, begins_3)
    stride, out_stride = 3 * heads * WIDTH, heads * WIDTH
    at = _head_offset(tokens, heads, stride, WIDTH)
    out_at = _head_offset(tokens, heads, out_stride, WIDTH)
    k_at, v_at = qkv + at + out_stride, qkv + at + 2 * out_stride
    first = tl.program_id(1) * BLOCK
    query = first + tl.arange(0, BLOCK)
    segment_start = _segment_start(query, begins, tokens, WORDS)
    query_lse = tl.load(lse + tl.program_id(0) * tokens + query, query < tokens, other=0.0)
    q = _load(qkv + at, query, stride, tokens, WIDTH, BLOCK_D, WIDE)
    grad_out = _load(grad + out_at, query, out_stride, tokens, WIDTH, BLOCK_D, WIDE)

    delta = tl.zeros([BLOCK], tl.float32)
    for first_key in range(0, first + BLOCK, BLOCK):
        if _any_visible(first, first_key + BLOCK - 1, first_key, begins, tokens, prefix, WORDS):
            key = first_key + tl.arange(0, BLOCK)
            k = _load(k_at, key, stride, tokens, WIDTH, BLOCK_D, WIDE)
            weights = _weights(q, k, query_lse, query, key, segment_start, prefix, tokens, softmax_scale)
            v = _load(v_at, key, stride, tokens, WIDTH, BLOCK_D, WIDE)
            delta += tl.sum(weights * tl.dot(grad_out, tl.trans(v), input_precision="tf32x3"), axis=1)
    tl.store(deltas + tl.program_id(0) * tokens + query, delta, query < tokens)

    grad_q = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for first_key in range(0, first + BLOCK, BLOCK):
        if _any_visible(first, first_key + BLOCK - 1, first_key, begins, tokens, prefix, WORDS):
            key = first_key + tl.arange(0, BLOCK)
            k = _load(k_at, key, stride, tokens, WIDTH, BLOCK_D, WIDE)
            weights = _weights(q, k, query_lse, query, key, segment_start, prefix, tokens, softmax_scale)
            v = _load(v_at, key, stride, tokens, WIDTH, BLOCK_D, WIDE)
            grad_weights = tl.dot(grad_out, tl.trans(v), input_precision="tf32x3")
            grad_q += _dot(weights * (grad_weights - delta[:, None]) * softmax_scale, k)
    _store(grad_qkv + at, query, stride, tokens, grad_q, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=ANY)
def keys_kernel(
    grad,  # (N, S, H, d), read
    qkv,  # (N, S, 3, H, d), read
    begins_0: tl.int64,  # which tokens begin a segment, a bit each: of tokens 0 to 63
    begins_1: tl.int64,  # 64 to 127
    begins_2: tl.int64,  # 128 to 191
    begins_3: tl.int64,  # 192 to 255
    lse,  # (N, H, S) float32: log2 of the sum of each query's exponentials, read
    deltas,  # (N, H, S) float32: δ of each query, read
    grad_qkv,  # (N, S, 3, H, d): the keys' and values' part is written
    prefix,  # tokens that all others see
    tokens,  # S
    heads,  # H
    softmax_scale,  # float32: d^−½
    WORDS: tl.constexpr,  # words of begins that hold tokens of the tree
    WIDTH: tl.constexpr,  # d
    BLOCK: tl.constexpr,  # tokens that a program owns, or visits at a time
    BLOCK_D: tl.constexpr,  # d rounded up to a power of two
    WIDE: tl.constexpr,  # whether products are of float32 numbers
):
    """A program owns a block of keys: dk and dv, summed over the queries that see it."""
    begins = (begins_0, begins_1, begins_2, begins_3)
    first = tl.program_id(1) * BLOCK
    key = first + tl.arange(0, BLOCK)
    stride, out_stride = 3 * heads * WIDTH, heads * WIDTH
    at = _head_offset(tokens, heads, stride, WIDTH)
    out_at = _head_offset(tokens, heads, out_stride, WIDTH)
    k = _load(qkv + at + out_stride, key, stride, tokens, WIDTH, BLOCK_D, WIDE)
    v = _load(qkv + at + 2 * out_stride, key, stride, tokens, WIDTH, BLOCK_D, WIDE)
    grad_k = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for first_query in range(first, tokens, BLOCK):
        if _any_visible(first_query, first + BLOCK - 1, first, begins, tokens, prefix, WORDS):
            query = first_query + tl.arange(0, BLOCK)
            segment_start = _segment_start(query, begins, tokens, WORDS)
            query_lse = tl.load(lse + tl.program_id(0) * tokens + query, query < tokens, other=0.0)
            delta = tl.load(deltas + tl.program_id(0) * tokens + query, query < tokens, other=0.0)
            q = _load(qkv + at, query, stride, tokens, WIDTH, BLOCK_D, WIDE)
            grad_out = _load(grad + out_at, query, out_stride, tokens, WIDTH, BLOCK_D, WIDE)
            weights = _weights(q, k, query_lse, query, key, segment_start, prefix, tokens, softmax_scale)
            grad_v += _dot(tl.trans(weights), grad_out)
            grad_weights = tl.dot(grad_out, tl.trans(v), input_precision="tf32x3")
            grad_k += _dot(tl.trans(weights * (grad_weights - delta[:, None]) * softmax_scale), q)
    _store(grad_qkv + at + out_stride, key, stride, tokens, grad_k, WIDTH, BLOCK_D)
    _store(grad_qkv + at + 2 * out_stride, key, stride, tokens, grad_v, WIDTH, BLOCK_D)
