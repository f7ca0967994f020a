"""Personalized prompts, and the bank that stores their text features."""

from pcmecl_fast.prompts.bank import PromptBank, Tower, condition_of, load_prompts, save_prompts
from pcmecl_fast.prompts.learner import PersonalizedPrompts

__all__ = ["PersonalizedPrompts", "PromptBank", "Tower", "condition_of", "load_prompts", "save_prompts"]
