"""Ollama's API, as far as its clients use it to talk with a model: bodies to requests, pieces to lines. Knows no HTTP.

Source: Ollama's API documentation (docs/api.md).
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from headrace.server.fields import MAX_SEED, Body, text_of
from headrace.server.generation import Answer, GenerationRequest, Generator, Refused, Usage
from headrace.server.openai_chat import calls_of, tools_of
from headrace.server.tools import NO_TOOLS, ToolCall, ToolText, ToolUse, split_calls

__all__ = ["OllamaCall", "chat_call", "generate_call", "now"]

IGNORED = ("keep_alive", "think", "context", "template", "truncate", "shift")
# Fields of "options" and the sampling they mean; the others tune Ollama's own engine and change nothing here.
OPTIONS = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "seed": "seed",
    "repeat_penalty": "repetition_penalty", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}  # fmt: skip


@dataclass(frozen=True)
class OllamaCall:
    """A body of POST /api/chat or /api/generate, read; without a prompt it asks only that the model be in memory."""

    model: str
    request: GenerationRequest | None
    stream: bool
    chat: bool
    started: float

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """The last line, with the whole answer."""
        if self.request is None:
            return self._line("", []) | {"done": True, "done_reason": "load"}
        answer = answers[0]
        text, calls = split_calls(answer.text) if self.request.tools else (answer.text, [])
        return self._line(text, calls) | self._end(answer.finish, usage)

    async def lines(self, generator: Generator) -> AsyncIterator[str]:
        """JSON lines, newline included."""
        stream = ToolText(self.request is not None and bool(self.request.tools))
        finish = "stop"
        async for piece in generator:
            text, calls = stream.push(piece.text, last=piece.finish is not None)
            finish = piece.finish or finish
            if text or calls:
                yield _text(self._line(text, calls) | {"done": False})
        yield _text(self._line("", []) | self._end(finish, generator.usage))

    def _line(self, text: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
        line: dict[str, Any] = {"model": self.model, "created_at": now()}
        if not self.chat:
            return line | {"response": text}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = [
                {"id": c.id, "function": {"name": c.name, "arguments": json.loads(c.arguments)}} for c in calls
            ]
        return line | {"message": message}

    def _end(self, finish: str, usage: Usage) -> dict[str, Any]:
        spent = int((time.monotonic() - self.started) * 1e9)
        return {
            "done": True,
            "done_reason": "stop" if finish in ("stop", "cancelled") else "length",
            "total_duration": spent,
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": int(usage.prompt_seconds * 1e9),
            "eval_count": usage.completion_tokens,
            "eval_duration": max(0, spent - int(usage.prompt_seconds * 1e9)),
        }


def chat_call(raw: object) -> OllamaCall:
    """A body of POST /api/chat.

    Raises:
        Refused: a field is wrong or not supported; it is named.
    """
    body = Body(raw, IGNORED)
    messages = []
    for number, item in enumerate(body.take("messages", list, default=[])):
        where = f"messages[{number}]"
        role = item.get("role") if isinstance(item, dict) else None
        if role not in ("system", "user", "assistant", "tool"):
            raise Refused(f"{where}.role is {role!r}; expected system, user, assistant or tool", field=where)
        if item.get("images"):
            raise Refused(f"{where}.images is not supported", field=f"{where}.images")
        message: dict[str, Any] = {"role": role, "content": text_of(item.get("content"), f"{where}.content")}
        if item.get("tool_calls"):
            message["tool_calls"] = calls_of(item["tool_calls"], f"{where}.tool_calls")
        if role == "tool":
            message["tool_call_id"] = str(item.get("tool_call_id", ""))
        messages.append(message)
    return _call(body, messages, chat=True, tools=tools_of(body))


def generate_call(raw: object) -> OllamaCall:
    """A body of POST /api/generate: the prompt is a user's message, unless `raw` is true.

    Raises:
        Refused: a field is wrong or not supported; it is named.
    """
    body = Body(raw, IGNORED)
    text = body.take("prompt", str, default="")
    system = body.take("system", str, default="")
    body.only("suffix", "")
    body.only("images", [])
    if body.flag("raw") or not text:
        return _call(body, text, chat=False)
    messages = [{"role": "system", "content": system}] if system else []
    return _call(body, [*messages, {"role": "user", "content": text}], chat=False)


def _call(body: Body, prompt: Any, *, chat: bool, tools: ToolUse = NO_TOOLS) -> OllamaCall:
    options = body.take("options", dict, default={})
    known = {key: options[key] for key in (*OPTIONS, "num_predict", "stop") if key in options}
    inside = Body({key: value for key, value in known.items() if (key, value) != ("seed", -1)})  # -1 asks for a new one
    own = {"top_k": inside.whole("top_k", 0, 1 << 62), "seed": inside.whole("seed", -MAX_SEED - 1, MAX_SEED)}
    rest = {ours: inside.number(theirs, -2, 100) for theirs, ours in OPTIONS.items() if theirs not in own}
    wanted = _grammar(body.take("format", str, dict, default=""))
    limit = inside.whole("num_predict", -2, 1 << 20)
    request = GenerationRequest(
        prompt=prompt,
        max_tokens=limit if limit and limit > 0 else None,
        sampling={name: value for name, value in (own | rest).items() if value is not None},
        stop=inside.strings("stop"),
        tools=tools.tools,
        grammar=tools.grammar or wanted,
    )
    model, stream = body.take("model", str, default=""), body.flag("stream", True)
    body.done()
    return OllamaCall(model, request if prompt else None, stream, chat, time.monotonic())


def _grammar(form: str | Mapping[str, Any]) -> tuple[str, str] | None:
    if form == "":
        return None
    if form == "json":
        return ("json_object", "")
    if isinstance(form, str):
        raise Refused(f"format is {form!r}; expected 'json' or a schema", field="format")
    return ("json_schema", json.dumps(form))


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line) + "\n"
