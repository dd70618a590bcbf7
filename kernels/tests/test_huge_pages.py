"""Weights copied into huge pages are the same weights: at once, later, in the middle of runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headrace_kernels as hk
from programs import stored_linear

HUGE = 2 << 20
PATIENCE = 60  # seconds for what begins after one second of work
SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """A linear whose weights lie in a file, 19 MB, which the system holds in small pages."""
    if not SYSTEM.exists() or "[never]" in SYSTEM.read_text():
        pytest.skip("NOT RUN: this system has no huge pages")
    return stored_linear(tmp_path_factory.mktemp("huge") / "weights")


def test_at_once(stored: Any) -> None:
    program, arrays = stored
    size = Path(program["files"][0]).stat().st_size
    with hk.Engine(program, arrays, huge_pages=False) as mapped, hk.Engine(program, arrays, huge_pages=True) as copied:
        assert (mapped.stats["copied_bytes"], copied.stats["copied_bytes"]) == (0, size // HUGE * HUGE)
        for ids in ([1, 700, 1535], list(range(40))):
            spans = [(0, 0, ids, range(len(ids)))]
            np.testing.assert_array_equal(copied.run(spans), mapped.run(spans))


def test_later(stored: Any) -> None:
    program, arrays = stored
    size = Path(program["files"][0]).stat().st_size
    with hk.Engine(program, arrays) as engine:
        spans = [(0, 0, list(range(100)), [0, 50, 99])]
        first = engine.run(spans)
        assert engine.stats["copied_bytes"] == 0, "nobody waits for a copy before an answer"
        until = time.monotonic() + PATIENCE
        while engine.stats["copied_bytes"] < size // HUGE * HUGE and time.monotonic() < until:
            np.testing.assert_array_equal(engine.run(spans), first)
        assert engine.stats["copied_bytes"] == size // HUGE * HUGE
        np.testing.assert_array_equal(engine.run(spans), first)


def test_while_nobody_waits(stored: Any) -> None:
    program, arrays = stored
    size = Path(program["files"][0]).stat().st_size
    with hk.Engine(program, arrays, threads=2) as engine:
        spans = [(0, 0, list(range(100)), [0, 50, 99])]
        first = engine.run(spans)
        until = time.monotonic() + PATIENCE
        while not engine.stats["copied_bytes"] and time.monotonic() < until:
            engine.run(spans)  # until it has run for as long as an answer takes
        while engine.stats["copied_bytes"] < size // HUGE * HUGE and time.monotonic() < until:
            time.sleep(0.01)
        assert engine.stats["copied_bytes"] == size // HUGE * HUGE
        np.testing.assert_array_equal(engine.run(spans), first)
