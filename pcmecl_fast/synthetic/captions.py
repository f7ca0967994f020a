"""What can be said about a drawn face: its emotion, its action units, who it shows."""

from __future__ import annotations

import random
from functools import cache

from open_clip.tokenizer import SimpleTokenizer

from pcmecl_fast.synthetic.faces import SyntheticFaces
from pcmecl_fast.synthetic.people import ACTION_UNITS, EYE_COLOURS, HAIR_COLOURS, SKIN_TONES

EMOTION_WORDS = {
    "neutral": ("neutral", "calm", "expressionless"),
    "angry": ("angry", "furious", "mad"),
    "disgusted": ("disgusted", "repulsed", "grossed out"),
    "fear": ("fear", "fearful", "afraid", "scared"),
    "happy": ("happy", "joyful", "cheerful"),
    "sad": ("sad", "unhappy", "sorrowful"),
    "surprised": ("surprised", "astonished", "amazed"),
}
"""Zero-shot accuracy is measured with the first word of each."""

TEMPLATES = (
    "{}", "{} face", "a {} face", "a photo of a {} face", "a {} person", "a photo of a {} person", "someone {}",
    "a person who looks {}", "the face of a {} speaker", "a person feeling {}", "they look {}", "a very {} face",
    "a slightly {} face", "a picture of a {} woman", "a picture of a {} man", "a {} expression", "speaking, {}",
)  # fmt: skip

UNSEEN_TEMPLATES = (
    "a portrait of somebody who seems {}",
    "this talking person appears {}",
    "an image showing a {} talker",
    "a close-up of a {} human face",
    "a frame of a video in which one looks {}",
)
"""Wordings never used in training: accuracy is measured with these."""

UNIT_PHRASES = {
    "inner_brow_raise": "raised inner brows", "outer_brow_raise": "raised outer brows", "brow_lower": "lowered brows",
    "upper_lid_raise": "wide eyes", "cheek_raise": "raised cheeks", "lid_tighten": "narrowed eyes",
    "nose_wrinkle": "wrinkled nose", "upper_lip_raise": "raised upper lip", "lip_corner_pull": "smile",
    "lip_corner_depress": "mouth corners down", "chin_raise": "raised chin", "lip_stretch": "stretched lips",
    "lip_tighten": "pressed lips", "jaw_drop": "dropped jaw",
}  # fmt: skip

LOOKS = (
    *HAIR_COLOURS, *SKIN_TONES, *EYE_COLOURS, "hair", "skin", "eyes", "long", "short", "open mouth", "rounded lips",
    "wide lips", "closed mouth",
)  # fmt: skip
"""The words that `looks_of` uses."""


def unit_phrases(faces: SyntheticFaces, index: int, words: random.Random, *, most: int) -> list[str]:
    """Up to `most` of the action units shown in one drawn frame, with their strength and side."""
    units = faces.parameters.action_units[index]
    shown = [a for a in range(len(ACTION_UNITS)) if float(units[a].mean()) > 0.25]
    chosen = words.sample(shown, k=min(len(shown), words.randint(0, most)))
    return [_unit_phrase(a, float(units[a, 0]), float(units[a, 1])) for a in chosen]


def looks_of(faces: SyntheticFaces, index: int) -> list[str]:
    """Who one drawn frame shows, and how open the mouth is."""
    who, identity = int(faces.individual_index[index]), faces.identities
    return [
        f"{identity.hair_name[who]} hair",
        f"{identity.skin_name[who]} skin",
        f"{identity.eye_name[who]} eyes",
        "long hair" if identity.hair_length[who] > 0.5 else "short hair",
        _mouth_phrase(*faces.parameters.speech[index].tolist()),
    ]


def _unit_phrase(unit: int, left: float, right: float) -> str:
    phrase = UNIT_PHRASES[ACTION_UNITS[unit]]
    strength = (left + right) / 2
    if strength > 1.1:
        phrase = f"strong {phrase}"
    elif strength < 0.55:
        phrase = f"slight {phrase}"
    if left > 1.35 * right:
        phrase += " on the left"
    elif right > 1.35 * left:
        phrase += " on the right"
    return phrase


def _mouth_phrase(openness: float, spread: float) -> str:
    if openness > 0.5:
        return "open mouth"
    if spread < -0.4:
        return "rounded lips"
    return "wide lips" if spread > 0.5 else "closed mouth"


@cache
def any_words() -> list[str]:
    """Every whole alphabetic word in the vocabulary except those that name an emotion."""
    named = {word for group in EMOTION_WORDS.values() for phrase in group for word in phrase.split()}
    whole = (token.removesuffix("</w>") for token in SimpleTokenizer().encoder if token.endswith("</w>"))
    return sorted(word for word in whole if word.isascii() and word.isalpha() and word not in named)
