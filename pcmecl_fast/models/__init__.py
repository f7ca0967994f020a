"""Generators that edit an expression, and the critics they train against."""

from pcmecl_fast.models.average import Average
from pcmecl_fast.models.base import Edit, Generator, load_generator, make_generator, save_generator
from pcmecl_fast.models.discriminator import Critics, EmotionCritic, PatchDiscriminator
from pcmecl_fast.models.warp_fields import WarpFields, WarpFieldsConfig
from pcmecl_fast.models.warp_paint import WarpPaint, WarpPaintConfig

__all__ = [
    "Average",
    "Critics",
    "Edit",
    "EmotionCritic",
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
