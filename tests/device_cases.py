"""What every kernel of a GPU has to get right, at sizes where blocks, warps, vectors and chunks end: one table.

`test_cuda_kernels.py` runs it on the host harness, `test_ops_cuda.py` on the GPU, on every backend that is there.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from operators import CLIP_MEAN, CLIP_STD, Call, make, seed, value_and_gradients
from tolerances import assert_close_for
from torch import Tensor

from pcmecl_fast.ops import PromptTree

WIDE_TREE = PromptTree(9, (2, 3, 2, 4, 2, 2, 3))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def correlation(**options) -> Call:
    """Some emotions are missing: their features are NaN."""
    call = make("correlation_loss", missing=True, degenerate=True, **options)
    (mask,) = call.rest
    call.floats[:2] = [x.detach().masked_fill(~mask[..., None], torch.nan) for x in call.floats[:2]]
    return call


def near_the_scale(**options) -> Call:
    """Changes of text close to those of the face: logits near ± scale."""
    call = make("correlation_loss", people=6, emotions=4, width=16, **options)
    visual, text = (x.detach() for x in call.floats[:2])
    noise = torch.randn(6, 4, 16, generator=seed(2), dtype=torch.float64).to(text)
    call.floats[1] = F.normalize(visual + 0.1 * noise, dim=-1)
    return call


def unaligned(operator: str, **options) -> Call:
    """Of rows that could be loaded 16 bytes at a time, but begin one number after a multiple of that."""
    call = make(operator, **options)
    return replace(call, function=lambda *arguments, **choice: call.function(*map(moved, arguments), **choice))


def moved(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) if x.is_floating_point() and x.dim() else x


def many_segments(dtype: torch.dtype = torch.float32, **options) -> Call:
    """Of large logits in float32. Half types get fewer: `cuda` multiplies the result's gradient with the rounded
    result, and what that errs by adds up over the queries that see a key."""
    wide = dtype == torch.float32
    layout = PromptTree(3, tuple(1 + k % 3 for k in range(40 if wide else 16)))
    call = make("tree_attention", people=1, layout=layout, dtype=dtype, **options)
    call.floats[0] = (3 if wide else 1) * call.floats[0].detach()
    return call


def _cases() -> Iterator[tuple[str, Callable[..., Call]]]:
    for operator in ("direction_logits", "direction_loss"):
        of = partial(make, operator, degenerate=True)
        for emotions in (2, 7, 8, 9, 32):
            yield f"{operator} of {emotions} emotions", partial(of, batch=6, emotions=emotions, width=20)
        for width in (1, 33, 136, 512, 1000):
            yield f"{operator} of {width} features", partial(of, people=2, width=width)
        yield f"{operator} of many samples", partial(of, batch=133, people=2, width=140)
        yield f"{operator} of one sample", partial(of, batch=1, people=1, width=24)
        yield f"{operator} of nothing", partial(of, batch=0)
        yield f"{operator} of unaligned rows", partial(unaligned, operator, people=2, width=16)
        yield f"{operator} with a least change", partial(of, batch=9, width=40, min_change=0.3)
    loss = partial(make, "direction_loss", batch=9, people=2, degenerate=True)
    for reduction in ("mean", "sum", "none"):
        for contrast in (0.0, 0.4):
            options = {"reduction": reduction, "contrast": contrast, "scale": 30.0}
            yield f"direction_loss, {reduction}, contrast {contrast}", partial(loss, width=40, **options)
    yield "direction_loss of features as they are", partial(loss, normalize=False, contrast=0.4, width=40)

    for negatives in ("all", "within", "distinct"):
        of = partial(correlation, negatives=negatives, scale=40.0)
        for emotions in (2, 3, 7, 8, 9, 32):
            people = 2 if emotions == 32 else 5
            yield f"{negatives} of {emotions} emotions", partial(of, people=people, emotions=emotions, width=20)
        yield f"{negatives} over several blocks", partial(of, people=37, width=24)
        yield f"{negatives} of odd rows", partial(of, people=34, width=33)
        yield f"{negatives} of nobody", partial(make, "correlation_loss", people=0, negatives=negatives)
    for scale in (0.5, 100.0):
        yield f"correlation_loss at a scale of {scale}", partial(near_the_scale, scale=scale)

    for heads, width in ((2, 64), (1, 16), (1, 17), (1, 72), (1, 128), (1, 130), (1, 256)):
        sizes = {"heads": heads, "width": width}
        yield f"tree_attention of heads {width} wide", partial(make, "tree_attention", layout=WIDE_TREE, **sizes)
    yield "tree_attention of many segments", partial(many_segments, width=8)
    yield "tree_attention of unaligned rows", partial(unaligned, "tree_attention", layout=WIDE_TREE, width=16)

    colours = {"mean": CLIP_MEAN, "std": CLIP_STD}
    for interpolation in ("bicubic", "bilinear"):
        for height, width, size in ((40, 64, 24), (20, 300, 16), (9, 8, 70), (31, 33, 5), (65, 17, 33), (64, 64, 64)):
            sizes = {"batch": 1, "height": height, "width": width, "size": size, "interpolation": interpolation}
            yield (
                f"{interpolation} {height} × {width} to {size}",
                partial(make, "clip_frames", **sizes, **colours),
            )
    yield "clip_frames of unaligned rows", partial(unaligned, "clip_frames", height=24, width=40, size=16)


CASES = dict(_cases())
BY_CHUNKS = {
    f"{negatives} over several chunks": partial(correlation, people=320, width=64, negatives=negatives, scale=40.0)
    for negatives in ("all", "distinct")
}
BY_CHUNKS |= {
    f"{negatives} of {emotions} emotions over several blocks": partial(
        correlation, people=people, emotions=emotions, width=64, negatives=negatives, scale=40.0
    )
    for negatives in ("all", "within", "distinct")
    for people, emotions in ((90, 12), (45, 17))
}
"""Of sizes for a GPU alone: the chunks of the host harness are small."""
BEYOND = {
    "triton": {
        "tree_attention of heads 130 wide": "at most",
        "tree_attention of heads 256 wide": "at most",
    }
}
"""What a backend does not support by its `Limits`, and what it says instead."""


def check(call: Call, backend: str = "cuda") -> None:
    """The kernels' result and gradients are the reference's in float64 from the same inputs."""
    out, gradients = value_and_gradients(call, call.floats, backend=backend)
    expected, exact_gradients = value_and_gradients(call, call.widened(), backend="reference")
    assert_close_for(out.dtype)(out, expected)
    for x, gradient, exact in zip(call.floats, gradients, exact_gradients, strict=True):
        assert gradient.dtype == x.dtype
        assert_close_for(x.dtype)(gradient, exact)
