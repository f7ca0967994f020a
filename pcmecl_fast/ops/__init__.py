"""PCMECL's operators: each takes `backend=` and follows the specification in `reference.py`."""

from pcmecl_fast.ops import backends as _backends  # noqa: F401  they add their kernels to the operators
from pcmecl_fast.ops.correlation import correlation_loss
from pcmecl_fast.ops.direction import direction_logits, direction_loss
from pcmecl_fast.ops.frames import clip_frames
from pcmecl_fast.ops.operator import backend_status, explain, use_backend
from pcmecl_fast.ops.prompt_tree import PromptTree
from pcmecl_fast.ops.tree_attention import tree_attention

__all__ = [
    "PromptTree",
    "backend_status",
    "clip_frames",
    "correlation_loss",
    "direction_logits",
    "direction_loss",
    "explain",
    "tree_attention",
    "use_backend",
]
