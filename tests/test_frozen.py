"""What runs convolutions and interpolations as products computes what PyTorch's own compute."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCES
from torch import nn

from pcmecl_fast import load_clip
from pcmecl_fast.models.warp_fields import _interpolation
from pcmecl_fast.towers.fingerprint import tower_hash
from pcmecl_fast.towers.frozen import PatchEmbedding, take_over

EXACT = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: TOLERANCES[torch.float32]}


def with_gradient(module, x):
    x = x.clone().requires_grad_()
    out = module(x)
    (gradient,) = torch.autograd.grad(out.sin().sum(), x)
    return out.detach(), gradient


def taken_over(tower):
    own = copy.deepcopy(tower)
    take_over(own)
    return own


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize(
    ("convolution", "size"),
    [
        ((3, 10, 16, 16), (64, 48)),
        ((3, 7, (4, 6), (4, 6)), (12, 18)),
        ((3, 7, 8, 8), (33, 40)),  # rows that no patch has
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_patches_are_embedded_as_by_a_convolution(dtype, convolution, size, bias):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(*convolution, bias=bias)).to(dtype).requires_grad_(False)
    own = taken_over(plain)
    assert type(own[0]) is PatchEmbedding
    x = torch.randn(5, 3, *size, dtype=dtype)
    for x_ in (x, x.contiguous(memory_format=torch.channels_last), x[:0], x.flip(-1)):
        for a, b in zip(with_gradient(own, x_), with_gradient(plain, x_), strict=True):
            torch.testing.assert_close(a, b, **EXACT[dtype])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 8, 4, stride=2),
        nn.Conv2d(3, 8, 4, stride=4, padding=1),
        nn.Conv2d(3, 9, 4, stride=4, groups=3),
        nn.Conv2d(3, 8, 4, stride=4, dilation=2),
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 2, stride=2),
    ],
    ids=str,
)
def test_other_convolutions_stay(layer):
    tower = nn.Sequential(layer)
    take_over(tower)
    assert type(tower[0]) is nn.Conv2d


@pytest.mark.parametrize("dtype", EXACT)
def test_a_tower_sees_what_it_saw_and_is_the_same_tower(dtype):
    clip = load_clip("tiny-face", dtype=dtype)
    plain = copy.deepcopy(clip.model)
    for module in plain.visual.modules():
        if type(module) is PatchEmbedding:
            module.__class__ = nn.Conv2d
    assert type(plain.visual.conv1) is nn.Conv2d
    assert type(clip.model.visual.conv1) is PatchEmbedding
    assert tower_hash(plain, visual=True) == tower_hash(clip.model, visual=True)
    x = torch.randn(3, 3, 64, 64, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for a, b in zip(with_gradient(clip.model.encode_image, x), with_gradient(plain.encode_image, x), strict=True):
        within = EXACT[dtype] if dtype == torch.float64 else {"rtol": 1e-3, "atol": 2e-5 * float(b.abs().max())}
        torch.testing.assert_close(a, b, **within)


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("smoothly", ["bicubic", "bilinear"])
def test_fields_are_laid_as_by_interpolation(dtype, smoothly):
    fields = torch.randn(2, 3, 16, 12, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for size in ((64, 40), (16, 12), (256, 33), (9, 7)):
        matrices = [_interpolation(a, b, smoothly, fields) for a, b in zip((16, 12), size, strict=True)]
        for a, b in zip(
            with_gradient(lambda x, m=matrices: m[0] @ x @ m[1].T, fields),
            with_gradient(lambda x, s=size: F.interpolate(x, s, mode=smoothly, align_corners=False), fields),
            strict=True,
        ):
            torch.testing.assert_close(a, b, **EXACT[dtype])
