"""clip_frames on csrc/cpu/frames.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pcmecl_fast.ops.backends.native import DTYPE, Driver


class Frames(Driver):
    """Weights sum to 1, so ((x + 1) / 2 − mean) / std after the resize is a gain and a bias."""

    def clip_frames(
        self, frames: Tensor, size: int, mean: Sequence[float], std: Sequence[float], interpolation: str
    ) -> Tensor:
        images, channels, height, width = frames.shape
        out = frames.new_empty((images, channels, size, size))
        self._module.resize_frames(
            torch.get_num_threads(), DTYPE[frames.dtype], frames.data_ptr(), out.data_ptr(),
            images, height, width, size, interpolation, False,
            *[0.5 / s for s in std], *[(0.5 - m) / s for m, s in zip(mean, std)],  # noqa: B905 - three of each
        )  # fmt: skip
        return out

    def clip_frames_backward(
        self,
        grad: Tensor,
        frames: Tensor,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        images, _, height, width = frames.shape
        of_frames = torch.empty_like(frames)
        self._module.resize_frames(
            torch.get_num_threads(), DTYPE[frames.dtype], grad.data_ptr(), of_frames.data_ptr(),
            images, height, width, size, interpolation, True, *[0.5 / s for s in std], 0.0, 0.0, 0.0,
        )  # fmt: skip
        return [of_frames]
