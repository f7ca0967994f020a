"""Which backend runs: the call's choice, else the context's, else the environment's, else the fastest."""

import asyncio
import logging
import threading

import pytest
import torch

from pcmecl_fast.ops import backend_status, clip_frames, direction_loss, explain, operator, use_backend
from pcmecl_fast.ops.frames import CLIP_FRAMES
from pcmecl_fast.ops.operator import BACKENDS, Backend, BackendStatus, Explanation, Limits, Operator

CPU_FLOATS = Limits(("cpu",), (torch.float32,), most={"length": 3}, least={"length": 1})


def _double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


DOUBLE = Operator(
    _double,
    "Tensor x",
    gradients=("x",),
    outputs=lambda x: (torch.empty_like(x),),
    sizes={"length": lambda x: len(x)},
)


@pytest.fixture(autouse=True)
def _own_backends(monkeypatch):
    """Each test starts with the reference alone, nothing logged, and no PCMECL_BACKEND."""
    for name in ("cpu", "triton", "cuda", "xformers"):
        monkeypatch.setitem(BACKENDS, name, Backend(name, missing=lambda: "it is not here"))
    monkeypatch.setattr(operator, "_logged", set())
    monkeypatch.delenv("PCMECL_BACKEND", raising=False)


def add(name="cpu", missing=lambda: None, limits=None, result=-2):
    """A backend with recognisable results: "double" gives -2 instead of 2."""
    BACKENDS[name] = Backend(name, missing)
    BACKENDS[name].add(DOUBLE, lambda x: result * x, limits=limits)


def double(length=1, backend=None, dtype=torch.float32):
    result = DOUBLE(torch.ones(length, dtype=dtype), backend=backend)
    return result if isinstance(result, Explanation) else int(result[0]) if length else 0


def test_auto_falls_back_to_the_reference():
    assert double() == 2


def test_auto_chooses_the_fastest_backend_that_supports_the_tensors():
    add(limits=CPU_FLOATS)
    assert double(1) == -2
    assert double(4) == 2  # the reference's


def test_auto_tries_the_fastest_first():
    add("cpu")
    add("triton", result=3)
    assert double() == 3
    add("cuda", result=4)
    assert double() == 4


def test_auto_skips_a_backend_that_cannot_run_here():
    add(missing=lambda: "built for another torch")
    assert double() == 2


def test_auto_skips_a_backend_without_this_operator():
    BACKENDS["cpu"] = Backend("cpu", missing=lambda: None)
    assert double() == 2


def test_the_call_overrides_the_context_and_the_context_the_environment(monkeypatch):
    add()
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


def test_an_empty_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("PCMECL_BACKEND", "")
    assert double() == 2


def test_a_context_ends_with_its_block_even_on_an_exception():
    add()
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert double() == -2


def test_a_context_applies_to_its_own_thread_only():
    add()
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
    # Entered one in the other and left in the order of entering: what torch.compile reads is as it was, too.
    assert not operator._while_compiling


def test_a_context_applies_to_its_own_task_only():
    add()

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
    with pytest.raises(ValueError, match="takes one of reference, cpu, triton, cuda, xformers, auto"):
        call()


def test_an_unknown_name_in_the_environment_is_reported(monkeypatch):
    monkeypatch.setenv("PCMECL_BACKEND", "tpu")
    with pytest.raises(
        ValueError, match="PCMECL_BACKEND: got 'tpu'; takes one of reference, cpu, triton, cuda, xformers, auto"
    ):
        double()


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_a_named_backend_that_is_not_installed_says_how_to_get_it(name):
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run _double: it is not here"):
        double(backend=name)
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run _double"), use_backend(name):
        double()


def test_a_named_backend_that_cannot_run_here_says_why():
    add(missing=lambda: "built for torch 2.11, this is 2.15; run `make build`")
    with pytest.raises(
        RuntimeError, match=r"backend 'cpu' cannot run _double: built for torch 2.11, .* run `make build`"
    ):
        double(backend="cpu")


def test_a_named_backend_that_does_not_support_the_tensors_says_why():
    add(limits=CPU_FLOATS)
    assert double(1, backend="cpu") == -2
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run _double: length: got 4; supports at most 3"):
        double(4, backend="cpu")


def test_a_named_backend_without_this_operator_says_so():
    BACKENDS["cpu"] = Backend("cpu", missing=lambda: None)
    with pytest.raises(
        RuntimeError, match=r"cpu.* cannot run _double: it has no implementation of _double; use backend="
    ):
        double(backend="cpu")


def test_auto_logs_once_what_was_chosen_and_why_nothing_faster(caplog):
    add("cpu", limits=CPU_FLOATS)
    add("triton", missing=lambda: "no CUDA device")
    with caplog.at_level(logging.INFO, logger="pcmecl_fast"):
        double()
        double()
        double(backend="reference")
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("pcmecl_fast", "INFO")
    assert record.getMessage() == "_double runs on cpu (cuda: it is not here; triton: no CUDA device)"


def test_auto_says_equal_reasons_once_and_not_how_to_get_what_is_missing(caplog):
    add("cpu", limits=CPU_FLOATS)
    add("cuda", missing=lambda: "there is no CUDA device")
    add("triton", missing=lambda: "there is no CUDA device (or in tests an interpreter; see elsewhere)")
    with caplog.at_level(logging.INFO, logger="pcmecl_fast"):
        double()
    assert [record.getMessage() for record in caplog.records] == ["_double runs on cpu (no CUDA device)"]


def test_auto_logs_a_later_fallback_too(caplog):
    add("cuda", limits=CPU_FLOATS)
    with caplog.at_level(logging.INFO, logger="pcmecl_fast"):
        double()
        double(dtype=torch.float64)
    taken, fell_back = (record.getMessage() for record in caplog.records)
    assert taken == "_double runs on cuda"
    assert fell_back.startswith("_double runs on reference (cuda: got float64; supports float32; triton: it is")


def test_explain_says_what_would_run_and_why_not_the_others(caplog):
    add("cpu", limits=CPU_FLOATS)
    with caplog.at_level(logging.INFO, logger="pcmecl_fast"):
        explanation = explain(double)
    assert not caplog.records
    assert (explanation.operator, explanation.backend) == ("_double", "cpu")
    assert explanation.why_not == {
        "cuda": "it is not here", "triton": "it is not here", "reference": "slower than cpu"
    }  # fmt: skip
    assert str(explanation).startswith("_double runs on cpu (cuda: it is not here; ")
    assert explain(double, backend="reference").why_not["cpu"] == "reference was requested"
    with use_backend("reference"):
        assert explain(double).backend == "reference"


def test_explain_accepts_the_public_functions_and_runs_their_checks():
    frames = torch.zeros(1, 3, 4, 4)
    assert explain(clip_frames, frames, 2, (0.5,) * 3, (0.5,) * 3).backend == "reference"
    with pytest.raises(ValueError, match="frames: got shape"):
        explain(clip_frames, frames[0], 2, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run clip_frames"):
        explain(clip_frames, frames, 2, (0.5,) * 3, (0.5,) * 3, backend="cpu")
    with pytest.raises(TypeError, match=r"operator: got .*; takes a function of pcmecl_fast.ops"):
        explain(torch.sin, frames)
    with pytest.raises(TypeError, match="individual"):
        explain(direction_loss, frames[0, 0], frames[0, 0], frames[0])


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(("cuda",), (torch.float32,)), "got a tensor on cpu; supports CUDA tensors"),
        (Limits(("cpu",), (torch.float16, torch.float64)), "got float32; supports float16 or float64"),
        (Limits(("cpu",), (torch.float32,), most={"length": 2}), "length: got 3; supports at most 2"),
        (
            Limits(("cpu",), (torch.float32,), most={"length": {torch.float32: 1}}),
            "length: got 3; supports at most 1 in float32",
        ),
        (Limits(("cpu",), (torch.float32,), least={"length": 4}), "length: got 3; supports at least 4"),
        (Limits(("cpu",), (torch.float32,), most={"length": 3}, least={"length": 3}), None),
    ],
)
def test_limits_give_both_the_check_and_its_message(limits, reason):
    assert limits.unsupported_reason(DOUBLE.sizes, [torch.ones(3)]) == reason


def test_the_table_has_a_reason_for_each_backend_that_is_missing():
    add("cpu")
    table = {status.name: status for status in backend_status()}
    assert list(table) == ["reference", "cpu", "triton", "cuda", "xformers"]
    assert table["reference"] == BackendStatus("reference", True, "")
    assert table["cpu"] == BackendStatus("cpu", True, "")
    assert table["triton"] == BackendStatus("triton", False, "it is not here")


def test_a_compiled_function_follows_the_context():
    frames = torch.zeros(1, 3, 4, 4)
    BACKENDS["cpu"] = Backend("cpu", missing=lambda: None)
    BACKENDS["cpu"].add(CLIP_FRAMES, lambda frames, size, *colours: frames[..., :size, :size] + 5)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(frames):
        return clip_frames(frames, 2, (0.5,) * 3, (0.5,) * 3)

    with use_backend("reference"):
        assert run(frames).eq(0).all()
    with use_backend("cpu"):
        assert run(frames).eq(5).all()
    with use_backend("reference"):
        assert run(frames).eq(0).all()
