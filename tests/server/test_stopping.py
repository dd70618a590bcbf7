"""A server that is told to stop lets answers end that are under way, whole or streamed."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import httpx
import pytest

WORDS, DELAY = 60, 0.05  # 3 seconds of words: far more than a process needs to hear a signal
SERVER = f"""
    from pathlib import Path
    from headrace.server import serve as server
    from tests.server.scripted import ScriptedModel

    class Slow(ScriptedModel):
        def start(self): pass
        def close(self): pass

    server.load = lambda path, **options: None
    server.ModelWorker = lambda *given: Slow(words=["word "] * {WORDS}, delay={DELAY})
    server.serve([Path("tiny.bundle")], port=0, listening=lambda address: print(address, flush=True))
"""
ASKED = {"messages": [{"role": "user", "content": "Talk"}]}


@contextmanager
def serving() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address."""
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SERVER)], stdout=subprocess.PIPE, text=True)
    try:
        out: IO[str] | None = child.stdout
        assert out is not None
        yield child, out.readline().strip()
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stream_is_not_cut_off(how: signal.Signals) -> None:
    with serving() as (child, address):
        with httpx.stream("POST", f"{address}/v1/chat/completions", json={**ASKED, "stream": True}) as answer:
            lines = answer.iter_lines()
            said = 0
            for line in lines:
                said += "word" in line
                if said == 3:
                    child.send_signal(how)
                    break
            rest = list(lines)
        assert said + sum("word" in line for line in rest) == WORDS
        assert rest[-2:] == ["data: [DONE]", ""]
        assert child.wait(30) != 0, "it has stopped, for the signal"


def test_a_second_signal_stops_at_once() -> None:
    asked = {**ASKED, "stream": True}
    said = 0
    with serving() as (child, address):
        with (
            pytest.raises(httpx.HTTPError),
            httpx.stream("POST", f"{address}/v1/chat/completions", json=asked) as answer,
        ):
            for line in answer.iter_lines():
                said += "word" in line
                if said in (3, 10):
                    child.send_signal(signal.SIGINT)
        assert said < WORDS
        assert child.wait(30) != 0, "it has stopped, for the signal"
