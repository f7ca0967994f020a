"""The benchmarks measure what they say."""

import cuda_on_host
import pytest
import torch

from bench import compare, host_cost
from pcmecl_fast.ops.operator import BACKENDS
from pcmecl_fast.ops.tree_attention import TREE_ATTENTION

compare.load_all()
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [name for name, entry in compare.COMPARISONS.items() if entry.host])
def test_the_cost_of_a_call_is_measured_on_one_core(name, monkeypatch):
    used = []
    monkeypatch.setattr(compare, "alternate", lambda runs, *rest: used.append(torch.get_num_threads()) or [[1.0]] * 2)
    threads = torch.get_num_threads()
    rows, failure = compare.compare(name, CPU, torch.float32, seconds=0.0)
    assert failure is None
    assert [row.side for row in rows] == ["eager", host_cost.HARNESS if "tree" in name else "fused"]
    assert used == [1]
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(not cuda_on_host.compiler(), reason="needs a C++ compiler and the sources")
def test_the_cost_of_tree_attention_is_that_of_the_cuda_backend(monkeypatch):
    installed, during = BACKENDS["cuda"], []
    monkeypatch.setattr(host_cost.Case, "run", lambda case, backend: during.append(BACKENDS["cuda"]))
    compare.COMPARISONS["host_tree_attention"].build(CPU, torch.float32).sides[-1].run()
    assert during[0].takes(TREE_ATTENTION, "cpu")
    assert BACKENDS["cuda"] is installed
