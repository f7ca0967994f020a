"""Comparisons of the towers' work: batches of prompts against prompt trees, frames re-encoded against the store.

"padded batch" and "published trainer" do what published trainers do: every prompt at the tower's full length, every
frame encoded in every step; otherwise they are written well: batched, without gradients where none are needed. The
careful sides, of bench/careful.py, cut the prompts and keep what does not change.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import rehearsal
from bench.careful import trimmed_prompts
from bench.compare import Candidates, Comparison, Side, backend_sides, comparison, count_operations, those_that_run
from bench.timing import Run
from pcmecl_fast import PCMECLCriterion, PersonalizedPrompts, PromptBank, load_clip, ops
from pcmecl_fast.clip import Clip
from pcmecl_fast.criterion import MIN_CHANGE
from pcmecl_fast.train.graphs import WARM_UP, adamw, make_step
from pcmecl_fast.train.prompts import matching_loss

EMOTIONS = ["neutral", "angry", "disgusted", "fear", "happy", "sad", "surprised"]
TOWER = "ViT-B-32"
PADDED, TRIMMED, COMPILED = "padded batch", "trimmed batch", "trimmed batch, torch.compile"
PUBLISHED, CAREFUL = "published trainer", "careful trainer"
PROMPTS = ("pcmecl_fast/prompts/*.py", "pcmecl_fast/towers/*.py", "pcmecl_fast/ops/*tree*.py")
CRITERION = (*PROMPTS, "pcmecl_fast/criterion.py", "pcmecl_fast/ops/**/*.py", "pcmecl_fast/clip.py")


@comparison(
    "text_tower",
    "text features of 16 individuals × 7 emotions, shared context, with backward",
    sources=PROMPTS,
    targets={"cpu": {PADDED: 25, TRIMMED: 4}, "cuda": {PADDED: 15}},
)
def text_tower(device: torch.device, dtype: torch.dtype) -> Comparison:
    individuals = rehearsal.size(16 if device.type == "cpu" else 64)
    return _padded_and_tree(EMOTIONS, individuals, "shared", 8, device, dtype)


@comparison(
    "text_tower_per_emotion",
    "text features of 4 individuals × 7 emotions, a context for each emotion, with backward",
    sources=PROMPTS,
    targets={"cpu": {PADDED: 6.5, TRIMMED: 1.3}, "cuda": {PADDED: 5}},
)
def text_tower_per_emotion(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _padded_and_tree(EMOTIONS, 4, "per-emotion", 8, device, dtype)


@comparison(
    "text_tower_classes",
    "text features of ImageNet's classes (200 on a CPU, 1000 on a GPU) for one image, as CoCoOp, with backward",
    sources=PROMPTS,
    targets={"cpu": {PADDED: 20, TRIMMED: 3.8}, "cuda": {PADDED: 12}},
)
def text_tower_classes(device: torch.device, dtype: torch.dtype) -> Comparison:
    names = list(dict.fromkeys(open_clip.IMAGENET_CLASSNAMES))
    count = rehearsal.size(200 if device.type == "cpu" else len(names))
    return _padded_and_tree(names[:count], 1, "shared", 4, device, dtype)


@comparison(
    "stage1_step",
    "a step of stage 1 on 16 individuals × 7 frames, images encoded by the plain side",
    sources=CRITERION,
    targets={"cpu": {PUBLISHED: 30, CAREFUL: 4}, "cuda": {PUBLISHED: 15}},
)
def stage1_step(device: torch.device, dtype: torch.dtype) -> Comparison:
    clip = tower(device, dtype)
    frames = random_frames(_people() * len(EMOTIONS), clip.image_size, device, dtype)

    def encode() -> Tensor:
        with torch.no_grad():
            return F.normalize(clip.encode_image(frames, backend="reference").float(), dim=-1)

    return _stage1(clip, encode(), encode, device)


@comparison(
    "stage1_step_features",
    "a step of stage 1 on 16 individuals × 7 frames, both sides given the image features",
    sources=CRITERION,
    targets={"cpu": {PUBLISHED: 20, CAREFUL: 4}, "cuda": {PUBLISHED: 12}},
)
def stage1_step_features(device: torch.device, dtype: torch.dtype) -> Comparison:
    clip = tower(device, dtype)
    features = F.normalize(_normal(_people() * len(EMOTIONS), clip.embed_dim, device=device), dim=-1)
    return _stage1(clip, features, lambda: features, device)


@comparison(
    "stage2_criterion",
    "PCMECL on 16 edited frames with prompts conditioned on the frame, with backward to the frames",
    sources=CRITERION,
    targets={"cpu": {PUBLISHED: 3}, "cuda": {PUBLISHED: 3}},
)
def stage2_criterion(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _stage2(device, dtype, prompts_known=False)


@comparison(
    "stage2_criterion_bank",
    "PCMECL on 16 edited frames, both sides given the prompts' features, with backward to the frames",
    sources=CRITERION,
    targets={"cpu": {PUBLISHED: 1.25}, "cuda": {PUBLISHED: 1.25}},
)
def stage2_criterion_bank(device: torch.device, dtype: torch.dtype) -> Comparison:
    return _stage2(device, dtype, prompts_known=True)


def _padded_and_tree(
    descriptions: list[str], individuals: int, context: str, n_ctx: int, device: torch.device, dtype: torch.dtype
) -> Comparison:
    clip = tower(device, dtype)
    prompts = _prompts(clip, descriptions, context, n_ctx)
    condition = F.normalize(_normal(individuals, clip.embed_dim, device=device), dim=-1)
    weight = _normal(individuals, len(descriptions), clip.embed_dim, device=device)

    def differentiated(encode: Callable[[Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            prompts.zero_grad()
            features = encode(condition)
            (features * weight).sum().backward()
            return [features, *_gradients(prompts)]

        return run

    def side(backend: str) -> Callable[[], list[Tensor]]:
        return differentiated(partial(prompts, backend=backend))

    trimmed = trimmed_prompts(prompts)
    others = {
        TRIMMED: lambda: differentiated(trimmed),
        COMPILED: lambda: differentiated(torch.compile(trimmed)),
        **backend_sides(lambda name: side(name)(), device, "tree_attention"),
    }
    sides, skipped = those_that_run(others)
    return Comparison(
        [Side(PADDED, side("reference")), *sides, Side("prompt tree", side("auto"))],
        operations=count_operations(side("auto")),
        skipped=skipped,
        as_it_runs=True,
    )


def _stage1(clip: Clip, features: Tensor, encode: Callable[[], Tensor], device: torch.device) -> Comparison:
    """A step: forward, backward and AdamW (with a learning rate of 0, so that every step is the same)."""
    prompts = _prompts(clip, EMOTIONS, "shared", 8)
    step = partial(_stage1_step, prompts, torch.optim.AdamW(prompts.parameters(), lr=0.0))
    careful = partial(step, features, "reference", encode_prompts=trimmed_prompts(prompts))
    candidates: Candidates = {CAREFUL: lambda: careful}
    candidates |= backend_sides(lambda name: step(features, name), device, "tree_attention", "correlation_loss")
    if rehearsal.as_on_gpu(device):
        candidates["captured step"] = lambda: _captured(clip, features, device)
    others, skipped = those_that_run(candidates)
    ours = partial(step, features, "auto")
    return Comparison(
        [Side(PUBLISHED, lambda: step(encode(), "reference")), *others, Side("store and trees", ours)],
        operations=count_operations(ours),
        skipped=skipped,
        as_it_runs=True,
    )


def _stage1_step(
    prompts: PersonalizedPrompts,
    optimizer: torch.optim.Optimizer,
    visual: Tensor,
    backend: str,
    encode_prompts: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    visual = visual.view(-1, len(EMOTIONS), visual.shape[-1])
    mask = torch.ones(visual.shape[:2], dtype=torch.bool, device=visual.device)
    text = (encode_prompts or partial(prompts, backend=backend))(visual.mean(1))
    match = matching_loss(visual, text, mask, 20.0)
    loss = match + ops.correlation_loss(visual, text, scale=20.0, mask=mask, backend=backend)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return [loss.detach(), *_gradients(prompts)]


def _captured(clip: Clip, features: Tensor, device: torch.device) -> Run:
    """The step as the trainer captures and replays it, past its capture; without a GPU, the step itself."""
    prompts, mode = _prompts(clip, EMOTIONS, "shared", 8), "off" if rehearsal.is_on() else "on"
    optimizer = adamw(prompts.parameters(), 0.0, mode, device)
    step = make_step(lambda x: tuple(_stage1_step(prompts, optimizer, x, "auto")), optimizer, mode, device)
    for _ in range(WARM_UP + 1):
        step(features)
    return partial(step, features)


def _stage2(device: torch.device, dtype: torch.dtype, *, prompts_known: bool) -> Comparison:
    clip = tower(device, dtype)
    prompts = _prompts(clip, EMOTIONS, "shared", 8)
    people = _people()
    source = random_frames(people, 256, device, dtype)
    edited = (source + 0.1 * _normal(*source.shape, device=device, seed=1).to(dtype)).clamp(-1, 1).requires_grad_()
    individual = torch.arange(people, device=device)
    shown = individual % len(EMOTIONS)
    asked = (shown + 1 + individual % (len(EMOTIONS) - 1)) % len(EMOTIONS)
    with torch.no_grad():
        known = F.normalize(clip.encode_image(source, backend="reference").float(), dim=-1)
    names = [str(i) for i in range(people)]
    bank = PromptBank.build(prompts, known, names, EMOTIONS, clip=clip, condition="frame", backend="reference")
    on_disk = _on_disk(bank, clip)
    criterion = PCMECLCriterion(clip, on_disk if device.type == "cpu" else bank)

    def plain() -> list[Tensor]:
        with torch.no_grad():
            features = F.normalize(clip.encode_image(source, backend="reference").float(), dim=-1)
            rows = bank.features if prompts_known else prompts(features, backend="reference")
        changed = clip.encode_image(edited, backend="reference").float()
        loss = ops.direction_loss(
            features, changed, rows, individual, shown, asked, min_change=MIN_CHANGE, backend="reference"
        )
        return [loss, backward_to(edited, loss)]

    def careful() -> list[Tensor]:
        changed = clip.encode_image(edited, backend="reference").float()
        loss = ops.direction_loss(
            known, changed, bank.features, individual, shown, asked, min_change=MIN_CHANGE, backend="reference"
        )
        return [loss, backward_to(edited, loss)]

    def ours(backend: str) -> list[Tensor]:
        with ops.use_backend(backend):
            loss = criterion(source, edited, individual, shown, asked, source_features=known)
        return [loss, backward_to(edited, loss)]

    candidates: Candidates = {CAREFUL: lambda: careful}
    others, skipped = those_that_run(candidates | backend_sides(ours, device, "direction_loss", "clip_frames"))
    return Comparison(
        [Side(PUBLISHED, plain), *others, Side("store and bank", partial(ours, "auto"))],
        operations=count_operations(partial(ours, "auto")),
        skipped=skipped,
        as_it_runs=True,
    )


def _people() -> int:
    """Individuals in a step of stage 1, and edited frames in one of stage 2."""
    return rehearsal.size(16)


@cache
def tower(device: torch.device, dtype: torch.dtype, name: str = TOWER) -> Clip:
    """A CLIP with random weights."""
    name, logger = "tiny-face" if rehearsal.is_on() else name, logging.getLogger("pcmecl_fast")
    level = logger.level
    logger.setLevel(logging.ERROR)  # random weights are intended here
    try:
        return load_clip(name, device=device, dtype=dtype)
    finally:
        logger.setLevel(level)


def _prompts(clip: Clip, descriptions: list[str], context: str, n_ctx: int) -> PersonalizedPrompts:
    torch.manual_seed(0)
    prompts = PersonalizedPrompts(clip, descriptions, n_ctx=n_ctx, context=context).to(clip.device)
    assert prompts.condition_net is not None
    with torch.no_grad():
        next(prompts.condition_net[2].parameters()).normal_(std=0.02)  # initially zero, which would make gradients zero
    return prompts


def _on_disk(bank: PromptBank, clip: Clip) -> PromptBank:
    path = Path(tempfile.mkdtemp()) / "bank.safetensors"
    bank.save(path)
    return PromptBank.load(path, clip, on_disk=True)


def backward_to(leaf: Tensor, loss: Tensor) -> Tensor:
    """The gradient of a leaf."""
    leaf.grad = None
    loss.backward()
    assert leaf.grad is not None
    return leaf.grad


def _gradients(module: torch.nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def random_frames(count: int, side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(count, 3, side, side) in [-1, 1]."""
    return (2 * torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) - 1).to(device, dtype)


def _normal(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
