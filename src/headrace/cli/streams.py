"""The three standard streams, made so that no text, terminal or closed pipe can break the program. Knows no verb.

A terminal that cannot show a character shows a replacement; input that is not in the terminal's encoding is read with
U+FFFD; a stream that was closed before the program began leads nowhere.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

__all__ = ["flush_output", "prepare_streams"]


def prepare_streams() -> None:
    """Make stdin, stdout and stderr safe to use, whatever the program was started with."""
    for handle, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _null_stream(name, handle))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if name == "stderr" else "replace")


def _null_stream(name: str, handle: int) -> io.TextIOWrapper:
    """An open stream to the null device under the handle of a standard stream that was closed.

    The handle itself has to be taken, or the next file that is opened gets it, and a library that prints to it would
    write into that file.
    """
    null = os.open(os.devnull, os.O_RDWR)
    if null != handle:
        with suppress(OSError):
            os.fstat(handle)  # somebody has it already: it is an open file, and stays one
            handle = null
    if null != handle:
        os.dup2(null, handle)
        os.close(null)
    return os.fdopen(handle, "r" if name == "stdin" else "w", encoding="utf-8")


def flush_output() -> OSError | None:
    """Write out what is left in stdout, so that Python does not do it, and fail, after the last of our code.

    Returns:
        The error, after which stdout leads nowhere; None when all went well.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        null = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError, ValueError):
            os.dup2(null, sys.stdout.fileno())
        os.close(null)
        return error
    except ValueError:  # it is closed
        return None
    return None
