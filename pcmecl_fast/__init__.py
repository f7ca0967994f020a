"""Personalized cross-modal emotional correlation learning (PCMECL) for talking faces, exact and fast.

The names below are imported when they are first used: the command line answers `--help` without PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pcmecl_fast import ops
    from pcmecl_fast.clip import Clip, load_clip
    from pcmecl_fast.criterion import PCMECLCriterion
    from pcmecl_fast.ops import use_backend
    from pcmecl_fast.prompts import PersonalizedPrompts, PromptBank

__all__ = ["Clip", "PCMECLCriterion", "PersonalizedPrompts", "PromptBank", "load_clip", "ops", "use_backend"]

_MODULES = {
    "Clip": "clip",
    "PCMECLCriterion": "criterion",
    "PersonalizedPrompts": "prompts",
    "PromptBank": "prompts",
    "load_clip": "clip",
    "use_backend": "ops",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("pcmecl_fast.ops")  # which becomes an attribute by itself
    if name not in _MODULES:
        raise AttributeError(f"module 'pcmecl_fast' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"pcmecl_fast.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
