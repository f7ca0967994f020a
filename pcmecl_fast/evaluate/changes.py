"""What the prompts know of each individual: whether a change of their face finds its text, and what is taken for what.

For emotions a and b of an individual n, with the means v of unit image features of held-out frames and the text
features t of their own prompts, the change from a to b is retrieved when

    argmax over c ≠ a of ⟨unit(v[n, b] − v[n, a]), unit(t[n, c] − t[n, a])⟩ = b
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pcmecl_fast.clip import Clip
from pcmecl_fast.data.base import FrameDataset
from pcmecl_fast.evaluate.metrics import Trials, bank_rows
from pcmecl_fast.evaluate.results import Cell, Row, Table
from pcmecl_fast.prompts import PromptBank

_MOST_ROWS = 40


@dataclass(frozen=True)
class Changes:
    """What `change_view` found.

    Attributes:
        emotions: E names.
        individuals: those with frames.
        right, changes: of each, how many of how many changes were retrieved; 0 of 0 where they show one emotion.
        confusion: (E, E), how many frames of the emotion of each row are named as that of each column.
    """

    emotions: list[str]
    individuals: list[str]
    right: list[int]
    changes: list[int]
    confusion: Tensor


@torch.no_grad()
def change_view(
    clip: Clip, bank: PromptBank, dataset: FrameDataset, trials: Trials, *, batch_size: int = 64
) -> Changes:
    """Retrieval of changes, by individual, and confusion of emotions, on a data set's frames.

    Args:
        clip: the model.
        bank: text features of everyone in the data set.
        dataset: the held-out frames.
        trials: which of them are looked at; targets do not count.
    """
    bank = bank.to(clip.device)
    rows = bank_rows(bank, dataset, trials)
    count, emotions = len(dataset.individuals), len(dataset.emotions)
    image = torch.zeros(count, emotions, clip.embed_dim, device=clip.device)
    text = torch.zeros_like(image)
    seen = torch.zeros(count, emotions, dtype=torch.int64)
    confusion = torch.zeros(emotions, emotions, dtype=torch.int64)
    for chunk in torch.arange(len(trials.index)).split(batch_size):
        index, row = trials.index[chunk], rows[chunk].to(clip.device)
        features = F.normalize(clip.encode_image(dataset.frames(index).to(clip.device)).float(), dim=-1)
        of_rows = bank.features[row].float()  # (B, E, D)
        who, shown = dataset.individual_index[index], dataset.emotion_index[index]
        named = torch.einsum("bd,bed->be", features, of_rows).argmax(1).cpu()
        confusion.index_put_((shown, named), torch.ones_like(shown), accumulate=True)
        image.index_put_((who.to(clip.device), shown.to(clip.device)), features, accumulate=True)
        text.index_add_(0, who.to(clip.device), of_rows)
        seen.index_put_((who, shown), torch.ones_like(shown), accumulate=True)
    image = (image / seen.clamp(min=1)[..., None].to(image)).cpu()
    text = (text / seen.sum(1).clamp(min=1)[:, None, None].to(text)).cpu()
    people = (seen.sum(1) > 0).nonzero()[:, 0].tolist()
    counts = [_retrieved(image[n], text[n], seen[n] > 0) for n in people]
    return Changes(
        list(dataset.emotions),
        [dataset.individuals[n] for n in people],
        [right for right, _ in counts],
        [changes for _, changes in counts],
        confusion,
    )


def changes_table(changes: Changes) -> Table:
    """Of each individual, how often the text of the right change is the closest; those with the fewest first."""
    found = [(right / total, name, right, total) for name, right, total in _rows(changes) if total]
    rows = [
        Row(name, [Cell.of(share, unit="%"), Cell.of(right), Cell.of(total)])
        for share, name, right, total in sorted(found)[:_MOST_ROWS]
    ]
    total = sum(changes.changes)
    if not total:
        return Table([], [], "")
    mean = 100 * sum(changes.right) / total
    chance = 100 / max(len(changes.emotions) - 1, 1)
    left_out = f" Only the {_MOST_ROWS} lowest are shown." if len(found) > _MOST_ROWS else ""
    note = (
        f"Over all changes of held-out frames {mean:.0f} % find their text; guessing finds {chance:.0f} %. Individuals "
        f"who show one emotion have no changes.{left_out}"
    )
    return Table(["right", "changes found", "of"], rows, note)


def _rows(changes: Changes) -> list[tuple[str, int, int]]:
    return list(zip(changes.individuals, changes.right, changes.changes, strict=True))


def _retrieved(
    image: Tensor,  # (E, D)
    text: Tensor,  # (E, D)
    present: Tensor,  # (E,) bool
) -> tuple[int, int]:
    """How many changes between emotions that are present find their text, and how many there are."""
    right = total = 0
    for a in present.nonzero()[:, 0].tolist():
        others = [b for b in present.nonzero()[:, 0].tolist() if b != a]
        if not others:
            continue
        seen = F.normalize(image[others] - image[a], dim=-1)
        said = F.normalize(text - text[a], dim=-1)
        cosines = seen @ said.T  # (B, E)
        cosines[:, a] = -torch.inf
        right += int((cosines.argmax(1) == torch.tensor(others)).sum())
        total += len(others)
    return right, total
