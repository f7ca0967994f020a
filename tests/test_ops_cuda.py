"""The operators on CUDA tensors, on every backend: the CPU's results, without waiting, inside a CUDA graph."""

import pytest
import torch
from tolerances import assert_close_for
from torch import Tensor

from pcmecl_fast.ops import (
    PromptTree,
    backend_status,
    clip_frames,
    correlation_loss,
    direction_logits,
    direction_loss,
    tree_attention,
    use_backend,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TREE = PromptTree(4, (2, 3, 1))
BATCH, PEOPLE, EMOTIONS, WIDTH = 5, 3, 7, 33
FLOATS = {
    "direction_logits": [(BATCH, WIDTH), (BATCH, WIDTH), (PEOPLE, EMOTIONS, WIDTH)],
    "direction_loss": [(BATCH, WIDTH), (BATCH, WIDTH), (PEOPLE, EMOTIONS, WIDTH)],
    "correlation_loss": [(PEOPLE, EMOTIONS, WIDTH), (PEOPLE, EMOTIONS, WIDTH)],
    "tree_attention": [(2, TREE.length, 3, 2, 16)],
    "clip_frames": [(2, 3, 45, 31)],
}
INDICES = torch.tensor([[0, 1, 2, 2, 0], [3, 1, 0, 6, 5], [3, 2, 6, 0, 1]])  # individual, source, target
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
ON_CUDA = [status.name for status in backend_status() if status.available and status.name != "cpu"]
operators = pytest.mark.parametrize("operator", FLOATS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


@pytest.fixture(params=ON_CUDA, autouse=True)
def _backend(request):
    with use_backend(request.param):
        yield


@operators
@dtypes
def test_cuda_gives_what_the_cpu_gives(operator, dtype):
    on_cuda = make(operator, "cuda", dtype)
    exact = [x.detach().cpu().double().requires_grad_() for x in on_cuda]
    out = call(operator, on_cuda, INDICES.cuda())
    with use_backend("reference"):
        expected = call(operator, exact, INDICES)
    assert_close_for(out.dtype)(out, expected)
    expected.sum().backward()
    out.sum().backward()
    for x, x_expected in zip(on_cuda, exact, strict=True):
        assert_close_for(dtype)(x.grad, x_expected.grad)


@operators
def test_nothing_waits_for_the_device(operator):
    floats, indices = make(operator, "cuda"), INDICES.cuda()
    call(operator, floats, indices).sum().backward()  # tables are made and kernels compiled once
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(operator, floats, indices).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@operators
def test_it_replays_in_a_cuda_graph(operator):
    floats, indices = [x.detach() for x in make(operator, "cuda")], INDICES.cuda()
    expected = call(operator, floats, indices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(operator, floats, indices)
    graph.replay()
    assert_close_for(torch.float32)(out, expected)


@operators
def test_gradients_are_bitwise_the_same_in_every_deterministic_run(operator):
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            floats = make(operator, "cuda")
            call(operator, floats, INDICES.cuda()).sum().backward()
            runs.append([x.grad for x in floats])
    except RuntimeError as error:
        pytest.skip(str(error))  # the reference's antialiased resize has no deterministic gradient
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))


def test_correlation_loss_takes_no_tf32_where_the_user_allows_it(monkeypatch, request):
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
    on_first, on_second = make(operator, "cuda:0"), make(operator, "cuda:1")
    out, expected = call(operator, on_second, INDICES.to("cuda:1")), call(operator, on_first, INDICES.to("cuda:0"))
    assert out.device == torch.device("cuda:1")
    assert_close_for(torch.float32)(out, expected)


@operators
def test_opcheck(operator, request):
    name = request.node.callspec.params["_backend"]
    if name == "reference":
        pytest.skip("the reference is plain PyTorch")
    floats, indices = make(operator, "cuda"), INDICES.cuda()
    rest = {
        "direction_logits": (*indices[:2], True),
        "direction_loss": (*indices, None, 20.0, 0.5, True, "mean"),
        "correlation_loss": (None, 20.0, None, "distinct"),
        "tree_attention": (TREE.prefix, TREE.segment_lengths),
        "clip_frames": (16, MEAN, STD),
    }[operator]
    torch.library.opcheck(getattr(torch.ops.pcmecl_fast, operator).default, (*floats, *rest, name))


def test_the_host_check_names_the_index(monkeypatch):
    monkeypatch.setenv("PCMECL_CHECK", "1")
    indices = INDICES.clone()
    indices[2, 1] = EMOTIONS
    with pytest.raises(IndexError, match="target_emotion: got 7 at position 1; takes 0 to 6"):
        call("direction_loss", make("direction_loss", "cuda"), indices.cuda())


def call(operator: str, floats: list[Tensor], indices: Tensor) -> Tensor:
    return {
        "direction_logits": lambda: direction_logits(*floats, *indices[:2]),
        "direction_loss": lambda: direction_loss(*floats, *indices, scale=20.0, contrast=0.5),
        "correlation_loss": lambda: correlation_loss(*floats, scale=20.0, negatives="distinct"),
        "tree_attention": lambda: tree_attention(*floats, TREE),
        "clip_frames": lambda: clip_frames(*floats, 16, MEAN, STD),
    }[operator]()


def make(operator: str, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in FLOATS[operator]]
