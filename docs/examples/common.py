"""What the examples share: drawn people to try a trainer with, a criterion for them, and what a step costs."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcmecl_fast import PCMECLCriterion, PersonalizedPrompts, PromptBank, load_clip
from pcmecl_fast.synthetic import SyntheticFaces

ACTORS = ["M003", "W029"]
EMOTIONS = ["neutral", "angry", "disgusted", "fear", "happy", "sad", "surprised"]


class DrawnActors:
    """Two drawn people under the names of actors: they show every emotion, and need no data set."""

    def __init__(self, size: int) -> None:
        self.faces = SyntheticFaces(len(ACTORS), emotions=EMOTIONS, clips=1, frames_per_clip=1, size=size)

    def frames(self, actors: list[str], emotions: list[str]) -> Tensor:  # (B, 3, size, size)
        """A frame of each actor with the emotion, RGB in [-1, 1]."""
        return self.faces.frames(self.rows(actors, emotions))

    def rows(self, actors: list[str], emotions: list[str]) -> Tensor:  # (B,)
        who = torch.tensor([ACTORS.index(actor) for actor in actors])
        shown = torch.tensor([EMOTIONS.index(emotion) for emotion in emotions])
        these = (self.faces.individual_index == who[:, None]) & (self.faces.emotion_index == shown[:, None])
        return these.nonzero()[:, 1]


def criterion_for(
    drawn: DrawnActors, run: Path | None, clip_name: str = "tiny-face", **options: Any
) -> PCMECLCriterion:
    """That of a finished run, or one of prompts that have learned nothing yet, for the drawn actors."""
    if run is not None:
        criterion = PCMECLCriterion.load(run, **options)
        for name in ACTORS:
            if name not in criterion.individuals:
                criterion.add_individual(name, drawn.frames([name] * len(EMOTIONS), EMOTIONS))
        return criterion
    clip = load_clip(clip_name)
    prompts = PersonalizedPrompts(clip, EMOTIONS)
    with torch.no_grad():
        seen = [clip.encode_image(drawn.frames([name] * len(EMOTIONS), EMOTIONS)) for name in ACTORS]
    condition = torch.stack([nn.functional.normalize(features, dim=-1).mean(0) for features in seen])
    return PCMECLCriterion(clip, PromptBank.build(prompts, condition, ACTORS, EMOTIONS, clip=clip), **options)


def use_repository(folder: Path | None, name: str) -> bool:
    """Let Python import the modules of a repository; False where the example is to do without."""
    if folder is None:
        print(f"no --repository: a stand-in with {name}'s interface takes its place")
        return False
    if not folder.is_dir():
        raise SystemExit(f"--repository: {folder} is no folder; clone {name} there")
    sys.path.insert(0, str(folder))
    return True


Step = Callable[[bool], tuple[Tensor, Tensor]]
"""A step's forward with PCMECL or without: the model's own losses, and PCMECL's, weighted (0 without)."""


def train(step: Step, parameters: Iterable[nn.Parameter], steps: int = 3) -> None:
    """A few steps of training, with PCMECL and without; prints its loss, its gradient and its share of the time."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4)
    own, pcmecl = step(True)
    gradients = torch.autograd.grad(pcmecl, trained, allow_unused=True)
    reached = [gradient for gradient in gradients if gradient is not None]
    norm = torch.stack([gradient.norm() for gradient in reached]).norm()
    print(f"own losses {own.item():.4f}, PCMECL (weighted) {pcmecl.item():.4f}")
    print(f"PCMECL's gradient in the generator: {norm.item():.3g}, in {len(reached)} of {len(trained)} tensors")
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(steps):
        for with_pcmecl in (True, False):
            start = time.perf_counter()
            optimizer.zero_grad()
            own, pcmecl = step(with_pcmecl)
            (own + pcmecl).backward()
            optimizer.step()
            seconds[with_pcmecl].append(time.perf_counter() - start)
    whole, without = (statistics.median(seconds[which]) for which in (True, False))
    print(f"a step takes {whole:.2f} s, {max(0.0, 1 - without / whole):.0%} of it for PCMECL")
