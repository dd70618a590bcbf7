"""LazyTensor: rows by number, unit rows in stretches, and pages that leave the process when they have been read."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from headrace.checkpoint import tensor as tensor_module
from headrace.checkpoint.tensor import from_storage, let_go, map_file, unit_rows

ROUNDING = 1e-6  # of a float32 row of length one
PAGES = 4096  # of 4 KB each


def resident(path: Path) -> int:
    """Kilobytes of a mapped file that are in this process."""
    inside, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="smaps is Linux's")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_was_read_leaves_the_process(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "weights"
    path.write_bytes(np.random.default_rng(0).bytes(PAGES << 12))
    stored = map_file(path).view(tensor_module.ELEMENTS[dtype].stored).reshape(PAGES, -1)
    assert stored.max() is not None and resident(path) == PAGES * 4  # everything was looked at
    weight = from_storage(stored, stored.shape, dtype)
    first = weight.load()
    assert resident(path) == 0
    half = weight.read(0, PAGES // 2)
    assert resident(path) == 0
    np.testing.assert_array_equal(half, first[: PAGES // 2])  # and comes back


def test_memory_that_is_no_file_stays(tmp_path: Path) -> None:
    for array in (np.ones(10), np.ones((0, 4)), np.lib.stride_tricks.as_strided(np.ones(4), (8, 4), (0, 8))):
        let_go(array)
        assert (array == 1).all()
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(200)))
    mapped = map_file(path)
    for view in (mapped[7:90], mapped[7:90:3], mapped[90:7:-1], np.lib.stride_tricks.as_strided(mapped[5:], (9, 3))):
        kept = view.copy()
        let_go(view)
        np.testing.assert_array_equal(view, kept)


def test_rows_are_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_module, "_ROWS", 4)
    values = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    table = from_storage(values, values.shape, "float32")
    for rows in ([], [0], [9], [3, 4], [0, 1, 5, 8, 9], list(range(10))):
        np.testing.assert_array_equal(table.select(np.array(rows, np.int64)), values[rows])


def test_unit_rows_come_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(10, 64)).astype(np.float32)
    values[4] = 0
    expected = values / np.maximum(np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True), 1e-12)
    for rows in (3, 100):
        monkeypatch.setattr(tensor_module, "_ROWS", rows)
        found = unit_rows(from_storage(values, values.shape, "float32"))
        np.testing.assert_allclose(found.load(), expected, atol=ROUNDING)
        np.testing.assert_allclose(found.read(2, 9), expected[2:9], atol=ROUNDING)
    np.testing.assert_array_equal(values[4], 0)  # what is stored is never written over
