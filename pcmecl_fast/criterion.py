"""PCMECL as a single loss that plugs into any model that edits the expression of a talking face."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcmecl_fast import ops
from pcmecl_fast.clip import Clip
from pcmecl_fast.criterion_parts import check_prompts, checked_lengths, parts_of_run
from pcmecl_fast.explanation import Explanation, frame_by_frame
from pcmecl_fast.frames_in import TOLERANCE, FrameFormat, Watch, masked
from pcmecl_fast.labels import Labels, Names, per_frame
from pcmecl_fast.ops import checks
from pcmecl_fast.prompts.bank import PromptBank, row_of
from pcmecl_fast.prompts.learner import PersonalizedPrompts

log = logging.getLogger("pcmecl_fast")

MIN_CHANGE = 0.1
"""Of unit features; see `PCMECLCriterion`."""


class PCMECLCriterion(nn.Module):
    """direction_loss on frames: an edit must change CLIP's image features the way the individual's prompts change.

        loss = direction_loss(CLIP(source), CLIP(edited), bank, individual, a, b, min_change)    (ops.direction_loss)
             + strength · mean relu(1 − ⟨unit(CLIP(edited)) − unit(CLIP(source)), unit(d)⟩ / length)
        d      = bank[individual, b] − bank[individual, a]
        length = lengths[individual, a, b], or lengths[a, b] for everyone

    A direction says nothing about how far to go, so any term that preserves the frames shortens the edits at no cost.
    The second term, off by default, asks for edits to go as far along the text's direction as real changes do: the
    individual's own (`personal_lengths`) or the population's (`real_lengths`).

    Nor does a direction say how small a change is: its gradient grows as 1 / |change|, to 1e4 for a generator that
    begins 1e-4 from the identity, where a tower in bfloat16 gives little but rounding (docs/guide.md has the figures).
    So changes are divided by `min_change` at least, and a generator that begins as the identity is told where to go.
    `explain` shows how strong the gradient is beside other losses'.

    Frames are RGB in [-1, 1], or as `value_range` and `channels` say. Those whose values cannot be that are pointed out
    once in the log; on a GPU only the first call looks, since looking waits for the device. Bytes (uint8) are 0 to 255
    under any `value_range`, so that a loader's sources and a generator's edits go together.

    The bank is a buffer (one on disk stays there: each call reads the rows it needs), the clip is frozen and nothing
    here is trained. Gradients reach only the edited frames: source features are computed without a graph.

    With `prompts` that were learned with `condition="frame"`, the bank's rows are not used: each step computes the text
    features of its own source frames, and `individual` means nothing and may be None.

    The clip and the prompts are in no `state_dict()` and move with the criterion. A `copy.deepcopy` or a pickle holds
    its own; replicas of `DataParallel`, which splits tensors but no lists of names, share one on each device.
    DistributedDataParallel sends rank 0's buffers, and so the bank, to all others before every forward: where it is
    large, keep the criterion out of the module it wraps.

    Args:
        clip: the model the bank was built with.
        bank: text features of every individual and emotion.
        prompts: those the bank was built with, for `add_individual` and for conditions that are frames.
        contrast: weight of the contrast with the other target emotions, at least 0.
        scale: logit scale of that contrast; None means CLIP's own.
        min_change: the length of a change of unit features, at least 0, up to which its cosine grows with it; 0 takes
            changes of any size for directions.
        strength: weight of the penalty on edits that fall short of `lengths`, at least 0.
        lengths: how far changes from emotion a to b go, (E, E) or, per row of the bank, (N, E, E); required if
            `strength` is not 0.
        value_range: black and white of frames of floats: (-1, 1), (0, 1) or (0, 255).
        channels: the order of their colours, "rgb" or "bgr".
        background: what masks fill with, a number or one for each colour, in the frames' range; None is black.
        tolerance: how far outside [-1, 1] frames may be before that is pointed out.
        backend: which implementation runs; None leaves the choice to `use_backend`.

    Attributes:
        individuals, emotions: the names behind the indices, in order.

    Raises:
        ValueError: the bank or the prompts belong to another text tower; `lengths` is missing, misshapen or not
            positive; a range, an order or a background that no frames have.

    Source: the paper's abstract (personalized prompts, feature differencing); contrast and strength are ours.
    """

    features: Tensor  # (N, E, D); of a bank on disk only the rows that were added
    lengths: Tensor | None  # (1, E, E) or (N, E, E)
    fill: Tensor  # (3, 1, 1)

    def __init__(
        self,
        clip: Clip,
        bank: PromptBank,
        *,
        prompts: PersonalizedPrompts | None = None,
        contrast: float = 0.0,
        scale: float | None = None,
        min_change: float = MIN_CHANGE,
        strength: float = 0.0,
        lengths: Tensor | None = None,
        value_range: tuple[float, float] = (-1, 1),
        channels: str = "rgb",
        background: float | Sequence[float] | None = None,
        tolerance: float = TOLERANCE,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if bank.tower is not None and bank.tower.text_hash != clip.text_hash():
            raise ValueError(f"bank: made with {bank.tower.name!r} ({bank.tower.pretrained}), not with this clip")
        for name, number in (("contrast", contrast), ("strength", strength), ("min_change", min_change)):
            checks.check_at_least_0(name, number)
        if prompts is not None:
            check_prompts(prompts, bank, clip)
        # Out of sight of `state_dict`, and of a model that the criterion is a part of: what is frozen is not saved.
        self._frozen = (clip, prompts)
        self._elsewhere: dict[torch.device, tuple[Clip, PersonalizedPrompts | None]] = {}
        self._individuals, self._emotions = Names(bank.individuals, "individual"), Names(bank.emotions, "emotion")
        self.by_frame = prompts is not None and bank.condition == "frame"
        self.contrast = contrast
        self.min_change = min_change
        self.strength = strength
        self.scale = clip.logit_scale if scale is None else scale
        self.format = FrameFormat(value_range, channels, tolerance)
        self._watch = Watch(self.format)
        self.backend = backend
        self._on_disk = bank if bank.on_disk else None
        features = bank.lookup(torch.empty(0, dtype=torch.long)).float() if bank.on_disk else bank.features
        self.register_buffer("features", features.detach().to(clip.device), persistent=False)
        lengths = checked_lengths(lengths, bank, strength, by_frame=self.by_frame)
        self.register_buffer("lengths", None if lengths is None else lengths.to(self.features), persistent=False)
        self.register_buffer("fill", self.format.fill(background).to(clip.device), persistent=False)

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        clip: Clip | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> PCMECLCriterion:
        """The criterion of a finished run: its clip, its bank and prompts, and how far its data's changes go.

        Args:
            run: the folder of `pcmecl-fast prompts`; or that of `train` or `demo`, which also says how to weigh the
                terms (`contrast`, `min_change`, `strength`).
            clip: the run's model, if it is loaded already.
            device: where to put the model if it is not; None means the CPU.
            options: those of the criterion, which come before the folder's.

        Raises:
            FileNotFoundError: no such folder, or one without the files of a finished run.
            ValueError: another command's folder, a broken file, a clip other than the run's.
            ImportError: what reads configurations is missing: pip install 'pcmecl_fast[train]'.
        """
        parts = parts_of_run(run, clip=clip, device=device)
        of_both = parts.options | options
        if of_both.get("strength") and of_both.get("lengths") is None and "strength" not in options:
            log.warning(
                "%s has no lengths of changes, so strength=%s is left out; lengths= brings them (`personal_lengths`)",
                run,
                of_both.pop("strength"),
            )
        return cls(parts.clip, parts.bank, prompts=parts.prompts, **of_both)

    @property
    def clip(self) -> Clip:
        return self._here()[0]

    @property
    def prompts(self) -> PersonalizedPrompts | None:
        return self._here()[1]

    @property
    def individuals(self) -> list[str]:
        return self._individuals.names

    @property
    def emotions(self) -> list[str]:
        return self._emotions.names

    def extra_repr(self) -> str:
        sizes = f"{len(self._individuals)} × {len(self._emotions)} × {self.features.shape[-1]}"
        return (
            f"{self.clip.name} ({self.clip.pretrained}), a bank of {sizes}, contrast={self.contrast}, "
            f"scale={self.scale:g}, min_change={self.min_change}, strength={self.strength}, frames: {self.format}"
        )

    @torch.no_grad()
    def add_individual(
        self,
        name: str,
        frames: Tensor,  # (B, 3, H, W) or (3, H, W), as for forward
        *,
        replace: bool = False,
    ) -> int:
        """A row of the bank for somebody it does not have, from a few frames; returns its index.

        The prompts' condition is the frames' mean unit feature; the lengths of changes are the mean of all others'. The
        row lasts as long as the criterion: to keep it, build a bank that has it (`PromptBank.extended`). Where several
        processes train together, each adds the same people in the same order.

        Args:
            replace: compute the row of a name that is there already again.

        Raises:
            ValueError: no prompts; a name that is there already, and no `replace`, or a bank on disk; no frames.
        """
        if self.prompts is None:
            raise ValueError(
                "add_individual: a row is computed by the prompts the bank was built with; PCMECLCriterion.load(run) "
                "brings them, or pass prompts= (`load_prompts`)"
            )
        there = name in self._individuals
        if there and not replace:
            raise ValueError(f"name: {name!r} is in the bank already; replace=True computes the row again")
        if there and self._on_disk is not None:
            raise ValueError(f"name: the row of {name!r} is on disk, where it stays; load the bank into memory")
        self.format.check(frames, frames, None)
        seen = self.format.rgb(frames.to(self.features.device)).reshape(-1, *frames.shape[-3:])
        row = row_of(self.prompts, self.clip, seen, backend=self.backend).to(self.features)[None]
        if there:
            (index,) = self._individuals.indices("name", [name])
            # A new tensor: what a pending backward has seen must stay as it was.
            self.features = torch.cat([self.features[:index], row, self.features[index + 1 :]])
            return index
        self.features = torch.cat([self.features, row])
        if self.lengths is not None and len(self.lengths) > 1:
            self.lengths = torch.cat([self.lengths, self.lengths.mean(0, keepdim=True)])
        self._individuals.add(name)
        return len(self._individuals) - 1

    def forward(
        self,
        source_frames: Tensor,  # (B, 3, H, W) or (B, T, 3, H, W), any H and W; or one frame, (3, H, W)
        edited_frames: Tensor,  # as many frames, or T for each of the source's
        individual: Labels | None,  # (B,) or (B, T) int, rows of the bank; or names
        source_emotion: Labels,  # (B,) or (B, T) int; or names
        target_emotion: Labels,  # (B,) or (B, T) int; or names
        *,
        source_features: Tensor | None = None,  # (B, D) or (B, T, D): CLIP(source_frames), if already known
        mask: Tensor | None = None,  # (B, 1, H, W) or (B, T, 1, H, W) bool, or floats in [0, 1]: where the face is
    ) -> Tensor:  # ()
        """The mean loss over samples (and frames of a clip) whose target differs from their source emotion.

        One source frame for T edits, (B, 3, H, W) with (B, T, 3, H, W), is encoded once. Labels are per clip or per
        frame, on any device; frames (B·T, 3, H, W) take B labels for B clips of T consecutive frames, too. Names are a
        list of one for each sample or clip, or a string for all.

        Outside the mask both frames become `background`, so that its edge is no change of emotion; known source
        features are taken to be of such frames.

        Raises:
            TypeError: frames of integers other than uint8; edited ones of uint8 outside `torch.no_grad()`.
            ValueError: frames of the wrong rank or of different shapes, features, labels or a mask that do not match
                them, an unknown name.
        """
        labels = individual, source_emotion, target_emotion
        samples = self._samples(source_frames, edited_frames, labels, source_features, mask)
        if samples is None:
            return edited_frames.to(self.features.dtype).sum()  # 0, with a graph
        return self._loss(samples)

    def explain(
        self,
        source_frames: Tensor,  # as for forward
        edited_frames: Tensor,
        individual: Labels | None,
        source_emotion: Labels,
        target_emotion: Labels,
        *,
        mask: Tensor | None = None,
        beside: Mapping[str, Tensor] | None = None,
    ) -> Explanation:
        """What the loss is made of on a batch, frame by frame, and how hard it pulls at the edited frames.

        For choosing its weight, and for logs: `to_dict()` has plain numbers. Works under `torch.no_grad()`, too.

        Args:
            beside: other losses, each () and computed from the very tensor `edited_frames`; their graphs are kept.

        Raises:
            ValueError: no frames, or a loss in `beside` that does not depend on `edited_frames`.
        """
        if isinstance(edited_frames, Tensor) and edited_frames.dtype is torch.uint8:
            edited_frames = self.format.floats(edited_frames)
        if isinstance(edited_frames, Tensor) and not edited_frames.requires_grad:
            edited_frames = edited_frames.detach().requires_grad_()
        labels = individual, source_emotion, target_emotion
        with torch.enable_grad():
            samples = self._samples(source_frames, edited_frames, labels, None, mask)
            if samples is None:
                raise ValueError(f"edited_frames: got {tuple(edited_frames.shape)}; there is nothing to explain")
            loss = self._loss(samples)
        (gradient,) = torch.autograd.grad(loss, edited_frames)
        norms = {}
        for name, other in (beside or {}).items():
            (of_other,) = torch.autograd.grad(other, edited_frames, retain_graph=True, allow_unused=True)
            if of_other is None:
                raise ValueError(f"beside: {name!r} does not depend on edited_frames")
            norms[name] = float(of_other.norm())
        source, edited, bank, rows, _, a, b = samples
        with torch.no_grad():
            cosines = ops.direction_logits(source, edited, bank, rows, a, backend=self.backend)
            change = (F.normalize(edited, dim=-1) - F.normalize(source, dim=-1)).norm(dim=-1)
            each = frame_by_frame(self._loss(samples, "none"), cosines, change, a, b, self.emotions)
        return Explanation(loss.item(), float(gradient.norm()), norms, min_change=self.min_change, **each)

    def _samples(
        self,
        source_frames: Tensor,
        edited_frames: Tensor,
        labels: tuple[Labels | None, Labels, Labels],
        source_features: Tensor | None,
        mask: Tensor | None,
    ) -> _Samples | None:
        """Features and indices of each edited frame, None where there are no frames."""
        self.format.check(source_frames, edited_frames, mask)
        count, device = edited_frames.shape[:-3], self.features.device
        known, width = source_frames.shape[:-3], self.features.shape[-1]
        who, shown, asked = labels
        row = None if self.by_frame else self._rows(who, count)
        source_emotion = per_frame("source_emotion", shown, self._emotions, count, device)
        target_emotion = per_frame("target_emotion", asked, self._emotions, count, device)
        if source_features is not None:
            known = source_features.shape[:-1]
            if known not in (count, source_frames.shape[:-3]) or source_features.shape[-1] != width:
                raise ValueError(f"source_features: takes {(*count, width)}, got {tuple(source_features.shape)}")
            source_features = source_features.detach().reshape(-1, width)
        if not count.numel():
            return None
        self._watch.look("edited_frames", edited_frames)
        if source_features is None:
            self._watch.look("source_frames", source_frames)
            with torch.no_grad(), attention_of_training():
                seen = self._as_seen(source_frames, mask)
                known = seen.shape[:-3]
                source_features = self.clip.encode_image(_in_a_row(seen), backend=self.backend)
        edited_seen = _in_a_row(self._as_seen(edited_frames, mask))
        edited_features = self.clip.encode_image(edited_seen, backend=self.backend)
        times = 1 if known == count else count[1]
        bank, individual = self._text(row, source_features, times)
        if times > 1:
            source_features = source_features.repeat_interleave(times, dim=0)
        kind = self.features.dtype
        return _Samples(
            source_features.to(kind), edited_features.to(kind), bank, individual, row, source_emotion, target_emotion
        )

    def _rows(self, individual: Labels | None, count: torch.Size) -> Tensor:  # (count.numel(),)
        if individual is None:
            raise ValueError(
                "individual: got None; takes rows of the bank or names, unless prompts= brings prompts of frames"
            )
        way_out = "criterion.add_individual(name, frames) adds one"
        return per_frame("individual", individual, self._individuals, count, self.features.device, way_out=way_out)

    def _as_seen(
        self,
        frames: Tensor,  # (B, 3, H, W) or (B, T, 3, H, W)
        mask: Tensor | None,
    ) -> Tensor:  # the same, RGB in [-1, 1]
        frames = self.format.rgb(frames)
        if mask is None:
            return frames
        if mask.ndim == 4 and frames.ndim == 5:
            mask = mask[:, None]
        return masked(frames, mask, self.fill)

    def _text(
        self,
        row: Tensor | None,  # (B,) rows of the bank
        condition: Tensor,  # (b, D) features of the source frames, each of which is for `times` edited ones
        times: int,
    ) -> tuple[Tensor, Tensor]:
        """Text features, (n, E, D), and which of them each edited frame takes, (B,)."""
        device, kind = self.features.device, self.features.dtype
        if row is None:
            assert self.prompts is not None
            with torch.no_grad():
                text = self.prompts(F.normalize(condition.float(), dim=-1), backend=self.backend)
            return text.to(kind), torch.arange(len(text), device=device).repeat_interleave(times)
        if self._on_disk is None:
            return self.features, row
        return self._read(self._on_disk, row).to(kind), torch.arange(len(row), device=device)

    def _read(self, bank: PromptBank, row: Tensor) -> Tensor:  # (B, E, D)
        """Rows of a bank on disk, and of those that were added to it since."""
        on_disk, device = len(bank.individuals), self.features.device
        if not len(self.features):
            return bank.lookup(row, device)
        row = row.cpu()
        checks.check_index_range("individual", row, len(self._individuals), "individuals in bank")
        text = bank.lookup(row.clamp(max=on_disk - 1), device).to(self.features.dtype)
        added = row >= on_disk
        text[added.to(device)] = self.features[(row[added] - on_disk).to(device)]
        return text

    def _loss(self, samples: _Samples, reduction: str = "mean") -> Tensor:  # () or (B,)
        source, edited, bank, individual, row, source_emotion, target_emotion = samples
        loss = ops.direction_loss(
            source,
            edited,
            bank,
            individual,
            source_emotion,
            target_emotion,
            scale=self.scale,
            contrast=self.contrast,
            min_change=self.min_change,
            reduction=reduction,
            backend=self.backend,
        )
        if self.strength and self.lengths is not None:
            everybodys = row is None or len(self.lengths) == 1
            lengths = self.lengths[0 if everybodys else row, source_emotion, target_emotion]
            direction = bank[individual, target_emotion] - bank[individual, source_emotion]
            shortfall = _shortfall(source, edited, direction, lengths)
            valid = (source_emotion != target_emotion).to(shortfall)
            shortfall = shortfall * valid
            if reduction == "mean":
                shortfall = shortfall.sum() / valid.sum().clamp(min=1)
            loss = loss + self.strength * shortfall
        return loss

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PCMECLCriterion:
        clip, prompts = self._frozen
        clip._apply(fn, recurse)
        if prompts is not None:
            prompts.to(clip.device)  # V and h stay in float32, whatever the clip becomes
        self._elsewhere.clear()
        return super()._apply(fn, recurse)

    def _here(self) -> tuple[Clip, PersonalizedPrompts | None]:
        """The clip and the prompts; of a replica of DataParallel, which copies buffers alone, on its own device."""
        device = self.features.device
        if not getattr(self, "_is_replica", False) or device == self._frozen[0].device:
            return self._frozen
        if device not in self._elsewhere:  # shared by the replicas of all steps
            clip, prompts = copy.deepcopy(self._frozen)
            self._elsewhere[device] = clip.to(device), prompts and prompts.to(device)
        return self._elsewhere[device]


class _Samples(NamedTuple):
    """What the loss is computed from, for each edited frame."""

    source: Tensor  # (B, D)
    edited: Tensor  # (B, D)
    bank: Tensor  # (n, E, D)
    individual: Tensor  # (B,), of these
    row: Tensor | None  # (B,), of the criterion's bank
    source_emotion: Tensor  # (B,)
    target_emotion: Tensor  # (B,)


def _in_a_row(frames: Tensor) -> Tensor:  # (B, 3, H, W)
    return frames[None] if frames.ndim == 3 else frames.flatten(0, -4)


def _shortfall(
    source: Tensor,  # (B, D)
    edited: Tensor,  # (B, D)
    direction: Tensor,  # (B, D)
    lengths: Tensor,  # (B,)
) -> Tensor:  # (B,)
    """The fraction of each length by which a change falls short along its direction; 0 beyond it."""
    change = F.normalize(edited, dim=-1) - F.normalize(source, dim=-1)
    return F.relu(1 - (change * F.normalize(direction, dim=-1)).sum(-1) / lengths)


class _Switch:
    """PyTorch's fused inference attention, off while anybody needs it off: replicas run in threads."""

    lock, users, before = Lock(), 0, True


@contextmanager
def attention_of_training() -> Iterator[None]:
    """Disables PyTorch's fused inference attention, whose rounding differs from that of the differentiable one.

    Otherwise an edit that changes nothing would change features by 1e-7, in a direction made of noise, and get the
    huge gradient that goes with so small a change.
    """
    if torch.compiler.is_compiling():  # the switch cannot be traced
        yield
        return
    with _Switch.lock:
        if not _Switch.users:
            _Switch.before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _Switch.users += 1
    try:
        yield
    finally:
        with _Switch.lock:
            _Switch.users -= 1
            if not _Switch.users:
                torch.backends.mha.set_fastpath_enabled(_Switch.before)
