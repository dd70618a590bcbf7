"""What a request becomes before it reaches the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.runtime.answer import Answer, Limits
from headrace.server import anthropic_messages, ollama, openai_chat, openai_responses
from headrace.server.generation import GenerationRequest
from headrace.server.prompts import render
from headrace.server.tools import split_calls
from headrace.text.turns import turn_format
from tests.text.vocabularies import byte_level_tokenizer, sentencepiece_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("turns", [{"chat_template": TEMPLATE}, {}, {"user_token_id": 9, "assistant_token_id": 10}])
def test_a_message_that_is_continued_keeps_its_spaces(tmp_path: Path, turns: dict[str, Any]) -> None:
    template = turns.pop("chat_template", None)
    tokenizer = sentencepiece_tokenizer(tmp_path, dummy_prefix=True)
    model: Any = SimpleNamespace(tokenizer=tokenizer, turns=turn_format(tokenizer, turns, template), context=512)

    def asked(said: str) -> Any:
        talk = [{"role": "user", "content": "go"}, {"role": "assistant", "content": said}]
        return render(model, GenerationRequest(prompt=talk))

    begun, whole = asked("the river"), asked("the river is long")
    assert whole.ids[: len(begun.ids)] == begun.ids
    answer = Answer(tokenizer, Limits(99), continues=begun.continues)
    assert "".join(answer.take(token).text for token in whole.ids[len(begun.ids) :]) == " is long"


# Mistral's templates write the ids of calls and refuse others than these.
IDS = (
    "{% macro known(id) %}{% if id is not defined or id|length != 9 %}{{ raise_exception('a wrong id') }}{% endif %}"
    "{{ id }}{% endmacro %}{% for m in messages %}{% for call in m.tool_calls or [] %}{{ known(call.id) }}={% endfor %}"
    "{% if m.role == 'tool' %}{{ known(m.tool_call_id) }}:{{ m.content }}{% endif %}{% endfor %}{# tools #}"
)
IDENTITY = split_calls('<tool_call>{"name": "depth"}</tool_call>')[1][0].id
DEPTH = {"name": "depth", "arguments": "{}"}
ROUND = [
    {"role": "user", "content": "How deep?"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": IDENTITY, "type": "function", "function": DEPTH}]},
    {"role": "tool", "tool_call_id": IDENTITY, "content": "6 m"},
]


@pytest.mark.parametrize(
    ("items", "turns"),
    [
        ("call call", ["2 calls"]),
        ("says call call", ["says, 2 calls"]),
        ("call output call output", ["1 calls", "tool", "1 calls", "tool"]),
        ("call call output output says", ["2 calls", "tool", "tool", "says"]),
        ("says user call", ["says", "user", "1 calls"]),
    ],
)
def test_what_one_answer_says_and_calls_is_one_turn(items: str, turns: list[str]) -> None:
    kinds = {
        "call": {"type": "function_call", "call_id": IDENTITY, **DEPTH},
        "output": {"type": "function_call_output", "call_id": IDENTITY, "output": "tool"},
        "says": {"role": "assistant", "content": "says"},
        "user": {"role": "user", "content": "user"},
    }
    prompt: Any = openai_responses.response_call({"input": [kinds[item] for item in items.split()]}).request.prompt
    told = [(m["content"], f"{len(m['tool_calls'])} calls" if "tool_calls" in m else "") for m in prompt]
    assert [", ".join(filter(None, turn)) for turn in told] == turns


@pytest.mark.parametrize(
    ("read", "body"),
    [
        (openai_chat.chat_call, {"messages": ROUND}),
        (ollama.chat_call, {"messages": ROUND}),
        (openai_responses.response_call, {"input": [
            ROUND[0], {"type": "function_call", "call_id": IDENTITY, **DEPTH},
            {"type": "function_call_output", "call_id": IDENTITY, "output": "6 m"}]}),
        (anthropic_messages.messages_call, {"max_tokens": 9, "messages": [
            ROUND[0], {"role": "assistant", "content": [{"type": "tool_use", "id": IDENTITY, "name": "depth"}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": IDENTITY, "content": "6 m"}]}]}),
    ],
    ids=["chat", "ollama", "responses", "anthropic"],
)  # fmt: skip
def test_the_ids_of_calls_reach_the_template(tmp_path: Path, read: Callable[[object], Any], body: object) -> None:
    tokenizer = byte_level_tokenizer(tmp_path)
    model: Any = SimpleNamespace(tokenizer=tokenizer, turns=turn_format(tokenizer, {}, IDS), context=512)
    ids = render(model, read(json.loads(json.dumps(body))).request).ids
    assert tokenizer.decode(ids) == f"{IDENTITY}={IDENTITY}:6 m"
