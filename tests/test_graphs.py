"""The step as a CUDA graph: the logic around the graph, tested without a GPU; with one, the final weights."""

import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tolerances import assert_close_for

from pcmecl_fast.train import graphs
from pcmecl_fast.train.graphs import WARM_UP, GraphedStep, adamw, make_step, set_learning_rate

CPU = torch.device("cpu")


class Recorded:
    """A stand-in for a graph: its replay runs the step on the inputs it was captured with."""

    def __init__(self, step, inputs):
        self.step, self.inputs, self.outputs, self.replays = step, inputs, tuple(x.clone() for x in inputs), 0

    def replay(self):
        self.replays += 1
        for kept, x in zip(self.outputs, self.step(*self.inputs), strict=True):
            kept.copy_(x)


def directly(step, inputs):
    return step(*inputs)


def graphed(step, capture, *, must=False, rehearse=directly, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW([torch.ones(1)])
    return GraphedStep(step, optimizer, must=must, capture=capture, run_aside=directly, rehearse=rehearse)


def test_steps_are_replayed_with_each_calls_inputs():
    made = []

    def capture(step, inputs):
        made.append(Recorded(step, inputs))
        return made[0], made[0].outputs

    run = graphed(lambda x: (2 * x,), capture)
    results = [run(torch.tensor([float(i)]))[0] for i in range(WARM_UP + 4)]
    assert [x.item() for x in results] == [2.0 * i for i in range(WARM_UP + 4)]
    (graph,) = made
    assert graph.replays == 4


def test_another_shape_runs_without_the_graph():
    def capture(step, inputs):
        graph = Recorded(step, inputs)
        return graph, graph.outputs

    run = graphed(lambda x: (2 * x,), capture)
    for _ in range(WARM_UP + 1):
        run(torch.ones(2))
    assert run(torch.ones(3))[0].tolist() == [2.0, 2.0, 2.0]


def failing(step, inputs):
    raise RuntimeError("operation not permitted when stream is capturing\nand pages of advice")


def test_a_step_that_cannot_be_captured_still_runs_and_logs_why_once(caplog):
    run = graphed(lambda x: (2 * x,), failing)
    with caplog.at_level(logging.INFO, logger="pcmecl_fast"):
        results = [run(torch.tensor(float(i)))[0].item() for i in range(WARM_UP + 3)]
    assert results == [2.0 * i for i in range(WARM_UP + 3)]
    (record,) = caplog.records
    assert record.getMessage().endswith("could not be captured (operation not permitted when stream is capturing)")


def test_a_step_that_must_be_captured_raises():
    run = graphed(lambda x: (x,), failing, must=True)
    for _ in range(WARM_UP):
        run(torch.ones(1))
    with pytest.raises(RuntimeError, match="not permitted"):
        run(torch.ones(1))


@pytest.mark.parametrize("part", ["rehearsal", "capture"])
def test_an_attempt_that_fails_leaves_no_trace(part):
    """It fails at its very end, when the optimiser has made its step."""

    def fails(step, inputs):
        step(*inputs)
        raise RuntimeError("called a synchronizing CUDA operation")

    weights = {}
    for broken in (False, True):
        weight = torch.ones(1, requires_grad=True)
        optimizer = torch.optim.AdamW([weight], lr=torch.tensor(0.1))
        kept = optimizer.param_groups[0]["lr"]
        parts = {"capture": failing, "rehearse": directly}
        if broken:
            parts["rehearse" if part == "rehearsal" else "capture"] = fails
        step = descent(weight, optimizer)
        run = graphed(step, parts["capture"], rehearse=parts["rehearse"], optimizer=optimizer)
        for i in range(WARM_UP + 3):
            run(torch.tensor(float(i + 1)))
        weights[broken] = weight.detach()
        assert optimizer.state[weight]["step"] == WARM_UP + 3
        assert optimizer.param_groups[0]["lr"] == kept
    assert torch.equal(weights[False], weights[True])


def test_a_step_that_waits_is_never_captured(monkeypatch, caplog):
    """With a stand-in for the device: what waits raises while PyTorch is asked to make that an error."""
    asked = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: asked[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", asked.append)
    monkeypatch.setattr(graphs, "_run_aside", directly)

    def waits(x):
        if asked[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return (x,)

    run = graphed(waits, lambda step, inputs: pytest.fail("captured"), rehearse=graphs.rehearse)
    with caplog.at_level(logging.INFO, logger="pcmecl_fast"):
        for i in range(WARM_UP + 3):
            assert run(torch.tensor(float(i)))[0] == i
    assert asked == ["default", "error", "default"]
    assert "without a CUDA graph: it could not be captured (called a synchronizing" in caplog.text


def test_after_a_capture_that_broke_off_the_stream_and_the_allocator_are_as_before(monkeypatch):
    """With stand-ins that behave as PyTorch does: a capture that cannot be ended leaves its stream and its pool."""
    here, aside = (SimpleNamespace(device_index=0, name=name) for name in ("here", "aside"))
    current, pools = [here], set()

    @contextmanager
    def capture(graph, *, pool, stream):
        current.append(stream)
        pools.add(pool)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: aside)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: pools.remove(pool), raising=False)
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.capture(lambda x: failing(None, None), (torch.ones(1),))
    assert current[-1] is here
    assert not pools


def test_a_cpu_has_no_graphs():
    def step(x):
        return (x,)

    optimizer = adamw([torch.ones(1, requires_grad=True)], 0.1, "auto", CPU)
    assert make_step(step, optimizer, "auto", CPU) is step
    assert make_step(step, optimizer, "off", CPU) is step
    with pytest.raises(ValueError, match="cuda_graphs: got 'on' with device cpu; takes 'auto' or 'off'"):
        make_step(step, optimizer, "on", CPU)


def test_a_checkpoint_of_captured_steps_resumes_without_a_graph():
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=torch.tensor(0.1))
    weight.grad = torch.ones(1)
    optimizer.step()
    optimizer.param_groups[0]["capturable"] = True  # as in the checkpoint of a GPU run
    make_step(lambda x: (x,), optimizer, "auto", CPU)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert optimizer.state[weight]["step"] == 2


def test_a_learning_rate_is_set_in_place_where_it_is_a_tensor():
    weight = torch.ones(1, requires_grad=True)
    kept = torch.tensor(0.1)
    capturable = torch.optim.AdamW([weight], lr=kept)
    set_learning_rate(capturable, 0.5)
    assert kept == 0.5
    plain = torch.optim.AdamW([weight], lr=0.1)
    set_learning_rate(plain, 0.5)
    assert plain.param_groups[0]["lr"] == 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_graphs_give_the_weights_of_plain_steps():
    assert_close_for(torch.float32)(train("on"), train("off"))


def descent(weight, optimizer):
    def step(x):
        loss = (x - weight).square().sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return (loss.detach(),)

    return step


def train(mode):
    device = torch.device("cuda")
    torch.manual_seed(0)
    weight = torch.randn(4, 3, device=device, requires_grad=True)
    optimizer = adamw([weight], 0.1, mode, device)

    def step(x):
        loss = (x @ weight).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return (loss.detach(),)

    run = make_step(step, optimizer, mode, device)
    for i in range(10):
        set_learning_rate(optimizer, 0.1 / (i + 1))
        run(torch.full((2, 4), float(i + 1), device=device))
    return weight.detach()
