"""HostRunner: batches, wanted rows, the cache in place, and what steps leave behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headrace.bundle.folder import open_bundle
from headrace.targets.host import runner as target
from headrace.targets.host.runner import HostRunner, default_threads
from tests.exports import CONTEXT, LAYERS, PROMPT_LENGTH, VOCAB, Exports, re_emitted

IDS = np.random.default_rng(5).integers(0, VOCAB, 40)
# The same kernels on the same numbers: other shapes may take another path through them.
SAME_TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["float32", "int8"])
def bundle(request: pytest.FixtureRequest, exports: Exports, tmp_path_factory: pytest.TempPathFactory):
    """Graphs of float arithmetic, so that runs of different shape may be compared tightly."""
    path = exports.bundle("gqa", kv=request.param, parts=3)
    return re_emitted(path, tmp_path_factory.mktemp("runner") / "graphs")


def rows(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def test_wanted_rows(bundle) -> None:
    runner = HostRunner(bundle)
    whole = runner.step(IDS[:20], 0, np.arange(20))
    assert whole.shape == (20, VOCAB)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(runner.step(IDS[:20], 0, rows(19)), whole[19:], atol=SAME_TOLERANCE)
    np.testing.assert_allclose(runner.step(IDS[:20], 0, rows(7, 0, 7)), whole[[7, 0, 7]], atol=SAME_TOLERANCE)
    assert runner.step(IDS[:20], 0, rows()).shape == (0, VOCAB)
    runner.close()


def test_a_step_without_rows_still_fills_the_cache(bundle) -> None:
    runner, other = HostRunner(bundle), HostRunner(bundle)
    runner.step(IDS[:20], 0, rows())
    other.step(IDS[:20], 0, rows(19))
    for name, cache in runner._cache.items():
        np.testing.assert_array_equal(cache.numpy(), other._cache[name].numpy())
        assert cache.numpy()[:, :, :20].any()
        assert not cache.numpy()[:, :, 20:].any()


def test_batches_at_different_places(bundle) -> None:
    """Three sequences of different length in step, one token at a time, give what each gives alone."""
    lengths = [3, 17, 9]
    sequences = [IDS[i : i + n] for i, n in zip((0, 11, 23), lengths)]
    alone = []
    for ids in sequences:
        single = HostRunner(bundle)
        alone.append(np.concatenate([single.step(ids[i : i + 1], i, rows(0)) for i in range(len(ids))]))
    runner = HostRunner(bundle, batch=3)
    for step in range(max(lengths)):
        starts = np.array([min(step, n - 1) for n in lengths])  # a short one repeats its last token in its place
        ids = np.array([[s[at]] for s, at in zip(sequences, starts)])
        found = runner.step_batch(ids, starts, rows(0))
        assert found.shape == (3, 1, VOCAB)
        for row, expected, at in zip(found, alone, starts):
            np.testing.assert_allclose(row[0], expected[at], atol=SAME_TOLERANCE)


def test_batched_prompts_of_one_length(bundle) -> None:
    runner, single = HostRunner(bundle, batch=2), HostRunner(bundle)
    both = np.stack([IDS[:20], IDS[20:]])
    found = runner.step_batch(both, np.zeros(2, np.int64), rows(4, 19))
    for row, ids in zip(found, both):
        np.testing.assert_allclose(row, single.step(ids, 0, rows(4, 19)), atol=SAME_TOLERANCE)


def test_results_are_the_callers_own(bundle) -> None:
    runner = HostRunner(bundle)
    first = runner.step(IDS[:5], 0, rows(4))
    kept = first.copy()
    runner.step(IDS[5:10], 0, rows(4))
    np.testing.assert_array_equal(first, kept)


def test_rewriting_positions_forgets_what_was_there(bundle) -> None:
    runner, fresh = HostRunner(bundle), HostRunner(bundle)
    runner.step(IDS[:30], 0, rows())
    again = runner.step(IDS[30:], 5, rows(9))  # positions 5 … 14; 15 … 29 hold an older text
    fresh.step(IDS[:5], 0, rows())
    np.testing.assert_allclose(again, fresh.step(IDS[30:], 5, rows(9)), atol=SAME_TOLERANCE)


def test_the_cache_never_moves(bundle) -> None:
    runner = HostRunner(bundle)
    places = {name: value.data_ptr() for name, value in runner._cache.items()}
    for at, length in ((0, 7), (7, 1), (8, 3), (11, 1)):
        runner.step(IDS[at : at + length], at, rows(length - 1))
    assert {name: value.data_ptr() for name, value in runner._cache.items()} == places


def test_only_recent_bindings_are_kept(bundle) -> None:
    runner = HostRunner(bundle)
    for length in (1, 2, 3, 4, 1, 5, 6):
        runner.step(IDS[:length], 0, rows(length - 1))
    assert list(runner._steps) == [(4, 1), (1, 1), (5, 1), (6, 1)]


def test_what_a_runner_says_of_itself(bundle) -> None:
    runner = HostRunner(bundle)
    assert (runner.vocab_size, runner.context, runner.prompt_length) == (VOCAB, CONTEXT, PROMPT_LENGTH)
    size = {"int8": 1, "float32": 4}[bundle.kv_dtype]
    assert runner.kv_bytes == 2 * LAYERS * 2 * 16 * CONTEXT * size
    assert HostRunner(bundle, context=64, batch=2).kv_bytes == 2 * LAYERS * 2 * 16 * 64 * size * 2
    runner.close()
    assert not runner._cache


def test_the_last_position_of_the_context_can_be_used(bundle) -> None:
    short, long = HostRunner(bundle, context=20), HostRunner(bundle)
    ids = IDS[:20]
    np.testing.assert_allclose(short.step(ids, 0, rows(19)), long.step(ids, 0, rows(19)), atol=SAME_TOLERANCE)


def test_one_pool_for_all_sessions(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(target, "_pool", None)
    monkeypatch.setattr(target.ort, "set_global_thread_pool_sizes", lambda *sizes: asked.append(sizes))
    HostRunner(open_bundle(exports.bundle("gqa")), threads=1)
    HostRunner(open_bundle(exports.bundle("gqa")), threads=1)
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
    assert HostRunner(open_bundle(path)).step(IDS[:3], 0, rows(2)).shape == (1, VOCAB)
