"""Engine: chunks, what is kept of the cache, and where a context ends; over a runner that remembers its steps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.errors import ContextFull
from headrace.runtime.engine import Engine
from headrace.targets.host.runner import HostRunner
from tests.exports import VOCAB, Exports, re_emitted

WORDS = 11
# float32 graphs, another number of tokens a step
SAME_TOLERANCE = 1e-3


class Recorder:
    """A runner whose logits depend on the whole prefix in its cache, and which keeps (start, ids, wanted) of steps."""

    vocab_size = WORDS
    kv_bytes = 0

    def __init__(self, context: int = 32, prompt_length: int = 4) -> None:
        self.context = context
        self.prompt_length = prompt_length
        self.cache: list[int] = []
        self.steps: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
        self.closed = False

    def step(self, ids: NDArray[np.int64], start: int, wanted: NDArray[np.int64]) -> NDArray[np.float32]:
        assert ids.dtype == np.int64
        assert 1 <= len(ids) <= self.prompt_length
        assert start <= len(self.cache), "a step may not leave a hole behind it"
        assert start + len(ids) <= self.context
        del self.cache[start:]
        self.cache.extend(ids.tolist())
        self.steps.append((start, tuple(ids.tolist()), tuple(wanted.tolist())))
        return np.stack([prefix_logits(self.cache[: start + int(w) + 1]) for w in wanted]) if len(wanted) else np.empty(
            (0, WORDS), np.float32
        )  # fmt: skip

    def close(self) -> None:
        self.closed = True


def prefix_logits(ids: Sequence[int]) -> NDArray[np.float32]:
    seed = int.from_bytes(hashlib.sha256(str(list(ids)).encode()).digest()[:4], "little")
    return np.random.default_rng(seed).normal(size=WORDS).astype(np.float32)


ids_of = st.lists(st.integers(0, 2), max_size=20)


@given(sequences=st.lists(ids_of.filter(bool), min_size=1, max_size=6), size=st.integers(1, 9))
def test_prefill_equals_a_fresh_engine(sequences: list[list[int]], size: int) -> None:
    """Whatever was said before, the logits are those of the whole new sequence, and no kept token is computed again."""
    runner = Recorder(prompt_length=size)
    engine = Engine(runner)
    before: list[int] = []
    for ids in sequences:
        runner.steps.clear()
        np.testing.assert_array_equal(engine.prefill(ids), prefix_logits(ids))
        assert engine.tokens == ids == runner.cache[: len(ids)]
        shared = 0
        while shared < min(len(before), len(ids)) and before[shared] == ids[shared]:
            shared += 1
        if ids == before:
            assert not runner.steps, "the same again costs nothing"
        else:
            assert runner.steps[0][0] == min(shared, len(ids) - 1)
            assert sum(len(step[1]) for step in runner.steps) == len(ids) - min(shared, len(ids) - 1)
        before = ids


def test_chunks_ask_only_for_the_last_token() -> None:
    runner = Recorder()
    Engine(runner).prefill(range(10))
    assert runner.steps == [(0, (0, 1, 2, 3), ()), (4, (4, 5, 6, 7), ()), (8, (8, 9), (1,))]


def test_a_prefix_is_kept_and_a_tail_dropped() -> None:
    runner = Recorder()
    engine = Engine(runner)
    engine.prefill([1, 2, 3, 4, 5])
    runner.steps.clear()
    engine.prefill([1, 2, 3, 9])
    assert runner.steps == [(3, (9,), (0,))]
    runner.steps.clear()
    np.testing.assert_array_equal(engine.prefill([1, 2]), prefix_logits([1, 2]))  # shorter: its last is computed again
    assert runner.steps == [(1, (2,), (0,))]
    assert engine.tokens == [1, 2]


def test_append_goes_on() -> None:
    engine = Engine(Recorder())
    engine.prefill([1, 2])
    np.testing.assert_array_equal(engine.append([3]), prefix_logits([1, 2, 3]))
    assert (engine.tokens, engine.room) == ([1, 2, 3], 29)
    np.testing.assert_array_equal(engine.prefill([1, 2, 3]), prefix_logits([1, 2, 3]))


@given(ids=ids_of, chunk=st.none() | st.integers(1, 9))
def test_score_gives_every_row(ids: list[int], chunk: int | None) -> None:
    runner = Recorder(context=20)
    engine = Engine(runner)
    engine.prefill([7, 8, 9])
    runner.steps.clear()
    rows = engine.score(ids, chunk)
    assert rows.shape == (len(ids), WORDS)
    assert rows.dtype == np.float32
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(row, prefix_logits(ids[: i + 1]))
    assert all(len(step[1]) <= min(chunk or 4, 4) for step in runner.steps)
    if ids:
        runner.steps.clear()
        np.testing.assert_array_equal(engine.prefill(ids), rows[-1]) if len(ids) < 20 else None
        assert not runner.steps, "what was scored is in the cache"


@pytest.mark.parametrize("length", [8, 9, 20])
def test_a_prompt_needs_a_place_for_the_answer(length: int) -> None:
    engine = Engine(Recorder(context=8))
    with pytest.raises(ContextFull, match=f"the prompt has {length} tokens, but the context holds 8") as error:
        engine.prefill([0] * length)
    assert (error.value.needed, error.value.context) == (length, 8)
    assert not engine.tokens
    engine.prefill([0] * 7)
    assert engine.room == 1


def test_appending_beyond_the_context() -> None:
    engine = Engine(Recorder(context=8))
    engine.prefill([0] * 7)
    engine.append([1])
    assert engine.room == 0
    with pytest.raises(ContextFull) as error:
        engine.append([1])
    assert (error.value.needed, error.value.context) == (9, 8)
    assert len(engine.tokens) == 8
    with pytest.raises(ContextFull):
        engine.score([0] * 9)
    assert engine.score([0] * 8).shape == (8, WORDS)


def test_nothing_has_no_logits() -> None:
    with pytest.raises(ValueError, match="an empty prompt has no logits"):
        Engine(Recorder()).prefill([])


def test_reset_and_close() -> None:
    runner = Recorder()
    engine = Engine(runner)
    engine.prefill([1, 2])
    engine.reset()
    assert (engine.tokens, engine.room) == ([], 32)
    runner.steps.clear()
    engine.prefill([1, 2])
    assert runner.steps == [(0, (1, 2), (1,))]
    engine.close()
    assert runner.closed


class Failing(Recorder):
    """Fails in its second step."""

    def step(self, ids: NDArray[np.int64], start: int, wanted: NDArray[np.int64]) -> NDArray[np.float32]:
        if len(self.steps) == 1:
            self.steps.append((start, (), ()))
            raise KeyboardInterrupt
        return super().step(ids, start, wanted)


def test_an_interrupted_prompt_leaves_the_engine_usable() -> None:
    runner = Failing()
    engine = Engine(runner)
    with pytest.raises(KeyboardInterrupt):
        engine.prefill(range(10))
    assert engine.tokens == [0, 1, 2, 3], "what is in the cache, and nothing else"
    np.testing.assert_array_equal(engine.prefill(range(10)), prefix_logits(range(10)))


def test_an_interrupted_prompt_leaves_no_older_logits() -> None:
    engine = Engine(Recorder())
    engine.prefill([9, 9, 9])
    engine.runner = Failing()
    with pytest.raises(KeyboardInterrupt):
        engine.prefill(range(10))
    np.testing.assert_array_equal(engine.prefill(range(4)), prefix_logits(range(4)))


@pytest.mark.parametrize("kv", ["float32", "int8"])
def test_a_kept_cache_gives_a_fresh_ones_logits(exports: Exports, tmp_path, kv: str) -> None:
    bundle = re_emitted(exports.bundle("gqa", kv=kv, parts=3), tmp_path / "graphs")
    ids = np.random.default_rng(0).integers(0, VOCAB, 90).tolist()
    kept, fresh = Engine(HostRunner(bundle)), Engine(HostRunner(bundle))
    kept.prefill(ids)
    for other in (ids[:50] + ids[:30], ids[:20], ids[:20] + ids[60:]):
        fresh.reset()
        a, b = kept.prefill(other), fresh.prefill(other)
        tolerance = SAME_TOLERANCE if kv == "float32" else 0.1  # a code on the other side of a tie
        np.testing.assert_allclose(a, b, atol=tolerance)
        assert a.argmax() == b.argmax()
