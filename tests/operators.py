"""The operators, one row each: inputs of any size, dtype and device, the call, and what it differentiates.

`make(name, ...)` gives a `Call` of any operator, for tests that hold for all; the `*_inputs` below it give the bare
tensors, for tests of one. All is drawn in float64 and then rounded, so that dtypes and devices share their inputs.
`number` seeds it; without one the sizes do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit

from pcmecl_fast.ops import PromptTree, clip_frames, correlation_loss, direction_logits, direction_loss, tree_attention

TREE = PromptTree(4, (2, 3, 1))
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's CLIP


@dataclass(frozen=True)
class Call:
    """An operator and its arguments."""

    operator: str
    floats: list[Tensor]
    """Its differentiable arguments; they require gradients."""
    rest: tuple[Tensor | None, ...]
    """Its other tensors: indices or a mask."""
    function: Callable[..., Tensor]
    """The operator as a function of `floats`, `rest` and `backend=`."""
    schema_arguments: tuple
    """The arguments of `torch.ops.pcmecl_fast.<operator>`, except the backend's name at the end."""

    def __call__(self, *floats: Tensor, backend: str | None = None) -> Tensor:
        """The operator applied to `floats`, or to the call's own if there are none."""
        return self.function(*(floats or self.floats), *self.rest, backend=backend)

    def widened(self) -> list[Tensor]:
        """Its floats in float64, for the exact result."""
        return [x.detach().double().requires_grad_() for x in self.floats]


def value_and_gradients(
    call: Callable[..., Tensor], floats: Sequence[Tensor], *, backend: str | None = None
) -> tuple[Tensor, list[Tensor]]:
    """A call's result and the gradients of its sum, with a different weight for each element."""
    leaves = [x.detach().clone().requires_grad_() for x in floats]
    out = call(*leaves, backend=backend)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64, device=out.device).view(out.shape)
    (out * weights.half().to(out.dtype)).sum().backward()
    return out.detach(), [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def make(operator: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", **sizes: Any) -> Call:
    """An operator's call; `sizes` are the arguments of its maker below."""
    return MAKERS[operator](dtype=dtype, device=device, **sizes)


def make_direction_logits(
    *,
    batch: int = 5,
    people: int = 3,
    emotions: int = 7,
    width: int = 33,
    normalize: bool = True,
    min_change: float = 0.0,
    **where: Any,
) -> Call:
    *floats, individual, shown, _ = direction_inputs(batch, people, emotions, width, **where)
    rest = (individual, shown)
    function = partial(direction_logits, normalize=normalize, min_change=min_change)
    return Call("direction_logits", floats, rest, function, (*floats, *rest, normalize, min_change))


def make_direction_loss(
    *,
    batch: int = 5,
    people: int = 3,
    emotions: int = 7,
    width: int = 33,
    contrast: float = 0.5,
    scale: float = 6.0,
    normalize: bool = True,
    min_change: float = 0.0,
    reduction: str = "mean",
    **where: Any,
) -> Call:
    *floats, individual, shown, asked = direction_inputs(batch, people, emotions, width, **where)
    rest, scale = (individual, shown, asked), scale_input(scale, **where)

    def function(
        source: Tensor, edited: Tensor, bank: Tensor, scale: Tensor, *indices: Tensor, **choice: Any
    ) -> Tensor:
        options = {"contrast": contrast, "normalize": normalize, "min_change": min_change, "reduction": reduction}
        return direction_loss(source, edited, bank, *indices, scale=scale, **options, **choice)

    arguments = (*floats, *rest, scale, 0.0, contrast, normalize, min_change, reduction)
    return Call("direction_loss", [*floats, scale], rest, function, arguments)


def make_correlation_loss(
    *,
    people: int = 3,
    emotions: int = 7,
    width: int = 33,
    missing: bool = False,
    negatives: str = "all",
    scale: float = 6.0,
    **where: Any,
) -> Call:
    visual, text, mask = correlation_inputs(people, emotions, width, **where)
    mask, scale = mask if missing else None, scale_input(scale, **where)

    def function(visual: Tensor, text: Tensor, scale: Tensor, mask: Tensor | None, **choice: Any) -> Tensor:
        return correlation_loss(visual, text, scale=scale, mask=mask, negatives=negatives, **choice)

    arguments = (visual, text, scale, 0.0, mask, negatives)
    return Call("correlation_loss", [visual, text, scale], (mask,), function, arguments)


def make_tree_attention(
    *, people: int = 2, layout: PromptTree = TREE, heads: int = 2, width: int = 16, **where: Any
) -> Call:
    qkv = attention_input(people, layout.length, heads, width, **where)
    function = partial(tree_attention, layout=layout)
    return Call("tree_attention", [qkv], (), function, (qkv, layout.prefix, layout.segment_lengths))


def make_clip_frames(
    *,
    batch: int = 2,
    height: int = 45,
    width: int = 31,
    size: int = 16,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    interpolation: str = "bicubic",
    **where: Any,
) -> Call:
    frames = frames_input(batch, height, width, **where)
    function = partial(clip_frames, size=size, mean=mean, std=std, interpolation=interpolation)
    return Call("clip_frames", [frames], (), function, (frames, size, mean, std, interpolation))


MAKERS: dict[str, Callable[..., Call]] = {
    "direction_logits": make_direction_logits,
    "direction_loss": make_direction_loss,
    "correlation_loss": make_correlation_loss,
    "tree_attention": make_tree_attention,
    "clip_frames": make_clip_frames,
}
OPERATORS = tuple(MAKERS)


def direction_inputs(
    batch: int,
    people: int,
    emotions: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    number: int | None = None,
    degenerate: bool = False,
) -> list[Tensor]:
    """source, edited and a unit bank that require gradients; individual, source_emotion, target_emotion.

    Some target emotions equal their source's. `degenerate`: some edits change nothing, and two emotions of the last
    individual have the same text.
    """
    generator = seed(batch * 1000 + width if number is None else number)
    source, edited = (torch.randn(batch, width, generator=generator, dtype=torch.float64) for _ in range(2))
    bank = unit(torch.randn(people, emotions, width, generator=generator, dtype=torch.float64), dim=-1)
    tops = (people, emotions, emotions)
    indices = [torch.randint(max(top, 1), (batch,), generator=generator) for top in tops]
    if degenerate:
        edited[2::5] = source[2::5]
        bank[-1, 1:2] = bank[-1, :1]
        indices[2][3:4] = indices[1][3:4]
    return [*_leaves((source, edited, bank), dtype, device), *(x.to(device) for x in indices)]


def correlation_inputs(
    people: int,
    emotions: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    number: int | None = None,
    degenerate: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features that require gradients, and a mask without about a third, but with all of the first individual's.

    `degenerate`: two emotions of the second individual have the same visual features, and the third is the first again.
    """
    generator = seed(people * 1000 + width if number is None else number)
    features = torch.randn(2, people, emotions, width, generator=generator, dtype=torch.float64)
    visual, text = unit(features, dim=-1)
    mask = torch.rand(people, emotions, generator=generator) > 0.35
    mask[:1] = True
    if degenerate:
        visual[1:2, 1] = visual[1:2, 0]
        visual[2:3], text[2:3] = visual[:1], text[:1]
    visual, text = _leaves((visual, text), dtype, device)
    return visual, text, mask.to(device)


def attention_input(
    people: int,
    tokens: int,
    heads: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    number: int | None = None,
) -> Tensor:
    """qkv."""
    qkv = torch.randn(
        people, tokens, 3, heads, width, generator=seed(tokens if number is None else number), dtype=torch.float64
    )
    return _leaves((qkv,), dtype, device)[0]


def frames_input(
    batch: int,
    height: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    number: int | None = None,
) -> Tensor:
    """Frames in [−1, 1]."""
    frames = (
        torch.rand(batch, 3, height, width, generator=seed(height if number is None else number), dtype=torch.float64)
        * 2
        - 1
    )
    return _leaves((frames,), dtype, device)[0]


def scale_input(scale: float, *, dtype: torch.dtype = torch.float32, device: str = "cpu", **_: Any) -> Tensor:
    """The logit scale as a tensor: float64 beside float64, else float32."""
    own = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.tensor(scale, dtype=own, device=device).requires_grad_()


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def _leaves(tensors: Sequence[Tensor], dtype: torch.dtype, device: str) -> list[Tensor]:
    return [x.to(device, dtype).requires_grad_() for x in tensors]
