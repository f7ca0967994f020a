"""How well an edit's change of CLIP features follows the requested change of emotion.

    v̂, v̂'  = source and edited divided by their norms,   δ = v̂' − v̂
    d[e]   = bank[n, e] − bank[n, a]
    c[e]   = ⟨δ / max(|δ|, min_change), unit(d[e])⟩
    loss   = (1 − c[b]) + contrast · ( −log softmax_{e≠a}( scale · c[e] )[b] )

for individual n, from the source emotion a to the target emotion b; unit(x) is x / |x|, and 0 where |x| ≤ 1e-8. So is
δ / |δ| without a `min_change`, also where |δ| ≤ 1e-6 between unit vectors in float32 or a half type: that is rounding.

A direction has no length, so its gradient is about 1/|δ|: 1e4 for an edit that changes features by 1e-4. With a
`min_change` it is at most 1/min_change, and an edit that changes nothing has a gradient, too: along d[b].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pcmecl_fast.ops import checks, reference
from pcmecl_fast.ops.operator import Operator

REDUCTIONS = ("mean", "sum", "none")


def direction_logits(
    source: Tensor,  # (B, D)
    edited: Tensor,  # (B, D)
    bank: Tensor,  # (N, E, D)
    individual: Tensor,  # (B,)
    source_emotion: Tensor,  # (B,)
    *,
    normalize: bool = True,
    min_change: float = 0.0,
    backend: str | None = None,
) -> Tensor:  # (B, E)
    """Cosines between an edit's change of image features and each change of emotion in the prompt bank.

    c[e] = ⟨δ / max(|δ|, min_change), unit(d[e])⟩ as above, in [-1, 1] and without the logit scale. The source emotion's
    column stands for no change and is 0. Two emotions with the same text features give 0 with gradient 0, and so does
    an edit that changes nothing unless there is a `min_change`. Gradients flow to `source`, `edited` and `bank`.

    Args:
        source: image features of the source frames, (B, D); float16, bfloat16, float32 or float64.
        edited: image features of the edited frames, (B, D), the same dtype and device. Under autocast the dtypes
            may differ: the widest counts.
        bank: unit text features of every individual and emotion, (N, E, D), taken as given, the same dtype and device.
        individual: row of the bank of each sample, (B,), any integer dtype, 0 to N-1.
        source_emotion: emotion a of each source frame, (B,), any integer dtype, 0 to E-1.
        normalize: divide `source` and `edited` by their norms first; False takes them as given.
        min_change: the length of a change, at least 0, up to which c grows with it instead of being a cosine.
        backend: see `use_backend`; None leaves the choice to it.

    Returns:
        (B, E), in the inputs' dtype (half types are computed in float32).

    Raises:
        TypeError: an argument's type or dtype, or dtypes that differ.
        ValueError: a shape, devices that differ, an unknown backend.
        IndexError: an individual or emotion out of range (on CUDA a device-side assertion, see PCMECL_CHECK).
        RuntimeError: a named backend that cannot run.

    Source: the paper's feature differencing; the directional loss of StyleGAN-NADA.
    """
    return DIRECTION_LOGITS(source, edited, bank, individual, source_emotion, normalize, min_change, backend=backend)


def direction_loss(
    source: Tensor,  # (B, D)
    edited: Tensor,  # (B, D)
    bank: Tensor,  # (N, E, D)
    individual: Tensor,  # (B,)
    source_emotion: Tensor,  # (B,)
    target_emotion: Tensor,  # (B,)
    *,
    scale: float | Tensor = 100.0,
    contrast: float = 0.0,
    normalize: bool = True,
    min_change: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:  # () or (B,)
    """Pull each edit's change of image features towards its change of emotion, and away from the other changes.

    loss = (1 − c[b]) + contrast · (−log softmax over e ≠ a of scale · c[e], at b), with c from `direction_logits`. A
    sample with target = source requests no change: its loss and gradient are 0 and the mean excludes it. A batch that
    is empty or has no valid sample gives 0 and still has a graph. A zero change (a generator that starts as the
    identity) is finite. Its gradient is 0, or with a `min_change` that of 1 − ⟨δ, unit(d[b])⟩ / min_change. Gradients
    flow to `source`, `edited`, `bank` and a tensor `scale`.

    Args:
        source: image features of the source frames, (B, D); float16, bfloat16, float32 or float64.
        edited: image features of the edited frames, (B, D), the same dtype and device. Under autocast the dtypes
            may differ: the widest counts.
        bank: unit text features of every individual and emotion, (N, E, D), taken as given, the same dtype and device.
        individual: row of the bank of each sample, (B,), any integer dtype, 0 to N-1.
        source_emotion: emotion a of each source frame, (B,), any integer dtype, 0 to E-1.
        target_emotion: requested emotion b, (B,), any integer dtype, 0 to E-1.
        scale: CLIP's logit scale, above 0 and at most 1e6: a number, or a float tensor of shape () on the same device,
            whose value is checked on a CPU alone.
        contrast: weight of the contrast with the other target emotions, at least 0.
        normalize: divide `source` and `edited` by their norms first; False takes them as given.
        min_change: the length of a change, at least 0, up to which c grows with it instead of being a cosine.
        reduction: "mean" over the samples with b ≠ a, "sum", or "none".
        backend: see `use_backend`; None leaves the choice to it.

    Returns:
        A scalar, or (B,) for "none"; float32 for half inputs, else the inputs' dtype.

    Raises:
        TypeError: an argument's type or dtype, or dtypes that differ.
        ValueError: a shape or value, devices that differ, an unknown backend or reduction.
        IndexError: an individual or emotion out of range (on CUDA a device-side assertion, see PCMECL_CHECK).
        RuntimeError: a named backend that cannot run.

    Source: the paper's feature differencing; the directional loss of StyleGAN-NADA; the contrast is ours.
    """
    return DIRECTION_LOSS(
        source,
        edited,
        bank,
        individual,
        source_emotion,
        target_emotion,
        scale,
        contrast,
        normalize,
        min_change,
        reduction,
        backend=backend,
    )


def _check_logits(
    source: Tensor, edited: Tensor, bank: Tensor, individual: Tensor, source_emotion: Tensor, normalize: bool,
    min_change: float,
) -> tuple[Any, ...]:  # fmt: skip
    sizes = checks.Sizes(needed="D")
    source, edited, bank = _checked_features(sizes, source, edited, bank, normalize, min_change)
    individual = _checked_index(sizes, "individual", individual, source)
    source_emotion = _checked_index(sizes, "source_emotion", source_emotion, source)
    return source, edited, bank, individual, source_emotion, normalize, float(min_change)


def _check_loss(
    source: Tensor, edited: Tensor, bank: Tensor, individual: Tensor, source_emotion: Tensor, target_emotion: Tensor,
    scale: float | Tensor, contrast: float, normalize: bool, min_change: float, reduction: str,
) -> tuple[Any, ...]:  # fmt: skip
    sizes = checks.Sizes(needed="D")
    source, edited, bank = _checked_features(sizes, source, edited, bank, normalize, min_change)
    checks.check_scale(scale)
    if isinstance(scale, Tensor):
        checks.check_one_device(source=source, scale=scale)
    checks.check_at_least_0("contrast", contrast)
    checks.check_choice("reduction", reduction, REDUCTIONS)
    named = (("individual", individual), ("source_emotion", source_emotion), ("target_emotion", target_emotion))
    indices = [_checked_index(sizes, name, index, source) for name, index in named]
    return source, edited, bank, *indices, scale, float(contrast), normalize, float(min_change), reduction


def _checked_features(
    sizes: checks.Sizes, source: Tensor, edited: Tensor, bank: Tensor, normalize: bool, min_change: float
) -> tuple[Tensor, ...]:
    for name, value, dims in (("source", source, "BD"), ("edited", edited, "BD"), ("bank", bank, "NED")):
        checks.check_float(name, value)
        sizes.check(name, value, dims)
    checks.check_one_device(source=source, edited=edited, bank=bank)
    checks.check_flag("normalize", normalize)
    checks.check_at_least_0("min_change", min_change)
    return checks.alike(source=source, edited=edited, bank=bank)


def _checked_index(sizes: checks.Sizes, name: str, index: Tensor, source: Tensor) -> Tensor:
    """The index as int64, one for each row of `source`."""
    is_one = isinstance(index, Tensor) and index.dtype is torch.int64 and index.shape == (sizes["B"],)
    if is_one and index.device == source.device:
        return index
    checks.check_integer(name, index)
    sizes.check(name, index, "B")
    checks.check_one_device(source=source, **{name: index})
    return index.long()


def _check_ranges(
    source: Tensor, edited: Tensor, bank: Tensor, individual: Tensor, source_emotion: Tensor, *rest: object
) -> None:
    """Raise IndexError unless every index is in range; the kernels word it the same."""
    checks.check_index_range("individual", individual, bank.shape[0], "individuals in bank")
    checks.check_index_range("source_emotion", source_emotion, bank.shape[1], "emotions in bank")
    if isinstance(rest[0], Tensor):
        checks.check_index_range("target_emotion", rest[0], bank.shape[1], "emotions in bank")


def _logits_outputs(source: Tensor, edited: Tensor, bank: Tensor, *rest: object) -> tuple[Tensor]:
    return (source.new_empty(source.shape[0], bank.shape[1]),)


def _loss_outputs(source: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """The loss, and the number of samples it is divided by."""
    reduction = rest[-1]
    wide = reference.computing_dtype(source)
    shape = source.shape[:1] if reduction == "none" else ()
    return source.new_empty(shape, dtype=wide), source.new_empty((), dtype=wide)


_FEATURES = "Tensor source, Tensor edited, Tensor bank, Tensor individual, Tensor source_emotion"
_SIZES = {
    "emotions": lambda source, edited, bank, *rest: bank.shape[1],
    "features": lambda source, edited, bank, *rest: bank.shape[2],
}
DIRECTION_LOGITS = Operator(
    reference.direction_logits,
    f"{_FEATURES}, bool normalize, float min_change",
    gradients=("source", "edited", "bank"),
    outputs=_logits_outputs,
    check=_check_logits,
    sizes=_SIZES,
    check_values=_check_ranges,
)
DIRECTION_LOSS = Operator(
    reference.direction_loss,
    f"{_FEATURES}, Tensor target_emotion, Tensor|float scale, float contrast, bool normalize, float min_change, "
    "str reduction",
    gradients=("source", "edited", "bank", "scale"),
    outputs=_loss_outputs,
    saved=("divisor",),
    check=_check_loss,
    sizes=_SIZES,
    check_values=_check_ranges,
)
