"""The built-in generator starts as the identity and can leave it; the critic scores patches."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCES

from pcmecl_fast.files import load_tensors, save_tensors
from pcmecl_fast.models import (
    PatchDiscriminator,
    WarpFields,
    WarpFieldsConfig,
    load_generator,
    save_generator,
)
from pcmecl_fast.models.warp_fields import _interpolation, folding, pose_grid, warp

EMOTIONS = ["neutral", "happy", "sad"]


def generator(**kwargs):
    torch.manual_seed(0)
    return WarpFields(EMOTIONS, 32, WarpFieldsConfig(**{"fields": 4, "hidden": 16} | kwargs))


def frames(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def smooth(count, side):
    """Frames without the pixel noise that every resampling blurs."""
    coarse = frames(count, 3, 5, 5)
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic", align_corners=True).clamp(-1, 1)


@pytest.mark.parametrize("config", [WarpFieldsConfig(), WarpFieldsConfig(fields=4, hidden=16)])
def test_it_starts_near_the_identity_with_a_gradient_everywhere(config):
    torch.manual_seed(0)
    model = WarpFields(EMOTIONS, 32, config)
    source = smooth(3, 32)
    edited = model(source, torch.tensor([0, 1, 2]))
    change = (edited - source).abs()
    assert change.max() < 0.1
    assert change.mean() < 0.02
    assert change.max() > 0
    shown = model.edit(source, torch.tensor([0, 1, 2])).shown
    # The emotion shown is learned from labels alone, everything else from the edit.
    loss = torch.nn.functional.mse_loss(edited, smooth(3, 32).flip(-1))
    (loss + torch.nn.functional.cross_entropy(shown, torch.tensor([2, 0, 1]))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        # An edit is a difference of two mixes, in which the last bias cancels.
        assert parameter.grad.norm() > 0 or name == "mix.4.bias", name


def test_it_can_learn_to_do_something_for_one_emotion_only():
    model, source = generator(fields=16, hidden=32), smooth(2, 48)
    target = torch.tensor([0, 1])
    truth = source.clone()
    truth[1, :, 24:36, 15:33] = 0.5
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(60):
        loss = (model(source, target) - truth).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]


def test_edits_stay_in_range_and_depend_on_the_target_and_the_frame():
    model = generator()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    source = frames(2, 3, 16, 16)
    edited = [model(source, torch.tensor([e, e])) for e in range(3)]
    assert all(x.shape == source.shape and x.abs().max() <= 1 for x in edited)
    assert (edited[0] - edited[1]).abs().max() > 1e-3
    alone = model(source[:1], torch.tensor([1]))
    torch.testing.assert_close(alone, edited[1][:1], rtol=1e-4, atol=1e-5)


def test_its_own_emotion_as_target_changes_nothing():
    model, source = generator(), smooth(2, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        model.shown[-1].weight.zero_()
        model.shown[-1].bias.copy_(torch.tensor([0.0, 200.0, 0.0]))  # confidently recognises a happy face
        kept, changed = model(source, torch.tensor([1, 1])), model(source, torch.tensor([2, 2]))
    torch.testing.assert_close(kept, source)
    assert (changed - source).abs().max() > 1e-3


def test_shading_darkens_and_lightens_without_changing_hues():
    model, source = generator(), smooth(1, 32)
    with torch.no_grad():
        model.shade.fill_(1.0)
        edited = model(source, torch.tensor([1]))
        flow, shade, _ = model.fields(source, torch.tensor([1]))
    expected = ((warp(source, flow) + 1) * shade.exp() - 1).clamp(-1, 1)
    torch.testing.assert_close(edited, expected)
    assert shade.abs().max() <= model.config.shading


@pytest.mark.parametrize("size", [(16, 28), (64, 64), (37, 29)])
def test_any_frame_size_is_accepted(size):
    assert generator()(frames(2, 3, *size), torch.tensor([0, 2])).shape == (2, 3, *size)


def test_a_reference_frame_drives_it_too():
    model = generator(driven_by="reference")
    source, reference = smooth(2, 32), smooth(2, 32).flip(-1)
    edited = model(source, reference)
    assert edited.shape == source.shape
    assert (edited - source).abs().max() < 0.1
    assert not torch.equal(edited, model(source, -reference))
    edited.square().sum().backward()
    # The last bias shifts both styles alike.
    *others, last = model.target.parameters()
    assert all(parameter.grad.norm() > 0 for parameter in others)
    assert last.grad.norm() == 0
    # A reference may have another size than the frames.
    assert model(source, frames(2, 3, 64, 64)).shape == source.shape


def test_zero_flow_warps_nothing_and_a_flow_moves_the_image():
    source = frames(2, 3, 8, 8)
    torch.testing.assert_close(warp(source, torch.zeros(2, 2, 8, 8)), source)
    right = torch.zeros(2, 2, 8, 8)
    right[:, 0] = 2 / 8  # one pixel of a side of 2
    torch.testing.assert_close(warp(source, right)[..., :-1], source[..., 1:])
    down = torch.zeros(2, 2, 8, 8)
    down[:, 1] = 2 / 8
    torch.testing.assert_close(warp(source, down)[..., :-1, :], source[..., 1:, :])


def test_folding_is_what_skin_cannot_stretch():
    # Moving everything, or stretching it by a third of a pixel per pixel, is free; a tear is not.
    height, width = 8, 16
    across = torch.arange(width).expand(1, 2, height, width)
    assert folding(torch.full((1, 2, height, width), 0.3)) == 0
    assert folding(across * (1 / 3) * (2 / width)) == 0
    torn = (across >= 8).float() * 3 * (2 / width)  # three pixels apart, at one of 15 places
    torch.testing.assert_close(folding(torn), torch.tensor((3 - 0.4) / 15))
    assert folding(torn.transpose(2, 3) * (width / height)) > 0


def test_fields_follow_the_heads_pose():
    grid = pose_grid(torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.25, 0.0]]), 4, 4)
    straight, moved = grid
    assert straight[0, 0].tolist() == [-0.75, -0.75]
    torch.testing.assert_close(moved, straight + torch.tensor([0.25, 0.0]))
    rolled = pose_grid(torch.tensor([[0.1, 0.2, 0.0, 0.0]]), 4, 4)[0, 0, 3]  # top right
    torch.testing.assert_close(rolled, torch.tensor([1.1 * 0.75 - 0.2 * 0.75, -0.2 * 0.75 - 1.1 * 0.75]))


@pytest.mark.parametrize("row", range(24, 28))
def test_the_fields_are_as_fine_as_a_lid(row):
    rise = torch.zeros(64, 1)
    rise[row : row + 2] = 1.0  # two rows of a frame of 64 move, and the iris below does not
    basis = _interpolation(WarpFieldsConfig().cells, 64, "bicubic", rise)
    made = basis @ torch.linalg.lstsq(basis, rise).solution
    assert (made - rise).norm() < 0.6 * rise.norm()


def test_a_nan_flow_is_visible_and_does_not_crash():
    flow = torch.zeros(1, 2, 8, 8)
    flow[0, 0, 2], flow[0, 1, 5] = torch.nan, torch.inf
    source, flow = frames(1, 3, 8, 8).requires_grad_(), flow.requires_grad_()
    warped = warp(source, flow)
    assert warped[0, :, 2].isnan().all()
    assert not warped[0, :, [0, 1, 3, 4, 5, 6, 7]].isnan().any()
    warped.sum().backward()
    assert source.grad.isfinite().all()


@pytest.mark.parametrize("driven_by", ["emotion", "reference"])
def test_what_is_saved_is_loaded_frozen(tmp_path, driven_by):
    model = generator(driven_by=driven_by, shading=0.3)
    save_generator(tmp_path / "model", model)
    again = load_generator(tmp_path / "model")
    assert isinstance(again, WarpFields)
    assert (again.emotions, again.size, again.config) == (EMOTIONS, 32, model.config)
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    source = frames(2, 3, 32, 32)
    target = torch.tensor([1, 2]) if driven_by == "emotion" else frames(2, 3, 32, 32, seed=1)
    assert torch.equal(again(source, target), model.eval()(source, target))


def test_a_file_from_before_an_option_has_the_value_of_then(tmp_path):
    model = WarpFields(EMOTIONS, 32, WarpFieldsConfig(fields=4, cells=16))
    save_generator(tmp_path / "model", model)
    tensors, header = load_tensors(tmp_path / "model", "generator")
    del header["options"]["cells"]
    save_tensors(tmp_path / "model", "generator", tensors, header)
    again = load_generator(tmp_path / "model")
    assert again.config.cells == 16
    source, target = frames(2, 3, 32, 32), torch.tensor([1, 2])
    assert torch.equal(again(source, target), model.eval()(source, target))


def test_a_broken_file_of_weights_is_named(tmp_path):
    save_generator(tmp_path / "model", generator())
    content = (tmp_path / "model").read_bytes()
    (tmp_path / "model").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="model is not a whole safetensors file"):
        load_generator(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing"):
        load_generator(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*, it is a folder"):
        load_generator(tmp_path)


@pytest.mark.parametrize(("size", "patches"), [((64, 64), (8, 8)), ((32, 48), (4, 6)), ((8, 8), (1, 1))])
def test_the_critic_scores_every_patch(size, patches):
    torch.manual_seed(0)
    critic = PatchDiscriminator(8)
    source = frames(2, 3, *size).requires_grad_()
    scores = critic(source)
    assert scores.shape == (2, 1, *patches)
    scores.sum().backward()
    assert source.grad.abs().sum() > 0
    assert all(parameter.grad.isfinite().all() for parameter in critic.parameters())


def test_the_critic_is_spectrally_normalised():
    torch.manual_seed(0)
    critic = PatchDiscriminator(8)
    for layer in critic.body:
        if isinstance(layer, torch.nn.Conv2d):
            with torch.no_grad():
                layer.parametrizations.weight.original.mul_(100)
    for _ in range(20):  # power iterations
        critic(frames(1, 3, 16, 16))
    for layer in critic.body:
        if isinstance(layer, torch.nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2) < 1.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothly", ["bicubic", "bilinear"])
def test_fields_are_laid_as_by_interpolation(dtype, smoothly):
    fields = torch.randn(2, 3, 16, 12, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for size in ((64, 40), (16, 12), (256, 33), (9, 7)):
        matrices = [_interpolation(a, b, smoothly, fields) for a, b in zip((16, 12), size, strict=True)]
        for a, b in zip(
            _with_gradient(lambda x, m=matrices: m[0] @ x @ m[1].T, fields),
            _with_gradient(lambda x, s=size: F.interpolate(x, s, mode=smoothly, align_corners=False), fields),
            strict=True,
        ):
            torch.testing.assert_close(a, b, **TOLERANCES[dtype])


def _with_gradient(function, x):
    x = x.clone().requires_grad_()
    out = function(x)
    (gradient,) = torch.autograd.grad(out.sin().sum(), x)
    return out.detach(), gradient
