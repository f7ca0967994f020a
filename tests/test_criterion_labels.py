"""Who is edited to what: names, people outside the bank, conditions that are frames."""

import pytest
import torch
import torch.nn.functional as F
from criteria import E, N, bank_for, sample

from pcmecl_fast import PCMECLCriterion, PersonalizedPrompts, PromptBank
from pcmecl_fast.prompts.bank import condition_of

EMOTIONS = ["neutral", "happy", "sad"]


def named(individual, a, b):
    return (
        [f"person {n}" for n in individual.tolist()],
        [f"emotion {e}" for e in a.tolist()],
        [f"emotion {e}" for e in b.tolist()],
    )


@pytest.fixture(scope="module")
def criterion(clip):
    return PCMECLCriterion(clip, bank_for(clip), contrast=0.3)


@pytest.fixture(scope="module")
def prompts(clip):
    """Learned, as far as anybody can see: h is not 0."""
    prompts = PersonalizedPrompts(clip, EMOTIONS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in prompts.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return prompts.eval()


@pytest.fixture(scope="module")
def faces():
    """Five frames of each of three people."""
    return torch.rand(3, 5, 3, 32, 32, generator=torch.Generator().manual_seed(4)) * 2 - 1


def bank_of(prompts, clip, faces, **options):
    conditions = torch.stack([condition_of(clip, frames) for frames in faces])
    return PromptBank.build(prompts, conditions, ["anna", "ben", "carl"][: len(faces)], EMOTIONS, clip=clip, **options)


# Names


@pytest.mark.parametrize("shape", [(4, 3, 24, 24), (2, 3, 3, 24, 24)])
def test_names_are_the_indices_behind_them(criterion, shape):
    source, edited, *labels = sample(*shape)
    expected = criterion(source, edited, *labels)
    assert criterion(source, edited, *named(*labels)) == expected
    assert criterion(source, edited, *(tuple(names) for names in named(*labels))) == expected
    # Mixed, and flat: a name for each clip of consecutive frames.
    who, shown, asked = named(*labels)
    assert criterion(source, edited, labels[0], shown, labels[2]) == expected
    if len(shape) == 5:
        assert criterion(source.flatten(0, 1), edited.flatten(0, 1), who, shown, asked) == expected


def test_one_name_is_for_all(criterion):
    source, edited, *_ = sample(4, 3, 24, 24)
    all_alike = [torch.full((4,), k) for k in (2, 0, 3)]
    expected = criterion(source, edited, *all_alike)
    assert criterion(source, edited, "person 2", "emotion 0", "emotion 3") == expected
    one = criterion(source[0], edited[0], "person 2", "emotion 0", "emotion 3")
    torch.testing.assert_close(one, criterion(source[:1], edited[:1], *(x[:1] for x in all_alike)))


@pytest.mark.parametrize(
    ("position", "labels", "error", "says"),
    [
        (
            0,
            ["person 1", "preson 2"],
            ValueError,
            r"individual: the bank has no individual 'preson 2' \(did you mean per",
        ),
        (0, "somebody", ValueError, r"'somebody'; criterion.add_individual\(name, frames\) adds one"),
        (
            1,
            "Emotion 1",
            ValueError,
            r"source_emotion: the bank has no emotion 'Emotion 1' \(did you mean emotion 1\?\)",
        ),
        (2, ["joy", "joy"], ValueError, "target_emotion: the bank has no emotion 'joy'; it has emotion 0, emotion 1"),
        (2, ["emotion 1"] * 3, ValueError, r"target_emotion: takes one name per clip or frame of \(2,\), got \(3,\)"),
        (0, ["person 1", 2], TypeError, "individual: got a list of int and str; takes a tensor of integers, a name"),
        (1, 3, TypeError, "source_emotion: got int; takes a tensor of integers, a name, or a list of names"),
        (0, None, ValueError, "individual: got None; takes rows of the bank or names"),
    ],
)
def test_wrong_labels_are_named_with_the_closest_known(criterion, position, labels, error, says):
    source, edited, *given = sample(2, 3, 8, 8)
    given[position] = labels
    with pytest.raises(error, match=says) as caught:
        criterion(source, edited, *given)
    assert "\n" not in str(caught.value)


def test_its_names_are_in_the_order_of_the_indices(criterion):
    assert criterion.individuals == [f"person {n}" for n in range(N)]
    assert criterion.emotions == [f"emotion {e}" for e in range(E)]


# explain


def test_it_explains_each_frame_for_logs(criterion):
    source, edited, individual, a, b = sample(6, 3, 32, 32)
    b[1] = a[1]
    with torch.no_grad():
        explained = criterion.explain(source, edited, *named(individual, a, b))
    assert explained.frames == [0, 2, 3, 4, 5]
    assert explained.asked == [f"emotion {e}" for e in b[explained.frames].tolist()]
    v, edited_v = (F.normalize(criterion.clip.encode_image(x), dim=-1).detach() for x in (source, edited))
    for k, i in enumerate(explained.frames):
        one = slice(i, i + 1)
        alone = criterion(source[one], edited[one], individual[one], a[one], b[one])
        assert explained.losses[k] == pytest.approx(float(alone.detach()), abs=1e-4)
        table = criterion.features[individual[i]]
        cosines = F.cosine_similarity((edited_v - v)[i], table - table[a[i]], dim=-1)
        assert explained.cosines[k] == pytest.approx(float(cosines[b[i]]), abs=1e-4)
        cosines[a[i]] = -2
        assert explained.nearest[k] == f"emotion {int(cosines.argmax())}"
        assert explained.changes[k] == pytest.approx(float((edited_v - v)[i].norm()), rel=1e-4)
    assert sum(explained.losses) / 5 == pytest.approx(explained.loss, rel=1e-5)


def test_its_explanation_is_plain_numbers_for_a_log(criterion):
    source, edited, *labels = sample(3, 3, 16, 16)
    plain = criterion.explain(source, edited, *labels).to_dict()
    assert [sample["frame"] for sample in plain["samples"]] == [0, 1, 2]
    assert plain["cosine"] == pytest.approx(sum(sample["cosine"] for sample in plain["samples"]) / 3)
    assert 0 <= plain["nearest_is_asked"] <= 1
    assert {type(value) for sample in plain["samples"] for value in sample.values()} == {int, float, str}
    silent = criterion.explain(source, edited, labels[0], labels[1], labels[1]).to_dict()
    assert silent["samples"] == []
    assert silent["cosine"] is silent["length"] is silent["nearest_is_asked"] is None


def test_an_edit_that_changes_nothing_is_like_no_change(criterion):
    source, _, *labels = sample(2, 3, 16, 16)
    explained = criterion.explain(source, source.clone(), *labels)
    assert explained.nearest == [None, None]
    assert explained.cosines == [0.0, 0.0]


def test_the_strength_is_in_each_frames_loss(clip):
    source, edited, *labels = sample(4, 3, 16, 16)
    criterion = PCMECLCriterion(clip, bank_for(clip), strength=2.0, lengths=torch.full((E, E), 3.0))
    explained = criterion.explain(source, edited, *labels)
    assert sum(explained.losses) / 4 == pytest.approx(explained.loss, rel=1e-5)


# People outside the bank


@pytest.mark.parametrize("condition", ["individual", "none"])
def test_somebody_added_is_as_if_the_bank_had_them(clip, prompts, faces, condition):
    if condition == "none":
        prompts = PersonalizedPrompts(clip, EMOTIONS, condition=None)
    whole = PCMECLCriterion(clip, bank_of(prompts, clip, faces))
    criterion = PCMECLCriterion(clip, bank_of(prompts, clip, faces[:2]), prompts=prompts)
    bank_before = criterion.features
    assert criterion.add_individual("carl", faces[2]) == 2
    assert criterion.individuals == ["anna", "ben", "carl"]
    torch.testing.assert_close(criterion.features, whole.features)
    assert bank_before.shape[0] == 2
    source, edited, *_ = sample(2, 3, 32, 32)
    labels = ["carl", "ben"], ["neutral", "sad"], "happy"
    torch.testing.assert_close(criterion(source, edited, *labels), whole(source, edited, *labels))


def test_frames_of_somebody_added_are_in_the_criterions_format(clip, prompts, faces):
    bank = bank_of(prompts, clip, faces[:2])
    plain = PCMECLCriterion(clip, bank, prompts=prompts)
    theirs = PCMECLCriterion(clip, bank, prompts=prompts, value_range=(0, 255), channels="bgr")
    plain.add_individual("carl", faces[2])
    theirs.add_individual("carl", (faces[2].flip(1) + 1) * 127.5)
    theirs.add_individual("one frame", (faces[2, 0].flip(0) + 1) * 127.5)
    torch.testing.assert_close(theirs.features[2], plain.features[2], rtol=1e-4, atol=1e-5)


def test_a_name_that_is_there_is_replaced_only_where_asked(clip, prompts, faces):
    bank = bank_of(prompts, clip, faces[:2])
    criterion = PCMECLCriterion(clip, bank, prompts=prompts)
    with pytest.raises(ValueError, match="name: 'ben' is in the bank already; replace=True computes the row again"):
        criterion.add_individual("ben", faces[2])
    before = criterion.features.clone()
    assert criterion.add_individual("ben", faces[2], replace=True) == 1
    assert not torch.allclose(criterion.features[1], before[1])
    assert torch.equal(criterion.features[0], before[0])
    assert torch.equal(bank.features, before)


def test_adding_somebody_between_forward_and_backward_changes_no_gradient(clip, prompts, faces):
    criterion = PCMECLCriterion(clip, bank_of(prompts, clip, faces[:2]), prompts=prompts)
    source, edited, *_ = sample(2, 3, 32, 32)
    labels = "ben", "neutral", "happy"
    (expected,) = torch.autograd.grad(criterion(source, edited, *labels), edited)
    loss = criterion(source, edited, *labels)
    criterion.add_individual("ben", faces[2], replace=True)
    torch.testing.assert_close(torch.autograd.grad(loss, edited)[0], expected)


def test_somebody_added_has_everybodys_mean_lengths(clip, prompts, faces):
    lengths = torch.rand(2, 3, 3) + 0.1
    criterion = PCMECLCriterion(clip, bank_of(prompts, clip, faces[:2]), prompts=prompts, strength=1.0, lengths=lengths)
    criterion.add_individual("carl", faces[2])
    torch.testing.assert_close(criterion.lengths[2], lengths.mean(0))


def test_a_bank_on_disk_gets_rows_in_memory(clip, prompts, faces, tmp_path):
    bank_of(prompts, clip, faces[:2]).save(tmp_path / "bank.safetensors")
    on_disk = PromptBank.load(tmp_path / "bank.safetensors", clip, on_disk=True)
    criterion = PCMECLCriterion(clip, on_disk, prompts=prompts)
    criterion.add_individual("carl", faces[2])
    source, edited, *_ = sample(3, 3, 32, 32)
    labels = ["carl", "ben", "carl"], "neutral", ["happy", "sad", "sad"]
    whole = PCMECLCriterion(clip, bank_of(prompts, clip, faces))
    torch.testing.assert_close(criterion(source, edited, *labels), whole(source, edited, *labels))
    with pytest.raises(ValueError, match="name: the row of 'ben' is on disk, where it stays"):
        criterion.add_individual("ben", faces[2], replace=True)
    with pytest.raises(IndexError, match="individual: got 3 at position 1; takes 0 to 2"):
        criterion(source, edited, torch.tensor([2, 3, 0]), *labels[1:])


def test_rows_are_computed_by_prompts(clip, faces):
    with pytest.raises(
        ValueError, match=r"add_individual: .* PCMECLCriterion.load\(run\) brings them, or pass prompts="
    ):
        PCMECLCriterion(clip, bank_for(clip)).add_individual("ann", faces[0])


def test_prompts_of_another_bank_or_tower_are_refused(clip, other_clip, prompts, faces):
    bank = bank_of(prompts, clip, faces)
    with pytest.raises(ValueError, match="prompts: they are for neutral, joy, sad, the bank for neutral, happy, sad"):
        PCMECLCriterion(clip, bank, prompts=PersonalizedPrompts(clip, ["neutral", "joy", "sad"]))
    with pytest.raises(ValueError, match=r"prompts: made with 'other-face' \(by hand\), not with this clip"):
        PCMECLCriterion(clip, bank, prompts=PersonalizedPrompts(other_clip, EMOTIONS))
    with pytest.raises(ValueError, match="prompts: their condition is None, the bank's 'individual'"):
        PCMECLCriterion(clip, bank, prompts=PersonalizedPrompts(clip, EMOTIONS, condition=None))


# Conditions that are frames


@pytest.fixture(scope="module")
def by_frame(clip, prompts, faces):
    """(with rows for the frames of the first person, with prompts and no row that means anything)"""
    conditions = F.normalize(clip.encode_image(faces[0]), dim=-1).detach()
    keys = [f"frame {k}" for k in range(5)]
    rows = PromptBank.build(prompts, conditions, keys, EMOTIONS, clip=clip, condition="frame")
    none = PromptBank(rows.features[:1], keys[:1], EMOTIONS, tower=rows.tower, condition="frame")
    return PCMECLCriterion(clip, rows, contrast=0.2), PCMECLCriterion(clip, none, prompts=prompts, contrast=0.2)


def test_text_features_of_frames_are_computed_in_the_step(by_frame, faces):
    rows, on_the_fly = by_frame
    _, edited, *_ = sample(5, 3, 32, 32)
    labels = "neutral", ["happy", "sad", "happy", "sad", "neutral"]
    expected = rows(faces[0], edited, [f"frame {k}" for k in range(5)], *labels)
    (gradient,) = torch.autograd.grad(expected, edited)
    loss = on_the_fly(faces[0], edited, None, *labels)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, edited)[0], gradient, rtol=1e-3, atol=1e-5)
    assert on_the_fly(faces[0], edited, "whoever", *labels) == loss
    known = on_the_fly.clip.encode_image(faces[0])
    torch.testing.assert_close(on_the_fly(faces[0], edited, None, *labels, source_features=known), loss)
    assert on_the_fly.explain(faces[0], edited, None, *labels).loss == pytest.approx(loss.item(), abs=1e-5)


def test_one_source_of_a_clip_is_one_run_of_the_prompts(by_frame, faces, monkeypatch):
    rows, on_the_fly = by_frame
    _, edited, *_ = sample(2, 3, 3, 32, 32)
    expected = rows(faces[0, :2], edited, ["frame 0", "frame 1"], "neutral", ["happy", "sad"])
    conditions, forward = [], PersonalizedPrompts.forward
    monkeypatch.setattr(
        PersonalizedPrompts,
        "forward",
        lambda self, condition, **choice: conditions.append(len(condition)) or forward(self, condition, **choice),
    )
    loss = on_the_fly(faces[0, :2], edited, None, "neutral", ["happy", "sad"])
    assert conditions == [2]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_prompts_get_no_gradient_in_a_step(by_frame, faces):
    _, on_the_fly = by_frame
    source, edited, *_ = sample(2, 3, 32, 32)
    on_the_fly(source.requires_grad_(), edited, None, "neutral", "happy").backward()
    assert edited.grad.ne(0).any()
    assert source.grad is None
    assert all(parameter.grad is None for parameter in on_the_fly.prompts.parameters())
    assert not on_the_fly.state_dict()


def test_lengths_of_frames_are_everybodys(clip, prompts, by_frame):
    rows, _ = by_frame
    bank = PromptBank(rows.features, rows.individuals, EMOTIONS, condition="frame")
    with pytest.raises(ValueError, match=r"lengths: takes \(3, 3\) positive numbers, got \(5, 3, 3\)"):
        PCMECLCriterion(clip, bank, prompts=prompts, strength=1.0, lengths=torch.ones(5, 3, 3))
    source, edited, *_ = sample(2, 3, 16, 16)
    shared = PCMECLCriterion(clip, bank, prompts=prompts, strength=1.0, lengths=torch.full((3, 3), 5.0))
    plain = PCMECLCriterion(clip, bank, prompts=prompts)
    labels = None, "neutral", "happy"
    assert 0 < shared(source, edited, *labels) - plain(source, edited, *labels) <= 2
