"""tree_attention on csrc/cuda: allocation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pcmecl_fast.ops.backends.cuda.driver import place
from pcmecl_fast.ops.backends.native import DTYPE, Driver, address


class TreeAttention(Driver):
    def tree_attention(
        self,
        qkv: Tensor,  # (N, S, 3, H, d)
        prefix: int,
        segment_lengths: Sequence[int],
    ) -> tuple[Tensor, Tensor]:  # (N, S, H, d), (N, H, S)
        people, tokens, _, heads, width = qkv.shape
        dtype, device = qkv.dtype, qkv.device
        out = torch.empty((people, tokens, heads, width), dtype=dtype, device=device)
        lse = torch.empty((people, heads, tokens), dtype=torch.float32, device=device)
        pointers = qkv.data_ptr(), out.data_ptr(), lse.data_ptr()
        self._module.tree_attention(*place(qkv), DTYPE[dtype], people, heads, width, prefix, segment_lengths, *pointers)
        return out, lse

    def tree_attention_backward(
        self,
        grad: Tensor,  # (N, S, H, d)
        qkv: Tensor,  # (N, S, 3, H, d)
        prefix: int,
        segment_lengths: Sequence[int],
        out: Tensor,  # (N, S, H, d)
        lse: Tensor,  # (N, H, S)
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        people, _, _, heads, width = qkv.shape
        of_qkv = torch.empty_like(qkv)
        means = None if qkv.dtype == torch.float32 else torch.empty_like(lse)
        pointers = qkv.data_ptr(), out.data_ptr(), lse.data_ptr(), grad.data_ptr(), of_qkv.data_ptr(), address(means)
        self._module.tree_attention_backward(
            *place(qkv), DTYPE[qkv.dtype], people, heads, width, prefix, segment_lengths, *pointers
        )
        return [of_qkv]
