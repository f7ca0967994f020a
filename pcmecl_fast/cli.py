"""The entry point `pcmecl-fast`: the commands, or a one-line message if their libraries are not installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pcmecl_fast.libraries import missing_library
from pcmecl_fast.machine import begin_clock, share_cores


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    begin_clock()
    share_cores()
    if os.environ.get("RANK", "0") != "0":  # one of torchrun's ranks draws progress bars
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        from pcmecl_fast.commands import run_command
    except ModuleNotFoundError as error:
        message = missing_library(error)
        if message is None:
            raise
        print(f"pcmecl-fast: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pcmecl-fast: stopped", file=sys.stderr)
        return 130
    return run_command(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
