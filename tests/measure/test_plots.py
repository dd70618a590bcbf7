"""Pictures of measurements: they are drawn, the same from the same numbers, small, and say where they come from."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from headrace.measure.plots import Point, Series, plot_bench, plot_course, plot_kl, plot_speeds

pytestmark = pytest.mark.plots
PNG = b"\x89PNG\r\n\x1a\n"
SMALL = 60_000  # bytes of an SVG that a repository carries


def row(samples: list[float], **more: Any) -> dict[str, Any]:
    ordered = sorted(samples)
    return {"seconds": ordered[len(ordered) // 2], "fastest": ordered[0], "slowest": ordered[-1], "samples": samples,
            **more}  # fmt: skip


RECORD = {
    "runner": "host",
    "bundle": {"name": "river.bundle"},
    "machine": {"processor": "a processor"},
    "settings": {"threads": 2},
    "prompts": [row([0.1 * n, 0.11 * n, 0.12 * n], tokens=128 * n, formula_seconds=0.1 * n) for n in (1, 4, 32)],
    "decode": [row([1.0 + d, 1.1 + d, 1.2 + d], depth=1000 * d, tokens=16) for d in range(4)],
}


def texts(path: Path) -> str:
    return " ".join("".join(e.itertext()) for e in ET.parse(path).iter() if e.tag.endswith("text"))


def test_bench_is_drawn(tmp_path: Path) -> None:
    made = plot_bench(RECORD, tmp_path / "a")
    assert [path.name for path in made] == ["ttft.svg", "ttft.png", "decode.svg", "decode.png"]
    for path in made:
        assert path.stat().st_size < SMALL * 3
        if path.suffix == ".png":
            assert path.read_bytes().startswith(PNG)
    words = texts(made[0])
    for word in ("river: time to first token", "host, 2 threads, a processor", "by formula: steps × one step", "3.52"):
        assert word in words
    fast = [{**row, "tokens": 100_000} for row in RECORD["decode"]]
    words = texts(plot_bench({**RECORD, "decode": fast}, tmp_path / "fast")[2])
    assert "90,909" in words and "e+0" not in words
    again = plot_bench(RECORD, tmp_path / "b")
    assert [p.read_bytes() for p in made if p.suffix == ".svg"] == [p.read_bytes() for p in again if p.suffix == ".svg"]
    assert plot_bench({**RECORD, "prompts": [], "decode": []}, tmp_path / "c") == []


def test_quality_and_speed_are_drawn(tmp_path: Path) -> None:
    ours = Series("headrace", [Point("4 bits", 82e6, 0.2), Point("5.4 bits", 100e6, 0.08)], ours=True)
    theirs = Series("llama.cpp", [Point("Q4_0", 91e6, 0.295)])
    svg, png = plot_kl([ours, theirs], tmp_path / "kl", "KL against bytes", "a note")
    assert png.read_bytes().startswith(PNG) and svg.stat().st_size < SMALL
    assert all(word in texts(svg) for word in ("Q4_0", "5.4 bits", "headrace", "llama.cpp", "a note"))
    groups = [("tok/s", [("headrace", 100.0, 90.0, 110.0), ("llama.cpp", 90.0, 80.0, 95.0)])] * 2
    svg, _ = plot_speeds(groups, tmp_path / "speed", "Speed", "a note")
    assert svg.stat().st_size < SMALL and "llama.cpp" in texts(svg)


def test_a_long_note_is_not_cut_off(tmp_path: Path) -> None:
    from matplotlib.image import imread

    one = Series("headrace", [Point("a", 10e6, 0.1)], ours=True)
    _, png = plot_kl([one], tmp_path / "kl", "KL", "a note that is far too long for a picture; " * 4)
    assert (imread(png)[:60, -3:, :3] == 1).all(), "nothing reaches the right edge"


def test_a_course_is_drawn(tmp_path: Path) -> None:
    memory = [(float(second), 2e8 + 1e5 * second) for second in range(1800)]
    answers = [(float(second), 0.1, 1.0 + second % 7) for second in range(0, 1800, 3)]
    others = [(float(second), 0.5 * (second < 600)) for second in range(1800)]
    made = plot_course(memory, answers, tmp_path / "soak", "8 streams", "a note", others)
    assert [path.name for path in made] == ["soak.svg", "soak.png"] and made[0].stat().st_size < SMALL
    words = texts(made[0])
    for word in (
        "8 streams",
        "a note",
        "resident memory, MB",
        "first piece, median",
        "whole answer, 95 %",
        "grey: others",
    ):
        assert word in words
