"""Whether a grammar can be compiled without harm: tried first where it can end nothing but a trial.

llguidance answers some grammars with all the memory, all the time, or the end of its process: schemas that refer to
each other a thousand times, twenty patterns that all must fit. No handler in Python sees that. So every new grammar
is compiled and begun in a child process (`grammar_child.py`) before it is compiled here. Knows no vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress

from headrace.errors import UserError, reason
from headrace.runtime import grammar_child

__all__ = ["try_grammar"]

PATIENCE = grammar_child.CLOCK + 10.0  # seconds for an answer of the child, which may have little of the processor
REMEMBERED = 256  # grammars that were tried, the newest

_WHY = {
    "SIGXCPU": f"takes more than {grammar_child.SECONDS} s to compile",
    "SIGALRM": f"takes more than {grammar_child.CLOCK} s to compile",
    "SIGABRT": f"takes more than {grammar_child.MEMORY >> 20} MB to compile",  # what Rust does without memory
    "SIGSEGV": "nests too deep",
    "SIGBUS": "nests too deep",
}
_AGAIN = {"", *_WHY} - {"SIGALRM"}  # what ends the next trial of a grammar too; others end by the machine's state


class _Trials:
    """The child, started when it is first needed and again when it has ended; used by one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started the child: a fork of it has no part in their talk
        self._ending: Callable[[], object] = int  # closes the child; none yet
        self._ended: OrderedDict[bytes, str] = OrderedDict()  # by what, as `_tried` tells it

    def why_not(self, grammar: str, limits: Mapping[str, int]) -> str | None:
        """What the grammar would do to its process; None where it does it no harm.

        Raises:
            UserError: the child cannot be started.
        """
        asked = json.dumps({"grammar": grammar, "limits": dict(limits)}).encode()
        key = hashlib.sha256(asked).digest()
        with self._lock:
            ended = self._ended.pop(key, None)
            if ended is None:
                ended = self._tried(asked)
            if ended in _AGAIN:
                self._ended[key] = ended
                if len(self._ended) > REMEMBERED:
                    self._ended.popitem(last=False)
        return _WHY.get(ended, f"ends its process ({ended})") if ended else None

    def _tried(self, asked: bytes) -> str:
        """The name of the signal that ended a trial; empty where none did."""
        child = self._child
        if child is None or child.poll() is not None or self._owner != os.getpid():
            child = self._started()
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(asked + b"\n")
            child.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(child.stdout, selectors.EVENT_READ)
                if not selector.select(PATIENCE):
                    child.kill()
                    return "SIGALRM"
            line = child.stdout.readline()
        except BrokenPipeError:
            line = b""
        if line:
            return signal.Signals(int(line)).name if int(line) else ""
        if (code := child.wait()) >= 0:
            raise UserError(
                f"a grammar is tried in a child process first, which ended by itself with status {code}; expected "
                f"{sys.executable} to run {grammar_child.__file__}"
            )
        return signal.Signals(-code).name  # without fork the child itself is what a grammar ends

    def _started(self) -> subprocess.Popen[bytes]:
        self._ending()
        # An arena of glibc's takes 64 MB of the addresses that a trial has.
        environment = {**os.environ, "RUST_BACKTRACE": "0", "MALLOC_ARENA_MAX": "1"}
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", grammar_child.__file__],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is not for it; it ends when its input does
            )
        except OSError as error:
            raise UserError(
                f"a grammar is tried in a child process first, and {sys.executable} cannot be started ({reason(error)})"
            ) from None
        self._child, self._owner = child, os.getpid()
        self._ending = weakref.finalize(self, _end, child, self._owner)
        return child


def _end(child: subprocess.Popen[bytes], owner: int) -> None:
    """The child ends with its input."""
    if owner != os.getpid():
        return
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # what it did not read any more
                pipe.close()
    child.wait()


_TRIALS = _Trials()


def try_grammar(grammar: str, limits: Mapping[str, int]) -> None:
    """Compile a grammar in a child and follow it a little; remembered, so that the same one is not tried again.

    Args:
        grammar: as llguidance's `grammar_from_…` gives it.
        limits: of LLParserLimits.

    Raises:
        UserError: it ended the child.
    """
    why = _TRIALS.why_not(grammar, limits)
    if why is not None:
        raise UserError(f"the grammar {why}; make it simpler")
