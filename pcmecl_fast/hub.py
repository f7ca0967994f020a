"""What has to be fetched from the Hugging Face Hub: found, or explained at once where there is no network.

Its own library tries each of many files six times, with pauses: a minute on a closed network, for a page of advice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE = 5.0  # seconds that the hub has to answer at all


class HubError(RuntimeError):
    """Something is not on this machine, and the hub cannot be reached."""


def from_hub(load: Callable[[], T], *, subject: str, what: str, bring: str) -> T:
    """Run `load`, which may fetch files from the hub; where it cannot be reached, with the files on this machine alone.

    Args:
        load: builds or reads something with open_clip, transformers or huggingface_hub.
        subject: what the error begins with, such as an argument and the name of a model.
        what: what is to be fetched.
        bring: a Python expression that fetches it where there is a network.

    Raises:
        HubError: the hub cannot be reached and something is not on this machine; says how to bring it.
            Whatever else goes wrong in `load` is raised as it is.
    """
    from huggingface_hub import constants

    why = _unreachable()
    try:
        with nullcontext() if why is None else _offline():
            return load()
    except Exception as error:
        if why is None or not _is_missing(error):
            raise
        raise HubError(
            f"{subject} needs {what}, which this machine does not have, and {constants.ENDPOINT} cannot be reached "
            f'({why}). Run  python -c "from pcmecl_fast import load_clip; {bring}"  on a machine that can, and '
            f"copy what it has in ~/.cache/huggingface/hub to {constants.HF_HUB_CACHE} here"
        ) from error


def _is_missing(error: BaseException | None) -> bool:
    """Whether a file that is neither here nor to be had is the reason, at the end of however many others."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def _unreachable() -> str | None:
    """Why the hub cannot be reached, as its own library would try to, through the same proxies; None where it can."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answers: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)
            answers.append(None)
        except Exception as error:
            answers.append(first_line(error))

    # Resolving a name has no time limit of its own.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE + 1)
    return answers[0] if answers else f"no answer within {PATIENCE:.0f} s"


@contextmanager
def _offline() -> Iterator[None]:
    """As if HF_HUB_OFFLINE were set."""
    from huggingface_hub import constants, utils

    # Before huggingface_hub 1 a session remembers whether it was opened offline; transformers 4 keeps a copy.
    forget_sessions = getattr(utils, "reset_sessions", lambda: None)
    places: list[tuple[Any, str]] = [(constants, "HF_HUB_OFFLINE")]
    transformers_hub = sys.modules.get("transformers.utils.hub")
    if hasattr(transformers_hub, "_is_offline_mode"):
        places.append((transformers_hub, "_is_offline_mode"))
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, True)
    forget_sessions()
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)
        forget_sessions()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
