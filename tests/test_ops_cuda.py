"""The operators on CUDA tensors: the CPU's results, without a synchronisation, inside a CUDA graph."""

import pytest
import torch
from tolerances import assert_close_for
from torch import Tensor

from pcmecl_fast.ops import PromptTree, clip_frames, correlation_loss, direction_logits, direction_loss, tree_attention

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
operators = pytest.mark.parametrize("operator", FLOATS)


@operators
def test_cuda_gives_what_the_cpu_gives(operator):
    on_cpu, on_cuda = make(operator, "cpu"), make(operator, "cuda")
    expected, out = call(operator, on_cpu, INDICES), call(operator, on_cuda, INDICES.cuda())
    assert_close_for(torch.float32)(out, expected)
    expected.sum().backward()
    out.sum().backward()
    for x, x_expected in zip(on_cuda, on_cpu, strict=True):
        assert_close_for(torch.float32)(x.grad, x_expected.grad)


@operators
def test_nothing_waits_for_the_device(operator):
    floats, indices = make(operator, "cuda"), INDICES.cuda()
    call(operator, floats, indices)  # the tree's mask is made once
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
        "clip_frames": lambda: clip_frames(*floats, 16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
    }[operator]()


def make(operator: str, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in FLOATS[operator]]
