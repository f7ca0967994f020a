"""Batches of float32 matrix products, of any strides: `correlation` makes S and its gradients with it."""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from pcmecl_fast.kernels.common import Config, add_shares, major_capability, power_of_2, programs_for, run_tuned

# Each individual's products with itself: a program has one.
SMALL_CONFIGS = [Config(warps=2, stages=2, blocks={"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64})]
SMALL = 16  # rows of the left matrix, at most
PRODUCT_CONFIGS = [
    # Each number is split once for 64 or 128 products: with less the instructions for that outlast tensor cores.
    Config(warps=4, stages=3, blocks={"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 16}),  # two programs a processor
    Config(warps=8, stages=3, blocks={"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}),
    Config(warps=8, stages=3, blocks={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}),  # twice as many programs
]
# Few tiles of a long product are shared out along K, too.
SHARES = 8  # programs of a tile, at most
START = 128  # as long as so much of K takes a program to begin and to store its tile
SHARED_NUMBER = 44  # as long as so much of K takes one number of a tile to be written by a share and added up


def multiply(
    left: Tensor,  # (outer, inner, M, K), any strides
    right: Tensor,  # (outer, inner, K, N), any strides
    out: Tensor,  # (outer, inner, M, N), any strides
    *,
    add: bool = False,
) -> None:
    """out = left · right, or out += left · right, float32 in 3xTF32. Its sums have a fixed order on a device."""
    outer, inner, m, k = left.shape
    n = right.shape[3]
    candidates = SMALL_CONFIGS if m <= SMALL else PRODUCT_CONFIGS
    if major_capability(left) >= 12:
        candidates = candidates[1:] + candidates[:1]  # the first spills there
    configs = [_cut(config, n, k) for config in candidates]
    reach = max(
        sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True)) for x in (left, right, out)
    )
    index = tl.int32 if reach + 2**20 < 2**31 else tl.int64  # a tile may reach beyond the last element
    processors = programs_for(left, 1 << 30, 1)

    def launch(config: Config) -> None:
        block_m, block_n, block_k = (config.blocks[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
        shares = 1
        if outer * inner == 1 and out.is_contiguous():
            shares = shares_of(k, block_k, tiles, SHARED_NUMBER * m * n / (block_m * block_n), processors)
        partial = out if shares == 1 else out.new_empty(shares, m, n)
        product_kernel[(tiles * outer * inner * shares,)](
            left,
            right,
            partial,
            m,
            n,
            k,
            inner,
            shares,
            share_of(k, block_k, shares),
            *left.stride(),
            *right.stride(),
            *(out.stride() if shares == 1 else (0, 0, n, 1)),
            0 if shares == 1 else m * n,
            ADD=add and shares == 1,
            INDEX=index,
            **config.options(),
        )
        if shares > 1:
            add_shares(partial, out, add=add)

    # Timed without adding, which would add several times over; the first chunk never adds.
    layout = (left.stride(3) == 1, right.stride(3) == 1)
    shape_class = (*(power_of_2(size) for size in (m, n, k)), layout)
    run_tuned("correlation_product", shape_class, configs[:1] if add else configs, left, launch)


def shares_of(k: int, block_k: int, tiles: int, sums: float, processors: int) -> int:
    """How many programs share a tile's walk along K: the fewest with the shortest time of the busiest processor.

    `sums` is how long a share of all tiles takes to be written and added up on one processor, as a length of K.
    """

    def time(shares: int) -> float:
        walk = triton.cdiv(tiles * shares, processors) * (share_of(k, block_k, shares) + START)
        return walk + (0.0 if shares == 1 else sums * shares / processors)

    return min(range(1, min(SHARES, triton.cdiv(k, block_k)) + 1), key=time)


def share_of(k: int, block_k: int, shares: int) -> int:
    """The part of K, in whole blocks, that each of so many programs walks along."""
    return triton.cdiv(triton.cdiv(k, block_k), shares) * block_k


def _cut(config: Config, n: int, k: int) -> Config:
    """The configuration with tiles no wider than the matrices."""
    most = {"BLOCK_N": power_of_2(n, least=16), "BLOCK_K": power_of_2(k, least=16)}
    return replace(config, blocks={name: min(size, most.get(name, size)) for name, size in config.blocks.items()})


@triton.jit
def product_kernel(
    left,  # (outer, inner, M, K), read
    right,  # (outer, inner, K, N), read
    out,  # (outer, inner, M, N), written, or added to
    M,  # rows of left and out
    N,  # columns of right and out
    K,  # columns of left, rows of right
    inner,  # products of a batch's inner dimension
    shares,  # programs that share a tile's walk along K
    share,  # columns of left that each walks, a multiple of BLOCK_K
    left_outer,  # stride of left's batch, in elements, as all strides
    left_inner,  # of its inner dimension
    left_m,  # of its rows
    left_k,  # of its columns
    right_outer,  # of right's batch
    right_inner,  # of its inner dimension
    right_k,  # of its rows
    right_n,  # of its columns
    out_outer,  # of out's batch
    out_inner,  # of its inner dimension
    out_m,  # of its rows
    out_n,  # of its columns
    out_share,  # of what a share adds up
    ADD: tl.constexpr,  # whether to add to out
    INDEX: tl.constexpr,  # type of a number that an element's place fits
    BLOCK_M: tl.constexpr,  # rows of a program's tile of out
    BLOCK_N: tl.constexpr,  # its columns
    BLOCK_K: tl.constexpr,  # steps of K that are multiplied at a time
):
    """A program owns a BLOCK_M × BLOCK_N tile of one product and walks along K, or along a share of it.

    Products are 3xTF32, which keep float32's bits: 2·M·N·K operations, three times over, bound it.
    """
    across = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * across
    part, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, own = part // shares, part % shares
    m = (tile // across * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
    n = (tile % across * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    first, second = (batch // inner).to(INDEX), (batch % inner).to(INDEX)
    left += first * left_outer + second * left_inner
    right += first * right_outer + second * right_inner
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(own * share, tl.minimum(own * share + share, K), BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(INDEX)
        x = tl.load(left + m[:, None] * left_m + k[None, :] * left_k, (m[:, None] < M) & (k[None, :] < K), other=0.0)
        y = tl.load(right + k[:, None] * right_k + n[None, :] * right_n, (k[:, None] < K) & (n[None, :] < N), other=0.0)
        total = tl.dot(x, y, acc=total, input_precision="tf32x3")
    out += first * out_outer + second * out_inner + own.to(INDEX) * out_share
    at = out + m[:, None] * out_m + n[None, :] * out_n
    inside = (m[:, None] < M) & (n[None, :] < N)
    if ADD:
        total += tl.load(at, inside, other=0.0)
    tl.store(at, total, inside)
