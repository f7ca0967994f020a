"""Features and gradients of towers in half precision, whatever the gradient's size."""

import pytest
import torch
import torch.nn.functional as F

from pcmecl_fast import PersonalizedPrompts, load_clip
from pcmecl_fast.towers.precision import GradientRange, tower_dtype

HALVES = ("bfloat16", "float16")
# A tower's features add up a few hundred roundings; of 1 - cos, the square of that counts.
LARGEST = {"bfloat16": 1e-3, "float16": 1e-4}


def apart(a, b):
    """1 - cos of two tensors as vectors."""
    return 1 - float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def frames(count=6):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
def test_features_and_the_frames_gradient_are_near_float32s(dtype, size):
    found = {}
    for name in ("float32", dtype):
        clip = load_clip("tiny-face", dtype=tower_dtype(name, "cpu"))
        x = frames().requires_grad_()
        features = clip.encode_image(x).float()
        weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
        (size * features * weight).sum().backward()
        assert x.grad.dtype is torch.float32
        found[name] = features.detach(), x.grad / size
    for ours, exact in zip(found[dtype], found["float32"], strict=True):
        assert apart(ours, exact) < 10 * LARGEST[dtype]
        torch.testing.assert_close(ours.norm(), exact.norm(), rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
def test_prompts_are_float32_and_near_float32s(dtype):
    found = {}
    for name in ("float32", dtype):
        torch.manual_seed(0)
        clip = load_clip("tiny-face", dtype=tower_dtype(name, "cpu"))
        prompts = PersonalizedPrompts(clip, ["happy", "sad"])
        condition = F.normalize(torch.randn(3, clip.embed_dim, generator=torch.Generator().manual_seed(1)), dim=-1)
        features = prompts(condition)
        (1e-6 * features[..., 0]).sum().backward()
        assert features.dtype is prompts.context.dtype is prompts.context.grad.dtype is torch.float32
        found[name] = features.detach(), prompts.context.grad
    for ours, exact in zip(found[dtype], found["float32"], strict=True):
        assert apart(ours, exact) < 10 * LARGEST[dtype]


def test_small_gradients_pass_a_float16_tower():
    """Without a range of their own most would be 0."""
    x = torch.ones(4, requires_grad=True)
    half, gradient = torch.tensor(1.0, dtype=torch.float16), torch.tensor([1e-9, -3e-9, 0.0, 2e-9])
    (x.to(torch.float16) * half).to(torch.float32).backward(gradient)
    assert not x.grad.any()
    x.grad, own = None, GradientRange()
    own.leave((own.enter(x).to(torch.float16) * half).to(torch.float32)).backward(gradient)
    torch.testing.assert_close(x.grad, gradient, rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan"), 1e30])
def test_gradients_that_cannot_be_scaled_come_through_as_they_are(value):
    x, own = torch.ones(3, requires_grad=True), GradientRange()
    own.leave(own.enter(x)).backward(torch.tensor([value, 0.0, value]))
    torch.testing.assert_close(x.grad, torch.tensor([value, 0.0, value]), equal_nan=True)


def test_of_an_empty_batch_too():
    clip = load_clip("tiny-face", dtype=torch.float16)
    x = frames(0).requires_grad_()
    clip.encode_image(x).sum().backward()
    assert x.grad.shape == x.shape


def test_the_scale_of_logits_is_not_rounded():
    exact = load_clip("tiny-face").logit_scale
    assert load_clip("tiny-face", dtype=torch.bfloat16).logit_scale == exact
    assert load_clip("tiny-face").to(torch.float16).to(torch.float32).logit_scale == exact


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
def test_features_can_be_changed_in_place(dtype):
    clip = load_clip("tiny-face", dtype=tower_dtype(dtype, "cpu"))
    x = frames(2).requires_grad_()
    clip.encode_image(x).mul_(2).sum().backward()
    assert x.grad.abs().max() > 0
