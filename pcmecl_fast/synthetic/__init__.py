"""Drawn people: talking faces that are functions of their parameters, and the small networks trained on them."""

from pcmecl_fast.synthetic.painter import SyntheticFaces

__all__ = ["SyntheticFaces"]
