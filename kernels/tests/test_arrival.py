"""Weights are mapped before the first run asks for them, and whoever runs or closes earlier finds nothing amiss."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headrace_kernels as hk
from programs import stored_linear

PATIENCE = 60  # seconds for what takes milliseconds on a machine that is free
HERE = Path("/proc/self/smaps")
SPANS = [(0, 0, [1, 700, 1535], [0, 1, 2])]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    return stored_linear(tmp_path_factory.mktemp("arrival") / "weights")


def mapped(path: str) -> int:
    """Bytes of a file that this process has in its page tables."""
    areas = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", HERE.read_text())
    return sum(int(found[1]) << 10 for a in areas if path in a and (found := re.search(r"Rss: +(\d+) kB", a)))


def test_weights_arrive_without_a_run(stored: Any) -> None:
    if not HERE.exists():
        pytest.skip("NOT RUN: this system does not tell what is mapped")
    program, arrays = stored
    size = int(np.prod(program["tensors"]["w_packed"]["shape"]))
    with hk.Engine(program, arrays) as engine:
        until = time.monotonic() + PATIENCE
        while mapped(program["files"][0]) < size and time.monotonic() < until:
            time.sleep(0.01)
        assert engine.stats["runs"] == 0
        assert size <= mapped(program["files"][0]) < 2 * size, "the table, of which a token is one row, stays away"


def test_whoever_runs_or_closes_at_once_is_not_disturbed(stored: Any) -> None:
    program, arrays = stored
    with hk.Engine(program, arrays) as engine:
        first = engine.run(SPANS)
        np.testing.assert_array_equal(engine.run(SPANS), first)
    for _ in range(20):
        hk.Engine(program, arrays).close()
    with hk.Engine(program, arrays) as engine:
        np.testing.assert_array_equal(engine.run(SPANS), first)
