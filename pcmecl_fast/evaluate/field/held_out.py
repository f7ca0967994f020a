"""The field's measures of single frames on edits of a data set: what `evaluate` can say of real faces without CLIP."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from pcmecl_fast.data.base import FrameDataset
from pcmecl_fast.data.faces import surest_face
from pcmecl_fast.evaluate.field.measures import Tools
from pcmecl_fast.evaluate.field.meter import emotion_seen, landmark_distances
from pcmecl_fast.evaluate.intervals import summarize
from pcmecl_fast.evaluate.metrics import Edit, Trials, Values


@torch.no_grad()
def field_view(edit: Edit, dataset: FrameDataset, trials: Trials, tools: Tools, *, batch_size: int = 64) -> Values:
    """Measures of each edit against the frame that was edited; a trial in which no face is found has NaN.

    Args:
        edit: the function that edits frames; it is given them on the CPU.
        dataset: the frames.
        trials: which are edited, to which emotion.
        tools: of `load_tools`, with some of identity, emotion, lmd, psnr and ssim.

    Returns:
        `field_psnr`, `field_ssim`, `field_identity`, `field_lmd`, `field_lmd_mouth`, `field_emotion` as far as the
        tools give them, each (T,).
    """
    parts: dict[str, list[Tensor]] = {}
    for chunk in torch.arange(len(trials.index)).split(batch_size):
        target = trials.target[chunk]
        source = dataset.frames(trials.index[chunk])
        edited = edit(source, target).float().cpu().clamp(-1, 1)
        names = [dataset.emotions[e] for e in target.tolist()]
        for name, values in (_pixels(edited, source, tools) | _faces(edited, source, names, tools)).items():
            parts.setdefault(f"field_{name}", []).append(values)
    return {name: torch.cat(values) for name, values in parts.items()}


def summarize_view(
    view: Values,
    individual: Tensor,  # (T,) int
) -> dict[str, Any]:
    """Means with intervals as of `intervals.summarize`, of each measure over the trials that have it.

    Returns:
        the means, `intervals`, and `left_out`: of measures that lack trials, of how many no face was found.
    """
    summary: dict[str, Any] = {"intervals": {}, "left_out": {}}
    for name, values in view.items():
        there = ~values.isnan()
        if missing := int((~there).sum()):
            summary["left_out"][name] = missing
        if there.any():
            of = summarize({name: values[there]}, individual[there])
            summary[name], summary["intervals"][name] = of[name], of["intervals"][name]
    return summary


def _pixels(
    edited: Tensor,  # (B, 3, S, S)
    source: Tensor,  # (B, 3, S, S)
    tools: Tools,
) -> Values:
    values: Values = {}
    if "psnr" in tools.metrics:
        of = peak_signal_noise_ratio(edited, source, data_range=(-1.0, 1.0), reduction="none", dim=(1, 2, 3))
        values["psnr"] = of.flatten()
    if "ssim" in tools.metrics:
        ssim = structural_similarity_index_measure(edited, source, data_range=(-1.0, 1.0), reduction="none")
        values["ssim"] = torch.as_tensor(ssim).flatten()
    return values


def _faces(
    edited: Tensor,  # (B, 3, S, S)
    source: Tensor,  # (B, 3, S, S)
    targets: list[str],
    tools: Tools,
) -> Values:
    if tools.detector is None:
        return {}
    rows: list[dict[str, float]] = []
    for a, b, target in zip(_pictures(edited), _pictures(source), targets, strict=True):
        row = dict.fromkeys(_keys(tools), float("nan"))
        rows.append(row)
        face, other = surest_face(tools.detector, a), surest_face(tools.detector, b)
        if face is not None and "emotion" in row and target in tools.networks["emotion"].emotions:
            row["emotion"] = float(emotion_seen(tools.networks["emotion"], a, face) == target)
        if face is None or other is None:
            continue
        if "identity" in row:
            both = torch.from_numpy(np.stack([a, b])).permute(0, 3, 1, 2)
            ours, theirs = tools.networks["identity"](both, [face, other])
            row["identity"] = float(F.cosine_similarity(ours, theirs, dim=0))
        if "lmd" in row:
            row["lmd"], row["lmd_mouth"] = landmark_distances(face, other)
    return {key: torch.tensor([row[key] for row in rows]) for key in _keys(tools)}


def _keys(tools: Tools) -> list[str]:
    return [m.key for m in tools.measures if m.metric in ("identity", "emotion", "lmd")]


def _pictures(
    frames: Tensor,  # (B, 3, S, S) in [-1, 1]
) -> np.ndarray:  # (B, S, S, 3) uint8
    return ((frames + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
