"""What the terminal shows: progress on a terminal and off it, tables, sizes, JSON."""

from __future__ import annotations

import io
import json
import sys

import pytest

from headrace.cli.console import human_bytes, note, print_json, progress_bars, table
from headrace.measure.facts import human


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (98_362_432, "98.4 MB"), (999_960_000, "1.0 GB"),
     (5_060_000_000, "5.1 GB"), (7_000_000_000_000, "7000.0 GB")],
)  # fmt: skip
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (999, "999 B"),
        (999.6, "1 kB"),
        (98_362_432, "98.4 MB"),
        (999.4e6, "999 MB"),
        (999.6e6, "1 GB"),
        (999.6e9, "1000 GB"),
    ],
)
def test_no_size_is_a_power_of_ten(size: float, text: str) -> None:
    assert human(size) == text


def test_json_is_one_line_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"text": "引水渠\n", "n": 1})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"text": "引水渠\n", "n": 1}
    assert out.count("\n") == 1
    assert not err


def test_notes_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    note("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_table_keeps_a_row_on_a_line_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    table([("a" * 90, "1"), ("[b]", "22")], ("name", "n"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["name", "n"], ["a" * 90, "1"], ["[b]", "22"]]
    table([])
    assert capsys.readouterr().out.strip() == ""


def test_without_a_terminal_each_stage_says_it_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars() as progress:
        for done in range(3):
            progress("quantizing layers", done, 2)
    assert capsys.readouterr() == ("", "quantizing layers: done\n")


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bars() as progress:
        for done in range(4):
            progress("quantizing layers", done, 3)
            progress("host graphs", done, 3)
    shown = screen.getvalue()
    assert "quantizing layers" in shown
    assert "host graphs" in shown
    assert "3/3" in shown
    assert "\x1b[" in shown
