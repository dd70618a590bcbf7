"""Simulated quantization: each switch does its own part, and both together are the device's grids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from headrace.config import RopeScaling
from headrace.model.ops import Eager
from headrace.quantize.simulate import Simulated, simulated_logits
from tests.graph.simulated import QuantizedModel, divergence, tiny_model

# uint16 over the whole range of a tiny random model.
ACTIVATIONS_KL = 1e-3
CACHE_KL = 0.05


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QuantizedModel:
    return tiny_model(tmp_path_factory.mktemp("model"), "gqa")


def run(model: QuantizedModel, activations: bool, cache: bool) -> np.ndarray:
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, 40)
    ops = Simulated(model.config, model.real, model.encodings, activations=activations, cache=cache)
    return simulated_logits(ops, ids, np.arange(20, 40))


def test_each_switch_costs_a_little_and_none_nothing(model: QuantizedModel, tmp_path: Path) -> None:
    plain = run(model, False, False)
    assert plain.shape == (20, model.config.vocab_size)
    a16, kv8, both = (
        divergence(plain, run(model, *switches)) for switches in ((True, False), (False, True), (True, True))
    )
    assert 0 < a16 < ACTIVATIONS_KL
    assert a16 < kv8 < CACHE_KL
    assert both > a16


def test_values_are_on_their_grids(model: QuantizedModel) -> None:
    seen: dict[str, np.ndarray] = {}

    class Watch(Simulated):
        def tap(self, name: str, value: np.ndarray) -> np.ndarray:
            seen[name] = super().tap(name, value)
            return seen[name]

        def to_cache(self, x: np.ndarray, name: str) -> np.ndarray:
            seen[name] = super().to_cache(x, name)
            return seen[name]

    ops = Watch(model.config, model.real, model.encodings)
    simulated_logits(ops, np.arange(12), np.array([11]))
    for name, value in seen.items():
        assert np.array_equal(model.encodings[name].simulate(value), value), name
    assert any(name.endswith("k_cache") for name in seen)


def test_a_range_that_holds_near_the_start_only_shows_at_the_end(model: QuantizedModel) -> None:
    slow = replace(model.config, rope_scaling=RopeScaling("linear", 1000.0))  # a radian in a thousand tokens, at most
    narrow = {n: replace(e, scale=e.scale / 30) if n.endswith("_sin") else e for n, e in model.encodings.items()}
    ids, rows = np.arange(12), np.arange(12)
    exact = simulated_logits(Eager(slow, model.real), ids, rows)
    assert divergence(exact, simulated_logits(Eager(slow, model.real), ids, rows, 1500)) < 1e-9
    cost = {
        (grids, start): divergence(exact, simulated_logits(Simulated(slow, model.real, encodings), ids, rows, start))
        for grids, encodings in (("sound", model.encodings), ("narrow", narrow))
        for start in (0, 1500)
    }
    assert cost["sound", 1500] < 2 * cost["sound", 0]
    assert cost["narrow", 0] < 2 * cost["sound", 0] < cost["narrow", 1500] / 2
