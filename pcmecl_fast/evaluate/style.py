"""Personal style: whether edits, and prompts, show a change of emotion the way that particular person does.

Measured against the paired truth of drawn faces: each person has their own gain and asymmetry of each action unit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pcmecl_fast import ops
from pcmecl_fast.data.features import Features, individual_conditions
from pcmecl_fast.evaluate.metrics import Edit, Trials
from pcmecl_fast.prompts import PromptBank
from pcmecl_fast.synthetic import SyntheticFaces, speech_difference
from pcmecl_fast.synthetic.judge import emotion_columns, load_judge


@torch.no_grad()
def judge_style(edit: Edit, faces: SyntheticFaces, trials: Trials, *, device: torch.device) -> dict[str, float]:
    """Measures of edits against paired truth, personal style among them; `ablation.MEASURES` explains the keys.

    Args:
        edit: the function that edits frames, on `device`.
        faces: drawn faces.
        trials: which frames are edited to which emotion. A person's style is measured by the mean over their edits to
            an emotion, so each needs several.
        device: where `edit` expects its frames.
    """
    judge, logits = load_judge(), emotion_columns(faces.emotions)
    read_units, true_units, followed, asked = [], [], 0.0, 0.0
    sums = dict.fromkeys(("emotion_accuracy", "identity_similarity", "mouth_error"), 0.0)
    for index, target in zip(trials.index.split(128), trials.target.split(128), strict=True):
        frames = faces.frames(index)
        edited = edit(frames.to(device), target.to(device)).cpu()
        seen, source = judge(edited), judge(frames)
        true = faces.true_action_units(index, target)
        read_units.append(seen.action_units)
        true_units.append(true)
        wanted = true - faces.parameters.action_units[index]
        followed += float(((seen.action_units - source.action_units) * wanted).sum())
        asked += float(wanted.square().sum())
        sums["emotion_accuracy"] += float((seen.emotion.argmax(1) == logits[target]).sum())
        sums["identity_similarity"] += float(F.cosine_similarity(seen.identity, source.identity).sum())
        sums["mouth_error"] += float(speech_difference(seen.speech, faces.parameters.speech[index]).mean(1).sum())
    read, true = torch.cat(read_units), torch.cat(true_units)
    return {
        **_style_errors(read, true, faces, trials),
        "expression_error": float((read - true).abs().mean()),
        **{name: value / len(trials.target) for name, value in sums.items()},
        "edit_strength": followed / asked,
    }


def _style_errors(
    read: Tensor,  # (T, A, 2) action units of the edits
    true: Tensor,  # (T, A, 2)
    faces: SyntheticFaces,
    trials: Trials,
) -> dict[str, float]:
    emotions = len(faces.emotions)
    cells, cell = (faces.individual_index[trials.index] * emotions + trials.target).unique(return_inverse=True)
    (pattern, style), (own, own_style) = (_patterns(units, cell, cells % emotions) for units in (read, true))
    return {
        "personal_style_error": float((pattern - own).abs().mean()),
        "style_correlation": float(F.cosine_similarity(style.flatten(), own_style.flatten(), dim=0)),
    }


def _patterns(
    units: Tensor,  # (T, A, 2)
    cell: Tensor,  # (T,) int in [0, C)
    target: Tensor,  # (C,) int, the emotion of each cell
) -> tuple[Tensor, Tensor]:  # (C, A, 2) each
    """Mean action units of each cell (a person with an emotion); and the same minus the emotion's population mean."""
    pattern = _means(units, cell, len(target))
    return pattern, pattern - _means(pattern, target, int(target.max()) + 1)[target]


def _means(
    values: Tensor,  # (T, ...)
    group: Tensor,  # (T,) int in [0, groups)
    groups: int,
) -> Tensor:  # (groups, ...)
    total = values.new_zeros(groups, *values.shape[1:]).index_add_(0, group, values)
    count = torch.bincount(group, minlength=groups).clamp(min=1)
    return total / count.view(-1, *[1] * (values.ndim - 1))


@torch.no_grad()
def judge_prompts(
    bank: PromptBank,
    faces: SyntheticFaces,
    features: Features,  # (L, D) unit, of every frame of `faces`
) -> dict[str, float]:
    """Measures of a bank alone: how well changes of a person's prompts predict changes of that person's face."""
    emotions, count = len(faces.emotions), len(faces.individuals)
    cell = faces.individual_index * emotions + faces.emotion_index
    visual = individual_conditions(features, cell, count * emotions).view(count, emotions, -1)
    visual = F.normalize(visual, dim=-1)
    names = faces.individuals
    if bank.condition == "frame":
        first = [int((faces.individual_index == n).nonzero()[0, 0]) for n in range(count)]
        names = [faces.keys[i] for i in first]
    text = bank.lookup(bank.rows(names), visual.device).float()
    before, after = ops.reference.ordered_pairs(emotions, visual.device)
    visual_change, text_change = (F.normalize(x[:, after] - x[:, before], dim=-1).flatten(0, 1) for x in (visual, text))
    nearest = (visual_change @ text_change.T).argmax(1)
    once = (before < after).repeat(count)  # the two directions of every change would cancel
    return {
        "direction_top1": float((nearest == torch.arange(len(nearest), device=nearest.device)).float().mean()),
        "direction_cosine": float((visual_change * text_change).sum(-1).mean()),
        "gap": float((visual.flatten(0, 1).mean(0) - text.flatten(0, 1).mean(0)).norm()),
        "gap_of_changes": float((visual_change[once].mean(0) - text_change[once].mean(0)).norm()),
    }
