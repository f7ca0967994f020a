"""What a careful user of PyTorch and open_clip would write: the baselines that the leading ratios are against.

Everything here is exact: prompts are cut after the longest one's EOS, which no token before it sees; what is frozen has
no gradient; what never changes is computed once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pcmecl_fast import PersonalizedPrompts
from pcmecl_fast.towers.text import eos_positions


def trimmed_prompts(prompts: PersonalizedPrompts) -> Callable[[Tensor], Tensor]:
    """Unit text features, (N, E, D), of conditions, (N, D): the batch of prompts, cut after the longest EOS.

    For open_clip's `CLIP`, whose text tower is causal and pools at EOS; the norm and the projection of the pooled
    tokens alone.
    """
    model = prompts.clip.model
    eos = eos_positions(model, prompts.tokens)
    length, context_length = int(eos.max()) + 1, prompts.context.shape[-2]
    with torch.no_grad():
        words = model.token_embedding(prompts.tokens[:, :length])  # (E, L, W)
        start, end = words[:, :1], words[:, 1 + context_length :]
    classes = len(words)

    def features(condition: Tensor) -> Tensor:
        people = len(condition)
        shift = prompts.shift(condition)[:, None]  # (N, 1, W)
        context = prompts.context + (shift if prompts.context.dim() == 2 else shift[:, None])
        if context.dim() == 3:
            context = context[:, None].expand(-1, classes, -1, -1)
        parts = (start.expand(people, -1, -1, -1), context.to(words.dtype), end.expand(people, -1, -1, -1))
        x = torch.cat(parts, dim=2).flatten(0, 1) + model.positional_embedding[:length].to(words.dtype)
        x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
        pooled = x[torch.arange(len(x), device=x.device), eos.repeat(people)]
        projected = model.ln_final(pooled) @ model.text_projection
        return F.normalize(projected.to(prompts.context.dtype), dim=-1).unflatten(0, (people, classes))

    return features
