"""Engine: chunks, slots, what is reused of the cache, answers in turns; over a scripted runner and a real one."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import ContextFull
from headrace.runtime.engine import Engine
from headrace.runtime.runner import Logits, Span
from headrace.runtime.sequence import Sequence
from headrace.targets.host.runner import HostRunner
from headrace.testing import ScriptedRunner, prefix_logits
from tests.exports import VOCAB, Exports, re_emitted

WORDS = 11
# float32 graphs, another number of tokens a step
SAME_TOLERANCE = 1e-3
# a code of the int8 cache on the other side of a tie
TIE_TOLERANCE = 0.1

expected = prefix_logits(WORDS)


def scripted(context: int = 32, slots: int = 1, prompt_length: int = 4) -> ScriptedRunner:
    return ScriptedRunner(expected, vocab_size=WORDS, context=context, slots=slots, prompt_length=prompt_length)


ids_of = st.lists(st.integers(0, 2), max_size=20)


@given(
    sequences=st.lists(ids_of.filter(bool), min_size=1, max_size=8),
    size=st.integers(1, 9),
    slots=st.integers(1, 3),
    prefix_bytes=st.sampled_from([0, 80, 1 << 20]),
)
def test_whatever_was_said_before_logits_are_those_of_the_whole(
    sequences: list[list[int]], size: int, slots: int, prefix_bytes: int
) -> None:
    runner = scripted(prompt_length=size, slots=slots)
    engine = Engine(runner, prefix_bytes=prefix_bytes)
    for number, ids in enumerate(sequences):
        sequence = engine.open(ids)
        np.testing.assert_array_equal(engine.extend(sequence), expected(ids))
        assert sequence.slot is not None
        assert sequence.tokens == ids == runner.cache[sequence.slot]
        if number % 2:
            engine.release(sequence)
        engine.slots.prefixes.check_integrity()


def last_prompt(runner: ScriptedRunner) -> list[tuple[int, int, int]]:
    """(slot, start, tokens) of what was computed since the last look."""
    spans = [(span.slot, span.start, len(span.ids)) for span in runner.spans]
    runner.calls.clear()
    return spans


def test_a_finished_conversation_is_gone_on_with() -> None:
    runner = scripted(slots=2)
    engine = Engine(runner)
    first = engine.open([1, 2, 3, 4, 5])
    engine.extend(first)
    engine.release(first)
    runner.calls.clear()
    again = engine.open([1, 2, 3, 9])
    engine.extend(again)
    assert runner.spans == [Span(0, 3, (9,), (0,))]
    engine.release(again)
    shorter = engine.open([1, 2])  # its last token is computed again, for its logits
    np.testing.assert_array_equal(engine.extend(shorter), expected([1, 2]))
    assert runner.spans[-1] == Span(0, 1, (2,), (0,))


@pytest.mark.parametrize("released", [False, True])
def test_a_long_prefix_is_copied_when_its_owner_goes_on_or_has_more(released: bool) -> None:
    """Two conversations of one system prompt: neither loses what it said."""
    runner = scripted(context=128, slots=2, prompt_length=8)
    engine = Engine(runner)
    system = [i % WORDS for i in range(40)]
    one = engine.open([*system, *[1] * 30])
    engine.extend(one)
    if released:
        engine.release(one)
    last_prompt(runner)
    np.testing.assert_array_equal(engine.extend(engine.open([*system, 2, 2])), expected([*system, 2, 2]))
    assert last_prompt(runner) == [(1, 40, 2)]
    assert runner.cache[0] == [*system, *[1] * 30], "the first conversation is still there"


def test_a_short_prefix_is_not_worth_a_slot() -> None:
    runner = scripted(context=128, slots=2, prompt_length=8)
    engine = Engine(runner)
    one = engine.open([1] * 40)
    engine.extend(one)
    engine.release(one)
    last_prompt(runner)
    engine.extend(engine.open([1] * 10 + [2] * 10))
    assert last_prompt(runner)[0] == (1, 0, 8), "an empty slot is taken before one that holds something"


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("prefix_bytes", [0, 1 << 20])
def test_conversations_outlive_their_slots(released: bool, prefix_bytes: int) -> None:
    """With memory for it, a conversation that lost its slot goes on where it was; else it is computed again."""
    runner = scripted(context=256, slots=1, prompt_length=256)
    engine = Engine(runner, prefix_bytes=prefix_bytes)
    talks = [[first, *([5] * 150)] for first in (1, 2)]
    sequences = [engine.open(ids) for ids in talks]
    for sequence in sequences:
        engine.extend(sequence)
        if released:
            engine.release(sequence)
    last_prompt(runner)
    first = engine.open([*talks[0], 7]) if released else sequences[0]
    if not released:
        first.extend([7])
    np.testing.assert_array_equal(engine.extend(first), expected([*talks[0], 7]))
    assert last_prompt(runner) == [(0, 151, 1) if prefix_bytes else (0, 0, 152)]


def test_what_is_not_reused_leaves_no_trace() -> None:
    runner = scripted(slots=1, prompt_length=32)
    engine = Engine(runner)
    for _ in range(2):
        sequence = engine.open([1] * 20, reuse=False)
        engine.extend(sequence)
        engine.release(sequence)
    engine.score([1] * 20)
    engine.extend(engine.open([1] * 20))
    assert [(span.start, len(span.ids)) for span in runner.spans] == [(0, 20)] * 4
    assert engine.slots.prefixes.nbytes == 0


def test_chunks_ask_only_for_the_last_token() -> None:
    runner = scripted()
    engine = Engine(runner)
    engine.extend(engine.open(range(10)))
    assert runner.spans == [Span(0, 0, (0, 1, 2, 3)), Span(0, 4, (4, 5, 6, 7)), Span(0, 8, (8, 9), (1,))]


def test_extend_rewind_and_nothing_new() -> None:
    runner = scripted()
    engine = Engine(runner)
    sequence = engine.open()
    with pytest.raises(ValueError, match="an empty sequence has no logits"):
        engine.extend(sequence, [])
    engine.extend(sequence, [1, 2])
    np.testing.assert_array_equal(engine.extend(sequence, [3]), expected([1, 2, 3]))
    computed = runner.computed
    np.testing.assert_array_equal(engine.extend(sequence, []), expected([1, 2, 3]))
    assert runner.computed == computed, "the same again costs nothing"
    sequence.rewind(1)
    np.testing.assert_array_equal(engine.extend(sequence, [5]), expected([1, 5]))
    sequence.rewind(1)
    np.testing.assert_array_equal(engine.extend(sequence), expected([1]))
    with pytest.raises(ValueError, match="cannot rewind 1 tokens to 2"):
        sequence.rewind(2)


@given(ids=ids_of, chunk=st.none() | st.integers(1, 9))
def test_score_gives_every_row(ids: list[int], chunk: int | None) -> None:
    runner = scripted(context=20)
    engine = Engine(runner)
    engine.extend(engine.open([7, 8, 9]))
    runner.calls.clear()
    rows = engine.score(ids, chunk)
    assert rows.shape == (len(ids), WORDS)
    assert rows.dtype == np.float32
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(row, expected(ids[: i + 1]))
    assert all(len(span.ids) <= min(chunk or 4, 4) for span in runner.spans)


def test_more_sequences_than_slots_take_turns() -> None:
    """The one that waited longest gives its slot up."""
    runner = scripted(slots=2)
    engine = Engine(runner)
    said = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    sequences = [engine.open(ids) for ids in said]
    for token in range(3):
        for ids, sequence in zip(said, sequences):
            ids.append(token)
            np.testing.assert_array_equal(engine.extend(sequence, [token]), expected(ids))
    assert sum(sequence.slot is not None for sequence in sequences) == 2


def test_scoring_in_the_middle_of_a_sequence() -> None:
    engine = Engine(scripted(slots=1))
    sequence = engine.open([1, 2, 3])
    engine.extend(sequence)
    np.testing.assert_array_equal(engine.score([9, 9])[1], expected([9, 9]))
    np.testing.assert_array_equal(engine.extend(sequence, [4]), expected([1, 2, 3, 4]))


def test_beyond_the_context() -> None:
    engine = Engine(scripted(context=8))
    with pytest.raises(ContextFull) as error:
        engine.open([0] * 9)
    assert (error.value.needed, error.value.context) == (9, 8)
    sequence = engine.open([0] * 7)
    engine.extend(sequence, [1])
    with pytest.raises(ContextFull) as error:
        engine.extend(sequence, [1])
    assert (error.value.needed, error.value.context) == (9, 8)
    assert len(sequence.tokens) == 8
    with pytest.raises(ContextFull):
        engine.score([0] * 9)
    assert engine.score([0] * 8).shape == (8, WORDS)


def test_a_released_sequence_is_refused() -> None:
    engine = Engine(scripted())
    sequence = engine.open([1])
    engine.release(sequence)
    with pytest.raises(ValueError, match="this sequence was released; open another one"):
        engine.extend(sequence, [2])


def test_another_thread_is_refused() -> None:
    engine = Engine(scripted())
    engine.open([1])
    found: list[BaseException] = []

    def call() -> None:
        try:
            engine.score([1])
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=call, name="another")
    thread.start()
    thread.join()
    assert "the engine belongs to the thread 'MainThread', and 'another' called it" in str(found[0])


def test_close_closes_the_runner() -> None:
    runner = scripted()
    engine = Engine(runner)
    sequence = engine.open([1])
    engine.extend(sequence)
    engine.close()
    assert runner.closed and sequence.released


class Failing(ScriptedRunner):
    """Fails in its second call."""

    def run(self, spans: list[Span]) -> Logits:  # type: ignore[override]
        if len(self.calls) == 1:
            self._held.begin(spans)
            self.calls.append(())
            raise KeyboardInterrupt
        return super().run(spans)


def test_an_interrupted_prompt_leaves_the_engine_usable() -> None:
    engine = Engine(Failing(expected, vocab_size=WORDS, context=32, prompt_length=4))
    sequence = engine.open(range(10))
    with pytest.raises(KeyboardInterrupt):
        engine.extend(sequence)
    assert sequence.held == 4, "what is in the cache, and nothing else"
    np.testing.assert_array_equal(engine.extend(sequence), expected(range(10)))


def test_a_sequence_is_the_same_without_an_engine() -> None:
    sequence = Sequence()
    sequence.extend([1, 2, 3])
    assert (sequence.tokens, sequence.pending, sequence.slot) == ([1, 2, 3], 3, None)


@pytest.mark.parametrize("kv", ["float32", "int8"])
def test_a_kept_cache_gives_a_fresh_ones_logits(exports: Exports, tmp_path: Path, kv: str) -> None:
    bundle = re_emitted(exports.bundle("gqa", kv=kv, parts=3), tmp_path / "graphs")
    ids = np.random.default_rng(0).integers(0, VOCAB, 90).tolist()
    kept = Engine(HostRunner(bundle, slots=2))
    for other in (ids, ids[:50] + ids[:30], ids[:20], ids[:20] + ids[60:]):
        sequence = kept.open(other)
        a = kept.extend(sequence)
        kept.release(sequence)
        b = Engine(HostRunner(bundle)).score(other)[-1]
        np.testing.assert_allclose(a, b, atol=SAME_TOLERANCE if kv == "float32" else TIE_TOLERANCE)
        assert a.argmax() == b.argmax()


def test_a_reused_prompt_is_computed_in_a_prompts_arithmetic() -> None:
    """Where a runner computes few tokens finer than many, what is left of a prompt is never few."""
    runner = ScriptedRunner(prefix_logits(16), vocab_size=16, context=64, prompt_length=8, fine_tokens=3)
    engine = Engine(runner)
    prompt = [1 + i % 9 for i in range(18)]
    for _ in range(2):
        sequence = engine.open(prompt)
        engine.extend(sequence)
        engine.release(sequence)
    assert [len(span.ids) for span in runner.spans] == [8, 6, 4, 4]
    assert runner.spans[-1].start == 14
