"""Answers: why they end, what of them is text, and that those read in turns are what each is alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from headrace.errors import ContextFull, HeadraceError, UserError
from headrace.runtime.answer import Answer, Limits, Token
from headrace.runtime.engine import Engine
from headrace.runtime.runner import Logits
from headrace.runtime.sampling import SamplingOptions
from headrace.testing import ScriptedRunner, prefix_logits
from headrace.text.tokenizer import Tokenizer
from tests.text.vocabularies import sentencepiece_tokenizer

GREEDY = SamplingOptions.from_generation_config({}, {"temperature": 0.0})
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return sentencepiece_tokenizer(tmp_path_factory.mktemp("vocabulary"))


def answer(tokenizer: Tokenizer, tokens: Sequence[int], **options: object) -> list[Token]:
    context = int(options.pop("context", 64))  # type: ignore[call-overload]
    limits = Limits(**{"max_tokens": 20, "stop_ids": (2,), **options})  # type: ignore[arg-type]
    return list(Engine(saying(tokens, tokenizer, context)).answer(PROMPT, GREEDY, Answer(tokenizer, limits)))


def saying(tokens: Sequence[int], tokenizer: Tokenizer, context: int = 64) -> ScriptedRunner:
    return ScriptedRunner.saying(tokens, prompt=len(PROMPT), vocab_size=tokenizer.vocab_size, context=context)


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
    assert b"".join(t.raw for t in tokens).decode() == words
    assert all(
        b"".join(t.raw for t in tokens[:i]).decode(errors="ignore") == words[: t.start] for i, t in enumerate(tokens)
    )
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
    runner = saying([9, 2], tokenizer)
    stream = Engine(runner).answer(PROMPT, GREEDY, Answer(tokenizer, Limits(5, (2,))))
    assert not runner.calls
    next(stream)
    assert len(runner.calls) == 1, "one token, one step: the answer's next token is not computed ahead"


def test_a_prompt_that_leaves_no_room(tokenizer: Tokenizer) -> None:
    with pytest.raises(ContextFull, match="the prompt has 3 tokens, but the context holds 3"):
        answer(tokenizer, [9], context=3)


def test_no_prompt_has_no_answer(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="the prompt is empty; expected at least one token"):
        list(Engine(saying([9], tokenizer)).answer([], GREEDY, Answer(tokenizer, Limits(5))))


def test_an_ended_answer_takes_no_more(tokenizer: Tokenizer) -> None:
    made = Answer(tokenizer, Limits(5, (2,)))
    assert made.take(2) == Token(2, "", "stop")
    with pytest.raises(ValueError, match=r"the answer has ended \(stop\); it takes no more tokens"):
        made.take(9)


def test_the_repetition_penalty_sees_prompt_and_answer(tokenizer: Tokenizer) -> None:
    def flat(ids: Sequence[int]) -> Logits:
        logits = np.full(tokenizer.vocab_size, 1.0, np.float32)
        logits[PROMPT] = 1.5  # without a penalty the prompt's tokens would come again
        logits[100] = 1.4
        return logits

    options = SamplingOptions.from_generation_config({}, {"temperature": 0.0, "repetition_penalty": 2.0})
    engine = Engine(ScriptedRunner(flat, vocab_size=tokenizer.vocab_size))
    tokens = list(engine.answer(PROMPT, options, Answer(tokenizer, Limits(3))))
    assert tokens[0].id == 100
    assert tokens[1].id not in (*PROMPT, 100)


def test_nothing_is_left_of_the_last_answer(tokenizer: Tokenizer) -> None:
    runner = saying([9, 10, 2], tokenizer)
    engine = Engine(runner)

    def say() -> list[Token]:
        return list(engine.answer(PROMPT, GREEDY, Answer(tokenizer, Limits(5, (2,)))))

    first = say()
    assert runner.cache[0] == [*PROMPT, 9, 10], "the end token is not part of the sequence"
    computed = runner.computed
    assert say() == first
    assert runner.computed == computed + 3, "of the prompt only the last token, for its logits"


# In turns


def random_model(tokenizer: Tokenizer, slots: int) -> ScriptedRunner:
    return ScriptedRunner(prefix_logits(tokenizer.vocab_size), vocab_size=tokenizer.vocab_size, slots=slots)


PROMPTS = ([5, 6, 7], [5, 6, 7, 8, 9, 10, 11, 12, 13], [30] * 20)
SAMPLED = SamplingOptions(temperature=1.0, seed=3)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
def test_answers_read_in_turns_are_what_each_is_alone(
    tokenizer: Tokenizer, slots: int, options: SamplingOptions
) -> None:
    alone = [
        list(Engine(random_model(tokenizer, 1)).answer(ids, options, Answer(tokenizer, Limits(6)))) for ids in PROMPTS
    ]
    engine = Engine(random_model(tokenizer, slots))
    streams = [engine.answer(ids, options, Answer(tokenizer, Limits(6))) for ids in PROMPTS]
    found: list[list[Token]] = [[] for _ in PROMPTS]
    for turn in range(6):
        for stream, tokens in zip(streams, found):
            tokens.append(next(stream))
        if turn == 2:
            engine.score([1, 2, 3])
    assert found == alone


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_steps_take_every_answer_further(tokenizer: Tokenizer, slots: int) -> None:
    runner = random_model(tokenizer, slots)
    engine = Engine(runner)
    requests = [engine.submit(ids, SAMPLED, Answer(tokenizer, Limits(6))) for ids in PROMPTS]
    found: dict[int, list[Token]] = {id(request): [] for request in requests}
    while not all(request.done for request in requests):
        calls = len(runner.calls)
        for request, token in engine.step():
            found[id(request)].append(token)
        made = runner.calls[calls:]
        assert len(made) <= 2 and all(len({len(span.ids) > 1 for span in call}) == 1 for call in made)
        assert sum(len(span.ids) > 1 for call in made for span in call) <= 1, "one chunk of one prompt a step"
    assert engine.step() == []
    for request, ids in zip(requests, PROMPTS):
        alone = Engine(random_model(tokenizer, 1)).answer(ids, SAMPLED, Answer(tokenizer, Limits(6)))
        assert found[id(request)] == list(alone)


def test_a_cancelled_request_frees_its_slot_at_once(tokenizer: Tokenizer) -> None:
    engine = Engine(random_model(tokenizer, 1))
    first = engine.submit([5, 6, 7], GREEDY, Answer(tokenizer, Limits(50)))
    second = engine.submit([8, 9], GREEDY, Answer(tokenizer, Limits(50)))
    assert [request for request, _ in engine.step()] == [first]
    assert [request for request, _ in engine.step()] == [first], "no slot for the second"
    first.cancel()
    assert [request for request, _ in engine.step()] == [second]
    assert first.done


def test_several_answers_of_one_prompt_need_one_prefill(tokenizer: Tokenizer) -> None:
    """Each with random numbers of its own, as it would answer alone; one waits until the first has said something."""
    prompt = [7] * 30
    runner = random_model(tokenizer, 3)
    engine = Engine(runner)
    options = [SamplingOptions(temperature=1.0, seed=seed) for seed in range(3)]
    first = engine.submit(prompt, options[0], Answer(tokenizer, Limits(5)))
    others = [engine.submit(prompt, o, Answer(tokenizer, Limits(5)), after=first) for o in options[1:]]
    found: dict[int, list[int]] = {}
    while not engine.idle:
        for request, token in engine.step():
            found.setdefault(id(request), []).append(token.id)
    for request, own in zip((first, *others), options):
        alone = Engine(random_model(tokenizer, 1)).answer(prompt, own, Answer(tokenizer, Limits(5)))
        assert found[id(request)] == [token.id for token in alone]
    usage = [request.answer.usage for request in (first, *others)]
    assert [(u.prompt_tokens, u.cached_tokens, u.tokens) for u in usage] == [(30, 0, 5), (30, 29, 5), (30, 29, 5)]
    assert runner.computed == 30 + 2 * 1 + 3 * 4


def test_no_tokens_are_no_request(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="max_tokens is 0; expected 1 or more"):
        Engine(random_model(tokenizer, 1)).submit([5], GREEDY, Answer(tokenizer, Limits(0)))


def test_likelihoods_are_the_models_own(tokenizer: Tokenizer) -> None:
    """Whatever the sampling does to the logits, what is told is what the model found."""
    model = prefix_logits(tokenizer.vocab_size)
    options = SamplingOptions(temperature=2.0, seed=1, presence_penalty=1.0, logit_bias=((9, 5.0),))
    stream = Engine(random_model(tokenizer, 1)).answer(PROMPT, options, Answer(tokenizer, Limits(5), logprobs=3))
    ids = list(PROMPT)
    for token in stream:
        expected = np.log(np.exp(model(ids).astype(np.float64)) / np.exp(model(ids).astype(np.float64)).sum())
        assert token.likelihood is not None
        assert token.likelihood.logprob == pytest.approx(expected[token.id], abs=1e-9)
        order = np.argsort(-expected)[:3]
        assert [id for id, _ in token.likelihood.top] == order.tolist()
        assert [p for _, p in token.likelihood.top] == pytest.approx(expected[order], abs=1e-9)
        ids.append(token.id)
    none = Engine(random_model(tokenizer, 1)).answer(PROMPT, options, Answer(tokenizer, Limits(2), logprobs=0))
    assert all(token.likelihood is not None and token.likelihood.top == () for token in none)
    silent = Engine(random_model(tokenizer, 1)).answer(PROMPT, options, Answer(tokenizer, Limits(2)))
    assert all(token.likelihood is None for token in silent)


def test_damaged_logits_end_their_own_request_only(tokenizer: Tokenizer) -> None:
    model = prefix_logits(tokenizer.vocab_size)

    def sometimes(ids: Sequence[int]) -> Logits:
        return np.full(tokenizer.vocab_size, np.nan, np.float32) if ids[0] == 99 and len(ids) > 3 else model(ids)

    engine = Engine(ScriptedRunner(sometimes, vocab_size=tokenizer.vocab_size, slots=2))
    bad = engine.submit([99, 1], GREEDY, Answer(tokenizer, Limits(9)))
    good = engine.submit([5, 1], GREEDY, Answer(tokenizer, Limits(9)))
    said = 0
    while not engine.idle:
        said += sum(request is good for request, _ in engine.step())
    assert said == 9 and good.error is None
    assert bad.done and "the model or its cache is damaged" in str(bad.error)
    with pytest.raises(HeadraceError, match="the model or its cache is damaged"):
        list(engine.answer([99, 1], GREEDY, Answer(tokenizer, Limits(9))))


def test_a_bias_on_no_token_is_refused_when_it_is_submitted(tokenizer: Tokenizer) -> None:
    options = SamplingOptions(logit_bias=((tokenizer.vocab_size, 1.0),))
    with pytest.raises(UserError, match="logit_bias names token"):
        Engine(random_model(tokenizer, 1)).submit([5], options, Answer(tokenizer, Limits(1)))
