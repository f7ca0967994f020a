"""Generators that edit an expression, and the critic they train against."""

from pcmecl_fast.models.base import Edit, Generator, load_generator, make_generator, save_generator
from pcmecl_fast.models.discriminator import PatchDiscriminator
from pcmecl_fast.models.warp_fields import WarpFields, WarpFieldsConfig
from pcmecl_fast.models.warp_paint import WarpPaint, WarpPaintConfig

__all__ = [
    "Edit",
    "Generator",
    "PatchDiscriminator",
    "WarpFields",
    "WarpFieldsConfig",
    "WarpPaint",
    "WarpPaintConfig",
    "load_generator",
    "make_generator",
    "save_generator",
]
