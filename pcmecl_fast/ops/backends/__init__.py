"""The backends, one file each: which kernels implement which operator, and what they support.

A file creates one `Backend`, which explains why it cannot run here if so, and adds (operator, forward, backward,
limits) for each operator it implements. The backend "reference" needs no file: every operator brings its own.
"""

from pcmecl_fast.ops.backends import cpu, cuda, triton, xformers

__all__ = ["cpu", "cuda", "triton", "xformers"]
