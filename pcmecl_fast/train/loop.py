"""A training loop that can be killed at any moment: progress, curves, TensorBoard, checkpoints, resume."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pcmecl_fast.distributed import agree, is_main
from pcmecl_fast.files import write_atomically
from pcmecl_fast.options import named_differences

log = logging.getLogger("pcmecl_fast")


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Loop:
    """Iterates over the remaining steps and saves what is needed to continue after being killed.

    Randomness inside a step must come from `generator(step)` alone: then a run that was killed and resumed ends with
    the same weights, bit for bit, as an uninterrupted one (on a CPU). Of several ranks, each reads the checkpoint, so
    their number may have changed; the first alone writes.

    Args:
        folder: where `<name>.ckpt` and the TensorBoard files go.
        name: the stage's name; the curves are called `<name>/<scalar>`.
        states: everything that changes during training.
        steps: the total.
        seed: of every step's generator.
        every: steps between checkpoints.
        resume: continue from the checkpoint if there is one.
        signature: what a checkpoint must agree on to be resumed: options by their names, and anything else that
            changes the result under the words that a message uses for it.

    Attributes:
        done: the number of finished steps.
        before_saving: called on all ranks with `done` before a checkpoint is written, for what is kept beside it.
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
        self.before_saving: Callable[[int], None] = lambda done: None
        self.done = self._load() if resume and self.path.is_file() else 0
        agree({f"the step that {name} goes on from (the checkpoint in --out)": str(self.done)})
        self._events = folder / "tensorboard" / name.replace(" ", "-")
        self.writer: SummaryWriter | None = None
        if is_main():
            with self._logging():
                self.writer = SummaryWriter(str(self._events), purge_step=self.done)
        self.bar = tqdm(total=steps, initial=self.done, desc=name, unit="step")

    def __iter__(self) -> Iterator[int]:
        for step in range(self.done, self.steps):
            yield step
            self.done = step + 1
            self.bar.update()
            if self.done % self.every == 0 or self.done == self.steps:
                self.before_saving(self.done)
                if is_main():
                    self._save()
        self.bar.close()
        if self.writer is not None:
            with self._logging():
                self.writer.close()

    def generator(self, step: int) -> torch.Generator:
        """The randomness of one step, the same whether or not the run was resumed before it."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)

    def record(self, step: int, **scalars: Tensor | float) -> None:
        """Append to the curves; shown by the progress bar and TensorBoard."""
        values = {k: v.item() if isinstance(v, Tensor) else float(v) for k, v in scalars.items()}
        for key, value in values.items():
            self.curves.setdefault(f"{self.name}/{key}", []).append((step, value))
            if self.writer is not None:
                with self._logging():
                    self.writer.add_scalar(key, value, step)
        self.bar.set_postfix({k: f"{v:.3f}" for k, v in values.items()})
        bad = [k for k, v in values.items() if v != v]
        if bad:
            raise FloatingPointError(
                f"{self.name}: {', '.join(bad)} became NaN at step {step}; lower the learning rate"
            )

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """Show a picture, (3, H, W) in [0, 1], in TensorBoard."""
        if self.writer is not None:
            with self._logging():
                self.writer.add_image(name, image, step)

    @contextmanager
    def _logging(self) -> Iterator[None]:
        """A full disk is told by TensorBoard's thread, without the file's name."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self._events)
            raise

    def _save(self) -> None:
        buffer = io.BytesIO()
        states = {k: v.state_dict() for k, v in self.states.items()}
        torch.save({"step": self.done, "states": states, "curves": self.curves, "signature": self.signature}, buffer)
        write_atomically(self.path, buffer.getvalue())

    def _load(self) -> int:
        saved = read_checkpoint(self.path)
        if differing := named_differences(saved["signature"], self.signature):
            raise ValueError(f"--resume: {self.path} belongs to another configuration: {differing}")
        for key, state in self.states.items():
            state.load_state_dict(saved["states"][key])
        self.curves = {k: [(int(s), float(v)) for s, v in points] for k, points in saved["curves"].items()}
        log.info("%s resumes at step %d of %d", self.name, saved["step"], self.steps)
        return int(saved["step"])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `Loop` saved.

    Raises:
        ValueError: the file is broken, or something else.
    """
    try:
        # torch.load does not check the checksums: it would resume from weights with a flipped bit.
        with zipfile.ZipFile(path) as records:
            if records.testzip():
                raise zipfile.BadZipFile("a wrong checksum")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"step", "states", "curves", "signature"} - set(saved)
    # torch.load raises whatever damaged bytes make it trip over, with pages of advice.
    except Exception as error:
        raise ValueError(
            f"--resume: {path} is not a whole checkpoint ({type(error).__name__}); --overwrite starts again"
        ) from error
    if missing:
        raise ValueError(f"--resume: {path} is not a checkpoint of a training run; --overwrite starts again")
    return saved
