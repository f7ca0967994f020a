"""The operators' workloads for all benchmarks: inputs at the sizes of real training, the call, its cost.

`CASES` is the table; a builder makes the same workload at another size, for curves. Each case runs on any backend, so
the plain side of a measurement is the reference that the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import rehearsal
from pcmecl_fast import ops
from pcmecl_fast.ops import PromptTree

SOURCES = ("pcmecl_fast/ops/**/*.py", "csrc/**/*", "kernels/*.py")  # changing these files makes a measured time stale
D, E = 512, 7  # ViT-B-32's features, MEAD's emotions
PEOPLE = 48  # MEAD's
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
PEERS_SCALE = 20.0  # the logit scale used for other libraries' losses too
NAMES = (2,) * E  # one word and EOS for each emotion
SHARED = PromptTree(1 + 8, NAMES)
PER_EMOTION = PromptTree(1, tuple(8 + n for n in NAMES))
LONG = PromptTree(5, (3,) * 62)


@dataclass(frozen=True)
class Case:
    """One call of an operator."""

    call: Callable[..., Tensor]
    """The operator as a function of `inputs` and `backend=`."""
    inputs: tuple[Tensor, ...]
    """What is differentiated."""
    weight: Tensor | None = None
    """The gradient of the result, unless the result is a scalar."""
    moved: float = 0.0
    """Bytes that must be read and written, forward and backward."""
    operations: float = 0.0
    """Multiplications and additions of the matrix products, forward and backward."""

    @property
    def operator(self) -> str:
        """The name of the operator that it calls."""
        return ops.explain(self.call, *self.inputs).operator

    def run(self, backend: str) -> list[Tensor]:
        """The result and the gradients."""
        return differentiated(partial(self.call, backend=backend), self.inputs, self.weight)

    def compiled(self) -> Case:
        """The same through `torch.compile`."""
        compiler = "eager" if rehearsal.is_on() else "inductor"
        return replace(self, call=torch.compile(self.call, fullgraph=True, dynamic=False, backend=compiler))


@dataclass(frozen=True)
class Sized:
    """A case of the table: how to build it, and how many samples or individuals each kind of device gets."""

    build: Callable[[int, torch.device, torch.dtype], Case]
    cpu: int
    cuda: int

    def on(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Case:
        return self.build(rehearsal.size(self.cpu if device.type == "cpu" else self.cuda), device, dtype)


def differentiated(call: Callable[..., Tensor], inputs: Sequence[Tensor], weight: Tensor | None) -> list[Tensor]:
    """A call's result and the gradients of its inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = call(*leaves)
    return [result, *torch.autograd.grad(result, leaves, weight)]


def direction(
    samples: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    people: int = PEOPLE,
    width: int = D,
    contrast: float = 0.0,
    logits: bool = False,
    edited_alone: bool = False,
) -> Case:
    """Edits against a bank; `edited_alone`: differentiated only with respect to the edited features, as in stage 2."""
    random = torch.Generator().manual_seed(0)
    source = torch.randn(samples, width, generator=random)
    edited = source + 0.3 * torch.randn(samples, width, generator=random)
    bank = F.normalize(torch.randn(people, E, width, generator=random), dim=-1)
    shown = torch.randint(E, (samples,), generator=random)
    asked = (shown + torch.randint(1, E, (samples,), generator=random)) % E
    individual = torch.randint(people, (samples,), generator=random)
    weight = torch.randn(samples, E, generator=random).to(device, dtype) if logits else None
    individual, shown, asked = (x.to(device) for x in (individual, shown, asked))
    source, edited, bank = (x.to(device, dtype) for x in (source, edited, bank))

    def call(edited: Tensor, source: Tensor = source, bank: Tensor = bank, **choice: Any) -> Tensor:
        if logits:
            return ops.direction_logits(source, edited, bank, individual, shown, **choice)
        return ops.direction_loss(source, edited, bank, individual, shown, asked, contrast=contrast, **choice)

    # The features and the bank are read forward and backward, and their gradients written.
    moved = 2 * (source.nbytes + edited.nbytes + bank.nbytes) + edited.nbytes
    if edited_alone:
        return Case(call, (edited,), weight, float(moved))
    return Case(call, (edited, source, bank), weight, float(moved + source.nbytes + bank.nbytes))


def correlation(
    individuals: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    emotions: int = E,
    width: int = D,
    scale: float = 100.0,
    negatives: str = "all",
    missing: float = 0.0,
) -> Case:
    """Changes of the face against changes of the text; `missing`: the fraction of missing emotions."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(2, individuals, emotions, width, generator=random)
    visual, text = F.normalize(features, dim=-1).to(device, dtype)
    mask = torch.rand(individuals, emotions, generator=random).to(device) >= missing if missing else None
    call = partial(ops.correlation_loss, scale=scale, mask=mask, negatives=negatives)
    # Forward: one product of V and T; backward: the same again and one for each gradient.
    return Case(call, (visual, text), operations=4 * 2.0 * (individuals * emotions) ** 2 * width)


def attention(
    people: int, device: torch.device, dtype: torch.dtype, *, tree: PromptTree, heads: int = 8, width: int = 64
) -> Case:
    """The attention of `people` prompt trees."""
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(people, tree.length, 3, heads, width, generator=random).to(device, dtype)
    weight = torch.randn(people, tree.length, heads, width, generator=random).to(device, dtype)
    return Case(
        lambda qkv, **choice: ops.tree_attention(qkv, tree, **choice),
        (qkv,),
        weight,
        moved=(3 + 1 + 3 + 1 + 3) * qkv.nbytes / 3,
        operations=7.0 * 2 * people * heads * int(tree.mask().sum()) * width,
    )


def frames(count: int, device: torch.device, dtype: torch.dtype, *, side: int, size: int = 224) -> Case:
    """Square frames to CLIP's input."""
    random = torch.Generator().manual_seed(0)
    pictures = (torch.rand(count, 3, side, side, generator=random) * 2 - 1).to(device, dtype)
    weight = torch.randn(count, 3, size, size, generator=random).to(device, dtype)
    call = partial(ops.clip_frames, size=size, mean=MEAN, std=STD)
    return Case(call, (pictures,), weight, moved=2.0 * (pictures.nbytes + weight.nbytes))


CASES: dict[str, Sized] = {
    "direction_logits": Sized(partial(direction, logits=True), cpu=256, cuda=65536),
    "direction_loss": Sized(direction, cpu=256, cuda=65536),
    "direction_loss_contrast": Sized(partial(direction, contrast=0.2), cpu=256, cuda=65536),
    "direction_loss_edited": Sized(partial(direction, edited_alone=True), cpu=256, cuda=65536),
    "direction_loss_bandwidth": Sized(direction, cpu=2048, cuda=65536),
    "correlation_loss": Sized(correlation, cpu=128, cuda=512),
    "correlation_loss_within": Sized(partial(correlation, negatives="within"), cpu=16, cuda=256),
    "correlation_loss_distinct": Sized(partial(correlation, negatives="distinct"), cpu=16, cuda=256),
    "correlation_loss_missing": Sized(partial(correlation, missing=0.3), cpu=16, cuda=256),
    "correlation_loss_memory": Sized(correlation, cpu=512, cuda=512),
    "correlation_loss_peers": Sized(partial(correlation, scale=PEERS_SCALE), cpu=64, cuda=512),
    "tree_attention": Sized(partial(attention, tree=SHARED), cpu=64, cuda=512),
    "tree_attention_per_emotion": Sized(partial(attention, tree=PER_EMOTION), cpu=4, cuda=64),
    "tree_attention_long": Sized(partial(attention, tree=LONG), cpu=2, cuda=32),
    "clip_frames": Sized(partial(frames, side=256), cpu=16, cuda=16),
    "clip_frames_enlarged": Sized(partial(frames, side=64), cpu=16, cuda=16),
}
NOT_BY_THE_REFERENCE = {"cpu": ("correlation_loss_memory",), "cuda": ()}
"""Cases where the reference's copies of the logits exceed the memory of a typical machine."""
