"""Where results come from: the command, the day, and the versions of what made them."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from datetime import datetime

import torch

from pcmecl_fast.libraries import installed_version


@dataclass(frozen=True)
class Origin:
    """What a report says about how it was made."""

    date: str
    command: str = ""  # as typed; empty where Python code called the run
    seconds: float | None = None  # that it took
    versions: dict[str, str] = field(default_factory=dict)


def origin(
    command: str = "", *, seconds: float | None = None, device: str = "cpu", now: datetime | None = None
) -> Origin:
    """The origin of what is made here and now, by this command, on this device."""
    moment = (now or datetime.now().astimezone()).isoformat(" ", "seconds")
    versions = {
        "pcmecl_fast": installed_version("pcmecl_fast"),
        "torch": torch.__version__,
        "open_clip": installed_version("open_clip_torch"),
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": str(torch.get_num_threads()),
    }
    return Origin(moment, command, seconds, versions)
