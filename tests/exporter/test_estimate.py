"""plan: figures of Baichuan2-7B's geometry against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.bundle.recipe import load_recipe
from headrace.config import ModelConfig
from headrace.errors import ConfigError
from headrace.exporter.estimate import _EFFICIENCY, BANDWIDTHS, estimate_export, plan_model
from headrace.plan import plan_parts
from headrace.targets.qualcomm.compile_cost import estimate_compile
from headrace.targets.qualcomm.soc import SOCS

BAICHUAN2 = ModelConfig(
    architecture="baichuan", vocab_size=125696, hidden_size=4096, intermediate_size=11008, num_layers=32,
    num_heads=32, num_kv_heads=32, head_dim=128, rms_norm_eps=1e-6, rope_theta=10000.0, max_context=4096,
    tied_head=False,
)  # fmt: skip
H, F, V = 4096, 11008, 125696
CODES = (4 * H * H + 3 * H * F) // 2  # of a layer: q k v o, gate up down, two codes a byte
LAYER = CODES + 4 * (4 * H + 2 * F + H) + 2 * 4 * H  # a float32 scale a row, two float32 norms
TABLE = V * H + 4 * V  # int8 and a scale a row
HEADER = 0.001  # a safetensors file begins with its tensors' names


def test_bytes_of_every_part() -> None:
    plan = plan_model(BAICHUAN2, load_recipe("w4a16"))
    assert [part["layers"] for part in plan["parts"]] == [0, 8, 8, 8, 8]
    expected = [TABLE, 8 * LAYER, 8 * LAYER, 8 * LAYER, 8 * LAYER + 4 * H + TABLE]
    found = [part["weight_bytes"] for part in plan["parts"]]
    assert found == [pytest.approx(size, rel=HEADER) for size in expected]
    assert plan["weight_bytes"] == sum(found)
    assert 4.0e9 < plan["weight_bytes"] < 5.06e9  # the card's 5.06 GB holds more 8-bit layers


def test_a_rotated_model_has_a_head_of_its_own() -> None:
    recipe, tied = load_recipe("w4a16"), replace(BAICHUAN2, tied_head=True)
    plain = plan_model(tied, recipe)["weight_bytes"]
    assert plan_model(tied, replace(recipe, rotate=True))["weight_bytes"] - plain == pytest.approx(
        V * H + 2 * V, rel=HEADER
    )


def test_the_cache_grows_with_the_context() -> None:
    plan = plan_model(BAICHUAN2, load_recipe("w4a16"), contexts=(512, 4096))
    short, long = plan["contexts"]
    assert long["kv_bytes"] == 1 << 30  # 2 · 32 layers · 4096 · 4096 tokens, a byte each
    assert short["kv_bytes"] * 8 == long["kv_bytes"]
    assert long["run_bytes"] == plan["weight_bytes"] + (1 << 30)
    assert [step["steps"] for step in plan["prompt_steps"]] == [3, 31]
    recipe = replace(load_recipe("w4a16"), kv="float32")
    assert plan_model(BAICHUAN2, recipe)["contexts"][0]["kv_bytes"] == 4 << 30
    grouped = replace(BAICHUAN2, num_kv_heads=4)
    assert plan_model(grouped, load_recipe("w4a16"))["contexts"][0]["kv_bytes"] == 1 << 27


def test_decoding_is_bound_by_what_a_token_reads() -> None:
    plan = plan_model(BAICHUAN2, load_recipe("w4a16"))
    read = 32 * (CODES + 4 * (5 * H + 2 * F)) + TABLE + (1 << 30)  # all linears, the head, the cache
    for row in plan["decode"]:
        assert row["tok_s"] == pytest.approx(BANDWIDTHS[row["device"]] / read, rel=0.01)
    assert {row["device"] for row in plan["decode"]} == {soc.name for soc in SOCS}
    tied = plan_model(replace(BAICHUAN2, tied_head=True), load_recipe("w4a16"))
    assert tied["decode"][0]["tok_s"] == plan["decode"][0]["tok_s"]  # the table is read as the head
    assert tied["weight_bytes"] == pytest.approx(plan["weight_bytes"] - TABLE, rel=HEADER)


MEASURED_PEAK = 5.65e9  # benchmarks/layer_7b.py descent: one layer, 32,768 tokens, a vocabulary of nothing


def test_the_export_grows_with_its_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.exporter.estimate._matmul_speed", lambda: 1e11)
    few, many = (estimate_export(BAICHUAN2, tokens) for tokens in (8192, 32768))
    # A layer of 32,768 tokens: T·K² for five moments, 2·T·N·K for seven linears, K³/3
    # for seven factors, 6·N·K² to round.
    moments = 32768 * (4 * H**2 + F**2)
    linears = 2 * 32768 * 2 * CODES
    solved = (6 * H**3 + F**3) / 3 + 6 * (4 * H * H * H + 2 * F * H * H + H * F * F)
    assert many.seconds == pytest.approx(32 * (moments + linears + solved) / (_EFFICIENCY * 1e11))
    assert 1 < many.seconds / few.seconds < 4
    assert few.peak_bytes < many.peak_bytes == pytest.approx(MEASURED_PEAK + V * H, rel=0.05)


# benchmarks/snapdragon_7b.py: part → seconds, peak bytes, of S 128 and 1 over context 4096.
MEASURED = {1: (22, 4.39e9), 2: (187, 8.52e9), 3: (201, 8.52e9), 4: (214, 8.52e9), 5: (372, 12.23e9)}
MEASURED_TWO = 13.87e9  # part 2 over contexts 1024 and 4096


def test_compiling_costs_what_was_measured() -> None:
    parts = plan_parts(BAICHUAN2)
    whole = estimate_compile(BAICHUAN2, parts, 1)
    assert whole.seconds == pytest.approx(sum(seconds for seconds, _ in MEASURED.values()), rel=0.25)
    for part in parts:
        alone = estimate_compile(BAICHUAN2, [part], 1)
        assert alone.peak_bytes == pytest.approx(MEASURED[part.number][1], rel=0.25)
    assert estimate_compile(BAICHUAN2, parts[1:2], 2).peak_bytes == pytest.approx(MEASURED_TWO, rel=0.25)
    plan = plan_model(BAICHUAN2, load_recipe("w4a16"), contexts=(1024, 4096))
    assert plan["compile"]["seconds"] == pytest.approx(2 * whole.seconds, abs=0.1)


def test_what_does_not_fit_is_one_line() -> None:
    with pytest.raises(ConfigError, match="--parts 40 is not possible"):
        plan_model(BAICHUAN2, load_recipe("w4a16"), parts=40)
