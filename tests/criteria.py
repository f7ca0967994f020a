"""What the criterion's tests compute with: a bank of random features, and frames with labels."""

import torch
import torch.nn.functional as F

from pcmecl_fast import PromptBank
from pcmecl_fast.prompts.bank import Tower

N, E = 4, 5


def features(clip, dtype=torch.float32):
    drawn = torch.randn(N, E, clip.embed_dim, generator=torch.Generator().manual_seed(0))
    return F.normalize(drawn, dim=-1).to(dtype)


def bank_for(clip, **kwargs):
    names = [f"person {n}" for n in range(N)], [f"emotion {e}" for e in range(E)]
    return PromptBank(features(clip, **kwargs), *names, tower=Tower.of(clip))


def sample(*shape, seed=0):
    """Source and edited frames of this shape, and (individual, source emotion, target emotion), all different."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.rand(shape, generator=generator) * 2 - 1
    edited = (source + 0.3 * torch.randn(shape, generator=generator)).clamp(-1, 1)
    count = shape[0]
    individual = torch.randint(N, (count,), generator=generator)
    a = torch.randint(E, (count,), generator=generator)
    b = (a + torch.randint(1, E, (count,), generator=generator)) % E
    return source, edited.requires_grad_(), individual, a, b
