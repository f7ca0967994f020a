"""PCMECL as one loss that plugs into any model that edits the expression of a talking face."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pcmecl_fast import ops
from pcmecl_fast.clip import Clip
from pcmecl_fast.prompts.bank import PromptBank


class PCMECLCriterion(nn.Module):
    """direction_loss on frames: CLIP's view of the edit must change as the individual's prompts change.

        loss = direction_loss(CLIP(source), CLIP(edited), bank, individual, a, b)        (ops.direction_loss)

    The bank is a buffer (one on disk stays there: a call reads its rows), the clip is frozen; nothing is trained here.
    Gradients reach the edited frames only: source features are computed without a graph.

    Args:
        clip: the model that the bank was made with.
        bank: text features of every individual and emotion.
        contrast: weight of the contrast with the other target emotions, at least 0.
        scale: logit scale of that contrast; None takes CLIP's own.
        backend: which implementation runs; None leaves the choice to `use_backend`.

    Raises:
        ValueError: the bank belongs to another text tower.

    Source: the paper's abstract (personalized prompts, feature differencing); the contrast is ours.
    """

    features: Tensor  # (N, E, D); without rows where the bank is on disk

    def __init__(
        self,
        clip: Clip,
        bank: PromptBank,
        *,
        contrast: float = 0.0,
        scale: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if bank.tower is not None and bank.tower.text_hash != clip.text_hash():
            raise ValueError(f"bank: made with {bank.tower.name!r} ({bank.tower.pretrained}), not with this clip")
        self.clip = clip
        self.contrast = contrast
        self.scale = clip.logit_scale if scale is None else scale
        self.backend = backend
        self._on_disk = bank if bank.on_disk else None
        features = bank.features.new_empty(0, *bank.features.shape[1:]).float() if bank.on_disk else bank.features
        self.register_buffer("features", features.detach().to(clip.device), persistent=False)

    def forward(
        self,
        source_frames: Tensor,  # (B, 3, H, W) or (B, T, 3, H, W) in [-1, 1], any H and W
        edited_frames: Tensor,  # the same shape
        individual: Tensor,  # (B,) int, rows of the bank
        source_emotion: Tensor,  # (B,) int
        target_emotion: Tensor,  # (B,) int
        *,
        source_features: Tensor | None = None,  # (B, D) or (B, T, D): CLIP(source_frames) where it is known
    ) -> Tensor:  # ()
        """The mean loss over samples (and frames of a clip) whose target differs from their source emotion.

        Raises:
            ValueError: frames of another rank or of different shapes, features that do not belong to them.
        """
        if edited_frames.ndim not in (4, 5) or edited_frames.shape[-3] != 3:
            raise ValueError(f"edited_frames: takes (B, 3, H, W) or (B, T, 3, H, W), got {tuple(edited_frames.shape)}")
        if source_frames.shape[:-2] != edited_frames.shape[:-2]:
            raise ValueError(
                f"source_frames: takes as many frames as edited_frames {tuple(edited_frames.shape)}, "
                f"got {tuple(source_frames.shape)}"
            )
        if source_features is not None:
            takes = (*edited_frames.shape[:-3], self.features.shape[-1])
            if source_features.shape != takes:
                raise ValueError(f"source_features: takes {takes}, got {tuple(source_features.shape)}")
            source_features = source_features.detach()
        if edited_frames.ndim == 5:
            clips, length = edited_frames.shape[:2]
            source_frames, edited_frames = source_frames.flatten(0, 1), edited_frames.flatten(0, 1)
            individual, source_emotion, target_emotion = (
                self._per_frame(name, index, clips, length)
                for name, index in (
                    ("individual", individual),
                    ("source_emotion", source_emotion),
                    ("target_emotion", target_emotion),
                )
            )
            if source_features is not None:
                source_features = source_features.flatten(0, 1)
        if source_features is None:
            with torch.no_grad(), _attention_of_training():
                source_features = self.clip.encode_image(source_frames, backend=self.backend)
        edited_features = self.clip.encode_image(edited_frames, backend=self.backend)
        bank = self.features
        if self._on_disk is not None:
            bank = self._on_disk.lookup(individual, bank.device).to(bank.dtype)
            individual = torch.arange(len(individual), device=bank.device)
        return ops.direction_loss(
            source_features.to(bank.dtype),
            edited_features.to(bank.dtype),
            bank,
            individual,
            source_emotion,
            target_emotion,
            scale=self.scale,
            contrast=self.contrast,
            backend=self.backend,
        )

    @staticmethod
    def _per_frame(name: str, index: Tensor, clips: int, length: int) -> Tensor:
        if index.shape != (clips,):
            raise ValueError(f"{name}: takes one index a clip, ({clips},), got {tuple(index.shape)}")
        return index.repeat_interleave(length)


@contextmanager
def _attention_of_training() -> Iterator[None]:
    """Without PyTorch's fused attention for inference, which rounds otherwise than the one that has a gradient.

    An edit that changes nothing would else change 1e-7 of the features, in a direction made of noise, and have the
    huge gradient that goes with so small a change.
    """
    if torch.compiler.is_compiling():  # which cannot trace the switch
        yield
        return
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
