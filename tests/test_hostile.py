"""Every reader on hostile inputs: it opens, or says so in one line. benchmarks/fuzz_readers.py runs many more."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hostile.chance import Good
from tests.hostile.format import try_one
from tests.hostile.formats import FORMATS

SEEDS = 120  # of a saved corpus: the first inputs of the long runs
NATIVE = {"program"}
NAMES = [pytest.param(name, marks=[pytest.mark.kernels] if name in NATIVE else []) for name in FORMATS]
# How many ways to refuse are seen; a model may say anything, and a library tells what is wrong with few words.
REFUSALS = {"tool calls": 0, "card": 1, "tokenizer.model": 2, "measurement": 3, "graph": 3, "grammar": 3}

_ready: dict[object, tuple[Path, Good]] = {}


def _prepared(factory: pytest.TempPathFactory, name: str) -> tuple[Path, Good]:
    """Once for all examples of all formats that stand in one folder."""
    prepare = FORMATS[name].prepare
    if prepare not in _ready:
        folder = factory.mktemp("hostile") / "fuzz"
        _ready[prepare] = folder, prepare(folder)
    return _ready[prepare]


SOME = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("name", NAMES)
@SOME
@given(rng=st.randoms(use_true_random=False))
def test_it_opens_or_is_one_line(tmp_path_factory: pytest.TempPathFactory, name: str, rng: random.Random) -> None:
    folder, good = _prepared(tmp_path_factory, name)
    try_one(FORMATS[name], rng, folder, good)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_inputs_reach_behind_the_first_check(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """A generator whose inputs are all refused for one reason, or never, would test nothing."""
    folder, good = _prepared(tmp_path_factory, name)
    lines = [try_one(FORMATS[name], random.Random(seed), folder, good) for seed in range(SEEDS)]
    kinds = {line.replace(str(folder), "").split(";")[0][:40] for line in lines if line}
    assert len(kinds) >= REFUSALS.get(name, 6)
    assert None in lines
