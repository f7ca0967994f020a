"""Random changes of frames: what is off changes nothing, and each option changes what it should."""

import pytest
import torch

from pcmecl_fast.synthetic.augment import augmented, drawn, to_bytes

OFF = {"zoom": 0.0, "shift": 0.0, "blurred": 0.0, "noise": 0.0}


def test_without_options_nothing_changes(few_faces):
    faces = few_faces()
    pixels = drawn(faces)
    torch.testing.assert_close(augmented(pixels, **OFF), faces.frames(range(len(faces))), rtol=0, atol=1 / 127)
    assert torch.equal(to_bytes(augmented(pixels, **OFF)), pixels)


@pytest.mark.parametrize("option", ["zoom", "shift", "noise", "tint"])
def test_each_change_changes_frames(few_faces, option):
    pixels = drawn(few_faces())
    assert (augmented(pixels, **OFF | {option: 0.1}) - augmented(pixels, **OFF)).abs().mean() > 1e-3


def test_mirrored_frames_are_mirrored(few_faces):
    pixels = drawn(few_faces())
    plain, seen = augmented(pixels, **OFF), augmented(pixels, **OFF, mirrored=True)
    same = [(a - b).abs().max() < 1e-5 for a, b in zip(seen, plain, strict=True)]
    flipped = [(a - b.flip(-1)).abs().max() < 1e-5 for a, b in zip(seen, plain, strict=True)]
    assert all(a or b for a, b in zip(same, flipped, strict=True))
    assert any(same)
    assert any(flipped)


def test_grain_differs_in_frames_that_are_seen_alike(few_faces):
    pixels = drawn(few_faces())[:3].repeat(2, 1, 1, 1)
    views = augmented(pixels, zoom=0.1, shift=0.1, blurred=0.0, noise=0.1, mirrored=True, alike=2)
    assert torch.equal(*views.chunk(2))
    one, other = augmented(pixels, **OFF, grain=0.1, alike=2).chunk(2)
    assert 0.09 < (one - other).std() / 2**0.5 < 0.11
