"""Adam as the trainers use it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def fused_adam(*groups: Iterable[nn.Parameter], **options: Any) -> torch.optim.Adam:
    """`torch.optim.Adam` in one pass over memory where all parameters are real, which is what it takes.

    On a CPU the pass goes through memory without a look at strides. States that are loaded are therefore laid out as
    their parameters are: a checkpoint made on another device has its own layout.

    Args:
        groups: the parameters of each group, which has a rate of its own.
        options: Adam's.
    """
    listed = [{"params": list(parameters)} for parameters in groups]
    real = all(x.is_floating_point() for group in listed for x in group["params"])
    adam = torch.optim.Adam(listed, fused=real, **options)
    adam.register_load_state_dict_post_hook(_lay_out)
    return adam


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    for parameter, state in optimizer.state.items():
        for name, x in state.items():
            if isinstance(x, Tensor) and x.shape == parameter.shape and x.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=x.dtype).copy_(x)
