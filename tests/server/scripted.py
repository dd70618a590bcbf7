"""A served model whose answers are written down, and a real server around it on 127.0.0.1."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from headrace.errors import ContextFull
from headrace.server.app import create_app
from headrace.server.connections import Patience
from headrace.server.door import ServerOptions
from headrace.server.generation import GenerationRequest, Logprob, Piece, Refused, Usage
from headrace.server.metrics import Metrics
from headrace.server.serve import http_config

__all__ = ["ASK", "CALL", "CONTEXT", "TOOL", "WEATHER", "ScriptedModel", "running"]

CONTEXT = 100
ASK: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital of France?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "", "parameters": WEATHER}}


@dataclass
class ScriptedModel:
    """Answers every request with the same words, a piece each.

    Attributes:
        words: the answer.
        finish: how it ends.
        stop: the stop string that it ends at.
        seen: the requests.
        full: refuse as when the queue is full.
        delay: seconds between two pieces.
        closed: how many requests ended or were left.
        said: pieces that were handed out.
        breaks: fail behind the first piece, in a way that nobody foresaw.
    """

    words: list[str] = field(default_factory=lambda: ["Par", "is", "."])
    finish: str = "stop"
    stop: str | None = None
    name: str = "tiny"
    created: int = 1_700_000_000
    seen: list[GenerationRequest] = field(default_factory=list)
    full: bool = False
    delay: float = 0.0
    closed: int = 0
    said: int = 0
    breaks: bool = False

    async def submit(self, request: GenerationRequest) -> ScriptedGeneration:
        """Note the request and answer it."""
        self.seen.append(request)
        if self.full:
            raise Refused("too many requests wait", status=429, retry_after=2)
        if len(str(request.prompt)) > 10_000:
            raise ContextFull(10_000, CONTEXT)
        return ScriptedGeneration(self, request)

    def properties(self) -> Mapping[str, Any]:
        """A model's, made up."""
        return {
            "context_length": CONTEXT, "weight_bytes": 1000, "digest": "d" * 64, "parameters": "0.00B",
            "recipe": "w4a16", "chat_template": "{{ messages }}", "tools": True,
        }  # fmt: skip

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """A byte is a token."""
        return [1] * special + list(text.encode())

    def detokenize(self, ids: list[int]) -> str:
        """The inverse."""
        return bytes(ids).decode()

    def render(self, request: GenerationRequest) -> tuple[str, list[int]]:
        """All contents joined."""
        text = "".join(str(m["content"]) for m in request.prompt if isinstance(m, Mapping))
        return text, self.tokenize(text, special=False)

    async def save_session(self, request: GenerationRequest, path: Path) -> int:
        """The messages alone."""
        path.write_text(json.dumps(list(request.prompt)), encoding="utf-8")
        return len(request.prompt)

    async def restore_session(self, path: Path) -> tuple[list[dict[str, Any]], int]:
        """What was saved."""
        messages = json.loads(path.read_text(encoding="utf-8"))
        return messages, len(messages)


class ScriptedGeneration:
    """One scripted answer."""

    def __init__(self, model: ScriptedModel, request: GenerationRequest) -> None:
        self._model = model
        self._request = request
        self.usage = Usage(7, 3)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        if self._request.echo:
            yield Piece(0, str(self._request.prompt))
        for number, word in enumerate(self._model.words):
            for choice in range(self._request.n):
                await asyncio.sleep(self._model.delay)
                self.usage.completion_tokens += 1
                self._model.said += 1
                last = number == len(self._model.words) - 1
                finish, stop = (self._model.finish, self._model.stop) if last else (None, None)
                told = _told(word, len("".join(self._model.words[:number])))
                yield Piece(choice, word, finish, stop, told if self._request.top_logprobs is not None else ())
            if self._model.breaks:
                raise RuntimeError("a secret of the machine")

    async def aclose(self) -> None:
        """Count it."""
        self._model.closed += 1


def _told(word: str, start: int) -> tuple[Logprob, ...]:
    """A word's tokens: one, or where it is not ASCII each of its bytes."""
    tokens = []
    for raw in [word.encode()] if word.isascii() else [bytes([byte]) for byte in word.encode()]:
        text = raw.decode(errors="backslashreplace")
        tokens.append(Logprob(text, raw, -0.5, start, (Logprob(text, raw, -0.5), Logprob("x", b"x", -1.5))))
    return tuple(tokens)


@contextmanager
def running(
    *models: Any,
    options: ServerOptions | None = None,
    metrics: Metrics | None = None,
    patience: Patience | None = None,
) -> Iterator[str]:
    """A server on a free port of 127.0.0.1, in a thread; its address. It stops with the block."""
    app = create_app({model.name: model for model in models}, options or ServerOptions(), metrics or Metrics())
    config = http_config(app, patience=patience, host="127.0.0.1", port=0, log_config=None, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
