"""side_by_side.py: reports are joined figure by figure and drawn, and headrace answers as a contestant."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.exports import Exports

POSITION = 256  # bytes of the tiny model's int8 cache, a token
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / "side_by_side.py"), run_name="side_by_side")


def run_of(name: str, ratio: float, **more: Any) -> dict[str, Any]:
    """What one run of the script adds to a report."""
    figure = {
        "model": "shape", "question": {"do": "prompt", "tokens": 128}, "tokens": 128,
        "all": {"headrace": [0.5, 0.4, 0.6], "llama": [1.0, 0.8, 1.6]},
    }  # fmt: skip
    found = {
        "figures": {name: figure}, "ratios": {f"{name}_vs_llama": ratio}, "peaks": {"read_gb_s": 30.0}, "memory": {},
        "settings": {}, "seconds": 10.0, "missing": {}, "layers": 8, "threads": 2, "machine": {"processor": "a chip"},
    }  # fmt: skip
    return found | more


def test_a_report_goes_on_where_it_ended(script: dict[str, Any]) -> None:
    joined = script["joined"]
    report = joined({}, run_of("prompt_128", 2.0))
    assert report["missed"] == {}
    report = joined(report, run_of("decode_128", 1.0, peaks={"read_gb_s": 40.0, "int8_tops": 1.0}))
    assert list(report["figures"]) == ["prompt_128", "decode_128"]
    assert report["missed"] == {"decode_128_vs_llama": [1.0, 1.1]}
    assert (report["peaks"], report["seconds"]) == ({"read_gb_s": 40.0, "int8_tops": 1.0}, 20.0)
    report = joined(report, run_of("decode_128", 1.2, peaks={}))
    assert report["missed"] == {}, "a figure that is measured again replaces the one before"
    assert report["peaks"]["read_gb_s"] == 40.0


def test_every_floor_has_its_figure(script: dict[str, Any]) -> None:
    names = {f"{f.name}_vs_{peer}" for f in script["figures"](True) for peer in f.peers}
    others = {name for name in script["FLOORS"] if "batch" in name or "cold_start" in name}
    assert set(script["FLOORS"]) == names | others


def test_memory_beside_weights_and_cache_is_told(script: dict[str, Any]) -> None:
    ended = [
        {"model": "smol", "peak_rss": 500_000_000, "weight_bytes": 100_000_000, "cache_bytes": 50_000_000},
        {"name": "llama.cpp", "peak_rss": 9e9, "weight_bytes": 1},
    ]
    memory = script["memory"](ended)
    assert memory["smol"]["beside"] == 350_000_000
    assert script["joined"]({}, run_of("prompt_128", 2.0, memory=memory))["too_much_memory"] == ["smol"]


def test_a_report_becomes_a_picture(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = runpy.run_path(str(BENCHMARKS / "pictures.py"))["speeds"]
    drawn = speeds(script["joined"]({}, run_of("prompt_128", 2.0)))
    (group,) = drawn["groups"]
    assert group["what"] == "7B shape, 8 layers,\nprompt of 128"
    assert [round(bar["median"]) for bar in group["bars"]] == [256, 128]
    assert [bar["engine"] for bar in group["bars"]] == ["headrace", "llama.cpp Q4_0"]


def test_headrace_is_a_contestant(script: dict[str, Any], exports: Exports) -> None:
    arena = sys.modules["contestants.arena"]
    command = [sys.executable, str(BENCHMARKS / "contestants" / "run_headrace.py"), str(exports.bundle())]
    contestant = arena.Contestant([*command, "tiny", "1", "host", "2"])
    assert contestant.about["model"] == "tiny"
    for question in (
        {"do": "prompt", "tokens": 16},
        {"do": "decode", "depth": 16, "tokens": 3},
        {"do": "batch", "depth": 8, "tokens": 2, "slots": 2},
    ):
        assert contestant.ask(question)["seconds"] > 0
    about = contestant.end()
    assert about["peak_rss"] > about["weight_bytes"] > 0
    held = (16 + 1 + 3) + (8 + 1 + 2)  # the first slot held most while it decoded alone
    assert about["cache_bytes"] == held * POSITION


def test_a_contestant_that_has_ended_is_told_as_such(script: dict[str, Any]) -> None:
    arena = sys.modules["contestants.arena"]
    contestant = arena.Contestant([sys.executable, "-c", "print('{}', flush=True); input(); print('{}', flush=True)"])
    contestant._child.wait()  # as where the system wanted its memory
    with pytest.raises(SystemExit, match="ended: see its message above"):
        contestant.ask({"do": "about"})


def test_one_setting_of_a_peer_is_in_memory_at_a_time(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = sys.modules["contestants.arena"]
    seconds = {"": 2.0, "flash=1": 3.0, "flash=1 cache=q8_0": 1.0}
    alive: list[str] = []

    class Setting:
        def __init__(self, command: list[str]) -> None:
            self.name = " ".join(command[4:])
            alive.append(self.name)

        def ask(self, question: dict[str, Any]) -> dict[str, Any]:
            assert alive == [self.name]
            return {"seconds": seconds[self.name] if question["do"] == "prompt" else -seconds[self.name]}

        def end(self) -> dict[str, Any]:
            alive.remove(self.name)
            return {"name": self.name}

    monkeypatch.setattr(arena, "Contestant", Setting)
    models = SimpleNamespace(gguf={"shape": tmp_path / "shape.gguf"})
    contest = arena.Arena(models, sys.executable, 1, "native", quick=False, huge=False)
    contest.missing = {}
    for what, best in (("prompt", "flash=1 cache=q8_0"), ("decode", "flash=1"), ("prompt", "flash=1 cache=q8_0")):
        chosen = contest.peers("shape", ("llama",), {"do": what}, {"do": what})
        assert chosen["llama"].name == best
        assert alive == [best]


def test_a_command_is_run_and_its_memory_told(script: dict[str, Any], tmp_path: Path) -> None:
    arena, models = sys.modules["contestants.arena"], sys.modules["contestants.models"]
    made = models.Models(tmp_path, layers=8, peer_python=sys.executable, tokenizer=None)
    run = arena.Arena(made, sys.executable, 1, "host", quick=True, huge=False).run
    size = 200_000_000
    assert run([sys.executable, "-c", f"bytes({size}).count(1); b'x' * {size}"]) > size
    with pytest.raises(SystemExit, match="ended with status 3"):
        run([sys.executable, "-c", "raise SystemExit(3)"])
