"""Attention over one individual's prompts packed as a tree (`prompt_tree.py`): all prompts share one prefix.

out = softmax(q kᵀ / √d + mask) v        mask: a token sees the prefix and its own segment, up to itself
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pcmecl_fast.ops import checks, reference
from pcmecl_fast.ops.operator import Operator
from pcmecl_fast.ops.prompt_tree import PromptTree


def tree_attention(
    qkv: Tensor,  # (N, S, 3, H, d)
    layout: PromptTree,
    *,
    backend: str | None = None,
) -> Tensor:  # (N, S, H, d)
    """Multi-head attention of packed prompts: softmax(q kᵀ / √d + mask) v with the tree's mask.

    Logits are supported up to 1e12 in size, without overflow; in float32 a softmax hangs on rounding from 1e6 on.

    Args:
        qkv: queries, keys and values of N packed sequences, (N, S, 3, H, d) with S = layout.length; float16, bfloat16,
            float32 or float64. A linear layer's (N, S, 3·H·d) output viewed as such, without a copy.
        layout: which token belongs to which prompt.
        backend: see `use_backend`; None leaves the choice to it.

    Returns:
        (N, S, H, d), contiguous, in the input's dtype (half types accumulate in float32).

    Raises:
        TypeError: an argument's type or dtype.
        ValueError: a shape, a length that differs from the layout's, an unknown backend.
        RuntimeError: a named backend that cannot run.

    Source: ours; prefix sharing as in tree attention for speculative decoding.
    """
    return TREE_ATTENTION(qkv, layout, backend=backend)


def _check(qkv: Tensor, layout: PromptTree) -> tuple[Tensor, PromptTree]:
    if not isinstance(layout, PromptTree):
        raise TypeError(f"layout: got {type(layout).__name__}; takes a PromptTree")
    checks.check_float("qkv", qkv)
    checks.Sizes(needed="d").check("qkv", qkv, ("N", "S", 3, "H", "d"))
    if qkv.shape[1] != layout.length:
        raise ValueError(
            f"qkv: got shape {tuple(qkv.shape)}; takes (N, S, 3, H, d) with S = {layout.length}, as in layout"
        )
    return qkv, layout


def _outputs(qkv: Tensor, prefix: int, segment_lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of each token's logits in each head."""
    people, tokens, _, heads, width = qkv.shape
    wide = reference.computing_dtype(qkv)
    return qkv.new_empty(people, tokens, heads, width), qkv.new_empty(people, heads, tokens, dtype=wide)


TREE_ATTENTION = Operator(
    reference.tree_attention,
    "Tensor qkv, PromptTree layout",
    gradients=("qkv",),
    outputs=_outputs,
    saved=("log_sum_exp",),
    keeps_result=True,
    check=_check,
    sizes={
        "tokens": lambda qkv, layout: layout.length,
        "segments": lambda qkv, layout: len(layout.segment_lengths),
        "width of a head": lambda qkv, layout: qkv.shape[4],
    },
)
