"""Which implementation runs: the call's word, else the context's, else the environment's, else the fastest."""

import asyncio
import logging
import threading

import pytest
import torch

from pcmecl_fast.ops import backend as backend_module
from pcmecl_fast.ops import backends, clip_frames, use_backend
from pcmecl_fast.ops.backend import BackendStatus, dispatch, register, register_backend


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """Each test has an operator "double", its own table of implementations, and no PCMECL_BACKEND."""
    for table in ("_implementations", "_missing", "_logged"):
        monkeypatch.setattr(backend_module, table, getattr(backend_module, table).copy())
    backend_module._missing.clear()
    backend_module._logged.clear()
    monkeypatch.delenv("PCMECL_BACKEND", raising=False)
    register("double", "reference", lambda x: 2 * x)


def add_cpu(why_not=lambda x: None, missing=lambda: None):
    """A "cpu" backend whose results can be told from the reference's: "double" gives minus what it should."""
    register_backend("cpu", missing)
    register("double", "cpu", lambda x: -2 * x, why_not)


def double(x=1, backend=None):
    return dispatch("double", x, backend=backend)


def test_auto_takes_the_reference_where_there_is_nothing_else():
    assert double() == 2


def test_auto_takes_the_fastest_that_takes_the_tensors():
    add_cpu(why_not=lambda x: "x is negative" if x < 0 else None)
    assert double(1) == -2
    assert double(-1) == -2  # the reference's


def test_auto_takes_the_fastest_first():
    add_cpu()
    register_backend("triton", lambda: None)
    register("double", "triton", lambda x: "triton")
    assert double() == "triton"
    register_backend("cuda", lambda: None)
    register("double", "cuda", lambda x: "cuda")
    assert double() == "cuda"


def test_auto_passes_by_a_backend_that_cannot_run_here():
    add_cpu(missing=lambda: "built for another torch")
    assert double() == 2


def test_auto_passes_by_a_backend_without_this_operator():
    register_backend("cpu", lambda: None)
    assert double() == 2


def test_the_calls_word_comes_before_the_contexts_and_that_before_the_environments(monkeypatch):
    add_cpu()
    assert double() == -2
    monkeypatch.setenv("PCMECL_BACKEND", "reference")
    assert double() == 2
    with use_backend("cpu"):
        assert double() == -2
        assert double(backend="reference") == 2
        with use_backend("auto"):
            assert double() == -2
        with use_backend("reference"):
            assert double() == 2
        assert double() == -2
    assert double() == 2
    assert double(backend="auto") == -2


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv("PCMECL_BACKEND", "")
    assert double() == 2


def test_a_context_ends_with_its_block_even_by_an_exception():
    add_cpu()
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert double() == -2


def test_a_context_holds_for_its_own_thread_only():
    add_cpu()
    inside, done, seen = threading.Event(), threading.Event(), []

    def other_thread():
        with use_backend("reference"):
            inside.set()
            done.wait(timeout=10)
            seen.append(double())

    thread = threading.Thread(target=other_thread)
    thread.start()
    assert inside.wait(timeout=10)
    assert double() == -2
    with use_backend("cpu"):
        done.set()
        thread.join()
    assert seen == [2]


def test_a_context_holds_for_its_own_task_only():
    add_cpu()

    async def run(name):
        with use_backend(name):
            await asyncio.sleep(0)
            return double()

    async def both():
        return await asyncio.gather(run("reference"), run("cpu"), run("reference"))

    assert asyncio.run(both()) == [2, -2, 2]


@pytest.mark.parametrize(
    "call", [lambda: double(backend="tpu"), lambda: use_backend("tpu"), lambda: double(backend="")]
)
def test_an_unknown_name_lists_the_known_ones(call):
    with pytest.raises(ValueError, match="takes one of reference, cpu, triton, cuda, auto"):
        call()


def test_an_unknown_name_in_the_environment_says_so(monkeypatch):
    monkeypatch.setenv("PCMECL_BACKEND", "tpu")
    with pytest.raises(ValueError, match="PCMECL_BACKEND: got 'tpu'; takes one of reference, cpu, triton, cuda, auto"):
        double()


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_a_named_backend_that_is_not_installed_says_how_to_get_it(name):
    with pytest.raises(
        RuntimeError, match=f"backend '{name}' cannot run double: this version does not have it yet; take 'reference'"
    ):
        double(backend=name)
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run double"), use_backend(name):
        double()


def test_a_named_backend_that_cannot_run_here_says_why():
    add_cpu(missing=lambda: "built for torch 2.11, this is 2.15; run `make build`")
    with pytest.raises(
        RuntimeError, match=r"backend 'cpu' cannot run double: built for torch 2.11, .* run `make build`"
    ):
        double(backend="cpu")


def test_a_named_backend_that_does_not_take_the_tensors_says_why():
    add_cpu(why_not=lambda x: "x is negative; it takes x of at least 0" if x < 0 else None)
    assert double(1, backend="cpu") == -2
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run double: x is negative; it takes"):
        double(-1, backend="cpu")


def test_a_named_backend_without_this_operator_says_so():
    register_backend("cpu", lambda: None)
    with pytest.raises(
        RuntimeError, match=r"cpu.* cannot run double: it has no implementation of double; take backend="
    ):
        double(backend="cpu")


def test_auto_logs_once_what_it_lacks(caplog):
    with caplog.at_level(logging.INFO, logger="pcmecl_fast"):
        double()
        double()
        double(backend="reference")
    (record,) = caplog.records
    assert record.name == "pcmecl_fast"
    message = record.getMessage()
    assert message.startswith("double runs on the reference backend (cuda: this version does not have it yet")
    assert "triton: " in message
    assert "cpu: " in message


def test_auto_logs_nothing_where_something_faster_runs(caplog):
    add_cpu()
    with caplog.at_level(logging.INFO, logger="pcmecl_fast"):
        double()
    assert not caplog.records


def test_the_table_has_a_reason_for_each_backend_that_is_missing():
    add_cpu()
    register_backend("triton", lambda: "no CUDA device")
    table = {status.name: status for status in backends()}
    assert list(table) == ["reference", "cpu", "triton", "cuda"]
    assert table["reference"] == BackendStatus("reference", True, "")
    assert table["cpu"] == BackendStatus("cpu", True, "")
    assert table["triton"] == BackendStatus("triton", False, "no CUDA device")
    assert not table["cuda"].available
    assert "does not have it yet" in table["cuda"].reason


def test_a_compiled_function_follows_the_context():
    frames = torch.zeros(1, 3, 4, 4)
    register_backend("cpu", lambda: None)
    register("clip_frames", "cpu", lambda frames, size, mean, std: frames[..., :size, :size] + 5)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(frames):
        return clip_frames(frames, 2, (0.5,) * 3, (0.5,) * 3)

    with use_backend("reference"):
        assert run(frames).eq(0).all()
    with use_backend("cpu"):
        assert run(frames).eq(5).all()
    with use_backend("reference"):
        assert run(frames).eq(0).all()
