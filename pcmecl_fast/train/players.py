"""The generator and its critic, trained in turn over all ranks: optimisers, the running average, the precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pcmecl_fast.distributed import ranks, summed
from pcmecl_fast.models import Average, Critics, Edit, Generator
from pcmecl_fast.models.discriminator import Scores, Views, emotion_loss, mouths_of, naming_loss, realism_loss
from pcmecl_fast.train.batches import Batch
from pcmecl_fast.train.config import TrainConfig
from pcmecl_fast.train.loop import Stateful
from pcmecl_fast.train.optimizers import Learning, matrices_of
from pcmecl_fast.wording import name_some

Network = TypeVar("Network", bound=nn.Module)

TERMS = (
    "pcmecl",
    "adversarial",
    "emotion",
    "emotion_mouth",
    "cycle",
    "reconstruction",
    "identity",
    "mouth",
    "speech",
    "person",
    "recognition",
)
"""What the trainer's loss is made of, beside a generator's own penalties."""

RESERVED = ("loss", "critic", "step")
"""Names that the trainer logs beside those of the terms."""

TermsOf = Callable[[Batch], tuple[Tensor, dict[str, Tensor], Tensor]]
"""A part of a batch to its edited frames, its terms by name, and the loss that they make."""


class Players:
    """The generator, the running average of its weights, and the critic, if its terms have weights.

    Attributes:
        generator: the one that learns.
        average: of its weights.
        critic: the network, None where neither of its terms has a weight.
        editing: the generator's passes of a step.
        autocast: the precision of all networks.
    """

    def __init__(self, generator: Generator, config: TrainConfig, device: torch.device) -> None:
        self.generator = generator
        self.average = Average(generator, config.average)
        self.editing = _over_ranks(_Editing(generator, again=bool(config.w_cycle)))
        matrices = matrices_of(generator) if config.optimizer == "muon" else ()
        self.optimizer = Learning([(generator, config.lr)], matrices)
        self.critic: Critics | None = None
        self._fakes, self._mouth_box = config.emotion_fakes, config.mouth_box
        if config.w_adversarial or config.w_emotion or config.w_emotion_mouth:
            critic = Critics(
                len(generator.emotions),
                patches=bool(config.w_adversarial),
                emotion=bool(config.w_emotion),
                emotion_mouth=bool(config.w_emotion_mouth),
            )
            self.critic = laid_out(critic.to(device))
            self._judging = _over_ranks(_Judging(self.critic))
            rates = [
                (critic.patches, config.critic_lr),
                (critic.emotion, config.emotion_lr),
                (critic.emotion_mouth, config.emotion_lr),
            ]
            # By Adam in any case: players with as much momentum as Muon's go in circles (Gidel et al. 2019).
            self.critic_optimizer = Learning([(x, rate) for x, rate in rates if x is not None])
        self.set_rates(1.0)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        half = torch.float16 if config.amp == "fp16" else torch.bfloat16
        self.autocast = torch.autocast(device.type, dtype=half, enabled=config.amp != "none")

    def states(self) -> dict[str, Stateful]:
        of_critic = () if self.critic is None else ("critic", "critic_optimizer")
        return {name: getattr(self, name) for name in ("generator", "average", "optimizer", "scaler", *of_critic)}

    def set_rates(self, part: float) -> None:
        self.optimizer.set_rates(part)
        if self.critic is not None:
            self.critic_optimizer.set_rates(part)

    def improve(self, terms_of: TermsOf, parts: Sequence[Batch]) -> dict[str, Tensor]:
        """A step on all parts of a batch: the terms of the whole, and the critic's loss if there is one."""
        edits, terms = self._improve_generator(terms_of, parts)
        if self.critic is not None:
            terms["critic"] = self._improve_critic(parts, edits)
        self.scaler.update()
        return terms

    def of_critic(
        self,
        edited: Tensor,  # (B, 3, H, W)
        target: Tensor,  # (B,) int
    ) -> dict[str, Tensor]:
        """The critics' terms of the generator's loss; gradients reach the edits alone."""
        if self.critic is None:
            return {}
        self.critic.requires_grad_(False)
        scores = self.critic(self._views(edited))
        terms = {}
        if scores.patches is not None:
            terms["adversarial"] = -scores.patches.float().mean()
        for name in ("emotion", "emotion_mouth"):
            if (of_emotion := getattr(scores, name)) is not None:
                terms[name] = naming_loss(of_emotion, target)
        return terms

    def _views(
        self,
        frames: Tensor,  # (B, 3, H, W)
    ) -> Views:
        """What the critics see of frames."""
        assert self.critic is not None
        whole = self.critic.patches is not None or self.critic.emotion is not None
        return Views(
            judged(self.generator, frames) if whole else None,
            None if self.critic.emotion_mouth is None else mouths_of(frames, self._mouth_box),
        )

    def _improve_generator(self, terms_of: TermsOf, parts: Sequence[Batch]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The edited frames of each part, and the terms of the whole batch."""
        self.optimizer.zero_grad()
        edits, totals = list[Tensor](), dict[str, Tensor]()
        for number, part in enumerate(parts, 1):
            with _averaging(self.editing, last=number == len(parts)):
                edited, terms, loss = terms_of(part)
                # Ranks' gradients are averaged, and their terms are parts of a sum.
                self.scaler.scale(loss * ranks()).backward()
            edits.append(edited.detach())
            totals = {name: totals.get(name, 0.0) + term.detach() for name, term in terms.items()}
        self._check_used()
        self.optimizer.unscale(self.scaler)
        nn.utils.clip_grad_norm_(self.generator.parameters(), 1.0)
        self.optimizer.step(self.scaler)
        self.average.update(self.generator)
        first = next(iter(totals.values()))
        whole = summed(torch.stack([term.to(first) for term in totals.values()]))
        return edits, dict(zip(totals, whole.unbind(), strict=True))

    def _improve_critic(self, parts: Sequence[Batch], edits: Sequence[Tensor]) -> Tensor:
        assert self.critic is not None
        self.critic.requires_grad_(True)
        self.critic_optimizer.zero_grad()
        total = torch.zeros((), device=edits[0].device)
        for number, (part, edited) in enumerate(zip(parts, edits, strict=True), 1):
            with _averaging(self._judging, last=number == len(parts)):
                with self.autocast:
                    real, fake = self._judging(self._views(part.frames), self._views(edited))
                    loss = torch.zeros((), device=total.device)
                    if real.patches is not None and fake.patches is not None:
                        loss = loss + realism_loss(real.patches, fake.patches)
                    for ours, theirs in ((real.emotion, fake.emotion), (real.emotion_mouth, fake.emotion_mouth)):
                        if ours is not None and theirs is not None:
                            loss = loss + emotion_loss(ours, part.source, theirs, part.target, fakes=self._fakes)
                loss = loss * part.of_all
                self.scaler.scale(loss * ranks()).backward()
            total += loss.detach()
        self.critic_optimizer.step(self.scaler)
        return summed(total)

    def _check_used(self) -> None:
        """Over ranks, parameters that no gradient reaches would leave others' gradients unaveraged."""
        if ranks() > 1:
            unused = [name for name, x in self.generator.named_parameters() if x.requires_grad and x.grad is None]
            if unused:
                raise ValueError(
                    f"generator: no gradient reaches {name_some(unused, 3)}: over ranks every parameter takes part in "
                    "every edit; freeze them (requires_grad_(False)) or remove them"
                )


class _Editing(nn.Module):
    """A step's passes of the generator as one, as DistributedDataParallel wants it."""

    def __init__(self, generator: Generator, *, again: bool) -> None:
        super().__init__()
        self.generator, self.again = generator, again

    def forward(self, frames: Tensor, drive: Tensor, back: Tensor) -> tuple[Edit, Tensor | None]:
        """The edit, and the frames edited back where that is wanted."""
        edit = self.generator.edit(frames, drive)
        _check(edit, frames)
        return edit, self.generator(edit.frames, back) if self.again else None


class _Judging(nn.Module):
    """What the critic says of real frames and of edits, in one pass."""

    def __init__(self, critic: Critics) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, real: Views, fake: Views) -> tuple[Scores, Scores]:
        pairs = zip(real, fake, strict=True)
        both = self.critic(Views(*(None if x is None or y is None else torch.cat([x, y]) for x, y in pairs)))
        # As many of one as of the other.
        of_real, of_fake = zip(*((None, None) if x is None else x.chunk(2) for x in both), strict=True)
        return Scores(*of_real), Scores(*of_fake)


def _over_ranks(module: nn.Module) -> nn.Module:
    return DistributedDataParallel(module, gradient_as_bucket_view=True) if ranks() > 1 else module


def _averaging(module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """A step's last part averages the gradients over ranks; those before only add them up."""
    return nullcontext() if last or not isinstance(module, DistributedDataParallel) else module.no_sync()


def _check(edit: Edit, frames: Tensor) -> None:
    """Catch mistakes of a user's generator before they become a loss of the wrong shape or name."""
    if not isinstance(edit, Edit):
        raise TypeError(f"generator: edit returns Edit(frames, penalties), got {type(edit).__name__}")
    if edit.frames.shape != frames.shape:
        raise ValueError(f"generator: edit was given frames {tuple(frames.shape)}, returned {tuple(edit.frames.shape)}")
    for name, penalty in edit.penalties.items():
        if name in (*TERMS, *RESERVED):
            raise ValueError(f"generator: the trainer has a {name!r} of its own; call the penalty something else")
        if not isinstance(penalty, Tensor) or penalty.numel() != 1:
            raise ValueError(f"generator: the penalty {name!r} must be a tensor of one number, got {penalty}")


def judged(
    generator: Generator,
    frames: Tensor,  # (B, 3, H, W)
) -> Tensor:  # (B, 3, h, w)
    """What the critics see: the region that edits may change, with what is around it up to multiples of 8.

    Outside it an edit is its source, which is real.
    """
    height, width = frames.shape[-2:]
    rows, columns = generator.region(height, width)
    seen = frames[..., _filled(rows, height), _filled(columns, width)]
    return seen.contiguous(memory_format=torch.channels_last) if frames.device.type == "cpu" else seen


def _filled(span: slice, length: int) -> slice:
    """A span filled up to a multiple of 8 on both sides alike, as far as the frame goes."""
    more = (span.start - span.stop) % 8
    size = span.stop - span.start + more
    start = max(0, min(span.start - more // 2, length - size))
    return slice(start, min(start + size, length))


def laid_out(network: Network) -> Network:
    """Channels last on a CPU, where convolutions would else copy every tensor."""
    on_cpu = all(x.device.type == "cpu" for x in network.parameters())
    return network.to(memory_format=torch.channels_last) if on_cpu else network
