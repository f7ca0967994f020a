"""PCMECLCriterion: the direction loss on frames, for any model that edits them."""

import logging

import pytest
import torch
import torch.nn.functional as F
from criteria import E, N, bank_for, features, sample
from features import unit_features

from pcmecl_fast import PCMECLCriterion, PromptBank, load_clip, ops
from pcmecl_fast.lengths import personal_lengths, real_lengths
from pcmecl_fast.prompts.bank import Tower
from pcmecl_fast.synthetic import SyntheticFaces


@pytest.fixture(scope="module")
def criterion(clip):
    return PCMECLCriterion(clip, bank_for(clip), contrast=0.3)


def test_it_is_the_direction_loss_of_the_frames_features(clip, criterion):
    source, edited, *labels = sample(5, 3, 40, 40)
    loss = criterion(source, edited, *labels)
    with torch.no_grad():
        expected = ops.direction_loss(
            clip.encode_image(source),
            clip.encode_image(edited),
            features(clip),
            *labels,
            scale=clip.logit_scale,
            contrast=0.3,
        )
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-6)


def test_it_matches_the_formula_spelled_out(clip):
    source, edited, individual, a, b = sample(6, 3, 32, 32)
    scale, contrast = 7.0, 0.5
    loss = PCMECLCriterion(clip, bank_for(clip), scale=scale, contrast=contrast)(source, edited, individual, a, b)
    with torch.no_grad():
        delta = F.normalize(clip.encode_image(edited), dim=-1) - F.normalize(clip.encode_image(source), dim=-1)
    losses = []
    for i, (n, shown, asked) in enumerate(zip(individual.tolist(), a.tolist(), b.tolist(), strict=True)):
        table = features(clip)[n]
        cosine = {e: F.cosine_similarity(delta[i], table[e] - table[shown], dim=0) for e in range(E) if e != shown}
        others = torch.stack([scale * c for c in cosine.values()])
        losses.append(1 - cosine[asked] + contrast * (others.logsumexp(0) - scale * cosine[asked]))
    torch.testing.assert_close(loss.detach(), torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


def test_a_clip_of_frames_is_its_frames(criterion):
    source, edited, individual, a, b = sample(3, 4, 3, 24, 32)
    loss = criterion(source, edited, individual, a, b)
    (gradient,) = torch.autograd.grad(loss, edited)
    each = [criterion(source[:, t], edited[:, t], individual, a, b) for t in range(4)]
    assert loss.ndim == 0
    torch.testing.assert_close(loss, torch.stack(each).mean(), rtol=1e-5, atol=1e-6)
    (expected,) = torch.autograd.grad(torch.stack(each).mean(), edited)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_one_source_frame_of_a_clip_is_encoded_once(clip, criterion, monkeypatch):
    source, edited, *labels = sample(3, 4, 3, 24, 32)
    repeated = source[:, :1].expand_as(source)
    expected = criterion(repeated, edited, *labels)
    encoded, encode = [], clip.encode_image
    monkeypatch.setattr(clip, "encode_image", lambda x, **choice: encoded.append(len(x)) or encode(x, **choice))
    loss = criterion(source[:, 0], edited, *labels)
    assert encoded == [3, 12]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    known = encode(source[:, 0])
    torch.testing.assert_close(criterion(source[:, 0], edited, *labels, source_features=known), loss)


def test_indices_are_per_clip_or_per_frame(criterion):
    source, edited, *labels = sample(3, 4, 3, 24, 32)
    expected = criterion(source, edited, *labels)
    each = [label[:, None].expand(3, 4) for label in labels]
    assert criterion(source, edited, *each) == expected
    in_a_row = source.flatten(0, 1), edited.flatten(0, 1)
    assert criterion(*in_a_row, *labels) == expected
    assert criterion(*in_a_row, *(label.flatten() for label in each)) == expected


@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (2, 3, 3, 32, 32)])
def test_source_features_that_are_known_save_encoding_them(clip, criterion, shape):
    source, edited, *labels = sample(*shape)
    with torch.no_grad():
        known = clip.encode_image(source.flatten(0, -4)).unflatten(0, shape[:-3])
    loss = criterion(source, edited, *labels)
    nan = torch.full_like(source, torch.nan)  # never read
    torch.testing.assert_close(criterion(nan, edited, *labels, source_features=known), loss)


def test_gradients_reach_the_edited_frames_and_nothing_else(clip, criterion):
    source, edited, *labels = sample(4, 3, 32, 32)
    source.requires_grad_()
    criterion(source, edited, *labels).backward()
    assert source.grad is None
    assert edited.grad.isfinite().all()
    assert edited.grad.flatten(1).norm(dim=1).gt(0).all()
    assert all(parameter.grad is None for parameter in clip.parameters())
    assert not criterion.features.requires_grad

    known = clip.encode_image(source.detach()).requires_grad_()
    criterion(source, edited, *labels, source_features=known).backward()
    assert known.grad is None


def test_a_target_equal_to_the_source_emotion_contributes_nothing(criterion):
    source, edited, individual, a, b = sample(6, 3, 32, 32)
    b[1:4] = a[1:4]
    criterion(source, edited, individual, a, b).backward()
    assert edited.grad[1:4].eq(0).all()
    assert edited.grad[[0, 4, 5]].flatten(1).norm(dim=1).gt(0).all()
    kept = torch.tensor([0, 4, 5])
    torch.testing.assert_close(
        criterion(source, edited, individual, a, b),
        criterion(source[kept], edited[kept], individual[kept], a[kept], b[kept]),
        rtol=1e-5,
        atol=1e-6,
    )
    loss = criterion(source, edited, individual, a, a)
    assert loss == 0
    assert torch.autograd.grad(loss, edited)[0].eq(0).all()


@pytest.mark.parametrize(("min_change", "moves"), [(0.0, False), (0.1, True)])
def test_an_edit_that_changes_nothing_is_finite_and_told_where_to_go(clip, min_change, moves):
    source, _, *labels = sample(4, 3, 32, 32)
    edited = source.clone().requires_grad_()
    loss = PCMECLCriterion(clip, bank_for(clip), min_change=min_change)(source, edited, *labels)
    loss.backward()
    assert loss == 1
    assert edited.grad.isfinite().all()
    assert edited.grad.flatten(1).norm(dim=1).gt(0).eq(moves).all()


def test_near_the_identity_its_gradient_is_calm_and_followed_it_learns(clip, criterion):
    source, _, *labels = sample(4, 3, 32, 32)
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(2))
    norms = {}
    for size in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1):
        edited = (source + size * noise).requires_grad_()
        (gradient,) = torch.autograd.grad(criterion(source, edited, *labels), edited)
        norms[size] = float(gradient.norm())
    assert max(norms.values()) < 10 * min(norms.values())

    edited = source.clone().requires_grad_()
    optimizer = torch.optim.Adam([edited], 1e-3)
    losses = []
    for _ in range(20):
        loss = criterion(source, edited, *labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("size", [(1, 1), (17, 91), (65, 33), (130, 128)])
def test_any_height_and_width_is_accepted(criterion, size):
    source, edited, *labels = sample(2, 3, *size)
    loss = criterion(source, edited, *labels)
    loss.backward()
    assert loss.isfinite()
    assert edited.grad.isfinite().all()


def test_following_its_gradient_lowers_it(criterion):
    source, edited, *labels = sample(4, 3, 32, 32)
    optimizer = torch.optim.Adam([edited], lr=0.02)
    losses = []
    for _ in range(8):
        loss = criterion(source, edited, *labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


def test_autocast_runs_and_stays_close(criterion):
    source, edited, *labels = sample(4, 3, 32, 32)
    exact = criterion(source, edited, *labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(source, edited, *labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.1, atol=0.1)


def test_it_compiles_into_one_graph(criterion):
    inputs = sample(2, 3, 32, 32)
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), criterion(*inputs), rtol=1e-5, atol=1e-6)


def test_its_state_is_not_the_frozen_clip(clip):
    model = torch.nn.ModuleDict(
        {"generator": torch.nn.Linear(2, 2), "criterion": PCMECLCriterion(clip, bank_for(clip))}
    )
    state = model.state_dict()
    assert set(state) == {"generator.weight", "generator.bias"}
    assert model.load_state_dict(state, strict=True).missing_keys == []
    assert not list(model["criterion"].parameters())


def test_the_clip_moves_with_it(clip):
    own = load_clip()
    criterion = PCMECLCriterion(own, bank_for(clip)).to(torch.bfloat16)
    assert criterion.clip is own
    assert own.dtype == criterion.features.dtype == torch.bfloat16
    assert own.text_hash() == clip.text_hash()


@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (0, 4, 3, 32, 32), (2, 0, 3, 32, 32)])
def test_no_frames_cost_nothing_and_have_a_graph(criterion, shape):
    source, edited = torch.zeros(shape), torch.zeros(shape, requires_grad=True)
    labels = [torch.zeros(shape[0], dtype=torch.long)] * 3
    loss = criterion(source, edited, *labels)
    loss.backward()
    assert loss.shape == ()
    assert loss == 0
    assert edited.grad.shape == shape


def test_the_bank_is_neither_trained_nor_saved_with_a_model(clip):
    criterion = PCMECLCriterion(clip, bank_for(clip))
    assert not [p for p in criterion.parameters() if p.requires_grad]
    assert "features" not in criterion.state_dict()
    assert "features" in dict(criterion.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bank_on_disk_stays_there(clip, tmp_path, dtype):
    in_memory = bank_for(clip, dtype=dtype)
    in_memory.save(tmp_path / "bank.safetensors")
    on_disk = PCMECLCriterion(clip, PromptBank.load(tmp_path / "bank.safetensors", clip, on_disk=True))
    assert on_disk.features.shape[0] == 0
    source, edited, *labels = sample(6, 3, 32, 32)
    expected = PCMECLCriterion(clip, in_memory.to(dtype=torch.float32))(source, edited, *labels)
    torch.testing.assert_close(on_disk(source, edited, *labels), expected)
    with pytest.raises(IndexError, match="individual: takes 0 to 3, got"):
        on_disk(source, edited, labels[0] + 4, *labels[1:])


def test_a_half_precision_clip_accepts_a_float32_bank(clip):
    half = load_clip(dtype=torch.bfloat16)
    source, edited, *labels = sample(3, 3, 32, 32)
    loss = PCMECLCriterion(half, bank_for(clip))(source, edited, *labels)
    torch.testing.assert_close(loss, PCMECLCriterion(clip, bank_for(clip))(source, edited, *labels), rtol=0.1, atol=0.1)


# How far edits should go


def test_strength_penalizes_the_shortfall_from_a_length(clip):
    bank, (source, edited, individual, a, b) = bank_for(clip), sample(6, 3, 32, 32)
    b[5] = a[5]
    lengths = torch.rand(E, E) + 0.05
    labels = individual, a, b
    plain = PCMECLCriterion(clip, bank)(source, edited, *labels)
    found = PCMECLCriterion(clip, bank, strength=0.7, lengths=lengths)(source, edited, *labels)
    with torch.no_grad():
        change = F.normalize(clip.encode_image(edited), dim=-1) - F.normalize(clip.encode_image(source), dim=-1)
    lacking = []
    for k in range(5):  # the last requests no change
        direction = F.normalize(bank.features[individual[k], b[k]] - bank.features[individual[k], a[k]], dim=0)
        lacking.append(max(0.0, 1 - float(change[k] @ direction) / float(lengths[a[k], b[k]])))
    assert abs((found - plain).item() - 0.7 * sum(lacking) / 5) < 1e-4


def test_edits_that_go_far_enough_cost_nothing(clip):
    bank, (source, edited, *labels) = bank_for(clip), sample(3, 3, 32, 32)
    unchanged = PCMECLCriterion(clip, bank, strength=2.0, lengths=torch.full((E, E), 0.3))
    without = PCMECLCriterion(clip, bank)
    torch.testing.assert_close(unchanged(source, source, *labels) - without(source, source, *labels), torch.tensor(2.0))
    # Along its own change every edit goes the full length.
    with torch.no_grad():
        before, after = (F.normalize(clip.encode_image(x), dim=-1) for x in (source, edited))
    rows = torch.stack([before, after], dim=1)
    own = PromptBank(rows, ["p", "q", "r"], ["before", "after"], tower=Tower.of(clip))
    labels = torch.arange(3), torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long)
    lengths = (after - before).norm(dim=1).min().expand(2, 2)
    far = PCMECLCriterion(clip, own, strength=2.0, lengths=0.999 * lengths)(source, edited, *labels)
    torch.testing.assert_close(far, PCMECLCriterion(clip, own)(source, edited, *labels))


def test_real_lengths_are_those_of_the_data(clip):
    faces = SyntheticFaces(3, emotions=["neutral", "happy", "sad"], clips=1, frames_per_clip=2, missing=[(1, 2)])
    seen = unit_features(clip, faces)
    text = F.normalize(torch.randn(3, 3, clip.embed_dim, generator=torch.Generator().manual_seed(3)), dim=-1)
    # A mix of random directions and the data's, so that most changes follow them.
    for n in range(3):
        for e in range(3):
            of = (faces.individual_index == n) & (faces.emotion_index == e)
            text[n, e] = text[n, e] * 0.1 + (seen[of].mean(0) if of.any() else 0)
    bank = PromptBank(text, faces.individuals, faces.emotions, tower=Tower.of(clip))
    found = real_lengths(seen, faces, bank)
    along = {}
    for i in range(len(faces)):
        n, a = int(faces.individual_index[i]), int(faces.emotion_index[i])
        for b in range(3):
            of = (faces.individual_index == n) & (faces.emotion_index == b)
            if b != a and of.any():
                direction = F.normalize(text[n, b] - text[n, a], dim=0)
                along.setdefault((a, b), []).append(float((seen[of].mean(0) - seen[i]) @ direction))
    for (a, b), lengths in along.items():
        assert abs(float(found[a, b]) - sum(lengths) / len(lengths)) < 1e-5
    assert (found > 0).all()


def test_personal_lengths_are_each_ones_own(clip):
    emotions = ["neutral", "happy", "sad"]
    faces = SyntheticFaces(3, emotions=emotions, clips=1, frames_per_clip=2, missing=[(1, 2)])
    seen = unit_features(clip, faces)
    text = F.normalize(torch.randn(3, 3, clip.embed_dim, generator=torch.Generator().manual_seed(3)), dim=-1)
    means = torch.zeros(3, 3, clip.embed_dim)
    for n in range(3):
        for e in range(3):
            of = (faces.individual_index == n) & (faces.emotion_index == e)
            means[n, e] = seen[of].mean(0) if of.any() else 0
    text = 0.1 * text + means
    # The bank has its own order, and a person without frames.
    order = [2, 0, 1]
    names = [faces.individuals[n] for n in order]
    bank = PromptBank(torch.cat([text[order], text[:1]]), [*names, "stranger"], emotions, tower=Tower.of(clip))
    everybody, found = real_lengths(seen, faces, bank), personal_lengths(seen, faces, bank)
    for row, n in enumerate(order):
        ratios = []
        for a in range(3):
            for b in range(3):
                if a == b or (n == 1 and 2 in (a, b)):
                    continue
                own = float((means[n, b] - means[n, a]) @ F.normalize(text[n, b] - text[n, a], dim=0))
                assert own > 0
                ratios.append(own / float(everybody[a, b]))
                assert abs(float(found[row, a, b]) - max(own, float(everybody[a, b]) / 5)) < 1e-5
        if n == 1:  # a change she does not show: scaled from everyone's like those she does
            lacking = everybody[0, 2] * sum(ratios) / len(ratios)
            torch.testing.assert_close(found[row, 0, 2], lacking)
    torch.testing.assert_close(found[3], everybody)


def test_everybody_with_the_same_lengths_is_everybodys(clip):
    source, edited, *labels = sample(5, 3, 32, 32)
    bank = bank_for(clip)
    shared = torch.rand(E, E, generator=torch.Generator().manual_seed(1)) + 0.1
    each = shared.repeat(len(bank.individuals), 1, 1)
    losses = [PCMECLCriterion(clip, bank, strength=2.0, lengths=x)(source, edited, *labels) for x in (shared, each)]
    torch.testing.assert_close(*losses)
    each[int(labels[0][0])] *= 0.1
    assert PCMECLCriterion(clip, bank, strength=2.0, lengths=each)(source, edited, *labels) != losses[0]


def test_personal_lengths_need_a_bank_of_individuals(clip):
    faces = SyntheticFaces(2, emotions=["neutral", "happy"], clips=1, frames_per_clip=1)
    text = F.normalize(torch.randn(4, 2, clip.embed_dim), dim=-1)
    bank = PromptBank(text, faces.keys, faces.emotions, tower=Tower.of(clip), condition="frame")
    with pytest.raises(ValueError, match="bank: has a row for each frame"):
        personal_lengths(unit_features(clip, faces), faces, bank)


@pytest.mark.parametrize("lengths", [torch.ones(E, E - 1), torch.zeros(E, E), torch.ones(1, 2, E, E)])
def test_lengths_are_positive_and_of_every_pair(clip, lengths):
    with pytest.raises(ValueError, match="lengths: takes"):
        PCMECLCriterion(clip, bank_for(clip), strength=1.0, lengths=lengths)


def test_strength_needs_lengths(clip):
    with pytest.raises(ValueError, match="lengths: required when strength is not 0"):
        PCMECLCriterion(clip, bank_for(clip), strength=1.0)


# Bad arguments


def test_a_bank_of_another_tower_is_rejected(clip, other_clip):
    with pytest.raises(ValueError, match=r"bank: made with 'other-face' \(by hand\), not with this clip"):
        PCMECLCriterion(clip, bank_for(other_clip))


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"edited": torch.zeros(2, 3, 8)}, ValueError, r"edited_frames: takes \(B, 3, H, W\) or .*got \(2, 3, 8\)"),
        ({"edited": torch.zeros(2, 1, 8, 8)}, ValueError, r"edited_frames: takes .*got \(2, 1, 8, 8\)"),
        ({"source": torch.zeros(3, 3, 8, 8)}, ValueError, r"source_frames: takes as many frames as edited_frames"),
        ({"source": torch.zeros(2, 2, 3, 8, 8)}, ValueError, "source_frames: takes as many frames as edited_frames"),
        (
            {"individual": torch.zeros(3).long()},
            ValueError,
            r"individual: takes one index per clip or frame of \(2,\), got \(3,\)",
        ),
        ({"individual": torch.tensor([0, N])}, IndexError, "individual: got 4 at position 1; takes 0 to 3"),
        ({"a": torch.tensor([-1, 0])}, IndexError, "source_emotion: got -1 at position 0; takes 0 to 4"),
        ({"b": torch.tensor([0, E])}, IndexError, "target_emotion: got 5 at position 1; takes 0 to 4"),
        ({"b": torch.zeros(2)}, TypeError, "target_emotion: got torch.float32; takes an integer"),
        ({"source_features": torch.zeros(3, 128)}, ValueError, r"source_features: takes \(2, 128\), got \(3, 128\)"),
        ({"source_features": torch.zeros(2, 64)}, ValueError, r"source_features: takes \(2, 128\), got \(2, 64\)"),
    ],
)
def test_a_wrong_argument_is_named(criterion, wrong, error, says):
    arguments = dict(zip(("source", "edited", "individual", "a", "b"), sample(2, 3, 8, 8), strict=True)) | wrong
    known = arguments.pop("source_features", None)
    with pytest.raises(error, match=says):
        criterion(*arguments.values(), source_features=known)


def test_frames_of_numpy_are_refused(criterion):
    arguments = list(sample(2, 3, 8, 8))
    arguments[1] = arguments[1].detach().numpy()
    with pytest.raises(TypeError, match="edited_frames: got ndarray; takes a tensor"):
        criterion(*arguments)


@pytest.mark.parametrize("name", ["contrast", "strength", "min_change"])
def test_weights_below_0_are_refused(clip, name):
    with pytest.raises(ValueError, match=f"{name}: got -0.5; takes a number of at least 0"):
        PCMECLCriterion(clip, bank_for(clip), **{name: -0.5})


def test_it_says_what_it_is(criterion):
    assert "tiny-face (built-in), a bank of 4 × 5 × 128, contrast=0.3, scale=" in repr(criterion)


@pytest.mark.parametrize("which", [0, 1])
def test_frames_of_integers_are_refused(criterion, which):
    arguments = list(sample(2, 3, 8, 8))
    arguments[which] = torch.zeros(2, 3, 8, 8, dtype=torch.int64)
    name = ("source_frames", "edited_frames")[which]
    with pytest.raises(TypeError, match=rf"{name}: got torch.int64; takes floats, RGB in \[-1, 1\], or uint8"):
        criterion(*arguments)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: (x + 1) * 127.5, "takes RGB in [-1, 1]: if these are in [0, 255], make frames / 127.5 - 1 or pass"),
        (lambda x: x * 2, "takes RGB in [-1, 1]: CLIP's mean and deviation belong to the criterion"),
        (lambda x: (x + 1) / 2, "takes RGB in [-1, 1]: if these are in [0, 1], make frames * 2 - 1"),
        (lambda x: x * torch.nan, "there are NaN among the frames"),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_frames_that_look_wrong_are_pointed_out_once(clip, caplog, which, change, says):
    criterion = PCMECLCriterion(clip, bank_for(clip))
    arguments = list(sample(2, 3, 16, 16))
    with caplog.at_level(logging.WARNING):
        criterion(*arguments)
        assert not caplog.records
        arguments[which] = change(arguments[which])
        for _ in range(3):
            criterion(*arguments)
    (record,) = caplog.records
    assert record.getMessage().startswith(("source_frames: ", "edited_frames: ")[which])
    assert says in record.getMessage()


def test_rounding_and_known_features_are_not_pointed_out(clip, criterion, caplog):
    source, edited, *labels = sample(2, 3, 16, 16)
    with caplog.at_level(logging.WARNING):
        criterion(1.04 * source, 1.04 * edited, *labels)
        criterion(source * 9, edited, *labels, source_features=clip.encode_image(source))
    assert not caplog.records


@pytest.mark.parametrize("name", ["individual", "source_emotion", "target_emotion"])
@pytest.mark.parametrize("wrong", [(4,), (6,), (2, 2), (2, 3, 1), ()])
def test_indices_of_neither_clips_nor_frames_are_refused(criterion, name, wrong):
    source, edited, *labels = sample(2, 3, 3, 8, 8)
    position = ("individual", "source_emotion", "target_emotion").index(name)
    labels[position] = torch.zeros(wrong, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=rf"{name}: takes one index per clip or frame of \(2, 3\), got \({wrong and wrong[0]}"
    ):
        criterion(source, edited, *labels)


# explain


def test_it_explains_how_strong_it_is_beside_other_losses(criterion):
    source, edited, individual, a, b = sample(6, 3, 32, 32)
    b[1] = a[1]
    anything = edited * 1.0
    others = {"identity": (anything - source).abs().mean(), "PCMECL": 3 * anything.sum()}
    explained = criterion.explain(source, anything, individual, a, b, beside=others)
    loss = criterion(source, edited, individual, a, b)
    assert explained.loss == pytest.approx(float(loss))
    assert explained.gradient == pytest.approx(float(torch.autograd.grad(loss, edited)[0].norm()), rel=1e-4)
    assert explained.beside["PCMECL"] == pytest.approx(3 * edited.numel() ** 0.5)
    assert len(explained.changes) == 5
    assert all(0 < change < 2 for change in explained.changes)
    assert f"PCMECL: gradient {explained.beside['PCMECL']:.3g}, as strong at a weight of" in str(explained)
    (others["identity"] + others["PCMECL"]).backward()  # their graphs are still there


def test_it_explains_frames_that_need_no_gradient(criterion):
    source, edited, *labels = sample(2, 3, 16, 16)
    with torch.no_grad():
        explained = criterion.explain(source, edited.detach(), *labels)
    assert explained.gradient > 0
    assert "below min_change 0.1" in str(explained)
    with pytest.raises(ValueError, match="beside: 'other' does not depend on edited_frames"):
        criterion.explain(source, edited, *labels, beside={"other": source.requires_grad_().sum()})
    with pytest.raises(ValueError, match=r"edited_frames: got .*; there is nothing to explain"):
        criterion.explain(source[:0], edited[:0], *(label[:0] for label in labels))
