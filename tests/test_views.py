"""Stage 2's random views: functions of a frame and a number, seen once by what is frozen, and kept through a kill."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCES

from pcmecl_fast import PromptBank, load_clip
from pcmecl_fast.ops import use_backend
from pcmecl_fast.prompts import Tower
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.train import generator as stage_two
from pcmecl_fast.train.batches import Plans
from pcmecl_fast.train.config import TrainConfig
from pcmecl_fast.train.generator import train_generator
from pcmecl_fast.train.views import KeptViews, draw_views, gradients_blurred, half_mirrored, seen_alike

EMOTIONS = ["neutral", "happy", "sad"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bank_of(clip, data):
    features = F.normalize(torch.randn(len(data.individuals), 3, clip.embed_dim, generator=seeded()), dim=-1)
    return PromptBank(features, data.individuals, EMOTIONS, tower=Tower.of(clip))


def config_of(out, **options):
    small = {"size": 32, "steps": 6, "batch": 8, "views": 2, "strength": 0.0, "checkpoint_every": 2}
    made_of = {"generator_options": {"fields": 4, "hidden": 16}, "device": "cpu"}
    return TrainConfig(out=Path(out), **small | made_of | options)


def train(clip, data, out, **options):
    return train_generator(clip, bank_of(clip, data), data, config_of(out, **options))


def drawn_in(data, clip, config):
    """The numbers of the views of every step."""
    plans = Plans(data, bank_of(clip, data), with_reference=False, views=config.views)
    return [plans(config.batch, seeded(config.seed * 1_000_003 + step)).view.tolist() for step in range(config.steps)]


@pytest.fixture
def looks(monkeypatch):
    """How many frames the tower sees without a gradient, call by call."""
    found = []
    seen = stage_two.Clip.encode_image

    def encode(self, frames, **options):
        if not torch.is_grad_enabled():
            found.append(len(frames))
        return seen(self, frames, **options)

    monkeypatch.setattr(stage_two.Clip, "encode_image", encode)
    return found


# ---- What a view is --------------------------------------------------------------------------------------------------


def shown(frames, view, **options):
    options = {"jitter": 0.1, "seed": 3, "kept": True} | options
    return seen_alike(frames, frames, torch.tensor(view), **options)[0]


def test_a_view_follows_from_its_number_and_the_runs_seed_alone(few_faces):
    frames = few_faces().frames([0, 0, 0, 1])
    together = shown(frames, [8, 9, 8, 9])
    assert torch.equal(together[0], together[2])
    assert torch.equal(shown(frames[:1], [9])[0], together[1])
    others = [shown(frames[:1], [number])[0] for number in range(40)] + [shown(frames[:1], [8], seed=4)[0]]
    assert all((others[a] - others[b]).abs().mean() > 0.01 for a in range(41) for b in range(a))


def test_source_and_edit_are_seen_alike(few_faces):
    frames = few_faces().frames(range(4))
    moved = frames + 0.25
    source, edited = seen_alike(frames, moved, torch.arange(4), jitter=0.1, seed=0, kept=True)
    torch.testing.assert_close(edited - source, torch.full_like(source, 0.25), rtol=0, atol=1e-5)
    assert seen_alike(frames, moved, torch.arange(4), jitter=0.0, seed=0, kept=True)[1] is moved


@pytest.mark.parametrize("views", [1, 2, 7, 8])
def test_half_of_the_views_are_mirrored(views):
    ramp = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    every = [frame * views + view for frame in range(6) for view in range(views)]
    rising = [bool(shown(ramp, [number], jitter=1e-3).diff(dim=-1).mean() > 0) for number in every]
    assert rising.count(True) == rising.count(False)
    if views % 2 == 0:
        assert all(sum(rising[k : k + views]) == views // 2 for k in range(0, len(rising), views))


def test_every_view_of_a_frame_is_drawn():
    index = torch.tensor([0, 5]).repeat(200)
    view = draw_views(index, 8, seeded())
    assert torch.equal(view // 8, index)
    assert len(view.unique()) == 16
    assert torch.equal(draw_views(index, 0, seeded()), torch.arange(400))


def test_endless_views_are_what_they_were(few_faces):
    frames = few_faces().frames(range(3))
    expected = []
    for number, frame in enumerate(frames):
        random = seeded((77 * 1_000_003 + number) % 2**63)
        zoom, right, down = (torch.rand(3, generator=random) * 2 - 1).tolist()
        mirror = 1 - 2 * int(torch.randint(2, (), generator=random))
        theta = torch.tensor([[[(1 + 0.1 * zoom) * mirror, 0, 0.1 * right], [0, 1 + 0.1 * zoom, 0.1 * down]]])
        grid = F.affine_grid(theta, [1, 3, 32, 32], align_corners=False)
        noise = torch.empty(3, 32, 32).normal_(std=0.1, generator=random)
        expected.append(F.grid_sample(frame[None], grid, padding_mode="border", align_corners=False)[0] + noise)
    torch.testing.assert_close(shown(frames, [0, 1, 2], seed=77, kept=False), torch.stack(expected))


def test_what_is_trained_on_does_not_depend_on_the_views(clip, few_faces):
    data = few_faces()
    plans = [Plans(data, bank_of(clip, data), with_reference=True, views=views)(16, seeded()) for views in (0, 2, 8)]
    for name in ("index", "reference", "target"):
        assert all(torch.equal(getattr(plan, name), getattr(plans[0], name)) for plan in plans)


def test_frames_of_odd_views_are_mirrored_and_no_others():
    frames, moved = torch.rand(2, 4, 3, 8, 6).unbind()
    for before, after in zip((frames, moved), half_mirrored(torch.tensor([4, 7, 1, 0]), frames, moved), strict=True):
        assert torch.equal(after[[0, 3]], before[[0, 3]])
        assert torch.equal(after[[1, 2]].flip(-1), before[[1, 2]])


def test_gradients_are_blurred_and_frames_are_not():
    frames = torch.rand(2, 3, 6, 8, requires_grad=True)
    seen = gradients_blurred(frames)
    assert torch.equal(seen, frames)
    seen[0, 1, 2, 3].backward()
    row = torch.tensor([0.25, 0.5, 0.25])
    assert torch.equal(frames.grad[0, 1, 1:4, 2:5], row[:, None] * row)
    assert frames.grad.sum() == 1


# ---- What is kept ----------------------------------------------------------------------------------------------------


def test_the_tower_sees_each_view_of_a_source_once(clip, tmp_path, few_faces, looks):
    data, config = few_faces(), config_of(tmp_path)
    drawn = drawn_in(data, clip, config)
    train(clip, data, tmp_path)
    seen, new = set(), []
    for step in drawn:
        new.append(len({*step} - seen))
        seen.update(step)
    assert looks == [count for count in new if count]
    assert sum(looks) < 0.7 * config.steps * config.batch


@pytest.mark.parametrize(("views", "backend"), [(0, "auto"), (2, "reference")])
def test_without_kept_views_the_tower_sees_every_source(clip, tmp_path, few_faces, looks, views, backend):
    with use_backend(backend):
        train(clip, few_faces(), tmp_path, views=views)
    assert looks == [8] * 6
    assert not (tmp_path / "views").exists()


class InFloat64(SyntheticFaces):
    def frames(self, index):
        return super().frames(index).double()


@pytest.mark.parametrize(("dtype", "amp"), [(torch.float64, "none"), (torch.float32, "none"), (torch.float32, "bf16")])
def test_what_is_kept_is_what_would_be_computed(tmp_path, monkeypatch, dtype, amp):
    hits = []

    class Checked(KeptViews):
        def __call__(self, view, look):
            hits.append(sum(number in self._at for number in view.tolist()))
            rows = super().__call__(view, look)
            within = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else TOLERANCES[dtype]
            if amp == "bf16":
                within = TOLERANCES[torch.bfloat16]
            expected = look(torch.arange(len(view)))
            # The tower's features are not unit: compared on the scale of the largest.
            scale = expected.abs().amax()
            torch.testing.assert_close(rows / scale, expected / scale, **within)
            return rows

    monkeypatch.setattr(stage_two, "KeptViews", Checked)
    torch.set_default_dtype(dtype)
    try:
        kind = InFloat64 if dtype == torch.float64 else SyntheticFaces
        data = kind(3, emotions=EMOTIONS, clips=1, frames_per_clip=2, size=32)
        # The shipped reader is float32.
        unread = {"w_person": 0.0, "w_speech": 0.0} if dtype == torch.float64 else {}
        train(load_clip().to(dtype), data, tmp_path, amp=amp, **unread)
    finally:
        torch.set_default_dtype(torch.float32)
    assert sum(hits) > 12


def test_the_plain_trainer_learns_the_same(clip, tmp_path, few_faces):
    data = few_faces()
    _, kept = train(clip, data, tmp_path / "kept", lr=1e-4)
    with use_backend("reference"):
        _, plain = train(clip, data, tmp_path / "plain", lr=1e-4)
    for name, curve in kept.curves.items():
        if not name.endswith("adversarial"):
            torch.testing.assert_close(torch.tensor(curve), torch.tensor(plain.curves[name]), rtol=2e-3, atol=2e-3)


def rows_of(view):
    return torch.stack([view, view**2], 1).double()


@pytest.mark.parametrize("most", [0, 3, 100])
def test_any_number_of_rows_may_be_kept(tmp_path, most):
    kept, computed = KeptViews(tmp_path, most_bytes=most * 16), []

    def look(of):
        def rows(which):
            computed.extend(of[which].tolist())
            return rows_of(of[which])

        return rows

    for step in ([4, 7, 4, 1], [9, 9, 4, 2], [2, 1, 7, 9]):
        view = torch.tensor(step)
        assert torch.equal(kept(view, look(view)), rows_of(view))
    assert len(kept) == min(most, 5)
    assert computed == {0: [4, 7, 1, 9, 4, 2, 2, 1, 7, 9], 3: [4, 7, 1, 9, 2, 2, 9], 100: [4, 7, 1, 9, 2]}[most]


# ---- Kills -----------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed", [1, 3, 4, 5])
def test_a_resumed_run_goes_on_with_the_very_rows(clip, tmp_path, few_faces, monkeypatch, looks, killed):
    data = few_faces()
    whole, loop = train(clip, data, tmp_path / "whole")
    once = sum(looks)
    looks.clear()
    record = stage_two.Loop.record

    def recording(self, at, **scalars):
        if at == killed:
            raise Killed
        record(self, at, **scalars)

    with monkeypatch.context() as patched:
        patched.setattr(stage_two.Loop, "record", recording)
        with pytest.raises(Killed):
            train(clip, data, tmp_path / "cut")
    assert (sorted(path.name for path in (tmp_path / "cut" / "views").glob("*")) != []) == (killed >= 2)
    resumed, again = train(clip, data, tmp_path / "cut", resume=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert again.curves == loop.curves
    # What no checkpoint had yet is computed twice; the rest once.
    assert once < sum(looks) < once + 2 * 8 + 1
    assert not (tmp_path / "cut" / "views").exists()


def test_rows_of_later_steps_and_broken_ones_are_not_gone_on_with(tmp_path, caplog):
    kept = KeptViews(tmp_path)
    for step, numbers in ((2, [5, 3]), (4, [3, 8]), (6, [9])):
        view = torch.tensor(numbers)
        kept(view, lambda which, view=view: rows_of(view[which]))
        kept.save(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"0-{step}.safetensors" for step in (2, 4, 6)]
    (tmp_path / "0-2.safetensors").write_bytes(b"broken")
    again = KeptViews(tmp_path)
    with caplog.at_level("WARNING", logger="pcmecl_fast"):
        again.load(4, torch.device("cpu"))
    assert "0-2.safetensors is not a whole safetensors file" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["0-4.safetensors"]
    assert len(again) == 1
    assert torch.equal(
        again(torch.tensor([8]), lambda which: pytest.fail("computed again")), rows_of(torch.tensor([8]))
    )


def test_a_run_with_other_views_is_not_resumed(clip, tmp_path, few_faces):
    train(clip, few_faces(), tmp_path)
    with pytest.raises(ValueError, match="belongs to another configuration: --views was 2, is 4"):
        train(clip, few_faces(), tmp_path, resume=True, views=4)
