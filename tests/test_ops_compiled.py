"""The compiled backends beyond the formulas: PyTorch's machinery around them, extremes, memory."""

import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from operators import OPERATORS, make, value_and_gradients
from tolerances import assert_close_for
from torch import nn
from torch.utils.checkpoint import checkpoint

from pcmecl_fast import PCMECLCriterion, PersonalizedPrompts, PromptBank
from pcmecl_fast.models import WarpFields
from pcmecl_fast.ops import correlation_loss, direction_loss

pytestmark = pytest.mark.usefixtures("compiled_backend")

operators = pytest.mark.parametrize("operator", OPERATORS)
# What an operator's batch is called, and how much of it a size of one is.
BATCH = {
    "direction_logits": ("batch", 10),
    "direction_loss": ("batch", 10),
    "correlation_loss": ("people", 9),
    "tree_attention": ("people", 2),
    "clip_frames": ("batch", 2),
}


def sized(operator, size=4):
    """An operator's call, the batch growing with `size`."""
    name, count = BATCH[operator]
    options = {"negatives": "distinct"} if operator == "correlation_loss" else {}
    return make(operator, **{name: count * size}, **options)


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "tree_attention"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(operator, dtype, compiled_backend):
    call = make(operator, dtype=dtype, batch=40) if "direction" in operator else make(operator, dtype=dtype)
    operation = getattr(torch.ops.pcmecl_fast, operator).default
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(operation, (*call.schema_arguments, compiled_backend), **tolerance)


@operators
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_into_one_graph(operator, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(sized(operator).function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (1, 2) if dynamic else (1,):
        call, same = sized(operator, size), sized(operator, size)
        assert_same(compiled(*call.floats, *call.rest), same(), call.floats, same.floats)


@operators
def test_checkpointing_changes_nothing(operator):
    call, same = sized(operator), sized(operator)
    out = checkpoint(call, *call.floats, use_reentrant=False)
    assert_same(out, same(), call.floats, same.floats, exactly=True)


@operators
def test_two_runs_in_deterministic_mode_are_bitwise_equal(operator):
    torch.use_deterministic_algorithms(True)
    try:
        call, same = sized(operator, 3), sized(operator, 3)
        assert_same(call(), same(), call.floats, same.floats, exactly=True)
    finally:
        torch.use_deterministic_algorithms(False)


@operators
def test_one_thread_and_two_agree_up_to_rounding(operator):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            call = sized(operator, 3)
            out, gradients = value_and_gradients(call, call.floats)
            results.append((out, *gradients))
    finally:
        torch.set_num_threads(threads)
    for x, y in zip(*results, strict=True):
        assert_close_for(torch.float32)(x, y)


@operators
def test_strided_inputs_and_gradients_are_supported(operator):
    call, same = sized(operator), sized(operator)
    strided = [x.mT.contiguous().mT if x.dim() > 1 else x for x in same.floats]
    out, expected = call(), same(*strided)
    assert_close_for(torch.float32)(out, expected)
    weight = torch.rand(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(weight)
    expected.backward(weight.mT.contiguous().mT if weight.dim() > 1 else weight)
    for x, y in zip(call.floats, same.floats, strict=True):
        assert_close_for(torch.float32)(x.grad, y.grad)


def test_data_parallel_training_gives_the_gradients_of_the_whole_batch(compiled_backend, tmp_path):
    mp.spawn(_train_in_parallel, (compiled_backend, str(tmp_path / "store")), nprocs=2)


@pytest.mark.parametrize("negatives", ["all", "within", "distinct"])
@pytest.mark.parametrize("kind", ["orthogonal", "identical", "opposite", "matched", "one matched, others orthogonal"])
@pytest.mark.parametrize("scale", [1.0, 100.0, 127.0, 400.0])
def test_no_scale_overflows_or_underflows(kind, scale, negatives):
    eye = torch.eye(40).view(10, 4, 40)
    first, second = F.pad(eye, (0, 40)), F.pad(eye, (40, 0))
    visual, text = {
        "orthogonal": (first, second),
        "identical": (first[:1].expand(10, -1, -1), first[:1].expand(10, -1, -1)),
        "opposite": (first, -first),
        "matched": (first, first),
        "one matched, others orthogonal": (first, torch.cat([first[:1], second[1:]])),
    }[kind]
    found, wanted = [], []
    for dtype, backend, results in ((torch.float32, None, found), (torch.float64, "reference", wanted)):
        x, y = (z.to(dtype, copy=True).requires_grad_() for z in (visual, text))
        loss = correlation_loss(x, y, scale=scale, negatives=negatives, backend=backend)
        results += [loss, *torch.autograd.grad(loss, (x, y))]
    for x, x_exact in zip(found, wanted, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x.double(), x_exact, rtol=1e-4, atol=1e-5 * scale)


def test_a_scale_that_overflows_float64_is_reported():
    visual, text, _ = make("correlation_loss").floats
    with pytest.raises(RuntimeError, match="scale: got 2000; supports at most 1000"):
        correlation_loss(visual, text, scale=2000)
    with pytest.raises(RuntimeError, match=r"scale: got 2000.0; supports at most 1000"):
        correlation_loss(visual, text, scale=torch.tensor(2000.0))
    compiled = torch.compile(correlation_loss, fullgraph=True, backend="aot_eager")  # where no value is read
    with pytest.raises(ValueError, match=r"scale: got 2000; the cpu backend .* at most 1000"):
        compiled(visual, text, scale=torch.tensor(2000.0))
    for scale in (2000, torch.tensor(2000.0)):
        assert correlation_loss(visual, text, scale=scale, backend="auto").isfinite()


def test_more_emotions_than_it_supports_run_on_the_reference():
    visual, text = (torch.randn(1, 33, 4) for _ in range(2))
    with pytest.raises(RuntimeError, match="emotions: got 33; supports at most 32"):
        correlation_loss(visual, text)
    assert correlation_loss(visual, text, backend="auto").isfinite()


def test_no_logit_and_no_whole_product_is_stored(compiled_backend):
    # 512 individuals of 7 emotions: 462 million logits, 1.85 GB. In a separate process, to measure its own peak.
    program = PEAK.format(backend=compiled_backend)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64


def test_a_trainer_step_compiles_into_one_graph(clip):
    torch._dynamo.reset()
    emotions = ["neutral", "happy", "sad"]
    bank = PromptBank.build(
        PersonalizedPrompts(clip, emotions), torch.randn(2, clip.embed_dim), ["anna", "ben"], emotions, clip=clip
    )
    criterion = PCMECLCriterion(clip, bank, contrast=0.2)
    generator = WarpFields(emotions, 64)
    # A new generator changes next to nothing and samples exactly at pixels, where bilinear sampling has its kinks:
    # there the loss and its gradients are nothing but rounding.
    torch.nn.init.constant_(generator.pose.bias, 0.3)
    for field in (generator.flow, generator.shade):
        torch.nn.init.normal_(field, std=0.5)
    frames = torch.rand(2, 3, 64, 64) * 2 - 1
    individual, shown, asked = torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([2, 0])

    def loss(frames):
        return criterion(frames, generator(frames, asked), individual, shown, asked)

    expected = loss(frames)
    expected.backward()
    learned = [x for x in generator.parameters() if x.grad is not None]  # recognition learns from labels alone
    gradients = [x.grad.clone() for x in learned]
    generator.zero_grad()
    found = torch.compile(loss, fullgraph=True)(frames)
    found.backward()
    assert_close_for(torch.float32)(found, expected)
    for x, gradient in zip(learned, gradients, strict=True):
        assert (x.grad - gradient).norm() <= 1e-3 * gradient.norm()


PEAK = """
import resource, torch
from pcmecl_fast.ops import correlation_loss
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def run(*x): correlation_loss(*x, backend="{backend}").backward()
torch.set_num_threads(2)
run(*(torch.randn(2, 7, 512, requires_grad=True) for _ in range(2)))
x = [torch.randn(512, 7, 512, requires_grad=True) for _ in range(2)]
for y in x: y.grad = torch.zeros_like(y)
before = peak()
run(*x)
print(peak() - before)
"""


def _train_in_parallel(rank: int, backend: str, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Linear(16, 33)
    whole = nn.Linear(16, 33)
    whole.load_state_dict(model.state_dict())
    source, change, bank = torch.randn(8, 33), torch.randn(8, 16), torch.randn(3, 7, 33)
    individual = torch.arange(8) % 3
    a = torch.arange(8) % 7
    b = (a + 1) % 7

    def loss(module, part):
        return direction_loss(
            source[part], module(change[part]), bank, individual[part], a[part], b[part], backend=backend
        )

    parallel = nn.parallel.DistributedDataParallel(model)
    loss(parallel, slice(rank * 4, rank * 4 + 4)).backward()
    loss(whole, slice(0, 8)).backward()
    assert_close_for(torch.float32)(model.weight.grad, whole.weight.grad)
    time.sleep(0.2)  # as in `distributed._everybody_is_here`
    del parallel
    dist.destroy_process_group()


def assert_same(out, expected, floats, same, *, exactly=False) -> None:
    close = (lambda x, y: torch.testing.assert_close(x, y, rtol=0, atol=0)) if exactly else assert_close_for(out.dtype)
    close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for x, y in zip(floats, same, strict=True):
        close(x.grad, y.grad)
