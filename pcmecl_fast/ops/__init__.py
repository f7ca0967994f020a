"""PCMECL's operators: each takes `backend=` and follows the specification in `reference.py`."""

from pcmecl_fast.ops import cpu as _cpu  # noqa: F401  registers its kernels
from pcmecl_fast.ops import cuda as _cuda  # noqa: F401  likewise
from pcmecl_fast.ops import triton_backend
from pcmecl_fast.ops.backend import backends, use_backend
from pcmecl_fast.ops.correlation import correlation_loss
from pcmecl_fast.ops.direction import direction_logits, direction_loss
from pcmecl_fast.ops.frames import clip_frames
from pcmecl_fast.ops.tree_attention import PromptTree, tree_attention

__all__ = [
    "PromptTree",
    "backends",
    "clip_frames",
    "correlation_loss",
    "direction_logits",
    "direction_loss",
    "tree_attention",
    "use_backend",
]

triton_backend.register()
