"""Ctrl-C and other keys while an answer is drawn: neither may disturb the drawing. Knows no answer."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["interruptible", "unechoed", "uninterrupted"]


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the block. While the block is ending for it, another press is not heard: it would end what tidies up.

    Raises:
        KeyboardInterrupt: in the block, when Ctrl-C came.
    """

    def end(number: int, frame: FrameType | None) -> None:
        handled = sys.exc_info()[1]
        while handled is not None:  # in a generator that is closed for it, the end of the generator came of it
            if isinstance(handled, KeyboardInterrupt):
                return
            handled = handled.__context__
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, end)
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, and comes behind it: a screen that is half drawn stays wrong."""
    came = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def unechoed() -> Iterator[None]:
    """Keys that are pressed meanwhile are not shown in the midst of what is drawn; the next prompt gets them."""
    if os.name == "nt" or not sys.stdin.isatty():
        yield
        return
    import termios

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(terminal, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
