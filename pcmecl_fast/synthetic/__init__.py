"""Drawn people: talking faces that are functions of their parameters, and the small networks trained on them.

people     who they are and what they show      faces      `SyntheticFaces`, the data set, with its paired truth
painter    parameters to frames                 augment    augmentation of frames for training the networks
judge      reads edits in the evaluation        reader     preserves speech and identity in stage 2
tiny_face, tiny_face_text, captions             the CLIP model that ships with the package
training   what the four trainings share

The judge, the reader and `tiny-face` know only drawn faces, not real ones.
"""

from pcmecl_fast.synthetic.faces import SyntheticFaces
from pcmecl_fast.synthetic.painter import draw
from pcmecl_fast.synthetic.people import (
    ACTION_UNITS,
    IDENTITY_LENGTH,
    SPEECH_SPANS,
    FrameParameters,
    Identities,
    speech_difference,
)

__all__ = [
    "ACTION_UNITS",
    "IDENTITY_LENGTH",
    "SPEECH_SPANS",
    "FrameParameters",
    "Identities",
    "SyntheticFaces",
    "draw",
    "speech_difference",
]
