"""The Triton kernels against the reference: on a CUDA device where there is one, else on the CPU in the interpreter.

Triton reads TRITON_INTERPRET when it is first imported, and torch.compile's own kernels would be interpreted too; so
these tests run in a process of their own, which `test_kernels_interpreted.py` starts.
"""

import importlib.util
import os

import pytest
import torch
from tolerances import assert_close_for
from torch import Tensor
from torch.nn.functional import normalize

from pcmecl_fast.ops import PromptTree, clip_frames, correlation_loss, direction_logits, direction_loss, tree_attention

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1: see test_kernels_interpreted.py", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
# bfloat16's arithmetic is the interpreter's own, so there one dtype stands for both half types.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
DIRECTION_SIZES = [(1, 1, 2, 3), (13, 4, 9, 127), (5, 2, 7, 33)]  # B, N, E, D
CORRELATION_SIZES = [(1, 2, 3), (3, 5, 17), (7, 3, 65), (8, 7, 33), (2, 9, 20)]  # N, E, D
LAYOUTS = [
    PromptTree(9, (2, 2, 3, 2, 2, 2, 2)),
    PromptTree(1, (11, 10, 13)),  # two blocks in float32, one in half types
    PromptTree(3, (1, 5)),
    PromptTree(1, (1,)),
    PromptTree(5, (30, 21, 14)),  # blocks that no query of another sees
]
FRAMES = [(1, 45, 31, 16), (2, 20, 33, 48), (1, 64, 64, 64), (1, 7, 5, 4), (1, 150, 3, 20)]  # B, H, W, size
COLOURS = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.fixture(autouse=True)
def _leave_deterministic_algorithms_as_they_were():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def whole_tiles(monkeypatch):
    """The interpreter's time goes by the operation, so there it takes fewer and larger ones; a GPU keeps its own."""
    if INTERPRETED:
        from pcmecl_fast.kernels import correlation, products
        from pcmecl_fast.kernels.common import Config

        tiles = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
        monkeypatch.setattr(correlation, "PAIR_CONFIGS", [Config(blocks={"PART": 64})])
        monkeypatch.setattr(correlation, "FOLD_CONFIG", Config(blocks={"PART": 64}))
        monkeypatch.setattr(products, "PRODUCT_CONFIGS", [Config(blocks=tiles)])


@dtypes
@pytest.mark.parametrize("size", DIRECTION_SIZES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_direction_logits(dtype, size, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    floats, (individual, a, _) = direction_inputs(*size, dtype=dtype)
    assert_twins(lambda *x, backend: direction_logits(*x, individual, a, backend=backend), floats)


@dtypes
@pytest.mark.parametrize("size", DIRECTION_SIZES)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("contrast", "reduction"), [(0.0, "mean"), (0.3, "mean"), (0.3, "none"), (0.0, "sum")])
def test_direction_loss(dtype, size, contrast, reduction, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    floats, indices = direction_inputs(*size, dtype=dtype)
    floats.append(torch.tensor(30.0, device=DEVICE))

    def loss(*x, backend):
        return direction_loss(*x[:3], *indices, scale=x[3], contrast=contrast, reduction=reduction, backend=backend)

    assert_twins(loss, floats)


@pytest.mark.parametrize("normalize_first", [True, False])
def test_a_change_of_nothing_has_no_gradient(normalize_first):
    floats, indices = direction_inputs(5, 2, 7, 33, dtype=torch.float32)
    floats[1] = floats[0].clone()

    def loss(*x, backend):
        return direction_loss(*x, *indices, contrast=0.5, normalize=normalize_first, backend=backend)

    _, gradients = value_and_gradients(loss, floats, "triton")
    assert all(x.eq(0).all() for x in gradients)
    assert_twins(loss, floats)


def test_an_empty_batch_costs_nothing():
    floats, indices = direction_inputs(0, 2, 3, 8, dtype=torch.float32)
    assert_twins(lambda *x, backend: direction_loss(*x, *indices, backend=backend), floats)
    assert_twins(lambda *x, backend: direction_logits(*x, *indices[:2], backend=backend), floats)


@dtypes
@pytest.mark.usefixtures("whole_tiles")
@pytest.mark.parametrize("negatives", ["all", "within", "distinct"])
@pytest.mark.parametrize("size", CORRELATION_SIZES)
@pytest.mark.parametrize("missing", [False, True])
def test_correlation_loss(dtype, size, missing, negatives):
    floats, mask = correlation_inputs(*size, dtype=dtype)
    mask = mask if missing else None
    assert_twins(lambda *x, backend: correlate(*x, mask=mask, negatives=negatives, backend=backend), floats)


@pytest.mark.parametrize("negatives", ["all", "within", "distinct"])
def test_correlation_loss_by_chunks_gives_the_same(monkeypatch, negatives):
    from pcmecl_fast.kernels import correlation

    floats, mask = correlation_inputs(5, 7, 9, dtype=torch.float32)
    whole = value_and_gradients(
        lambda *x, backend: correlate(*x, mask=mask, negatives=negatives, backend=backend), floats
    )
    monkeypatch.setattr(correlation, "CHUNK", 4 * 21 * 42)
    monkeypatch.setattr(correlation, "STRIPS", 2)
    parts = value_and_gradients(
        lambda *x, backend: correlate(*x, mask=mask, negatives=negatives, backend=backend), floats
    )
    for x, x_whole in zip((parts[0], *parts[1]), (whole[0], *whole[1]), strict=True):
        assert_close_for(torch.float32)(x, x_whole)


def test_what_is_missing_is_not_read():
    (visual, text, scale), mask = correlation_inputs(3, 5, 17, dtype=torch.float32)
    expected = correlate(visual, text, scale, mask=mask, backend="triton")
    visual[~mask], text[~mask] = torch.nan, torch.inf
    loss, gradients = value_and_gradients(lambda *x, backend: correlate(*x, mask=mask, backend=backend), [visual, text])
    assert torch.equal(loss, expected)
    assert all(x.isfinite().all() and x[~mask].eq(0).all() for x in gradients)


@pytest.mark.parametrize("size", [(0, 5, 17), (3, 0, 17), (3, 1, 17)])
def test_correlation_without_a_pair_is_zero_with_a_graph(size):
    floats = [torch.zeros(size, device=DEVICE), torch.zeros(size, device=DEVICE), torch.tensor(9.0, device=DEVICE)]
    loss, gradients = value_and_gradients(lambda *x, backend: correlate(*x, backend=backend), floats)
    assert loss == 0
    assert all(x.eq(0).all() for x in gradients)


def test_correlation_of_nobody_present_is_zero():
    floats, mask = correlation_inputs(3, 5, 17, dtype=torch.float32)
    loss, gradients = value_and_gradients(lambda *x, backend: correlate(*x, mask=mask & False, backend=backend), floats)
    assert loss == 0
    assert all(x.eq(0).all() for x in gradients)


def test_a_scale_of_100_loses_no_row():
    # The first text is orthogonal to every image, so its columns hold nothing near the largest logit.
    features = torch.eye(12, device=DEVICE).view(3, 4, 12)
    text = features.clone()
    text[0] = normalize(torch.ones(4, 12, device=DEVICE), dim=-1)
    for scale in (100.0, 120.0):
        assert_twins(lambda *x, backend, s=scale: correlation_loss(*x, scale=s, backend=backend), [features, text])


def test_a_scale_beyond_the_kernels_range_is_loud():
    (visual, text, _), _ = correlation_inputs(3, 5, 17, dtype=torch.float32)
    assert correlation_loss(visual, text, scale=torch.tensor(200.0, device=DEVICE), backend="triton").isnan()
    with pytest.raises(RuntimeError, match="it takes a scale up to 120, got 200"):
        correlation_loss(visual, text, scale=200.0, backend="triton")


def test_nan_is_not_hidden():
    (visual, text, scale), _ = correlation_inputs(3, 5, 17, dtype=torch.float32)
    visual[1, 2, 0] = torch.nan
    assert correlate(visual, text, scale, backend="triton").isnan()


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.prefix}+{layout.segment_lengths}")
@pytest.mark.parametrize("heads", [(2, 2, 5), (1, 1, 64)])  # N, H, d
def test_tree_attention(dtype, layout, heads):
    people, count, width = heads
    qkv = torch.randn(people, layout.length, 3, count, width, generator=seed(layout.length)).to(DEVICE, dtype)
    assert_twins(lambda x, backend: tree_attention(x, layout, backend=backend), [qkv])


def test_large_attention_logits_do_not_overflow():
    qkv = 1e4 * torch.randn(1, LAYOUTS[0].length, 3, 2, 8, generator=seed(1)).to(DEVICE)
    out, (gradient,) = value_and_gradients(lambda x, backend: tree_attention(x, LAYOUTS[0], backend=backend), [qkv])
    assert out.isfinite().all()
    assert gradient.isfinite().all()


@dtypes
@pytest.mark.parametrize("size", FRAMES)
def test_clip_frames(dtype, size):
    batch, height, width, side = size
    frames = (2 * torch.rand(batch, 3, height, width, generator=seed(height)) - 1).to(DEVICE, dtype)
    assert_twins(lambda x, backend: clip_frames(x, side, *COLOURS, backend=backend), [frames])


@pytest.mark.parametrize(("old", "new"), [(256, 224), (64, 224), (7, 4), (300, 20), (31, 31)])
def test_the_resize_is_torchs(old, new):
    from pcmecl_fast.kernels.frames import resize_weights

    line = torch.eye(old, dtype=torch.float64)[None, None]
    expected = torch.nn.functional.interpolate(line, (new, old), mode="bicubic", antialias=True, align_corners=False)
    assert_close_for(torch.float64)(resize_weights(old, new), expected[0, 0])


def test_opcheck():
    floats, indices = direction_inputs(5, 2, 7, 33, dtype=torch.float32)
    visual, text = (x.requires_grad_() for x in correlation_inputs(3, 3, 8, dtype=torch.float32)[0][:2])
    floats = [x.requires_grad_() for x in floats]
    qkv = torch.randn(1, 9, 3, 1, 4, device=DEVICE, requires_grad=True)
    frames = torch.rand(1, 3, 9, 7, device=DEVICE, requires_grad=True)
    arguments = {
        "direction_logits": (*floats, *indices[:2], True),
        "direction_loss": (*floats, *indices, None, 9.0, 0.5, True, "mean"),
        "correlation_loss": (visual, text, None, 9.0, None, "all"),
        "tree_attention": (qkv, 3, [1, 5]),
        "clip_frames": (frames, 5, *COLOURS),
    }
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operator, values in arguments.items():
        torch.library.opcheck(getattr(torch.ops.pcmecl_fast, operator).default, (*values, "triton"), test_utils=tests)


def test_autocast_changes_nothing():
    floats, _ = correlation_inputs(3, 3, 8, dtype=torch.float32)
    plain = correlate(*floats, backend="triton")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(correlate(*floats, backend="triton"), plain)


def test_float64_and_other_devices_are_named():
    with pytest.raises(RuntimeError, match="it takes float16, bfloat16 or float32, got float64"):
        clip_frames(torch.zeros(1, 3, 4, 4, device=DEVICE).double(), 2, *COLOURS, backend="triton")
    with pytest.raises(RuntimeError, match="it takes CUDA tensors, got one on meta"):
        clip_frames(torch.zeros(1, 3, 4, 4, device="meta"), 2, *COLOURS, backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
class TestOnCuda:
    def test_another_stream(self):
        floats, _ = correlation_inputs(40, 7, 64, dtype=torch.float32)
        expected = correlate(*floats, backend="triton")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = correlate(*floats, backend="triton")
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(loss, expected)

    def test_deterministic_gradients_repeat_bit_for_bit(self):
        torch.use_deterministic_algorithms(True)
        floats, indices = direction_inputs(999, 4, 7, 512, dtype=torch.float32)

        def loss(*x, backend):
            return direction_loss(*x, *indices, contrast=0.5, backend=backend)

        first, again = (value_and_gradients(loss, floats)[1][2] for _ in range(2))
        assert torch.equal(first, again)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_another_device(self):
        floats, _ = correlation_inputs(5, 7, 64, dtype=torch.float32)
        expected = correlate(*floats, backend="triton")
        assert_close_for(torch.float32)(correlate(*(x.to("cuda:1") for x in floats), backend="triton"), expected)

    def test_torch_compile(self):
        floats, _ = correlation_inputs(5, 7, 64, dtype=torch.float32)
        compiled = torch.compile(lambda *x: correlate(*x, backend="triton"), fullgraph=True)
        assert_close_for(torch.float32)(compiled(*floats), correlate(*floats, backend="triton"))


def assert_twins(call, floats: list[Tensor]) -> None:
    """The kernel's result and gradients are the reference's in float64, each at its own dtype's tolerance."""
    out, gradients = value_and_gradients(call, floats)
    exact, exact_gradients = value_and_gradients(call, [x.double() for x in floats], "reference")
    assert_close_for(out.dtype)(out, exact)
    for x, gradient, exact_gradient in zip(floats, gradients, exact_gradients, strict=True):
        assert gradient.dtype == x.dtype
        assert_close_for(x.dtype)(gradient, exact_gradient)


def value_and_gradients(call, floats: list[Tensor], backend: str = "triton") -> tuple[Tensor, list[Tensor]]:
    floats = [x.detach().clone().requires_grad_() for x in floats]
    out = call(*floats, backend=backend)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64, device=out.device).view(out.shape)
    (out * weights.half().to(out.dtype)).sum().backward()
    return out.detach(), [torch.zeros_like(x) if x.grad is None else x.grad for x in floats]


def correlate(visual, text, scale=20.0, mask=None, negatives="all", backend=None):
    return correlation_loss(visual, text, scale=scale, mask=mask, negatives=negatives, backend=backend)


def direction_inputs(batch, people, emotions, width, *, dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Features with a zero difference here and there, and indices with repeated individuals and no changes."""
    generator = seed(batch + width)
    shapes = ((batch, width), (batch, width), (people, emotions, width))
    source, edited, bank = (normalize(torch.randn(shape, generator=generator), dim=-1).to(dtype) for shape in shapes)
    edited[2:3] = source[2:3]
    bank[-1, 1] = bank[-1, 0]
    tops = (people, emotions, emotions)
    indices = [torch.randint(top, (batch,), generator=generator).to(DEVICE) for top in tops]
    indices[2][3:4] = indices[1][3:4]
    return [x.to(DEVICE) for x in (source, edited, bank)], indices


def correlation_inputs(people, emotions, width, *, dtype) -> tuple[list[Tensor], Tensor]:
    """Unit features with one zero difference, the scale, and a mask that lacks about a third, never of the first."""
    generator = seed(people * 1000 + width)
    features = torch.randn(2, people, emotions, width, generator=generator)
    visual, text = normalize(features, dim=-1).to(DEVICE, dtype)
    visual[1:2, 1] = visual[1:2, 0]
    mask = torch.rand(people, emotions, generator=generator) > 0.35
    mask[:1] = True
    return [visual, text, torch.tensor(20.0, device=DEVICE)], mask.to(DEVICE)


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)
