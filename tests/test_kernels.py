"""The Triton kernels against the reference: on a CUDA device if there is one, else on the CPU in the interpreter.

Triton reads TRITON_INTERPRET when it is first imported, and torch.compile's own kernels would be interpreted too; so
these tests run in a process of their own, which `test_kernels_interpreted.py` starts.
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from operators import MEAN, OPERATORS, STD, Call, make, value_and_gradients
from tolerances import assert_close_for
from torch.nn.functional import normalize

from pcmecl_fast.ops import PromptTree, clip_frames, correlation_loss

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1: see test_kernels_interpreted.py", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
HERE = Path(__file__).parent
# bfloat16's arithmetic is the interpreter's own, so there one dtype stands for both half types.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
DIRECTION_SIZES = [(1, 1, 2, 3), (13, 4, 9, 127), (5, 2, 7, 33)]  # B, N, E, D
CORRELATION_SIZES = [(1, 2, 3), (3, 5, 17), (11, 3, 65), (2, 7, 33)]  # N, E, D
LAYOUTS = [
    PromptTree(9, (2, 2, 3, 2, 2, 2, 2)),
    PromptTree(1, (11, 10, 13)),  # two blocks in float32, one in half types
    PromptTree(3, (1, 5)),
    PromptTree(1, (1,)),
    PromptTree(5, (30, 21, 14)),  # blocks that no query of another sees
]
FRAMES = [  # B, H, W, size
    (1, 45, 31, 16),
    (2, 20, 33, 48),
    (1, 64, 64, 64),
    (1, 7, 5, 4),
    (1, 150, 3, 20),
    (1, 3, 150, 20),  # old columns in two turns
    (1, 1, 1, 5),
    (1, 40, 9, 1),
]


@pytest.fixture(autouse=True)
def _leave_deterministic_algorithms_as_they_were():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _float32_is_multiplied_as_on_tensor_cores(monkeypatch):
    """TF32 there is float32 without its last 13 bits; the interpreter by itself multiplies every bit."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def without_last_bits(x):
        return TensorHandle((x.data.view("int32") & -8192).view("float32"), x.dtype)

    def create_dot(builder, x, y, total, precision, *rest):
        if precision.name == "TF32" and x.data.dtype == "float32":
            x, y = without_last_bits(x), without_last_bits(y)
        return exactly(builder, x, y, total, precision, *rest)

    exactly = InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def _one_configuration_is_compiled(monkeypatch):
    """The first: on a GPU most of these tests' time is compiling. One test below goes through the others."""
    from pcmecl_fast.kernels import common

    monkeypatch.setattr(common, "_fastest", lambda launch, configs: configs[0])


@pytest.fixture
def whole_tiles(monkeypatch):
    """The interpreter's time depends on the number of operations: few large products and groups; few empty columns.

    A GPU keeps its own.
    """
    if INTERPRETED:
        from pcmecl_fast.kernels import correlation, products
        from pcmecl_fast.kernels.common import Config

        tiles = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
        monkeypatch.setattr(products, "PRODUCT_CONFIGS", [Config(blocks=tiles)])
        monkeypatch.setattr(products, "SMALL_CONFIGS", [Config(blocks=tiles)])
        monkeypatch.setattr(correlation, "BLOCK", 8)
        in_a_group = correlation.warps_for
        monkeypatch.setattr(correlation, "warps_for", lambda e: 1 if in_a_group(e) == 1 else correlation.power_of_2(e))


@pytest.fixture
def by_warps_of_emotions(monkeypatch):
    """The kernels of more than eleven emotions, for any number."""
    from pcmecl_fast.kernels import correlation

    monkeypatch.setattr(correlation, "NARROW", 1)


@dtypes
@pytest.mark.parametrize("size", DIRECTION_SIZES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_direction_logits(dtype, size, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    assert_twins(direction("direction_logits", size, dtype))


@dtypes
@pytest.mark.parametrize("size", DIRECTION_SIZES)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("contrast", "reduction"), [(0.0, "mean"), (0.3, "mean"), (0.3, "none"), (0.0, "sum")])
def test_direction_loss(dtype, size, contrast, reduction, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    assert_twins(direction("direction_loss", size, dtype, contrast=contrast, reduction=reduction, scale=30.0))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_zero_change_has_no_gradient(normalize):
    call = direction("direction_loss", (5, 2, 7, 33), torch.float32, normalize=normalize)
    call.floats[1] = call.floats[0].detach().clone()
    _, gradients = value_and_gradients(call, call.floats, backend="triton")
    assert all(x.eq(0).all() for x in gradients)
    assert_twins(call)


@pytest.mark.parametrize("operator", ["direction_logits", "direction_loss"])
def test_an_empty_batch_costs_nothing(operator):
    assert_twins(direction(operator, (0, 2, 3, 8), torch.float32))


@pytest.fixture
def asserting(monkeypatch):
    """The interpreter skips a kernel's assertions, whatever the launch says. A GPU's test is in `TestOnCuda`."""
    if not INTERPRETED:
        pytest.skip("an assertion that fails ends all work on a GPU")
    from triton.runtime.interpreter import interpreter_builder

    options = replace(interpreter_builder.options, debug=True, sanitize_overflow=False)
    monkeypatch.setattr(interpreter_builder, "options", options)


@pytest.mark.usefixtures("asserting")
@pytest.mark.parametrize(
    ("operator", "position", "name"),
    [
        ("direction_logits", 3, "individual"),
        ("direction_logits", 4, "source_emotion"),
        ("direction_loss", 3, "individual"),
        ("direction_loss", 4, "source_emotion"),
        ("direction_loss", 5, "target_emotion"),
    ],
)
@pytest.mark.parametrize("wrong", [-1, 7])
def test_an_index_out_of_range_is_found_by_the_kernel(operator, position, name, wrong):
    arguments = make(operator, people=7, device=DEVICE).schema_arguments
    arguments[position][2] = wrong
    with pytest.raises(Exception, match=f"{name}: an index is out of range"):
        getattr(torch.ops.pcmecl_fast, operator)(*arguments, "triton")


@pytest.mark.usefixtures("asserting")
@pytest.mark.parametrize("operator", ["direction_logits", "direction_loss"])
def test_an_empty_bank_has_no_individual(operator):
    arguments = list(make(operator, device=DEVICE).schema_arguments)
    arguments[2] = arguments[2][:0]
    with pytest.raises(Exception, match="individual: an index is out of range"):
        getattr(torch.ops.pcmecl_fast, operator)(*arguments, "triton")


@dtypes
@pytest.mark.usefixtures("whole_tiles")
@pytest.mark.parametrize("negatives", ["all", "within", "distinct"])
@pytest.mark.parametrize("size", CORRELATION_SIZES)
@pytest.mark.parametrize("missing", [False, True])
def test_correlation_loss(dtype, size, missing, negatives):
    assert_twins(correlation(size, dtype, missing=missing, negatives=negatives))


@pytest.mark.usefixtures("whole_tiles")
@pytest.mark.parametrize("negatives", ["all", "within", "distinct"])
def test_the_most_emotions_of_which_a_thread_has_all_pairs(negatives):
    assert_twins(correlation((2, 11, 9), torch.float32, missing=True, negatives=negatives))


@pytest.mark.usefixtures("whole_tiles")
@pytest.mark.parametrize(
    ("people", "dtype", "negatives"),
    [(1, torch.float32, "all"), (2, torch.float16, "distinct"), (3, torch.float32, "within")],
)
def test_twelve_emotions(people, dtype, negatives):
    assert_twins(correlation((people, 12, 9), dtype, missing=people > 1, negatives=negatives))


@pytest.mark.usefixtures("whole_tiles")
@pytest.mark.parametrize(("emotions", "negatives"), [(17, "distinct"), (32, "all")])
def test_few_of_many_emotions(emotions, negatives):
    call = correlation((2, emotions, 9), torch.float32, missing=True, negatives=negatives)
    (mask,) = call.rest
    mask.zero_()[:, [3, emotions - 1]] = True
    mask[0, [0, 1, emotions // 2]] = True
    assert_twins(call)


@pytest.mark.usefixtures("whole_tiles", "by_warps_of_emotions")
@pytest.mark.parametrize("negatives", ["all", "within", "distinct"])
@pytest.mark.parametrize("emotions", [2, 5])
def test_the_kernels_of_many_emotions(emotions, negatives):
    assert_twins(correlation((3, emotions, 17), torch.float32, missing=True, negatives=negatives))


@pytest.mark.usefixtures("whole_tiles", "by_warps_of_emotions")
@pytest.mark.parametrize("negatives", ["within", "distinct"])
def test_the_kernels_of_many_emotions_by_chunks_and_groups(monkeypatch, negatives):
    """Two chunks of rows, the last one filled up; two blocks of columns and two groups of emotions, by two strips."""
    from pcmecl_fast.kernels import correlation as kernels

    monkeypatch.setattr(kernels, "warps_for", lambda emotions: 2)
    monkeypatch.setattr(kernels, "BLOCK", 4)
    monkeypatch.setattr(kernels, "CHUNK", 4 * 9 * 8 * 3)
    monkeypatch.setattr(kernels, "LEAST_ROWS", 1)
    monkeypatch.setattr(kernels, "COLUMN_STRIPS", 2)
    assert_twins(correlation((5, 3, 9), torch.float32, missing=True, negatives=negatives))


@pytest.mark.parametrize("emotions", [12, 13, 16, 17, 18, 29, 30, 31, 32])
def test_warps_of_a_program_waste_little_on_emotions_that_are_not_there(emotions):
    from pcmecl_fast.kernels.correlation import warps_for

    assert warps_for(emotions) > 1
    assert -emotions % warps_for(emotions) <= 1


def test_more_emotions_are_left_to_the_next_backend():
    with pytest.raises(RuntimeError, match="emotions: got 33; supports at most 32"):
        correlation((2, 33, 4), torch.float32)(backend="triton")


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("k", "processors", "shares"), [(100, 1, 1), (100, 5, 4), (1000, 8, 8), (48, 8, 2)])
def test_programs_of_a_correlation_share_a_long_product(monkeypatch, k, processors, shares, add):
    from pcmecl_fast.kernels import products
    from pcmecl_fast.kernels.common import Config

    tiles = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}
    monkeypatch.setattr(products, "PRODUCT_CONFIGS", [Config(blocks=tiles)])
    monkeypatch.setattr(products, "START", 1)
    monkeypatch.setattr(products, "SHARED_NUMBER", 0)
    monkeypatch.setattr(products, "programs_for", lambda x, work, per_processor: processors)
    assert products.shares_of(k, 32, 1, 0.0, processors) == shares
    generator = torch.Generator().manual_seed(0)
    left, right, out = (torch.randn(size, generator=generator).to(DEVICE) for size in ((k, 29), (k, 30), (29, 30)))
    expected = left.double().T @ right.double() + (out.double() if add else 0.0)
    results = [out.clone() for _ in range(2)]
    for result in results:
        products.multiply(left.T[None, None], right[None, None], result[None, None], add=add)
    assert_close_for(torch.float32)(results[0], expected)
    assert torch.equal(*results)


@pytest.mark.usefixtures("whole_tiles")
@pytest.mark.parametrize("strips", [1, 2])
@pytest.mark.parametrize("negatives", ["all", "within", "distinct"])
def test_correlation_loss_by_chunks_gives_the_same(monkeypatch, negatives, strips):
    """Three chunks of four rows, the last one filled up; two or three blocks of columns in a strip."""
    from pcmecl_fast.kernels import correlation as kernels

    call = correlation((11, 3, 9), torch.float32, missing=True, negatives=negatives)
    whole, whole_gradients = value_and_gradients(call, call.floats, backend="triton")
    monkeypatch.setattr(kernels, "BLOCK", 4)
    monkeypatch.setattr(kernels, "CHUNK", 4 * 9 * 12 * 4)
    monkeypatch.setattr(kernels, "COLUMN_STRIPS", strips)
    monkeypatch.setattr(kernels, "WARPS", 2)
    parts, gradients = value_and_gradients(call, call.floats, backend="triton")
    for x, x_whole in zip((parts, *gradients), (whole, *whole_gradients), strict=True):
        assert_close_for(torch.float32)(x, x_whole)


def test_missing_entries_are_not_read():
    call = correlation((3, 5, 17), torch.float32, missing=True)
    (visual, text, scale), (mask,) = call.floats, call.rest
    expected = call(backend="triton")
    with torch.no_grad():
        visual[~mask], text[~mask] = torch.nan, torch.inf
    loss, gradients = value_and_gradients(call, (visual, text, scale), backend="triton")
    assert torch.equal(loss, expected)
    assert all(x.isfinite().all() for x in gradients)
    assert all(x[~mask].eq(0).all() for x in gradients[:2])


@pytest.mark.parametrize("size", [(0, 5, 17), (3, 0, 17), (3, 1, 17)])
def test_correlation_without_a_pair_is_zero_with_a_graph(size):
    call = make("correlation_loss", people=size[0], emotions=size[1], width=size[2], device=DEVICE)
    loss, gradients = value_and_gradients(call, call.floats, backend="triton")
    assert loss == 0
    assert all(x.eq(0).all() for x in gradients)


def test_correlation_of_nobody_present_is_zero():
    call = correlation((3, 5, 17), torch.float32, missing=True)
    call.rest[0].fill_(False)
    loss, gradients = value_and_gradients(call, call.floats, backend="triton")
    assert loss == 0
    assert all(x.eq(0).all() for x in gradients)


def test_a_scale_of_100_loses_no_row():
    # The first text is orthogonal to every image, so its columns hold nothing near the largest logit.
    features = torch.eye(12, device=DEVICE).view(3, 4, 12)
    text = features.clone()
    text[0] = normalize(torch.ones(4, 12, device=DEVICE), dim=-1)
    for scale in (100.0, 120.0):
        call = make("correlation_loss", people=3, emotions=4, width=12, scale=scale, device=DEVICE)
        call.floats[:2] = features, text
        assert_twins(call)


def test_a_scale_beyond_the_kernels_range_is_loud():
    call = correlation((3, 5, 17), torch.float32, scale=200.0)
    scales = [200.0]
    if call.floats[2].is_cuda:  # whose value is not read
        assert call(backend="triton").isnan()
    else:
        scales.append(call.floats[2])
    for scale in scales:
        with pytest.raises(RuntimeError, match=r"scale: got 200\.0; supports at most 120"):
            correlation_loss(*call.floats[:2], scale=scale, backend="triton")


def test_nan_is_not_hidden():
    call = correlation((3, 5, 17), torch.float32)
    call.floats[0].data[1, 2, 0] = torch.nan
    assert call(backend="triton").isnan()


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.prefix}+{layout.segment_lengths}")
@pytest.mark.parametrize("heads", [(2, 2, 5), (1, 1, 64)])  # N, H, d
def test_tree_attention(dtype, layout, heads):
    people, count, width = heads
    sizes = {"people": people, "heads": count, "width": width}
    assert_twins(make("tree_attention", layout=layout, **sizes, dtype=dtype, device=DEVICE))


def test_segments_begin_anywhere_in_a_long_tree():
    lengths = (1, 60, 1, 1, 63, 1, 64, 2, 62)  # the last bit of a word and the first of the next begin one
    layout = PromptTree(1, lengths)
    assert_twins(make("tree_attention", people=1, heads=1, width=4, layout=layout, device=DEVICE))


def test_large_attention_logits_do_not_overflow():
    call = make("tree_attention", people=1, layout=LAYOUTS[0], width=8, device=DEVICE)
    out, (gradient,) = value_and_gradients(call, [1e4 * x for x in call.floats], backend="triton")
    assert out.isfinite().all()
    assert gradient.isfinite().all()


@dtypes
@pytest.mark.parametrize("size", FRAMES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_clip_frames(dtype, size, interpolation):
    batch, height, width, side = size
    sizes = {"batch": batch, "height": height, "width": width, "size": side, "interpolation": interpolation}
    assert_twins(make("clip_frames", **sizes, dtype=dtype, device=DEVICE))


@dtypes
def test_a_frame_of_one_brightness_keeps_it(dtype):
    frames = torch.full((1, 3, 45, 31), 0.75, dtype=dtype, device=DEVICE)
    resized = clip_frames(frames, 48, [0.5] * 3, [0.5] * 3, backend="triton")  # half types hold 0.75, too
    assert_close_for(torch.float32)(resized.float().mean(), torch.tensor(0.75))


@pytest.mark.parametrize(("old", "new"), [(256, 224), (64, 224), (7, 4), (300, 20), (31, 31), (9, 1)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_frames_resize_is_torchs(old, new, interpolation, transposed):
    from pcmecl_fast.kernels.frames import RADIUS, make_bands

    line = torch.eye(old, dtype=torch.float64)[None, None]
    expected = torch.nn.functional.interpolate(
        line, (new, old), mode=interpolation, antialias=True, align_corners=False
    )[0, 0]
    x = torch.empty(0, device=DEVICE)
    if transposed:
        first, weights = make_bands(x, new, old, RADIUS[interpolation], transposed=True)
        expected = expected.T
    else:
        first, weights = make_bands(x, old, new, RADIUS[interpolation], transposed=False)
    band = first[None, :] + torch.arange(len(weights), device=DEVICE)[:, None]
    whole = torch.zeros(expected.T.shape, device=DEVICE).scatter_(0, band.long(), weights)
    assert_close_for(torch.float32)(whole.T, expected)


def test_half_frames_lose_no_bits_of_their_weights():
    """They are resized as those of float32 are, and rounded once."""
    frames = torch.rand(1, 3, 45, 70, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    resized = clip_frames(frames, 48, MEAN, STD, backend="triton")
    assert torch.equal(resized, clip_frames(frames.float(), 48, MEAN, STD, backend="triton").half())


@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*make(operator, device=DEVICE).schema_arguments, "triton")
    torch.library.opcheck(getattr(torch.ops.pcmecl_fast, operator).default, arguments, test_utils=tests)


def test_autocast_changes_nothing():
    call = correlation((3, 3, 8), torch.float32)
    plain = call(backend="triton")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(call(backend="triton"), plain)


def test_float64_and_other_devices_are_named():
    with pytest.raises(RuntimeError, match="got float64; supports float16, bfloat16 or float32"):
        clip_frames(torch.zeros(1, 3, 4, 4, device=DEVICE).double(), 2, MEAN, STD, backend="triton")
    with pytest.raises(RuntimeError, match="got a tensor on meta; supports CUDA tensors"):
        clip_frames(torch.zeros(1, 3, 4, 4, device="meta"), 2, MEAN, STD, backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
class TestOnCuda:
    def test_another_stream(self):
        call = correlation((40, 7, 64), torch.float32)
        expected = call(backend="triton")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = call(backend="triton")
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(loss, expected)

    def test_deterministic_gradients_repeat_bit_for_bit(self):
        torch.use_deterministic_algorithms(True)
        call = direction("direction_loss", (999, 4, 7, 512), torch.float32)
        first, again = (value_and_gradients(call, call.floats, backend="triton")[1][2] for _ in range(2))
        assert torch.equal(first, again)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_another_device(self):
        call = correlation((5, 7, 64), torch.float32)
        on_second = call(*(x.to("cuda:1") for x in call.floats), backend="triton")
        assert_close_for(torch.float32)(on_second, call(backend="triton"))

    @dtypes
    @pytest.mark.parametrize("operator", OPERATORS)
    @pytest.mark.parametrize("number", [1, 2])
    def test_every_other_configuration(self, monkeypatch, number, operator, dtype):
        from pcmecl_fast.kernels import common

        monkeypatch.setattr(common, "_chosen", {})
        monkeypatch.setattr(common, "_fastest", lambda launch, configs: configs[number % len(configs)])
        assert_twins(make(operator, dtype=dtype, device=DEVICE))

    def test_the_fastest_configuration_is_found(self, monkeypatch):
        from pcmecl_fast.kernels import common

        monkeypatch.undo()
        monkeypatch.setattr(common, "_chosen", {})
        call = correlation((40, 7, 64), torch.float32)
        assert_twins(call)
        assert common._chosen

    @pytest.mark.parametrize("operator", OPERATORS)
    def test_torch_compile_with_cuda_graphs(self, operator):
        call = make(operator, device=DEVICE)
        compiled = torch.compile(call.function, mode="reduce-overhead")
        for _ in range(3):  # runs, is captured, and is replayed
            value, gradients = value_and_gradients(
                lambda *floats, backend: compiled(*floats, *call.rest, backend=backend), call.floats, backend="triton"
            )
        expected, expected_gradients = value_and_gradients(call, call.floats, backend="triton")
        assert_close_for(torch.float32)(value, expected)
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert_close_for(torch.float32)(gradient, expected_gradient)

    @pytest.mark.parametrize("operator", ["direction_logits", "direction_loss"])
    def test_an_index_out_of_range_stops_the_device(self, operator):
        """In a process of its own: after a device-side assertion nothing more runs on the device."""
        program = f"""
import torch
from operators import make
call = make("{operator}", device="cuda")
call.rest[0][1] = 3
getattr(torch.ops.pcmecl_fast, "{operator}")(*call.schema_arguments, "triton")
torch.cuda.synchronize()
"""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
        run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert run.returncode != 0
        assert "individual: an index is out of range" in run.stdout + run.stderr

    def test_torch_compile(self):
        call = correlation((5, 7, 64), torch.float32)
        compiled = torch.compile(call.function, fullgraph=True)
        assert_close_for(torch.float32)(compiled(*call.floats, *call.rest, backend="triton"), call(backend="triton"))


def direction(operator: str, size: tuple[int, int, int, int], dtype: torch.dtype, **options) -> Call:
    batch, people, emotions, width = size
    sizes = {"batch": batch, "people": people, "emotions": emotions, "width": width}
    return make(operator, **sizes, dtype=dtype, device=DEVICE, degenerate=True, **options)


def correlation(size: tuple[int, int, int], dtype: torch.dtype, scale: float = 20.0, **options) -> Call:
    people, emotions, width = size
    sizes = {"people": people, "emotions": emotions, "width": width, "scale": scale}
    return make("correlation_loss", **sizes, dtype=dtype, device=DEVICE, degenerate=True, **options)


def assert_twins(call: Call) -> None:
    """The kernel's result and gradients are the reference's in float64, each at its own dtype's tolerance."""
    out, gradients = value_and_gradients(call, call.floats, backend="triton")
    exact, exact_gradients = value_and_gradients(call, call.widened(), backend="reference")
    assert_close_for(out.dtype)(out, exact)
    for x, gradient, exact_gradient in zip(call.floats, gradients, exact_gradients, strict=True):
        assert gradient.dtype == x.dtype
        assert_close_for(x.dtype)(gradient, exact_gradient)
