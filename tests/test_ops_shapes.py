"""Every operator on every compiled backend matches the reference in float64: random shapes, masks and coincidences."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operators import Call, make, value_and_gradients

from pcmecl_fast.ops import PromptTree

pytestmark = pytest.mark.usefixtures("compiled_backend")

# The largest error, relative to the norm, that the operators guarantee.
PROMISED = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}
drawn = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the backend is the same for every example
)
dtypes = st.sampled_from(list(PROMISED))
seeds = st.integers(0, 2**31)
emotions = st.one_of(st.integers(2, 9), st.just(32))
widths = st.one_of(st.integers(4, 40), st.sampled_from([127, 512, 513]))


@drawn
@given(
    dtypes, seeds, st.integers(1, 40), st.integers(1, 6), emotions, widths, st.sampled_from([0.0, 0.3]), st.booleans()
)
def test_direction(dtype, number, batch, people, count, width, contrast, normalize):
    sizes = {"batch": batch, "people": people, "emotions": count, "width": width}
    options = {"normalize": normalize, "dtype": dtype, "number": number, "degenerate": True}
    assert_as_promised(make("direction_loss", **sizes, contrast=contrast, scale=some_scale(number), **options))
    assert_as_promised(make("direction_logits", **sizes, **options))


@drawn
@given(
    dtypes, seeds, st.integers(1, 18), emotions, widths, st.sampled_from(["all", "within", "distinct"]), st.booleans()
)
def test_correlation_loss(dtype, number, people, count, width, negatives, missing):
    people = min(people, 2) if count == 32 else people
    sizes = {"people": people, "emotions": count, "width": width, "negatives": negatives, "missing": missing}
    scale = some_scale(number)
    assert_as_promised(make("correlation_loss", **sizes, scale=scale, dtype=dtype, number=number, degenerate=True))


@drawn
@given(dtypes, seeds, st.integers(1, 3), *[st.integers(1, 70)] * 3, st.sampled_from(["bicubic", "bilinear"]))
def test_clip_frames(dtype, number, batch, height, width, side, interpolation):
    sizes = {"batch": batch, "height": height, "width": width, "size": side, "interpolation": interpolation}
    # A bias of 0 in the result, so that the relative error is that of the resize.
    call = make("clip_frames", **sizes, mean=(0.5,) * 3, dtype=dtype, number=number)
    assert_as_promised(call, at_least=1e-4)


@drawn
@given(dtypes, seeds, st.integers(1, 3), st.integers(1, 5), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_tree_attention(dtype, number, people, prefix, lengths):
    layout = PromptTree(prefix, tuple(lengths))
    assert_as_promised(make("tree_attention", people=people, layout=layout, width=5, dtype=dtype, number=number))


def some_scale(number: int) -> float:
    return 1 + number % 30


def assert_as_promised(call: Call, at_least: float = 0.0) -> None:
    """The result and the gradients of its weighted sum, against float64 on the same, rounded inputs.

    `at_least` widens float32's promise where the reference itself computes its constants in float32.
    """
    dtype = call.floats[0].dtype
    promised = max(PROMISED[dtype], at_least if dtype == torch.float32 else 0.0)
    result, gradients = value_and_gradients(call, call.floats)
    expected, exact_gradients = value_and_gradients(call, call.widened(), backend="reference")
    for x, x_exact in zip((result, *gradients), (expected, *exact_gradients), strict=True):
        error = (x.double() - x_exact).norm()
        assert error <= promised * x_exact.norm() + 1e-3 * promised, f"{error / x_exact.norm():.1e}"
