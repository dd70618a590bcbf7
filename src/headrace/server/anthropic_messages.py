"""Anthropic's messages API: bodies to requests, pieces to events. Knows no HTTP.

Source: Anthropic's API reference (message, message_start … message_stop events).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.errors import shown
from headrace.server.fields import Body, text_of
from headrace.server.generation import Answer, GenerationRequest, Generator, Refused, Usage
from headrace.server.openai_chat import calls_of
from headrace.server.tools import ToolCall, ToolText, split_calls, tool_use

__all__ = ["MessagesCall", "messages_call"]

IGNORED = ("metadata", "service_tier", "container", "inference_geo")


@dataclass(frozen=True)
class MessagesCall:
    """A body of POST /v1/messages, read."""

    model: str
    request: GenerationRequest
    stream: bool

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """The message object."""
        answer = answers[0]
        text, calls = split_calls(answer.text) if self.request.tools else (answer.text, [])
        content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text or not calls else []
        content += [_call_block(call) for call in calls]
        return self._message(usage) | {
            "content": content,
            **_stopped(answer.finish, answer.stop, bool(calls)),
            "usage": _usage(usage),
        }

    async def events(self, generator: Generator) -> AsyncIterator[tuple[str, str]]:
        """(event, data) of each server-sent event."""
        start = self._message(generator.usage) | {"content": [], "stop_reason": None, "usage": _usage(generator.usage)}
        yield _event("message_start", message=start)
        stream = ToolText(bool(self.request.tools))
        called: list[ToolCall] = []
        finish, opened = "stop", False
        stop: str | None = None
        async for piece in generator:
            text, calls = stream.push(piece.text, last=piece.finish is not None)
            called += calls
            finish, stop = piece.finish or finish, piece.stop
            if not opened and (text or (piece.finish is not None and not called)):
                opened = True
                yield _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
            if text:
                yield _event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
        if opened:
            yield _event("content_block_stop", index=0)
        for index, call in enumerate(called, int(opened)):
            yield _event("content_block_start", index=index, content_block=_call_block(call) | {"input": {}})
            delta = {"type": "input_json_delta", "partial_json": call.arguments}
            yield _event("content_block_delta", index=index, delta=delta)
            yield _event("content_block_stop", index=index)
        yield _event("message_delta", delta=_stopped(finish, stop, bool(called)), usage=_usage(generator.usage))
        yield _event("message_stop")

    def _message(self, usage: Usage) -> dict[str, Any]:
        return {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "stop_sequence": None,
        }


def messages_call(raw: object) -> MessagesCall:
    """A body of POST /v1/messages.

    Raises:
        Refused: a field is wrong or not supported; it is named.
    """
    body = Body(raw, IGNORED)
    system = text_of(body.take("system", str, list, default=""), "system")
    messages = _messages(body.take("messages", list, required=True))
    if system:
        messages.insert(0, {"role": "system", "content": system})
    tools = tuple(_tool(tool, number) for number, tool in enumerate(body.take("tools", list, default=[])))
    choice = body.take("tool_choice", dict, default={"type": "auto"})
    kinds = {"auto": "auto", "none": "none", "any": "required", "tool": f"={choice.get('name')}"}
    kind = kinds.get(str(choice.get("type")))
    if kind is None:
        raise Refused(f"tool_choice is {shown(choice)}; expected type auto, any, tool or none", field="tool_choice")
    use = tool_use(tools, kind)
    thinking = body.take("thinking", dict, default={"type": "disabled"})
    if thinking.get("type") != "disabled":
        raise Refused("thinking is supported only as disabled", field="thinking")
    sampling = {
        "temperature": body.number("temperature", 0, 1),
        "top_p": body.number("top_p", 0, 1),
        "top_k": body.whole("top_k", 0, 1 << 20),
    }
    limit = body.whole("max_tokens", 1, 1 << 20)
    if limit is None:
        raise Refused("max_tokens is missing; expected a whole number", field="max_tokens")
    request = GenerationRequest(
        prompt=messages,
        max_tokens=limit,
        sampling={name: value for name, value in sampling.items() if value is not None},
        stop=body.strings("stop_sequences"),
        tools=use.tools,
        grammar=use.grammar,
    )
    call = MessagesCall(body.take("model", str, default=""), request, body.flag("stream"))
    body.done()
    return call


def _messages(raw: Sequence[Any]) -> list[dict[str, Any]]:
    """Anthropic's messages; tool_use and tool_result blocks become calls and tool messages."""
    if not raw:
        raise Refused("messages is empty; expected at least one message", field="messages")
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(raw):
        where = f"messages[{number}]"
        role = item.get("role") if isinstance(item, dict) else None
        if role not in ("user", "assistant"):
            raise Refused(f"{where}.role is {role!r}; expected user or assistant", field=f"{where}.role")
        content = item.get("content")
        blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
        text: list[Any] = []
        calls: list[dict[str, Any]] = []
        for block in blocks:
            kind = block.get("type") if isinstance(block, dict) else None
            if kind == "tool_use":
                function = {"name": block.get("name"), "arguments": block.get("input", {})}
                calls += calls_of([{"id": block.get("id", ""), "function": function}], f"{where}.content")
            elif kind == "tool_result":
                result = text_of(block.get("content"), f"{where}.content")
                messages.append({"role": "tool", "content": result, "tool_call_id": str(block.get("tool_use_id", ""))})
            else:
                text.append(block)
        if text or calls:
            message: dict[str, Any] = {"role": role, "content": text_of(text, f"{where}.content")}
            messages.append(message | ({"tool_calls": calls} if calls else {}))
    return messages


def _tool(raw: Any, number: int) -> Mapping[str, Any]:
    if (
        not isinstance(raw, dict)
        or not isinstance(raw.get("name"), str)
        or not isinstance(raw.get("input_schema"), dict)
    ):
        raise Refused(f"tools[{number}] is no tool with a name and an input_schema", field=f"tools[{number}]")
    function = {"name": raw["name"], "description": raw.get("description", ""), "parameters": raw["input_schema"]}
    return {"type": "function", "function": function}


def _call_block(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}


def _stopped(finish: str, stop: str | None, called: bool) -> dict[str, str | None]:
    """Why an answer ended; one with a call is waited for, whatever ended it behind the call."""
    if finish in ("length", "context"):
        reason = "max_tokens"
    elif called and finish == "stop":
        reason = "tool_use"
    else:
        reason = "end_turn" if stop is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": stop if reason == "stop_sequence" else None}


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


def _event(kind: str, **fields: Any) -> tuple[str, str]:
    return kind, json.dumps({"type": kind, **fields})
