"""Nothing of a layer outlives it: weights that a cycle of references holds stay until Python looks for cycles, which it
does by the number of new objects, not by their size. At 7B a layer is 800 MB."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace import export
from tests.exports import SMALL, Exports

LARGE = 1024  # numbers of an array that is worth freeing


@pytest.fixture
def uncollected() -> Iterator[list[Any]]:
    """What only the collector can free, of all that is done until it is asked for; filled by `gc.collect()`."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    yield gc.garbage
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()
    gc.collect()


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "w4b32", "method": "nearest"},
        {"recipe": "w4b32", "method": "awq"},
        {"recipe": "w4b32", "method": "gptq"},
        {"recipe": "w4b32", "method": "descent"},
        {"recipe": "w4b32", "method": "best", "size": 180_000},
        {"recipe": "w4a16", "rotate": True, "bits": 5.0},
    ],
    ids=lambda o: o.get("method", "rotated"),
)
def test_an_export_leaves_no_array_in_a_cycle(
    exports: Exports, tmp_path: Path, uncollected: list[Any], options: dict[str, Any]
) -> None:
    export(exports.checkpoint("gqa"), tmp_path / "bundle", **{**SMALL, "calibration": [exports.text], **options})
    gc.collect()
    assert not {type(holder).__name__ for holder in uncollected if any(map(is_large, reached(holder)))}


def reached(holder: Any) -> Iterator[Any]:
    """What an object refers to, also through dicts and lists that the collector does not track."""
    for one in gc.get_referents(holder):
        yield one
        if isinstance(one, dict | list | tuple) and not gc.is_tracked(one):
            yield from reached(one)


def is_large(value: Any) -> bool:
    """Whether it is an array that is worth freeing."""
    return isinstance(value, np.ndarray) and value.size >= LARGE
