"""The operators as Triton kernels, one file each, named like the operator's file in `pcmecl_fast/ops`.

Nothing here is imported before an operator first runs on the backend "triton": `pcmecl_fast/ops/backends/triton.py`.
"""
