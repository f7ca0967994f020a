"""Nothing inside a step waits for the device, shown without one: on PyTorch's meta device.

Its tensors have shapes and no values, so whatever needs a value (`item`, `nonzero`, an index of bools) raises. Copies
between the host and the device raise here, too: from ordinary memory they wait as well. The backend "cuda"
needs values: it runs on the host harness, where whatever would read one raises. `test_triton_as_launched.py` does the
same for Triton's.
"""

import cuda_on_host
import operators
import pytest
import torch
from modes import Seen
from torch.utils._python_dispatch import TorchDispatchMode

from pcmecl_fast import PCMECLCriterion, PersonalizedPrompts, PromptBank, load_clip
from pcmecl_fast.train.config import PromptsConfig
from pcmecl_fast.train.prompts import _take_step

DEVICE = torch.device("meta")
EMOTIONS = ["neutral", "happy", "sad"]


class NoCopies(TorchDispatchMode):
    """Copies between the host and the device raise."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            places = {x.device.type for x in (*arguments, result) if isinstance(x, torch.Tensor)}
            if len(places) > 1:
                raise RuntimeError(f"{function} from {arguments[0].device} to {result.device}")
        return result


class NoReading(Seen):
    """What would read a tensor's value raises."""

    WAITING = tuple(
        f"aten::{name}"
        for name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item", "unique")
    )

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.name().startswith(self.WAITING):
            raise RuntimeError(f"{function} waits")
        return super().__torch_dispatch__(function, types, arguments, options)


@pytest.mark.skipif(not cuda_on_host.compiler(), reason="needs a C++ compiler and the sources")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("operator", operators.OPERATORS)
def test_the_cuda_backend_reads_nothing_back(operator, deterministic):
    module = cuda_on_host.load()
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in operators.make(operator).schema_arguments]
    names = {"direction_logits": 3, "direction_loss": 4, "correlation_loss": 3}
    keeps_result = operator == "tree_attention"
    torch.use_deterministic_algorithms(deterministic)
    try:
        with NoReading() as read:
            results = getattr(module, operator)(*arguments)
            results = [results] if isinstance(results, torch.Tensor) else list(results)
            grad = torch.ones_like(results[0])
            kept = results if keeps_result else results[1:]
            needs = [True] * names.get(operator, 1)
            gradients = getattr(module, f"{operator}_backward")(grad, *arguments, *kept, needs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x is not None for x in gradients)
    assert {"aten::empty.memory_format", "aten::empty_like"} & set(read.names)  # it sees what drivers call


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool((x > 0).all()),
        lambda x: x + torch.arange(3).to(DEVICE),
        lambda x: x.cpu(),
    ],
    ids=["item", "bools", "nonzero", "bool", "to the device", "to the host"],
)
def test_what_waits_is_found(waits):
    x = torch.ones(3, device=DEVICE)
    with NoCopies(), pytest.raises((RuntimeError, NotImplementedError)):
        waits(x)


@pytest.mark.parametrize("condition", ["features", None])
@pytest.mark.parametrize("context", ["shared", "per-emotion"])
def test_a_step_of_stage_one_does_not_wait(condition, context):
    clip = load_clip()
    prompts = PersonalizedPrompts(clip, EMOTIONS, n_ctx=4, context=context, condition=condition)
    clip.to(DEVICE), prompts.to(DEVICE)
    optimizer = torch.optim.SGD(prompts.parameters(), lr=1.0)  # AdamW is capturable on GPUs alone
    inputs = (
        torch.empty(4, 3, clip.embed_dim, device=DEVICE),
        torch.empty(4, clip.embed_dim, device=DEVICE),
        torch.empty(4, 3, dtype=torch.bool, device=DEVICE),
    )
    _take_step(20.0, prompts, optimizer, PromptsConfig(), len(inputs[0]), *inputs)  # what is made once, is made here
    with NoCopies():
        loss, _, _ = _take_step(20.0, prompts, optimizer, PromptsConfig(), len(inputs[0]), *inputs)
    assert loss.device == DEVICE


@pytest.mark.parametrize("clips", [False, True])
def test_a_step_of_the_criterion_does_not_wait(clips):
    clip = load_clip()
    bank = PromptBank(torch.randn(4, 3, clip.embed_dim), ["a", "b", "c", "d"], EMOTIONS)
    criterion = PCMECLCriterion(clip, bank, contrast=0.5, strength=1.0, lengths=torch.ones(4, 3, 3)).to(DEVICE)
    frames = torch.empty(2, 3, 3, 64, 64, device=DEVICE) if clips else torch.empty(2, 3, 64, 64, device=DEVICE)
    labels = [torch.zeros(2, dtype=torch.int64, device=DEVICE) for _ in range(3)]
    with NoCopies():
        edited = (frames * 0.9).requires_grad_()
        criterion(frames[:, 0] if clips else frames, edited, *labels).backward()
    assert edited.grad.device == DEVICE
