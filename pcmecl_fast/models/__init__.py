"""Generators that edit an expression, and the critic they train against."""

from pcmecl_fast.models.discriminator import PatchDiscriminator
from pcmecl_fast.models.generator import ExpressionGenerator, GeneratorConfig, load_generator, save_generator

__all__ = ["ExpressionGenerator", "GeneratorConfig", "PatchDiscriminator", "load_generator", "save_generator"]
