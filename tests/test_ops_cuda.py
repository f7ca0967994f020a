"""The operators on CUDA tensors, on every backend: the reference's results, without waiting, captured and compiled."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from device_cases import BEYOND, BY_CHUNKS, CASES, DTYPES, check
from operators import OPERATORS, Call, make, value_and_gradients
from tolerances import assert_close_for
from torch import Tensor

from pcmecl_fast.ops import backend_status, correlation_loss, explain, use_backend
from pcmecl_fast.ops.operator import BACKENDS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ON_CUDA = [status.name for status in backend_status() if status.available and status.name != "cpu"]
OWN = [name for name in ON_CUDA if name not in ("reference", "xformers")]
operators = pytest.mark.parametrize("operator", OPERATORS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
own_backends = pytest.mark.parametrize("backend", OWN)
every_backend = pytest.mark.parametrize(
    ("backend", "operator"),
    [(name, one) for name in ON_CUDA for one in OPERATORS if one in BACKENDS[name].implementations],
)


def on(device: str, operator: str, **sizes) -> Call:
    options = {"negatives": "distinct"} if operator == "correlation_loss" else {}
    return make(operator, device=device, **options, **sizes)


def changed(call: Call, number: int) -> list[Tensor]:
    """The call's floats with other numbers, which `number` seeds."""
    generator = torch.Generator().manual_seed(number)
    return [(x.detach() * (0.5 + torch.rand(x.shape, generator=generator)).to(x)).requires_grad_() for x in call.floats]


def both_ways(call: Call, backend: str, *floats: Tensor) -> list[Tensor]:
    """The result, and the gradients of its sum."""
    out = call(*floats, backend=backend)
    return [out, *torch.autograd.grad(out.sum(), floats)]


@own_backends
@dtypes
@pytest.mark.parametrize("case", {**CASES, **BY_CHUNKS})
def test_the_kernels_give_the_references_result_and_gradients(case, dtype, backend):
    call = {**CASES, **BY_CHUNKS}[case](dtype=dtype, device="cuda")
    refusal = BEYOND.get(backend, {}).get(case)
    if refusal is None:
        check(call, backend)
    else:
        with pytest.raises(RuntimeError, match=f"supports {refusal}"):
            call(backend=backend)


@every_backend
@dtypes
def test_cuda_matches_the_cpu(operator, backend, dtype):
    on_cuda, on_cpu = on("cuda", operator, dtype=dtype), on("cpu", operator, dtype=dtype)
    out, gradients = value_and_gradients(on_cuda, on_cuda.floats, backend=backend)
    expected, exact_gradients = value_and_gradients(on_cpu, on_cpu.widened(), backend="reference")
    assert_close_for(out.dtype)(out, expected)
    for x, gradient, exact in zip(on_cuda.floats, gradients, exact_gradients, strict=True):
        assert_close_for(x.dtype)(gradient, exact)


@every_backend
def test_nothing_waits_for_the_device(operator, backend):
    call = on("cuda", operator)
    call(backend=backend).sum().backward()  # tables are built and kernels compiled once
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(backend=backend).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_backend
def test_a_cuda_graph_replays_both_ways_with_other_inputs(operator, backend):
    call = on("cuda", operator)
    inputs = [x.detach().clone().requires_grad_() for x in call.floats]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        both_ways(call, backend, *inputs)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways(call, backend, *inputs)
    for number in (1, 2):
        others = changed(call, number)
        with torch.no_grad():
            for x, other in zip(inputs, others, strict=True):
                x.copy_(other)
        graph.replay()
        for x, expected in zip(captured, both_ways(call, backend, *others), strict=True):
            assert_close_for(torch.float32)(x, expected)


@every_backend
def test_two_streams_at_once_do_not_disturb_each_other(operator, backend):
    call = on("cuda", operator)
    inputs = [changed(call, number) for number in (1, 2)]
    expected = [both_ways(call, backend, *x) for x in inputs]
    streams, results = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(5):
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(both_ways(call, backend, *x))
    torch.cuda.synchronize()
    for number, result in enumerate(results):
        for x, y in zip(result, expected[number % 2], strict=True):
            assert_close_for(torch.float32)(x, y)


@every_backend
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_torch_compile_in_every_mode(operator, backend, mode):
    torch._dynamo.reset()
    call = on("cuda", operator)
    compiled = torch.compile(partial(call.function, backend=backend), mode=mode, fullgraph=True)
    for number in range(4):  # a CUDA graph is recorded at the second call and replayed from then on
        torch.compiler.cudagraph_mark_step_begin()
        inputs = changed(call, number)
        out = compiled(*inputs, *call.rest)
        results = [x.clone() for x in (out, *torch.autograd.grad(out.sum(), inputs))]
        for x, expected in zip(results, both_ways(call, backend, *inputs), strict=True):
            assert_close_for(torch.float32)(x, expected)


@every_backend
def test_gradients_are_bitwise_the_same_in_every_deterministic_run(operator, backend):
    if (operator, backend) == ("clip_frames", "reference"):
        pytest.skip("PyTorch's antialiased resize has no deterministic gradient")
    call = on("cuda", operator)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [value_and_gradients(call, call.floats, backend=backend)[1] for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))


@own_backends
@pytest.mark.parametrize("library", ["cublas", "cublaslt"])
def test_correlation_loss_avoids_tf32_even_if_the_user_allows_it(monkeypatch, backend, library):
    generator = torch.Generator().manual_seed(3)
    features = torch.nn.functional.normalize(torch.randn(2, 24, 7, 512, generator=generator), dim=-1)
    expected = correlation_loss(*features.double(), backend="reference")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        assert_close_for(torch.float32)(correlation_loss(*features.cuda(), backend=backend), expected)
    finally:
        torch.backends.cuda.preferred_blas_library(before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every_backend
def test_it_runs_on_the_tensors_device_and_not_on_the_current_one(operator, backend):
    out, expected = on("cuda:1", operator)(backend=backend), on("cuda:0", operator)(backend=backend)
    assert out.device == torch.device("cuda:1")
    assert_close_for(torch.float32)(out, expected)


@own_backends
@operators
def test_opcheck(operator, backend):
    arguments = on("cuda", operator).schema_arguments
    torch.library.opcheck(getattr(torch.ops.pcmecl_fast, operator).default, (*arguments, backend))


@operators
def test_auto_takes_a_backend_that_is_here(operator):
    with use_backend("auto"):
        assert explain(on("cuda", operator)).backend in ON_CUDA


def test_the_host_check_names_the_index(monkeypatch):
    monkeypatch.setenv("PCMECL_CHECK", "1")
    call = on("cuda", "direction_loss")
    call.rest[2][1] = 7
    with pytest.raises(IndexError, match="target_emotion: got 7 at position 1; takes 0 to 6"):
        call()


OUT_OF_RANGE = """
import sys
sys.path.insert(0, {tests!r})
import torch
from operators import make
call = make({operator!r}, device="cuda")
call.rest[{position}][1] = {value}
call(backend={backend!r})
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("backend", ["reference", *OWN])
@pytest.mark.parametrize(
    ("operator", "position", "name", "value"),
    [
        ("direction_logits", 0, "individual", 3),
        ("direction_loss", 1, "source_emotion", -1),
        ("direction_loss", 2, "target_emotion", 7),
    ],
)
def test_an_index_out_of_range_fails_at_the_next_synchronisation(operator, position, name, value, backend):
    """In a process of its own: after a device-side assertion a process can use its GPU no more."""
    script = OUT_OF_RANGE.format(
        tests=str(Path(__file__).parent), operator=operator, position=position, value=value, backend=backend
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode != 0
    assert f"{name}: an index is out of range" in run.stdout + run.stderr
