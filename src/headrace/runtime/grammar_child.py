"""The program of a child process in which grammars are tried: it may be ended by what it tries, and its parent may not.

Each line of the input is a grammar as llguidance takes it, in JSON; each line of the output is the number of the signal
that ended the trial of it, 0 where none did. A trial is a process of its own again, a copy of this one, so that nothing
has to be loaded anew. It compiles the grammar for a vocabulary of single bytes and follows it for some of them; whether
the grammar is right is not its question. Run as a file; imports nothing of headrace, so that it starts in a moment.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

SECONDS = 2  # of the processor; schemas of 200,000 characters take 0.15
CLOCK = 50  # seconds after which a trial is ended in any case, on a machine that stands still too
MEMORY = 128 << 20  # bytes of address space; schemas of 200,000 characters take 30 MB
STACK = 2 << 20  # bytes, of 8 MB that a thread has: what fits here fits there with all that is called around it
BYTES = 64  # that are followed; fewer where the grammar ends or is wrong


class _Bytes:
    """A vocabulary: every byte, and an end."""

    bos_token_id = None
    eos_token_id = 256
    tokens = (*(bytes([i]) for i in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, raw: bytes) -> list[int]:
        """The ids of a text."""
        return list(raw)


def main() -> None:
    """Try what comes until nothing comes any more."""
    import llguidance

    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))
    for line in sys.stdin:
        given = json.loads(line)
        sys.stdout.write(f"{_ended_by(llguidance, tokenizer, given['grammar'], given['limits'])}\n")
        sys.stdout.flush()


def _ended_by(llguidance: Any, tokenizer: Any, grammar: str, limits: dict[str, int]) -> int:
    """The number of the signal that ended a trial, or 0."""
    if not hasattr(os, "fork"):  # Windows: what a grammar may end is this process, without limits
        _follow(llguidance, tokenizer, grammar, limits)
        return 0
    child = os.fork()
    if child == 0:
        _bound()
        threading.stack_size(STACK)
        trial = threading.Thread(target=_follow, args=(llguidance, tokenizer, grammar, limits))
        trial.start()
        trial.join()
        os._exit(0)  # a Python exception of the library is told where the grammar is compiled in earnest
    return os.WTERMSIG(status) if os.WIFSIGNALED(status := os.waitpid(child, 0)[1]) else 0


def _bound() -> None:
    """Limits of this process; past them the system or the library ends it."""
    import resource

    if sys.platform == "linux":
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(CLOCK)


def _follow(llguidance: Any, tokenizer: Any, grammar: str, limits: dict[str, int]) -> None:
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**limits))
    chance = random.Random(0)
    for _ in range(BYTES):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [byte for byte in range(256) if mask >> byte & 1]
        if matcher.is_error() or not allowed:
            return
        matcher.consume_token(chance.choice(allowed))


if __name__ == "__main__":
    main()
