"""generate: why an answer ends, and what of it is text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from headrace.errors import ContextFull
from headrace.runtime.engine import Engine
from headrace.runtime.generate import Limits, Token, generate
from headrace.runtime.sampling import SamplingOptions
from headrace.text.tokenizer import Tokenizer
from tests.text.vocabularies import sentencepiece_tokenizer

GREEDY = SamplingOptions.from_generation_config({}, {"temperature": 0.0})
PROMPT = [5, 6, 7]


class Script:
    """A runner that says what it was told to, token by token, behind any prompt of three tokens."""

    kv_bytes = 0
    prompt_length = 8

    def __init__(self, tokens: Sequence[int], vocab: int, context: int = 64) -> None:
        self.tokens = list(tokens)
        self.vocab_size = vocab
        self.context = context
        self.steps = 0

    def step(self, ids: NDArray[np.int64], start: int, wanted: NDArray[np.int64]) -> NDArray[np.float32]:
        self.steps += 1
        logits = np.zeros((len(wanted), self.vocab_size), np.float32)
        for row, at in enumerate(wanted):
            said = start + int(at) + 1 - len(PROMPT)
            logits[row, self.tokens[said] if said < len(self.tokens) else 0] = 9
        return logits

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return sentencepiece_tokenizer(tmp_path_factory.mktemp("vocabulary"))


def answer(tokenizer: Tokenizer, tokens: Sequence[int], **options: object) -> list[Token]:
    engine = Engine(Script(tokens, tokenizer.vocab_size, int(options.pop("context", 64))))  # type: ignore[call-overload]
    limits = Limits(**{"max_tokens": 20, "stop_ids": (2,), **options})  # type: ignore[arg-type]
    return list(generate(engine, tokenizer, PROMPT, GREEDY, limits))


def text(tokens: Sequence[Token]) -> str:
    return "".join(t.text for t in tokens)


@pytest.mark.parametrize(
    "words", ["The river runs to the sea.", "百川东到海，何时复西归？", "a😀b🏞️c", "  two  spaces "]
)
def test_texts_joined_are_the_answer(tokenizer: Tokenizer, words: str) -> None:
    ids = tokenizer.encode(words)
    tokens = answer(tokenizer, [*ids, 2], max_tokens=200, context=300)
    assert [t.id for t in tokens] == [*ids, 2]
    assert text(tokens) == words
    assert "�" not in text(tokens)
    assert [t.finish for t in tokens] == [None] * len(ids) + ["stop"]
    assert tokens[-1].text == ""


def test_length(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The river runs to the sea.")
    tokens = answer(tokenizer, ids, max_tokens=3)
    assert [t.id for t in tokens] == ids[:3]
    assert [t.finish for t in tokens] == [None, None, "length"]
    assert text(tokens) == tokenizer.decode(ids[:3])
    assert answer(tokenizer, ids, max_tokens=0) == []


def test_a_cut_character_is_shown_as_such_only_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🏞")
    assert len(ids) >= 4, "spelled in bytes"
    tokens = answer(tokenizer, ids, max_tokens=len(ids) - 1)
    assert text(tokens[:-1]).strip("🏞") == ""
    assert text(tokens).endswith("�")


def test_context(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The river runs to the sea, and the sea is not full") * 3
    tokens = answer(tokenizer, ids, context=10, max_tokens=100)
    # Seven places behind the prompt; the token sampled from the last place needs none.
    assert [t.id for t in tokens] == ids[:8]
    assert tokens[-1].finish == "context"


@pytest.mark.parametrize("stop", ["to the", "sea.", "T", "runs"])
def test_stop_strings(tokenizer: Tokenizer, stop: str) -> None:
    words = "The river runs to the sea. The end"
    tokens = answer(tokenizer, tokenizer.encode(words), stops=[stop], max_tokens=100)
    assert text(tokens) == words[: words.index(stop)]
    assert tokens[-1].finish == "stop"


def test_the_prompt_is_computed_when_the_first_token_is_asked_for(tokenizer: Tokenizer) -> None:
    runner = Script([9, 2], tokenizer.vocab_size)
    stream = generate(Engine(runner), tokenizer, PROMPT, GREEDY, Limits(5, (2,)))
    assert runner.steps == 0
    next(stream)
    assert runner.steps == 1, "one token, one step: the answer's next token is not computed ahead"


def test_a_prompt_that_leaves_no_room(tokenizer: Tokenizer) -> None:
    with pytest.raises(ContextFull, match="the prompt has 3 tokens, but the context holds 3"):
        answer(tokenizer, [9], context=3)


def test_the_repetition_penalty_sees_prompt_and_answer(tokenizer: Tokenizer) -> None:
    class Flat(Script):
        def step(self, ids: NDArray[np.int64], start: int, wanted: NDArray[np.int64]) -> NDArray[np.float32]:
            logits = np.full((len(wanted), self.vocab_size), 1.0, np.float32)
            logits[:, PROMPT] = 1.5  # without a penalty the prompt's tokens would come again
            logits[:, 100] = 1.4
            return logits

    options = SamplingOptions.from_generation_config({}, {"temperature": 0.0, "repetition_penalty": 2.0})
    engine = Engine(Flat([], tokenizer.vocab_size))
    tokens = list(generate(engine, tokenizer, PROMPT, options, Limits(3)))
    assert tokens[0].id == 100
    assert tokens[1].id not in (*PROMPT, 100)


def test_nothing_is_left_in_memory_of_the_last_answer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    engine = Engine(Script([9, 10, 2], tokenizer.vocab_size))
    first = list(generate(engine, tokenizer, PROMPT, GREEDY, Limits(5, (2,))))
    assert engine.tokens == [*PROMPT, 9, 10], "the end token is not part of the sequence"
    assert list(generate(engine, tokenizer, PROMPT, GREEDY, Limits(5, (2,)))) == first
