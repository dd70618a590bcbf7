"""bench: the keys others read, numbers that belong together, and prompts that fit."""

from __future__ import annotations

import pytest

from headrace.bundle.folder import open_bundle
from headrace.errors import ContextFull
from headrace.measure.bench import bench_bundle, peak_rss
from tests.exports import CONTEXT, LAYERS, Exports

SMALL = {"prompts": (16, 40), "tokens": 4, "depth": 8, "repeats": 3}


def test_the_report(exports: Exports) -> None:
    steps: list[tuple[int, int]] = []
    report = bench_bundle(exports.bundle(), **SMALL, progress=lambda _, done, total: steps.append((done, total)))
    assert set(report) >= {
        "load_ms", "prompts", "decode_tok_s", "depth", "tokens", "repeats", "threads", "peak_rss_bytes", "kv_bytes",
        "weight_bytes",
    }  # fmt: skip
    assert [p["tokens"] for p in report["prompts"]] == [16, 40]
    for p in report["prompts"]:
        assert p["tok_s"] == pytest.approx(p["tokens"] / p["ttft_ms"] * 1000, rel=0.02)  # both are rounded
    assert report["load_ms"] > 0
    assert report["decode_tok_s"] > 0
    assert report["kv_bytes"] == 2 * LAYERS * 2 * 16 * CONTEXT
    assert report["weight_bytes"] == open_bundle(exports.bundle()).weight_bytes
    assert report["peak_rss_bytes"] > 10_000_000
    assert (report["depth"], report["tokens"], report["repeats"]) == (8, 4, 3)
    assert steps == [(n, len(steps)) for n in range(1, len(steps) + 1)]


def test_without_prompts_or_depth(exports: Exports) -> None:
    report = bench_bundle(exports.bundle(), prompts=(), tokens=2, depth=0, repeats=1)
    assert report["prompts"] == []
    assert report["decode_tok_s"] > 0


@pytest.mark.parametrize(
    ("options", "needed"), [({"prompts": (16, CONTEXT)}, CONTEXT), ({"depth": 150, "tokens": 60}, 210)], ids=str
)
def test_what_does_not_fit(exports: Exports, options: dict, needed: int) -> None:
    with pytest.raises(ContextFull) as error:
        bench_bundle(exports.bundle(), **{**SMALL, **options})
    assert error.value.needed == needed


def test_peak_memory_grows_with_use() -> None:
    before = peak_rss()
    block = bytearray(64 << 20)
    block[::4096] = b"\1" * len(block[::4096])
    assert peak_rss() >= max(before, 64 << 20)
