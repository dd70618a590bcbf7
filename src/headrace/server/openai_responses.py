"""OpenAI's responses API, without server-side state: bodies to requests, pieces to events. Knows no HTTP.

Source: OpenAI's API reference (response object and its streaming events).
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.server.fields import Body, text_of
from headrace.server.generation import Answer, GenerationRequest, Generator, Refused, Usage
from headrace.server.openai_chat import calls_of, grammar_of
from headrace.server.tools import ToolCall, ToolText, choice_of, split_calls, tool_use

__all__ = ["ResponseCall", "response_call"]

IGNORED = (
    "metadata", "user", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls", "truncation",
    "include", "reasoning", "prompt_cache_retention", "store",
)  # fmt: skip


def _identity(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


@dataclass(frozen=True)
class ResponseCall:
    """A body of POST /v1/responses, read; with the tools and the choice of them as they came, for the response."""

    model: str
    request: GenerationRequest
    stream: bool
    instructions: str | None
    tools: Sequence[Mapping[str, Any]]
    tool_choice: str | Mapping[str, Any]
    id: str = field(default_factory=lambda: _identity("resp"))
    message_id: str = field(default_factory=lambda: _identity("msg"))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """The response object."""
        answer = answers[0]
        text, calls = split_calls(answer.text) if self.request.tools else (answer.text, [])
        output = [self._message(text)] if text or not calls else []
        return self._response(answer.finish, [*output, *map(_call_item, calls)], usage)

    async def events(self, generator: Generator) -> AsyncIterator[tuple[str, str]]:
        """(event, data) of each server-sent event."""
        number = 0

        def event(kind: str, **fields: Any) -> tuple[str, str]:
            nonlocal number
            number += 1
            body = {"type": kind, "sequence_number": number - 1, **fields}
            return kind, json.dumps(body)

        begun = self._response(None, [], None)
        yield event("response.created", response=begun)
        yield event("response.in_progress", response=begun)
        place = {"item_id": self.message_id, "output_index": 0, "content_index": 0}
        stream = ToolText(bool(self.request.tools))
        text, finish, opened = "", "stop", False
        called: list[ToolCall] = []
        output: list[dict[str, Any]] = []
        async for piece in generator:
            more, calls = stream.push(piece.text, last=piece.finish is not None)
            called += calls
            finish = piece.finish or finish
            if not opened and (more or (piece.finish is not None and not called)):
                opened = True
                message = self._message("") | {"status": "in_progress", "content": []}
                yield event("response.output_item.added", output_index=0, item=message)
                yield event("response.content_part.added", **place, part=_part(""))
            if more:
                text += more
                yield event("response.output_text.delta", **place, delta=more, logprobs=[])
        if opened:
            output.append(self._message(text))
            yield event("response.output_text.done", **place, text=text, logprobs=[])
            yield event("response.content_part.done", **place, part=_part(text))
            yield event("response.output_item.done", output_index=0, item=output[0])
        for index, call in enumerate(called, len(output)):
            item = _call_item(call)
            output.append(item)
            where = {"item_id": item["id"], "output_index": index}
            yield event("response.output_item.added", output_index=index, item=item | {"arguments": ""})
            yield event("response.function_call_arguments.delta", **where, delta=call.arguments)
            yield event("response.function_call_arguments.done", **where, arguments=call.arguments, name=call.name)
            yield event("response.output_item.done", output_index=index, item=item)
        done = self._response(finish, output, generator.usage)
        yield event("response.completed" if done["status"] == "completed" else "response.incomplete", response=done)

    def _message(self, text: str) -> dict[str, Any]:
        return {
            "type": "message",
            "id": self.message_id,
            "status": "completed",
            "role": "assistant",
            "content": [_part(text)],
        }

    def _response(self, finish: str | None, output: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        cut = finish in ("length", "context")
        used = None
        if usage is not None:
            used = {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            }
        sampling = self.request.sampling
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "model": self.model,
            "status": "in_progress" if finish is None else "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "error": None,
            "instructions": self.instructions,
            "max_output_tokens": self.request.max_tokens,
            "metadata": {},
            "output": output,
            "parallel_tool_calls": True,
            "temperature": sampling.get("temperature"),
            "top_p": sampling.get("top_p"),
            "tool_choice": self.tool_choice,
            "tools": [{"strict": None, **tool} for tool in self.tools],
            "usage": used,
        }


def response_call(raw: object) -> ResponseCall:
    """A body of POST /v1/responses.

    Raises:
        Refused: a field is wrong or not supported; it is named.
    """
    body = Body(raw, IGNORED)
    given = body.take("input", str, list, required=True, expected="a text or a list of messages")
    instructions = body.take("instructions", str)
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else _messages(given)
    if instructions:
        messages.insert(0, {"role": "system", "content": instructions})
    tools, choice = body.take("tools", list, default=[]), body.take("tool_choice", str, dict, default="auto")
    use = tool_use([_tool(tool, number) for number, tool in enumerate(tools)], choice_of(choice, choice))
    body.only("background", False)
    sampling = {"temperature": body.number("temperature", 0, 2), "top_p": body.number("top_p", 0, 1)}
    wanted = grammar_of(body.take("text", dict, default={}).get("format") or {"type": "text"})
    request = GenerationRequest(
        prompt=messages,
        max_tokens=body.whole("max_output_tokens", 1, 1 << 20),
        sampling={name: value for name, value in sampling.items() if value is not None},
        tools=use.tools,
        grammar=use.grammar or wanted,
    )
    model, stream = body.take("model", str, default=""), body.flag("stream")
    call = ResponseCall(model, request, stream, instructions, tools, choice)
    body.done()
    return call


def _messages(raw: Sequence[Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(raw):
        where = f"input[{number}]"
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "message":
            role = item.get("role")
            role = "system" if role == "developer" else role
            if role not in ("system", "user", "assistant"):
                raise Refused(f"{where}.role is {role!r}; expected system, developer, user or assistant", field=where)
            messages.append({"role": role, "content": text_of(item.get("content"), f"{where}.content")})
        elif kind == "function_call":
            calls = calls_of([{"id": item.get("call_id", ""), "function": item}], where)
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).extend(calls)  # what one answer says and calls is one turn
        elif kind == "function_call_output":
            result = text_of(item.get("output"), f"{where}.output")
            messages.append({"role": "tool", "content": result, "tool_call_id": str(item.get("call_id", ""))})
        else:
            raise Refused(f"{where}.type is {kind!r}; expected message, function_call or its output", field=where)
    if not messages:
        raise Refused("input is empty; expected at least one message", field="input")
    return messages


def _tool(raw: Any, number: int) -> Mapping[str, Any]:
    if not isinstance(raw, dict) or raw.get("type") != "function" or not isinstance(raw.get("name"), str):
        raise Refused(f"tools[{number}] is no function with a name", field=f"tools[{number}]")
    return {"type": "function", "function": {k: raw[k] for k in ("name", "description", "parameters") if k in raw}}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(call: ToolCall) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": f"fc_{call.id}",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }
