"""What the numbers among the commands' options may be."""

from __future__ import annotations

import math
from typing import NamedTuple


class Range(NamedTuple):
    """What a number may be; `open` leaves the two ends out."""

    least: float
    most: float = math.inf
    open: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return self.least < value < self.most if self.open else self.least <= value <= self.most

    def __str__(self) -> str:
        if self.most == math.inf:
            return f"{self.least} or more"
        return f"{'more than ' * self.open}{self.least} to {'less than ' * self.open}{self.most}"


_AT_LEAST_ONE = """
size individuals clips frames_per_clip n_ctx batch batch_individuals steps prompt_steps quick_steps seeds
checkpoint_every every accumulate
"""
_NOT_NEGATIVE = """
missing workers around_seeds prompt_lr lr critic_lr emotion_lr emotion_fakes lambda_diff contrast min_change strength
w_pcmecl w_adversarial w_emotion w_emotion_mouth w_cycle w_reconstruction w_recognition w_person w_speech w_identity
w_mouth w_direct batch_early views emotion_mouth_early
"""
LIMITS: dict[str, Range] = {
    **dict.fromkeys(_AT_LEAST_ONE.split(), Range(1)),
    **dict.fromkeys(_NOT_NEGATIVE.split(), Range(0)),
    "holdout": Range(0, 1, open=True),
    "margin": Range(0, 0.9),
    "fps": Range(1, 240),
    "crf": Range(0, 51),
    **dict.fromkeys(("mouth_box", "keep_from", "smooth", "jitter"), Range(0, 1)),
    "average": Range(0, 0.99999),
    "seed": Range(0, 2**32 - 1),
}
"""Of every command's options; of a list, each element's."""
