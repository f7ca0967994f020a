"""A training step as one CUDA graph: at stage 1's sizes launch overhead, not arithmetic, is the bottleneck.

The first steps run normally, on a separate stream: they warm everything up and already train. The last of them runs
while whatever would wait for the device is an error: a step that waits is never captured, since a capture that breaks
off damages the stream and the allocator. The next step is captured; from then on one copies its inputs to where the
graph reads them and replays the graph.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from pcmecl_fast.distributed import ranks

WARM_UP = 3  # steps before the capture: kernels compile and are tuned, the optimiser creates its state

log = logging.getLogger("pcmecl_fast")

Step = Callable[..., tuple[Tensor, ...]]


class Replayable(Protocol):
    def replay(self) -> None: ...


def adamw(parameters: Iterable[Tensor], lr: float, mode: str, device: torch.device) -> torch.optim.AdamW:
    """AdamW, with its learning rate and step count on the device if its step may be captured."""
    if not _wanted(mode, device):
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    return torch.optim.AdamW(parameters, lr=torch.tensor(lr, device=device), weight_decay=0.01, capturable=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """In place if it is a tensor, because a captured step reads that tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def make_step(step: Step, optimizer: torch.optim.Optimizer, mode: str, device: torch.device) -> Step:
    """The step itself or, if graphs are wanted, one that is captured after its first calls and then replayed.

    Args:
        step: takes tensors of the same shapes at every call, updates the weights, returns tensors; it creates its own
            gradients (`zero_grad(set_to_none=True)` inside) and does not wait for the device.
        optimizer: the optimiser from `adamw` that the step uses.
        mode: "auto", "on" or "off". If the capture fails, auto continues without a graph and logs why; on raises.
        device: where the training runs.

    Raises:
        ValueError: "on" without a CUDA device.
    """
    wanted = _wanted(mode, device)
    _settle(optimizer, wanted, device)
    if not wanted:
        return step
    # Over ranks, one that goes on without a graph would not meet the others' messages.
    must = mode == "on" or ranks() > 1
    return GraphedStep(step, optimizer, must=must, capture=capture, run_aside=_run_aside, rehearse=rehearse)


class GraphedStep:
    """See `make_step`; `capture`, `run_aside` and `rehearse` do the parts that need a GPU."""

    def __init__(
        self,
        step: Step,
        optimizer: torch.optim.Optimizer,
        *,
        must: bool,
        capture: Callable[[Step, tuple[Tensor, ...]], tuple[Replayable, tuple[Tensor, ...]]],
        run_aside: Callable[[Step, tuple[Tensor, ...]], tuple[Tensor, ...]],
        rehearse: Callable[[Step, tuple[Tensor, ...]], tuple[Tensor, ...]],
    ) -> None:
        self._step, self._optimizer, self._must = step, optimizer, must
        self._capture, self._run_aside, self._rehearse = capture, run_aside, rehearse
        self._calls = 0
        self._graph: Replayable | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()
        self._given_up = False

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self._given_up:
            return self._step(*inputs)
        self._calls += 1
        if self._calls < WARM_UP:
            return self._run_aside(self._step, inputs)
        if self._calls == WARM_UP:
            return self._attempt(lambda: self._rehearse(self._step, inputs)) or self._step(*inputs)
        if self._graph is None:
            self._inputs = tuple(x.clone() for x in inputs)
            captured = self._attempt(lambda: self._capture(self._step, self._inputs))
            if captured is None:
                return self._step(*inputs)
            self._graph, self._outputs = captured
        return self._replay(inputs)

    def _attempt(self, run: Callable[[], Any]) -> Any:
        """The result, or None if it fails and the step may run without a graph: with everything as it was before."""
        parameters = [x for group in self._optimizer.param_groups for x in group["params"]]
        values, state = [x.detach().clone() for x in parameters], copy.deepcopy(self._optimizer.state_dict())
        try:
            return run()
        except RuntimeError as error:
            if self._must:
                raise
            self._given_up = True
            reason = str(error).splitlines()[0]
            log.info("the step runs without a CUDA graph: it could not be captured (%s)", reason)
        with torch.no_grad():
            for x, value in zip(parameters, values, strict=True):
                x.copy_(value)
                x.grad = None
        self._optimizer.load_state_dict(state)
        return None

    def _replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert self._graph is not None
        if [x.shape for x in inputs] != [x.shape for x in self._inputs]:
            # The graph is captured for one set of shapes; other shapes run eagerly.
            return self._step(*inputs)
        for kept, x in zip(self._inputs, inputs, strict=True):
            kept.copy_(x)
        self._graph.replay()
        return tuple(x.clone() for x in self._outputs)


def _wanted(mode: str, device: torch.device) -> bool:
    if mode == "on" and device.type != "cuda":
        raise ValueError(
            f"cuda_graphs: got 'on' with device {device.type}; takes 'auto' or 'off' without a CUDA device"
        )
    return mode != "off" and device.type == "cuda"


def _settle(optimizer: torch.optim.Optimizer, captured: bool, device: torch.device) -> None:
    """Adapt a resumed optimiser: its state was loaded to the CPU and may come from another kind of step."""
    for group in optimizer.param_groups:
        group["capturable"] = captured
        group["lr"] = torch.as_tensor(group["lr"], device=device) if captured else float(group["lr"])
    for state in optimizer.state.values():
        state["step"] = state["step"].to(device if captured else "cpu")


def _run_aside(step: Step, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """On a non-default stream, as a capture requires."""
    here = torch.cuda.current_stream()
    aside = torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        outputs = step(*inputs)
    here.wait_stream(aside)
    return outputs


def rehearse(step: Step, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As `_run_aside`; RuntimeError where the step waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return _run_aside(step, inputs)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def capture(step: Step, inputs: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
    graph, pool, here = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.Stream()):
            outputs = step(*inputs)
    except RuntimeError:
        # PyTorch leaves the capture's stream current, and up to 2.11 the allocator in the belief that a capture is on.
        torch.cuda.set_stream(here)
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(here.device_index, pool)
        raise
    return graph, outputs
