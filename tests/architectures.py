"""Architectures of a few thousand weights, registered with open_clip as its own are."""

import copy

import open_clip
from open_clip.pretrained import _PRETRAINED

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def register(monkeypatch, name, tags=None, *, text=None, vision=None, **changes):
    """An architecture like TINY but for the changes, with its weights tags; forgotten after the test."""
    config = copy.deepcopy(TINY) | changes
    config["text_cfg"] |= text or {}
    config["vision_cfg"] |= vision or {}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    if tags:
        monkeypatch.setitem(_PRETRAINED, name, tags)
    return name
