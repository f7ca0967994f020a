"""The predicted times of docs/kernels.md are what the code compiles to, and within written bounds."""

import importlib.util
import os
import re

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler, not its interpreter", allow_module_level=True)

import triton

from bench import triton_plans

TIMES = {
    # A logit is made for both of its emotions, and the floor counts it once.
    ("correlation_loss, 16 emotions", "wide_fold_kernel"): 2.4,
    ("correlation_loss, 32 emotions", "wide_fold_kernel"): 2.4,
    # It measures 496 changes of 32 rows: 0.2 % of the call's time.
    ("correlation_loss, 32 emotions", "prepare_kernel"): 2.2,
}
"""Of its floor, where that isn't twice."""
OF_A_LAUNCH = 1.0  # µs: less than it takes to begin and to end, which is not in the prediction


@pytest.fixture(scope="module")
def plans():
    return [(device, list(triton_plans.predictions(device))) for device in triton_plans.DEVICES]


def test_every_kernel_is_predicted_within_twice_its_floor(plans):
    slow = [
        named(device, x)
        for device, predicted in plans
        for x in predicted
        if x.predicted > TIMES.get((x.call, x.launch.name), 2) * x.floor + OF_A_LAUNCH * x.launches
    ]
    assert slow == []


def test_a_processor_holds_two_programs_and_eight_warps(plans):
    few = [
        named(device, x)
        for device, predicted in plans
        for x in predicted
        if x.resident < 2 or x.resident * x.launch.warps < 8
    ]
    assert few == []


def test_nothing_lies_in_local_memory(plans):
    assert [named(device, x) for device, predicted in plans for x in predicted if x.launch.spilled] == []


def test_frames_take_at_most_100_registers(plans):
    taken = [x.launch.usage["REG"] for _, predicted in plans for x in predicted if x.call == "clip_frames"]
    assert len(taken) == 4 * len(plans)
    assert max(taken) <= 100


def test_frames_are_resized_within_a_warp(plans):
    """Columns come from other threads by shuffles alone: the only shared memory orders what is loaded and stored."""
    for device, predicted in plans:
        for x in predicted:
            if x.launch.name == "resample_kernel":
                assert any("SHFL" in line for line in x.launch.loops[0]), named(device, x)
                assert "mma" not in x.launch.ptx, named(device, x)


def test_the_document_says_what_the_code_compiles_to(plans):
    versions = re.findall(r"compiled by Triton ([\d.]+)", triton_plans.DOCUMENT.read_text())
    assert len(versions) == 1
    if triton.__version__ != versions[0]:
        pytest.skip(f"the table is of Triton {versions[0]}")
    assert triton_plans.written() == triton_plans.table(plans), "python -m bench.triton_plans --write"


def named(device, x):
    times = {limit: round(time, 1) for limit, time in x.times.items()}
    return f"{device.name}, {x.call}: {x.launch.name} {times} of {x.floor:.1f}, {x.resident} programs {x.launch.usage}"
