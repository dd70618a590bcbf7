"""HostRunner: slots, batches, wanted rows, the cache in place, and what steps leave behind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.bundle.folder import Bundle, open_bundle
from headrace.errors import ContextFull, UserError
from headrace.runtime.runner import Span
from headrace.targets.host import sessions
from headrace.targets.host.runner import HostRunner, _batches
from headrace.targets.host.sessions import default_threads
from tests.exports import CONTEXT, LAYERS, PROMPT_LENGTH, VOCAB, Exports, re_emitted

IDS = [int(i) for i in np.random.default_rng(5).integers(0, VOCAB, 40)]
# The same kernels on the same numbers: other shapes may take another path through them.
SAME_TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["float32", "int8"])
def bundle(request: pytest.FixtureRequest, exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Graphs of float arithmetic, so that runs of different shape may be compared tightly."""
    path = exports.bundle("gqa", kv=request.param, parts=3)
    return re_emitted(path, tmp_path_factory.mktemp("runner") / "graphs")


def run(
    runner: HostRunner, ids: Iterable[int], start: int = 0, wanted: Iterable[int] = (0,), slot: int = 0
) -> NDArray[np.float32]:
    return runner.run([Span(slot, start, tuple(ids), tuple(wanted))])


def rows_of(runner: HostRunner, slot: int) -> list[NDArray[np.int8]]:
    return [buffer[slot].copy() for buffer in runner.cache.buffers.values()]


def test_wanted_rows(bundle: Bundle) -> None:
    runner = HostRunner(bundle)
    whole = run(runner, IDS[:20], 0, range(20))
    assert whole.shape == (20, VOCAB)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(run(runner, IDS[:20], 0, (19,)), whole[19:], atol=SAME_TOLERANCE)
    np.testing.assert_allclose(run(runner, IDS[:20], 0, (7, 0, 7)), whole[[7, 0, 7]], atol=SAME_TOLERANCE)
    assert run(runner, IDS[:20], 0, ()).shape == (0, VOCAB)
    assert runner.run([]).shape == (0, VOCAB)
    runner.close()


def test_a_step_without_rows_still_fills_the_cache(bundle: Bundle) -> None:
    runner, other = HostRunner(bundle), HostRunner(bundle)
    run(runner, IDS[:20], 0, ())
    run(other, IDS[:20], 0, (19,))
    for a, b in zip(rows_of(runner, 0), rows_of(other, 0), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a[:, :20].any()
        assert not a[:, 20:].any()


def test_single_tokens_of_several_slots_run_together(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences of different length, a token each a call, give what each gives alone."""
    sequences = [IDS[i : i + n] for i, n in zip((0, 11, 23), (3, 17, 9))]
    alone = []
    for ids in sequences:
        single = HostRunner(bundle)
        alone.append([run(single, ids[i : i + 1], i) for i in range(len(ids))])
    runner = HostRunner(bundle, slots=3)
    for step in range(17):
        running = [slot for slot, ids in enumerate(sequences) if step < len(ids)]
        found = runner.run([Span(slot, step, (sequences[slot][step],), (0,)) for slot in running])
        assert found.shape == (len(running), VOCAB)
        for row, slot in zip(found, running):
            np.testing.assert_allclose(row, alone[slot][step][0], atol=SAME_TOLERANCE)
    batches = [(shape.slot, shape.batch) for shape in runner._steps]
    assert batches == [(0, 3), (1, 2), (1, 1)], "as long as all have tokens, one call of all"


work = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6)), min_size=1, max_size=5, unique_by=lambda x: x[0])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(work, min_size=1, max_size=6))
def test_any_mixture_is_what_each_slot_is_alone(bundle: Bundle, calls: list[list[tuple[int, int]]]) -> None:
    runner, single = HostRunner(bundle, slots=5), HostRunner(bundle)
    said: dict[int, list[int]] = {slot: [] for slot in range(5)}
    for number, call in enumerate(calls):
        idle = {slot: rows_of(runner, slot) for slot in set(said) - {slot for slot, _ in call}}
        spans = []
        for slot, count in call:
            ids = [IDS[(number + slot + i) % len(IDS)] for i in range(count)]
            spans.append(Span(slot, len(said[slot]), tuple(ids), tuple(range(count))))
            said[slot] += ids
        found = runner.run(spans)
        for span in spans:
            rows, found = found[: len(span.ids)], found[len(span.ids) :]
            expected = run(single, said[span.slot], 0, range(len(said[span.slot])))
            np.testing.assert_allclose(rows, expected[span.start :], atol=SAME_TOLERANCE)
        for slot, before in idle.items():
            for a, b in zip(before, rows_of(runner, slot), strict=True):
                np.testing.assert_array_equal(a, b, "a slot that had nothing to do was written")


def test_batches_are_neighbours_with_one_token() -> None:
    def spans(*parts: tuple[int, int]) -> list[Span]:
        return [Span(slot, 0, (1,) * count) for slot, count in parts]

    assert list(_batches(spans((2, 1), (0, 1), (1, 1)))) == [[1, 2, 0]]
    assert list(_batches(spans((0, 1), (2, 1), (3, 1), (1, 5)))) == [[0], [1, 2], [3]]
    assert list(_batches([])) == []


def test_results_are_the_callers_own(bundle: Bundle) -> None:
    runner = HostRunner(bundle)
    first = run(runner, IDS[:5], 0, (4,))
    kept = first.copy()
    run(runner, IDS[5:10], 0, (4,))
    np.testing.assert_array_equal(first, kept)


def test_rewriting_positions_forgets_what_was_there(bundle: Bundle) -> None:
    runner, fresh = HostRunner(bundle), HostRunner(bundle)
    run(runner, IDS[:30], 0, ())
    again = run(runner, IDS[30:], 5, (9,))  # positions 5 … 14; 15 … 29 hold an older text
    run(fresh, IDS[:5], 0, ())
    np.testing.assert_allclose(again, run(fresh, IDS[30:], 5, (9,)), atol=SAME_TOLERANCE)
    with pytest.raises(ValueError, match="position 16 leaves a gap: slot 0 holds 15 positions"):
        run(runner, IDS[:1], 16)


def test_copies_and_bytes_are_the_cache_bit_for_bit(bundle: Bundle) -> None:
    runner = HostRunner(bundle, slots=3)
    run(runner, IDS[:30], 0, (), slot=1)
    run(runner, IDS[10:40], 0, (), slot=2)
    runner.copy(1, 0, 20)
    expected = run(runner, IDS[20:25], 20, (4,), slot=1)
    np.testing.assert_array_equal(run(runner, IDS[20:25], 20, (4,), slot=0), expected)
    content = runner.read(1, 3, 20)
    assert len(content) == 17 * runner.cache.position_bytes
    run(runner, IDS[:3], 0, (), slot=2)
    runner.write(2, 3, content)
    np.testing.assert_array_equal(run(runner, IDS[20:25], 20, (4,), slot=2), expected)
    for problem, message in (
        (lambda: runner.read(1, 0, 26), "positions 0 to 26 of slot 1 are not there; it holds 25"),
        (lambda: runner.copy(1, 0, 26), "positions 0 to 26 of slot 1 are not there"),
        (lambda: runner.copy(1, 3, 2), "slot 3 does not exist; expected 0 to 2"),
        (lambda: runner.write(0, 30, content), "position 30 leaves a gap"),
        (lambda: runner.write(0, 0, content[:-1]), "are no whole number of positions"),
        (lambda: runner.write(0, 0, content * 20), f"do not fit a context of {CONTEXT}"),
    ):
        with pytest.raises(ValueError, match=message):
            problem()


@pytest.mark.parametrize(
    ("spans", "error", "message"),
    [
        ([Span(2, 0, (1,))], ValueError, "slot 2 does not exist; expected 0 to 1"),
        ([Span(0, 0, (1,)), Span(0, 1, (1,))], ValueError, "slot 0 comes twice in one run"),
        ([Span(0, 0, ())], ValueError, "the span of slot 0 is empty"),
        ([Span(0, 1, (1,))], ValueError, "position 1 leaves a gap: slot 0 holds 0 positions"),
        ([Span(0, 0, (1,), (1,))], ValueError, "logits of token 1 are wanted of a span of 1 tokens"),
        ([Span(0, 0, (1, VOCAB))], UserError, f"token {VOCAB} is not in the model's vocabulary of {VOCAB} tokens"),
        ([Span(0, 0, (-1,))], UserError, "token -1 is not in the model's vocabulary"),
        ([Span(1, 0, (1,) * (CONTEXT + 1))], ContextFull, f"{CONTEXT + 1} tokens, but the context holds {CONTEXT}"),
    ],
)
def test_impossible_spans_are_refused(bundle: Bundle, spans: list[Span], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        HostRunner(bundle, slots=2).run(spans)


def test_only_recent_bindings_are_kept_and_no_large_logits(bundle: Bundle) -> None:
    runner = HostRunner(bundle)
    for length in (*range(1, 17), 2, 17):
        run(runner, IDS[:length], 0, (length - 1,))
    run(runner, IDS[:20], 0, range(20))
    assert [shape.length for shape in runner._steps] == [*range(3, 17), 2, 17]


def test_what_a_runner_says_of_itself(bundle: Bundle) -> None:
    runner = HostRunner(bundle)
    assert (runner.vocab_size, runner.context, runner.prompt_length) == (VOCAB, CONTEXT, PROMPT_LENGTH)
    assert runner.slots == 1
    size = {"int8": 1, "float32": 4}[bundle.kv_dtype]
    assert runner.kv_bytes == 2 * LAYERS * 2 * 16 * CONTEXT * size
    assert HostRunner(bundle, context=64, slots=2).kv_bytes == 2 * LAYERS * 2 * 16 * 64 * size * 2
    runner.close()
    assert not runner.cache.buffers
    with pytest.raises(ValueError, match="0 slots are not possible"):
        HostRunner(bundle, slots=0)


def test_the_last_position_of_the_context_can_be_used(bundle: Bundle) -> None:
    short, long = HostRunner(bundle, context=20), HostRunner(bundle)
    ids = IDS[:20]
    np.testing.assert_allclose(run(short, ids, 0, (19,)), run(long, ids, 0, (19,)), atol=SAME_TOLERANCE)


def test_one_pool_for_all_sessions(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(exports.bundle("gqa"))
    HostRunner(bundle, threads=1)  # this process has its real pool, whichever tests came before
    asked = []
    monkeypatch.setattr(sessions, "_pool", None)
    monkeypatch.setattr(sessions.ort, "set_global_thread_pool_sizes", lambda *sizes: asked.append(sizes))
    HostRunner(bundle, threads=1)
    HostRunner(bundle, threads=1)
    assert asked == [(1, 1)]


def test_default_threads_are_the_cores_one_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: [0, 1], raising=False)
    assert default_threads() == 2
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: list(range(16)), raising=False)
    assert default_threads() == 8
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: None)
    assert default_threads() == 1


def test_bundles_anywhere(exports: Exports, tmp_path: Path) -> None:
    """External data is found below the bundle whatever the working folder, in a path with spaces and 汉字."""
    path = exports.copy(tmp_path / "a bundle 引水渠")
    assert run(HostRunner(open_bundle(path)), IDS[:3], 0, (2,)).shape == (1, VOCAB)
