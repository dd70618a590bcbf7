"""Encodings: 0 is a code, ranges are held, files come back, and the grids the graph's structure asks for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.bundle.encodings import (
    ANGLE,
    ATTENTION_MASK,
    Encoding,
    mask_encoding,
    port_encodings,
    read_encodings,
    write_encodings,
)
from headrace.bundle.grid import Grid
from headrace.config import ModelConfig
from headrace.errors import BundleError, CalibrationError
from headrace.model.decoder import block, embed
from headrace.model.ops import Array, Eager
from headrace.plan import plan_parts
from headrace.quantize.device_encodings import HEADROOM, LEAST_MASK_DEPTH, MASK_LEAD, device_encodings
from headrace.quantize.ranges import Ranges, collect_ranges, mask_gap
from headrace.quantize.windows import causal_positions

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    max_context=128,
    tied_head=True,
)
FLOAT32_SLACK = 1.001  # scales are float32, so the ends of a range are a rounding off

ALONE = causal_positions(CONFIG, 1), None

limits = st.floats(-1e5, 1e5, width=32)


def weights(name: str) -> Array:
    shapes = {"q": (16, 16), "k": (8, 16), "v": (8, 16), "o": (16, 16), "gate": (24, 16), "up": (24, 16)}
    rng = np.random.default_rng(sum(name.encode()))
    if "norm" in name:
        return np.ones(16, np.float32)
    shape = (40, 16) if "embed" in name else shapes.get(name.split(".")[-2].split("_")[0], (16, 24))
    return rng.normal(0, 0.3, shape).astype(np.float32)


@pytest.fixture(scope="module")
def ranges() -> Ranges:
    return collect_ranges(CONFIG, weights, np.random.default_rng(0).integers(0, 40, (5, 32)))


@given(low=limits, high=limits, bits=st.sampled_from([8, 16]))
def test_a_range_is_held_and_zero_is_a_code(low: float, high: float, bits: int) -> None:
    low, high = min(low, high), max(low, high)
    e = Encoding.of_range(low, high, bits)
    assert 0 <= e.zero_point <= e.top
    assert e.dequantize(e.quantize(np.zeros(1)))[0] == 0
    x = np.linspace(low, high, 101, dtype=np.float32)
    # Half a step, and half a step more at the ends, where the zero point's own rounding shifts the grid.
    assert np.abs(e.simulate(x) - x).max() <= e.scale * FLOAT32_SLACK + max(abs(low), abs(high)) * 1e-6


@given(low=limits, high=limits, seed=st.integers(0, 99))
def test_simulation_is_quantizing_and_back(low: float, high: float, seed: int) -> None:
    e = Encoding.of_range(min(low, high), max(low, high))
    x = np.random.default_rng(seed).normal(0, 1 + abs(low), 50).astype(np.float32)
    np.testing.assert_allclose(e.simulate(x), e.dequantize(e.quantize(x)), rtol=1e-6)


@given(x=st.floats(-1, 1))
def test_angles_are_rounded_down(x: float) -> None:
    code = int(ANGLE.floor(np.array([x]))[0])
    assert 0 <= code <= 65535
    assert (code - ANGLE.zero_point) * ANGLE.scale <= x or code == 0
    assert (code + 1 - ANGLE.zero_point) * ANGLE.scale > x or code == 65535


def test_mask_adds_zero_or_minus_its_depth() -> None:
    np.testing.assert_allclose(mask_encoding(70).dequantize(np.array([0, 65535], np.uint16)), [-70, 0], rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_range_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(CalibrationError, match="not finite"):
        Encoding.of_range(0, bad)


def test_keys_and_values_are_the_host_s_integers_plus_128(ranges: Ranges) -> None:
    scales = [(0.01 * (i + 1), 0.02) for i in range(3)]
    found = device_encodings(CONFIG, ranges, scales)
    x = np.random.default_rng(0).normal(0, 1, 1000).astype(np.float32)
    for i, (key, _) in enumerate(scales):
        host = np.clip(np.rint(x / np.float32(key)), -128, 127).astype(int)
        device = found[f"layers.{i}.self_attn.k_cache"].quantize(x).astype(int)
        np.testing.assert_array_equal(device, host + 128)


def test_structure_decides_some_grids(ranges: Ranges) -> None:
    found = device_encodings(CONFIG, ranges, [(0.01, 0.01)] * 3)
    assert set(ranges.seen) < set(found)
    for name in ("layers.0.self_attn.q_rope", "layers.2.self_attn.k_rope"):
        assert found[name] == found[f"{name}.low"] == found[f"{name}.high"]
        assert found[name].low <= min(ranges.seen[f"{name}.low"][0], ranges.seen[f"{name}.high"][0]) / FLOAT32_SLACK
    masked, scores = (found[f"layers.1.self_attn.{n}scores"] for n in ("masked_", ""))
    assert masked.low == pytest.approx(-LEAST_MASK_DEPTH, abs=2 * masked.scale)
    assert masked.high == pytest.approx(scores.high, abs=2 * masked.scale)
    assert found["layers.0.self_attn.weights"] == found["layers.0.mlp.silu.sigmoid"] == Encoding.of_range(0, 1)


def test_only_the_residual_stream_has_no_headroom(ranges: Ranges) -> None:
    found = device_encodings(CONFIG, ranges, [(0.01, 0.01)] * 3)
    for name in ("embed_tokens", "layers.0.attn_residual", "layers.2.residual", "layers.1.mlp.down_proj"):
        assert found[name] == Encoding.of_range(*ranges.seen[name])
    for name in ("lm_head", "norm", "layers.0.mlp.gated", "layers.2.self_attn.v_proj"):
        low, high = ranges.seen[name]
        assert found[name] == Encoding.of_range(1.25 * low, 1.25 * high)


def test_ranges_see_the_whole_table_and_every_layer(ranges: Ranges) -> None:
    table = weights("embed_tokens.weight")
    assert ranges.seen["embed_tokens"] == (table.min(), table.max())
    assert {"layers.0.residual", "layers.2.mlp.gated", "norm", "lm_head"} <= set(ranges.seen)
    assert len([name for name in ranges.seen if name.startswith("layers.0.")]) * 3 + 3 == len(ranges.seen)
    assert all(low <= high for low, high in ranges.seen.values())


def test_grids_hold_at_positions_that_calibration_did_not_reach() -> None:
    tokens = np.random.default_rng(0).permutation(40)
    found = device_encodings(CONFIG, collect_ranges(CONFIG, weights, tokens.reshape(10, 4)), [(0.01, 0.01)] * 3)

    class Watched(Eager):
        seen = 0

        def tap(self, name: str, value: Array) -> Array:
            if name.startswith(("layers.0.self_attn.q_", "layers.0.self_attn.k_rope")):  # known of each token
                grid = found[name]
                low, high = (HEADROOM * end / FLOAT32_SLACK for end in (value.min(), value.max()))
                assert grid.low <= low and high <= grid.high, f"{name} grows into the headroom"
                self.seen += 1
            return value

    watched = Watched(CONFIG, weights)
    ids = np.tile(tokens, 3)[None]
    block(watched, 0, embed(watched, ids), causal_positions(CONFIG, ids.shape[1]), None)
    assert watched.seen == 2 * 6 + 2  # the products and halves of both rotations, the projection, the scaled queries


def test_any_token_may_be_the_first() -> None:
    seen = collect_ranges(CONFIG, weights, np.random.default_rng(0).integers(0, 5, (3, 16))).seen

    class Watched(Eager):
        def tap(self, name: str, value: Array) -> Array:
            low, high = seen[name]
            slack = (FLOAT32_SLACK - 1) * (high - low)
            assert low - slack <= value.min() and value.max() <= high + slack, name
            return value

    for token in range(40):
        block(Watched(CONFIG, weights), 0, embed(Eager(CONFIG, weights), np.array([[token]])), *ALONE)


def test_ranges_do_not_depend_on_how_windows_are_split(ranges: Ranges) -> None:
    windows = np.random.default_rng(0).integers(0, 40, (5, 32))
    done: list[tuple[int, int]] = []
    halves = [
        collect_ranges(CONFIG, weights, w, progress=lambda a, b: done.append((a, b)))
        for w in (windows[:2], windows[2:])
    ]
    for name, (low, high) in ranges.seen.items():
        assert min(h.seen[name][0] for h in halves) == pytest.approx(low, rel=1e-5)
        assert max(h.seen[name][1] for h in halves) == pytest.approx(high, rel=1e-5)
    assert done[-1] == (3, 3)


def test_ports_take_the_grid_of_what_they_carry(ranges: Ranges) -> None:
    found = device_encodings(CONFIG, ranges, [(0.01, 0.03)] * 3)
    ports = port_encodings(plan_parts(CONFIG, 3), found)
    assert ports["hidden_1"] == found["embed_tokens"]
    assert ports["hidden_2"] == found["layers.1.residual"]
    assert ports["logits"] == found["lm_head"]
    assert ports["past_key_2_in"] == ports["past_key_2_out"] == Encoding(float(np.float32(0.01)), 128, 8)
    assert ports["attention_mask"] == mask_encoding(LEAST_MASK_DEPTH)
    assert "input_ids" not in ports
    with pytest.raises(CalibrationError, match=r"'embed_tokens' \(port hidden_1\)"):
        port_encodings(plan_parts(CONFIG, 3), {n: e for n, e in found.items() if n != "embed_tokens"})


def test_missing_scales_and_ranges_are_named(ranges: Ranges) -> None:
    with pytest.raises(CalibrationError, match=r"0 layers; expected 3.*int8 KV"):
        device_encodings(CONFIG, ranges, [])
    seen = {name: r for name, r in ranges.seen.items() if name != "layers.1.self_attn.q_rope.low"}
    short = replace(ranges, seen=seen)
    with pytest.raises(CalibrationError, match=r"layers\.1\.self_attn\.q_rope\.low"):
        device_encodings(CONFIG, short, [(0.01, 0.01)] * 3)


def test_the_mask_is_as_deep_as_the_deepest_gap_asks(ranges: Ranges) -> None:
    assert set(ranges.mask_gaps) == {f"layers.{i}.self_attn" for i in range(3)}
    deep = replace(ranges, mask_gaps={**ranges.mask_gaps, "layers.1.self_attn": 64.0})
    found = device_encodings(CONFIG, deep, [(0.01, 0.01)] * 3)
    assert found[ATTENTION_MASK] == mask_encoding(HEADROOM * 64 + MASK_LEAD)
    for layer in range(3):
        masked = found[f"layers.{layer}.self_attn.masked_scores"]
        assert masked.low == pytest.approx(-100, abs=2 * masked.scale)
    short = replace(ranges, mask_gaps={"layers.1.self_attn": 1.0})
    with pytest.raises(CalibrationError, match="scores of 1 of 3 layers"):
        device_encodings(CONFIG, short, [(0.01, 0.01)] * 3)


def test_a_mask_gap_is_what_a_token_s_best_score_lacks() -> None:
    mask = causal_positions(CONFIG, 3).mask
    scores = np.array([[[[-64, 9, 9], [1, -3, 4], [-1, -2, -9]]]], np.float32)
    assert mask_gap(scores[:, :, 1:2], mask[:, :, 1:2]) == 3  # 4 of a later token, 1 of the first
    assert mask_gap(scores[:, :, 2:], mask[:, :, 2:]) == 1  # an empty position scores 0
    assert mask_gap(scores, mask) == 73
    assert mask_gap(np.abs(scores[:, :, 2:]), mask[:, :, 2:]) == 0


@pytest.mark.parametrize("depth", [50, 100])
def test_an_older_file_keeps_its_mask(ranges: Ranges, depth: int, tmp_path: Path) -> None:
    """Files of before the mask was calibrated say its depth by their first layer's masked scores."""
    found = device_encodings(CONFIG, ranges, [(0.01, 0.01)] * 3)
    del found[ATTENTION_MASK]
    scores = found["layers.0.self_attn.scores"]
    found["layers.0.self_attn.masked_scores"] = Encoding.of_range(scores.low - depth, scores.high)
    path = tmp_path / "encodings.json"
    write_encodings(path, found)
    assert read_encodings(path)[ATTENTION_MASK] == mask_encoding(depth)


def test_a_file_comes_back(ranges: Ranges, tmp_path: Path) -> None:
    found = device_encodings(CONFIG, ranges, [(0.01, 0.02)] * 3)
    path = tmp_path / "encodings.json"
    scales = np.array([[0.5], [0.25]], np.float16)
    blocks = np.array([[0.5, 0.25, 0.03125], [0.75, 0.046875, 0.375]], np.float16)
    eighths = np.array([[4.0, 0.5], [2.0, 1.0]], np.float16)
    weights = {
        "lm_head.weight": (Grid(8), scales),
        "linear": (Grid(4, 32, lpbq=True), blocks),
        "five": (Grid(5, 32, lpbq=True), eighths),
    }
    write_encodings(path, found, weights)
    assert read_encodings(path) == found
    raw = json.loads(path.read_text())
    assert raw["version"] == "1.0.0"
    entry = next(e for e in raw["activation_encodings"] if e["name"] == "layers.0.self_attn.k_cache")
    assert (entry["bw"], entry["offset"], entry["enc_type"]) == (8, [-128], "PER_TENSOR")
    assert raw["param_encodings"] == [
        {
            "name": "lm_head.weight",
            "dtype": "INT",
            "enc_type": "PER_CHANNEL",
            "bw": 8,
            "is_sym": True,
            "scale": [0.5, 0.25],
            "offset": [-128, -128],
        },
        {
            "name": "linear",
            "dtype": "INT",
            "enc_type": "LPBQ",
            "bw": 8,
            "compressed_bw": 4,
            "block_size": 32,
            "is_sym": True,
            "scale": [0.03125, 0.046875],
            "offset": [-128, -128],
            "per_block_int_scale": [16, 8, 1, 16, 1, 8],
        },
        {
            "name": "five",
            "dtype": "INT",
            "enc_type": "PER_CHANNEL",
            "bw": 8,
            "is_sym": True,
            "scale": [0.5, 0.25],
            "offset": [-128, -128],
        },
    ]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": "0.6.1"}', '{"version": "1.0.0", "activation_encodings": 3}']
)
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "encodings.json"
    path.write_text(text)
    with pytest.raises(BundleError, match="export again"):
        read_encodings(path)
