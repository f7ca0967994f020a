"""A generator's frames as CLIP's image tower expects them: resized, in CLIP's range, differentiable.

    y = ( resize( (x + 1) / 2 ) − mean ) / std

The resize is bicubic or bilinear and antialiased, to size × size; nothing is clamped.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pcmecl_fast.ops import checks, reference
from pcmecl_fast.ops.operator import Operator

INTERPOLATIONS = ("bicubic", "bilinear")


def clip_frames(
    frames: Tensor,  # (B, 3, H, W) in [-1, 1]
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    interpolation: str = "bicubic",
    backend: str | None = None,
) -> Tensor:  # (B, 3, size, size)
    """Resize frames to CLIP's input and normalise their colours.

    The formula above, on whole frames: the sides are scaled independently, nothing is cropped. The resize is that of
    `F.interpolate(mode=interpolation, antialias=True, align_corners=False)`. Values are clamped neither before nor
    after it, so every pixel's gradient reaches the generator.

    Args:
        frames: (B, 3, H, W) red, green, blue in [-1, 1] (not checked); float16, bfloat16, float32 or float64.
        size: side of CLIP's square input in pixels, at least 1.
        mean: three numbers, CLIP's mean of each colour in [0, 1].
        std: three numbers above 0, CLIP's standard deviations.
        interpolation: "bicubic" (Keys' cubic, a = −½) or "bilinear" (the triangle).
        backend: see `use_backend`; None leaves the choice to it.

    Returns:
        (B, 3, size, size), in the input's dtype (half types are computed in float32).

    Raises:
        TypeError: an argument's type or dtype (uint8 frames: convert them to [-1, 1] first).
        ValueError: a shape or value, an unknown backend.
        RuntimeError: a named backend that cannot run.

    Source: CLIP's preprocessing, on tensors.
    """
    return CLIP_FRAMES(frames, size, mean, std, interpolation, backend=backend)


def _check(
    frames: Tensor, size: int, mean: Sequence[float], std: Sequence[float], interpolation: str
) -> tuple[Tensor, int, Sequence[float], Sequence[float], str]:
    checks.check_float("frames", frames)
    checks.Sizes().check("frames", frames, ("B", 3, "H", "W"))
    if frames.shape[2] < 1 or frames.shape[3] < 1:
        raise ValueError(f"frames: got shape {tuple(frames.shape)}; takes (B, 3, H, W) with H and W of at least 1")
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"size: got {type(size).__name__}; takes an int")
    if size < 1:
        raise ValueError(f"size: got {size}; takes at least 1")
    colour_mean, colour_std = _three_numbers("mean", mean), _three_numbers("std", std)
    if min(colour_std) <= 0:
        raise ValueError(f"std: got {colour_std}; takes three numbers above 0")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation: got {interpolation!r}; takes one of {', '.join(INTERPOLATIONS)}")
    return frames, size, colour_mean, colour_std, interpolation


def _three_numbers(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name}: got {type(values).__name__}; takes a sequence of three numbers")
    if len(values) != 3:
        raise ValueError(f"{name}: got {len(values)} values; takes three numbers")
    for position, value in enumerate(values):
        checks.check_number(f"{name}[{position}]", value)
    red, green, blue = values
    return float(red), float(green), float(blue)


def _outputs(
    frames: Tensor, size: int, mean: Sequence[float], std: Sequence[float], interpolation: str
) -> tuple[Tensor]:
    return (frames.new_empty(frames.shape[0], 3, size, size),)


CLIP_FRAMES = Operator(
    reference.clip_frames,
    "Tensor frames, SymInt size, float[] mean, float[] std, str interpolation",
    gradients=("frames",),
    outputs=_outputs,
    check=_check,
)
