"""Layer after layer: what the pipeline calibrates on, hands over and replays."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from headrace.bundle.grid import dequantize
from headrace.bundle.recipe import Rule
from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.checkpoint.tensor import LazyTensor
from headrace.errors import CalibrationError, CheckpointError, RecipeError
from headrace.model.decoder import Residual, block, embed
from headrace.model.ops import Eager
from headrace.model.weights import EMBEDDING, input_groups, layer_weights, linears
from headrace.quantize import windows as windows_module
from headrace.quantize.layer import QuantizedLayer
from headrace.quantize.pipeline import quantize_layers
from headrace.quantize.tables import quantize_table
from headrace.quantize.windows import (
    LayerWalk,
    LeanEager,
    attention_energy,
    causal_positions,
    cut_windows,
    embed_windows,
    evenly_spaced,
    window_batches,
)
from tests.tiny import write_llama

# `LeanEager` sums scores in another order than the plain decoder.
ORDER_NOISE = 1e-4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_llama(tmp_path_factory.mktemp("model"), layers=3))


def windows(source: Checkpoint, count: int = 3, length: int = 40) -> np.ndarray:
    return np.random.default_rng(1).integers(0, source.config.vocab_size, (count, length))


def run(source: Checkpoint, method: str = "gptq", **options: object) -> list[QuantizedLayer]:
    rules = {name: Rule("proj", 4, 16, method) for name in linears(source.config)}
    layers: list[QuantizedLayer] = []
    quantize_layers(source, rules, windows(source), layers.append, **options)  # type: ignore[arg-type]
    return layers


def same(a: QuantizedLayer, b: QuantizedLayer) -> bool:
    return (
        all(
            np.array_equal(a.linears[n].codes, b.linears[n].codes)
            and np.array_equal(a.linears[n].scales, b.linears[n].scales)
            for n in a.linears
        )
        and all(np.array_equal(a.norms[n], b.norms[n]) for n in a.norms)
        and (a.key_peak, a.value_peak) == (b.key_peak, b.value_peak)
    )


@pytest.mark.parametrize("method", ["nearest", "awq", "gptq", "descent", "best"])
def test_every_layer_is_handed_over_in_order(source: Checkpoint, method: str) -> None:
    seen: list[tuple[int, int]] = []
    layers = run(source, method, progress=lambda done, total: seen.append((done, total)))
    assert [layer.number for layer in layers] == [0, 1, 2]
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    for layer in layers:
        assert set(layer.weights(source.config)) == set(layer_weights(source.config, layer.number))
        assert layer.key_peak > 0 and layer.value_peak > 0


def test_two_runs_are_equal(source: Checkpoint) -> None:
    assert all(same(a, b) for a, b in zip(run(source), run(source), strict=True))


@pytest.mark.parametrize("method", ["awq", "gptq", "best"])
@pytest.mark.parametrize("known", [1, 2])
def test_resumed_is_uninterrupted(source: Checkpoint, known: int, method: str) -> None:
    whole = run(source, method)
    rest = run(source, method, finished=lambda number: whole[number] if number < known else None)
    assert [layer.number for layer in rest] == list(range(known, 3))
    assert all(same(a, b) for a, b in zip(rest, whole[known:], strict=True))


def test_a_linear_is_calibrated_on_the_quantized_ones_before_it(source: Checkpoint) -> None:
    layers = run(source)
    weights = {
        EMBEDDING: source.tensor(EMBEDDING).load(),
        **{k: v for layer in layers for k, v in layer.weights(source.config).items()},
    }
    ids = windows(source)
    inputs = []

    class Watch(Eager):
        def tap_linear(self, weight: str, x: np.ndarray) -> None:
            if weight == "layers.1.mlp.down_proj.weight":
                inputs.append(x)

    ops, at = Watch(source.config, weights.__getitem__), causal_positions(source.config, ids.shape[1])
    stream = embed(ops, ids)
    for number in range(2):
        stream, _ = block(ops, number, stream, at, None)
    states = embed_windows(source.config, weights[EMBEDDING], ids)
    LayerWalk(source.config, weights, 0, states, at).finish()
    steps, groups = LayerWalk(source.config, weights, 1, states, at), []
    while names := steps.advance():
        groups.append(names)
        last = np.concatenate(steps.inputs)
    assert groups == [tuple(row.name for row in group) for group in input_groups(source.config, 1)]
    assert np.allclose(last, inputs[0], atol=ORDER_NOISE * np.abs(inputs[0]).max())


def test_cores_share_few_windows() -> None:
    for count, length, expected in ((2, 512, [1, 1]), (8, 48, [1] * 8), (20, 64, [2] * 10), (64, 512, [4] * 16)):
        assert [len(batch) for batch in window_batches(np.zeros((count, length)))] == expected


@pytest.mark.parametrize("tokens", [1, 80, 10_000])
def test_windows_that_walk_together_do_not_matter(
    source: Checkpoint, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = windows(source, count=5)
    weights = {name: source.tensor(name).load() for name in layer_weights(source.config, 0)}
    at = causal_positions(source.config, ids.shape[1])
    whole = embed_windows(source.config, source.tensor(EMBEDDING).load(), ids)
    stream, (keys, values) = block(Eager(source.config, weights.__getitem__), 0, Residual(whole), at, None)
    expected = stream.settle(Eager(source.config, {}.__getitem__))
    monkeypatch.setattr(windows_module, "_TOKENS", tokens)
    monkeypatch.setattr(windows_module, "_BATCHES", 1)
    states = embed_windows(source.config, source.tensor(EMBEDDING).load(), ids)
    steps = LayerWalk(source.config, weights, 0, states, at)
    while steps.advance():
        assert sum(map(len, steps.inputs)) == len(ids) and len(steps.inputs) == -(-5 // max(1, tokens // 40))
    assert np.abs(states - expected).max() < ORDER_NOISE * np.abs(expected).max()
    assert steps.key_peaks == pytest.approx(np.abs(keys).max((0, 3)), rel=ORDER_NOISE)
    assert steps.value_peaks == pytest.approx(np.abs(values).max((0, 2)), rel=ORDER_NOISE)


def test_large_hidden_states_are_in_a_file(source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    table, ids = source.tensor(EMBEDDING).load(), windows(source)
    monkeypatch.setattr(windows_module, "_MAPPED", 0)
    states = embed_windows(source.config, table, ids)
    assert isinstance(states, np.memmap)
    assert np.array_equal(states, table[ids])


def test_hidden_states_without_room_are_one_line(source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_module, "_MAPPED", 0)
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    with pytest.raises(CalibrationError, match=r"has 0\.0 GB free and hidden states take .* set TMPDIR to a folder"):
        embed_windows(source.config, source.tensor(EMBEDDING).load(), windows(source))


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e30])
def test_weights_that_no_scale_can_hold_are_one_line(source: Checkpoint, value: float) -> None:
    name = "layers.1.mlp.up_proj.weight"
    broken = source.tensor(name).load()
    broken[3, 5] = value

    class Broken:
        config = source.config

        def tensor(self, wanted: str) -> LazyTensor:
            found = source.tensor(wanted)
            return replace(found, read=lambda start, stop: broken[start:stop]) if wanted == name else found

    rules = {name: Rule("proj", 4, None, "nearest") for name in linears(source.config)}
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight has a value that is no number or beyond"
    ):
        quantize_layers(Broken(), rules, windows(source), lambda layer: None)


@pytest.mark.parametrize("method", ["gptq", "best"])
def test_jobs_do_not_matter(source: Checkpoint, method: str) -> None:
    assert all(same(a, b) for a, b in zip(run(source, method, jobs=1), run(source, method, jobs=3), strict=True))


def test_follower_computes_what_the_decoder_says(source: Checkpoint) -> None:
    ids = np.random.default_rng(2).integers(0, source.config.vocab_size, (2, 150))  # more than one run of queries
    weights = {name: source.tensor(name).load() for name in [EMBEDDING, *layer_weights(source.config, 0)]}
    at = causal_positions(source.config, ids.shape[1])
    results = []
    for ops in (Eager(source.config, weights.__getitem__), LeanEager(source.config, weights)):
        stream: Residual[np.ndarray] = embed(ops, ids)
        stream, _ = block(ops, 0, stream, at, None)
        results.append(stream.settle(ops))
    assert np.abs(results[0] - results[1]).max() < ORDER_NOISE * np.abs(results[0]).max()


def test_table_is_rounded(source: Checkpoint) -> None:
    table = quantize_table(source, EMBEDDING, Rule("embed", 8, None, "nearest"))
    exact = source.tensor(EMBEDDING).load()
    assert np.abs(dequantize(table) - exact).max() <= np.abs(exact).max() / 127


@pytest.mark.parametrize("keep", [False, True])
def test_a_table_in_strips_is_the_table(source: Checkpoint, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Rule("embed", 8, None, "nearest")
    whole = quantize_table(source, EMBEDDING, rule, keep=keep)
    monkeypatch.setattr("headrace.quantize.tables._ROWS", 7)
    strips = quantize_table(source, EMBEDDING, rule, keep=keep)
    np.testing.assert_array_equal(strips.codes, whole.codes)
    np.testing.assert_array_equal(strips.scales, whole.scales)


@pytest.mark.parametrize("of", ["array", "tensor", "codes"])
def test_windows_take_the_rows_of_their_tokens(source: Checkpoint, of: str) -> None:
    tensor, ids = source.tensor(EMBEDDING), windows(source)
    codes = quantize_table(source, EMBEDDING, Rule("embed", 8, None, "nearest"))
    table = {"array": tensor.load(), "tensor": tensor, "codes": codes}[of]
    expected = dequantize(codes) if of == "codes" else tensor.load()
    np.testing.assert_array_equal(embed_windows(source.config, table, ids), expected[ids])


def test_unknown_method_and_block_are_refused(source: Checkpoint) -> None:
    with pytest.raises(RecipeError, match="method 'gtpq' is unknown"):
        run(source, "gtpq")
    rules = {name: Rule("proj", 4, 64, "nearest") for name in linears(source.config)}
    with pytest.raises(RecipeError, match="block 64 does not divide"):
        quantize_layers(source, rules, windows(source), lambda layer: None)


def test_windows_are_spread_and_short_text_is_refused() -> None:
    ids = np.arange(1000)
    assert cut_windows(ids, 100, 3)[:, 0].tolist() == [0, 400, 900]
    assert cut_windows(ids, 100, 50).shape == (10, 100)
    assert evenly_spaced(ids[:, None], 4)[:, 0].tolist() == [0, 333, 666, 999]
    with pytest.raises(CalibrationError, match="1000 tokens, which is less than one window of 1001"):
        cut_windows(ids, 1001, 1)


def test_attention_energy_is_the_squared_shares_in_proportion_to_the_stream(source: Checkpoint) -> None:
    ids = windows(source, length=150)  # more than one run of queries
    weights = {name: source.tensor(name).load() for name in [EMBEDDING, *layer_weights(source.config, 0)]}
    at = causal_positions(source.config, ids.shape[1])
    shares = []

    class Watch(Eager):
        def tap(self, name: str, value: np.ndarray) -> np.ndarray:
            if name.endswith("self_attn.weights"):
                shares.append(value)
            return value

    ops = Watch(source.config, weights.__getitem__)
    stream = embed(ops, ids)
    block(ops, 0, stream, at, None)
    exact = np.einsum("bhqt,bhqt,bq->bt", shares[0], shares[0], 1 / np.square(stream.x).sum(2))
    energy = attention_energy(source.config, weights, 0, stream.x, at)
    assert np.allclose(energy, exact, rtol=1e-3)


def test_tokens_count_by_attention_for_values_of_any_bits(source: Checkpoint) -> None:
    """A value's error reaches whoever attends to its token; whether keys have 4 bits or 8 does not matter to that."""
    value, key = ("layers.0.self_attn.v_proj.weight", "layers.0.self_attn.k_proj.weight")
    found = []
    for bits in (4, 8):
        rules = {name: Rule("proj", 8, None, "gptq") for name in linears(source.config)}
        rules[key] = replace(rules[key], bits=bits)
        layers: list[QuantizedLayer] = []
        quantize_layers(source, rules, windows(source), layers.append)
        found.append(layers[0].linears[value].codes)
    assert np.array_equal(*found)
