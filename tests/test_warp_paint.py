"""The built-in generator paints what moving skin cannot make, and nothing where an edit is zero."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCES

from pcmecl_fast.files import load_tensors, save_tensors
from pcmecl_fast.models import WarpPaint, WarpPaintConfig, load_generator, save_generator
from pcmecl_fast.models.base import enlarge
from pcmecl_fast.models.warp_fields import move_and_shade
from pcmecl_fast.models.warp_paint import Box, _Bounded, _Layer, _Up, covered, local_contrast, opened

EMOTIONS = ["neutral", "happy", "sad"]


def generator(**options):
    torch.manual_seed(0)
    return WarpPaint(EMOTIONS, 32, WarpPaintConfig(**{"fields": 4, "hidden": 16, "widths": [8, 8, 16, 16]} | options))


def painting(**options):
    """One that moves, shades and paints visibly."""
    model = generator(**options)
    with torch.no_grad():
        model.head.weight.normal_()
        model.flow.mul_(30)
        model.shade.mul_(30)
    return model


def frames(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("config", [WarpPaintConfig(), WarpPaintConfig(detail=16, widths=[8, 16])])
def test_it_starts_near_the_identity_and_without_paint(config):
    torch.manual_seed(0)
    model, source, target = WarpPaint(EMOTIONS, 32, config), frames(3, 3, 32, 32), torch.tensor([0, 1, 2])
    plan = model.plan(source, target)
    assert (plan[:, 3:] == 0).all()
    change = (model(source, target) - source).abs()
    assert 0 < change.mean() < 0.02


def test_a_gradient_reaches_the_opacities_from_the_start_and_everything_after_a_step():
    model, source, target = generator(), frames(3, 3, 32, 32), torch.tensor([0, 1, 2])
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    for _ in range(2):
        optimizer.zero_grad()
        edit = model.edit(source, target)
        loss = (edit.frames - source.flip(-1)).square().mean()
        (loss + torch.nn.functional.cross_entropy(edit.shown, torch.tensor([2, 0, 1]))).backward()
        assert (model.head.weight.grad[3:].flatten(1).norm(dim=1) > 0).all()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.norm() > 0 or name == "mix.4.bias", name  # which cancels


def test_it_paints_what_no_move_or_shade_of_a_frame_can_make():
    # Dark all over; without a price, paint is wanted everywhere at once, which no stroke is.
    model, source = generator(w_paint=1.0), torch.full((2, 3, 32, 32), -0.9)
    truth, target = source.clone(), torch.tensor([0, 1])
    truth[1, :, 16:20, 12:20] = 1.0
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    for _ in range(100):
        edit = model.edit(source, target)
        loss = (edit.frames - truth).square().mean() + edit.penalties["paint"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    edited = model(source, target)
    assert edited[1, :, 16:20, 12:20].mean() > 0
    assert edited[0].mean() < -0.8
    moved = move_and_shade(source, *(torch.rand(2, c, 32, 32) - 0.5 for c in (2, 1)))
    assert moved.max() < -0.8


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (37, 29)])
def test_a_plan_of_zeros_and_what_is_outside_the_window_stay_to_the_bit(size):
    model, source, target = painting(), frames(2, 3, *size), torch.tensor([1, 2])
    plan = model.plan(source, target)
    assert torch.equal(model.carry_out(source, torch.zeros_like(plan)), source)
    edited, box = model(source, target), Box.around(model.config.window, *size)
    changed = (edited != source).any(1).any(0)
    assert changed[box.rows, box.columns].any()
    changed[box.rows, box.columns] = False
    assert not changed.any()


@pytest.mark.parametrize("size", [(32, 32), (37, 29)])
def test_at_its_own_size_it_carries_out_what_it_edits(size):
    model, source, target = painting(), frames(2, 3, *size), torch.tensor([1, 2])
    plan = model.plan(source, target)
    assert plan[:, 3].max() > 0.1
    assert torch.equal(model.carry_out(source, plan), model(source, target))


def test_a_plan_is_carried_out_at_any_size_and_strength():
    model, source = painting(), frames(2, 3, 32, 32)
    plan = model.plan(source, torch.tensor([1, 2]))
    large = torch.nn.functional.interpolate(source, (128, 96), mode="bilinear")
    for strength in (0.5, 1.0, 1.5):
        edited = model.carry_out(large, strength * plan)
        assert edited.shape == large.shape
        assert edited.abs().max() <= 1


def test_paint_covers_in_proportion_and_never_more_than_all():
    model, source = generator(), torch.full((1, 3, 8, 8), -0.5)
    plan = torch.zeros(1, 8, 8, 8)
    plan[:, 3], plan[:, 4:7] = 0.8, 0.8 * 0.5  # opacity, and colour 0.5 times it
    for strength, expected in ((0.5, 0.6 * -0.5 + 0.4 * 0.5), (1.0, 0.2 * -0.5 + 0.8 * 0.5), (1.5, 0.5)):
        edited = model.carry_out(source, strength * plan)
        torch.testing.assert_close(edited, torch.full_like(edited, expected))


def test_opacities_and_colours_are_bounded():
    model, source = painting(), frames(4, 3, 32, 32)
    with torch.no_grad():
        model.head.weight.mul_(1000)
    _, opacity, paint, _ = model.plan(source, torch.tensor([0, 1, 2, 0])).split([3, 1, 3, 1], dim=1)
    assert 0 <= opacity.min() <= opacity.max() <= 1.0 + 1e-6
    assert (paint.abs() <= opacity + 1e-6).all()
    assert opacity.max() > 0.99


def test_paint_is_mixed_of_white_black_and_the_faces_own_colours():
    model = painting()
    red = torch.full((1, 3, 32, 32), -1.0)
    red[:, 0] = 0.5
    with torch.no_grad():
        _, opacity, paint, _ = model.plan(red, torch.tensor([1])).split([3, 1, 3, 1], dim=1)
    colour = paint / opacity.clamp(min=1e-3)
    covered = opacity[:, 0] > 0.1
    assert covered.any()
    assert ((colour[:, 1] - colour[:, 2]).abs() < 1e-4)[covered].all()  # nothing in it tells green from blue
    assert (colour[:, 0] > colour[:, 1] - 1e-4)[covered].all()


def test_a_veil_costs_more_than_the_same_paint_in_one_place():
    veil, cover, nothing = torch.full((1, 1, 10, 10), 0.1), torch.zeros(1, 1, 10, 10), torch.zeros(1, 1, 10, 10)
    cover[..., 0, :] = 1.0
    assert veil.mean() == pytest.approx(cover.mean().item())
    assert covered(nothing) == 0
    assert covered(cover) == pytest.approx(0.1)
    assert covered(veil) == pytest.approx(0.289, abs=1e-3)


def test_contrast_is_the_same_on_dark_skin_and_light_and_nothing_where_all_is_alike():
    lines = frames(1, 3, 16, 16)
    light, dark = 0.4 + 0.5 * lines, -0.6 + 0.25 * lines
    torch.testing.assert_close(local_contrast(light), local_contrast(dark), rtol=0, atol=0.1)
    plain = torch.full((1, 3, 16, 16), 0.3, requires_grad=True)
    seen = local_contrast(plain)
    torch.testing.assert_close(seen, torch.zeros_like(seen), rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(seen[..., 8, 8].sum(), plain)
    assert gradient.isfinite().all()


def test_what_is_outside_its_bounds_can_come_back_but_is_not_pushed_further():
    x = torch.tensor([-0.5, -0.5, 0.0, 0.5, 1.5, 1.5], requires_grad=True)
    bounded = _Bounded.apply(x)
    assert bounded.tolist() == [0.0, 0.0, 0.0, 0.5, 1.0, 1.0]
    bounded.backward(torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0, -1.0]))
    assert x.grad.tolist() == [0.0, -1.0, 1.0, 1.0, 1.0, 0.0]


def test_its_own_emotion_as_target_changes_nothing():
    model, source = painting(), frames(2, 3, 32, 32)
    with torch.no_grad():
        model.shown[-1].weight.zero_()
        model.shown[-1].bias.copy_(torch.tensor([0.0, 200.0, 0.0]))  # confidently recognises a happy face
        assert torch.equal(model(source, torch.tensor([1, 1])), source)
        assert not torch.equal(model(source, torch.tensor([2, 2])), source)


def test_a_large_frame_is_planned_small_and_keeps_its_texture():
    model, target = painting(), torch.tensor([1, 2])
    small = frames(2, 3, 64, 64)
    large = torch.nn.functional.interpolate(small, scale_factor=4.0)  # the means of 4 × 4 pixels are small's
    plan = model.plan(large, target)
    assert plan.shape == (2, 8, 256, 256)
    inside = Box.around(model.config.window, 256, 256).pixels
    expected = enlarge(model.plan(small, target), large)
    ranges = torch.tensor([1.0] * 7 + [model.config.sharpness])[:, None, None]
    torch.testing.assert_close(plan[inside] / ranges, expected[inside] / ranges)
    torch.testing.assert_close(model(large, target), model.carry_out(large, plan), rtol=0, atol=2e-3)


@pytest.mark.parametrize("driven_by", ["emotion", "reference"])
@pytest.mark.parametrize("size", [(32, 32), (37, 29), (96, 80)])
def test_once_trained_it_edits_a_mirrored_frame_as_it_does_the_frame(size, driven_by):
    model, source = painting(driven_by=driven_by).double(), frames(2, 3, *size).double()
    target = torch.tensor([1, 2]) if driven_by == "emotion" else frames(2, 3, *size, seed=1).double()
    with torch.no_grad():
        edited, turned = model(source, target), model(source.flip(-1), target).flip(-1)
        assert (edited - turned).abs().max() > 0.1
        model.eval()
        edited, turned = model(source, target), model(source.flip(-1), target).flip(-1)
        assert (edited - source).abs().max() > 0.1
        # The window is computed in float32.
        torch.testing.assert_close(edited, turned, **TOLERANCES[torch.float32])


@pytest.mark.parametrize(
    "options", [{"mirrored": False}, {"window": [0.45, 0.6, 0.27, 0.27]}, {"mouth": [0.55, 0.75, 0.2, 0.13]}]
)
def test_it_looks_once_where_that_is_wanted_or_a_window_is_not_in_the_middle(options):
    model, source, target = painting(least=0.0, **options), frames(2, 3, 32, 32), torch.tensor([1, 2])
    edited = model(source, target)
    assert torch.equal(model.eval()(source, target), edited)


@pytest.mark.parametrize("driven_by", ["emotion", "reference"])
def test_what_is_saved_is_loaded_frozen(tmp_path, driven_by):
    model = painting(driven_by=driven_by)
    save_generator(tmp_path / "model", model)
    again = load_generator(tmp_path / "model")
    assert isinstance(again, WarpPaint)
    assert again.config == model.config
    source = frames(2, 3, 32, 32)
    target = torch.tensor([1, 2]) if driven_by == "emotion" else frames(2, 3, 32, 32, seed=1)
    assert torch.equal(again(source, target), model.eval()(source, target))


def test_once_trained_it_leaves_out_what_hardly_covers():
    source, target = frames(2, 3, 32, 32), torch.tensor([1, 2])
    models = [painting(least=least, mirrored=False).eval() for least in (0.0, 0.3)]
    with torch.no_grad():
        whole, left = (model.plan(source, target)[:, 3] for model in models)
    assert (left <= whole + 1e-6).all()
    middle = (..., slice(16, 22), slice(12, 20))  # where the window does not weigh
    assert ((whole > 0) & (whole < 0.3))[middle].any()
    assert (left[middle][whole[middle] < 0.3] == 0).all()
    assert left.max() > 0.3
    training = [model.train().plan(source, target) for model in models]
    assert torch.equal(*training)


def test_it_paints_strokes_and_no_veils():
    cover = torch.zeros(1, 1, 20, 30)
    cover[..., 2:6, 3:28] = 0.7  # a stroke four pixels wide
    strokes = cover.clone()
    cover[..., 10:16, 4:12] = 0.5  # a square of five fits
    wide = opened(cover, 5)
    assert torch.equal(cover - wide, strokes)
    assert torch.equal(opened(cover, 6), cover - strokes)
    assert (opened(cover, 7) == 0).all()


@pytest.mark.parametrize("side", [32, 16])
def test_whatever_is_wanted_a_whole_window_is_never_covered(side):
    source, target = frames(2, 3, side, side), torch.tensor([1, 2])
    covers = []
    for stroke in (0.125, 1.0):
        model = painting(stroke=stroke)
        with torch.no_grad():
            model.head.weight[3] = 50  # white everywhere
            model.gate.weight.abs_()
        covers.append(model.plan(source, target)[:, 3:4])
    strokes, all_of_it = covers
    assert opened(strokes, 1 + side // 8).max() < 1e-6
    assert (strokes <= all_of_it + 1e-6).all()
    assert opened(all_of_it, 1 + side // 8).max() > 0.1


def test_sharpened_lines_grow_brighter_and_the_dark_beside_them_darker_in_the_mouth_alone():
    model = generator(mouth=[0.5, 0.75, 0.2, 0.12])
    source = torch.full((1, 3, 32, 32), -0.4)
    source[:, :, [10, 24]] = 0.2  # a line across the eyes, and one across the mouth
    plan = torch.zeros(1, 8, 32, 32)
    plan[:, 7] = 1.0
    middle = model.carry_out(source, plan)[..., 16]
    assert torch.equal(middle[..., :16], source[..., :16, 16])
    torch.testing.assert_close(middle[..., 24], torch.full((1, 3), 0.2 + 0.4))  # the mean of 3 × 3 is -0.2
    for beside in (23, 25):
        torch.testing.assert_close(middle[..., beside], torch.full((1, 3), -0.4 - 0.2))


@pytest.mark.parametrize("window", [[0.5, 0.6, 0.27, 0.27], [0.5, 0.5, 0.2, 0.2], [0.1, 0.9, 0.1, 0.1]])
@pytest.mark.parametrize("size", [(32, 32), (37, 29), (96, 80)])
def test_what_is_sharpened_is_carried_out_as_it_is_edited_wherever_the_window_is(size, window):
    model, source, target = painting(window=window), frames(2, 3, *size), torch.tensor([1, 2])
    with torch.no_grad():
        model.head.weight[-1].mul_(10)
        plan, edited = model.plan(source, target), model(source, target)
    sharpened = plan[:, 7] > 0
    assert sharpened.any() == (window[0] == 0.5)
    if max(size) <= model.config.detail:
        assert plan[:, 7].max() <= model.config.sharpness
        assert torch.equal(model.carry_out(source, plan), edited)
    else:
        torch.testing.assert_close(model.carry_out(source, plan), edited, rtol=0, atol=2e-3)
    model.config.sharpness = 0.0
    assert torch.equal(model.carry_out(source, plan), edited) == (not sharpened.any())


def test_a_large_mouth_is_sharpened_by_means_of_the_networks_pixels():
    model = generator(detail=32)
    small = frames(1, 3, 32, 32) / 2
    large = small.repeat_interleave(9, -1).repeat_interleave(9, -2)
    plan = torch.zeros(1, 8, 32, 32)
    plan[:, 7, 22:26, 14:18] = 0.5
    sharp = model.carry_out(small, plan)[..., 23:25, 15:17]
    found = model.carry_out(large, plan)
    # The pixel in the middle of one of the network's, around which 27 × 27 pixels are 3 × 3 of those.
    torch.testing.assert_close(found[..., 211:229:9, 139:157:9], sharp)
    assert (sharp - small[..., 23:25, 15:17]).abs().max() > 0.1


def test_a_file_from_before_mouths_were_sharpened_edits_as_it_did(tmp_path):
    model = painting(sharpness=0.0)
    assert len(model.head.weight) == len(painting().head.weight) - 1
    save_generator(tmp_path / "model", model)
    tensors, header = load_tensors(tmp_path / "model", "generator")
    for option in ("sharpness", "mouth", "w_sharpness"):
        del header["options"][option]
    save_tensors(tmp_path / "model", "generator", tensors, header)
    again = load_generator(tmp_path / "model")
    assert again.config.sharpness == 0
    source, target = frames(2, 3, 32, 32), torch.tensor([1, 2])
    assert torch.equal(again(source, target), model.eval()(source, target))


@pytest.mark.parametrize("name", ["window", "mouth"])
@pytest.mark.parametrize("window", [[0.5, 0.7], [0.5, 0.7, 0.0, 0.1]])
def test_a_window_that_is_none_is_refused(name, window):
    with pytest.raises(ValueError, match=rf"{name}: takes four numbers, .*, got \[0.5, 0.7"):
        generator(**{name: window})


def test_a_sharpness_that_is_none_is_refused():
    with pytest.raises(ValueError, match="sharpness: takes 0 or more, got -1"):
        generator(sharpness=-1.0)


@pytest.mark.parametrize("stroke", [0, 1.5])
def test_a_stroke_that_is_none_is_refused(stroke):
    with pytest.raises(ValueError, match=f"stroke: takes more than 0, up to 1, got {stroke}"):
        generator(stroke=stroke)


@pytest.mark.parametrize("least", [-0.1, 1.0])
def test_a_least_cover_that_is_none_is_refused(least):
    with pytest.raises(ValueError, match=f"least: takes 0 to less than 1, got {least}"):
        generator(least=least)


@pytest.mark.parametrize("widths", [[], [8], [8, 12], [8, 0]])
def test_widths_that_do_not_fit_are_refused(widths):
    with pytest.raises(ValueError, match="widths: takes two or more multiples of 8, got"):
        generator(widths=widths)


@pytest.mark.parametrize("last", [0, 12])
def test_a_last_layer_that_does_not_fit_is_refused(last):
    with pytest.raises(ValueError, match=f"last: takes a multiple of 8, got {last}"):
        generator(last=last)


def test_what_is_enlarged_by_spreading_is_the_convolution_of_what_is_enlarged_and_concatenated():
    torch.manual_seed(0)
    layer = _Up(16, 8, 24, 5).double()
    below, beside, condition = torch.randn(2, 16, 3, 4), torch.randn(2, 8, 6, 8), torch.randn(2, 5)
    below, beside, condition = inputs = [x.double().requires_grad_() for x in (below, beside, condition)]
    plain = _Layer(24, 24, 5).double()
    plain.load_state_dict(layer.state_dict())
    expected = plain(torch.cat([F.interpolate(below, scale_factor=2.0), beside], 1), condition=condition)
    found = layer(below, beside, condition=condition)
    torch.testing.assert_close(found, expected, **TOLERANCES[torch.float64])
    upstream = torch.randn_like(found)
    gradients = torch.autograd.grad(found, [*inputs, *layer.parameters()], upstream)
    torch.testing.assert_close(
        gradients,
        torch.autograd.grad(expected, [*inputs, *plain.parameters()], upstream),
        **TOLERANCES[torch.float64],
    )
