"""What has to be fetched from the Hugging Face Hub: found, or explained at once where there is no network.

Its own library tries each of many files six times, with pauses: a minute on a closed network, for a page of advice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import Thread
from typing import Any, TypeVar

from pcmecl_fast.wording import one_line

T = TypeVar("T")

PATIENCE = 5.0  # seconds that the hub has to answer at all


class HubError(RuntimeError):
    """Something is not on this machine, and the hub cannot be reached."""


def from_hub(load: Callable[[], T], *, subject: str, what: str, bring: str, repository: str | None = None) -> T:
    """Run `load`, which may fetch files from the hub; where it cannot be reached, with the files on this machine alone.

    Args:
        load: builds or reads something with open_clip, transformers or huggingface_hub.
        subject: what the error begins with, such as an argument and the name of a model.
        what: what is to be fetched.
        bring: a Python expression that fetches it where there is a network.
        repository: the one that it is in; a gateway may let the hub's front page through and nothing behind it.

    Raises:
        HubError: the hub cannot be reached, or hands nothing out, and something is not on this machine; says how to
            bring it.
            Whatever else goes wrong in `load` is raised as it is.
    """
    from huggingface_hub import constants

    why = _unreachable(repository)
    try:
        with nullcontext() if why is None else _offline():
            return load()
    except Exception as error:
        missing = _missing(error)
        if missing is None:
            raise
        why = why or one_line(missing.__cause__ or missing)
        raise HubError(
            f"{subject} needs {what}, which this machine does not have, and {constants.ENDPOINT} cannot be reached "
            f'({why}). Run  python -c "from pcmecl_fast import load_clip; {bring}"  on a machine that can, and '
            f"copy what it has in ~/.cache/huggingface/hub to {constants.HF_HUB_CACHE} here"
        ) from error


def _missing(error: BaseException | None) -> BaseException | None:
    """The reason at the end of however many others, if it is a file that is neither here nor to be had."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
            return error
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None


def _unreachable(repository: str | None) -> str | None:
    """Why the hub cannot be reached, as its own library would try to, through the same proxies; None where it can."""
    address = f"{{}}/{repository}/resolve/main/config.json" if repository else "{}"
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answers: list[str | None] = []

    def ask() -> None:
        try:
            answer = get_session().head(address.format(constants.ENDPOINT), timeout=PATIENCE)
            # What the hub says of files that are not there, or not for everybody, is for its own library to explain.
            refused = answer.status_code >= 500 or answer.status_code in (403, 407, 408, 429)
            answers.append(f"it answers {answer.status_code}" if refused else None)
        except Exception as error:
            answers.append(one_line(error))

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
