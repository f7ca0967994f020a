"""Which dtype frozen towers run in: one that is named, or the one that a device is fast in."""

from __future__ import annotations

import logging
from functools import cache

import torch

log = logging.getLogger("pcmecl_fast")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"


def tower_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """The dtype of the towers' weights, activations and attention on a device.

    Args:
        name: "float32", "bfloat16", "float16", or "auto": bfloat16 on GPUs with tensor cores for it (compute capability
            8.0 or more) and on CPUs with instructions for it (AVX512-BF16, AMX), float32 elsewhere. The log says once
            which one and why.
        device: where the towers are.

    Raises:
        ValueError: another name.
    """
    if name == AUTO:
        return _fast_dtype(str(device))
    if name not in DTYPES:
        raise ValueError(f"tower_dtype: takes one of {', '.join([*DTYPES, AUTO])}, got {name!r}")
    return DTYPES[name]


@cache
def _fast_dtype(device: str) -> torch.dtype:
    fast, why = _fast_in_bfloat16(torch.device(device))
    dtype = torch.bfloat16 if fast else torch.float32
    log.info("tower_dtype: auto takes %s, since %s", str(dtype).removeprefix("torch."), why)
    return dtype


def _fast_in_bfloat16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        fast, what = major >= 8, f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
        return fast, f"{what} {'has' if fast else 'lacks'} tensor cores for bfloat16"
    if device.type != "cpu":
        return False, f"nothing is known of bfloat16 on {device.type}"
    found = [name for name, has in (("AVX512-BF16", _has_avx512_bf16), ("AMX", _has_amx)) if has()]
    if found:
        return True, f"this CPU has {' and '.join(found)}"
    return False, "this CPU has no instructions for bfloat16 (AVX512-BF16, AMX)"


def _has_avx512_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()


def _has_amx() -> bool:
    """Every CPU with AMX's tiles so far multiplies bfloat16 in them."""
    return torch.cpu._is_amx_tile_supported()
