"""A batch of float32 matrix products, of any strides: `correlation` makes S and its gradients with it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pcmecl_fast.kernels.common import Config, power_of_2, run_tuned

PRODUCT_CONFIGS = [
    Config(warps=8, stages=3, blocks={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}),  # the one that never spills
    Config(warps=4, stages=3, blocks={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}),
    Config(warps=8, stages=3, blocks={"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 16}),
]


def multiply(
    left: Tensor,  # (batch, M, K), any strides
    right: Tensor,  # (batch, K, N), any strides
    out: Tensor,  # (batch, M, N)
    *,
    add: bool = False,
) -> None:
    """out = left · right, or out += left · right, float32 in 3xTF32."""
    batch, m, k = left.shape
    n = right.shape[2]

    def launch(config: Config) -> None:
        tiles = triton.cdiv(m, config.blocks["BLOCK_M"]) * triton.cdiv(n, config.blocks["BLOCK_N"])
        product_kernel[(tiles, batch)](
            left, right, out, m, n, k, *left.stride(), *right.stride(), *out.stride()[:2], ADD=add, **config.options()
        )

    # Timed without adding, which would add several times over; the first chunk never adds.
    layout = (left.stride(2) == 1, right.stride(2) == 1)
    shape_class = (*(power_of_2(size) for size in (m, n, k)), layout)
    run_tuned("correlation_product", shape_class, PRODUCT_CONFIGS[:1] if add else PRODUCT_CONFIGS, left, launch)


@triton.jit
def product_kernel(
    left,  # (batch, M, K), read
    right,  # (batch, K, N), read
    out,  # (batch, M, N), written, or added to
    M,  # rows of left and out
    N,  # columns of right and out
    K,  # columns of left, rows of right
    left_batch,  # stride of left's batch, in elements, as all strides
    left_m,  # of its rows
    left_k,  # of its columns
    right_batch,  # of right's batch
    right_k,  # of its rows
    right_n,  # of its columns
    out_batch,  # of out's batch
    out_m,  # of its rows; its columns lie side by side
    ADD: tl.constexpr,  # whether to add to out
    BLOCK_M: tl.constexpr,  # rows of a program's tile of out
    BLOCK_N: tl.constexpr,  # its columns
    BLOCK_K: tl.constexpr,  # steps of K that are multiplied at a time
):
    """A program owns a BLOCK_M × BLOCK_N tile of one product and walks along K.

    Products are 3xTF32, which keep float32's bits: 2·M·N·K operations, three times over, bound it.
    """
    across = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tl.program_id(1)
    left += batch * left_batch
    right += batch * right_batch
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(left + m[:, None] * left_m + k[None, :] * left_k, (m[:, None] < M) & (k[None, :] < K), other=0.0)
        y = tl.load(right + k[:, None] * right_k + n[None, :] * right_n, (k[:, None] < K) & (n[None, :] < N), other=0.0)
        total = tl.dot(x, y, acc=total, input_precision="tf32x3")
    at = out + batch * out_batch + m[:, None] * out_m + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    if ADD:
        total += tl.load(at, inside, other=0.0)
    tl.store(at, total, inside)
