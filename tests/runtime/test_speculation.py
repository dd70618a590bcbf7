"""Guessing ahead: no answer changes, samples keep their distribution, and it stops where it does not pay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.runtime.answer import Answer, Limits, Token
from headrace.runtime.draft_model import draft_model
from headrace.runtime.engine import Engine
from headrace.runtime.runner import Logits
from headrace.runtime.sampling import Sampler, SamplingOptions
from headrace.runtime.speculation import LENGTHS, SILENCE, Costs, Pace, PromptLookup, Speculation, prompt_lookup
from headrace.testing import ScriptedRunner, prefix_logits

VOCAB = 12
PROMPT = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]


class Bytes:
    """A vocabulary whose every token is a letter."""

    drops_leading_space = False

    def piece_bytes(self, token: int) -> bytes:
        return bytes([97 + token])


def repeating(strength: float) -> Callable[[Sequence[int]], Logits]:
    """Logits that like what followed the last two tokens the last time, and otherwise depend on everything."""
    noise = prefix_logits(VOCAB)

    def logits(ids: Sequence[int]) -> Logits:
        row = noise(ids)
        for at in range(len(ids) - 2, 1, -1):
            if list(ids[at - 2 : at]) == list(ids[-2:]):
                row[ids[at]] += strength
                break
        return row

    return logits


class Eager:
    """Always guesses as much as it may, as if guesses were free."""

    def length(self, most: int) -> int:
        return most

    def told(self, drafted: int, accepted: int) -> None: ...


def eager_lookup() -> Speculation:
    made = Speculation(PromptLookup(), Costs())
    made._pace = Eager()  # type: ignore[assignment]
    return made


def say(
    options: SamplingOptions,
    limits: Limits,
    speculation: Callable[[], Speculation] | None,
    strength: float,
    context: int = 256,
) -> tuple[list[Token], Answer, ScriptedRunner]:
    runner = ScriptedRunner(repeating(strength), vocab_size=VOCAB, context=context, prompt_length=16)
    answer = Answer(Bytes(), limits, logprobs=2)  # type: ignore[arg-type]
    return list(Engine(runner, speculation=speculation).answer(PROMPT, options, answer)), answer, runner


OPTIONS = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    seed=st.integers(0, 5),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
)
LIMITS = st.builds(
    Limits,
    max_tokens=st.integers(1, 90),
    stop_ids=st.sampled_from([(), (4,)]),
    stops=st.sampled_from([(), ("bcd",)]),
    beginning=st.sampled_from([None, 4]),
)


@given(
    options=OPTIONS, limits=LIMITS, strength=st.sampled_from([0.0, 3.0, 9.0]), context=st.sampled_from([32, 64, 256])
)
def test_no_answer_changes(options: SamplingOptions, limits: Limits, strength: float, context: int) -> None:
    """Greedy or sampled: the same tokens, texts, likelihoods and reason to end, in fewer steps."""
    plain, _, steps = say(options, limits, None, strength, context)
    for speculation in (eager_lookup, prompt_lookup()):
        guessed, answer, runner = say(options, limits, speculation, strength, context)
        assert guessed == plain
        assert len(runner.calls) <= len(steps.calls)
        usage = answer.usage
        assert 0 <= usage.accepted_tokens <= usage.drafted_tokens
        assert usage.tokens == len(plain)


def test_what_repeats_takes_fewer_steps() -> None:
    plain, _, steps = say(SamplingOptions(), Limits(90), None, 9.0)
    guessed, answer, runner = say(SamplingOptions(), Limits(90), eager_lookup, 9.0)
    assert guessed == plain
    assert len(runner.calls) < len(steps.calls) / 3
    assert answer.usage.accepted_tokens > 0.8 * answer.usage.drafted_tokens > 0


# The largest chi-square of a table that a right sampler shows once in 10,000 tables, by degrees of freedom.
CHI_SQUARE = {11: 37.4}


def test_samples_keep_their_distribution() -> None:
    """Over 6,000 seeds, how often each token comes in a place that was guessed, and in the one behind a right guess,
    against the exact probabilities. Where guesses were preferred or avoided, chi-square would grow with the seeds."""
    model, guesses = repeating(2.0), [4, 5, 6]  # what followed 1, 2, 3 in the prompt
    rows: list[list[int]] = []
    accepted = drafted = 0
    for seed in range(6000):
        tokens, answer, _ = say(SamplingOptions(temperature=1.3, seed=seed), Limits(4), eager_lookup, 2.0)
        rows.append([token.id for token in tokens])
        accepted, drafted = accepted + answer.usage.accepted_tokens, drafted + answer.usage.drafted_tokens
    assert 0.1 < accepted / drafted < 0.9, "some guesses are right and some are wrong"
    for place in (1, 2):
        found = np.bincount([row[place] for row in rows if row[:place] == guesses[:place]], minlength=VOCAB)
        expected = np.exp(model([*PROMPT, *guesses[:place]]).astype(np.float64) / 1.3)
        expected *= found.sum() / expected.sum()
        assert found.sum() > 200
        assert (np.square(found - expected) / expected).sum() < CHI_SQUARE[VOCAB - 1]


def test_a_draft_model_of_the_same_mind_is_always_right() -> None:
    def engine() -> Engine:
        return Engine(ScriptedRunner(prefix_logits(VOCAB), vocab_size=VOCAB, context=200), prefix_bytes=0)

    def say_with(drafts: Engine | None, tokens: int) -> tuple[list[Token], Answer]:
        answer = Answer(Bytes(), Limits(tokens))  # type: ignore[arg-type]
        own = None if drafts is None else draft_model(drafts)
        runner = ScriptedRunner(prefix_logits(VOCAB), vocab_size=VOCAB, context=256)
        return list(Engine(runner, speculation=own).answer(PROMPT, SamplingOptions(), answer)), answer

    plain, _ = say_with(None, 60)
    guessed, answer = say_with(engine(), 60)
    assert guessed == plain
    assert answer.usage.accepted_tokens == answer.usage.drafted_tokens > 0
    plain, _ = say_with(None, 220)
    guessed, _ = say_with(engine(), 220)  # beyond the draft model's context nothing is guessed
    assert guessed == plain


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 8))
def test_lookup_gives_what_followed_the_last_time(ids: list[int], most: int) -> None:
    """As a search of the whole text says, however the text came."""
    grown = PromptLookup()
    for end in range(1, len(ids) + 1):
        found = grown.draft(ids[:end], most)
        assert found == PromptLookup().draft(ids[:end], most)
        text, expected = ids[:end], []
        for size in (5, 4, 3):
            places = [at for at in range(size, end) if text[at - size : at] == text[-size:]]
            if places:
                expected = text[places[-1] :][:most]
                break
        assert found == expected
    other = ids[::-1][:-1]
    assert grown.draft(other, most) == PromptLookup().draft(other, most), "a shorter text is another one"


def costs_of(seconds: dict[int, float]) -> Costs:
    costs = Costs()
    for tokens, time in seconds.items():
        costs.timed(tokens, time)
    return costs


def test_guesses_grow_while_they_come_and_stop_where_they_do_not_pay() -> None:
    cheap = Pace(costs_of({n: 1 + 0.05 * (n - 1) for n in range(1, 18)}))
    for _ in range(100):
        length = cheap.length(16)
        cheap.told(length, length)
    assert cheap.length(16) == LENGTHS[-1]
    assert cheap.length(3) == 3
    for _ in range(100):
        if length := cheap.length(16):
            cheap.told(length, 0)
    asked = sum(bool(length := cheap.length(16)) and (cheap.told(length, 0) or True) for _ in range(20 * SILENCE))
    assert asked <= 21, "where nothing comes, it is tried once in a while"
    dear = Pace(costs_of({n: float(n) for n in range(1, 18)}))
    made = [dear.length(16) for _ in range(10)]
    dear.told(1, 1)
    assert max(made) <= 1, "steps that cost what their tokens cost are not worth a guess"


def test_a_guess_is_no_choice() -> None:
    """The sampler draws one random number a token, whatever is guessed."""
    sampler, other = (Sampler(SamplingOptions(temperature=1.0, seed=5)) for _ in range(2))
    row = np.zeros(VOCAB, np.float32)
    assert [sampler.sample(row) for _ in range(9)] == [other.sample(row) for _ in range(9)]


@pytest.mark.parametrize("count", [2, 3])
def test_several_answers_do_not_guess(count: int) -> None:
    """Single tokens run as one batch; guesses would part it."""
    runner = ScriptedRunner(repeating(9.0), vocab_size=VOCAB, context=256, slots=count)
    engine = Engine(runner, speculation=eager_lookup)
    answers = [Answer(Bytes(), Limits(20)) for _ in range(count)]  # type: ignore[arg-type]
    for answer in answers:
        engine.submit(PROMPT, SamplingOptions(), answer)
    while not engine.idle:
        engine.step()
        assert all(len(span.ids) == 1 for span in runner.calls[-1]) or len(runner.calls[-1]) < count + 1
    assert all(answer.usage.tokens == 20 for answer in answers)
