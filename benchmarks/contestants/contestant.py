"""A contestant of side_by_side.py: a process that holds one model and answers one question a line, in JSON.

    {"do": "prompt", "tokens": 128}              → {"seconds": …}     an empty sequence to the logits of its last token
    {"do": "decode", "depth": 128, "tokens": 32} → {"seconds": …}     a token, after that many are held
    {"do": "batch", "depth": 128, "tokens": 32, "slots": 8}           a token of every one of several sequences
    {"do": "about"}                              → what it is, peak memory
    {"do": "end"}

Nothing here knows headrace: peers live in Python environments of their own.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Contestant", "ids_of", "serve"]

KB = 1024  # Linux counts the largest resident set in KB


class Contestant(Protocol):
    """One model ready to run; ids are of its vocabulary, whichever."""

    about: dict[str, Any]

    def prompt(self, tokens: int) -> None:
        """Forget everything, then read so many tokens; the logits of the last are there when it returns."""

    def rewind(self, tokens: int) -> None:
        """Hold only so many tokens of what was read, reading them anew where that is the only way."""

    def token(self) -> None:
        """One token more, the likeliest one."""


def ids_of(count: int, vocabulary: int) -> list[int]:
    """The same tokens every time, none of them special."""
    return [300 + (i * 7919) % (vocabulary - 300) for i in range(count)]


def serve(contestant: Contestant) -> None:
    """Answer until told to end."""
    actions: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "prompt": lambda q: _prompt(contestant, q["tokens"]),
        "decode": lambda q: _decode(contestant, q["depth"], q["tokens"]),
        "batch": lambda q: _batch(contestant, q["depth"], q["tokens"], q["slots"]),
        "about": lambda q: {**contestant.about, "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KB},
    }
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        if question["do"] == "end":
            break
        print(json.dumps(actions[question["do"]](question)), flush=True)


def _prompt(contestant: Contestant, tokens: int) -> dict[str, Any]:
    started = time.perf_counter()
    contestant.prompt(tokens)
    return {"seconds": time.perf_counter() - started}


def _decode(contestant: Contestant, depth: int, tokens: int) -> dict[str, Any]:
    contestant.rewind(depth)
    contestant.token()  # wakes threads and fills caches; not counted
    seconds = []
    for _ in range(tokens):
        started = time.perf_counter()
        contestant.token()
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds)}


def _batch(contestant: Any, depth: int, tokens: int, slots: int) -> dict[str, Any]:
    contestant.fill(depth, slots)
    contestant.tokens(slots)
    seconds = []
    for _ in range(tokens):
        started = time.perf_counter()
        contestant.tokens(slots)
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds)}
