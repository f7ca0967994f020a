"""How good edits are: against paired truth for drawn faces, in CLIP's own view for real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from tqdm import tqdm

from pcmecl_fast import ops
from pcmecl_fast.clip import Clip
from pcmecl_fast.data.base import FrameDataset
from pcmecl_fast.prompts import PromptBank
from pcmecl_fast.synthetic import SyntheticFaces, speech_difference
from pcmecl_fast.synthetic.judge import Reading, emotion_columns, load_judge

Edit = Callable[[Tensor, Tensor], Tensor]
"""(source frames (B, 3, S, S), target emotions (B,)) to edited frames."""

Values = dict[str, Tensor]
"""Measures of T trials: (T,) float, or bool for what is right or wrong; `intervals.summarize` takes their means."""


@dataclass(frozen=True)
class Trials:
    """Edits to be judged: frames of a data set and the target emotion of each."""

    index: Tensor  # (T,) int
    target: Tensor  # (T,) int


def draw_trials(dataset: FrameDataset, count: int, *, seed: int = 0) -> Trials:
    """`count` frames spread evenly over the data set, each with a target that differs from its own emotion."""
    emotions = len(dataset.emotions)
    generator = torch.Generator().manual_seed(seed)
    index = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long()
    shift = torch.randint(1, max(emotions, 2), (len(index),), generator=generator)
    return Trials(index, (dataset.emotion_index[index] + shift) % emotions)


@torch.no_grad()
def judge_edits(
    edit: Edit, faces: SyntheticFaces, trials: Trials, *, device: torch.device, batch_size: int = 64
) -> Values:
    """Everything that paired truth reveals about edits of drawn faces; `results.MEASURES` explains the keys.

    A key alone is of the edited frames; with `_source` of the unedited ones, with `_truth` of the true edits.
    """
    judge = load_judge(device)
    columns = emotion_columns(faces.emotions).to(device)
    values = _Collected()
    for chunk in tqdm(torch.arange(len(trials.index)).split(batch_size), desc="evaluating", leave=False):
        index, target = trials.index[chunk], trials.target[chunk]
        units = faces.true_action_units(index, target).to(device)
        speech = faces.parameters.speech[index].to(device)
        frames = {"_source": faces.frames(index).to(device), "_truth": faces.truth(index, target).to(device)}
        frames[""] = edit(frames["_source"], target.to(device)).float()
        read: dict[str, Reading] = {name: judge(x) for name, x in frames.items()}
        for name, seen in read.items():
            values.add(f"emotion_accuracy{name}", seen.emotion[:, columns].argmax(1) == target.to(device))
            values.add(f"expression_error{name}", (seen.action_units - units).abs().mean((1, 2)))
        for name in ("", "_truth"):  # the source says what it says, and is who it is
            values.add(f"mouth_error{name}", speech_difference(read[name].speech, speech).mean(1))
            same = F.cosine_similarity(read[name].identity, read["_source"].identity)
            values.add(f"identity_similarity{name}", same)
        for name in ("", "_source"):
            each = peak_signal_noise_ratio(
                frames[name], frames["_truth"], data_range=(-1.0, 1.0), reduction="none", dim=(1, 2, 3)
            )
            values.add(f"psnr{name}", each)
    return values.all()


@torch.no_grad()
def clip_view(
    edit: Edit, clip: Clip, bank: PromptBank, dataset: FrameDataset, trials: Trials, *, batch_size: int = 64
) -> Values:
    """What CLIP itself sees in the edits: works for real faces too, but flatters edits trained against CLIP."""
    bank = bank.to(clip.device)
    rows = bank_rows(bank, dataset, trials)
    plain = zero_shot_features(clip, bank.descriptions)
    values = _Collected()
    for chunk in torch.arange(len(trials.index)).split(batch_size):
        index, target, row = trials.index[chunk], trials.target[chunk].to(clip.device), rows[chunk].to(clip.device)
        frames = dataset.frames(index).to(clip.device)
        edited = edit(frames, target).float()
        features = {"": clip.encode_image(edited).float(), "_source": clip.encode_image(frames).float()}
        for name, seen in features.items():
            values.add(f"clip_emotion_accuracy{name}", (seen @ plain.T).argmax(1) == target)
        shown = dataset.emotion_index[index].to(clip.device)
        source = F.normalize(features["_source"], dim=-1)
        cosines = ops.direction_logits(source, features[""], bank.features.float(), row, shown)
        values.add("clip_direction", cosines.gather(1, target[:, None])[:, 0])
        values.add("change", (edited - frames).abs().mean((1, 2, 3)))
    return values.all()


@torch.no_grad()
def prompt_view(clip: Clip, bank: PromptBank, dataset: FrameDataset, trials: Trials, *, batch_size: int = 64) -> Values:
    """Whether CLIP names the emotion of the unedited frames: by the plain descriptions, by the personalized prompts,
    and, where there are other individuals, by the mean over the prompts of each of those."""
    bank = bank.to(clip.device)
    rows = bank_rows(bank, dataset, trials)
    everybody = bank.rows(dataset.individuals).to(clip.device) if bank.condition == "individual" else rows[:0]
    plain = zero_shot_features(clip, bank.descriptions)
    values = _Collected()
    for chunk in torch.arange(len(trials.index)).split(batch_size):
        index, row = trials.index[chunk], rows[chunk].to(clip.device)
        source = F.normalize(clip.encode_image(dataset.frames(index).to(clip.device)).float(), dim=-1)
        shown = dataset.emotion_index[index].to(clip.device)
        by_plain = (source @ plain.T).argmax(1) == shown
        by_own = torch.einsum("bd,bed->be", source, bank.features[row].float()).argmax(1) == shown
        values.add("zero_shot_accuracy", by_plain)
        values.add("prompt_accuracy", by_own)
        values.add("prompt_gain", by_own.float() - by_plain.float())
        if len(everybody) > 1:
            cosines = torch.einsum("bd,ned->bne", source, bank.features[everybody].float())
            right = (cosines.argmax(2) == shown[:, None]).float()  # (B, N)
            by_others = (right.sum(1) - by_own.float()) / (len(everybody) - 1)
            values.add("others_prompt_accuracy", by_others)
            values.add("personal_gain", by_own.float() - by_others)
    return values.all()


@torch.no_grad()
def zero_shot_features(clip: Clip, descriptions: list[str]) -> Tensor:
    """Unit text features of the plain descriptions, (E, D): off-the-shelf CLIP."""
    tokens = clip.tokenizer(descriptions).to(clip.device)
    return F.normalize(clip.model.encode_text(tokens).float(), dim=-1)


class _Collected:
    """Values of trials, gathered batch by batch."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(
        self,
        name: str,
        values: Tensor,  # (B,) float or bool
    ) -> None:
        self._parts.setdefault(name, []).append(values.cpu())

    def all(self) -> Values:
        return {name: torch.cat(parts) for name, parts in self._parts.items()}


def bank_rows(bank: PromptBank, dataset: FrameDataset, trials: Trials) -> Tensor:
    """Whose prompts each trial uses: (T,) rows of the bank."""
    if bank.condition == "frame":
        return bank.rows([dataset.keys[i] for i in trials.index.tolist()])
    return bank.rows(dataset.individuals)[dataset.individual_index[trials.index]]
