"""What towers in half precision change: `python -m bench.tower_dtypes [--device cuda] [--json FILE]`.

Drawn people's frames are edited half way to another emotion. For each tower, everything is computed with its weights in
bfloat16 and in float16, and compared with float32: unit features of the frames, unit features of the prompts, PCMECL's
loss, its gradient in the edited frames, and the gradient of stage 1's loss in the prompts' context. Parameters of the
prompts, features and losses are in float32 throughout, as in training.

Only tiny-face has trained weights; the others' are random, since none are fetched here. Features of different frames
nearly coincide in random towers, so that their differences, which the loss is about, are smaller than trained ones',
and the rounding in them larger.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from bench.compare_prompts import tower
from pcmecl_fast import PCMECLCriterion, PersonalizedPrompts, PromptBank, ops
from pcmecl_fast.clip import Clip
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.towers.precision import DTYPES
from pcmecl_fast.train.config import device_named
from pcmecl_fast.train.prompts import matching_loss

EMOTIONS = ["neutral", "angry", "fear", "happy", "sad"]
FRAMES: dict[str, Any] = {"emotions": EMOTIONS, "clips": 1, "frames_per_clip": 1, "size": 64}


@dataclass
class Options:
    """Compare towers in bfloat16 and float16 with float32."""

    towers: list[str] = field(default_factory=lambda: ["tiny-face", "ViT-S-32-alt", "ViT-B-32"])
    """tiny-face, or names of open_clip, with random weights."""
    individuals: int = 4
    """How many people to draw, with one frame for each of five emotions."""
    device: str = "auto"
    """cpu, cuda …"""
    json: Path | None = None
    """Write the rows there, too."""


@dataclass(frozen=True)
class Results:
    """What one tower computes in one dtype."""

    image: Tensor  # (N·E, D) unit features of the frames
    text: Tensor  # (N, E, D) of the prompts
    loss: Tensor  # ()
    frames_gradient: Tensor  # (N·E, 3, H, W) of the loss in the edited frames
    context_gradient: Tensor  # (M, W) of stage 1's loss in V


@dataclass(frozen=True)
class Row:
    """How far a tower in half precision is from the same one in float32."""

    tower: str
    weights: str
    dtype: str
    image_error: float
    """1 − cosine of unit features of a frame, the largest."""
    text_error: float
    """1 − cosine of unit features of a prompt, the largest."""
    loss_difference: float
    """Of PCMECL's loss, relative."""
    frames_gradient_cosine: float
    """Of the gradients in all edited frames, taken as one vector."""
    context_gradient_cosine: float
    """Of the gradients in the prompts' context, taken as one vector."""


def main() -> None:
    options = tyro.cli(Options)
    rows = measure(options.towers, SyntheticFaces(options.individuals, **FRAMES), device_named(options.device))
    show(rows)
    if options.json is not None:
        device = torch.cuda.get_device_name() if device_named(options.device) != "cpu" else platform.machine()
        of = {"torch": torch.__version__, "device": device, "individuals": options.individuals}
        options.json.write_text(json.dumps({**of, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def measure(towers: list[str], faces: SyntheticFaces, device: str) -> list[Row]:
    """One row for each tower and half type."""
    rows = []
    for name in towers:
        exact = results(tower(torch.device(device), torch.float32, name), faces)
        for dtype in ("bfloat16", "float16"):
            clip = tower(torch.device(device), DTYPES[dtype], name)
            rows.append(compared(clip, dtype, exact, results(clip, faces)))
    return rows


def results(clip: Clip, faces: SyntheticFaces) -> Results:
    """Everything, with the same parameters of the prompts whatever the tower's dtype."""
    people, emotions = len(faces.individuals), len(faces.emotions)
    every = torch.arange(len(faces))
    order = (faces.individual_index * emotions + faces.emotion_index).argsort()
    shown, target = faces.emotion_index, (faces.emotion_index + 1) % emotions
    frames = faces.frames(every).to(clip.device)
    with torch.no_grad():
        image = normalize(clip.encode_image(frames).float(), dim=-1)
    seen = image[order.to(image.device)].unflatten(0, (people, emotions))

    prompts = _prompts(clip, faces.emotions)
    conditions = seen.mean(1)
    text = prompts(conditions)
    mask = torch.ones(people, emotions, dtype=torch.bool, device=clip.device)
    learning = matching_loss(seen, text, mask, clip.logit_scale)
    learning = learning + ops.correlation_loss(seen, text, scale=clip.logit_scale, mask=mask)
    (context_gradient,) = torch.autograd.grad(learning, [prompts.context])

    bank = PromptBank.build(prompts, conditions, faces.individuals, faces.emotions, clip=clip)
    edited = torch.lerp(frames, faces.truth(every, target).to(clip.device), 0.5).requires_grad_()
    labels = (each.to(clip.device) for each in (faces.individual_index, shown, target))
    loss = PCMECLCriterion(clip, bank, contrast=0.5)(frames, edited, *labels)
    (frames_gradient,) = torch.autograd.grad(loss, [edited])
    return Results(image, text.detach(), loss.detach(), frames_gradient, context_gradient)


def _prompts(clip: Clip, descriptions: list[str]) -> PersonalizedPrompts:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prompts = PersonalizedPrompts(clip, descriptions).to(clip.device)
        assert prompts.condition_net is not None
        weight = next(prompts.condition_net[2].parameters())
        with torch.no_grad():  # 0 before training, which would make all individuals' prompts the same
            weight.copy_(0.02 * torch.randn(weight.shape))
    return prompts


def compared(clip: Clip, dtype: str, exact: Results, half: Results) -> Row:
    """How far what `clip` computes in a dtype is from the exact results."""

    def error(ours: Tensor, right: Tensor) -> float:
        return float((1 - cosine_similarity(ours.double(), right.double(), dim=-1)).max())

    def alike(ours: Tensor, right: Tensor) -> float:
        return float(cosine_similarity(ours.double().flatten(), right.double().flatten(), dim=0))

    return Row(
        clip.name,
        "trained" if clip.pretrained == "built-in" else clip.pretrained,
        dtype,
        error(half.image, exact.image),
        error(half.text, exact.text),
        float((half.loss - exact.loss).abs() / exact.loss.abs()),
        alike(half.frames_gradient, exact.frames_gradient),
        alike(half.context_gradient, exact.context_gradient),
    )


def show(rows: list[Row]) -> None:
    table = Table(title="Towers in half precision against float32")
    for name in ("tower", "weights", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("image, 1 − cosine", "text, 1 − cosine", "loss, relative", "∂frames, cosine", "∂context, cosine"):
        table.add_column(name, justify="right")
    for row in rows:
        errors = (f"{x:.1e}" for x in (row.image_error, row.text_error, row.loss_difference))
        cosines = (f"{x:.4f}" for x in (row.frames_gradient_cosine, row.context_gradient_cosine))
        table.add_row(row.tower, row.weights, row.dtype, *errors, *cosines)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
