"""The estimate of phones: workloads by hand, every published row within what is told, and limits that suggest."""

from __future__ import annotations

import pytest

from headrace.forecast.fit import PART_LIMIT, memory_fit, part_fit
from headrace.forecast.roofline import Workload, calibration, chips, estimate_decode, estimate_step, published
from headrace.targets.qualcomm.soc import SOCS

H, F, V = 4096, 11008, 125696
BAICHUAN2 = {
    "layers": 32, "hidden": H, "heads": 32, "kv_heads": 32, "head_dim": 128, "feed_forward": F, "vocabulary": V,
}  # fmt: skip
# The largest error that leaving a row out gives; published cards differ by SDK release, which no geometry tells.
LEFT_OUT = 0.25


def test_a_workload_by_hand() -> None:
    work = Workload.of(**BAICHUAN2, context=4096)
    linears = 32 * (4 * H * H + 3 * H * F)
    assert work.weight_bytes == linears / 2 + V * H
    assert work.cache_bytes == 2 * 32 * 4096 * 4096 == 1 << 30
    assert work.step_operations == 2 * 128 * (linears + V * H + 2 * 32 * 4096 * 4096)
    assert work.token_bytes == work.weight_bytes + 3 * (1 << 30)
    grouped = Workload.of(**(BAICHUAN2 | {"kv_heads": 8}), context=1024, weight_bytes=4e9)
    assert (grouped.weight_bytes, grouped.cache_bytes) == (4e9, 1 << 26)


def test_every_published_row_is_told_without_itself() -> None:
    report = calibration()
    assert [(row["model"], row["tok_s"]) for row in report] == [
        ("Baichuan2-7B", 7.72),
        ("Qwen2-7B", 13.65),
        ("Llama-3-8B", 12.93),
        ("Llama-3.1-8B", 14.63),
        ("Llama-2-7B", 17.94),
        ("Qwen3-4B", 24.39),
        ("Llama-3.1-8B", 16.14),
    ]
    for row in report:
        assert abs(row["error"]) < LEFT_OUT, row
        assert row["error"] == pytest.approx(row["estimated"] / row["tok_s"] - 1, abs=1e-3)
    # Two rows state a step's time; each is estimated from the other alone.
    assert [row["step_seconds"] for row in report if row["step_error"] is not None] == [0.208, 0.1425]


def test_the_range_holds_the_rows_and_no_more() -> None:
    for row in published():
        told = estimate_decode(row.chip, row.workload)
        assert told.low <= row.tok_s * 1.0001 and row.tok_s <= told.high * 1.0001
        assert told.low < told.middle < told.high < chips()[row.chip] / row.workload.token_bytes
    for row in published():
        if row.step_seconds is not None:
            step = estimate_step(row.chip, row.workload)
            assert step is not None
            assert step.low <= row.step_seconds * 1.0001 and row.step_seconds <= step.high * 1.0001


def test_a_chip_without_a_published_step_gets_none() -> None:
    work = Workload.of(**BAICHUAN2, context=4096)
    assert set(chips()) <= {soc.name for soc in SOCS}  # of others no data sheet states the memory's bandwidth
    assert estimate_step("snapdragon-8-gen2", work) is None
    slower, faster = (estimate_decode(f"snapdragon-8-{name}", work) for name in ("gen2", "elite"))
    assert slower.middle / faster.middle == pytest.approx(67.2 / 84.8)
    assert set(faster.to_dict()) == {"estimated", "low", "high"}


def test_a_part_that_is_too_large_takes_more_parts() -> None:
    def sizes(parts: int) -> list[int]:
        return [int(7e9) // (parts - 1)] * (parts - 1)

    fine = part_fit(sizes, 5, 33)
    assert fine.ok and fine.change is None
    large = part_fit(sizes, 4, 33)
    assert not large.ok and large.change == "--parts 5"
    assert sizes(5)[0] <= PART_LIMIT < large.needed
    hopeless = part_fit(lambda parts: [3_000_000_000] * parts, 5, 9)
    assert hopeless.change is not None and "one table alone" in hopeless.change


@pytest.mark.parametrize(
    ("weights", "token", "contexts", "kv", "bits", "memory", "change"),
    [
        (4_270_000_000, 262_144, (4096,), "int8", 4.0, 12e9, None),
        (4_270_000_000, 4 * 262_144, (4096,), "float32", 4.0, 12e9, "--kv int8"),
        (4_270_000_000, 262_144, (1024, 4096), "int8", 4.0, 9e9, "--context 768"),
        (4_270_000_000, 262_144, (512, 4096), "int8", 4.0, 9e9, "--context 512"),
        (4_270_000_000, 4 * 262_144, (4096,), "float32", 4.0, 9.5e9, "--kv int8 --context 1792"),
        (5_060_000_000, 262_144, (4096,), "int8", 5.4, 9e9, "--size 4432891136 (now 5060000000 bytes of weights)"),
        (7_000_000_000, 262_144, (4096,), "int8", 4.0, 12e9, "a smaller model: 4-bit weights alone are too large"),
    ],
)
def test_the_cheapest_change(weights, token, contexts, kv, bits, memory, change) -> None:
    told = memory_fit(weights, token, contexts, kv, bits, int(memory))
    assert told.ok is (change is None)
    assert told.change == change
