"""PCMECL's gradient near the identity, by the size of edits: `python -m bench.near_identity`.

Frames of drawn people are edited by noise of growing size, the clip is tiny-face. For each size: how far unit features
move, the norm of the gradient in the edited frames with and without `min_change`, and the cosine between the gradient
of a tower in bfloat16 and that of one in float32: how much of it is more than rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.nn.functional import normalize as unit

from pcmecl_fast import PCMECLCriterion, PromptBank, load_clip
from pcmecl_fast.clip import Clip
from pcmecl_fast.criterion import MIN_CHANGE
from pcmecl_fast.synthetic import SyntheticFaces

SIZES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)


def main() -> None:
    faces = SyntheticFaces(4, emotions=["neutral", "happy", "sad"], clips=1, frames_per_clip=2, size=64)
    frames = faces.frames(torch.arange(len(faces)))
    noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    shown = faces.emotion_index
    labels = faces.individual_index, shown, (shown + 1) % 3
    clips = {dtype: load_clip(dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    bank = text_directions(clips[torch.float32], faces)
    criteria = {
        (dtype, least): PCMECLCriterion(clip, bank, min_change=least, tolerance=9.0)
        for dtype, clip in clips.items()
        for least in (0.0, MIN_CHANGE)
    }
    print("                  gradient            cosine of bfloat16's")
    print(f"   edit   change  0         {MIN_CHANGE:<9g} 0      {MIN_CHANGE:g}")
    for size in SIZES:
        edited = frames + size * noise
        units = [unit(clips[torch.float32].encode_image(x), dim=1) for x in (frames, edited)]
        change = (units[1] - units[0]).norm(dim=1).mean()
        exact, half = (
            [gradient(criteria[dtype, least], frames, edited, labels).flatten() for least in (0.0, MIN_CHANGE)]
            for dtype in clips
        )
        norms = [f"{x.norm():<9.3g}" for x in exact]
        alike = [f"{cosine_similarity(x, y, dim=0):<6.3f}" for x, y in zip(exact, half, strict=True)]
        print(f"{size:7g}  {change:7.2g}  {' '.join(norms)} {' '.join(alike)}")


def gradient(criterion: PCMECLCriterion, frames: Tensor, edited: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
    edited = edited.clone().requires_grad_()
    criterion(frames, edited, *labels).backward()
    assert edited.grad is not None
    return edited.grad


def text_directions(clip: Clip, faces: SyntheticFaces) -> PromptBank:
    """A bank of the plain descriptions' text features, the same for everyone."""
    with torch.no_grad():
        texts = unit(clip.model.encode_text(clip.tokenizer([f"a {name} face" for name in faces.emotions])), dim=-1)
    people = len(faces.individuals)
    return PromptBank(texts.expand(people, -1, -1).contiguous(), faces.individuals, faces.emotions)


if __name__ == "__main__":
    main()
