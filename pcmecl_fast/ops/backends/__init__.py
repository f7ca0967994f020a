"""The backends, a file each: which kernels are whose operator, and what they support.

A file makes one `Backend`, which says why it cannot run here at all, and adds (operator, forward, backward, limits) for
each operator that it has. The backend "reference" needs none: every operator brings its own.
"""

from pcmecl_fast.ops.backends import cpu, cuda, triton

__all__ = ["cpu", "cuda", "triton"]
