"""The critic that knows emotions, the running average of a generator, and terms without a weight."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from pcmecl_fast.models import Average, Critics, EmotionCritic, Generator, PatchDiscriminator, make_generator
from pcmecl_fast.models.discriminator import (
    MOUTH,
    Views,
    blurred,
    emotion_loss,
    mouths_of,
    naming_loss,
    realism_loss,
    score_of,
)
from pcmecl_fast.models.warp_fields import WarpFields, WarpFieldsConfig
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.train.batches import Batch
from pcmecl_fast.train.config import TrainConfig
from pcmecl_fast.train.players import Players, judged

EMOTIONS = ["neutral", "happy", "sad"]


def scores(*rows):
    return torch.tensor(rows, requires_grad=True)


def test_the_losses_are_those_of_their_formulas():
    real, fake = scores([2.0, -3.0, 0.0], [0.5, -1.0, 0.0]), scores([0.0, 1.0, 9.0], [-2.0, 9.0, 9.0])
    shown, target = torch.tensor([0, 1]), torch.tensor([1, 0])
    first = 0.0 + (0.0 + 1.0) / 2 + 0.5 * 2.0
    second = 2.0 + (1.5 + 1.0) / 2 + 0.5 * 0.0
    loss = emotion_loss(real, shown, fake, target, fakes=0.5)
    torch.testing.assert_close(loss, torch.tensor((first + second) / 2))
    torch.testing.assert_close(naming_loss(real, shown), torch.tensor((0.5 + 3.25) / 2))
    loss.backward()
    assert real.grad[0].tolist() == [0.0, 0.0, 0.25]  # its own is beyond the margin, as is one of the others
    assert fake.grad[0].tolist() == [0.0, 0.25, 0.0]  # of the edits' scores the target's alone
    patches = realism_loss(torch.tensor([[2.0, 0.5]]), torch.tensor([[-2.0, 0.5]]))
    torch.testing.assert_close(patches, torch.tensor(0.25 + 0.75))
    assert score_of(real, shown).tolist() == [2.0, -1.0]


def test_one_emotion_alone_has_no_others():
    loss = emotion_loss(torch.zeros(2, 1), torch.zeros(2).long(), torch.zeros(2, 1), torch.zeros(2).long(), fakes=1)
    assert loss == 2.0


def test_the_critic_learns_to_name_emotions_and_to_tell_edits_from_them():
    faces = SyntheticFaces(6, emotions=EMOTIONS, clips=1, frames_per_clip=2, size=32)
    real, shown = faces.frames(range(len(faces))), faces.emotion_index
    target = (shown + 1) % 3
    fake = F.avg_pool2d(real, 5, stride=1, padding=2)
    torch.manual_seed(0)
    critic = EmotionCritic(3)
    optimizer = torch.optim.Adam(critic.parameters(), 2e-3)
    for _ in range(60):
        loss = emotion_loss(critic(real), shown, critic(fake), target, fakes=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (critic(real).argmax(1) == shown).float().mean() > 0.9
    assert (score_of(critic(real), shown) > score_of(critic(fake), target)).float().mean() > 0.9


@pytest.mark.parametrize("size", [(64, 64), (32, 48), (16, 16)])
def test_frames_of_any_size_are_scored(size):
    torch.manual_seed(0)
    assert EmotionCritic(5)(torch.randn(2, 3, *size)).shape == (2, 5)


def test_only_the_wanted_critics_are_made():
    views = Views(torch.randn(2, 3, 32, 32), torch.randn(2, 3, *MOUTH))
    shapes = {"patches": (2, 1, 4, 4), "emotion": (2, 3), "emotion_mouth": (2, 3)}
    for wanted in itertools.product((False, True), repeat=3):
        critics = Critics(3, **dict(zip(shapes, wanted, strict=True)))
        for (name, shape), is_wanted in zip(shapes.items(), wanted, strict=True):
            scores = getattr(critics(views), name)
            assert scores is None if not is_wanted else scores.shape == shape
        assert any(isinstance(x, PatchDiscriminator) for x in critics.modules()) == wanted[0]


def test_what_alternates_between_pixels_neither_pleases_a_critic_nor_comes_back_from_one():
    torch.manual_seed(0)
    critic, frames = EmotionCritic(3), torch.rand(2, 3, 32, 32) * 2 - 1
    rows = torch.ones(32, 1)
    rows[1::2] = -1
    # All but the border, where a pixel has no neighbour on one side.
    stripes = F.pad((0.2 * rows * torch.ones(32, 32))[2:-2, 2:-2], (2, 2, 2, 2))
    moved = (blurred(frames + stripes) - blurred(frames))[..., 4:-4, 4:-4]
    torch.testing.assert_close(moved, torch.zeros_like(moved))
    frames.requires_grad_()
    (gradient,) = torch.autograd.grad(critic(frames).sum(), frames)
    alternating = (gradient * rows)[..., 4:-4, 4:-4].sum((-1, -2)).abs()
    assert (alternating < 0.05 * gradient.abs()[..., 4:-4, 4:-4].sum((-1, -2))).all()


@pytest.mark.parametrize("size", [(64, 64), (256, 256), (40, 30), (8, 8)])
def test_mouths_of_any_size_are_seen_alike(size):
    box = [0.4, 0.6, 0.6, 0.9]
    frames = torch.zeros(1, 1, *size)
    seen = mouths_of(frames, box)
    assert seen.shape == (1, 1, *MOUTH)
    height, width = size
    frames[..., round(0.6 * height) : round(0.9 * height), round(0.25 * width) : round(0.75 * width)] = 1.0
    torch.testing.assert_close(mouths_of(frames, box), torch.ones_like(seen))


def test_a_box_at_the_edge_is_seen_as_far_as_the_frame_goes():
    assert mouths_of(torch.rand(2, 3, 16, 16), [0.9, 0.99, 1.0, 1.0]).shape == (2, 3, *MOUTH)


# Where they look


class _Whole(WarpFields):
    """A generator that does not say where its edits are."""

    region = Generator.region


@pytest.mark.parametrize(("height", "width"), [(64, 64), (24, 40), (7, 5)])
@pytest.mark.parametrize("window", [[0.5, 0.6, 0.27, 0.27], [0.1, 0.9, 0.2, 0.3], [0.5, 0.5, 2.0, 2.0]])
def test_the_critics_see_what_edits_may_change_and_little_else(height, width, window):
    torch.manual_seed(0)
    model = WarpFields(EMOTIONS, 64, WarpFieldsConfig(window=window))
    with torch.no_grad():
        model.flow.normal_(std=3.0)
    frames = torch.rand(2, 3, height, width) * 2 - 1
    places = torch.arange(float(height * width)).view(1, 1, height, width)
    kept = places.flatten()[~torch.isin(places, judged(model, places)).flatten()].long()
    with torch.no_grad():
        edited = model(frames, torch.tensor([1, 2]))
    torch.testing.assert_close(edited.flatten(2)[..., kept], frames.flatten(2)[..., kept])
    rows, columns = model.region(height, width)
    seen = judged(model, places).shape[-2:]
    for side, span, whole in zip(seen, (rows, columns), (height, width), strict=True):
        assert span.stop - span.start <= side < span.stop - span.start + 8
        assert side % 8 == 0 or side == whole


def test_the_critics_see_all_of_an_edit_that_says_nothing_of_where_it_is():
    model = _Whole(EMOTIONS, 64)
    frames = torch.rand(2, 3, 40, 30)
    assert torch.equal(judged(model, frames), frames)


def test_what_no_edit_reaches_is_not_judged():
    torch.manual_seed(0)
    players = Players(WarpFields(EMOTIONS, 64), TrainConfig(w_emotion=1.0), torch.device("cpu"))
    players.critic.eval()  # spectral norms go on converging with every pass of training
    frames, target = torch.rand(2, 3, 64, 64) * 2 - 1, torch.tensor([0, 2])
    changed = frames.clone()
    changed[..., :16, :], changed[..., :8] = 0.5, -0.5
    one, other = players.of_critic(frames, target), players.of_critic(changed, target)
    assert one.keys() == {"adversarial", "emotion"}
    assert all(torch.equal(one[name], other[name]) for name in one)
    changed[..., 40, 32] += 0.5
    assert players.of_critic(changed, target)["emotion"] != one["emotion"]


def test_the_critic_of_mouths_sees_the_mouth_alone_and_learns():
    torch.manual_seed(0)
    config = TrainConfig(w_adversarial=0.0, w_emotion_mouth=1.0, optimizer="muon")
    players = Players(WarpFields(EMOTIONS, 64), config, torch.device("cpu"))
    frames, target = torch.rand(2, 3, 64, 64) * 2 - 1, torch.tensor([0, 2])
    changed = frames.clone()
    changed[..., :38, :], changed[..., :16] = 0.5, -0.5
    one, other = players.of_critic(frames, target), players.of_critic(changed, target)
    assert one.keys() == {"emotion_mouth"}
    assert torch.equal(one["emotion_mouth"], other["emotion_mouth"])
    changed[..., 48, 32] += 0.5
    assert players.of_critic(changed, target)["emotion_mouth"] != one["emotion_mouth"]
    assert players.critic_optimizer.muon is None  # the generator's alone
    before = [x.clone() for x in players.critic.parameters()]
    batch = Batch(torch.zeros(2), frames, target, target, target, target.flip(0), target, torch.zeros(2))
    players._improve_critic([batch], [changed])
    assert not any(torch.equal(x, y) for x, y in zip(before, players.critic.parameters(), strict=True))


# The running average


def generators(count):
    torch.manual_seed(0)
    return [make_generator("warp-fields", EMOTIONS, 32, {"fields": 2, "hidden": 8}) for _ in range(count)]


def test_the_average_is_at_first_a_mean_and_then_exponential():
    models = generators(4)
    average = Average(models[0], 0.6)
    seen = [model.flow.detach() for model in models]
    expected = [seen[0], (seen[0] + seen[1]) / 2]
    for model in models[2:]:
        expected.append(expected[-1] + 0.4 * (model.flow.detach() - expected[-1]))
    for model, flow in zip(models, expected, strict=True):
        average.update(model)
        torch.testing.assert_close(average.generator.flow, flow)
    assert not any(x.requires_grad for x in average.generator.parameters())
    assert all(x.requires_grad for model in models for x in model.parameters())


def test_the_average_goes_on_from_its_state():
    models = generators(4)
    whole, cut = Average(models[0], 0.6), Average(models[0], 0.6)
    for model in models[:3]:
        whole.update(model)
    for model in models[:2]:
        cut.update(model)
    resumed = Average(models[3], 0.6)
    resumed.load_state_dict(cut.state_dict())
    resumed.update(models[2])
    for one, other in zip(whole.generator.parameters(), resumed.generator.parameters(), strict=True):
        assert torch.equal(one, other)


def test_without_decay_the_average_is_the_generator_itself():
    (model,) = generators(1)
    average = Average(model, 0.0)
    average.update(model)
    assert average.generator is model
    average.load_state_dict(average.state_dict())
    assert all(x.requires_grad for x in model.parameters())
