"""Fréchet distance and mean cosine: closed forms, the authors' values, and statistics that come in parts."""

import numpy as np
import pytest
import torch

from pcmecl_fast.evaluate.distances import RunningStatistics, csim, frechet_distance


def normal(count, width, seed):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, width)))


def white(count, width, seed):
    """Features of mean 0 and covariance 1, to rounding."""
    around = normal(count, width, seed)
    around = around - around.mean(0)
    return torch.linalg.qr(around)[0] * (count - 1) ** 0.5


def test_the_distance_of_axis_aligned_normals_is_the_closed_form():
    first, second = torch.tensor([0.5, 1.0, 3.0, 0.0]), torch.tensor([2.0, 1.0, 0.25, 1.5])
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5])
    a, b = white(50, 4, 0) * first, white(70, 4, 1) * second + shift
    closed = shift.square().sum() + (first - second).square().sum()  # σ₁² + σ₂² − 2 σ₁ σ₂ along each axis
    assert frechet_distance(a, b) == pytest.approx(float(closed), rel=1e-10)


def test_the_distance_is_that_of_the_papers_scripts():
    mixed = normal(64, 64, 6)
    a, b = normal(800, 64, 5) @ mixed, normal(900, 64, 7) @ mixed.T + 1
    assert frechet_distance(a, b) == pytest.approx(2241.278708413356, rel=1e-9)
    assert frechet_distance(a.float(), b.float()) == pytest.approx(2241.278708413356, rel=1e-5)


def test_fewer_frames_than_features_have_a_distance_too():
    # The scripts' root of a singular product has an imaginary part, and they give up.
    a, b = normal(20, 100, 0), normal(30, 100, 1)
    apart = frechet_distance(a, b)
    assert apart == pytest.approx(frechet_distance(b, a), rel=1e-9)
    padded = [torch.nn.functional.pad(x, (0, 28)) for x in (a, b)]
    assert apart == pytest.approx(frechet_distance(*padded), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_statistics_in_parts_are_those_of_the_whole(tmp_path):
    features = normal(101, 8, 2) * 3 + 1000
    parts = [RunningStatistics(8), RunningStatistics(8), RunningStatistics(8)]
    parts[0].add(features[:1])
    parts[0].add(features[1:40])
    parts[1].add(features[40:])
    parts[0].save(tmp_path / "first.safetensors")
    whole = RunningStatistics.load(tmp_path / "first.safetensors")
    whole.merge(parts[2])  # has taken nothing
    whole.merge(parts[1])
    assert whole.count == 101
    np.testing.assert_allclose(whole.mean, features.mean(0), rtol=1e-13)
    np.testing.assert_allclose(whole.covariance(), np.cov(features.T), rtol=1e-11)
    assert frechet_distance(whole, features) == pytest.approx(0, abs=1e-9)


def test_frames_without_a_face_are_not_taken_for_features():
    features = normal(5, 3, 0)
    features[2] = torch.nan
    with pytest.raises(ValueError, match="some are not finite; leave out the frames without a face"):
        frechet_distance(features, features)
    with pytest.raises(ValueError, match="a: some features are not finite"):
        csim(features, normal(5, 3, 0))


@pytest.mark.parametrize(
    ("count", "width", "says"),
    [(1, 3, "a covariance takes at least 2 frames; got 1"), (4, 5, "a and b: have 5 and 3 features")],
)
def test_what_has_no_distance_is_said(count, width, says):
    with pytest.raises(ValueError, match=says):
        frechet_distance(normal(count, width, 0), normal(4, 3, 1))


def test_csim_is_the_mean_cosine_over_all_pairs():
    a, b = normal(7, 5, 0) + 1, normal(4, 5, 1) - 0.3
    pairs = torch.cosine_similarity(a[:, None], b[None], dim=2)
    assert csim(a, b) == pytest.approx(float(pairs.mean()), rel=1e-12)
    assert csim(a, -3 * a[:1]) == pytest.approx(-csim(a, a[:1]), rel=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        (torch.ones(0, 3), torch.ones(2, 3), r"a: got shape \(0, 3\); takes \(N, D\) with N of at least 1"),
        (torch.ones(2, 3), torch.ones(2, 4), "a and b: have 3 and 4 features"),
    ],
)
def test_what_has_no_cosine_is_said(a, b, says):
    with pytest.raises(ValueError, match=says):
        csim(a, b)
