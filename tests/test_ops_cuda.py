"""The operators on CUDA tensors, on every backend: the CPU's results, without waiting, inside a CUDA graph."""

import pytest
import torch
from operators import OPERATORS, make, value_and_gradients
from tolerances import assert_close_for

from pcmecl_fast.ops import backend_status, correlation_loss, use_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ON_CUDA = [status.name for status in backend_status() if status.available and status.name != "cpu"]
operators = pytest.mark.parametrize("operator", OPERATORS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


@pytest.fixture(params=ON_CUDA, autouse=True)
def _backend(request):
    with use_backend(request.param):
        yield


def on(device, operator, dtype=torch.float32):
    options = {"negatives": "distinct"} if operator == "correlation_loss" else {}
    return make(operator, dtype=dtype, device=device, **options)


@operators
@dtypes
def test_cuda_matches_the_cpu(operator, dtype):
    on_cuda, on_cpu = on("cuda", operator, dtype), on("cpu", operator, dtype)
    out, gradients = value_and_gradients(on_cuda, on_cuda.floats)
    expected, exact_gradients = value_and_gradients(on_cpu, on_cpu.widened(), backend="reference")
    assert_close_for(out.dtype)(out, expected)
    for x, gradient, exact in zip(on_cuda.floats, gradients, exact_gradients, strict=True):
        assert_close_for(x.dtype)(gradient, exact)


@operators
def test_nothing_waits_for_the_device(operator):
    call = on("cuda", operator)
    call().sum().backward()  # tables are built and kernels compiled once
    torch.cuda.set_sync_debug_mode("error")
    try:
        call().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@operators
def test_it_replays_in_a_cuda_graph(operator):
    call = on("cuda", operator)
    floats = [x.detach() for x in call.floats]
    expected = call(*floats)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*floats)
    graph.replay()
    assert_close_for(torch.float32)(out, expected)


@operators
def test_gradients_are_bitwise_the_same_in_every_deterministic_run(operator):
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            call = on("cuda", operator)
            runs.append(value_and_gradients(call, call.floats)[1])
    except RuntimeError as error:
        pytest.skip(str(error))  # the reference's antialiased resize has no deterministic gradient
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))


def test_correlation_loss_avoids_tf32_even_if_the_user_allows_it(monkeypatch, request):
    name = request.node.callspec.params["_backend"]
    if name == "reference":
        pytest.skip("the reference does what the user asked for")
    generator = torch.Generator().manual_seed(3)
    features = torch.nn.functional.normalize(torch.randn(2, 24, 7, 512, generator=generator), dim=-1)
    expected = correlation_loss(*features.double(), backend="reference")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    assert_close_for(torch.float32)(correlation_loss(*features.cuda(), backend=name), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@operators
def test_it_runs_on_the_tensors_device_and_not_on_the_current_one(operator):
    out, expected = on("cuda:1", operator)(), on("cuda:0", operator)()
    assert out.device == torch.device("cuda:1")
    assert_close_for(torch.float32)(out, expected)


@operators
def test_opcheck(operator, request):
    name = request.node.callspec.params["_backend"]
    if name == "reference":
        pytest.skip("the reference is plain PyTorch")
    arguments = on("cuda", operator).schema_arguments
    torch.library.opcheck(getattr(torch.ops.pcmecl_fast, operator).default, (*arguments, name))


def test_the_host_check_names_the_index(monkeypatch):
    monkeypatch.setenv("PCMECL_CHECK", "1")
    call = on("cuda", "direction_loss")
    call.rest[2][1] = 7
    with pytest.raises(IndexError, match="target_emotion: got 7 at position 1; takes 0 to 6"):
        call()
