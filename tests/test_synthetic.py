"""Drawn talking faces: functions of their parameters, so any frame can be redrawn with another emotion."""

import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pcmecl_fast.data.base import check_trainable
from pcmecl_fast.data.emotions import EMOTIONS
from pcmecl_fast.data.splits import split
from pcmecl_fast.synthetic import (
    ACTION_UNITS,
    IDENTITY_LENGTH,
    SPEECH_SPANS,
    SyntheticFaces,
    draw,
    speech_difference,
)
from pcmecl_fast.synthetic import faces as faces_module
from pcmecl_fast.synthetic.people import VISEMES, emotion_action_units, personal_action_units, speech_track


def faces(individuals=3, **kwargs):
    return SyntheticFaces(individuals, **{"clips": 1, "frames_per_clip": 2, "size": 32} | kwargs)


def every(data):
    return data.frames(range(len(data)))


def position(data, key):
    return data.keys.index(key)


# Frames


def test_the_same_seed_draws_the_same_people_and_frames():
    torch.manual_seed(1)
    first = every(faces(seed=3))
    torch.manual_seed(2)
    assert torch.equal(every(faces(seed=3)), first)
    other = faces(seed=4)
    assert (every(other) - first).abs().mean() > 0.05
    assert not set(other.individuals) & set(faces(seed=3).individuals)


def test_a_frame_does_not_depend_on_those_drawn_with_it():
    data = faces()
    together = every(data)
    chosen = [7, 0, 7, 30]
    torch.testing.assert_close(data.frames(chosen), together[chosen], rtol=0, atol=1e-6)
    torch.testing.assert_close(data[7]["frame"], together[7], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 20, 33, 64])
def test_frames_are_pictures_of_the_requested_size(size):
    data = faces(2, size=size)
    frames = every(data)
    assert frames.shape == (28, 3, size, size)
    assert frames.dtype == torch.float32
    assert frames.isfinite().all()
    assert frames.abs().max() <= 1


def test_a_larger_size_is_the_same_face_in_more_detail():
    large, small = faces(size=64), faces(size=32)
    halved = torch.nn.functional.avg_pool2d(every(large), 2)
    assert (halved - every(small)).abs().mean() < 0.06


def test_people_differ_more_than_frames_of_one():
    data = faces(4, emotions=["neutral"], frames_per_clip=4)
    frames = every(data).unflatten(0, (4, 4))
    within = (frames[:, 0] - frames[:, 1]).abs().mean()
    between = (frames[:-1, 0] - frames[1:, 0]).abs().mean()
    assert between > 3 * within


def test_indices_are_read_as_in_every_data_set():
    data = faces()
    mask = torch.zeros(len(data), dtype=torch.bool)
    mask[[2, 5]] = True
    assert torch.equal(data.frames(mask), data.frames([2, 5]))
    torch.testing.assert_close(data.frames([-1]), data.frames([len(data) - 1]), rtol=0, atol=1e-6)
    assert data.frames([]).shape == (0, 3, 32, 32)
    with pytest.raises(IndexError, match=f"indices: {len(data)} is out of range"):
        data.frames([len(data)])
    with pytest.raises(TypeError, match="indices: takes integers"):
        data.frames([0.5])


def test_stamps_change_with_the_parameters_the_size_and_every_file_that_determines_the_pixels(tmp_path, monkeypatch):
    stamps = faces().stamps()
    assert faces().stamps() == stamps
    assert not set(faces(seed=1).stamps() + faces(size=16).stamps()) & set(stamps)
    sources = faces_module.SOURCES
    decide = (draw, personal_action_units, SyntheticFaces)
    assert set(sources) == {Path(inspect.getsourcefile(each)) for each in decide}
    for source in sources:
        changed = tmp_path / source.name
        changed.write_bytes(source.read_bytes() + b"# changed")
        with monkeypatch.context() as patched:
            patched.setattr(faces_module, "SOURCES", [changed if path == source else path for path in sources])
            assert not set(faces().stamps()) & set(stamps), source.name


# Labels


def test_every_individual_shows_every_emotion_in_clips_of_frames():
    data = faces(2, clips=3, frames_per_clip=4, emotions=["sad", "happy"])
    assert len(data) == 2 * 2 * 3 * 4
    assert data.emotions == ["sad", "happy"]
    assert data.available().all()
    assert len(set(data.keys)) == len(data)
    assert data.keys[-1] == "person-0-001/happy/clip-02#3"
    assert data.individual_index.tolist() == [0] * 24 + [1] * 24
    assert data.emotion_index.tolist() == ([0] * 12 + [1] * 12) * 2


def test_what_is_missing_is_left_out_and_changes_no_other_frame():
    whole, some = faces(), faces(missing=[(0, 1), (2, 6)])
    assert len(some) == len(whole) - 4
    expected = torch.ones(3, 7, dtype=torch.bool)
    expected[0, 1] = expected[2, 6] = False
    assert torch.equal(some.available(), expected)
    kept = [position(whole, key) for key in some.keys]
    torch.testing.assert_close(every(some), whole.frames(kept), rtol=0, atol=1e-6)
    assert torch.equal(some.emotion_index, whole.emotion_index[kept])


def test_a_subset_is_a_view_that_keeps_names_and_indices():
    data = faces()
    view = data.subset([5, 3, 30])
    assert view.keys == [data.keys[i] for i in (5, 3, 30)]
    torch.testing.assert_close(view.frames([2, 0]), data.frames([30, 5]), rtol=0, atol=1e-6)
    assert (view.individuals, view.emotions) == (data.individuals, data.emotions)
    assert view.available().sum() == 3


def test_it_splits_and_trains_like_any_data_set():
    data = faces(5)
    train, held = split(data, by="individual")
    assert len(train) + len(held) == len(data)
    check_trainable(train)


# Truth


def test_the_truth_for_its_own_emotion_is_the_frame():
    data = faces(frames_per_clip=6)
    index = torch.arange(len(data))
    assert torch.equal(data.truth(index, data.emotion_index), data.frames(index))


def test_the_truth_changes_the_expression_and_keeps_person_speech_pose_light_and_noise(monkeypatch):
    data = faces(frames_per_clip=6)
    drawn = []
    monkeypatch.setattr(
        faces_module, "draw", lambda who, what, size: drawn.append((who, what)) or torch.zeros(len(what), 3, size, size)
    )
    index = torch.tensor([0, 9, 40])
    data.truth(index, data.emotion_index[index])  # the frames themselves, by a test above
    data.truth(index, torch.tensor([4, 6, 2]))
    (who, before), (who_then, after) = drawn
    assert who is who_then
    for name in ("individual", "speech", "pose", "light", "blink", "noise"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    assert not torch.equal(before.action_units, after.action_units)


def test_the_truth_differs_in_the_face_and_nowhere_else():
    data = faces(6, frames_per_clip=3, size=64)
    index = (data.emotion_index == 0).nonzero()[:, 0].repeat_interleave(6)
    target = torch.arange(1, 7).repeat(len(index) // 6)
    change = (data.truth(index, target) - data.frames(index)).abs().amax(1)
    assert change.flatten(1).amax(1).min() > 0.3  # every edit shows
    share = change.gt(0.05).float().mean((1, 2))
    assert share.max() < 0.25
    # Whatever the head's size and pose, no face reaches these regions: above, and to both sides.
    border = torch.zeros(64, 64, dtype=torch.bool)
    border[:8], border[:, :10], border[:, -10:] = True, True, True
    assert change[:, border].eq(0).all()


def test_the_truth_rejects_what_frames_rejects():
    data = faces()
    with pytest.raises(IndexError):
        data.truth([len(data)], torch.tensor([0]))


# Action units


def test_action_units_follow_the_formula():
    data = faces(3, frames_per_clip=1)
    who = data.identities
    prototypes = emotion_action_units()
    read = data.parameters.action_units
    for i in range(len(data)):
        n, e = int(data.individual_index[i]), int(data.emotion_index[i])
        for unit in range(len(ACTION_UNITS)):
            base = data.intensity[i] * prototypes[e, unit] * who.gain[n, unit]
            torch.testing.assert_close(read[i, unit, 0], base * (1 + who.asymmetry[n, unit]))
            torch.testing.assert_close(read[i, unit, 1], base * (1 - who.asymmetry[n, unit]))
    assert torch.equal(data.true_action_units(torch.arange(len(data)), data.emotion_index), read)


def test_prototypes_tell_the_emotions_apart():
    prototypes = emotion_action_units()
    assert prototypes.shape == (len(EMOTIONS), len(ACTION_UNITS))
    assert prototypes[EMOTIONS.index("neutral")].eq(0).all()
    assert (prototypes >= 0).all()
    assert (prototypes <= 1).all()
    apart = torch.cdist(prototypes, prototypes) + 9 * torch.eye(len(EMOTIONS))
    assert apart.min() > 0.5


def test_styles_are_personal_and_without_them_everyone_is_alike():
    personal = faces(4).identities
    assert (personal.gain[0] / personal.gain[1]).log().abs().mean() > 0.1
    assert personal.asymmetry.abs().max() > 0.2
    alike = faces(4, style=0).identities
    assert alike.gain.eq(1).all()
    assert alike.asymmetry.eq(0).all()
    # The people themselves are the same.
    assert alike.vector().shape == (4, IDENTITY_LENGTH)
    assert torch.equal(alike.vector(), personal.vector())
    every_emotion = torch.arange(7)
    units = [personal_action_units(alike, torch.full((7,), n), every_emotion, torch.full((7,), 0.8)) for n in range(4)]
    assert all(torch.equal(units[0], other) for other in units)
    torch.testing.assert_close(units[0].mean(-1), 0.8 * emotion_action_units())


def test_intensities_stay_in_their_range():
    data = faces(intensity=(0.3, 0.4))
    assert data.intensity.min() >= 0.3
    assert data.intensity.max() <= 0.4
    stronger = faces(intensity=(0.9, 1.0))
    assert stronger.parameters.action_units.sum() > 2 * data.parameters.action_units.sum()


def test_speech_is_smooth_and_in_range():
    track = speech_track(400, torch.Generator().manual_seed(0))
    assert track.shape == (400, 2)
    assert track[:, 0].min() >= 0
    assert track.abs().max() <= 1
    assert track[:, 0].std() > 0.1
    assert (track[1:] - track[:-1]).abs().max() < 1


def test_differences_of_speech_are_fractions_of_the_range():
    speech = torch.tensor(list(VISEMES.values()))
    least, most = speech.amin(0), speech.amax(0)
    torch.testing.assert_close(most - least, torch.tensor(SPEECH_SPANS))
    assert speech_difference(most, least).tolist() == [1, 1]
    assert speech_difference(speech, speech).eq(0).all()


def test_the_mouth_follows_the_speech_and_nothing_else_does():
    data = faces(6, emotions=["neutral"], frames_per_clip=1, size=64)

    def saying(viseme):
        speech = torch.tensor([VISEMES[viseme]]).expand(6, 2)
        return draw(data.identities, replace(data.parameters, speech=speech), 64)

    silent = saying("m")
    for viseme in ("ah", "oo", "ee"):
        change = (saying(viseme) - silent).abs().amax(1)
        assert change.flatten(1).amax(1).min() > 0.3
        assert change[:, :30].eq(0).all()  # eyes, brows and hair
        assert change.gt(0.05).float().mean((1, 2)).max() < 0.15


# Bad arguments


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"emotions": ["happy", "bored"]}, r"emotions: \['bored'\] cannot be drawn; takes names from \['neutral'"),
        ({"emotions": []}, "emotions: takes a sequence of different names, at least one, got"),
        ({"emotions": ["sad", "sad"]}, "emotions: takes a sequence of different names"),
        ({"emotions": "sad"}, "emotions: takes a sequence of different names, at least one, got 'sad'"),
        ({"individuals": 0}, "individuals, clips, frames_per_clip and size: each must be at least 1"),
        ({"clips": 0}, "each must be at least 1"),
        ({"frames_per_clip": 0}, "each must be at least 1"),
        ({"size": 0}, "each must be at least 1"),
        (
            {"individuals": 1, "emotions": ["sad"], "missing": [(0, 0)]},
            "missing: leaves out every .*; nothing remains to draw",
        ),
    ],
)
def test_a_wrong_argument_is_named(kwargs, says):
    with pytest.raises(ValueError, match=says):
        faces(**kwargs)
