"""`python -m pcmecl_fast`, the same as `pcmecl-fast`: for `torchrun … -m pcmecl_fast -- train …`."""

import sys

from pcmecl_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
