"""Stage 1: learning personalized prompts from unit image features.

L_match = cross entropy of s·⟨v[n,e], that[n,·]⟩ over the individual's own prompts, and, where prompts are personal, of
s·⟨that[n,e], v[·,e]⟩ over the batch's individuals; L_diff = ops.correlation_loss(v, that); total =
L_match + λ_diff · L_diff.

Over ranks, each has its share of a step's individuals and runs their prompts; both losses are over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pcmecl_fast import ops
from pcmecl_fast.clip import Clip
from pcmecl_fast.data.base import FrameDataset, check_trainable
from pcmecl_fast.data.features import Features, FeatureStore, LiveFeatures, individual_conditions
from pcmecl_fast.distributed import (
    Group,
    average_gradients,
    barrier,
    everybody,
    from_main,
    gathered,
    is_main,
    rank,
    share,
    shares,
    summed,
)
from pcmecl_fast.ops.operator import requested_backend
from pcmecl_fast.options import counted
from pcmecl_fast.prompts import PersonalizedPrompts, PromptBank, load_prompts, save_prompts
from pcmecl_fast.train.config import PromptsConfig, RunConfig
from pcmecl_fast.train.graphs import adamw, make_step, set_learning_rate
from pcmecl_fast.train.loop import Loop

IGNORED = -100  # a target that cross_entropy excludes from the mean


def learn_prompts(
    clip: Clip, dataset: FrameDataset, config: PromptsConfig, *, begin: Callable[[], None] = lambda: None
) -> tuple[PersonalizedPrompts, PromptBank, Loop]:
    """Learn V and h on a data set; write `prompts.safetensors` and `bank.safetensors` to `config.out`.

    `begin` is called when everything has been checked, before anything is written.

    Raises:
        ValueError: data that has nothing to learn from, or descriptions that do not match its emotions.
    """
    check_trainable(dataset)
    descriptions = config.descriptions or dataset.emotions
    if len(descriptions) != len(dataset.emotions):
        raise ValueError(
            f"descriptions: takes one for each of the {len(dataset.emotions)} emotions "
            f"({', '.join(dataset.emotions)}), got {len(descriptions)}"
        )
    torch.manual_seed(config.seed)
    prompts = PersonalizedPrompts(
        clip,
        descriptions,
        n_ctx=config.n_ctx,
        context=config.context,
        condition=None if config.condition == "none" else "features",
        ending=config.ending,
    ).to(clip.device)
    begin()
    features = frame_features(clip, dataset, config)
    conditions = individual_conditions(features, dataset.individual_index, len(dataset.individuals))
    frames_of = _FramesOf(dataset)
    optimizer = adamw(prompts.parameters(), config.prompt_lr, config.cuda_graphs, clip.device)
    loop = Loop(
        config.out,
        "stage 1",
        {"prompts": prompts, "optimizer": optimizer},
        steps=config.steps,
        seed=config.seed,
        every=config.checkpoint_every,
        resume=config.resume,
        signature={**config.what_counts(), "descriptions": descriptions, **contents_of(clip, dataset)},
    )
    take_step = make_step(
        # The scale is read here, once: that waits for the device.
        partial(
            _take_step, clip.logit_scale, prompts, optimizer, config, frames_of.people_of(config.batch_individuals)
        ),
        optimizer,
        config.cuda_graphs,
        clip.device,
    )
    for step in loop:
        generator = loop.generator(step)
        individuals, frames, mask = frames_of.draw(config.batch_individuals, generator)
        shown = frames_of.any_frame(individuals, generator) if config.condition == "frame" else None
        own = share(len(individuals))
        frames, mask = frames[own], mask[own]
        seen = features[frames[mask]]
        visual = seen.new_zeros(*mask.shape, seen.shape[-1])  # (n, E, D); rows without a frame are masked
        visual[mask.to(seen.device)] = seen
        condition = conditions[individuals[own].to(conditions.device)] if shown is None else features[shown[own]]
        set_learning_rate(optimizer, config.prompt_lr * min(1.0, (step + 1) / 10) * (1 - step / config.steps))
        loss, match, diff = take_step(visual, condition, mask.to(visual.device))
        loop.record(step, loss=loss, match=match, diff=diff)
    prompts.requires_grad_(False).eval()
    by_frame = config.condition == "frame"
    names, seen_by = (dataset.keys, features) if by_frame else (dataset.individuals, conditions)
    path = config.out / "bank.safetensors"
    if not (config.resume and from_main(lambda: _already_written(config.out, prompts, clip))):
        PromptBank.build(prompts, seen_by, names, dataset.emotions, clip=clip, condition=config.condition, path=path)
        if is_main():
            save_prompts(config.out / "prompts.safetensors", prompts, dataset.emotions, clip)
        barrier()
    bank = PromptBank.load(path, clip, on_disk=by_frame)
    return prompts, bank, loop


def contents_of(clip: Clip, dataset: FrameDataset) -> dict[str, str]:
    """What a run depends on besides its options, for the signature of its checkpoints."""
    return {
        "the weights of --clip": f"{clip.text_hash()[:16]} {clip.image_hash()[:16]}",
        "the frames in --data": counted(len(dataset), dataset.labels_hash()),
    }


def _already_written(folder: Path, prompts: PersonalizedPrompts, clip: Clip) -> bool:
    """Whether a resumed stage had come to its end: made again on a GPU, its bank might be rounded in another way."""
    try:
        written, _ = load_prompts(folder / "prompts.safetensors", clip)  # the last file of the stage
        PromptBank.load(folder / "bank.safetensors", clip, on_disk=True)
    except (FileNotFoundError, ValueError):
        return False
    before, now = written.state_dict(), prompts.state_dict()
    return before.keys() == now.keys() and all(torch.equal(before[key], now[key]) for key in now)


def _take_step(
    scale: float,
    prompts: PersonalizedPrompts,
    optimizer: torch.optim.Optimizer,
    config: PromptsConfig,
    people: int,
    visual: Tensor,  # (n, E, D), this rank's of all people's
    condition: Tensor,  # (n, D)
    mask: Tensor,  # (n, E) bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One optimiser step: returns the total loss and its two parts. Nothing in it waits for the device."""
    group, sizes = everybody(), shares(people)
    text = prompts(condition)
    match = matching_loss(
        visual, text, mask, scale, personal=prompts.condition is not None, group=group, group_sizes=sizes
    )
    diff = ops.correlation_loss(
        visual, text.to(visual.dtype), scale=scale, mask=mask, negatives=config.negatives,
        group=group, group_sizes=sizes,
    )  # fmt: skip
    loss = match + config.lambda_diff * diff
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients(prompts.parameters())
    optimizer.step()
    return loss.detach(), match.detach(), diff.detach()


def frame_features(clip: Clip, dataset: FrameDataset, config: RunConfig) -> Features:
    """Image features of a data set's frames: from the store, or recomputed on every access by the reference backend."""
    if requested_backend(None) == "reference":
        return LiveFeatures(clip, dataset)
    store = FeatureStore(config.features_folder, clip, dtype=getattr(torch, config.features_dtype))
    return store(dataset, workers=config.readers)


def matching_loss(
    visual: Tensor,  # (n, E, D) unit
    text: Tensor,  # (n, E, D) unit
    mask: Tensor,  # (n, E) bool: which visual features exist
    scale: float,
    *,
    personal: bool = True,
    group: Group | None = None,
    group_sizes: Sequence[int] = (),
) -> Tensor:
    """½ · (image → the individual's own prompts + prompt → the same emotion's images of the batch's individuals).

    The first alone, and whole, where all individuals have the same prompts: these say nothing of whose images fit.
    With `group`, the batch's individuals are those of all its ranks, `group_sizes` of them each, and this rank's are
    `visual`, `text` and `mask`; gradients are as those of `ops.correlation_loss`.
    """
    if group is not None:
        return _matching_loss_over_ranks(visual, text, mask, scale, personal, group, group_sizes)
    # Missing entries are excluded through their targets: selecting rows by the mask would wait for the device.
    people, emotions = mask.shape
    own_prompt = torch.arange(emotions, device=text.device).masked_fill(~mask, IGNORED)
    to_prompts = scale * torch.einsum("ned,nfd->nef", visual, text)
    image_loss = F.cross_entropy(to_prompts.flatten(0, 1), own_prompt.flatten(), ignore_index=IGNORED)
    if not personal:
        return image_loss
    own_image = torch.arange(people, device=text.device).expand(emotions, -1).masked_fill(~mask.T, IGNORED)
    to_people = scale * torch.einsum("ned,med->enm", text, visual)
    # A person without the emotion is a candidate only in their own row, which is excluded.
    candidate = mask.T[:, None, :] | torch.eye(people, dtype=torch.bool, device=text.device)
    to_people = to_people.masked_fill(~candidate, float("-inf"))
    prompt_loss = F.cross_entropy(to_people.flatten(0, 1), own_image.flatten(), ignore_index=IGNORED)
    return (image_loss + prompt_loss) / 2


def _matching_loss_over_ranks(
    visual: Tensor,  # (n, E, D) unit
    text: Tensor,  # (n, E, D) unit
    mask: Tensor,  # (n, E) bool
    scale: float,
    personal: bool,
    group: Group,
    sizes: Sequence[int],
) -> Tensor:
    people, emotions = mask.shape
    own_prompt = torch.arange(emotions, device=text.device).masked_fill(~mask, IGNORED)
    to_prompts = scale * torch.einsum("ned,nfd->nef", visual, text)
    losses = F.cross_entropy(to_prompts.flatten(0, 1), own_prompt.flatten(), ignore_index=IGNORED, reduction="sum")
    if personal:
        everyone, present = gathered(visual, mask, sizes=sizes, group=group)  # (N, E, D), (N, E)
        own = torch.arange(people, device=text.device) + sum(sizes[: rank()])
        own_image = own.expand(emotions, -1).masked_fill(~mask.T, IGNORED)
        to_people = scale * torch.einsum("ned,med->enm", text, everyone)
        itself = own[:, None] == torch.arange(len(everyone), device=text.device)
        to_people = to_people.masked_fill(~(present.T[:, None, :] | itself), float("-inf"))
        prompt_loss = F.cross_entropy(
            to_people.flatten(0, 1), own_image.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        losses = (losses + prompt_loss) / 2
    total, count = summed(torch.stack([losses, mask.sum().to(losses.dtype)]), group)
    return total / count


class _FramesOf:
    """Draws individuals and one frame for each emotion they have."""

    def __init__(self, dataset: FrameDataset) -> None:
        self.available = dataset.available()
        self.people = self.available.any(1).nonzero()[:, 0]
        order = torch.argsort(dataset.individual_index * len(dataset.emotions) + dataset.emotion_index, stable=True)
        counts = torch.bincount(
            dataset.individual_index * len(dataset.emotions) + dataset.emotion_index,
            minlength=self.available.numel(),
        )
        self.order = order
        self.counts = counts.view(self.available.shape)
        self.starts = (counts.cumsum(0) - counts).view(self.available.shape)

    def people_of(self, count: int) -> int:
        """How many individuals a draw of so many gives."""
        return min(count, len(self.people))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Individuals (n,), a frame index for each emotion (n, E), and whether there is one (n, E)."""
        chosen = self.people[torch.randperm(len(self.people), generator=generator)[:count]]
        counts = self.counts[chosen]
        offset = (torch.rand(counts.shape, generator=generator) * counts).long()
        index = (self.starts[chosen] + offset).clamp(max=len(self.order) - 1)
        return chosen, self.order[index], counts > 0

    def any_frame(self, individuals: Tensor, generator: torch.Generator) -> Tensor:
        """One frame of each individual, (n,)."""
        counts = self.counts[individuals].sum(1)
        offset = (torch.rand(len(individuals), generator=generator) * counts).long()
        return self.order[self.starts[individuals, 0] + offset]
