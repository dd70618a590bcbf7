"""The program `headrace`, also as `python -m headrace`. Knows nothing but where the command line is."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the program and exit with its status; Ctrl-C while it is still being read is no traceback either."""
    try:
        from headrace.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
