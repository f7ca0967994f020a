"""Which backend comes first for an operator on a GPU, and the backend "xformers" with its library replaced."""

import sys
from types import ModuleType

import pytest
import torch
from operators import make, value_and_gradients
from tolerances import assert_close_for

from pcmecl_fast.ops import choice
from pcmecl_fast.ops.backends import xformers
from pcmecl_fast.ops.choice import FASTEST_FIRST, Choice, chosen
from pcmecl_fast.ops.operator import BACKENDS, REFERENCE


def test_without_a_measurement_triton_comes_first_where_it_is_estimated_to_be_faster():
    for operator in ("correlation_loss", "tree_attention"):
        row = chosen(operator, "NVIDIA H100 80GB HBM3", "float32")
        assert row.fastest_first == ("triton", "cuda", "cpu", "reference")
        assert "not measured" in row.source
    assert chosen("direction_loss", "NVIDIA H100 80GB HBM3", "float32").fastest_first == FASTEST_FIRST


def test_the_most_special_row_counts_and_all_others_follow(monkeypatch):
    rows = (
        Choice("clip_frames", "", "", ("triton", "cuda"), ""),
        Choice("clip_frames", "H100", "", ("cuda", "triton"), ""),
        Choice("clip_frames", "H100", "bfloat16", ("reference", "xformers"), ""),
    )
    monkeypatch.setattr(choice, "CHOICES", rows)
    chosen.cache_clear()
    try:
        assert chosen("clip_frames", "A100", "float32").fastest_first[:2] == ("triton", "cuda")
        assert chosen("clip_frames", "H100", "float32").fastest_first[:2] == ("cuda", "triton")
        assert chosen("clip_frames", "H100", "bfloat16").fastest_first == (
            "reference", "xformers", "cuda", "triton", "cpu",
        )  # fmt: skip
    finally:
        chosen.cache_clear()


def test_every_row_names_what_there_is():
    for row in choice.CHOICES:
        assert row.operator in REFERENCE.implementations
        assert set(row.fastest_first) <= set(BACKENDS)
        assert row.source


def attention(query, key, value, *, attn_bias):
    """As xformers defines it, plainly; (N, S, H, d)."""
    assert attn_bias.stride(-2) % 8 == 0  # its kernels read aligned rows
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_bias)
    return out.transpose(1, 2)


@pytest.fixture
def library(monkeypatch):
    """A stand-in for xformers.ops."""
    module = ModuleType("xformers.ops")
    module.memory_efficient_attention = attention
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("library")
def test_xformers_gets_the_trees_mask(dtype):
    call = make("tree_attention", people=3, width=8, dtype=dtype)
    layout = call.function.keywords["layout"]
    out, gradients = value_and_gradients(lambda x, **_: xformers.tree_attention(x, layout), call.floats)
    exact, exact_gradients = value_and_gradients(call, call.widened(), backend="reference")
    assert_close_for(dtype)(out, exact)
    assert_close_for(dtype)(gradients[0], exact_gradients[0])


def test_xformers_is_not_there():
    assert "xformers is not installed" in BACKENDS["xformers"].missing() or not torch.cuda.is_available()
    with pytest.raises(RuntimeError, match="backend 'xformers' cannot run tree_attention: "):
        make("tree_attention")(backend="xformers")


def test_an_operator_that_fails_here_is_tried_once_and_says_why(library, monkeypatch):
    tried = []

    def fail(*arguments, **options):
        tried.append(1)
        raise NotImplementedError("No operator found for this attention\nand a page of reasons")

    library.memory_efficient_attention = fail
    monkeypatch.setattr(xformers, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **options: zeros(*shape, **options))
    xformers._failure.cache_clear()
    try:
        for _ in range(2):
            assert (
                BACKENDS["xformers"]
                .missing()
                .startswith("xformers' operator does not run here (No operator found for this attention); install")
            )
        assert len(tried) == 1
    finally:
        xformers._failure.cache_clear()
