"""AWQ: the fold is exact in float, and the scale it finds loses no more than none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headrace.bundle.grid import Grid, QuantizedTensor, dequantize, quantize_nearest
from headrace.bundle.recipe import Rule
from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.model.reference import eager_logits
from headrace.model.weights import EMBEDDING, FINAL_NORM, HEAD, layer_weights, linears
from headrace.quantize import awq, methods
from headrace.quantize.awq import find_scale
from headrace.quantize.gptq import rounding_loss
from headrace.quantize.layer import QuantizedLayer
from headrace.quantize.pipeline import quantize_layers
from headrace.quantize.statistics import InputStatistics
from tests.tiny import write_baichuan, write_llama

# Float weights scaled and unscaled again: rounding only, relative to the largest logit.
FOLD_NOISE = 1e-4
# Half the loss goes on this problem; less than that and the search does nothing.
MUCH = 0.7


@pytest.mark.parametrize("kind", ["gqa", "mha", "biased"])
def test_the_fold_is_exact_in_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    biased = {"attention_bias": kind == "biased", "mlp_bias": kind == "biased"}
    written = write_baichuan(tmp_path / "m") if kind == "mha" else write_llama(tmp_path / "m", **biased)
    source = open_checkpoint(written)
    layers = _run(source, monkeypatch)
    weights = {name: source.tensor(name).load() for name in (EMBEDDING, FINAL_NORM, HEAD)}
    for layer in layers:
        weights |= layer.weights(source.config)
    plain = {name: source.tensor(name).load() for name in weights}
    moved = [name for name in plain if np.abs(weights[name] - plain[name]).max() > 0.1 * np.abs(plain[name]).max()]
    # Norms, linears, and the biases of those whose results are scaled: v and up for what follows, q and k against each
    # other. With powers of two a scale may happen to be 1, but not in every layer.
    stay = {"self_attn.o_proj.bias", "mlp.gate_proj.bias", "mlp.down_proj.bias"}
    assert {name.split(".", 2)[2] for name in moved if name.startswith("layers")} == {
        name.split(".", 2)[2] for name in layer_weights(source.config, 0)
    } - stay
    ids = np.random.default_rng(1).integers(0, 160, (2, 20))
    a, b = (eager_logits(source.config, w.__getitem__, ids) for w in (plain, weights))
    assert np.abs(a - b).max() < FOLD_NOISE * np.abs(a).max()


def _run(source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> list[QuantizedLayer]:
    """The pipeline with float "codes": what is left is the fold alone."""

    class Plain(QuantizedTensor):
        pass

    def keep(weight: np.ndarray, statistics: object, grid: Grid) -> QuantizedTensor:
        return Plain(weight, np.ones((len(weight), 1), np.float16), grid)  # type: ignore[arg-type]

    def give(tensor: QuantizedTensor) -> np.ndarray:
        return tensor.codes * tensor.scales.astype(np.float32)

    monkeypatch.setattr(methods, "METHODS", {"awq": methods.Method(keep, calibrated=True, scaled=True)})
    monkeypatch.setattr("headrace.quantize.layer.dequantize", give)
    monkeypatch.setattr(awq, "_POWERS", [1.0])  # always scale
    layers: list[QuantizedLayer] = []
    rules = {name: Rule("proj", 4, 16, "awq") for name in linears(source.config)}
    windows = np.random.default_rng(0).integers(0, 160, (3, 40))
    quantize_layers(source, rules, windows, layers.append)
    return layers


def test_the_scale_loses_no_more_than_none() -> None:
    rng = np.random.default_rng(0)
    inputs = (rng.normal(size=(300, 64)) * np.exp(rng.normal(0, 2, 64))).astype(np.float32)
    weight = rng.normal(size=(32, 64)).astype(np.float32)
    statistics, grid = InputStatistics.of(inputs), Grid(4, None)
    scale = find_scale([weight], [grid], statistics)
    plain = rounding_loss(weight, dequantize(quantize_nearest(weight, grid)), statistics.moment)
    scaled = rounding_loss(weight, dequantize(quantize_nearest(weight * scale, grid)) / scale, statistics.moment)
    assert scaled < plain * MUCH


def test_heads_that_share_values_share_powers_of_two() -> None:
    rng = np.random.default_rng(0)
    inputs = (rng.normal(size=(300, 64)) * np.exp(rng.normal(0, 2, 64))).astype(np.float32)
    weight = rng.normal(size=(32, 64)).astype(np.float32)
    scale = find_scale([weight], [Grid(4, 16)], InputStatistics.of(inputs), (2, 16))
    assert np.array_equal(np.log2(scale), np.rint(np.log2(scale)))
    grouped = scale.reshape(2, 2, 16)
    assert np.array_equal(grouped[:, 0], grouped[:, 1])
