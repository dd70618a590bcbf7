"""OpenAI's chat completions and completions: bodies to requests, pieces to chunks. Knows no HTTP.

Source: OpenAI's API reference (chat.completion, chat.completion.chunk, text_completion objects).
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.errors import UserError, shown
from headrace.runtime.sampling import token_key
from headrace.server.fields import MAX_ANSWERS, MAX_SEED, MAX_TOP_LOGPROBS, Body, text_of
from headrace.server.generation import Answer, GenerationRequest, Generator, Logprob, Refused, Usage
from headrace.server.tools import NO_TOOLS, ToolCall, ToolText, ToolUse, choice_of, split_calls, tool_use

__all__ = ["Call", "calls_of", "chat_call", "completion_call", "messages_of"]

# They change nothing here: bookkeeping of OpenAI's own service, or hints.
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
    "prompt_cache_retention", "reasoning_effort", "verbosity",
)  # fmt: skip
MAX_LOGIT_BIAS = 100.0


@dataclass(frozen=True)
class Call:
    """A body, read.

    Attributes:
        model: the model asked for.
        request: what to generate.
        stream: answer in chunks.
        include_usage: a last chunk tells the tokens used.
        chat: chat.completion, or else text_completion.
    """

    model: str
    request: GenerationRequest
    stream: bool
    include_usage: bool
    chat: bool

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """The response object."""
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return self._envelope("chat.completion" if self.chat else "text_completion") | {
            "choices": choices,
            "usage": usage_object(usage),
        }

    async def chunks(self, generator: Generator) -> AsyncIterator[str]:
        """The data of each server-sent event, `[DONE]` last."""
        envelope = self._envelope("chat.completion.chunk" if self.chat else "text_completion")
        envelope |= {"usage": None} if self.include_usage else {}
        streams = [ToolText(bool(self.request.tools)) for _ in range(self.request.n)]
        called = [0] * self.request.n
        if self.chat:
            for index in range(self.request.n):
                first = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield json.dumps(envelope | {"choices": [first]})
        async for piece in generator:
            text, calls = streams[piece.choice].push(piece.text, last=piece.finish is not None)
            finish = finish_reason(piece.finish, bool(called[piece.choice] or calls))
            if self.chat:
                delta: dict[str, Any] = {"content": text} if text else {}
                if calls:
                    delta["tool_calls"] = [
                        {"index": called[piece.choice] + i} | call_object(call) for i, call in enumerate(calls)
                    ]
                    called[piece.choice] += len(calls)
                choice: dict[str, Any] = {"index": piece.choice, "delta": delta, "finish_reason": finish}
            else:
                choice = {"index": piece.choice, "text": text, "finish_reason": finish}
            if self.request.top_logprobs is not None:
                choice["logprobs"] = self._logprobs(piece.tokens)
            if delta_is_empty(choice):
                continue
            yield json.dumps(envelope | {"choices": [choice]})
        if self.include_usage:
            yield json.dumps(envelope | {"choices": [], "usage": usage_object(generator.usage)})
        yield "[DONE]"

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        text, calls = split_calls(answer.text) if self.request.tools else (answer.text, [])
        choice: dict[str, Any] = {"index": index, "finish_reason": finish_reason(answer.finish, bool(calls))}
        if self.chat:
            message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
            if calls:
                message["tool_calls"] = [call_object(call) for call in calls]
            choice["message"] = message
        else:
            choice["text"] = text
        choice["logprobs"] = None if self.request.top_logprobs is None else self._logprobs(answer.tokens)
        return choice

    def _logprobs(self, tokens: Sequence[Logprob]) -> dict[str, Any]:
        if self.chat:  # the tokens of the content: not those that have no text
            return {
                "content": [
                    token_object(t) | {"top_logprobs": [token_object(other) for other in t.top]}
                    for t in tokens
                    if t.raw
                ]
            }
        return {
            "tokens": [_key(t) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [
                None if t.logprob is None else {_key(one): one.logprob for one in (*t.top, t)} for t in tokens
            ],
            "text_offset": [t.start for t in tokens],
        }

    def _envelope(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
        }


def chat_call(raw: object) -> Call:
    """A body of POST /v1/chat/completions.

    Raises:
        Refused: a field is wrong or not supported; it is named.
    """
    body = Body(raw, IGNORED)
    messages = messages_of(body.take("messages", list, required=True))
    tools = tools_of(body)
    top = body.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if not body.flag("logprobs"):
        if top:
            raise Refused("top_logprobs is given without logprobs; expected logprobs true", field="top_logprobs")
        top = None
    else:
        top = top or 0
    call = _call(body, messages, chat=True, tools=tools, top=top)
    body.done()
    return call


def completion_call(raw: object) -> Call:
    """A body of POST /v1/completions.

    Raises:
        Refused: a field is wrong or not supported; it is named.
    """
    body = Body(raw, IGNORED)
    prompt = body.take("prompt", str, list, required=True, expected="a text or a list of token ids")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list) and not (prompt and all(type(i) is int for i in prompt)):
        raise Refused(f"prompt is {shown(prompt)}; expected one text or list of token ids", field="prompt")
    body.only("suffix", "")
    body.only("best_of", 1)
    top = body.whole("logprobs", 0, MAX_TOP_LOGPROBS)
    call = _call(body, prompt, chat=False, top=top, echo=body.flag("echo"))
    body.done()
    return call


def _call(
    body: Body,
    prompt: Any,
    *,
    chat: bool,
    top: int | None,
    tools: ToolUse = NO_TOOLS,
    echo: bool = False,
) -> Call:
    options = body.take("stream_options", dict, default={})
    wanted = grammar_of(body.take("response_format", dict, default={"type": "text"}))
    limit = body.whole("max_completion_tokens", 1, 1 << 20)
    older = body.whole("max_tokens", 1 if chat else 0, 1 << 20)
    sampling = {
        "temperature": body.number("temperature", 0, 2),
        "top_p": body.number("top_p", 0, 1),
        "top_k": body.whole("top_k", 0, 1 << 20),
        "min_p": body.number("min_p", 0, 1),
        "repetition_penalty": body.number("repetition_penalty", 0.01, 10),
        "presence_penalty": body.number("presence_penalty", -2, 2),
        "frequency_penalty": body.number("frequency_penalty", -2, 2),
        "seed": body.whole("seed", -MAX_SEED - 1, MAX_SEED),
        "logit_bias": bias_of(body.take("logit_bias", dict, default=None)),
    }
    request = GenerationRequest(
        prompt=prompt,
        max_tokens=next((most for most in (limit, older) if most is not None), None if chat else 16),
        sampling={name: value for name, value in sampling.items() if value is not None},
        stop=body.strings("stop"),
        n=body.whole("n", 1, MAX_ANSWERS) or 1,
        top_logprobs=top,
        echo=echo,
        tools=tools.tools,
        grammar=tools.grammar or wanted,
    )
    return Call(
        model=body.take("model", str, default=""),
        request=request,
        stream=body.flag("stream"),
        include_usage=bool(options.get("include_usage")),
        chat=chat,
    )


def messages_of(raw: Sequence[Any]) -> list[dict[str, Any]]:
    """OpenAI's messages as {"role", "content"} with text alone; tool calls and their results keep their fields.

    Raises:
        Refused: there is none, or one is no message.
    """
    if not raw:
        raise Refused("messages is empty; expected at least one message", field="messages")
    messages = []
    for number, item in enumerate(raw):
        where = f"messages[{number}]"
        if not isinstance(item, dict):
            raise Refused(f"{where} is a {type(item).__name__}; expected an object", field=where)
        role = item.get("role")
        role = "system" if role == "developer" else role
        if role not in ("system", "user", "assistant", "tool"):
            raise Refused(
                f"{where}.role is {role!r}; expected system, developer, user, assistant or tool", field=f"{where}.role"
            )
        message: dict[str, Any] = {"role": role, "content": text_of(item.get("content"), f"{where}.content")}
        if role == "assistant" and item.get("tool_calls"):
            message["tool_calls"] = calls_of(item["tool_calls"], f"{where}.tool_calls")
        if role == "tool":
            message["tool_call_id"] = str(item.get("tool_call_id", ""))
        messages.append(message)
    return messages


def calls_of(raw: object, where: str) -> list[dict[str, Any]]:
    """Tool calls of an earlier answer as turn formats take them, with their arguments as an object.

    Raises:
        Refused: it is no list of calls, each with a name and a JSON object of arguments.
    """
    try:
        return [_parsed_call(call) for call in raw]  # type: ignore[attr-defined]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise Refused(f"{where} holds something else than calls with a name and JSON arguments", field=where) from None


def _parsed_call(call: Any) -> dict[str, Any]:
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(name, str) or not isinstance(parsed, dict):
        raise TypeError
    return {"type": "function", "id": str(call.get("id", "")), "function": {"name": name, "arguments": parsed}}


def tools_of(body: Body) -> ToolUse:
    """tools and tool_choice.

    Raises:
        Refused: a tool is no function, or the choice is none of them.
    """
    tools = body.take("tools", list, default=[])
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(f"tools[{number}] is no function with a name", field=f"tools[{number}]")
    choice = body.take("tool_choice", str, dict, default="auto")
    return tool_use(tools, choice_of(choice, choice.get("function") if isinstance(choice, dict) else None))


def grammar_of(raw: object) -> tuple[str, str] | None:
    """A response_format as a grammar; None for text.

    Raises:
        Refused: it is no object, its type is unknown, or a schema is missing.
    """
    if not isinstance(raw, dict):
        raise Refused(f"response_format is {shown(raw)}; expected an object", field="response_format")
    kind = raw.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return ("json_object", "")
    if kind == "json_schema":
        inside = raw.get("json_schema", raw)
        schema = inside.get("schema") if isinstance(inside, dict) else None
        if not isinstance(schema, dict):
            raise Refused("response_format.json_schema.schema is missing; expected an object", field="response_format")
        return ("json_schema", json.dumps(schema))
    raise Refused(
        f"response_format.type is {kind!r}; expected text, json_object or json_schema", field="response_format"
    )


def bias_of(raw: Mapping[str, Any] | None) -> dict[int, float] | None:
    """logit_bias: token id → what is added to its logit.

    Raises:
        Refused: a key is no id, or a value no number within −100 … 100.
    """
    if raw is None:
        return None
    bias = {}
    for key, value in raw.items():
        try:
            token = token_key(key)
        except UserError as error:
            raise Refused(str(error), field="logit_bias") from None
        if not isinstance(value, int | float) or not abs(value) <= MAX_LOGIT_BIAS:
            raise Refused(
                f"logit_bias adds {shown(value)} to token {token}; expected −100 to 100",
                field="logit_bias",
            )
        bias[token] = float(value)
    return bias


def finish_reason(finish: str | None, called: bool) -> str | None:
    """OpenAI's word for why an answer ended."""
    if finish is None:
        return None
    return (
        "tool_calls" if called and finish == "stop" else {"context": "length", "cancelled": "stop"}.get(finish, finish)
    )


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def call_object(call: ToolCall) -> dict[str, Any]:
    """OpenAI's tool call."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def token_object(token: Logprob) -> dict[str, Any]:
    """A token with its probability."""
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw) or None}


def _key(token: Logprob) -> str:
    """A token as completions spell it: one that is no whole characters says so."""
    return f"bytes:{token.text}" if token.raw and token.text.encode() != token.raw else token.text


def delta_is_empty(choice: Mapping[str, Any]) -> bool:
    """A chunk that would say nothing."""
    told = choice.get("logprobs") or {}
    return not (
        choice.get("delta")
        or choice.get("text")
        or choice["finish_reason"]
        or told.get("content")
        or told.get("tokens")
    )
