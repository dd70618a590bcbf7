"""Every reader on hostile inputs: a weight, or one printable line. benchmarks/fuzz_readers.py runs many more."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint.hostile import FORMATS, prepare, try_one

_ready: dict[str, tuple[Path, dict[str, bytes]]] = {}


def _prepared(factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Once for all examples."""
    if "" not in _ready:
        folder = factory.mktemp("hostile")
        _ready[""] = folder, prepare(folder)
    return _ready[""]


SOME = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("name", FORMATS)
@SOME
@given(rng=st.randoms(use_true_random=False))
def test_a_weight_or_one_line(tmp_path_factory: pytest.TempPathFactory, name: str, rng: random.Random) -> None:
    folder, good = _prepared(tmp_path_factory)
    try_one(name, rng, folder, good)


@pytest.mark.parametrize("name", FORMATS)
def test_hostile_inputs_reach_behind_the_first_check(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """A generator whose inputs are all refused for one reason, or never, would test nothing."""
    folder, good = _prepared(tmp_path_factory)
    lines = [try_one(name, random.Random(seed), folder, good) for seed in range(200)]
    kinds = {line.replace(str(folder), "").split(";")[0][:40] for line in lines if line}
    assert len(kinds) >= 8
    assert None in lines
