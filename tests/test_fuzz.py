"""Slices of the two fuzzers, which run by hand for longer, and the float64 twin's derivatives."""

import pickle
import signal

import broken_readers
import float64_twin as twin
import fuzz_files
import fuzz_operators
import numpy as np
import pytest

INDICES = ([0, 1, 0], [0, 2, 1])  # individual, source emotion


def test_random_calls_of_the_operators_give_what_the_twin_gives():
    counts, failures = fuzz_operators.fuzz(range(250), seed=0)
    assert not failures, "\n".join(failures)
    assert sum(counts.values()) == 250


def test_damaged_files_are_read_or_refused_by_name():
    counts, failures = fuzz_files.fuzz(range(230), seed=0)
    assert not failures, "\n".join(failures)
    assert sum(counts.values()) == 230


def test_a_reader_that_unpickles_is_found(tmp_path):
    reader = object.__new__(fuzz_files.Reader)
    reader.folder = tmp_path
    reader.files = {"pickle": ("file.pickle", b"", lambda path: pickle.loads(path.read_bytes()))}
    assert reader.read("pickle", fuzz_files.POISONS[0]).startswith("unpickled")


@pytest.mark.parametrize(
    ("serve", "seconds", "says"),
    [(broken_readers.dies, 60.0, f"crash: exit status -{signal.SIGABRT:d}"), (broken_readers.hangs, 0.1, "hangs")],
)
def test_a_reader_that_dies_or_hangs_is_found(tmp_path, monkeypatch, serve, seconds, says):
    monkeypatch.setattr(fuzz_files, "SECONDS", seconds)
    worker = fuzz_files._Worker(tmp_path, serve)
    assert worker.read(0, 0, None).says == says
    assert not worker.process.is_alive()


TWINS = {
    "direction_logits": (
        [(3, 5), (3, 5), (2, 4, 5)],
        lambda *floats: twin.direction_logits(*floats, *INDICES, normalize=True, min_change=0.0),
    ),
    "direction_logits of features as given": (
        [(3, 5), (3, 5), (2, 4, 5)],
        lambda *floats: twin.direction_logits(*floats, *INDICES, normalize=False, min_change=0.0),
    ),
    **{
        f"direction_loss, {reduction}, min_change {min_change}": (
            [(3, 5), (3, 5), (2, 4, 5), ()],
            lambda source, edited, bank, scale, reduction=reduction, min_change=min_change: twin.direction_loss(
                source,
                edited,
                bank,
                *INDICES,
                [1, 3, 1],
                scale=scale,
                contrast=0.7,
                normalize=True,
                min_change=min_change,
                reduction=reduction,
            ),
        )
        for reduction in ("mean", "sum", "none")
        for min_change in (0.0, 1.9)
    },
    **{
        f"correlation_loss, {negatives}": (
            [(3, 4, 5), (3, 4, 5), ()],
            lambda visual, text, scale, negatives=negatives: twin.correlation_loss(
                visual, text, scale=scale, mask=np.arange(12).reshape(3, 4) != 6, negatives=negatives
            ),
        )
        for negatives in ("all", "within", "distinct")
    },
    "tree_attention": ([(2, 7, 3, 2, 3)], lambda qkv: twin.tree_attention(qkv, prefix=2, segment_lengths=(3, 2))),
} | {
    f"clip_frames {interpolation}": (
        [(2, 3, 9, 4)],
        lambda frames, interpolation=interpolation: twin.clip_frames(
            frames, size=6, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation=interpolation
        ),
    )
    for interpolation in ("bicubic", "bilinear")
}


@pytest.mark.parametrize("name", TWINS)
def test_the_twins_derivatives_are_central_differences(name):
    shapes, function = TWINS[name]
    random = np.random.default_rng(0)
    floats = [random.normal(size=shape) + (2 if shape == () else 0) for shape in shapes]
    result = function(*floats)
    upstream = random.normal(size=result.value.shape)
    for i, gradient in enumerate(result.gradients(upstream)):
        way, step = random.normal(size=floats[i].shape), 1e-5
        ahead, behind = (
            function(*[x + sign * step * way if k == i else x for k, x in enumerate(floats)]).value for sign in (1, -1)
        )
        slope = (upstream * (ahead - behind)).sum() / (2 * step)
        np.testing.assert_allclose((gradient * way).sum(), slope, rtol=1e-6, atol=1e-8)
