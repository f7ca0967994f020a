"""What the Triton backend does around its kernels, on fake CUDA tensors: no kernel is compiled, none is run."""

import gc
import importlib.util
import os
import weakref

import pytest
import torch
from operators import MEAN, OPERATORS, STD, make
from torch.utils._python_dispatch import TorchDispatchMode

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler, not its interpreter", allow_module_level=True)

from bench import as_launched, triton_resources
from pcmecl_fast.kernels import common
from pcmecl_fast.kernels.common import Config, clearly_fastest, run_tuned
from pcmecl_fast.ops.backends.triton import TRITON
from pcmecl_fast.ops.correlation import CORRELATION_LOSS
from pcmecl_fast.ops.direction import DIRECTION_LOSS
from pcmecl_fast.ops.frames import CLIP_FRAMES
from pcmecl_fast.ops.tree_attention import TREE_ATTENTION

WORKLOADS = list(triton_resources.workloads())
each_workload = pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.label)
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


LARGE = {
    "frames": (CLIP_FRAMES, [(30_000, 3, 8, 8)], (16, MEAN, STD, "bicubic")),
    "a large frame": (CLIP_FRAMES, [(1, 3, 64, 64)], (16_384, MEAN, STD, "bicubic")),
    "individuals": (TREE_ATTENTION, [(100_000, 30, 3, 12, 64)], (2, [4] * 7)),
    "pairs within": (CORRELATION_LOSS, [(300_000, 9, 8)] * 2, (None, 20.0, None, "within")),
    "pairs of all": (CORRELATION_LOSS, [(4_000, 7, 8)] * 2, (None, 20.0, None, "all")),
    "many pairs within": (CORRELATION_LOSS, [(300_000, 32, 8)] * 2, (None, 20.0, None, "within")),
    "many pairs of all": (CORRELATION_LOSS, [(1_000, 32, 8)] * 2, (None, 20.0, None, "all")),
}


class NoWaiting(TorchDispatchMode):
    """Copies between the host and the device raise; fake tensors themselves raise where a value is needed."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        places = {x.device.type for x in (*arguments, result) if isinstance(x, torch.Tensor)}
        if function in COPIES and len(places) > 1:
            raise RuntimeError(f"{function} from {arguments[0].device} to {result.device}")
        return result


class Made(TorchDispatchMode):
    """Remembers every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        results = result if isinstance(result, (tuple, list)) else (result,)
        self.tensors += [weakref.ref(x) for x in results if isinstance(x, torch.Tensor)]
        return result

    def alive(self):
        gc.collect()
        return [x for x in (made() for made in self.tensors) if x is not None]


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: bool((x > 0).all()),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]).to("cuda"),
        lambda x: x.cpu(),
    ],
    ids=["item", "bools", "bool", "to the device", "to the host"],
)
def test_what_waits_is_found(waits):
    with as_launched.on(90, compiles=False):
        x = torch.ones(3, device="cuda")
        with NoWaiting(), pytest.raises(RuntimeError):
            waits(x)


@each_workload
def test_nothing_waits(workload):
    with as_launched.on(90, compiles=False):
        arguments = workload.arguments()
        with NoWaiting():
            workload.run(arguments)


@each_workload
def test_nothing_outlives_a_call(workload):
    """In a CUDA graph a tensor that does lies in memory that the graph's owner takes back."""
    with as_launched.on(90, compiles=False):
        arguments = workload.arguments()
        with Made() as made:
            workload.run(arguments)
        assert made.tensors
        assert made.alive() == []


def test_what_outlives_a_call_is_found():
    with as_launched.on(90, compiles=False), Made() as made:
        kept = torch.zeros(3, device="cuda")
        torch.zeros(3, device="cuda")
    assert made.alive() == [kept]


@pytest.mark.parametrize("operator", OPERATORS)
def test_public_functions_do_not_wait_either(operator, monkeypatch):
    monkeypatch.setattr(TRITON, "missing", lambda: None)
    call = make(operator)

    def on_device(x):
        return None if x is None else torch.empty(x.shape, dtype=x.dtype, device="cuda")

    with as_launched.on(90, compiles=False), NoWaiting():
        arguments = [on_device(x) for x in (*call.floats, *call.rest)]
        assert call.function(*arguments, backend="triton").is_cuda


@pytest.mark.parametrize(("operator", "shapes", "rest"), LARGE.values(), ids=LARGE)
def test_large_sizes_fit_a_grid(operator, shapes, rest):
    with as_launched.on(90, compiles=False) as launches:  # which raises where one does not
        floats = [torch.empty(shape, device="cuda") for shape in shapes]
        as_launched.run(operator, (*floats, *rest))
    assert len(launches) > 1


@pytest.mark.parametrize(("people", "others", "first"), [(4_000, 4_000, 2_000), (8, 100_000, 50_000), (100_000, 8, -7)])
def test_large_rectangles_fit_a_grid(people, others, first):
    with as_launched.on(90, compiles=False) as launches:
        visual, text = (torch.empty(count, 7, 8, device="cuda") for count in (people, others))
        as_launched.run_rectangle(CORRELATION_LOSS, (visual, text, None, 20.0, None, None, "all", first))
    assert len(launches) > 1


@pytest.mark.parametrize("deterministic", [False, True])
def test_many_samples_and_wide_features_fit_a_grid(deterministic):
    with as_launched.on(90, compiles=False) as launches:
        features = [torch.empty(shape, device="cuda") for shape in ((10**6, 4096), (10**6, 4096), (10**5, 7, 4096))]
        indices = [torch.empty(10**6, dtype=torch.int64, device="cuda") for _ in range(3)]
        arguments = (*features, *indices, None, 20.0, 0.3, True, 0.0, "mean")
        triton_resources.Workload("", DIRECTION_LOSS, tuple, deterministic=deterministic).run(arguments)
    assert len(launches) > 1


def test_a_rectangle_takes_no_more_launches_than_a_square():
    def launched(*people, run):
        with as_launched.on(90, compiles=False) as launches:
            features = [torch.empty(count, 7, 512, device="cuda") for count in people]
            run(CORRELATION_LOSS, features)
        return [launch.name for launch in launches]

    square = launched(512, 512, run=lambda operator, x: as_launched.run(operator, (*x, None, 20.0, None, "all")))
    rectangle = launched(
        512, 512, run=lambda operator, x: as_launched.run_rectangle(operator, (*x, None, 20.0, None, None, "all", 300))
    )
    assert rectangle == square


def test_the_next_block_compiles_nothing_new():
    """Ranks meet blocks of a size with many values of `first`, and a rank's rows begin anywhere in a group."""
    with as_launched.on(90) as launches:
        visual, text = (torch.empty(count, 7, 64, device="cuda") for count in (25, 19))
        for first in (0, 1, 16, 32, -15, 40):
            as_launched.run_rectangle(CORRELATION_LOSS, (visual, text, None, 20.0, None, None, "all", first))
            if first == 0:
                before = len(launches)
    assert len(launches) == before


@pytest.mark.parametrize("people", [16, 64, 512, 1_000])
@pytest.mark.parametrize("emotions", [12, 17, 32])
def test_walks_of_many_emotions_fill_a_gpu(people, emotions):
    """Whatever the number of individuals, from 16 on, half as many warps walk as a processor holds of them."""
    with as_launched.on(90, compiles=False) as launches:
        visual, text = (torch.empty(people, emotions, 8, device="cuda") for _ in range(2))
        arguments = (visual, text, None, 20.0, None, "all")
        as_launched.run(CORRELATION_LOSS, arguments)
    walks = [launch for launch in launches if launch.name in ("wide_sums_kernel", "wide_fold_kernel")]
    assert len(walks) > 1
    for launch in walks:
        warps = launch.grid[0] * launch.grid[1] * launch.warps
        assert 2 * warps >= min(8 * 132, people * emotions), launch.grid


def test_a_grid_that_does_not_fit_is_found():
    from pcmecl_fast.kernels.frames import weights_kernel

    with as_launched.on(90, compiles=False), pytest.raises(ValueError, match="takes 1 to"):
        weights_kernel[(1, 65_536)]()


CONFIGS = [Config(warps=4), Config(warps=8)]


@pytest.mark.parametrize(("first", "second", "fastest"), [(1.0, 0.9, 1), (1.0, 0.97, 0), (1.0, 1.0, 0), (1.0, 1.2, 0)])
def test_the_first_configuration_is_kept_unless_another_is_clearly_faster(first, second, fastest):
    assert clearly_fastest(CONFIGS, lambda config: first if config is CONFIGS[0] else second) is CONFIGS[fastest]


def test_a_clock_that_rises_or_falls_while_tuning_changes_no_choice():
    for clock in (0.8, 1.0, 1.2, 1.4, *[1.5] * 20), (1.5, 1.4, 1.3, 1.2, *[1.1] * 20):
        speeds = iter(clock)
        assert clearly_fastest(CONFIGS, lambda config, speeds=speeds: 1.0 / next(speeds)) is CONFIGS[0]


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_algorithms_take_the_first_configuration(deterministic, monkeypatch):
    launched = []
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        with as_launched.on(90, compiles=False):
            monkeypatch.setattr(common, "_fastest", lambda launch, configs: configs[1])
            run_tuned("name", (), CONFIGS, torch.empty(1, device="cuda"), launched.append)
    finally:
        torch.use_deterministic_algorithms(before)
    assert launched == [CONFIGS[0 if deterministic else 1]]
