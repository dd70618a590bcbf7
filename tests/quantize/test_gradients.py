"""Gradient energy against what noise at a linear's output really costs, and how it weights tokens."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.bundle.grid import Grid, dequantize
from headrace.bundle.recipe import Rule
from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.model.fidelity import log_softmax
from headrace.model.ops import Eager
from headrace.model.reference import eager_logits
from headrace.model.weights import linears, weight_table
from headrace.quantize import gradients
from headrace.quantize.gradients import gradient_energy
from headrace.quantize.layer import QuantizedLayer
from headrace.quantize.pipeline import quantize_layers
from headrace.quantize.token_weights import with_gradients
from tests.tiny import write_llama

# 300 draws of the factor and 100 of the noise leave a tenth each, and KL is not quite quadratic.
DRAWS, NOISES, AGREEMENT = 300, 100, 0.35
NOISE = 0.03  # of an output's spread: small enough for the second order to hold


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_llama(tmp_path_factory.mktemp("model"), layers=2))


@pytest.mark.parametrize("name", ["layers.0.self_attn.v_proj.weight", "layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("token", [0, 5])
def test_energy_is_what_noise_costs(source: Checkpoint, name: str, token: int) -> None:
    config = source.config
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (1, 8))
    weights = {n: source.tensor(n).load() for n in weight_table(config)}
    energy = np.mean([gradient_energy(source, ids, seed=seed)[name][0, token] for seed in range(DRAWS)])
    module, rng = weight_table(config)[name].module, np.random.default_rng(2)
    reference = log_softmax(eager_logits(config, weights.__getitem__, ids)[0])
    costs, size = [], 0.0

    class Noisy(Eager):
        def tap(self, result: str, value: np.ndarray) -> np.ndarray:
            nonlocal size
            if result != module:
                return value
            size = NOISE * float(value.std())
            value = value.copy()
            value[0, token] += size * rng.standard_normal(value.shape[-1])
            return value

    for _ in range(NOISES):
        found = log_softmax(eager_logits(config, weights.__getitem__, ids, ops=Noisy(config, weights.__getitem__))[0])
        costs.append(np.sum(np.exp(reference) * (reference - found)))
    channels = linears(config)[name].shape[0]
    assert np.mean(costs) == pytest.approx(0.5 * size**2 * channels * energy, rel=AGREEMENT)


def test_groups_of_windows_and_threads_change_nothing_but_the_draws(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "GRADIENT_TOKENS", 16 * 6 + 1)
    ids = np.random.default_rng(1).integers(0, 160, (20, 6))
    steps: list[tuple[int, int]] = []
    energy = gradient_energy(source, ids, progress=lambda done, total: steps.append((done, total)))
    assert set(energy) == set(linears(source.config)) and steps[-1] == (4, 4)
    for found in energy.values():
        walked = ~np.isnan(found).all(1)
        assert walked.sum() == 16 and walked[0] and walked[-1] and np.isfinite(found[walked]).all()
    monkeypatch.setattr(gradients, "TOGETHER", 5 * 6)
    steps.clear()
    few = gradient_energy(source, ids, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (16, 16) and steps == sorted(steps)
    assert all(np.array_equal(np.isnan(few[n]), np.isnan(energy[n])) for n in few)


def test_weights_are_means_of_what_both_know() -> None:
    weights, energy = np.array([1.0, 4.0, 0.5, 2.5], np.float32), np.array([9.0, 1.0, np.nan, np.nan], np.float32)
    found = with_gradients(weights, energy)
    assert found.mean() == pytest.approx(1)
    assert found[0] / found[1] == pytest.approx(3 / 2) and found[2] / found[3] == pytest.approx(0.5 / 2.5)
    # The tokens that were walked have together the weight that they had.
    assert found[:2].sum() / found[2:].sum() == pytest.approx(5 / 3)
    assert np.array_equal(with_gradients(weights, np.full(4, np.nan, np.float32)), weights)
    assert np.array_equal(with_gradients(weights, np.zeros(4, np.float32)), weights)


def test_tokens_that_cost_nothing_do_not_count(source: Checkpoint) -> None:
    """With all the energy in one window, the codes are those of that window alone, for the methods that ask."""
    ids = np.random.default_rng(1).integers(0, 160, (2, 48))
    energy = {name: np.stack([np.ones(48), np.zeros(48)]).astype(np.float32) for name in linears(source.config)}

    def run(method: str, windows: np.ndarray, energy: dict[str, np.ndarray] | None) -> QuantizedLayer:
        layers: list[QuantizedLayer] = []
        rules = {name: Rule("proj", 4, 16, method) for name in linears(source.config)}
        quantize_layers(source, rules, windows, layers.append, energy=energy)
        return layers[0]

    name = "layers.0.self_attn.q_proj.weight"
    ones = {n: np.ones((1, 48), np.float32) for n in energy}
    both, one = run("best", ids, energy), run("best", ids[:1], ones)
    assert np.array_equal(both.linears[name].codes, one.linears[name].codes)
    assert not np.array_equal(both.linears[name].codes, run("best", ids, None).linears[name].codes)
    plain = run("descent", ids, energy).linears[name]
    assert np.array_equal(dequantize(plain), dequantize(run("descent", ids, None).linears[name]))
    assert plain.grid == Grid(4, 16)
