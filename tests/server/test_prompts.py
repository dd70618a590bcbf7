"""What a request becomes before it reaches the engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.runtime.answer import Answer, Limits
from headrace.server.generation import GenerationRequest
from headrace.server.prompts import render
from headrace.text.turns import turn_format
from tests.text.vocabularies import sentencepiece_tokenizer

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
