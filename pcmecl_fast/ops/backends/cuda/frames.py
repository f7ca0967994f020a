"""clip_frames on csrc/cuda: allocation, and the colours.

Weights of a resize sum to 1, so ((x + 1) / 2 − mean) / std after it is a gain and a bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pcmecl_fast.ops.backends.cuda.driver import place
from pcmecl_fast.ops.backends.native import DTYPE, Driver


class Frames(Driver):
    def clip_frames(
        self,
        frames: Tensor,  # (B, 3, H, W)
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str,
    ) -> Tensor:  # (B, 3, size, size)
        out = torch.empty((frames.shape[0], 3, size, size), dtype=frames.dtype, device=frames.device)
        bias = [(0.5 - m) / s for m, s in zip(mean, std)]  # noqa: B905 - three each
        self._resize(frames, size, interpolation, False, frames, out, std, bias)
        return out

    def clip_frames_backward(
        self,
        grad: Tensor,  # (B, 3, size, size)
        frames: Tensor,  # (B, 3, H, W)
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        of_frames = torch.empty(frames.shape, dtype=frames.dtype, device=frames.device)
        self._resize(frames, size, interpolation, True, grad, of_frames, std, (0.0, 0.0, 0.0))
        return [of_frames]

    def _resize(
        self,
        frames: Tensor,
        size: int,
        interpolation: str,
        transposed: bool,
        given: Tensor,
        to: Tensor,
        std: Sequence[float],
        bias: Sequence[float],
    ) -> None:
        count, _, height, width = frames.shape
        if not count:
            return
        gain = [0.5 / s for s in std]
        pointers = given.data_ptr(), to.data_ptr()
        self._module.clip_frames(
            *place(frames), DTYPE[frames.dtype], count, height, width, size, interpolation, transposed, *pointers,
            *gain, *bias,
        )  # fmt: skip
