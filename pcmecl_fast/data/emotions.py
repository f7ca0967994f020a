"""The names of emotions, and the words that data sets use for them. Without PyTorch, as `layouts` needs them."""

from __future__ import annotations

EMOTIONS = ("neutral", "angry", "disgusted", "fear", "happy", "sad", "surprised")
"""The seven emotions of MEAD, in the order that data sets and reports use."""

KNOWN_EMOTIONS = (*EMOTIONS, "contempt", "calm")
"""`EMOTIONS`, MEAD's eighth (contempt) and the one found only in RAVDESS (calm)."""

SYNONYMS = {
    "neutral": ("neu", "neutrality"),
    "angry": ("ang", "anger"),
    "disgusted": ("dis", "disgust"),
    "fear": ("fea", "fearful", "afraid", "scared"),
    "happy": ("hap", "happiness", "joy", "joyful"),
    "sad": ("sadness",),
    "surprised": ("sur", "surprise"),
    "contempt": ("con", "contemptuous"),
    "calm": ("calmness",),
}
"""What else folders and files are named, beside the name itself; capitals do not matter."""

_NAMES = {word: name for name, synonyms in SYNONYMS.items() for word in (name, *synonyms)}


def emotion_named(word: str) -> str | None:
    """The name in `KNOWN_EMOTIONS` of what a data set calls "Anger" or "ang"; None where nothing is known by it."""
    return _NAMES.get(word.casefold())
