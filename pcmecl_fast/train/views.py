"""The random views in which stage 2 shows CLIP a source and its edit, and what is kept of a source's views.

A view is a zoom, a shift, a mirroring and noise, all drawn from one number. With `--views 0` each sample of each step
has a view of its own. Otherwise each frame has so many, which follow from the run's seed, the frame's index and the
view's number alone: what frozen networks see in one is the same in every step, so they look once (`KeptViews`).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pcmecl_fast.distributed import barrier, rank
from pcmecl_fast.files import load_tensors, naming_damage, save_tensors
from pcmecl_fast.models.discriminator import blurred

log = logging.getLogger("pcmecl_fast")

FOLDER = "views"
"""In a run's folder, while stage 2 runs."""

_KIND = "views"
_MOST_BYTES = 2**28


def draw_views(
    index: Tensor,  # (B,) frames
    views: int,
    generator: torch.Generator,
) -> Tensor:  # (B,) int
    """The number of each sample's view: of all frames' views, `views` each; of 0, the sample's own in the batch."""
    if not views:
        return torch.arange(len(index))
    return index * views + torch.randint(views, (len(index),), generator=generator)


def seen_alike(
    source: Tensor,  # (B, 3, H, W)
    edited: Tensor,  # (B, 3, H, W)
    view: Tensor,  # (B,) from `draw_views`
    *,
    jitter: float,
    seed: int,
    kept: bool,
) -> tuple[Tensor, Tensor]:
    """Both frames under the same random mirroring, shift, zoom and noise: CLIP must see the change in every view.

    Each view has draws of its own, so that they do not depend on how the batch is divided. Half of the views are
    mirrored, so that changing half a face is never enough: where they are kept, every other one.
    """
    if not jitter:
        return source, edited
    random = torch.Generator()
    theta, noise = [], torch.empty(source.shape)
    for number, its_noise in zip(view.tolist(), noise.unbind(), strict=True):
        random.manual_seed((seed * 1_000_003 + number) % 2**63)
        zoom, right, down = (jitter * (2 * x - 1) for x in torch.rand(3, generator=random).tolist())
        mirrored = int(torch.randint(2, (), generator=random))
        mirror = 1 - 2 * (number % 2 if kept else mirrored)
        theta.append([[(1 + zoom) * mirror, 0, right], [0, 1 + zoom, down]])
        its_noise.normal_(std=jitter, generator=random)
    noise = noise.to(source)
    grid = F.affine_grid(torch.tensor(theta).reshape(-1, 2, 3).to(source), list(source.shape), align_corners=False)
    seen = [F.grid_sample(x, grid, padding_mode="border", align_corners=False) + noise for x in (source, edited)]
    return seen[0], seen[1]


def gradients_blurred(
    edited: Tensor,  # (B, 3, H, W)
) -> Tensor:  # (B, 3, H, W)
    """The frames to the bit; the gradients that reach them are weighed with their neighbours' (`blurred`).

    What frozen networks ask of an edit alternates from pixel to pixel, since their convolutions skip pixels. An edit
    that follows that pleases them with lines that nobody else sees a face in.
    """
    seen = blurred(edited)
    return edited.detach() + (seen - seen.detach())


def half_mirrored(
    view: Tensor,  # (B,) from `draw_views`
    *frames: Tensor,  # (B, 3, H, W)
) -> tuple[Tensor, ...]:
    """The frames, those whose view has an odd number mirrored: what looks at them cannot be pleased by half a face."""
    odd = (view % 2 == 1).to(frames[0].device)[:, None, None, None]
    return tuple(torch.where(odd, x.flip(-1), x) for x in frames)


class KeptViews:
    """What frozen networks see in sources' views, a row each: computed when a view is drawn for the first time.

    Views are drawn evenly, so that it does not matter which are kept: as many as fit, the first to come. With each
    checkpoint the new rows are written beside it: a row's last bits depend on which views it was computed together
    with, so that a resumed run has to go on with the very rows. Each rank keeps those of its own samples.

    Args:
        folder: where the rows are written.
        most_bytes: of all rows.
    """

    def __init__(self, folder: Path, *, most_bytes: int = _MOST_BYTES) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._at: dict[int, int] = {}
        self._rows: Tensor | None = None
        self._written = 0

    def __len__(self) -> int:
        return len(self._at)

    def __call__(
        self,
        view: Tensor,  # (B,) int
        look: Callable[[Tensor], Tensor],  # positions (b,) in the batch to rows (b, W)
    ) -> Tensor:  # (B, W)
        """The rows of these views; `look` computes those that are not kept, each once."""
        views, new = view.tolist(), dict[int, int]()
        for place, number in enumerate(views):
            if number not in self._at:
                new.setdefault(number, place)
        computed = look(torch.tensor(list(new.values()))) if new else None
        if computed is not None:
            self._keep(list(new), computed)
        kept = [place for place, number in enumerate(views) if number in self._at]
        if self._rows is not None and len(kept) == len(views):
            return self._rows[[self._at[number] for number in views]]
        assert computed is not None
        order = {number: k for k, number in enumerate(new)}
        others = [place for place, number in enumerate(views) if number not in self._at]
        rows = computed.new_empty(len(views), computed.shape[1])
        if self._rows is not None:
            rows[kept] = self._rows[[self._at[views[place]] for place in kept]]
        rows[others] = computed[[order[views[place]] for place in others]]
        return rows

    def _keep(self, views: list[int], rows: Tensor) -> None:
        """As many of these as there is room for."""
        held = len(self._at)
        most = self.most_bytes // (rows.shape[1] * rows.element_size())
        views = views[: max(most - held, 0)]
        if not views:
            return
        wanted = held + len(views)
        if self._rows is None or len(self._rows) < wanted:
            larger = rows.new_empty(min(max(2 * wanted, 1024), most), rows.shape[1])
            if self._rows is not None:
                larger[:held] = self._rows[:held]
            self._rows = larger
        self._rows[held:wanted] = rows[: len(views)]
        self._at.update(zip(views, range(held, wanted), strict=True))

    def save(self, step: int) -> None:
        """Write what is new since the last time, before the checkpoint after so many steps; called on all ranks."""
        if self._rows is not None and len(self._at) > self._written:
            new = slice(self._written, len(self._at))
            views = torch.tensor(list(self._at)[new])
            path = self.folder / f"{rank()}-{step}.safetensors"
            save_tensors(path, _KIND, {"views": views, "rows": self._rows[new]}, {})
            self._written = len(self._at)
        barrier()  # no checkpoint is ahead of anybody's rows

    def load(self, step: int, device: torch.device) -> None:
        """Go on from a checkpoint with so many steps; what was written after it, or before another run, goes."""
        of_rank = {int(path.stem.partition("-")[2]): path for path in self.folder.glob(f"{rank()}-*.safetensors")}
        for written, path in sorted(of_rank.items()):
            if written > step:
                path.unlink(missing_ok=True)
                continue
            try:
                tensors, _ = load_tensors(path, _KIND)
                with naming_damage(path):
                    views, rows = tensors["views"].tolist(), tensors["rows"].to(device)
                    new = [k for k, number in enumerate(views) if number not in self._at]
                    self._keep([views[k] for k in new], rows[new])
            except ValueError as error:
                log.warning("what was seen in sources' views is computed again: %s", error)
                path.unlink(missing_ok=True)
        self._written = len(self._at)

    def remove(self) -> None:
        """Remove what was written: the run has come to its end."""
        shutil.rmtree(self.folder, ignore_errors=True)
