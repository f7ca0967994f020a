"""Packs the prompts of one set of descriptions as trees: their common beginning once, then one segment each.

    shared context       [SOS, V_1 … V_M, the descriptions' common beginning,  rest_1, EOS,  rest_2, EOS,  …]
    per-emotion context  [SOS,  V(1)_1 … V(1)_M, description_1, EOS,  V(2)_1 … V(2)_M, description_2, EOS,  …]

A thousand classes are split into several trees with one common layout, so that they form one batch: the segments,
sorted by length, are dealt to the trees in turn, so the k-th segments of all trees are nearly equal in length; shorter
ones are padded with tokens after EOS, which a causal tower does not see.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pcmecl_fast.ops import PromptTree

MAX_TOKENS = 192


class PackedPrompts(nn.Module):
    """The position of every token of E prompts in T trees of one layout, with K segments and S tokens each.

    Built once per set of descriptions. A module only so that `.to()` moves its index tensors; it has no parameters and
    nothing in `state_dict()`.

    Args:
        tokens: ids of the prompts as in the padded path, with placeholders where the context goes.
        eos: the position of each prompt's EOS, where the tower pools.
        start: the position of the first context token.
        n_ctx: M, the number of context tokens.
        shared: whether all prompts have the same context.
        max_tokens: the length that trees should not exceed. Longer trees repeat the prefix less often, but compute
            more of a mostly masked attention matrix. A single longer prompt makes a longer tree.

    Attributes:
        layout: the trees' `PromptTree`; each of its segments is as long as the longest at that place in any tree.
        trees, segments, length: T, K and S.
        tokens: (T, S) ids.
        positions: (S,) the position of each token in its own prompt.
        context_at: (T·M,) if shared, else (T·K·M,): positions of the context tokens in the concatenated trees, (T·S,).
        classes: (T·K,) the class of each segment; if E does not fill the trees, a class is repeated.
        eos: (T·K,) the position of each segment's EOS in the concatenated trees.
        eos_mask: (T, K, S) True for the tokens that each segment's EOS sees.
        place: (E,) the position of each class among the T·K segments.

    Raises:
        ValueError: prompts that do not begin with a common token: there is no tree to build.

    Source: ours; algorithm as in tree attention for speculative decoding.
    """

    tokens: Tensor
    positions: Tensor
    context_at: Tensor
    classes: Tensor
    eos: Tensor
    eos_mask: Tensor
    place: Tensor

    def __init__(
        self,
        tokens: Tensor,  # (E, L)
        eos: Tensor,  # (E,)
        *,
        start: int,
        n_ctx: int,
        shared: bool,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        super().__init__()
        prefix = _common_prefix(tokens, eos) if shared else start
        if prefix < 1:
            raise ValueError("tokens: the prompts do not begin with a common token")
        lengths = (eos + 1 - prefix).tolist()
        dealt = _deal(lengths, prefix, max_tokens)  # T lists of K classes

        slots = [max(lengths[c] for c in slot) for slot in zip(*dealt, strict=True)]
        self.layout = PromptTree(prefix, tuple(slots))
        self.trees, self.segments, self.length = len(dealt), len(slots), self.layout.length
        begins = self.layout.eos + 1 - torch.tensor(slots)  # (K,) where segments begin in a tree
        classes = torch.tensor(dealt)  # (T, K)
        eos_in_tree = begins + torch.tensor(lengths)[classes] - 1  # (T, K)
        tree_begins = self.length * torch.arange(self.trees)[:, None]  # (T, 1)
        context_begins = begins if not shared else torch.tensor([start])
        context_at = (tree_begins + context_begins)[..., None] + torch.arange(n_ctx)

        packed = [
            torch.cat([tokens[0, :prefix], *(tokens[c, prefix : prefix + n] for c, n in zip(tree, slots, strict=True))])
            for tree in dealt
        ]
        place = {c: segment for segment, c in enumerate(classes.flatten().tolist())}

        self._keep("tokens", torch.stack(packed))
        self._keep("positions", self.layout.positions)
        self._keep("context_at", context_at.flatten())
        self._keep("classes", classes.flatten())
        self._keep("eos", (tree_begins + eos_in_tree).flatten())
        self._keep("eos_mask", self.layout.mask()[eos_in_tree])
        self._keep("place", torch.tensor([place[c] for c in range(len(lengths))]))

    def extra_repr(self) -> str:
        return f"trees={self.trees}, segments={self.segments}, length={self.length}"

    def _keep(self, name: str, index: Tensor) -> None:
        self.register_buffer(name, index, persistent=False)


def _common_prefix(tokens: Tensor, eos: Tensor) -> int:
    """How many leading tokens all prompts share, leaving each at least its EOS."""
    shortest = int(eos.min())
    same = (tokens[:, :shortest] == tokens[:1, :shortest]).all(0)
    return int(same.long().cumprod(0).sum())


def _deal(lengths: list[int], prefix: int, max_tokens: int) -> list[list[int]]:
    """Deal classes to as few trees as stay within max_tokens, each with the same number of segments."""
    count = len(lengths)
    if prefix + sum(lengths) <= max_tokens:
        return [list(range(count))]
    order = sorted(range(count), key=lambda c: -lengths[c])
    # Slot k holds the classes order[k·T : (k+1)·T], one in each tree, and is as long as the first of them.
    trees = 1
    while trees < count and prefix + sum(lengths[c] for c in order[::trees]) > max_tokens:
        trees += 1
    slots = -(-count // trees)
    order += order[-1:] * (slots * trees - count)
    return [order[tree::trees] for tree in range(trees)]
