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

NOTES = {
    "emotion_accuracy": "Edited frames in which an independent classifier (not CLIP) sees the target emotion; 0–1, ↑",
    "emotion_accuracy_source": "The same classifier and targets on the unedited frames; near 0 by construction",
    "emotion_accuracy_truth": "The same on the true frames of the same person with the target emotion; a ceiling",
    "expression_error": "Mean absolute error of the action units read from the edit, against the true ones; 0–1.5, ↓",
    "expression_error_source": "The same for unedited frames: the score of doing nothing",
    "expression_error_truth": "The same for the true frames: the reader's own error",
    "mouth_error": "Mouth openness and spread read from the edit, against the source's; fraction of their range, ↓",
    "mouth_error_truth": "The same for the true frames: the reader's own error",
    "identity_similarity": "Cosine of identity vectors read from edit and source; up to 1, ↑",
    "identity_similarity_truth": "The same for true frames and sources",
    "psnr": "Edited against true frames, dB, ↑",
    "psnr_source": "Unedited against true frames, dB: the score of doing nothing",
    "zero_shot_accuracy": "Emotion of the source frames by CLIP and the plain descriptions; 0–1",
    "prompt_accuracy": "The same with the personalized prompts; 0–1, ↑",
    "clip_direction": "Mean cosine between the edit's change of CLIP features and its prompts' change; -1–1, ↑",
    "change": "Mean absolute change of a pixel by the edit, on a scale of 2",
    "seconds": "Wall time of the whole run",
}


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
) -> dict[str, float]:
    """Everything that paired truth reveals about edits of drawn faces; `NOTES` explains the keys."""
    judge = load_judge(device)
    columns = emotion_columns(faces.emotions).to(device)
    sums: dict[str, float] = {}

    def add(name: str, values: Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + float(values.float().sum())

    for chunk in tqdm(torch.arange(len(trials.index)).split(batch_size), desc="evaluating", leave=False):
        index, target = trials.index[chunk], trials.target[chunk]
        units = faces.true_action_units(index, target).to(device)
        speech = faces.parameters.speech[index].to(device)
        frames = {"_source": faces.frames(index).to(device), "_truth": faces.truth(index, target).to(device)}
        frames[""] = edit(frames["_source"], target.to(device)).float()
        read: dict[str, Reading] = {name: judge(x) for name, x in frames.items()}
        for name, seen in read.items():
            add(f"emotion_accuracy{name}", seen.emotion[:, columns].argmax(1) == target.to(device))
            add(f"expression_error{name}", (seen.action_units - units).abs().mean((1, 2)))
            add(f"mouth_error{name}", speech_difference(seen.speech, speech).mean(1))
            add(f"identity_similarity{name}", F.cosine_similarity(seen.identity, read["_source"].identity))
        for name in ("", "_source"):
            each = peak_signal_noise_ratio(
                frames[name], frames["_truth"], data_range=(-1.0, 1.0), reduction="none", dim=(1, 2, 3)
            )
            add(f"psnr{name}", each)
    for uninformative in ("mouth_error_source", "identity_similarity_source"):
        sums.pop(uninformative)
    return {name: value / len(trials.index) for name, value in sums.items()}


@torch.no_grad()
def clip_view(
    edit: Edit, clip: Clip, bank: PromptBank, dataset: FrameDataset, trials: Trials, *, batch_size: int = 64
) -> dict[str, float]:
    """What CLIP itself sees in the edits: works for real faces too, but flatters edits trained against CLIP."""
    bank = bank.to(clip.device)
    rows = (
        bank.rows([dataset.keys[i] for i in trials.index.tolist()])
        if bank.condition == "frame"
        else bank.rows(dataset.individuals)[dataset.individual_index[trials.index]]
    )
    plain = zero_shot_features(clip, bank.descriptions)
    sums = dict.fromkeys(("zero_shot_accuracy", "prompt_accuracy", "clip_direction", "change"), 0.0)
    for chunk in torch.arange(len(trials.index)).split(batch_size):
        index, target, row = trials.index[chunk], trials.target[chunk].to(clip.device), rows[chunk].to(clip.device)
        frames = dataset.frames(index).to(clip.device)
        shown = dataset.emotion_index[index].to(clip.device)
        edited = edit(frames, target).float()
        source_features = F.normalize(clip.encode_image(frames).float(), dim=-1)
        cosines = ops.direction_logits(
            source_features, clip.encode_image(edited).float(), bank.features.float(), row, shown
        )
        own = torch.einsum("bd,bed->be", source_features, bank.features[row].float())
        sums["zero_shot_accuracy"] += float(((source_features @ plain.T).argmax(1) == shown).sum())
        sums["prompt_accuracy"] += float((own.argmax(1) == shown).sum())
        sums["clip_direction"] += float(cosines.gather(1, target[:, None]).sum())
        sums["change"] += float((edited - frames).abs().mean((1, 2, 3)).sum())
    return {name: value / max(1, len(trials.index)) for name, value in sums.items()}


@torch.no_grad()
def zero_shot_features(clip: Clip, descriptions: list[str]) -> Tensor:
    """Unit text features of the plain descriptions, (E, D): off-the-shelf CLIP."""
    tokens = clip.tokenizer(descriptions).to(clip.device)
    return F.normalize(clip.model.encode_text(tokens).float(), dim=-1)
