"""Hostile bodies of requests, in every dialect the server speaks, and answers of a model that calls tools wrongly."""

from __future__ import annotations

import json
from pathlib import Path

from headrace.errors import HeadraceError
from headrace.runtime.sampling import SamplingOptions
from headrace.server import anthropic_messages, ollama, openai_chat, openai_responses
from headrace.server.tools import ToolText, split_calls
from tests.hostile.chance import Good, Rng, any_json, changed_json, damaged
from tests.hostile.format import Format

TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    },
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Where to?"}]},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
    {"role": "tool", "tool_call_id": "1", "content": "the sea"},
]  # fmt: skip
GOOD = {
    "chat": {
        "model": "m", "messages": MESSAGES, "tools": [TOOL], "tool_choice": "auto", "max_tokens": 5, "temperature": 0.5,
        "top_p": 0.9, "stop": ["a"], "seed": 3, "n": 2, "logprobs": True, "top_logprobs": 2, "stream": True,
        "logit_bias": {"5": -100}, "stream_options": {"include_usage": True},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    },
    "completion": {"model": "m", "prompt": ["a"], "max_tokens": 5, "echo": True, "logprobs": 2, "suffix": None},
    "response": {
        "model": "m", "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}, {
            "type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "x"}],
        "instructions": "i", "max_output_tokens": 9, "tools": [{"type": "function", "name": "f", "parameters": {}}],
        "text": {"format": {"type": "json_object"}},
    },
    "messages": {
        "model": "m", "max_tokens": 9, "system": [{"type": "text", "text": "s"}], "messages": [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": [
                {"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "x"}]}],
        "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}], "stop_sequences": ["a"],
    },
    "ollama chat": {
        "model": "m", "messages": [{"role": "user", "content": "a"}], "format": {"type": "object"},
        "options": {"temperature": 1, "num_predict": 5, "stop": ["a"]}, "tools": [TOOL],
    },
    "ollama generate": {"model": "m", "prompt": "a", "system": "s", "raw": False, "options": {"seed": 1}},
}  # fmt: skip
CALLS = {
    "chat": openai_chat.chat_call, "completion": openai_chat.completion_call,
    "response": openai_responses.response_call,
    "messages": anthropic_messages.messages_call, "ollama chat": ollama.chat_call,
    "ollama generate": ollama.generate_call,
}  # fmt: skip


def prepare(folder: Path) -> Good:
    """Nothing but the folder."""
    folder.mkdir(parents=True)
    return {}


def body(rng: Rng, good: Good) -> bytes:
    """A dialect, a line end, and a body."""
    dialect = rng.choice(tuple(GOOD))
    keys = ("frequency_penalty", "top_k", "min_p", "response_format", "function_call", "grammar", "keep_alive", "think")
    value = changed_json(rng, GOOD[dialect], keys) if rng.randrange(20) else any_json(rng)
    return f"{dialect}\n{json.dumps(value)}".encode()


def _open(path: Path) -> None:
    dialect, _, text = path.read_text().partition("\n")
    call = CALLS[dialect](json.loads(text))
    request = call.request
    if request is None:  # asked for nothing but the model
        assert dialect.startswith("ollama")
        return
    assert 1 <= request.n <= 16 and isinstance(call.stream, bool)
    json.dumps(request.prompt)
    SamplingOptions.from_generation_config({}, request.sampling)


def tool_text(rng: Rng, good: Good) -> bytes:
    """What a model says when it calls tools."""
    call = json.dumps(changed_json(rng, {"name": "f", "arguments": {"a": [1, {"b": None}]}}))
    parts = (
        "<tool_call>",
        "</tool_call>",
        "<tool",
        "_call>",
        call,
        "\n",
        "the sea",
        "百",
        "{",
        "}",
        "<",
        "[" * 3000,
        call,
    )
    text = "".join(rng.choice(parts) for _ in range(rng.randint(1, 9))).encode()
    return text if rng.randrange(6) else damaged(rng, text)


def _open_tool_text(path: Path) -> None:
    text = path.read_bytes().decode("utf-8", "replace")
    _, calls = split_calls(text)
    stream, said, found = ToolText(True), "", []
    for at in range(0, len(text), 7):
        more, made = stream.push(text[at : at + 7], last=at + 7 >= len(text))
        said, found = said + more, found + made
    assert len(found) == len(calls)
    for made_call in calls:
        assert isinstance(json.loads(made_call.arguments), dict)


FORMATS = {
    "request": Format(prepare, body, "body", _open, harmless=(HeadraceError,)),
    "tool calls": Format(prepare, tool_text, "text", _open_tool_text),
}
