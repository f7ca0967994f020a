"""Personalized cross-modal emotional correlation learning (PCMECL) for talking faces, exact and fast."""

from pcmecl_fast import ops
from pcmecl_fast.clip import Clip, load_clip
from pcmecl_fast.criterion import PCMECLCriterion
from pcmecl_fast.ops import use_backend
from pcmecl_fast.prompts import PersonalizedPrompts, PromptBank

__all__ = ["Clip", "PCMECLCriterion", "PersonalizedPrompts", "PromptBank", "load_clip", "ops", "use_backend"]
