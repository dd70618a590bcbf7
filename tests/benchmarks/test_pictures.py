"""pictures.py: peers become series, with and without an importance matrix apart; what is drawn can be kept."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

PICTURES = Path(__file__).parents[2] / "benchmarks" / "pictures.py"
DATA = {
    "title": "Quality for bytes", "note": "a note", "text": "eval.txt",
    "series": [{"name": "headrace", "ours": True, "points": [{"label": "4 bits", "bytes": 82e6, "kl": 0.2}]}],
}  # fmt: skip


def line(kind: str, size: int, kl: float, matrix: str | None = None, text: str = "eval.txt") -> str:
    """A line of llama_cpp_quality.py."""
    row = {"type": kind, "matrix": matrix, "text": text, "bytes": size, "windows": 8, "kl": kl, "top1": 0.8}
    return json.dumps(row) + "\n"


@pytest.mark.plots
def test_peers_with_and_without_a_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, plain, matrix, kept = (tmp_path / name for name in ("kl.json", "plain.jsonl", "matrix.jsonl", "kept.json"))
    data.write_text(json.dumps(DATA))
    plain.write_text(line("Q4_0", 91, 0.3) + line("Q4_0", 91, 0.4, text="other.txt"))
    matrix.write_text(line("Q4_0", 92, 0.17, matrix="calibration.txt"))
    drawn = ["kl", data, "--peers", plain, matrix, "--keep", kept, "-o", tmp_path / "kl"]
    monkeypatch.setattr(sys, "argv", ["pictures.py", *map(str, drawn)])
    pictures: dict[str, Any] = runpy.run_path(str(PICTURES), run_name="pictures")
    assert pictures["main"]() == 0
    assert json.loads(kept.read_text())["series"] == [
        *DATA["series"],
        {"name": "llama.cpp", "points": [{"label": "Q4_0", "bytes": 91, "kl": 0.3}]},
        {"name": "llama.cpp, importance matrix", "points": [{"label": "Q4_0", "bytes": 92, "kl": 0.17}]},
    ]
    assert "llama.cpp, importance matrix" in (tmp_path / "kl.svg").read_text()
