"""The operators as Triton kernels, in files named like the operator's in `pcmecl_fast/ops`.

A file has the operator's forward and backward on tensors; kernels that fill a file themselves are in `*_kernels.py`
beside it. Nothing here is imported before an operator first runs on the backend "triton".
"""
