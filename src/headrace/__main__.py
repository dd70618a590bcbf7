"""The program `headrace`, also as `python -m headrace`. Knows nothing but where the command line is."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

__all__ = ["main"]


def main() -> None:
    """Run the program and exit with its status; Ctrl-C while it is still being read is no traceback either."""
    try:
        from headrace.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        run()
    except SystemExit as left:
        if sys.argv[1:2] != ["chat"] or not isinstance(left.code, int):
            raise
        # All is closed and written: whoever waits for an answer need not wait until Python has taken itself apart.
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(left.code)


if __name__ == "__main__":
    main()
