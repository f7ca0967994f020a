"""The CUDA kernels under the checked host harness, which watches every access to memory, and the harness itself.

Every operator runs, forward and backward, with blocks and threads in a random order and an exp2 as inexact as a GPU's;
then faults are planted in the kernels, one at a time, and each has to be reported.
"""

import re
from dataclasses import replace
from functools import partial

import cuda_faults
import cuda_on_host
import pytest
import torch
from cuda_faults import BARRIER_CALLS, FAULTS, barriers, planted, unaligned_direction_loss, without
from device_cases import WIDE_TREE, check, correlation
from operators import CLIP_MEAN, CLIP_STD, Call, make, value_and_gradients

from pcmecl_fast.ops.backends import cuda
from pcmecl_fast.ops.operator import BACKENDS, Backend

pytestmark = pytest.mark.skipif(not cuda_on_host.checks_accesses(), reason="needs GCC and the sources")
SEED = 20
BARRIERS = barriers()
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(scope="module")
def checked():
    return cuda_on_host.load(checked=True)


@pytest.fixture
def drawn(checked, monkeypatch):
    """The backend "cuda" is checked; what a GPU may choose is drawn."""
    choose(checked, monkeypatch, PCMECL_HOST_ORDER=SEED, PCMECL_HOST_EXP2=SEED)


@dtypes
@pytest.mark.parametrize("width", [33, 136])
@pytest.mark.parametrize(("emotions", "contrast"), [(2, 0.4), (7, 0.0), (7, 0.4), (9, 0.4), (32, 0.0)])
@pytest.mark.usefixtures("drawn")
def test_direction_loss(emotions, contrast, width, dtype):
    sizes = {"batch": 9, "people": 2, "emotions": emotions, "width": width, "degenerate": True}
    check(make("direction_loss", **sizes, contrast=contrast, scale=30.0, dtype=dtype))


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.usefixtures("drawn")
def test_direction_loss_reduced_otherwise(reduction):
    check(make("direction_loss", people=2, normalize=False, degenerate=True, reduction=reduction))


@dtypes
@pytest.mark.parametrize("width", [33, 136])
@pytest.mark.usefixtures("drawn")
def test_direction_logits(width, dtype):
    check(make("direction_logits", batch=9, people=2, width=width, degenerate=True, dtype=dtype))


@pytest.mark.usefixtures("drawn")
def test_rows_that_begin_anywhere():
    check(unaligned_direction_loss())


@dtypes
@pytest.mark.parametrize("negatives", ["all", "within", "distinct"])
@pytest.mark.parametrize(
    ("people", "emotions", "width"),
    [(37, 7, 24), (33, 4, 8), (5, 8, 13), (5, 9, 20)],
    ids=["7 emotions, several chunks", "4 emotions, several chunks", "8 emotions", "9 emotions"],
)
@pytest.mark.usefixtures("drawn")
def test_correlation_loss(people, emotions, width, negatives, dtype):
    sizes = {"people": people, "emotions": emotions, "width": width}
    check(correlation(**sizes, negatives=negatives, scale=40.0, dtype=dtype))


@dtypes
@pytest.mark.parametrize(("heads", "width"), [(2, 64), (1, 17), (1, 72), (1, 130), (1, 256)])
@pytest.mark.usefixtures("drawn")
def test_tree_attention(heads, width, dtype):
    check(make("tree_attention", layout=WIDE_TREE, heads=heads, width=width, dtype=dtype))


@dtypes
@pytest.mark.parametrize(
    ("height", "width", "size"), [(40, 64, 24), (20, 300, 16), (9, 8, 70), (31, 33, 5), (80, 80, 70)]
)
@pytest.mark.usefixtures("drawn")
def test_clip_frames(height, width, size, dtype):
    sizes = {"batch": 1, "height": height, "width": width, "size": size}
    check(make("clip_frames", **sizes, mean=CLIP_MEAN, std=CLIP_STD, dtype=dtype))


def test_in_every_order_the_banks_gradient_has_the_same_bits(checked, monkeypatch):
    call = make("direction_loss", batch=70, people=3, width=33, contrast=0.3)
    gradients = []
    for seed in ("up", 1, 2):
        choose(checked, monkeypatch, PCMECL_HOST_ORDER=seed)
        gradients.append(value_and_gradients(call, call.floats, backend="cuda")[1][2])
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_exp2_errs_as_a_seed_draws(checked, monkeypatch):
    call = make("tree_attention", layout=WIDE_TREE)
    results = []
    for seed in (0, 1, 1, 2):
        choose(checked, monkeypatch, PCMECL_HOST_EXP2=seed)
        results.append(call(backend="cuda"))
    exact, first, again, other = results
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 < (first - exact).abs().max() < 4 * 2**-22 * exact.abs().max()


@pytest.fixture(scope="module")
def faulty(checked, tmp_path_factory):
    """Starts to compile every fault; a fault's module is then ready before its test, or soon."""

    def load(plant, fault):
        return cuda_on_host.load_with(plant(fault, tmp_path_factory.mktemp("fault") / "csrc"))

    tmp_path_factory.getbasetemp()  # made here, not by several threads at once
    with cuda_on_host.compilers() as pool:
        yield {
            **{fault.name: pool.submit(load, planted, fault) for fault in FAULTS},
            **{barrier: pool.submit(load, without, barrier) for barrier in BARRIERS},
        }


@pytest.fixture(scope="module")
def caught(request):
    """The names of the faults that were reported; in the end, how many."""
    names = set()
    yield names
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{len(names)} of {len(FAULTS)} planted faults caught")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_reported(fault, faulty, caught, checked, monkeypatch):
    choose(faulty[fault.name].result(), monkeypatch, PCMECL_HOST_ORDER=fault.order)
    report = report_of(fault.call())
    assert re.match(fault.report, report), report
    caught.add(fault.name)
    choose(checked, monkeypatch, PCMECL_HOST_ORDER=fault.order)
    assert report_of(fault.call()) == ""


@pytest.mark.parametrize("barrier", BARRIERS, ids=str)
def test_a_barrier_that_is_taken_out_is_reported(barrier, faulty, monkeypatch):
    def reports():
        for order in ("up", "down"):
            choose(faulty[barrier].result(), monkeypatch, PCMECL_HOST_ORDER=order)
            yield from (report_of(make_call()) for make_call in BARRIER_CALLS)

    assert any(re.match("race|conflict|uninitialised", report) for report in reports()), (
        "either the kernels do not need this barrier, or no call in BARRIER_CALLS does"
    )


def test_more_planes_than_a_grid_takes_are_resized_by_several_launches(tmp_path, monkeypatch):
    fewer = {"kPlanes = 3 * 21845": "kPlanes = 3"}
    call = partial(make, "clip_frames", batch=3, height=24, width=24, size=21, mean=CLIP_MEAN, std=CLIP_STD)
    change = cuda_faults.Fault("three planes a launch", "frames.cu", fewer, call, "")
    choose(cuda_on_host.load_with(planted(change, tmp_path / "csrc")), monkeypatch)
    assert report_of(call()) == ""


def test_more_people_than_a_grid_takes_have_their_trees_attended_to_by_several_launches(tmp_path, monkeypatch):
    fewer = {"kPeople = 65535": "kPeople = 2"}
    call = partial(make, "tree_attention", people=5, layout=WIDE_TREE, width=16)
    change = cuda_faults.Fault("two people a launch", "tree_attention.cu", fewer, call, "")
    choose(cuda_on_host.load_with(planted(change, tmp_path / "csrc")), monkeypatch)
    assert report_of(call()) == ""


def test_a_syncwarp_lets_lanes_read_what_another_wrote(tmp_path, monkeypatch):
    (fault,) = (fault for fault in FAULTS if "no __syncwarp" in fault.name)
    mended = {
        old: new.replace("__shfl_sync(kAllLanes, values[0], 0)", "__syncwarp()") for old, new in fault.changes.items()
    }
    kernels = planted(replace(fault, changes=mended), tmp_path / "csrc")
    choose(cuda_on_host.load_with(kernels), monkeypatch)
    assert report_of(fault.call()) == ""


def test_a_fault_that_does_not_fit_its_source_says_what_to_do(tmp_path):
    fault = cuda_faults.Fault("gone", "warp.h", {"no such text": ""}, Call, "")
    with pytest.raises(LookupError, match=r"change the fault in tests/cuda_faults.py"):
        planted(fault, tmp_path / "csrc")


def report_of(call: Call) -> str:
    """What the harness reports of a call, or that its result is wrong."""
    try:
        check(call)
    except RuntimeError as error:
        return re.sub(r"^(\w+: )?host harness: ", "", str(error))
    except AssertionError as error:
        return f"wrong result: {error}"
    return ""


def choose(module, monkeypatch, **choices):
    """The backend "cuda" is this module; what its GPU chooses is in `choices`."""
    backend = Backend("cuda", missing=lambda: None)
    cuda.add_kernels(backend, module, device="cpu")
    monkeypatch.setitem(BACKENDS, "cuda", backend)
    for variable in ("PCMECL_HOST_ORDER", "PCMECL_HOST_EXP2"):
        monkeypatch.delenv(variable, raising=False)
    for variable, choice in choices.items():
        monkeypatch.setenv(variable, str(choice))
