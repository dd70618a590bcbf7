"""plan: figures of Baichuan2-7B's geometry against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from headrace.bundle.folder import open_bundle
from headrace.bundle.recipe import Recipe, Rule, load_recipe
from headrace.config import ModelConfig
from headrace.errors import RecipeError
from headrace.exporter.estimate import _PASSING, _SOLVING_SHARE, estimate_export, plan_export
from headrace.exporter.options import ExportOptions
from headrace.exporter.settings import settle
from headrace.forecast.model import plan_model
from headrace.forecast.roofline import chips, published
from headrace.model.weights import linears, quantized_weights
from headrace.plan import plan_parts
from headrace.quantize.budget import grids_to_try
from headrace.quantize.methods import METHODS
from headrace.targets.qualcomm.compile_cost import estimate_compile
from headrace.targets.qualcomm.soc import SOCS
from tests.exports import CONTEXT, SMALL, Exports

BAICHUAN2 = ModelConfig(
    architecture="baichuan", vocab_size=125696, hidden_size=4096, intermediate_size=11008, num_layers=32,
    num_heads=32, num_kv_heads=32, head_dim=128, rms_norm_eps=1e-6, rope_theta=10000.0, max_context=4096,
    tied_head=False,
)  # fmt: skip


def planned(
    config: ModelConfig = BAICHUAN2, recipe: Recipe | None = None, contexts: tuple[int, ...] = (4096,)
) -> dict[str, Any]:
    return plan_model(config, recipe or load_recipe("w4a16"), plan_parts(config), contexts)


H, F, V = 4096, 11008, 125696
CODES = (4 * H * H + 3 * H * F) // 2  # of a layer: q k v o, gate up down, two codes a byte
LAYER = CODES + 4 * (4 * H + 2 * F + H) + 2 * 4 * H  # a float32 scale a row, two float32 norms
TABLE = V * H + 4 * V  # int8 and a scale a row
HEADER = 0.001  # a safetensors file begins with its tensors' names


def test_bytes_of_every_part() -> None:
    plan = planned()
    assert [part["layers"] for part in plan["parts"]] == [0, 8, 8, 8, 8]
    expected = [TABLE, 8 * LAYER, 8 * LAYER, 8 * LAYER, 8 * LAYER + 4 * H + TABLE]
    found = [part["weight_bytes"] for part in plan["parts"]]
    assert found == [pytest.approx(size, rel=HEADER) for size in expected]
    assert plan["weight_bytes"] == sum(found)
    assert 4.0e9 < plan["weight_bytes"] < 5.06e9  # the card's 5.06 GB holds more 8-bit layers


@pytest.mark.parametrize(("bits", "a_block"), [(5, 10), (6, 12)])  # 16 codes of so many bits
def test_five_and_six_bits_are_as_many_on_disk_and_eight_on_a_phone(bits: int, a_block: int) -> None:
    tables, own = load_recipe("w4a16").rules
    recipe = Recipe("r", (tables, replace(own, bits=bits, block=16, lpbq=True)))
    weights, beside = 4 * H * H + 3 * H * F, 2 * (4 * H + 2 * F + H) + 2 * 4 * H  # codes, scales of rows and norms
    layer, on_phone = weights // 16 * a_block + weights // 32 + beside, weights + beside  # a factor has half a byte
    plan = planned(recipe=recipe)
    assert plan["parts"][1]["weight_bytes"] == pytest.approx(8 * layer, rel=HEADER)
    largest, memory = plan["fits"]
    assert memory["needed"] == pytest.approx(2 * TABLE + 32 * on_phone + (1 << 30), rel=HEADER)
    assert largest["needed"] == pytest.approx(TABLE + 8 * on_phone, rel=HEADER)
    eight = planned(recipe=Recipe("r", (tables, replace(own, bits=8))))
    assert [phone["tok_s"] for phone in plan["phones"]] == [phone["tok_s"] for phone in eight["phones"]]


def test_a_rotated_model_has_a_head_of_its_own() -> None:
    recipe, tied = load_recipe("w4a16"), replace(BAICHUAN2, tied_head=True)

    plain = planned(tied, recipe)["weight_bytes"]
    settled = replace(BAICHUAN2, tied_head=False)  # as quantize/rotation.py has it
    assert planned(settled, replace(recipe, rotate=True))["weight_bytes"] - plain == pytest.approx(
        V * H + 2 * V, rel=HEADER
    )


def test_the_cache_grows_with_the_context() -> None:
    plan = planned(contexts=(512, 4096))
    short, long = plan["contexts"]
    assert long["kv_bytes"] == 1 << 30  # 2 · 32 layers · 4096 · 4096 tokens, a byte each
    assert short["kv_bytes"] * 8 == long["kv_bytes"]
    assert long["run_bytes"] == plan["weight_bytes"] + (1 << 30)
    recipe = replace(load_recipe("w4a16"), kv="float32")
    assert planned(recipe=recipe)["contexts"][0]["kv_bytes"] == 4 << 30
    assert planned(replace(BAICHUAN2, num_kv_heads=4))["contexts"][0]["kv_bytes"] == 1 << 27


def test_decoding_is_bound_by_what_a_token_moves() -> None:
    plan = planned()
    moved = 32 * (CODES + 2 * (5 * H + 2 * F)) + TABLE + 3 * (1 << 30)  # all linears, the head, the cache thrice
    shares = [row.share for row in published()]
    assert {row["device"] for row in plan["phones"]} == set(chips()) <= {soc.name for soc in SOCS}
    for row in plan["phones"]:
        peak = chips()[row["device"]] / moved
        assert row["tok_s"]["low"] == pytest.approx(peak * min(shares), rel=0.01)
        assert row["tok_s"]["high"] == pytest.approx(peak * max(shares), rel=0.01)
        assert row["tok_s"]["low"] < row["tok_s"]["estimated"] < row["tok_s"]["high"]
        assert row["steps"] == 31
    elite = plan["phones"][0]
    assert elite["ttft_seconds"]["estimated"] == pytest.approx(31 * elite["step_seconds"]["estimated"], rel=0.01)
    tied = planned(replace(BAICHUAN2, tied_head=True))
    assert tied["phones"][0]["tok_s"] == elite["tok_s"]  # the table is read as the head
    assert tied["weight_bytes"] == pytest.approx(plan["weight_bytes"] - TABLE, rel=HEADER)


def test_what_does_not_fit_has_a_change() -> None:
    largest, memory = planned()["fits"]
    assert largest["ok"] and memory["ok"]
    recipe = replace(load_recipe("w4a16"), kv="float32")
    assert planned(recipe=recipe)["fits"][1]["change"] == "--kv int8"
    in_one = plan_model(BAICHUAN2, load_recipe("w4a16"), plan_parts(BAICHUAN2, 2), (4096,))["fits"][0]
    assert in_one["change"] == "--parts 3"
    split = plan_model(BAICHUAN2, load_recipe("w4a16"), plan_parts(BAICHUAN2, 3), (4096,))
    assert max(p["weight_bytes"] for p in split["parts"]) <= in_one["limit"] < in_one["needed"]


MEASURED_PEAK = 5.65e9  # benchmarks/layer_7b.py descent: one layer, 32,768 tokens, a vocabulary of nothing


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> float:
    """Operations a second that estimates are made with, instead of this computer's; a core rounds at `ROUNDING`."""
    monkeypatch.setattr("headrace.exporter.estimate._core_speed", lambda: (1e11, ROUNDING))
    return 1e11


def rules(method: str) -> dict[str, Rule]:
    return load_recipe("w4a16").with_linears(linears(BAICHUAN2), method=method).resolve(quantized_weights(BAICHUAN2))


MOMENTS = 32768 * (4 * H**2 + F**2)  # T·K² for five moments
LINEARS = 32768 * 2 * 2 * CODES  # 2·T·N·K for seven linears
FACTORS = (6 * H**3 + F**3) / 3  # K³/3 for seven
ROUNDING = 2e-8  # seconds for a weight
ROUNDED = 2.5 * ROUNDING * (32 * 2 * CODES + 2 * V * H)  # once rounded, three times read at half of that
PROOF = 320 * 2 * (32 * 2 * CODES + V * H)  # 160 tokens through both models
ROWS = 4 * H * H * H + 2 * F * H * H + H * F * F  # N·K²


def test_the_export_grows_with_its_calibration(speed: float) -> None:
    few, many = (estimate_export(BAICHUAN2, rules("descent"), tokens) for tokens in (8192, 32768))
    products = ((32 * (MOMENTS + LINEARS) + PROOF) / _PASSING + 32 * (FACTORS + 6 * ROWS) / _SOLVING_SHARE) / speed
    assert many.work_seconds == pytest.approx(products + ROUNDED)
    assert many.seconds == pytest.approx(products / 2 + 0.8 * ROUNDED)
    assert 1 < many.seconds / few.seconds < 4
    assert few.peak_bytes < many.peak_bytes == pytest.approx(MEASURED_PEAK + V * H, rel=0.05)


def test_methods_and_budgets_cost_what_they_do(speed: float) -> None:
    seconds = {name: estimate_export(BAICHUAN2, rules(name), 32768).work_seconds for name in METHODS}
    assert seconds["nearest"] == pytest.approx((32 * LINEARS + PROOF) / (_PASSING * speed) + ROUNDED)
    gptq = (32 * (MOMENTS + LINEARS) + PROOF) / _PASSING + 32 * (FACTORS + ROWS) / _SOLVING_SHARE
    assert seconds["gptq"] == pytest.approx(gptq / speed + ROUNDED)
    assert sorted(seconds, key=seconds.__getitem__) == ["nearest", "awq", "gptq", "descent", "best"]
    blocks = load_recipe("w4b32").with_linears(linears(BAICHUAN2), method="gptq").resolve(quantized_weights(BAICHUAN2))
    none, two, all_of_them = (
        estimate_export(BAICHUAN2, blocks, 32768, ranked=2048, tried=tried)
        for tried in ({}, *(grids_to_try(BAICHUAN2, blocks, size=size) for size in (False, True)))
    )
    assert none.work_seconds == pytest.approx(seconds["gptq"])
    assert none.work_seconds < two.work_seconds < all_of_them.work_seconds
    assert none.peak_bytes < all_of_them.peak_bytes


def test_plan_forecasts_the_export_that_would_run(exports: Exports, speed: float) -> None:
    def forecast(**options: Any) -> dict[str, Any]:
        return plan_export(settle(exports.checkpoint(), ExportOptions.of({**SMALL, **options})))

    plain = forecast()
    assert plain["export"]["tokens"] == 2 * 48 and plain["compile"] is None
    assert [c["context"] for c in plain["contexts"]] == [CONTEXT]
    assert plain["weight_bytes"] == open_bundle(exports.bundle()).weight_bytes
    assert [p["weight_bytes"] for p in forecast(parts=3)["parts"]] == [
        file.stat().st_size for file in sorted((exports.bundle(parts=3) / "weights").iterdir())
    ]
    for scales in ("lpbq", "float16"):
        recipe = exports.mixed(scales)
        assert [p["weight_bytes"] for p in forecast(parts=3, recipe=recipe)["parts"]] == [
            file.stat().st_size for file in sorted((exports.bundle(parts=3, recipe=recipe) / "weights").iterdir())
        ]
    assert forecast(windows=4)["export"]["tokens"] == 4 * 48
    assert forecast(method="best")["export"]["seconds"] >= plain["export"]["seconds"]
    budget = open_bundle(exports.bundle(bits=6))
    assert forecast(bits=6)["weight_bytes"] == pytest.approx(budget.weight_bytes, rel=0.05)
    size = plain["weight_bytes"] + 9000
    assert plain["weight_bytes"] < forecast(size=size)["weight_bytes"] <= size
    with pytest.raises(RecipeError, match=r"block 128 does not divide"):
        forecast(block=128)


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
    assert estimate_compile(BAICHUAN2, parts, 2).seconds == pytest.approx(2 * whole.seconds)
