"""The Fisher proxy against the divergence it predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from headrace.bundle.grid import Grid, dequantize, quantize_nearest
from headrace.bundle.recipe import Rule
from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.checkpoint.tensor import LazyTensor
from headrace.model.decoder import Residual, head
from headrace.model.fidelity import FidelityMeter, log_softmax, no_target
from headrace.model.ops import Eager
from headrace.model.reference import eager_logits
from headrace.model.weights import EMBEDDING, FINAL_NORM, HEAD, linears, quantized_weights, weight_table
from headrace.quantize.gradients import fisher_gradient
from headrace.quantize.sensitivity import measure_sensitivity
from headrace.quantize.tables import HEAD_METHOD, final_states, head_statistics, quantize_table
from tests.tiny import write_llama

# One random draw a token over a few hundred tokens: a third of the value is noise, and KL is not quite quadratic.
PROXY_FACTOR = 2.0
# 4000 draws of a random vector: its covariance is good to a few hundredths.
DRAW_NOISE = 0.05


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_llama(tmp_path_factory.mktemp("model"), layers=2))


def divergence(source: Checkpoint, windows: np.ndarray, changed: Mapping[str, np.ndarray]) -> float:
    """The KL from the float model of one with other weights, by a plain forward pass."""
    config = source.config
    weights = {name: source.tensor(name).load() for name in weight_table(config)}
    reference, logits = (
        eager_logits(config, {**weights, **other}.__getitem__, windows).reshape(-1, config.vocab_size)
        for other in ({}, changed)
    )
    meter = FidelityMeter()
    meter.add(reference, logits, np.full(len(logits), no_target))
    return meter.result().kl


def test_proxy_predicts_the_divergence_of_one_linear_alone(source: Checkpoint) -> None:
    config = source.config
    windows = np.random.default_rng(1).integers(0, config.vocab_size, (6, 64))
    names = linears(config)
    rules = {name: Rule("proj", 8, None, "nearest") for name in names}
    steps: list[tuple[int, int]] = []
    costs = measure_sensitivity(source, rules, windows, progress=lambda done, total: steps.append((done, total)))
    assert set(costs) == set(names) and steps[-1] == (4, 4)
    for name in ("layers.0.self_attn.v_proj.weight", "layers.1.mlp.down_proj.weight", "layers.0.mlp.gate_proj.weight"):
        rounded = dequantize(quantize_nearest(source.tensor(name).load(), rules[name].grid))
        real = divergence(source, windows, {name: rounded})
        assert real / PROXY_FACTOR < costs[name][Grid(8)] < real * PROXY_FACTOR, name


@pytest.mark.parametrize("tied", [False, True])
def test_proxy_predicts_what_tables_cost(tmp_path: Path, tied: bool) -> None:
    source = open_checkpoint(write_llama(tmp_path / "model", layers=2, tied=tied))
    windows = np.random.default_rng(1).integers(0, source.config.vocab_size, (4, 64))
    rules = {name: Rule(".", 8, None, "nearest") for name in quantized_weights(source.config)}
    grids = (Grid(8), Grid(6, 16, lpbq=True), Grid(5, 32))
    tables = [EMBEDDING] if tied else [EMBEDDING, HEAD]
    costs = measure_sensitivity(source, rules, windows, grids=dict.fromkeys(tables, grids))
    assert list(costs) == tables
    statistics = head_statistics(source, final_states(source, windows))
    for name in tables:
        for grid in grids:
            rule = Rule(".", 8, None, HEAD_METHOD).on(grid)
            of_input = statistics if tied or name == HEAD else None
            rounded = dequantize(quantize_table(source, name, rule, statistics=of_input))
            real = divergence(source, windows, dict.fromkeys([EMBEDDING, HEAD] if tied else [name], rounded))
            assert real / PROXY_FACTOR < costs[name][grid] < real * PROXY_FACTOR, (name, grid)


def test_a_head_that_looks_at_its_input_loses_less(source: Checkpoint) -> None:
    windows, others = np.random.default_rng(1).integers(0, source.config.vocab_size, (2, 4, 64))
    statistics = head_statistics(source, final_states(source, windows))
    rule = Rule(".", 6, 16, HEAD_METHOD, lpbq=True)
    tables = [dequantize(quantize_table(source, HEAD, rule, statistics=each)) for each in (statistics, None)]
    calibrated, rounded = (divergence(source, others, {HEAD: table}) for table in tables)
    assert calibrated < rounded


class UnlikeKeys:
    """The same model with one rotary pair of its keys 32 times larger, and the pair of the queries as much smaller."""

    def __init__(self, source: Checkpoint) -> None:
        self.config, self._source = source.config, source

    def tensor(self, name: str) -> LazyTensor:
        found = self._source.tensor(name)
        factor = {"q_proj": 1 / 32, "k_proj": 32}.get(name.split(".")[-2])
        if factor is None:
            return found
        pair = np.arange(found.shape[0]) % (self.config.head_dim // 2) == 0
        rows = np.where(pair, factor, 1).astype(np.float32)[:, None]
        return replace(found, read=lambda start, stop: found.read(start, stop) * rows[start:stop])


def test_errors_are_held_against_the_checkpoints_own_weights(source: Checkpoint) -> None:
    """Export scales keys to a like size afterwards; that is not an error of k_proj."""
    windows = np.random.default_rng(1).integers(0, source.config.vocab_size, (2, 64))
    rules = {name: Rule("proj", 8, None, "nearest") for name in linears(source.config)}
    costs = measure_sensitivity(source, rules, windows)
    unlike = measure_sensitivity(UnlikeKeys(source), rules, windows)
    for name, kl in costs.items():
        assert unlike[name] == pytest.approx(kl, rel=1e-3)


def test_same_seed_same_costs(source: Checkpoint) -> None:
    windows = np.random.default_rng(2).integers(0, 160, (2, 32))
    rules = {name: Rule("proj", 4, 32, "gptq") for name in linears(source.config)}
    first = measure_sensitivity(source, rules, windows, seed=4)
    assert all(list(kl) == [Grid(4, 32)] for kl in first.values())
    assert first == measure_sensitivity(source, rules, windows, seed=4)
    assert first != measure_sensitivity(source, rules, windows, seed=5)


def test_each_grid_costs_what_it_costs_alone(source: Checkpoint) -> None:
    windows = np.random.default_rng(2).integers(0, 160, (2, 32))
    name = "layers.1.self_attn.q_proj.weight"
    rules = {name: Rule("proj", 4, 32, "nearest") for name in linears(source.config)}
    grids = (Grid(4, 64), Grid(4, 16), Grid(5, 16), Grid(6, 16), Grid(8))
    several = measure_sensitivity(source, rules, windows, grids={name: grids})
    assert list(several) == [name] and tuple(several[name]) == grids
    for grid in grids:
        alone = {**rules, name: rules[name].on(grid)}
        assert several[name][grid] == measure_sensitivity(source, alone, windows)[name][grid]
    assert sorted(several[name].values(), reverse=True) == list(several[name].values())


def test_random_factor_has_the_predictions_covariance(source: Checkpoint) -> None:
    x = np.random.default_rng(3).normal(size=(1, 1, source.config.hidden_size)).astype(np.float32)
    draws = fisher_gradient(source, np.repeat(x, 4000, 0), np.random.default_rng(0))[:, 0]
    weights = {name: source.tensor(name).load() for name in (FINAL_NORM, HEAD)}

    # The Fisher information at the hidden state, from the Jacobian by finite differences.

    def logits(at: np.ndarray) -> np.ndarray:
        return head(Eager(source.config, weights.__getitem__), Residual(at))[0, 0]

    share = np.exp(log_softmax(logits(x)))
    step = 1e-2
    jacobian = np.stack(
        [(logits(x + step * e) - logits(x - step * e)) / (2 * step) for e in np.eye(64, dtype=np.float32)], axis=1
    )
    fisher = jacobian.T @ (np.diag(share) - np.outer(share, share)) @ jacobian
    assert np.trace(draws.T @ draws / len(draws)) == pytest.approx(np.trace(fisher), rel=DRAW_NOISE)
