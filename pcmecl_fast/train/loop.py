"""A training loop that can be killed at any moment: progress, curves, TensorBoard, checkpoints, resume."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pcmecl_fast.files import write_atomically

log = logging.getLogger("pcmecl_fast")


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Loop:
    """Iterates over the remaining steps and saves what is needed to continue after being killed.

    Randomness inside a step must come from `generator(step)` alone: then a run that was killed and resumed ends with
    the same weights, bit for bit, as an uninterrupted one (on a CPU).

    Args:
        folder: where `<name>.ckpt` and the TensorBoard files go.
        name: the stage's name; the curves are called `<name>/<scalar>`.
        states: everything that changes during training.
        steps: the total.
        seed: of every step's generator.
        every: steps between checkpoints.
        resume: continue from the checkpoint if there is one.
        signature: settings that a checkpoint must agree on to be resumed.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        states: dict[str, Stateful],
        *,
        steps: int,
        seed: int,
        every: int,
        resume: bool,
        signature: dict[str, Any],
    ) -> None:
        self.path = folder / f"{name.replace(' ', '-')}.ckpt"
        self.name, self.states = name, states
        self.steps, self.seed, self.every = steps, seed, every
        self.signature = {k: str(v) for k, v in signature.items()}
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self.done = self._load() if resume and self.path.is_file() else 0
        self.writer = SummaryWriter(str(folder / "tensorboard" / name.replace(" ", "-")), purge_step=self.done)
        self.bar = tqdm(total=steps, initial=self.done, desc=name, unit="step")

    def __iter__(self) -> Iterator[int]:
        for step in range(self.done, self.steps):
            yield step
            self.done = step + 1
            self.bar.update()
            if self.done % self.every == 0 or self.done == self.steps:
                self._save()
        self.bar.close()
        self.writer.close()

    def generator(self, step: int) -> torch.Generator:
        """The randomness of one step, the same whether or not the run was resumed before it."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)

    def record(self, step: int, **scalars: Tensor | float) -> None:
        """Append to the curves; shown by the progress bar and TensorBoard."""
        values = {k: v.item() if isinstance(v, Tensor) else float(v) for k, v in scalars.items()}
        for key, value in values.items():
            self.curves.setdefault(f"{self.name}/{key}", []).append((step, value))
            self.writer.add_scalar(key, value, step)
        self.bar.set_postfix({k: f"{v:.3f}" for k, v in values.items()})
        bad = [k for k, v in values.items() if v != v]
        if bad:
            raise FloatingPointError(
                f"{self.name}: {', '.join(bad)} became NaN at step {step}; lower the learning rate"
            )

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """Show a picture, (3, H, W) in [0, 1], in TensorBoard."""
        self.writer.add_image(name, image, step)

    def _save(self) -> None:
        buffer = io.BytesIO()
        states = {k: v.state_dict() for k, v in self.states.items()}
        torch.save({"step": self.done, "states": states, "curves": self.curves, "signature": self.signature}, buffer)
        write_atomically(self.path, buffer.getvalue())

    def _load(self) -> int:
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            missing = {"step", "states", "curves", "signature"} - set(saved)
        # On damaged bytes torch.load can raise anything, with pages of advice.
        except Exception as error:
            raise ValueError(
                f"resume: {self.path} is not a whole checkpoint ({type(error).__name__}); start without --resume"
            ) from error
        if missing:
            raise ValueError(f"resume: {self.path} is not a checkpoint of a training run; start without --resume")
        differing = [k for k, v in self.signature.items() if saved["signature"].get(k) != v]
        if differing:
            was = ", ".join(f"{k} was {saved['signature'].get(k)}, is {self.signature[k]}" for k in differing)
            raise ValueError(f"resume: {self.path} belongs to another configuration: {was}")
        for key, state in self.states.items():
            state.load_state_dict(saved["states"][key])
        self.curves = {k: [(int(s), float(v)) for s, v in points] for k, points in saved["curves"].items()}
        log.info("%s resumes at step %d of %d", self.name, saved["step"], self.steps)
        return int(saved["step"])
